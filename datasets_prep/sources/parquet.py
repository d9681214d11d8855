"""Parquet files with a column of encoded images, as plain bytes or as Hugging Face's struct (bytes, path).

The split is told by the file's name (`train-00000-of-00042.parquet`). Images are read when they are written, in random
order: each process keeps the row groups it read last, so a data set is quick as long as its row groups fit there.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from datasets_prep.errors import UserError, refuse
from datasets_prep.sources.base import (
    NO_OPTIONS,
    UNLABELLED,
    Options,
    Sample,
    Source,
    by_key,
    class_names,
    label_faults,
    split_of,
)

_ROW_GROUPS_KEPT = 64
_MAGIC = ((b"\xff\xd8", "jpg"), (b"\x89PNG", "png"), (b"RIFF", "webp"))


@dataclass(frozen=True, slots=True)
class Cell:
    """The image in one row of a file, read when called."""

    path: str
    column: str
    group: int
    row: int

    def __call__(self) -> bytes:
        """Read it; ValueError where the row holds none."""
        data = _row_group(self.path, self.column, self.group)[self.row].as_py()
        if not data:
            raise ValueError(f"{self.path}, row group {self.group}, row {self.row} holds no image")
        return data


def open_source(path: Path | None = None, options: Options = NO_OPTIONS) -> Source:
    """Find the rows of a file, or of all files in a folder and below.

    Raises:
        UserError: no files, a damaged one, a missing column, labels that are no numbers or beyond the classes.
    """
    if path is None or not path.exists():
        raise UserError(f"--source {path} does not exist: name a parquet file or a folder of them")
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} holds no .parquet files: name the folder that does")
    splits: dict[str, list[Sample]] = defaultdict(list)
    classes: tuple[str, ...] = ()
    extension = ""
    for file in files:
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
        key = name.removesuffix(".parquet").replace(".", "_")
        cells, labels, named = _read(file, options)
        extension = extension or _extension(cells[0])
        splits[split_of(name)] += [
            Sample(f"{key}/{number:08d}", extension, label, cell)
            for number, (cell, label) in enumerate(zip(cells, labels, strict=True))
        ]
        classes = classes or named
    by_split = {split: [sample.label for sample in samples] for split, samples in splits.items()}
    classes = classes or class_names(None, max(max(each, default=UNLABELLED) for each in by_split.values()))
    faults = [fault for split in by_split for fault in label_faults(split, by_split[split], len(classes))]
    refuse(path, faults, "correct the labels")
    ordered = {split: by_key(f"{path}:{split}", samples) for split, samples in splits.items()}
    return Source(path.resolve().stem, classes, ordered)


def _read(file: Path, options: Options) -> tuple[list[Cell], list[int], tuple[str, ...]]:
    """Return the images of a file, their labels, and the class names in its schema."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        opened = parquet.ParquetFile(file)
        schema = opened.schema_arrow
        _require(file, options.image_column, schema.names)
        column = _bytes_column(file, options.image_column, schema.field(options.image_column).type)
        labels = _labels(file, opened, options.label_column)
        counts = [opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups)]
        named = _class_names(schema.metadata or {}, options.label_column)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file} is no whole parquet file ({error}): fetch it again") from error
    if not any(counts):
        raise UserError(f"{file} has no rows: leave it out")
    cells = [Cell(str(file), column, group, row) for group, rows in enumerate(counts) for row in range(rows)]
    return cells, labels, named


def _require(file: Path, column: str, names: list[str]) -> None:
    if column not in names:
        raise UserError(f"{file} has no column {column!r}, it has {', '.join(names)}: name one by --image-column")


def _bytes_column(file: Path, name: str, type_: Any) -> str:
    """Name of the leaf column that holds the bytes."""
    import pyarrow as pa

    if pa.types.is_struct(type_) and "bytes" in {field.name for field in type_}:
        return f"{name}.bytes"
    if not (pa.types.is_binary(type_) or pa.types.is_large_binary(type_)):
        raise UserError(f"{file}: column {name!r} holds {type_}, not encoded images: name another by --image-column")
    return name


def _labels(file: Path, opened: Any, column: str) -> list[int]:
    """Labels of all rows, −1 where the file has no such column."""
    import pyarrow as pa

    if column not in opened.schema_arrow.names:
        if column != NO_OPTIONS.label_column:
            _require(file, column, opened.schema_arrow.names)
        return [UNLABELLED] * opened.metadata.num_rows
    values = opened.read(columns=[column]).column(column)
    if not pa.types.is_integer(values.type) or values.null_count:
        raise UserError(f"{file}: column {column!r} must hold a number in every row: name another by --label-column")
    return values.to_pylist()


def _extension(cell: Cell) -> str:
    """Kind of the first image; every image reader tells the others by their first bytes."""
    try:
        data = cell()
    except ValueError as error:
        raise UserError(f"{error}: leave the file out") from error
    return next((extension for magic, extension in _MAGIC if data.startswith(magic)), "jpg")


def _class_names(metadata: dict[bytes, bytes], column: str) -> tuple[str, ...]:
    """Names that Hugging Face keeps in the schema."""
    try:
        return tuple(json.loads(metadata[b"huggingface"])["info"]["features"][column]["names"])
    except (KeyError, TypeError, ValueError):
        return ()


@lru_cache(maxsize=_ROW_GROUPS_KEPT)
def _row_group(path: str, column: str, group: int) -> Any:
    """One leaf column of a row group."""
    return _columns(path)(column, group)


@lru_cache(maxsize=256)
def _columns(path: str) -> Callable[[str, int], Any]:
    from pyarrow import parquet

    opened = parquet.ParquetFile(path, memory_map=True)

    def read(column: str, group: int) -> Any:
        values = opened.read_row_group(group, columns=[column], use_threads=False).column(0)
        combined = values.combine_chunks()
        return combined.field("bytes") if column.endswith(".bytes") and hasattr(combined, "field") else combined

    return read
