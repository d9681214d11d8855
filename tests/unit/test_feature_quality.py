"""The quality of frozen features in a run's result: of which samples, of which views, and how it is shown."""

import pytest
import torch

from jobs.table import render
from service.data.augment import random_view, resize_normalise
from service.data.batches import sequential
from service.data.split import DataSplit, read_index
from service.data.store import Store
from service.engine.worker import start_worker
from service.evaluate import protocol, quality
from service.evaluate.features import RawPixels, extract_views
from tests.configs import tiny


@pytest.fixture
def evaluation(few_digits):
    config = tiny(few_digits, compute__threads=1, eval__probe_c=1e-3, data__augment__flip=1)
    store = Store(few_digits)
    return protocol.Protocol(config, store, read_index(store), start_worker(config.compute))


def test_views_are_the_run_s_augmentation_of_the_first_samples(evaluation):
    split = DataSplit(evaluation.store, evaluation.index, "test")
    data = evaluation.config.data
    options = {"data": data, "compute": evaluation.config.compute, "worker": evaluation.worker}
    found = extract_views(RawPixels(), split, **options, samples=20, views=2)
    [(images, _)] = sequential(split, data, 0, 20, 20)
    wanted = [
        random_view(images, torch.arange(20), config=data.augment, size=16, seed=0, epoch=0, view=v) for v in (0, 1)
    ]
    assert torch.equal(found, torch.stack(wanted).flatten(2))


def test_the_table_holds_each_encoder_s_quality(evaluation, monkeypatch):
    monkeypatch.setattr(protocol, "_QUALITY_SAMPLES", 50)
    encoder = protocol.random_encoder(evaluation.config)
    table = evaluation.table(encoder, "test")
    assert table["quality"]["trained"] == table["quality"]["random_encoder"] != table["quality"]["raw_pixels"]
    found = table["quality"]["raw_pixels"]
    split = DataSplit(evaluation.store, evaluation.index, "test")
    [(images, _)] = sequential(split, evaluation.config.data, 0, 60, 60)
    pixels = resize_normalise(images, 16).flatten(1)
    wanted = quality.report(pixels[None, :50])
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-4)
    assert found["alignment"] > 0.01 and found["lidar"] > 1
    assert found["verdicts"] == quality.verdicts(wanted)
    text = render(table | {"reported_split": "test"})
    assert f"{found['rankme']:.3g}" in text and "raw pixels" in text.split("quality of the features")[1]
