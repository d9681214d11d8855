"""From shards to batches: what is checked, and that both readers give the same pixels."""

import json
import shutil

import numpy as np
import pytest
import torch

from datasets_prep.errors import UserError
from jobs import plan
from service.data.batches import open_batches, sequential
from service.data.cache import ShardCache
from service.data.decode import decode_rgb, fit
from service.data.resident import load_images
from service.data.split import DataSplit, checked, make_plan, open_sources, read_index, resolve_mode
from service.data.store import Store
from tests.configs import tiny


def split_of(folder, name="train"):
    store = Store(folder)
    return DataSplit(store, read_index(store), name)


@pytest.fixture
def copy(digits, tmp_path):
    """A copy of the data set that a test may damage."""
    shutil.copytree(digits, tmp_path / "digits")
    return tmp_path / "digits"


def batches(folder, mode, start=0, rank=0, world=1):
    config = tiny(folder, data__mode=mode)
    sources = open_sources(config.data)
    plan = make_plan(sources, config.data, 42)
    reader = open_batches(sources, plan, config.data, views=2, seed=42, device=torch.device("cpu"), hosts=1)
    return list(reader.iterate(start, start + 5, rank, world))


def test_both_readers_give_the_same_pixels_on_any_world(digits):
    resident, streamed = batches(digits, "resident", 15), batches(digits, "stream", 15)
    labels = split_of(digits).labels
    assert len(resident) == 5 and labels.min() == 0 and labels.max() == 9
    for step, ((a, a_ids), (b, b_ids)) in enumerate(zip(resident, streamed, strict=True)):
        assert torch.equal(a, b) and torch.equal(a_ids, b_ids) and a.shape == (64, 3, 16, 16)
        halves = [batches(digits, "resident", 15, rank, 2)[step] for rank in range(2)] if step == 2 else None
        if halves:
            assert torch.equal(torch.cat([half[0] for half in halves]), a)
            assert torch.equal(torch.cat([half[1] for half in halves]), a_ids)


@pytest.mark.parametrize("mode", ["resident", "stream"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_reads_every_sample_once_in_order_on_any_world(digits, mode, world):
    split = split_of(digits, "test")
    data = tiny(digits, data__mode=mode).data
    bounds = [split.samples * rank // world for rank in range(world + 1)]
    parts = [
        part
        for start, stop in zip(bounds[:-1], bounds[1:], strict=True)
        for part in sequential(split, data, start, stop, 37)
    ]
    assert all(len(images) == len(readable) <= 37 and readable.all() for images, readable in parts)
    whole = np.array(load_images(split, 16, 2).images)
    np.testing.assert_array_equal(torch.cat([images for images, _ in parts]), whole)


def test_a_split_that_the_cache_cannot_keep_is_decoded_into_memory(digits, tmp_path, small_disk, monkeypatch, caplog):
    split = split_of(digits, "test")
    whole = np.array(load_images(split, 16, 2).images)
    (tmp_path / "file").touch()
    for folder, reason in ((small_disk / "cache", "cannot keep"), (tmp_path / "file", "does not work")):
        monkeypatch.setenv("TESSERA_CACHE", str(folder))
        with open(small_disk / "ballast", "wb", buffering=0) as file:
            file.write(bytes(300_000))
        np.testing.assert_array_equal(load_images(split, 16, 2).images, whole)
        assert reason in caplog.text and str(folder) in caplog.text
    assert not list((small_disk / "cache").rglob("*.tmp"))


def test_decoded_pixels_are_the_digits(digits):
    from sklearn.datasets import load_digits

    split = split_of(digits, "test")
    opened = split.open_shard(split.rows.shards[0])
    source = load_digits()
    for row in range(20):
        pixels = decode_rgb(opened.encoded(row))
        original = source.images[int(opened.rows["key"][row])] / 16 * 255
        small = pixels[..., 0].astype(float).reshape(8, 2, 8, 2).mean((1, 3))
        assert pixels.shape == (16, 16, 3) and np.corrcoef(small.ravel(), original.ravel())[0, 1] > 0.95


def test_fit_cuts_the_centre_square():
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 200
    out = fit(wide, 10)
    assert out.shape == (10, 10, 3) and (out[:, 1:-1] == 200).all()


def test_auto_is_resident_while_it_fits(digits):
    split = split_of(digits)
    assert resolve_mode(split, tiny(digits).data) == "resident"
    assert resolve_mode(split, tiny(digits, data__resident_gb=1e-4).data) == "stream"
    assert plan.make(tiny(digits)).config.data.mode == "resident"


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: (f / "index.json").unlink(), "holds no index.json, so it is not a complete data set"),
        (lambda f: (f / "index.json").write_text("{}"), "is not an index"),
        (lambda f: edit(f, modality="video"), "holds video samples, and family image_vicreg takes images"),
        (lambda f: edit(f, classes=[]), "has no classes"),
    ],
)
def test_bad_data_sets_are_refused_before_anything_runs(copy, damage, message):
    damage(copy)
    with pytest.raises(UserError, match=message) as error:
        plan.make(tiny(copy))
    assert str(copy) in str(error.value)


def edit(folder, **changes):
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | changes))


@pytest.mark.parametrize("name", ["train/shard-000000.tar", "train/shard-000000.npy", "labels.npy"])
def test_a_damaged_object_is_named(copy, name):
    (copy / name).write_bytes((copy / name).read_bytes()[:-1])
    split = split_of(copy)
    for read in (checked, ShardCache(1e9).fetch):
        with pytest.raises(UserError, match=f"{copy}/{name}.*truncated or replaced"):
            split.open_shard(split.rows.shards[0], read), split.labels  # noqa: B018


def test_labels_that_evaluation_needs_are_asked_for_first(digits):
    with pytest.raises(UserError, match="labels_per_class=.*the smallest class .* has 113 samples in 'train'"):
        plan.make(tiny(digits, eval__labels_per_class=[1, 500]))


def test_too_small_a_split_says_what_fits(digits):
    with pytest.raises(UserError, match="the split has 1167: lower data.batch_size or data.partitions"):
        plan.make(tiny(digits, data__batch_size=2048))
