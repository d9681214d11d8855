"""USTAR archives in memory, with nothing in them that depends on the time, the user or the machine."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datasets_prep.errors import UserError
from datasets_prep.index import sidecar_dtype

BLOCK = 512
_NAME, _SIZE, _CHECKSUM, _PREFIX = slice(0, 100), slice(124, 135), slice(148, 154), slice(345, 500)
_TEMPLATE = np.frombuffer(tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT), np.uint8).copy()
_TEMPLATE[148:156] = ord(" ")  # as what a header counts when its checksum is taken
_END_BLOCKS = 2
_ZEROS = bytes(BLOCK)
_LEAST_BLOCKS = (32 << 20) // BLOCK  # memory is taken only as it is filled

Bytes = NDArray[np.uint8]


def tar_bytes(sizes: Any) -> int:
    """Bytes that files of these sizes take in a tar: a header of 512 each, contents padded to 512."""
    return sum(BLOCK + size + -size % BLOCK for size in sizes)


class TarBuilder:
    """Lays out one archive after the other in one buffer."""

    def __init__(self):
        self._blocks = np.empty((0, BLOCK), np.uint8)
        self._flat = self._blocks.reshape(-1).data
        self.clear()

    def clear(self) -> None:
        """Start an archive anew."""
        self._used = 0  # blocks
        self._keys: list[str] = []
        self._sizes: list[int] = []

    def add(self, key: str, contents: Sequence[bytes]) -> None:
        """Copy a sample's contents, one a field, leaving room for their headers."""
        self._keys.append(key)
        for content in contents:
            size = len(content)
            end = self._used + 1 + -(-size // BLOCK)
            if end + _END_BLOCKS > len(self._blocks):
                self._grow(end + _END_BLOCKS)
            start = (self._used + 1) * BLOCK
            self._flat[start : start + size] = content
            self._flat[start + size : end * BLOCK] = _ZEROS[: -size % BLOCK]
            self._sizes.append(size)
            self._used = end

    def finish(self, fields: Sequence[str]) -> tuple[memoryview, bytes]:
        """Write the headers; return the archive, which lasts until the next `add`, and its sidecar.

        Args:
            fields: extensions of the contents that each sample has.

        Raises:
            UserError: a name that does not fit into a header.
        """
        sizes = np.array(self._sizes, np.int64)
        blocks = 1 + -(-sizes // BLOCK)
        starts = np.cumsum(blocks) - blocks
        self._blocks[starts] = headers([f"{key}.{field}" for key in self._keys for field in fields], sizes)
        end = self._used + _END_BLOCKS
        self._blocks[self._used : end] = 0
        rows = len(self._keys), len(fields)
        sidecar = sidecar_bytes(self._keys, ((starts + 1) * BLOCK).reshape(rows), sizes.reshape(rows))
        return self._flat[: end * BLOCK], sidecar

    def _grow(self, blocks: int) -> None:
        larger = np.empty((max(blocks, 2 * len(self._blocks), _LEAST_BLOCKS), BLOCK), np.uint8)
        larger[: self._used] = self._blocks[: self._used]
        self._blocks, self._flat = larger, larger.reshape(-1).data


def headers(names: Sequence[str], sizes: NDArray[np.int64]) -> Bytes:
    """USTAR headers of N plain files, (N, 512); raises UserError for a name that does not fit."""
    rows = np.tile(_TEMPLATE, (len(names), 1))
    encoded = [encode_name(name) for name in names]
    if long := [number for number, name in enumerate(encoded) if len(name) > 100]:
        prefixes, rest = zip(*(split_name(encoded[number]) for number in long), strict=True)
        rows[long, _PREFIX] = _text(prefixes, 155)
        for number, name in zip(long, rest, strict=True):
            encoded[number] = name
    rows[:, _NAME] = _text(encoded, 100)
    rows[:, _SIZE] = _octal(sizes, 11)
    rows[:, _CHECKSUM] = _octal(rows.sum(1, dtype=np.int64), 6)
    rows[:, _CHECKSUM.stop] = 0
    return rows


def encode_name(name: str) -> bytes:
    """UTF-8; bytes of file names that are none pass unchanged."""
    return name.encode(errors="surrogateescape")


def split_name(name: bytes) -> tuple[bytes, bytes]:
    """Cut a long name at its first slash that leaves a prefix of ≤ 155 and a rest of ≤ 100 bytes."""
    at = name.find(b"/", len(name) - 101) if len(name) <= 256 else -1
    if not 0 < at <= 155:
        shown = name.decode(errors="replace")
        raise UserError(f"{shown}: name is too long for a tar (100 bytes, 155 more for folders): shorten the file name")
    return name[:at], name[at + 1 :]


def _text(values: Sequence[bytes], width: int) -> Bytes:
    return np.array(values, f"S{width}").view(np.uint8).reshape(len(values), width)


def _octal(values: NDArray[np.int64], digits: int) -> Bytes:
    shifts = 3 * np.arange(digits - 1, -1, -1)
    return ((values[:, None] >> shifts & 7) + ord("0")).astype(np.uint8)


def sidecar_bytes(keys: Sequence[str], offsets: NDArray[np.int64], sizes: NDArray[np.int64]) -> bytes:
    """Bytes of the sidecar of N samples, from offsets and sizes (N, fields) of their files' contents in the tar."""
    encoded = [encode_name(key) for key in keys]
    rows = np.empty(len(keys), sidecar_dtype(max(map(len, encoded)), offsets.shape[1]))
    rows["key"], rows["offset"], rows["size"] = encoded, offsets, sizes
    return npy(rows)


def npy(array: NDArray[Any]) -> bytes:
    """An array as the bytes of an .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()
