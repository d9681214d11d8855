"""CIFAR-10 from what is at hand: tarballs of JPEG folders, or the original python batches.

Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images". Looked for, in this order, in a folder:
`cifar10_{train,test}.tar.gz` (`…/<class>/NNNN.jpg`), `cifar-10-batches-py/`, `cifar-10-python.tar.gz`.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath

from datasets_prep.errors import UserError
from datasets_prep.sources import batches
from datasets_prep.sources.base import NO_OPTIONS, Options, Sample, Source, by_key

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
            splits = {split: list(samples) for split, samples in _pixels(path).items()}
    except batches.DAMAGE as error:
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


def _pixels(path: Path) -> dict[str, Iterator[Sample]]:
    read = batches.reader(path, FOLDER, ARCHIVE, BATCHES["test"][0])
    if read is None:
        raise UserError(
            f"{path} holds no CIFAR-10: expected cifar10_train.tar.gz and cifar10_test.tar.gz, {FOLDER}/ or {ARCHIVE}"
        )

    def samples(names: tuple[str, ...]) -> Iterator[Sample]:
        for name in names:
            batch = batches.unpickle(read(name))
            yield from batches.samples(name, batch[b"data"], batch[b"labels"], len(CLASSES))

    return {split: samples(names) for split, names in BATCHES.items()}
