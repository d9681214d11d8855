"""Readers of original data sets: a new one is a module here and a row in this table."""

from collections.abc import Callable
from pathlib import Path

from datasets_prep.errors import UserError
from datasets_prep.sources import cifar10, digits, imagefolder
from datasets_prep.sources.base import NO_OPTIONS, Options, Source

SOURCES: dict[str, Callable[[Path | None, Options], Source]] = {
    "cifar10": cifar10.open_source,
    "digits": digits.open_source,
    "imagefolder": imagefolder.open_source,
}
READS: dict[str, tuple[str, ...]] = {}


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
