"""What a writer leaves at an address until the index is there, so that the same command can go on where it ended.

incomplete/<plan>/plan.json                  the address is being written under this plan
incomplete/<plan>/train/shard-000000.json    that shard is finished
"""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from datasets_prep.errors import UserError
from datasets_prep.index import INDEX_NAME, LABELS_NAME, Index
from datasets_prep.layout import Plan
from datasets_prep.shards import Sink, Written, record_name, sidecar_name

FOLDER = "incomplete"
SKIPPED_NAME = "skipped.json"
_OURS = re.compile(rf"[^/]+/shard-\d{{6}}\.(tar|npy)|{re.escape(LABELS_NAME)}|{re.escape(SKIPPED_NAME)}")
_REQUESTS = 16  # small ones at a time


def records(plan: Plan) -> str:
    """Prefix of a plan's records."""
    return f"{FOLDER}/{plan.digest}"


def claim(sink: Sink, plan: Plan) -> dict[str, Written]:
    """Mark the address as being written under `plan`, and return the shards that an earlier run finished, by name.

    A finished shard counts when tar and sidecar still have their sizes; records of other plans are deleted first,
    because their shards are overwritten.

    Raises:
        UserError: there are shards without an index and without a mark, so somebody else's.
    """
    present = sink.sizes()
    marks = [name for name in present if name.startswith(f"{FOLDER}/")]
    foreign = [name for name in present if _OURS.fullmatch(name)]
    if foreign and not marks:
        raise UserError(
            f"{sink.uri} holds {len(foreign)} files like {foreign[0]} without {INDEX_NAME}, not left by this writer: "
            "choose another --out or delete them"
        )
    prefix = records(plan)
    sink.put(f"{prefix}/plan.json", (json.dumps(_described(plan), indent=1) + "\n").encode())
    sink.sweep()
    stale = [name for name in marks if not name.startswith(f"{prefix}/")]
    _delete(sink, [*stale, *(name for name in present if name == SKIPPED_NAME)])
    recorded = [task for task in plan.tasks if record_name(prefix, task.name) in present]
    with ThreadPoolExecutor(_REQUESTS) as pool:
        read = pool.map(partial(_read, sink), [record_name(prefix, task.name) for task in recorded])
        found = {task.name: written for task, written in zip(recorded, read, strict=True) if written is not None}
    return {name: written for name, written in found.items() if _is_whole(name, written, present)}


def release(sink: Sink, index: Index) -> None:
    """Delete what earlier runs with other plans left, so that a reader of `shard-*` finds this data only."""
    shards = [shard for split in index.splits.values() for shard in split.shards]
    written = {LABELS_NAME, SKIPPED_NAME, *(shard.name for shard in shards), *(shard.sidecar for shard in shards)}
    _delete(sink, [name for name in sink.sizes() if _OURS.fullmatch(name) and name not in written])


def clear(sink: Sink) -> None:
    """Delete all marks and records, the plans' last."""
    names = [name for name in sink.sizes(FOLDER) if name.startswith(f"{FOLDER}/")]
    _delete(sink, [name for name in names if not name.endswith("/plan.json")])
    _delete(sink, [name for name in names if name.endswith("/plan.json")])


def _described(plan: Plan) -> dict[str, object]:
    splits = {split.name: {"samples": len(split.samples), "shards": split.shards} for split in plan.splits}
    return {"source": plan.source, **plan.layout._asdict(), **plan.images._asdict(), "splits": splits}


def _read(sink: Sink, name: str) -> Written | None:
    try:
        return Written(**json.loads(sink.get(name)))
    except (ValueError, TypeError):  # cut off by a power failure
        return None


def _is_whole(tar: str, written: Written, present: dict[str, int]) -> bool:
    if not written.samples:
        return True
    return present.get(tar) == written.bytes and present.get(sidecar_name(tar)) == written.sidecar_bytes


def _delete(sink: Sink, names: list[str]) -> None:
    with ThreadPoolExecutor(_REQUESTS) as pool:
        list(pool.map(sink.delete, names))
