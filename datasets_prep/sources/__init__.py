"""Readers of original data sets: a new one is a module here and a row in this table."""

from collections.abc import Callable
from pathlib import Path

from datasets_prep.errors import UserError
from datasets_prep.sources import cifar10, cifar100, digits, imagefolder, imagenet, parquet, stl10, tiny_imagenet, wds
from datasets_prep.sources.base import NO_OPTIONS, Options, Source

SOURCES: dict[str, Callable[[Path | None, Options], Source]] = {
    "cifar10": cifar10.open_source,
    "cifar100": cifar100.open_source,
    "digits": digits.open_source,
    "imagefolder": imagefolder.open_source,
    "imagenet": imagenet.open_source,
    "imagenet100": imagenet.open_subset,
    "parquet": parquet.open_source,
    "stl10": stl10.open_source,
    "tiny-imagenet": tiny_imagenet.open_source,
    "wds": wds.open_source,
}
READS: dict[str, tuple[str, ...]] = {
    "imagenet100": ("class_list",),
    "parquet": ("image_column", "label_column"),
    "wds": ("class_list",),
}


def open_source(name: str, path: Path | None = None, options: Options = NO_OPTIONS) -> Source:
    """Open a source of `SOURCES` by name.

    Raises:
        UserError: unknown name, an option that this source does not read, or whatever is wrong with the data.
    """
    if name not in SOURCES:
        raise UserError(f"source {name!r} is unknown: choose one of {', '.join(SOURCES)}")
    given = [option for option, value in vars(options).items() if value != getattr(NO_OPTIONS, option)]
    unread = [f"--{option.replace('_', '-')}" for option in given if option not in READS.get(name, ())]
    if unread:
        raise UserError(f"source {name} does not read {', '.join(unread)}: leave it out")
    return SOURCES[name](path, options)
