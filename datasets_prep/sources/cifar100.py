"""CIFAR-100 with its fine labels, from the python or the binary version, a folder or the tarball.

Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images". Both versions give the same samples.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from datasets_prep.errors import UserError
from datasets_prep.sources import batches
from datasets_prep.sources.base import NO_OPTIONS, Options, Sample, Source, by_key

Splits = dict[str, list[Sample]]
SPLITS = ("train", "test")
_ROW = 2 + 3072  # binary version: coarse label, fine label, pixels


def open_source(path: Path | None = None, options: Options = NO_OPTIONS) -> Source:
    """Read all images into memory (185 MB).

    Raises:
        UserError: nothing known at `path`, or it is damaged.
    """
    if path is None or not path.exists():
        raise UserError(f"--source {path} does not exist: name a folder with CIFAR-100 in it")
    try:
        for version, (probe, load) in _VERSIONS.items():
            read = batches.reader(path, f"cifar-100-{version}", f"cifar-100-{version}.tar.gz", probe)
            if read is not None:
                classes, splits = load(read)
                return Source("cifar100", classes, {split: by_key(split, each) for split, each in splits.items()})
    except batches.DAMAGE as error:
        raise UserError(f"{path}: this copy of CIFAR-100 is damaged ({error}): fetch it again") from error
    raise UserError(
        f"{path} holds no CIFAR-100: expected cifar-100-python/ or cifar-100-binary/, or one of them as .tar.gz"
    )


def _from_pickles(read: Callable[[str], bytes]) -> tuple[tuple[str, ...], Splits]:
    classes = tuple(name.decode() for name in batches.unpickle(read("meta"))[b"fine_label_names"])
    loaded = {split: batches.unpickle(read(split)) for split in SPLITS}
    return classes, {
        split: list(batches.samples(split, batch[b"data"], batch[b"fine_labels"], len(classes), digits=5))
        for split, batch in loaded.items()
    }


def _from_binary(read: Callable[[str], bytes]) -> tuple[tuple[str, ...], Splits]:
    classes = tuple(read("fine_label_names.txt").decode().split())
    rows = {split: np.frombuffer(read(f"{split}.bin"), np.uint8).reshape(-1, _ROW) for split in SPLITS}
    return classes, {
        split: list(batches.samples(split, each[:, 2:], each[:, 1], len(classes), digits=5))
        for split, each in rows.items()
    }


_VERSIONS = {"python": ("meta", _from_pickles), "binary": ("train.bin", _from_binary)}
