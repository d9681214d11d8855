"""Encoded image bytes to uint8 pixels: JPEG by libjpeg-turbo where its binding is installed, all else by Pillow.

EXIF orientation is ignored; grey, CMYK and palette images become RGB. A header that promises more than `PIXEL_CAP`
pixels is refused before memory is spent on it.
"""

from __future__ import annotations

import io
from contextlib import suppress

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch.nn import functional as F

try:
    import simplejpeg
except ImportError:  # Pillow decodes JPEG too, only slower
    simplejpeg = None

PIXEL_CAP = 178_956_970
Image.MAX_IMAGE_PIXELS = PIXEL_CAP  # Pillow by itself only warns up to twice as many

DECODER = f"1-{'pillow' if simplejpeg is None else 'turbo'}"  # part of caches' names: raise it when pixels change

_FORMATS = ("JPEG", "PNG", "WEBP")  # what shards hold; some of Pillow's other readers run programs
_SCALES = (8, 4, 2)  # at which libjpeg-turbo's inverse DCT is quicker than the full one; 7/8 … 5/8 are slower
_SPARE = 1.5  # pixels that a scaled crop keeps for one of its view: what is left to resize smooths as Pillow does

Pixels = NDArray[np.uint8]


def image_size(data: bytes | memoryview) -> tuple[int, int]:
    """Height and width in pixels from the header alone; raises ValueError for no image and above `PIXEL_CAP`."""
    if _is_jpeg(data):
        try:
            height, width = simplejpeg.decode_jpeg_header(data)[:2]
        except ValueError:
            pass  # Pillow may read it
        else:
            return _checked(height, width)
    with _open(data) as image:
        return image.height, image.width


def decode_rgb(data: bytes | memoryview) -> Pixels:
    """Decode to RGB, (H, W, 3); raises ValueError for anything that is not a whole image."""
    return _decode(data, image_size(data), 1)


def decode_crops(data: bytes | memoryview, *kinds: tuple[NDArray[np.int64], int]) -> list[Pixels]:
    """Decode an image once and cut crops of it, each resized bilinearly with antialiasing.

    Args:
        data: encoded image.
        kinds: of crops: their top, left, height and width in pixels of the image, (V, 4), and the side S of the
            results in pixels.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where every crop keeps at least 1.5·S pixels a side; boxes are then
    rounded to pixels of the smaller image. `tests/numerics/test_decode.py` bounds the difference from Pillow's crops of
    the whole image.

    Returns:
        (V, S, S, 3) for each kind; raises ValueError for anything that is not a whole image.
    """
    shape = image_size(data)
    spare = min(boxes[:, 2:].min() / size for boxes, size in kinds)
    scale = next((s for s in _SCALES if spare >= _SPARE * s), 1)
    pixels = _decode(data, shape, scale)
    if pixels.shape[:2] == shape:
        scale = 1
    return [_cut(pixels, _scaled(boxes, scale), size) for boxes, size in kinds]


def _cut(pixels: Pixels, boxes_V4: NDArray[np.int64], size: int) -> Pixels:
    crops = np.empty((len(boxes_V4), size, size, 3), np.uint8)
    for crop, (top, left, height, width) in zip(crops, boxes_V4, strict=True):
        crop[:] = resize(pixels[top : top + height, left : left + width], size)
    return crops


def fit(pixels: Pixels, side: int) -> Pixels:
    """Scale the short side to `side` with antialiasing and cut the centre square, (side, side, 3)."""
    height, width = pixels.shape[:2]
    if (height, width) == (side, side):
        return pixels
    short = min(height, width)
    left, top = (width - short) / 2, (height - short) / 2
    box = (left, top, left + short, top + short)
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BILINEAR, box=box))


def resize(pixels: Pixels, side: int) -> Pixels:
    """Resize (H, W, 3) to (side, side, 3), bilinearly, antialiased: Pillow's result within 1, in less time."""
    if pixels.shape[:2] == (side, side):
        return pixels
    image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)  # in this order torch takes its quicker kernel
    resized = F.interpolate(image, (side, side), mode="bilinear", antialias=True, align_corners=False)
    return resized[0].permute(1, 2, 0).numpy()


def _is_jpeg(data: bytes | memoryview) -> bool:
    return simplejpeg is not None and bytes(data[:2]) == b"\xff\xd8"


def _checked(height: int, width: int) -> tuple[int, int]:
    if height * width > PIXEL_CAP:
        raise ValueError(_too_large(f"{height}×{width}"))
    return height, width


def _too_large(size: str) -> str:
    return f"its header promises {size} pixels, above the cap of {PIXEL_CAP}: leave it out or shrink it"


def _open(data: bytes | memoryview) -> Image.Image:
    """Open by Pillow without decoding."""
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        _checked(image.height, image.width)
        return image
    except UnidentifiedImageError as error:
        raise ValueError("its bytes are of no known image format") from error
    except Image.DecompressionBombError as error:
        raise ValueError(_too_large(f"more than {2 * PIXEL_CAP}")) from error
    except (OSError, SyntaxError) as error:
        raise ValueError(str(error)) from error


def _decode(data: bytes | memoryview, shape: tuple[int, int], scale: int) -> Pixels:
    """Decode to RGB at 1/`scale` of its `shape` if it is a JPEG that libjpeg-turbo reads, else at its full size."""
    if _is_jpeg(data):
        height, width = (-(-side // scale) for side in shape)
        with suppress(ValueError):  # CMYK and slightly damaged files, which Pillow reads
            return simplejpeg.decode_jpeg(data, colorspace="RGB", min_height=height, min_width=width)
    with _open(data) as image:
        try:
            return np.array(image.convert("RGB"))
        except (OSError, SyntaxError) as error:
            raise ValueError(str(error)) from error


def _scaled(boxes_V4: NDArray[np.int64], scale: int) -> NDArray[np.int64]:
    """Boxes of an image at 1/`scale` of its size, their edges rounded to whole pixels."""
    if scale == 1:
        return boxes_V4
    edges = boxes_V4.copy()
    edges[:, 2:] += edges[:, :2]
    edges = (2 * edges + scale) // (2 * scale)
    edges[:, 2:] -= edges[:, :2]
    return edges
