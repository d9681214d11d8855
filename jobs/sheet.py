"""Contact sheets: rows of pictures with titles, as one image to look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

_TILE = 128  # pixels: a multiple of the sides that small data sets have
_GAP = 6
_MARGIN = 16
_LINE = 18
_FONT, _TITLE_FONT = 13, 18
_WIDEST_TITLE = 170
_INK, _PALE, _PAPER = (32, 33, 36), (110, 114, 120), (255, 255, 255)


@dataclass(frozen=True)
class Row:
    """Pictures (H, W, 3) uint8 side by side, with a title at their left and, if there are any, a caption below each."""

    pictures: Sequence[NDArray[np.uint8]]
    title: str = ""
    captions: Sequence[str] = ()


def draw(title: str, rows: Sequence[Row], columns: Sequence[str] = ()) -> Image.Image:
    """Draw rows of pictures; `columns` are titles above them."""
    small, large = (ImageFont.load_default(size) for size in (_FONT, _TITLE_FONT))
    left = _MARGIN + max(round(min(small.getlength(row.title), _WIDEST_TITLE)) for row in rows)
    left += _GAP * 2 * any(row.title for row in rows)
    heights = [_TILE + _GAP + _LINE * bool(row.captions) for row in rows]
    top = _MARGIN + 2 * _LINE + _LINE * bool(columns)
    across = max(len(row.pictures) for row in rows)
    width = max(left + across * (_TILE + _GAP) - _GAP, _MARGIN + round(large.getlength(title))) + _MARGIN
    sheet = Image.new("RGB", (width, top + sum(heights) - _GAP + _MARGIN), _PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((_MARGIN, _MARGIN), title, _INK, large)
    for number, name in enumerate(columns):
        centre = left + number * (_TILE + _GAP) + _TILE // 2
        pen.text((centre, top - _GAP - 2), _fitted(name, small, _TILE), _PALE, small, anchor="ms")
    for row, height in zip(rows, heights, strict=True):
        pen.text((_MARGIN, top + _TILE // 2), _fitted(row.title, small, _WIDEST_TITLE), _INK, small, anchor="lm")
        for number, picture in enumerate(row.pictures):
            _paste(sheet, picture, left + number * (_TILE + _GAP), top)
        for number, caption in enumerate(row.captions):
            centre = left + number * (_TILE + _GAP) + _TILE // 2
            pen.text((centre, top + _TILE + 2), _fitted(caption, small, _TILE), _PALE, small, anchor="mt")
        top += height
    return sheet


def _paste(sheet: Image.Image, picture: NDArray[np.uint8], left: int, top: int) -> None:
    """Put a picture into the middle of its tile; small ones are enlarged by a whole number so that pixels show."""
    image = Image.fromarray(np.ascontiguousarray(picture))
    times = _TILE // max(image.size)
    if times > 1:
        image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    else:
        image = ImageOps.contain(image, (_TILE, _TILE), Image.Resampling.LANCZOS)
    sheet.paste(image, (left + (_TILE - image.width) // 2, top + (_TILE - image.height) // 2))


def _fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Cut a text off where it grows wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
