"""A run's curves as a picture."""

import io

import numpy as np
from PIL import Image

from service.plots import curves

LOSSES = {step: {"loss": 1 / step, "lr": 0.1 * step, "images_per_s": 5.0} for step in range(1, 30)}


def drawn(metrics):
    return np.asarray(Image.open(io.BytesIO(curves(metrics))).convert("RGB"))


def test_each_group_of_metrics_has_a_panel():
    plain = drawn(LOSSES)
    measured = {
        5: {"momentum": 0.9, "monitor/grad_norm": 2.0},
        10: {"monitor/encoder/rankme": 3.0, "monitor/encoder/std_min": 0.1},
        20: {"val_linear": 60.0},
    }
    more = drawn(LOSSES | {step: LOSSES[step] | row for step, row in measured.items()})
    assert plain.shape == (300, 1200, 3) and more.shape == (1200, 1200, 3)
    assert (more[-250:, 600:] == 255).all() and not (more[-250:, :600] == 255).all()  # seven panels in rows of two


def test_curves_follow_their_values():
    other = {step: row | {"lr": 0.2} for step, row in LOSSES.items()}
    assert not np.array_equal(drawn(LOSSES), drawn(other))
    assert np.array_equal(drawn(LOSSES), drawn({step: row | {"images_per_s": 7.0} for step, row in LOSSES.items()}))


def test_a_run_without_metrics_has_an_empty_picture():
    assert (drawn({}) == 255).all()
