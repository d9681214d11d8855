"""Readers of original data sets: a new one is a module here and a row in this table."""

from collections.abc import Callable
from pathlib import Path

from datasets_prep.sources import cifar10, digits, imagefolder
from datasets_prep.sources.base import Source

SOURCES: dict[str, Callable[[Path | None], Source]] = {
    "cifar10": cifar10.open_source,
    "digits": digits.open_source,
    "imagefolder": imagefolder.open_source,
}
