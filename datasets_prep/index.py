"""The shard contract: what `index.json` says and what a data set's files are called.

A data set is a folder (or object-store prefix):

    index.json                    this module's `Index`, written last: without it nothing there counts
    labels.npy                    int32, the labels of all splits in index order; −1 where there is none
    <split>/shard-000000.tar      WebDataset: files of one sample share a key, fields by extension
    <split>/shard-000000.npy      sidecar: one row a sample, `sidecar_dtype`
"""

from __future__ import annotations

import hashlib
import io
import json
from threading import Lock
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

INDEX_NAME = "index.json"
LABELS_NAME = "labels.npy"

_parsing = Lock()  # numpy parses headers by `ast`, which in CPython 3.11 fails now and then in several threads at once


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Shard(_Row):
    """One tar: names are relative to the data set's root, checksums are SHA-256 in hex."""

    name: str
    samples: int = Field(ge=1)
    bytes: int = Field(ge=1)
    sha256: str
    sidecar_sha256: str

    @property
    def sidecar(self) -> str:
        """Name of the binary sidecar beside the tar."""
        return self.name.removesuffix(".tar") + ".npy"


class Split(_Row):
    """One split: its fields (`png`, `cls`; the first is the content) and its shards in order."""

    fields: tuple[str, ...] = Field(min_length=1)
    shards: tuple[Shard, ...] = Field(min_length=1)

    @property
    def samples(self) -> int:
        """Samples of all shards."""
        return sum(shard.samples for shard in self.shards)


class SizeQuantiles(_Row):
    """Image sides in pixels, (width, height), over all splits."""

    min: tuple[int, int]
    median: tuple[int, int]
    max: tuple[int, int]


class Index(_Row):
    """Everything a plan needs to know of a data set, without opening a shard."""

    version: Literal[1] = 1
    name: str
    modality: str = "image"
    classes: tuple[str, ...]
    image_size: SizeQuantiles
    labels_sha256: str
    splits: dict[str, Split] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_are_relative(self) -> Index:
        for split in self.splits.values():
            for shard in split.shards:
                if shard.name.startswith("/") or ".." in shard.name.split("/") or not shard.name.endswith(".tar"):
                    raise ValueError(f"shard name {shard.name!r} must be a relative path to a .tar without '..'")
        return self

    def label_slice(self, split: str) -> slice:
        """Rows of `labels.npy` that belong to `split`."""
        start = 0
        for name, rows in self.splits.items():
            if name == split:
                return slice(start, start + rows.samples)
            start += rows.samples
        raise KeyError(split)

    def to_json(self) -> bytes:
        """Canonical bytes of the index: equal data sets give equal bytes."""
        return json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False).encode() + b"\n"

    @property
    def fingerprint(self) -> str:
        """First 16 hex digits of the SHA-256 of the index; it names the data in runs and encoders."""
        return hashlib.sha256(self.to_json()).hexdigest()[:16]


def sidecar_dtype(key_bytes: int, fields: int) -> np.dtype[Any]:
    """Row type of a sidecar: the sample's key, then offset and size in bytes of each field's content in the tar."""
    return np.dtype([("key", f"S{key_bytes}"), ("offset", "<i8", (fields,)), ("size", "<i8", (fields,))])


def parse_array(data: bytes | memoryview) -> NDArray[Any]:
    """Read the bytes of a `.npy` file; ValueError for anything but one whole array without Python objects."""
    try:
        with _parsing:
            return np.load(io.BytesIO(data), allow_pickle=False)
    except (EOFError, OSError, SyntaxError) as error:
        raise ValueError(str(error)) from error
