"""What a source of images hands to the writer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from operator import attrgetter

from datasets_prep.errors import UserError

UNLABELLED = -1


@dataclass(frozen=True, slots=True)
class Sample:
    """One image, loaded only when it is written.

    `key` is unique in its split and has no '.' after its last '/', `extension` is `png` or `jpg`, `label` counts
    into the source's classes or is −1.
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


def by_key(where: str, samples: Iterable[Sample]) -> list[Sample]:
    """Sort samples by key, so that no order of files or archives shows in the shards.

    Raises:
        UserError: two samples share a key.
    """
    ordered = sorted(samples, key=attrgetter("key"))
    twins = [one.key for one, two in zip(ordered, ordered[1:], strict=False) if one.key == two.key]
    if twins:
        raise UserError(
            f"{where}: {len(twins)} duplicate keys ({', '.join(twins[:3])}): a key is the file name up to its "
            "extension, with dots as underscores, and names one image of a split: rename or remove the others"
        )
    return ordered
