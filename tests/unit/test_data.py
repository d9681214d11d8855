"""From shards to batches: what is checked, and that both readers give the same pixels."""

import json
import shutil

import numpy as np
import pytest
import torch

from datasets_prep.errors import UserError
from jobs import plan
from service.data.batches import make_plan, open_batches, sequential
from service.data.decode import decode_rgb, fit
from service.data.resident import load_images
from service.data.split import DataSplit, read_index, resolve_mode
from service.data.store import Store
from service.data.stream import ShardCache
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
    split = split_of(folder)
    reader = open_batches(split, make_plan(split, config.data, 42), config.data, device=torch.device("cpu"), hosts=1)
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


def test_sequential_reads_every_sample_once_in_order(digits):
    split = split_of(digits, "test")
    whole = np.array(load_images(split, 16, 2))
    for mode in ("resident", "stream"):
        data = tiny(digits, data__mode=mode).data
        parts = [
            np.concatenate([p.numpy() for p in sequential(split, data, a, b, 37)]) for a, b in ((0, 201), (201, 500))
        ]
        np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_decoded_pixels_are_the_digits(digits):
    from sklearn.datasets import load_digits

    split = split_of(digits, "test")
    shard, rows = split.rows.shards[0], split.sidecar(split.rows.shards[0])
    tar = split.shard_bytes(shard)
    source = load_digits()
    for row in rows[:20]:
        offset, size = int(row["offset"][0]), int(row["size"][0])
        pixels = decode_rgb(tar[offset : offset + size])
        original = source.images[int(row["key"])] / 16 * 255
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


def test_the_shard_cache_keeps_its_budget_and_its_maps(copy, tmp_path, monkeypatch):
    monkeypatch.setenv("TESSERA_CACHE", str(tmp_path / "cache"))
    train, test = split_of(copy), split_of(copy, "test")
    largest = max(train.rows.shards[0].bytes, test.rows.shards[0].bytes)
    cache = ShardCache(train, largest)
    first = cache.fetch(train.rows.shards[0])
    second = ShardCache(test, largest).fetch(test.rows.shards[0])
    assert [p.name for p in (tmp_path / "cache/shards").glob("*.tar")] == [test.rows.shards[0].sha256 + ".tar"]
    assert bytes(first) == train.shard_bytes(train.rows.shards[0]) and len(second) == test.rows.shards[0].bytes


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
    with pytest.raises(UserError, match=f"{copy}/{name}.*truncated or replaced"):
        split.shard_bytes(split.rows.shards[0]), split.sidecar(split.rows.shards[0]), split.labels  # noqa: B018


def test_labels_that_evaluation_needs_are_asked_for_first(digits):
    with pytest.raises(UserError, match="labels_per_class=.*the smallest class .* has 113 samples in 'train'"):
        plan.make(tiny(digits, eval__labels_per_class=[1, 500]))
    with pytest.raises(UserError, match="raise data.cache_gb"):
        plan.make(tiny(digits, data__mode="stream", data__cache_gb=1e-6))


def test_too_small_a_split_says_what_fits(digits):
    with pytest.raises(UserError, match="the split has 1167: lower data.batch_size or data.partitions"):
        plan.make(tiny(digits, data__batch_size=2048))
