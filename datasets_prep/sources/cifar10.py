"""CIFAR-10 from what is at hand: tarballs of JPEG folders, or the original python batches.

Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images". Looked for, in this order, in a folder:
`cifar10_{train,test}.tar.gz` (`…/<class>/NNNN.jpg`), `cifar-10-batches-py/`, `cifar-10-python.tar.gz`.
"""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from datasets_prep.errors import UserError
from datasets_prep.sources.base import NO_OPTIONS, Options, Sample, Source, by_key
from datasets_prep.sources.png import encode

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BATCHES = {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)}
FOLDER = "cifar-10-batches-py"
ARCHIVE = "cifar-10-python.tar.gz"


def open_source(path: Path | None = None, options: Options = NO_OPTIONS) -> Source:
    """Read all images of a copy of CIFAR-10 into memory, still encoded (at most 190 MB).

    Raises:
        UserError: nothing known at `path`, or it is damaged.
    """
    if path is None or not path.exists():
        raise UserError(f"--source {path} does not exist: name a folder with CIFAR-10 in it")
    tarballs = {split: path / f"cifar10_{split}.tar.gz" for split in BATCHES}
    try:
        if all(each.is_file() for each in tarballs.values()):
            splits = {split: list(_jpegs(tarball)) for split, tarball in tarballs.items()}
        else:
            read = _batch_reader(path)
            splits = {split: list(_pixels(names, read)) for split, names in BATCHES.items()}
    except (tarfile.TarError, OSError, EOFError, pickle.UnpicklingError, KeyError, ValueError) as error:
        raise UserError(f"{path}: this copy of CIFAR-10 is damaged ({error}): fetch it again") from error
    return Source("cifar10", CLASSES, {split: by_key(f"{path}:{split}", each) for split, each in splits.items()})


def _jpegs(tarball: Path) -> Iterator[Sample]:
    with tarfile.open(tarball, "r:gz") as archive:
        for member in archive:
            file = archive.extractfile(member)
            if file is None:
                continue
            name = PurePosixPath(member.name)
            label = CLASSES.index(name.parent.name)
            yield Sample(f"{name.parent.name}/{name.stem}", "jpg", label, partial(bytes, file.read()))


def _batch_reader(path: Path) -> Callable[[str], bytes]:
    """Return how to read a batch file by name, from a folder or out of the archive."""
    for folder in (path, path / FOLDER):
        if (folder / BATCHES["test"][0]).is_file():
            return lambda name: (folder / name).read_bytes()
    archive = path if path.is_file() else path / ARCHIVE
    if not archive.is_file():
        raise UserError(
            f"{path} holds no CIFAR-10: expected cifar10_train.tar.gz and cifar10_test.tar.gz, {FOLDER}/ or {ARCHIVE}"
        )
    with tarfile.open(archive, "r:gz") as opened:
        files = {Path(member.name).name: opened.extractfile(member) for member in opened.getmembers()}
        held = {name: file.read() for name, file in files.items() if file is not None}
    return held.__getitem__


def _pixels(names: tuple[str, ...], read: Callable[[str], bytes]) -> Iterator[Sample]:
    for name in names:
        batch = _BatchUnpickler(io.BytesIO(read(name)), encoding="bytes").load()
        images = np.asarray(batch[b"data"], np.uint8).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        for number, (image, label) in enumerate(zip(images, batch[b"labels"], strict=True)):
            yield Sample(f"{name}/{number:04d}", "png", int(label), partial(encode, image))


class _BatchUnpickler(pickle.Unpickler):
    """Loads arrays, lists and strings; any other name in the file could run code and is refused."""

    _ALLOWED = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("numpy.core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"a batch needs no {module}.{name}") from None
