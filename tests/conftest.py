"""Fixtures for every tier: real servers start once a session, real data is skipped where it is absent."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.servers import S3, seaweedfs

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """A SeaweedFS server with the private bucket `data`; two tests use different prefixes."""
    with seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as server:
        yield server


@pytest.fixture
def s3_env(s3: S3, monkeypatch: pytest.MonkeyPatch) -> Callable[..., S3]:
    """Point the `AWS_…` variables at the server: `s3_env()` as admin, `s3_env(s3.reader)` with other keys."""

    def point(keys: tuple[str, str] | None = None) -> S3:
        for name, value in s3.env(keys).items():
            monkeypatch.setenv(name, value)
        return s3

    return point


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets beside the checkout."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real data is absent: {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="module", autouse=True)
def own_ranks():
    """End the processes that a file's tests ran ranks in."""
    yield
    if ranks := sys.modules.get("tests.ranks"):
        ranks.stop_ranks()


@pytest.fixture(scope="session", autouse=True)
def own_caches(tmp_path_factory):
    """Keep decoded images and shards of tests out of the user's cache."""
    os.environ["TESSERA_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """The embedded data set as shards, for reading only."""
    from jobs.shard import shard

    folder = tmp_path_factory.mktemp("digits")
    shard("digits", str(folder))
    return folder


@pytest.fixture(scope="session")
def few_digits(tmp_path_factory):
    """Three hundred of the embedded digits as shards, for tests that are about the loop and not about scores."""
    from tests.configs import write_few_digits

    folder = tmp_path_factory.mktemp("few_digits")
    write_few_digits(folder)
    return folder


@pytest.fixture
def one_thread():
    """What does not wait for other threads takes the same time on busy machines, and gives the same bits."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 512 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if os.getuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)
