"""Writes a source as shards with an index, the index last.

Equal sources, layouts and image policies give equal bytes, whatever the machine, the number of processes, and how
often the writer was killed in between.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from datasets_prep import pending
from datasets_prep.errors import UserError
from datasets_prep.images import VERBATIM, ImagePolicy
from datasets_prep.index import INDEX_NAME, LABELS_NAME, Index, Shard, SizeQuantiles, Split
from datasets_prep.layout import Layout, Plan, SplitPlan, lay_out
from datasets_prep.shards import Job, Sink, Task, Written, write_shards
from datasets_prep.sources.base import Source
from datasets_prep.tar import encode_name, npy

_LISTED = 100  # bad images that an error names

Progress = Callable[[int, int, int], None]  # samples done, samples in all, bytes of the images done
OnError = Literal["refuse", "skip"]


def write_dataset(
    source: Source,
    sink: Sink,
    *,
    seed: int = 0,
    shard_mb: int = 64,
    val_share: float = 0.1,
    images: ImagePolicy = VERBATIM,
    on_error: OnError = "refuse",
    workers: int = 1,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> Index:
    """Write all splits of `source`; where `sink` holds just that already, check so and write nothing.

    A run that was killed is continued: shards it finished are kept.

    Args:
        source: what to write; its samples' `load` is sent to processes if there are several.
        sink: where to, a `Store`.
        seed: of the global order of each split and of the validation cut.
        shard_mb: MiB of a shard, about.
        val_share: share of `train` that becomes `val` where the source has no `val`.
        images: how images are checked and scaled.
        on_error: `refuse` names all bad images in an error, `skip` leaves them out and lists them in `skipped.json`.
        workers: processes that write shards; fewer where there is not a shard's data for each.
        progress: called with (samples done, samples in all, bytes done), first with what an earlier run finished.
        say: called with a line on what was kept or skipped.

    Raises:
        UserError: samples that are no images, nothing to write, another data set at the address, or a store that
            fails.
    """
    plan = lay_out(source, Layout(seed, shard_mb, val_share), images)
    run = _Run(plan, on_error == "skip", workers, progress, say or _silent)
    existing = read_index(sink) if sink.exists(INDEX_NAME) else None
    if existing is not None:
        if not _may_be(existing, plan, run.skip) or run.write(None, {}) != existing:
            raise _other_data(sink, existing)
        pending.clear(sink)
        return existing
    index = run.write(sink, pending.claim(sink, plan))
    pending.release(sink, index)
    if not sink.create(INDEX_NAME, index.to_json()) and (first := read_index(sink)) != index:
        raise _other_data(sink, first)
    pending.clear(sink)
    return index


def read_index(sink: Sink) -> Index:
    """Return the index at an address.

    Raises:
        UserError: it cannot be read as one.
    """
    try:
        return Index.model_validate_json(sink.get(INDEX_NAME))
    except ValidationError as error:
        raise UserError(
            f"{sink.uri}/{INDEX_NAME} is no data set index of this version "
            f"({error.error_count()} errors): shard the data again, elsewhere or after deleting it"
        ) from error


def _silent(line: str) -> None:
    """Say nothing."""


def _may_be(index: Index, plan: Plan, skip: bool) -> bool:
    """Whether an index can be this plan's, as far as that shows without reading an image."""
    if (index.name, index.classes, list(index.splits)) != (plan.source, plan.classes, [s.name for s in plan.splits]):
        return False
    return skip or all(index.splits[split.name].samples == len(split.samples) for split in plan.splits)


def _other_data(sink: Sink, existing: Index) -> UserError:
    samples = sum(split.samples for split in existing.splits.values())
    return UserError(
        f"{sink.uri} already holds a different data set ({existing.name}, {samples} samples, fingerprint "
        f"{existing.fingerprint}; other images, seed, shard size or validation share): "
        "choose another --out or delete it"
    )


class _Run:
    """One pass over a plan: writes what is not finished, and makes an index of everything."""

    def __init__(self, plan: Plan, skip: bool, workers: int, progress: Progress | None, say: Callable[[str], None]):
        self.plan, self.skip, self._say = plan, skip, say
        self._workers = max(1, min(workers, plan.expected_bytes // (plan.layout.shard_mb << 20)))
        self._progress, self._samples, self._bytes = progress, 0, 0

    def write(self, sink: Sink | None, finished: dict[str, Written]) -> Index:
        """Write the shards that are not `finished`, and the labels; a `sink` of None only takes checksums."""
        shards = dict(finished)
        if finished:
            self._say(f"{len(finished)} of {len(self.plan.tasks)} shards are kept from an earlier run")
        self._advance(sum(each.samples + len(each.bad) for each in finished.values()), 0)
        job = Job(sink, pending.records(self.plan), self.plan.images, self.skip)
        waiting = [task for task in self.plan.tasks if task.name not in finished]
        with closing(write_shards(waiting, job, self._workers, self._advance)) as writing:
            for task, written in writing:
                shards[task.name] = written
        bad = {split.name: _bad(split, shards) for split in self.plan.splits}
        if any(bad.values()):
            self._report(bad, sink)
        labels = npy(np.concatenate([_labels(split, shards) for split in self.plan.splits]))
        if sink is not None:
            sink.put(LABELS_NAME, labels)
        return self._index(shards, hashlib.sha256(labels).hexdigest())

    def _advance(self, samples: int, size: int) -> None:
        self._samples += samples
        self._bytes += size
        if self._progress:
            self._progress(self._samples, self.plan.samples, self._bytes)

    def _report(self, bad: dict[str, list[tuple[str, str]]], sink: Sink | None) -> None:
        count = sum(map(len, bad.values()))
        if not self.skip:
            raise _bad_images(self.plan, bad, count)
        if emptied := [split.name for split in self.plan.splits if len(bad[split.name]) == len(split.samples)]:
            raise UserError(f"{self.plan.source}: every image of {', '.join(emptied)} is broken: nothing to write")
        self._say(f"{count} of {self.plan.samples} images are broken and left out: {pending.SKIPPED_NAME} lists them")
        if sink is not None:
            rows = {split: [{"name": name, "reason": why} for name, why in each] for split, each in bad.items() if each}
            sink.put(pending.SKIPPED_NAME, (json.dumps(rows, indent=1) + "\n").encode())

    def _index(self, shards: dict[str, Written], labels_sha256: str) -> Index:
        return Index(
            name=self.plan.source,
            classes=self.plan.classes,
            image_size=_quantiles(list(shards.values())),
            labels_sha256=labels_sha256,
            splits={
                split.name: Split(
                    fields=split.fields,
                    shards=tuple(_row(t, shards[t.name]) for t in split.tasks() if shards[t.name].samples),
                )
                for split in self.plan.splits
            },
        )


def _row(task: Task, written: Written) -> Shard:
    return Shard(
        name=task.name,
        samples=written.samples,
        bytes=written.bytes,
        sha256=written.sha256,
        sidecar_sha256=written.sidecar_sha256,
    )


def _bad(split: SplitPlan, shards: dict[str, Written]) -> list[tuple[str, str]]:
    """File name and reason of each bad image of a split."""
    named: list[tuple[str, str]] = []
    for task in split.tasks():
        for position, reason in shards[task.name].bad:
            sample = task.samples[position]
            named.append((f"{sample.key}.{sample.extension}", reason))
    return named


def _bad_images(plan: Plan, bad: dict[str, list[tuple[str, str]]], count: int) -> UserError:
    rows = [f"  {split}/{name}: {reason}" for split, each in bad.items() for name, reason in each]
    if len(rows) > _LISTED:
        rows[_LISTED:] = [f"  and {len(rows) - _LISTED} more"]
    return UserError(
        f"{plan.source}: {count} of {plan.samples} samples are not whole JPEG, PNG or WebP images: "
        "repair or remove them, or leave them out with --on-error skip\n" + "\n".join(map(_printable, rows))
    )


def _printable(text: str) -> str:
    return encode_name(text).decode(errors="replace")


def _labels(split: SplitPlan, shards: dict[str, Written]) -> NDArray[np.int32]:
    kept: list[int] = []
    for task in split.tasks():
        bad = {position for position, _ in shards[task.name].bad}
        kept += [sample.label for position, sample in enumerate(task.samples) if position not in bad]
    return np.array(kept, "<i4")


def _quantiles(shards: list[Written]) -> SizeQuantiles:
    counts: tuple[Counter[int], Counter[int]] = (Counter(), Counter())
    for shard in shards:
        for *size, count in shard.sizes:
            for sides, side in zip(counts, size, strict=True):
                sides[side] += count
    ordered = [np.repeat(*np.array(sorted(sides.items()), np.int64).T) for sides in counts]
    least, middle, most = ((int(ordered[0][at]), int(ordered[1][at])) for at in (0, len(ordered[0]) // 2, -1))
    return SizeQuantiles(min=least, median=middle, max=most)
