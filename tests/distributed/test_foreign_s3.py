"""Foreign tars on a real S3 server: indexed, verified, inspected and read where they lie."""

import uuid

import numpy as np
import pytest

from datasets_prep.errors import UserError
from datasets_prep.foreign import MARK, index_tars
from datasets_prep.index import INDEX_NAME
from datasets_prep.verify import verify
from jobs.survey import read_pictures, survey
from service.data.decode import decode_rgb
from service.data.split import DataSplit, read_index
from service.data.store import Store
from tests.servers import faulty_proxy
from tests.unit.test_archives import image, tar_of

pytestmark = pytest.mark.distributed
TARS, SAMPLES = 5, 40


@pytest.fixture
def store(s3_env):
    store = Store(f"s3://{s3_env().bucket}/{uuid.uuid4().hex}")
    labels = np.random.default_rng(0).integers(0, 3, TARS * SAMPLES)
    for number in range(TARS):
        files = {}
        for n in range(number * SAMPLES, (number + 1) * SAMPLES):
            files |= {f"{n:05d}.jpg": image(n, (64, 48)), f"{n:05d}.cls": b"%d" % labels[n]}
        store.put(f"set-{'val' if number == 4 else 'train'}-{number:04d}.tar", tar_of(files))
    return store


def test_tars_on_s3_are_indexed_verified_and_read(store, tmp_path):
    local = Store(tmp_path / store.uri.rpartition("/")[2])
    for name in store.list():
        local.put(name, store.get(name))
    index = index_tars(store, workers=3).index
    assert index == index_tars(local).index == read_index(store)
    assert {name: store.get(name) for name in store.list()} == {name: local.get(name) for name in local.list()}
    assert {name: split.samples for name, split in index.splits.items()} == {"train": 160, "val": 40}
    assert verify(store, index).faults == []
    split = DataSplit(store, index, "train")
    for picture in read_pictures(split, np.array([0, 77, 159])):
        np.testing.assert_array_equal(picture.pixels, decode_rgb(image(int(picture.key), (64, 48))))
    assert survey(split, 50).width == [64] * 5


def test_faults_on_s3_are_named_by_uri(store):
    index = index_tars(store).index
    whole = store.get("set-train-0001.tar")
    store.put("set-train-0001.tar", whole[: len(whole) // 2])
    store.delete("set-train-0002.tar")
    store.put("set-train-0003.npy", b"")
    where = {uri.rpartition("/")[2] for uri, _ in verify(store, index).faults}
    assert where == {"set-train-0001.tar", "set-train-0002.tar", "set-train-0003.npy"}


def test_who_may_only_read_is_told_what_to_do(store, s3, s3_env):
    before = store.list()
    s3_env(s3.reader)
    reader = Store(store.uri)
    with pytest.raises(UserError, match=rf"sidecars go beside the tars, and {store.uri}/{MARK}: access denied.*copy"):
        index_tars(reader)
    assert index_tars(reader, write=False).index.splits["train"].samples == 160
    assert reader.list() == before


def test_busy_replies_and_cut_bodies_are_overcome(store, s3, monkeypatch):
    faults = iter([None, 503, None, 200, None, 503, 200])
    with faulty_proxy(s3, lambda method, path: next(faults, None) if ".tar" in path else None) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        through = Store(store.uri, deadline=20)
        index = index_tars(through, workers=2).index
        assert next(faults, "spent") == "spent"
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    assert verify(store, index).faults == [] and INDEX_NAME in store.list()


def test_a_dead_store_ends_at_the_deadline_and_withdraws_what_it_can(store, s3, monkeypatch):
    with faulty_proxy(s3, lambda method, path: 503 if method == "GET" and "0003.tar" in path else None) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        with pytest.raises(UserError, match="set-train-0003.tar: the store failed for 1 s"):
            index_tars(Store(store.uri, deadline=1))
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    assert [name for name in store.list() if not name.endswith(".tar")] == []
