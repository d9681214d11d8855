"""The reader in several processes on a real object store: killed, continued on other worlds, evaluated on any."""

import json
import random
import signal
import subprocess
import sys
import time
import uuid

import numpy as np
import pytest
import torch

from service.collectives import rank, world_size
from service.config import Compute, Data
from service.data import ShardDataset
from service.data.split import DataSplit, read_index
from service.data.store import Store
from service.engine.worker import Worker
from service.evaluate.features import RawPixels, extract
from tests.ranks import on_ranks
from tests.shards import write

pytestmark = pytest.mark.distributed
SHARDS = [30, 41, 7, 29, 50, 33, 40, 60, 45, 65]

OPTIONS = {"batch_size": 16, "image_size": 16, "partitions": 8, "seed": 5}

# One rank: what it has taken, a line a step, with the state that a checkpoint would hold then.
_READER = """
import json, sys, time
from service.data import ShardDataset
uri, file, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
dataset = ShardDataset(uri, **options)
with open(file, "w") as taken:
    while True:
        for batch in dataset:
            print(json.dumps([batch.ids.tolist(), dataset.state_dict()]), file=taken, flush=True)
            time.sleep(0.05)
"""


def steps_taken(path):
    """(ids, state) of each whole line of a rank's file."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


@pytest.fixture
def uri(s3_env, tmp_path, monkeypatch):
    """Mixed pictures on S3, and a cache of the test's own."""
    monkeypatch.setenv("TESSERA_CACHE", str(tmp_path / "cache"))
    folder = write(tmp_path / "colours", {"train": SHARDS, "test": [13, 9, 11]})
    store = Store(f"s3://{s3_env().bucket}/{uuid.uuid4().hex}")
    for path in folder.rglob("*.*"):
        store.put(str(path.relative_to(folder)), path)
    return store.uri


def test_killed_readers_continue_on_another_world_without_loss_or_repetition(uri, tmp_path):
    files = [tmp_path / f"taken-{r}" for r in range(2)]
    readers = [
        subprocess.Popen([sys.executable, "-c", _READER, uri, file, json.dumps(OPTIONS | {"rank": r, "world": 2})])
        for r, file in enumerate(files)
    ]
    wanted = random.Random().randrange(1, 30)
    while min(len(steps_taken(file)) for file in files) < wanted:
        time.sleep(0.02)
        assert all(reader.poll() is None for reader in readers)
    for reader in readers:
        reader.send_signal(signal.SIGKILL)
        reader.wait()
    before = [steps_taken(file) for file in files]
    kept = min(map(len, before))  # steps of the last checkpoint that both ranks could have written
    assert before[0][kept - 1][1] == before[1][kept - 1][1]
    taken = [before[0][step][0] + before[1][step][0] for step in range(kept)]
    ranks = [ShardDataset(uri, **OPTIONS, rank=r, world=4) for r in range(4)]
    for each in ranks:
        each.load_state_dict(before[0][kept - 1][1])
    while ranks[0].epoch < 3:
        taken += [torch.cat([batch.ids for batch in batches]).tolist() for batches in zip(*ranks, strict=True)]
    whole = ShardDataset(uri, **OPTIONS)
    assert taken == [whole.plan.batch(step).tolist() for step in range(3 * len(whole))]
    for epoch in range(3):
        ids = sum(taken[epoch * len(whole) : (epoch + 1) * len(whole)], [])
        assert len(set(ids)) == len(ids) > sum(SHARDS) - 16 - 8


def features_of(uri):
    """Features of the test split, on as many ranks as there are."""
    data = Data(uri=uri, image_size=16, mode="stream", cache_gb=1e-3)
    split = DataSplit(Store(uri), read_index(Store(uri)), "test")
    worker = Worker(rank(), world_size(), 1, torch.device("cpu"))
    return extract(RawPixels(), split, data=data, compute=Compute(), worker=worker, batch_size=4)


def test_three_ranks_encode_every_sample_once(uri):
    features, readable = features_of(uri)
    assert features.shape == (33, 3 * 16 * 16) and readable.all() and len(features.unique(dim=0)) == 33
    for found, also in on_ranks(3, features_of, uri):
        assert torch.equal(found, features) and torch.equal(also, readable)


def test_readers_of_one_machine_share_a_small_cache(uri, tmp_path):
    readers = [ShardDataset(uri, **OPTIONS, rank=r, world=2) for r in (0, 1)]
    for reader in readers:
        reader._reader.cache.budget = 200_000  # less than is open: shards come and go, and readers go on
    together = [torch.cat([a.ids, b.ids]).tolist() for a, b in zip(*readers, strict=True)]
    assert together == [readers[0].plan.batch(step).tolist() for step in range(len(readers[0]))]
    kept = [path.stat().st_size for path in (tmp_path / "cache/shards").iterdir() if path.suffix != ".lock"]
    assert 0 < np.sum(kept) <= 200_000
