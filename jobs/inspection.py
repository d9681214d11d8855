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
    from service.families import FAMILIES

    data = config.data if config else _defaults(split)
    views = FAMILIES[config.family.kind].views if config else 2
    pictures = read_pictures(split, choose(split.labels, _AUGMENTED))
    drawn = augmented(split, pictures, data, views=views, epochs=_EPOCHS, seed=config.seed if config else 0)
    names = [f"epoch {epoch}, view {view}" for epoch in range(1, _EPOCHS + 1) for view in range(1, views + 1)]
    rows = [Row([each.pixels, *row], _class(split, each)) for each, row in zip(pictures, drawn, strict=True)]
    return draw(f"{_heading(split)}, views of {data.image_size} pixels", rows, ["stored", *names])


def augmented(
    split: DataSplit, pictures: Sequence[Picture], data: Data, *, views: int, epochs: int, seed: int
) -> list[list[Pixels]]:
    """Make the views of each picture that training gives its family, in turn (S, S, 3) of the epochs' views."""
    import torch

    from service.data.augment import MEAN, STD, random_view
    from service.data.batches import choose_decoder

    decoder = choose_decoder([split], data, views=views, seed=seed)
    ids = np.array([picture.id for picture in pictures])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    columns: list[Pixels] = []
    for epoch in range(epochs):
        decoded = decoder.decode([memoryview(picture.data) for picture in pictures], ids, epoch)
        batch = torch.from_numpy(np.stack([_whole(pixels) for pixels in decoded])).movedim(-1, -3)
        for view in range(views):
            cropped = batch.ndim == 5
            seen = random_view(
                batch[:, view] if cropped else batch,
                torch.from_numpy(ids),
                config=data.augment,
                size=data.image_size,
                seed=seed,
                epoch=epoch,
                view=view,
                cropped=cropped,
            )
            levels = ((seen * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
            columns.append(levels.movedim(1, -1).numpy())
    return [[column[row] for column in columns] for row in range(len(pictures))]


def _whole(pixels: Pixels | ValueError) -> Pixels:
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
