"""Tiny ImageNet as its zip unpacks: 200 classes of 64×64 JPEGs.

Le and Yang 2015, "Tiny ImageNet Visual Recognition Challenge". As with ImageNet, the official validation set is our
`test`, `val` is cut from `train`, and the official test set, which has no labels, is left out.
"""

from __future__ import annotations

from pathlib import Path

from datasets_prep.errors import UserError, refuse
from datasets_prep.sources.base import (
    NO_OPTIONS,
    Options,
    Sample,
    Source,
    Span,
    by_key,
    class_folders,
    files_of,
    image_sample,
    read_lines,
)

FOLDER = "tiny-imagenet-200"


def open_source(path: Path | None = None, options: Options = NO_OPTIONS) -> Source:
    """Find the images of `train/<wnid>/images` and `val/images` with `val/val_annotations.txt`.

    Raises:
        UserError: missing files, an empty class, an image without a label, a label that is no class.
    """
    root = _root(path)
    classes = tuple(sorted(read_lines(root / "wnids.txt")))
    label = {wnid: number for number, wnid in enumerate(classes)}
    folders = class_folders(root / "train")
    refuse(
        root / "train",
        [f"{wnid} is only here or only in wnids.txt" for wnid in sorted(folders.keys() ^ label.keys())],
        "unpack the archive again",
    )
    train = [
        image_sample(f"{wnid}/{name}", label[wnid], Span(file))
        for wnid, folder in folders.items()
        for name, file in files_of(folder / "images")
    ]
    splits = {"train": train, "test": _validation(root / "val", label)}
    return Source("tiny-imagenet", classes, {name: by_key(f"{root}/{name}", each) for name, each in splits.items()})


def _root(path: Path | None) -> Path:
    if path is not None and path.suffix == ".zip":
        raise UserError(f"--source {path} is packed: run `unzip {path}` and name the folder {FOLDER}")
    for root in [] if path is None else [path, path / FOLDER]:
        if (root / "wnids.txt").is_file() and (root / "train").is_dir():
            return root
    raise UserError(f"--source {path} is no Tiny ImageNet: name the folder {FOLDER} with wnids.txt, train/ and val/")


def _validation(folder: Path, label: dict[str, int]) -> list[Sample]:
    annotations = folder / "val_annotations.txt"
    rows = [line.split("\t") for line in read_lines(annotations)]
    wnids = {row[0]: row[1] for row in rows if len(row) > 1}
    files = dict(files_of(folder / "images"))
    wrong = [f"{name} has no label" for name in sorted(files.keys() - wnids.keys())]
    wrong += [f"{name} is missing" for name in sorted(wnids.keys() - files.keys())]
    wrong += [f"{name} is labelled {wnid}, which is no class" for name, wnid in wnids.items() if wnid not in label]
    refuse(annotations, wrong, "unpack the archive again")
    return [image_sample(name, label[wnids[name]], Span(file)) for name, file in files.items()]
