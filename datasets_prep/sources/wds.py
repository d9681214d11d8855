"""WebDataset tars that somebody else wrote, to be written anew in a global permutation.

A tar's path tells its split (`val/0000.tar`, `imagenet-train-000123.tar`). Labels are the numbers in `.cls` members.
Nothing is unpacked: samples are read from where they lie in the tars.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from datasets_prep.errors import UserError, refuse
from datasets_prep.members import Entry, entries
from datasets_prep.sources.base import (
    NO_OPTIONS,
    UNLABELLED,
    Options,
    Sample,
    Source,
    Span,
    by_key,
    class_names,
    label_faults,
    split_of,
)

FIX = "mend the tars or leave them out"


def open_source(path: Path | None = None, options: Options = NO_OPTIONS) -> Source:
    """Find the samples of a tar, or of all tars in a folder and below; `options.class_list` names the classes.

    Raises:
        UserError: no tars, damaged ones, members that are refused, a split with and without labels.
    """
    if path is None or not path.exists():
        raise UserError(f"--source {path} does not exist: name a tar or a folder of tars")
    tars = sorted(path.rglob("*.tar")) if path.is_dir() else [path]
    if not tars:
        raise UserError(f"{path} holds no .tar files: name the folder that does")
    found: dict[str, dict[str, list[Sample]]] = defaultdict(dict)
    faults: list[str] = []
    for tar in tars:
        name = tar.relative_to(path).as_posix() if path.is_dir() else tar.name
        found[split_of(name)][name.removesuffix(".tar")] = list(_samples(tar, faults))
    refuse(path, faults, FIX)
    splits = {split: by_key(f"{path}:{split}", _joined(each)) for split, each in found.items()}
    labels = {split: [sample.label for sample in samples] for split, samples in splits.items()}
    classes = class_names(options.class_list, max((max(each, default=-1) for each in labels.values()), default=-1))
    refuse(path, [fault for split in labels for fault in label_faults(split, labels[split], len(classes))], FIX)
    return Source(path.resolve().stem, classes, splits)


def _samples(tar: Path, faults: list[str]) -> Iterator[Sample]:
    with open(tar, "rb") as file:
        for entry in entries(file, lambda extension: extension == "cls"):
            faults += [f"{tar}: {fault}" for fault in entry.faults]
            if not entry.faults:
                yield _sample(tar, entry)


def _sample(tar: Path, entry: Entry) -> Sample:
    image = entry.members[entry.image]
    label = entry.label()
    key = Path(entry.key).as_posix()
    return Sample(key, entry.image, UNLABELLED if label is None else label, Span(str(tar), image.offset, image.size))


def _joined(tars: dict[str, list[Sample]]) -> list[Sample]:
    """Samples of all tars; keys that start anew in each tar get the tar's name before them."""
    samples = [sample for each in tars.values() for sample in each]
    if len({sample.key for sample in samples}) == len(samples):
        return samples
    return [
        Sample(f"{tar.replace('.', '_')}/{sample.key}", sample.extension, sample.label, sample.load)
        for tar, each in tars.items()
        for sample in each
    ]
