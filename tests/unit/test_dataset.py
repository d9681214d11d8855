"""The stream through its public face: coverage, order, resume, faults, and that a sample's parts belong together."""

import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from datasets_prep.errors import UserError
from service.config import Augment
from service.data import ShardDataset
from service.data.augment import crop_boxes
from service.data.budget import replacement
from service.data.decode import decode_crops, image_size
from service.data.store import StoreUnavailable
from tests.servers import file_server
from tests.shards import label, picture, shown_id, write

SHARDS = [30, 41, 7, 29, 50, 33, 40]
TOTAL = sum(SHARDS)
DOCS = Path(__file__).parents[2] / "docs" / "loader.md"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """A cache that no other test has filled."""
    monkeypatch.setenv("TESSERA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """230 samples of many sizes in seven shards, for reading only."""
    return write(tmp_path_factory.mktemp("colours"), {"train": SHARDS, "val": [20]})


def opened(uri, **changes):
    options = {"batch_size": 24, "image_size": 16, "partitions": 8, "window": 9, "seed": 3}
    return ShardDataset(str(uri), **options | changes)


def ids_of(batches):
    return [batch.ids.tolist() for batch in batches]


def test_images_labels_and_ids_belong_together_and_no_sample_comes_twice(colours):
    data = opened(colours, views=2)
    batches = list(data)
    ids = np.concatenate(ids_of(batches))
    assert len(batches) == len(data) == 9 and len(set(ids.tolist())) == 216
    for images, labels, batch_ids in batches:
        assert images.shape == (2, 24, 3, 16, 16) and images.dtype == torch.uint8
        assert [shown_id(image) for view in images for image in view] == 2 * batch_ids.tolist()
        assert labels.tolist() == [label(id_) for id_ in batch_ids.tolist()]


def test_crops_are_those_that_augmentation_draws(colours):
    data = opened(colours, views=2, augment=Augment(crop_scale=(0.3, 0.6)))
    list(data)
    images, _, ids = next(iter(data))
    for view in range(2):
        encoded = [picture(id_) for id_ in ids.tolist()]
        heights, widths = np.array([image_size(each) for each in encoded]).T
        options = {"config": Augment(crop_scale=(0.3, 0.6)), "seed": 3, "epoch": 1, "view": view}
        boxes = crop_boxes(ids.numpy(), heights, widths, **options)
        for image, each, box in zip(images[view], encoded, boxes, strict=True):
            np.testing.assert_array_equal(image, decode_crops(each, (box[None], 16))[0][0].transpose(2, 0, 1))


def test_without_views_the_centre_square_comes(colours):
    images, _, ids = next(iter(opened(colours, views=0)))
    assert images.shape == (24, 3, 16, 16) and [shown_id(image) for image in images] == ids.tolist()


@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks_together_give_the_batches_of_one(colours, world):
    whole = list(opened(colours))
    ranks = [list(opened(colours, rank=rank, world=world, workers=3)) for rank in range(world)]
    for step, batch in enumerate(whole):
        assert torch.equal(torch.cat([rank[step].ids for rank in ranks]), batch.ids)
        assert torch.equal(torch.cat([rank[step].images for rank in ranks], 1), batch.images)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_threads_change_nothing(colours, workers):
    expected, found = list(opened(colours)), list(opened(colours, workers=workers, prefetch=workers))
    assert all(torch.equal(a, b) for x, y in zip(expected, found, strict=True) for a, b in zip(x, y, strict=True))


def test_a_position_is_continued_on_another_world(colours):
    whole = opened(colours)
    expected = [batch for _ in range(3) for batch in whole]
    first = opened(colours, rank=1, world=2)
    list(first)
    for _, batch in zip(range(4), first, strict=False):
        assert batch.ids is not None
    state = first.state_dict()
    assert (state["epoch"], state["step"]) == (1, 4)
    ranks = [opened(colours, rank=rank, world=4) for rank in range(4)]
    for rank in ranks:
        rank.load_state_dict(state)
    rest = [[batch for _ in range(2) for batch in rank] for rank in ranks]
    assert len(rest[0]) == 5 + 9
    for step, batch in enumerate(expected[13:]):
        assert torch.equal(torch.cat([rank[step].images for rank in rest], 1), batch.images)


def test_a_position_in_another_order_is_refused(colours, tmp_path):
    state = opened(colours).state_dict()
    other = write(tmp_path, {"train": [60, 60]})
    for data, reason in (
        (opened(colours, seed=4), "seed was 3 and is 4"),
        (opened(colours, batch_size=48), "batch_size was 24 and is 48"),
        (opened(colours, partitions=4), "partitions was 8 and is 4"),
        (opened(other), "fingerprint was"),
    ):
        with pytest.raises(UserError, match=f"another order of samples .*{reason}"):
            data.load_state_dict(state)


def test_shards_of_very_different_sizes_are_read_epoch_by_epoch(tmp_path):
    folder = write(tmp_path, {"train": [1] * 40 + [90] + [1] * 30})
    data = opened(folder, window=4, prefetch=1)
    for epoch in range(5):
        assert data.epoch == epoch
        planned = [data.plan.batch(epoch * len(data) + step).tolist() for step in range(len(data))]
        assert ids_of(data) == planned and len(planned) == 6


def test_a_world_that_does_not_divide_is_refused_at_once(colours):
    with pytest.raises(UserError, match="world of 3 ranks does not divide the plan's 8 partitions"):
        opened(colours, rank=0, world=3)


def test_bad_samples_are_errors_by_default_and_replaced_within_a_budget(tmp_path):
    bad = (5, 33, 34, 120)
    folder = write(tmp_path, {"train": SHARDS}, bad=bad)
    with pytest.raises(UserError, match=r"(?s)1 sample cannot.*shard-\d+.tar, sample '000\d+' is not a readable image"):
        list(opened(folder))
    with pytest.raises(UserError, match="3 samples cannot be decoded, and data.max_bad=2 allows 2"):
        list(opened(folder, max_bad=2))
    whole, clean = opened(folder, max_bad=4), write(tmp_path / "clean", {"train": SHARDS})
    planned, read = ids_of(opened(clean)), list(whole)
    met = 0
    for expected, batch in zip(planned, read, strict=True):
        for wanted, got, image, label_ in zip(expected, batch.ids.tolist(), batch.images[0], batch.labels, strict=True):
            assert shown_id(image) == got and label_ == label(got) and got not in bad
            assert (got != wanted) == (wanted in bad)
            met += wanted in bad
    assert whole.bad_samples == met >= 3
    halves = [opened(folder, max_bad=4, rank=rank, world=2) for rank in range(2)]
    both = [torch.cat(pair).tolist() for pair in zip(*([b.ids for b in half] for half in halves), strict=True)]
    assert both == ids_of(read) and sum(half.bad_samples for half in halves) == met


def test_a_replacement_is_another_sample_of_the_shard(colours):
    plan = opened(colours).plan
    starts = np.cumsum([0, *SHARDS])
    drawn = Counter()
    for id_ in range(TOTAL):
        shard = np.searchsorted(starts, id_, side="right") - 1
        others = [replacement(plan, id_, attempt) for attempt in range(8)]
        assert all(starts[shard] <= other < starts[shard + 1] and other != id_ for other in others)
        drawn.update(others)
    assert len(drawn) > 0.95 * TOTAL


def damage(folder, name, change):
    (folder / name).write_bytes(change((folder / name).read_bytes()))


@pytest.mark.parametrize("how", ["in place", "fetched"])
@pytest.mark.parametrize(
    "name, change, reason",
    [
        ("train/shard-000002.tar", lambda data: b"", "has 0 bytes whose checksum differs"),
        ("train/shard-000002.tar", lambda data: data[:700], "has 700 bytes whose checksum differs"),
        ("train/shard-000002.tar", lambda data: data[:-1] + b"x", "whose checksum differs"),
        ("train/shard-000002.npy", lambda data: data[:-1] + b"x", "whose checksum differs"),
        ("train/shard-000002.tar", None, "does not exist"),
        ("train/shard-000002.npy", None, "does not exist"),
        ("labels.npy", lambda data: data[:-4], "whose checksum differs"),
        ("index.json", lambda data: data.replace(b'"samples": 41', b'"samples": 40'), "40 samples by the index and 41"),
        ("index.json", lambda data: data.replace(b"class 6", b"class 5"), None),
    ],
)
def test_damage_is_named(tmp_path, how, name, change, reason):
    folder = write(tmp_path, {"train": SHARDS})
    damage(folder, name, change) if change else (folder / name).unlink()
    with file_server(folder) as served:
        uri = str(folder) if how == "in place" else served
        if reason is None:
            assert len(list(opened(uri))) == 9
            return
        named = "train/shard-000001.tar" if name == "index.json" else name
        with pytest.raises(UserError, match=f"{uri}/{named}.*{reason}"):
            list(opened(uri, max_bad=100))


def test_labels_outside_the_classes_are_named(tmp_path):
    import hashlib
    import io

    folder = write(tmp_path, {"train": SHARDS})
    labels = np.load(folder / "labels.npy")
    labels[17] = 7
    data = io.BytesIO()
    np.save(data, labels)
    old = hashlib.sha256((folder / "labels.npy").read_bytes()).hexdigest()
    (folder / "labels.npy").write_bytes(data.getvalue())
    new = hashlib.sha256(data.getvalue()).hexdigest()
    damage(folder, "index.json", lambda text: text.replace(old.encode(), new.encode()))
    with pytest.raises(UserError, match=f"{folder}/labels.npy has {TOTAL} labels from 0 to 7 for .* 7 classes"):
        list(opened(folder))


def test_shards_of_the_next_window_are_fetched_before_they_are_needed(tmp_path):
    folder = write(tmp_path, {"train": [5] * 60})
    asked = set()
    with file_server(folder, lambda path: asked.add(path)) as uri:
        data = opened(uri, window=24, prefetch=60)
        first, then = (
            {f"train/shard-{n:06d}.tar" for step in steps for n in data.plan.locate(data.plan.batch(step))[0]}
            for steps in (range(8), range(8, 10))
        )
        next(batches := iter(data))  # decoding is at step 4 at most now
        deadline = time.monotonic() + 30
        while not then <= asked and time.monotonic() < deadline:
            time.sleep(0.01)
        assert then - first and then <= asked
        batches.close()


def test_passing_faults_lose_and_repeat_nothing(colours):
    asked = Counter()

    def fault(path):
        asked[path] += 1
        return {1: 503, 2: 200}.get(asked[path]) if "shard" in path else None

    with file_server(colours, fault) as uri:
        found = list(opened(uri))
    assert max(asked.values()) == 3
    for expected, batch in zip(opened(colours), found, strict=True):
        assert torch.equal(expected.ids, batch.ids) and torch.equal(expected.images, batch.images)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("fault", [500, 200, 0])
def test_a_store_that_stays_broken_ends_the_loop_by_name(colours, fault):
    with file_server(colours, lambda path: fault if path == "train/shard-000003.tar" else None) as uri:
        data = opened(uri)
        data.split.store.deadline = 0.5
        data.split.store.__dict__.pop("_backend", None)
        with pytest.raises(StoreUnavailable, match=f"{uri}/train/shard-000003.tar"):
            list(data)


def test_too_small_a_cache_is_refused_before_anything_is_fetched(colours):
    with file_server(colours, lambda path: 500 if "shard" in path else None) as uri:
        with pytest.raises(UserError, match="data.cache_gb=1e-05 is less than.*lower data.window"):
            opened(uri, cache_gb=1e-5)
    assert len(list(opened(colours, cache_gb=1e-5))) == 9  # a folder is mapped where it lies


def test_the_package_is_light_until_the_class_is_asked_for():
    code = "import sys, service.data; print('torch' in sys.modules, hasattr(service.data, 'Nothing'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=DOCS.parents[1])
    assert done.stdout.split() == ["False", "False"]


def test_the_example_of_the_guide(colours, tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/photos").symlink_to(colours)
    monkeypatch.chdir(tmp_path)
    assert len(blocks[0].strip().splitlines()) == 5
    for block in blocks:
        exec(block, space := {})  # noqa: S102
    assert space["dataset"].epoch >= 1
    assert capsys.readouterr().out
