"""Ends a process that makes no progress, after writing the stacks of all its threads to stderr.

A collective that waits for ever, on a GPU or in a broken network, answers every health check: only progress tells. The
timer is faulthandler's own thread, outside the interpreter, so code that never gives the interpreter back is ended too.
"""

from __future__ import annotations

import faulthandler
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager

_RENEW_SECONDS = 1.0  # renewing more often costs a thread each time
_patience: float | None = None
_renewed = 0.0


@contextmanager
def watch(seconds: float) -> Generator[None]:
    """End the process with code 1 once `beat` has not been called for so long within the block."""
    global _patience
    _patience = seconds
    _renew()
    try:
        yield
    finally:
        _patience = None
        faulthandler.cancel_dump_traceback_later()


def beat() -> None:
    """Tell that the process makes progress; costs nothing where nobody watches."""
    if _patience is not None and time.monotonic() - _renewed >= min(_RENEW_SECONDS, _patience / 10):
        _renew()


def _renew() -> None:
    global _renewed
    assert _patience is not None
    _renewed = time.monotonic()
    faulthandler.dump_traceback_later(_patience, exit=True, file=sys.__stderr__)
