"""Whether an address can hold runs: what a store must do for leases and checkpoints, tried on objects of its own."""

from __future__ import annotations

import time
import uuid
from collections.abc import Generator
from contextlib import contextmanager

from datasets_prep.errors import UserError
from service.data.store import Store

PLACE = ".doctor"  # folder of the storage that holds what is written to try it
SECONDS = 5.0


def probe_store(uri: str) -> dict[str, float]:
    """Seconds of a write, a read, a conditional write and a removal.

    Raises:
        UserError: one of them fails, or does something else than it should.
    """
    store, name = Store(uri, SECONDS).sub(PLACE), uuid.uuid4().hex
    data = name.encode() * 32
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(what: str) -> Generator[None]:
        begin = time.perf_counter()
        yield
        seconds[what] = time.perf_counter() - begin

    with timed("put"):
        store.put(name, data)
    try:
        with timed("get"):
            read = store.get(name)
        with timed("create"):
            created = store.create(name, b"")
    finally:
        with timed("delete"):
            store.delete(name)
    if read != data:
        raise UserError(f"{store.uri} returns other bytes than were written: use another store")
    if created:
        raise UserError(
            f"{store.uri} overwrites what a conditional write must keep, and leases rest on that: "
            "use a store that honours If-None-Match"
        )
    return seconds
