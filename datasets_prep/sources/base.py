"""What a source of images hands to the writer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path

from datasets_prep.errors import UserError

UNLABELLED = -1
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
