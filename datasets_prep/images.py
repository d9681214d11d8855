"""What becomes of an image on its way into a shard.

Bytes are kept as they are: grey, CMYK and rotated pictures too, which readers convert to RGB, ignoring the EXIF
orientation as Pillow and torchvision do. With `short_side`, larger images are scaled down and written again in their
own format, as RGB, without metadata, under the same rules; smaller ones are kept as they are.
"""

from __future__ import annotations

import io
import struct
import zlib
from contextlib import suppress
from typing import Literal, NamedTuple

from PIL import Image, features

try:
    import simplejpeg
except ImportError:  # Pillow decodes JPEG too, only slower
    simplejpeg = None

PIXEL_CAP = 178_956_970  # a larger image is taken for a decompression bomb
FORMATS = ("JPEG", "PNG", "WEBP")
_FRAMES = (0xC0, 0xC1, 0xC2)  # JPEG's start-of-frame markers: baseline, extended, progressive
_REDUCING_GAP = 2  # libjpeg scales down to no less than this many times the wanted size; Pillow does the rest

Size = tuple[int, int]  # width, height


class BadImage(ValueError):
    """These bytes are not a whole JPEG, PNG or WebP image, or too large a one; the message says why."""


class ImagePolicy(NamedTuple):
    """How images are checked and scaled.

    Args:
        check: `header` looks at type, size and end of the file and at PNG's checksums, and decodes what it cannot
            vouch for; `full` decodes every image.
        short_side: pixels to which the short side of larger images is scaled; None keeps all bytes.
        quality: of scaled JPEG and WebP images, 1 to 100.
    """

    check: Literal["header", "full"] = "header"
    short_side: int | None = None
    quality: int = 90

    @property
    def encoder(self) -> str:
        """Names what decides the bytes of scaled images besides this policy; empty when none are scaled."""
        if self.short_side is None:
            return ""
        return " ".join(f"{name} {features.version(name)}" for name in ("pil", "jpg", "libjpeg_turbo", "zlib", "webp"))


VERBATIM = ImagePolicy()


def prepare(data: bytes, policy: ImagePolicy) -> tuple[bytes, Size]:
    """Return an image's bytes as they are stored and its (width, height) in pixels.

    Raises:
        BadImage: it is broken, of another format, or above `PIXEL_CAP`.
    """
    size = header_size(data)
    if size is not None and size[0] * size[1] > PIXEL_CAP:
        raise BadImage(f"{size[0]}×{size[1]} pixels are more than {PIXEL_CAP:,}")
    if size is None or policy.check == "full" or (policy.short_side and min(size) > policy.short_side):
        return _decoded(data, policy)
    return data, size


def header_size(data: bytes) -> Size | None:
    """(width, height) of a file that looks whole from its structure, without decoding; None when that cannot tell."""
    if data[:2] == b"\xff\xd8":
        return _jpeg_size(data)
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return _png_size(data)
    return None


def _jpeg_size(data: bytes) -> Size | None:
    if data[-2:] != b"\xff\xd9":
        return None
    at, last = 2, len(data) - 9
    while at <= last and data[at] == 0xFF:
        if data[at + 1] in _FRAMES:
            height, width = struct.unpack_from(">HH", data, at + 5)
            return (width, height) if width and height else None
        at += 2 + (data[at + 2] << 8 | data[at + 3])
    return None


def _png_size(data: bytes) -> Size | None:
    view, at = memoryview(data), 8
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if end > len(data) or zlib.crc32(view[at + 4 : end - 4]) != int.from_bytes(view[end - 4 : end]):
            return None
        if kind == b"IEND":
            width, height = struct.unpack_from(">II", data, 16)
            return (width, height) if width and height else None
        at = end
    return None


def _decoded(data: bytes, policy: ImagePolicy) -> tuple[bytes, Size]:
    """Decode all pixels; scale them where the policy says so."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            size = image.size
            if size[0] * size[1] > PIXEL_CAP:
                raise BadImage(f"{size[0]}×{size[1]} pixels are more than {PIXEL_CAP:,}")
            if policy.short_side and min(size) > policy.short_side:
                return _scaled(image, policy.short_side, policy.quality)
            if not _decodes_as_jpeg(data):
                image.load()
            return data, size
    except Image.UnidentifiedImageError:
        raise BadImage("no JPEG, PNG or WebP image") from None
    except BadImage:
        raise
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    ) as error:
        raise BadImage(str(error)) from error


def _decodes_as_jpeg(data: bytes) -> bool:
    """Whether libjpeg-turbo decodes this without complaint; CMYK and slightly damaged files are left to Pillow."""
    if simplejpeg is not None and data[:2] == b"\xff\xd8":
        with suppress(ValueError):
            simplejpeg.decode_jpeg(data, colorspace="GRAY")
            return True
    return False


def _scaled(image: Image.Image, short_side: int, quality: int) -> tuple[bytes, Size]:
    width, height = image.size
    short = min(width, height)
    target = round(width * short_side / short), round(height * short_side / short)
    name = "JPEG" if image.format == "MPO" else image.format
    drafted = image.draft("RGB", (target[0] * _REDUCING_GAP, target[1] * _REDUCING_GAP))
    scaled = image.convert("RGB").resize(target, Image.Resampling.BICUBIC, box=drafted[1] if drafted else None)
    stored = io.BytesIO()
    scaled.save(stored, name, quality=quality)
    return stored.getvalue(), target
