"""Encoded image bytes to uint8 pixels: JPEG by libjpeg-turbo where its binding is installed, all else by Pillow."""

from __future__ import annotations

import io
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

try:
    import simplejpeg
except ImportError:  # Pillow decodes JPEG too, only slower
    simplejpeg = None

Image.MAX_IMAGE_PIXELS = 178_956_970  # Pillow warns above this many pixels and refuses twice as many

DECODER = f"1-{'pillow' if simplejpeg is None else 'turbo'}"  # part of caches' names: raise it when pixels change

Pixels = NDArray[np.uint8]


def decode_rgb(data: bytes | memoryview) -> Pixels:
    """Decode to RGB, (H, W, 3); raises ValueError for anything that is not a whole image."""
    if simplejpeg is not None and bytes(data[:2]) == b"\xff\xd8":
        with suppress(ValueError):  # CMYK and slightly damaged files, which Pillow reads
            return simplejpeg.decode_jpeg(data, colorspace="RGB")
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))
    except UnidentifiedImageError as error:
        raise ValueError("its bytes are of no known image format") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(str(error)) from error


def fit(pixels: Pixels, side: int) -> Pixels:
    """Scale the short side to `side` with antialiasing and cut the centre square, (side, side, 3)."""
    height, width = pixels.shape[:2]
    if (height, width) == (side, side):
        return pixels
    short = min(height, width)
    left, top = (width - short) / 2, (height - short) / 2
    box = (left, top, left + short, top + short)
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BILINEAR, box=box))
