"""What a source of images hands to the writer."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path, PurePosixPath

from datasets_prep.errors import UserError, refuse

UNLABELLED = -1
SPLITS = ("train", "val", "test", "unlabelled")
EXTENSIONS = {".png": "png", ".jpg": "jpg", ".jpeg": "jpg", ".webp": "webp"}


@dataclass(frozen=True)
class Options:
    """What some sources can be told besides their path; `datasets_prep.sources.READS` says which reads which.

    Args:
        class_list: text file, one class a line; what follows the first space is a comment.
        image_column: of a parquet file, the encoded images.
        label_column: of a parquet file, integers; without such a column the images have no labels.
    """

    class_list: Path | None = None
    image_column: str = "image"
    label_column: str = "label"


NO_OPTIONS = Options()


@dataclass(frozen=True, slots=True)
class Sample:
    """One image, loaded only when it is written.

    `key` is unique in its split and has no '.' after its last '/', `extension` is `png`, `jpg` or `webp`, `label`
    counts into the source's classes or is −1. `load` can be pickled.
    """

    key: str
    extension: str
    label: int
    load: Callable[[], bytes] = field(repr=False)


@dataclass(frozen=True)
class Source:
    """A data set as it is found: its name, classes, and the samples of each split, sorted by key."""

    name: str
    classes: tuple[str, ...]
    splits: dict[str, list[Sample]]


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of a file, read when called: `size` from `offset`, or all of it where `size` is negative."""

    path: str
    offset: int = 0
    size: int = -1

    def __call__(self) -> bytes:
        """Read the bytes.

        Raises:
            OSError: the file cannot be read, or ends before the span does.
        """
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) < self.size:
            raise OSError(f"{self.path} ends {self.size - len(data)} bytes before the image does")
        return data


def image_sample(name: str, label: int, load: Callable[[], bytes]) -> Sample:
    """Make a sample of a file name below its split's folder."""
    path = PurePosixPath(name)
    key = path.with_name(path.stem.replace(".", "_")).as_posix()
    return Sample(key, EXTENSIONS[path.suffix.lower()], label, load)


def class_folders(split: Path) -> dict[str, Path]:
    """Return the folders in a folder by name, sorted, without hidden ones; UserError where there are none."""
    folders = {each.name: Path(each.path) for each in os.scandir(split) if each.is_dir() and each.name[0] != "."}
    if not folders:
        raise UserError(f"{split} holds no class folders: it needs one a class")
    return dict(sorted(folders.items()))


def files_of(folder: Path) -> list[tuple[str, str]]:
    """Return (name, path) of the images in a folder, sorted, without hidden files.

    Raises:
        UserError: no such folder, nothing in it, or something that is no image.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is missing: it needs images")
    files = sorted((each.name, each.path) for each in os.scandir(folder) if each.is_file() and each.name[0] != ".")
    if not files:
        raise UserError(f"{folder} is empty: it needs at least one image: add some or remove the folder")
    strange = [name for name, _ in files if os.path.splitext(name)[1].lower() not in EXTENSIONS]
    refuse(folder, [f"{name} is no image" for name in strange], "PNG, JPEG and WebP are read: convert or remove them")
    return files


def read_lines(file: Path) -> list[str]:
    """Return a list's lines without blank ones; UserError where it cannot be read or a line occurs twice."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as text ({error}): name a file with one entry a line") from error
    twice = sorted({line for line in lines if lines.count(line) > 1}) if len({*lines}) < len(lines) else []
    refuse(file, [f"{line!r} occurs twice" for line in twice], "remove one")
    if not lines:
        raise UserError(f"{file} is empty: it needs one entry a line")
    return lines


_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "unlabelled": "unlabelled",
    "unlabeled": "unlabelled",
}


def split_of(name: str) -> str:
    """Return the split that a file's path below its data set's folder tells, `train` where it tells none."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), "train")


def class_names(class_list: Path | None, largest: int) -> tuple[str, ...]:
    """Names of a list, or numbers up to the largest label."""
    return tuple(read_lines(class_list)) if class_list else tuple(map(str, range(largest + 1)))


def label_faults(split: str, labels: list[int], classes: int) -> list[str]:
    """Say what is wrong with the labels of a split: some without, or beyond the classes."""
    without = labels.count(UNLABELLED)
    faults = [f"{without} of {len(labels)} samples of {split} have no label"] if 0 < without < len(labels) else []
    beyond = sorted({label for label in labels if not UNLABELLED <= label < classes})
    return faults + [f"label {label} in {split} is none of {classes} classes" for label in beyond]


def by_key(where: str, samples: list[Sample]) -> list[Sample]:
    """Sort samples by key, so that no order of files or archives shows in the shards.

    Raises:
        UserError: two samples share a key, or one is not UTF-8.
    """
    strange = [repr(each.key) for each in samples if not _is_text(each.key)]
    refuse(where, [f"{key} is not UTF-8" for key in strange], "rename the files")
    ordered = sorted(samples, key=attrgetter("key"))
    twins = [one.key for one, two in zip(ordered, ordered[1:], strict=False) if one.key == two.key]
    if twins:
        raise UserError(
            f"{where}: {len(twins)} duplicate keys ({', '.join(twins[:3])}): a key is the file name up to its "
            "extension, with dots as underscores, and names one image of a split: rename or remove the others"
        )
    return ordered


def _is_text(key: str) -> bool:
    """Say whether a name is UTF-8: what is not stands in Python's names as lone surrogates."""
    try:
        key.encode()
    except UnicodeEncodeError:
        return False
    return True
