"""The 1,797 handwritten digits that come with scikit-learn, doubled to 16×16 grey PNGs.

Alpaydin and Kaynak 1998, "Optical Recognition of Handwritten Digits", UCI repository.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datasets_prep.errors import UserError
from datasets_prep.permute import key, stratified
from datasets_prep.sources.base import NO_OPTIONS, Options, Sample, Source
from datasets_prep.sources.png import encode

_TEST = 500
_SPLIT_KEY = key(1797)  # the test split is the same for every seed


def open_source(path: Path | None = None, options: Options = NO_OPTIONS) -> Source:
    """Return digits with 1,297 samples in `train` and 500 in `test`, stratified and fixed for good."""
    from sklearn.datasets import load_digits

    if path is not None:
        raise UserError(f"--source {path}: digits come with scikit-learn: leave --source out")
    images, labels = (np.asarray(each) for each in load_digits(return_X_y=True))
    pixels = double(images.reshape(-1, 8, 8).astype(np.int64))
    samples = [
        Sample(f"{number:04d}", "png", int(label), partial(encode, image))
        for number, (image, label) in enumerate(zip(pixels, labels, strict=True))
    ]
    test = stratified(_SPLIT_KEY, labels, _TEST)
    splits = {
        name: [sample for sample, chosen in zip(samples, mask, strict=True) if chosen]
        for name, mask in (("train", ~test), ("test", test))
    }
    return Source("digits", tuple("0123456789"), splits)


def double(images: NDArray[np.int64]) -> NDArray[Any]:
    """Enlarge (N, H, W) values 0…16 to (N, 2H, 2W) uint8, bilinear with half-pixel centres, in exact integers."""
    sixteenths = _double(_double(images, 1), 2)
    return ((sixteenths * 255 + 128) // 256).astype(np.uint8)


def _double(values: NDArray[np.int64], axis: int) -> NDArray[np.int64]:
    """Double one axis; results are 4 times as large."""
    size = values.shape[axis]
    before = values.take(np.maximum(np.arange(size) - 1, 0), axis)
    after = values.take(np.minimum(np.arange(size) + 1, size - 1), axis)
    pairs = np.stack([3 * values + before, 3 * values + after], axis + 1)
    return pairs.reshape(*values.shape[:axis], 2 * size, *values.shape[axis + 1 :])
