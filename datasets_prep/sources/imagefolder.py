"""Folders of PNG, JPEG and WebP files, `DIR/<split>/<class>/file` or `DIR/<class>/file`, kept byte for byte.

Splits are folders called train, val, test or unlabelled; in the last, images lie side by side without classes.
"""

from __future__ import annotations

from pathlib import Path

from datasets_prep.errors import UserError
from datasets_prep.sources.base import EXTENSIONS, NO_OPTIONS, SPLITS, UNLABELLED, Options, Sample, Source, Span, by_key


def open_source(path: Path | None = None, options: Options = NO_OPTIONS) -> Source:
    """Find the images below `path`; without split folders all are `train`.

    Raises:
        UserError: no folder, no images, an empty class folder, files that are no PNG, JPEG or WebP, duplicate keys.
    """
    if path is None or not path.is_dir():
        raise UserError(f"--source {path} is not a folder: name one that holds DIR/<class>/image or DIR/train/…")
    folders = _folders(path)
    splits = {name: folders[name] for name in SPLITS if name in folders}
    if splits and len(splits) < len(folders):
        strange = ", ".join(sorted(folders.keys() - splits.keys()))
        raise UserError(f"{path} mixes splits with other folders ({strange}): splits are {', '.join(SPLITS)}")
    if not folders:
        raise UserError(f"{path} has no folders: put the images of each class into one, DIR/<class>/image")
    labelled = {name: _folders(folder) for name, folder in (splits or {"train": path}).items() if name != SPLITS[-1]}
    classes = _classes(path, labelled)
    found = {name: _labelled(split, classes) for name, split in labelled.items()}
    if SPLITS[-1] in splits:
        found[SPLITS[-1]] = [_sample(file, file.parent, UNLABELLED) for file in _files(splits[SPLITS[-1]])]
    _refuse_strangers(path, found)
    return Source(path.resolve().name, classes, {name: by_key(f"{path}/{name}", all_) for name, all_ in found.items()})


def _folders(path: Path) -> dict[str, Path]:
    return {each.name: each for each in sorted(path.iterdir()) if each.is_dir() and not each.name.startswith(".")}


def _classes(path: Path, labelled: dict[str, dict[str, Path]]) -> tuple[str, ...]:
    """Class names of `train`, or of all labelled splits where there is no `train`; no split may know more."""
    everywhere = {name for split in labelled.values() for name in split}
    known = set(labelled.get("train", everywhere))
    if everywhere - known:
        raise UserError(f"{path}: classes {sorted(everywhere - known)[:5]} are missing in train: add or remove them")
    return tuple(sorted(known))


def _labelled(folders: dict[str, Path], classes: tuple[str, ...]) -> list[Sample]:
    label = {name: number for number, name in enumerate(classes)}
    return [_sample(file, folder.parent, label[name]) for name, folder in folders.items() for file in _files(folder)]


def _files(folder: Path) -> list[Path]:
    """All files of a folder and below, without hidden ones."""
    files = [file for file in folder.rglob("*") if file.is_file() and not file.name.startswith(".")]
    if not files:
        raise UserError(f"{folder} is empty: it needs at least one image: add some or remove the folder")
    return files


def _sample(file: Path, root: Path, label: int) -> Sample:
    name = file.relative_to(root).with_suffix("")
    key = name.with_name(name.name.replace(".", "_")).as_posix()
    suffix = file.suffix.lower()
    return Sample(key, EXTENSIONS.get(suffix, suffix), label, Span(str(file)))


def _refuse_strangers(path: Path, found: dict[str, list[Sample]]) -> None:
    known = set(EXTENSIONS.values())
    strange = [each.key + each.extension for split in found.values() for each in split if each.extension not in known]
    if strange:
        raise UserError(
            f"{path}: {len(strange)} files are neither .png nor .jpg nor .webp ({', '.join(sorted(strange)[:3])}): "
            "convert or remove them"
        )
