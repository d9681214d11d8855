"""STL-10 from its binary files: 5,000 + 8,000 labelled and 100,000 unlabelled images of 96×96.

Coates, Lee and Ng 2011, "An Analysis of Single-Layer Networks in Unsupervised Feature Learning". Pixels lie channels
first and column-major; labels count from 1.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets_prep.errors import UserError
from datasets_prep.sources.base import NO_OPTIONS, UNLABELLED, Options, Sample, Source, Span
from datasets_prep.sources.png import encode

FOLDER = "stl10_binary"
FILES = {"train": ("train_X.bin", "train_y.bin"), "test": ("test_X.bin", "test_y.bin")}
UNLABELLED_FILE = "unlabeled_X.bin"
_SIDE = 96
_BYTES = 3 * _SIDE * _SIDE


@dataclass(frozen=True, slots=True)
class StoredImage:
    """One image of a file of pixels, encoded as PNG when called."""

    pixels: Span

    def __call__(self) -> bytes:
        """Read and encode it."""
        columns = np.frombuffer(self.pixels(), np.uint8).reshape(3, _SIDE, _SIDE)
        return encode(columns.transpose(2, 1, 0))


def open_source(path: Path | None = None, options: Options = NO_OPTIONS) -> Source:
    """Find the images of the binary files; they are read one by one when written.

    Raises:
        UserError: a missing or truncated file, another number of labels than images, a label out of range.
    """
    root = _root(path)
    classes = tuple((root / "class_names.txt").read_text().split())
    splits = {split: _labelled(root / images, root / labels, classes) for split, (images, labels) in FILES.items()}
    if (root / UNLABELLED_FILE).is_file():
        found = _images(root / UNLABELLED_FILE)
        splits["unlabelled"] = [_sample(number, image, UNLABELLED) for number, image in enumerate(found)]
    return Source("stl10", classes, splits)


def _root(path: Path | None) -> Path:
    wanted = ["class_names.txt", *(name for pair in FILES.values() for name in pair)]
    places = [] if path is None else [path, path / FOLDER]
    if path is not None and path.name.endswith(".tar.gz"):
        raise UserError(f"--source {path} is packed: run `tar -xzf {path}` and name the folder {FOLDER}")
    missing = {place: [name for name in wanted if not (place / name).is_file()] for place in places}
    for place, names in missing.items():
        if not names:
            return place
    closest = min(missing.items(), key=lambda item: len(item[1]), default=(path, wanted))
    raise UserError(f"{closest[0]} is no whole copy of STL-10: {', '.join(closest[1])} missing: name {FOLDER}")


def _images(file: Path) -> list[StoredImage]:
    size = os.path.getsize(file)
    if size % _BYTES:
        raise UserError(f"{file} has {size} bytes, not a multiple of {_BYTES}: it is truncated, fetch it again")
    return [StoredImage(Span(str(file), offset, _BYTES)) for offset in range(0, size, _BYTES)]


def _labelled(images_file: Path, labels_file: Path, classes: tuple[str, ...]) -> list[Sample]:
    images = _images(images_file)
    labels = np.frombuffer(labels_file.read_bytes(), np.uint8).astype(int) - 1
    if len(images) != len(labels):
        raise UserError(f"{labels_file} has {len(labels)} labels for {len(images)} images: fetch both files again")
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(classes):
        raise UserError(f"{labels_file} has labels beyond 1…{len(classes)}, the classes in class_names.txt")
    return [_sample(number, image, label) for number, (image, label) in enumerate(zip(images, labels, strict=True))]


def _sample(number: int, image: StoredImage, label: int) -> Sample:
    return Sample(f"{number:06d}", "png", int(label), image)
