"""ImageNet (ILSVRC 2012) from its folders or its original tars, whole or the classes of a list.

Russakovsky et al. 2015, "ImageNet Large Scale Visual Recognition Challenge". Classes are WordNet ids in sorted order,
as everywhere in the field. The official validation set is what papers report, so it is our `test`; `val`, by which
runs are chosen, is cut from `train`. The official test set has no labels and is left out.

Looked for in a folder, each half by itself:
`train/<wnid>/*.JPEG` or `ILSVRC2012_img_train.tar`, a tar of tars that is read where it lies;
`val/<wnid>/*.JPEG`, or `val/*.JPEG` or `ILSVRC2012_img_val.tar` with the labels of `LOC_val_solution.csv` or of
`ILSVRC2012_devkit_t12` (a folder or `.tar.gz`). Kaggle's `ILSVRC/Data/CLS-LOC` is found too.
"""

from __future__ import annotations

import csv
import io
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from datasets_prep.errors import UserError, refuse
from datasets_prep.members import Member, members
from datasets_prep.sources.base import (
    EXTENSIONS,
    NO_OPTIONS,
    Options,
    Sample,
    Source,
    Span,
    by_key,
    class_folders,
    files_of,
    read_lines,
)

TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12"
SOLUTION = "LOC_val_solution.csv"
_WNID = re.compile(r"n\d{8}")


class _Image(NamedTuple):
    wnid: str
    file: str
    load: Span


def open_source(path: Path | None = None, options: Options = NO_OPTIONS) -> Source:
    """Find all images; `val` becomes `test`.

    Raises:
        UserError: missing files, empty classes, damaged tars, labels that do not fit the images.
    """
    train, val = _found(path)
    return _source("imagenet", path, train, val)


def open_subset(path: Path | None = None, options: Options = NO_OPTIONS) -> Source:
    """As `open_source`, with the classes of `options.class_list` only (a WordNet id a line)."""
    if options.class_list is None:
        raise UserError("source imagenet100 needs --class-list FILE, with a WordNet id such as n02869837 a line")
    wanted = [line.split()[0] for line in read_lines(options.class_list)]
    train, val = _found(path)
    absent = sorted({*wanted} - {image.wnid for image in train})
    refuse(options.class_list, [f"{wnid!r} is no class of {path}" for wnid in absent], "correct the list")
    kept = ([image for image in images if image.wnid in wanted] for images in (train, val))
    return _source(f"imagenet{len(wanted)}", path, *kept)


def _source(name: str, path: Path | None, train: list[_Image], val: list[_Image]) -> Source:
    classes = tuple(sorted({image.wnid for image in train}))
    label = {wnid: number for number, wnid in enumerate(classes)}
    strange = sorted({image.wnid for image in val} - label.keys())
    refuse(path, [f"class {wnid} is in val and not in train" for wnid in strange], "complete the train images")
    splits = {
        split: by_key(f"{path}:{split}", [_sample(image, label[image.wnid]) for image in images])
        for split, images in (("train", train), ("test", val))
    }
    return Source(name, classes, splits)


def _sample(image: _Image, label: int) -> Sample:
    name = PurePosixPath(image.file)
    return Sample(f"{image.wnid}/{name.stem.replace('.', '_')}", EXTENSIONS[name.suffix.lower()], label, image.load)


def _found(path: Path | None) -> tuple[list[_Image], list[_Image]]:
    """Return the images of train and val."""
    if path is None or not path.is_dir():
        raise UserError(f"--source {path} is not a folder: name one with ImageNet's train/ and val/, or its tars")
    places = (path, path / "ILSVRC" / "Data" / "CLS-LOC", path / "Data" / "CLS-LOC")
    train = _first(places, "train", TRAIN_TAR)
    val = _first(places, "val", VAL_TAR)
    images = list(_in_folders(train) if train.is_dir() else _in_tars(train))
    if not images:
        raise UserError(f"{train} holds no images: fetch it again")
    if val.is_dir() and any(_WNID.fullmatch(each.name) for each in val.iterdir()):
        return images, list(_in_folders(val))
    flat = _flat(val)
    return images, _labelled(val, flat, _val_labels(path, len(flat)))


def _first(places: tuple[Path, ...], folder: str, tar: str) -> Path:
    for place in places:
        if (place / folder).is_dir():
            return place / folder
        if (place / tar).is_file():
            return place / tar
    raise UserError(f"{places[0]} holds neither {folder}/ nor {tar}: name the folder that holds ImageNet")


def _in_folders(split: Path) -> Iterator[_Image]:
    for wnid, folder in class_folders(split).items():
        _check_wnid(wnid, folder)
        for name, path in files_of(folder):
            yield _Image(wnid, name, Span(path))


def _in_tars(tar: Path) -> Iterator[_Image]:
    """Images of a tar that holds one tar a class."""
    with open(tar, "rb") as file:
        for inner in list(_whole(tar, members(file))):
            wnid = PurePosixPath(inner.name).stem
            where = f"{tar}/{inner.name}"
            _check_wnid(wnid, where)
            images = _whole(where, members(file, inner.offset, inner.offset + inner.size))
            for image in _images(where, images):
                yield _Image(wnid, image.name, Span(str(tar), image.offset, image.size))


def _check_wnid(name: str, where: object) -> None:
    if not _WNID.fullmatch(name):
        raise UserError(f"{where}: {name!r} is no WordNet id such as n01440764: use the source imagefolder")


def _flat(val: Path) -> dict[str, Span]:
    """Images of val by file name, where they lie side by side."""
    if val.is_dir():
        return {name: Span(path) for name, path in files_of(val)}
    with open(val, "rb") as file:
        found = _images(val, _whole(val, members(file)))
        return {PurePosixPath(each.name).name: Span(str(val), each.offset, each.size) for each in found}


def _whole(where: object, found: Iterator[Member]) -> Iterator[Member]:
    for member in found:
        if member.fault:
            raise UserError(f"{where}: {member.fault}: fetch it again")
        yield member


def _images(where: object, found: Iterator[Member]) -> list[Member]:
    images = list(found)
    strange = [each.name for each in images if PurePosixPath(each.name).suffix.lower() not in EXTENSIONS]
    refuse(where, [f"{name!r} is no image" for name in strange], "remove it or fetch the tar again")
    if not images:
        raise UserError(f"{where} holds no images: fetch it again")
    return images


def _labelled(val: Path, images: dict[str, Span], wnids: dict[str, str]) -> list[_Image]:
    unknown = [name for name in images if PurePosixPath(name).stem not in wnids]
    refuse(val, [f"{name} has no label" for name in unknown], "the labels are of other images, fetch both again")
    return [_Image(wnids[PurePosixPath(name).stem], name, load) for name, load in images.items()]


def _val_labels(path: Path, images: int) -> dict[str, str]:
    """WordNet ids by the stem of the image's file name."""
    for place in (path, path.parent):
        if (place / SOLUTION).is_file():
            return _from_solution(place / SOLUTION)
        archive = place / f"{DEVKIT}.tar.gz"
        if (place / DEVKIT).is_dir():
            return _from_devkit(place / DEVKIT, lambda name, at=place: (at / name).read_bytes(), images)
        if archive.is_file():
            return _from_devkit(archive, lambda name, at=archive: _packed(at, name), images)
    raise UserError(
        f"{path} has no labels of the validation images: put {DEVKIT}.tar.gz or {SOLUTION} into it, "
        "or sort the images into folders val/<wnid>/"
    )


def _from_solution(file: Path) -> dict[str, str]:
    try:
        with open(file, newline="") as lines:
            return {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(lines)}
    except (KeyError, IndexError, AttributeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} lacks a label or the columns ImageId, PredictionString: fetch it again") from error


def _from_devkit(where: Path, read: Callable[[str], bytes], images: int) -> dict[str, str]:
    try:
        numbers = read(f"{DEVKIT}/data/ILSVRC2012_validation_ground_truth.txt").split()
        wnids = _synsets(read(f"{DEVKIT}/data/meta.mat"))
        labels = [wnids[int(number)] for number in numbers]
    except (OSError, EOFError, tarfile.TarError, KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(
            f"{where} is no whole devkit, or a label in it is no class ({error}): fetch it again"
        ) from error
    if len(labels) != images:
        raise UserError(f"{where} has {len(labels)} validation labels for {images} images: fetch both again")
    return {f"ILSVRC2012_val_{number:08d}": wnid for number, wnid in enumerate(labels, 1)}


def _packed(archive: Path, name: str) -> bytes:
    with tarfile.open(archive, "r:gz") as opened:
        file = opened.extractfile(name)
        if file is None:
            raise KeyError(f"{name} is no file")
        return file.read()


def _synsets(meta: bytes) -> dict[int, str]:
    """WordNet ids of the classes by their number in the devkit; nodes with children are no classes."""
    from scipy.io import loadmat

    rows: Any = loadmat(io.BytesIO(meta), squeeze_me=True, variable_names=["synsets"])["synsets"]
    return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows if int(row["num_children"]) == 0}
