"""`tessera inspect`: pictures of a data set, and of what its training sees."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from datasets_prep.errors import UserError
from jobs.sheet import Row, draw
from jobs.survey import Picture, choose, read_pictures
from service.config import Data, RunConfig
from service.data.decode import Pixels
from service.data.split import DataSplit

_PICTURES = 80
_A_ROW = 10
_ROWS_OF_CLASSES = 16  # up to as many classes have a row each
_AUGMENTED, _EPOCHS = 8, 3


def contact_sheet(split: DataSplit) -> Image.Image:
    """Draw images of all classes, or of as many as fit on a sheet."""
    classes = np.unique(split.labels)
    by_row = classes[0] >= 0 and len(classes) <= _ROWS_OF_CLASSES
    wanted = min(_A_ROW, _PICTURES // len(classes)) * len(classes) if by_row else _PICTURES
    pictures = read_pictures(split, choose(split.labels, wanted))
    if by_row:
        groups = {label: [each for each in pictures if each.label == label] for label in classes.tolist()}
        rows = [Row([each.pixels for each in group], _class(split, group[0])) for group in groups.values()]
    else:
        cut = [pictures[first : first + _A_ROW] for first in range(0, len(pictures), _A_ROW)]
        rows = [Row([each.pixels for each in row], captions=[_class(split, each) for each in row]) for row in cut]
    return draw(_heading(split), rows)


def augmented_sheet(split: DataSplit, config: RunConfig | None) -> Image.Image:
    """Draw some images beside their views in the first epochs of a training.

    Args:
        split: of the images.
        config: of the run; None takes the defaults' augmentation and two views.
    """
    data = config.data if config else _defaults(split)
    views = config.family.views if config else 2
    pictures = read_pictures(split, choose(split.labels, _AUGMENTED))
    drawn = augmented(split, pictures, data, views=views, epochs=_EPOCHS, seed=config.seed if config else 0)
    of_epoch = [f"view {view}" for view in range(1, views + 1)]
    of_epoch += [f"local crop {crop}" for crop in range(1, data.local.count + 1)] if data.local else []
    names = [f"epoch {epoch}, {name}" for epoch in range(1, _EPOCHS + 1) for name in of_epoch]
    rows = [Row([each.pixels, *row], _class(split, each)) for each, row in zip(pictures, drawn, strict=True)]
    return draw(f"{_heading(split)}, views of {data.image_size} pixels", rows, ["stored", *names])


def augmented(
    split: DataSplit, pictures: Sequence[Picture], data: Data, *, views: int, epochs: int, seed: int
) -> list[list[Pixels]]:
    """Make the views of each picture that training gives its family, (S, S, 3): each epoch's, then its local crops."""
    import torch

    from service.data.augment import MEAN, STD, draw_views, view_kinds
    from service.data.batches import choose_decoder

    decoder = choose_decoder([split], data, views=views, seed=seed)
    ids = np.array([picture.id for picture in pictures])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    columns: list[Pixels] = []
    for epoch in range(epochs):
        decoded = decoder.decode([memoryview(picture.data) for picture in pictures], ids, epoch)
        arrays = zip(*(_whole(pixels) for pixels in decoded), strict=True)
        batches = [torch.from_numpy(np.stack(array, -4)).movedim(-1, -3) for array in arrays]
        images = batches[0] if batches[0].ndim == 4 else batches
        kinds = view_kinds(data, views)
        for drawn in draw_views(images, torch.from_numpy(ids), kinds, seed=seed, epoch=epoch):
            levels = ((drawn * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
            columns.extend(levels.movedim(2, -1).numpy())
    return [[column[row] for column in columns] for row in range(len(pictures))]


def _whole(pixels: list[Pixels] | ValueError) -> list[Pixels]:
    if isinstance(pixels, ValueError):
        raise UserError(f"an image cannot be decoded: {pixels}")
    return pixels


def _defaults(split: DataSplit) -> Data:
    return Data.model_validate({"uri": split.store.uri, "image_size": min(split.stored_side or 224, 224)})


def _class(split: DataSplit, picture: Picture) -> str:
    return split.index.classes[picture.label] if picture.label >= 0 else ""


def _heading(split: DataSplit) -> str:
    classes = f", {len(split.index.classes)} classes" if split.index.classes else ""
    return f"{split.index.name}, {split.name}: {split.samples:,} images{classes}"
