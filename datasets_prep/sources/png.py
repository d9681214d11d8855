"""PNG files that are the same bytes under every zlib: pixels are stored, not compressed.

A fingerprint names a data set on every machine, so its bytes must not depend on a library's version. For images of
a few kilobytes the tar's own padding hides most of what compression would save.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BLOCK = 0xFFFF  # most bytes of a stored deflate block
_COLOUR_TYPE = {1: 0, 3: 2}  # PNG's codes for grey and RGB, by channels


def encode(pixels: NDArray[Any]) -> bytes:
    """Encode an (H, W) or (H, W, 3) uint8 image."""
    height, width, channels = (*pixels.shape, 1)[:3]
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOUR_TYPE[channels], 0, 0, 0)
    rows = pixels.reshape(height, width * channels)
    unfiltered = np.pad(rows, ((0, 0), (1, 0))).tobytes()  # each row starts with its filter, 0: none
    chunks = _chunk(b"IHDR", header) + _chunk(b"IDAT", _stored(unfiltered)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _stored(data: bytes) -> bytes:
    blocks = [data[start : start + _BLOCK] for start in range(0, len(data), _BLOCK)]
    framed = [
        struct.pack("<BHH", number == len(blocks), len(block), len(block) ^ 0xFFFF) + block
        for number, block in enumerate(blocks, 1)
    ]
    return b"\x78\x01" + b"".join(framed) + struct.pack(">I", zlib.adler32(data))
