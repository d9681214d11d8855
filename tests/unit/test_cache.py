"""The shard cache: one fetch a node, budget, damage, and disks that do not play along."""

import hashlib
import multiprocessing
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from datasets_prep.errors import UserError
from service.data.cache import ShardCache
from service.data.store import AccessDenied, NotFound, Store, StoreUnavailable
from tests.servers import file_server

SIZE = 100_000


@pytest.fixture
def objects(tmp_path):
    """Twelve objects: folder, and (name, checksum) of each."""
    folder = tmp_path / "objects"
    folder.mkdir()
    for i in range(12):
        (folder / f"{i}.tar").write_bytes(bytes([i]) * SIZE)
    return folder, [(f"{i}.tar", hashlib.sha256(bytes([i]) * SIZE).hexdigest()) for i in range(12)]


@pytest.fixture
def server(objects):
    """Address of the objects, and how often each was asked for."""
    asked = Counter()

    def count(path):
        asked[path] += 1

    with file_server(objects[0], count) as uri:
        yield uri, asked


def kept(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_least_recently_used_objects_leave_and_their_maps_stay(objects, server, tmp_path):
    store, names = Store(server[0]), objects[1]
    cache = ShardCache(3 * SIZE, tmp_path / "cache")
    first = cache.fetch(store, *names[0])
    for name in (names[1], names[2], names[0], names[3]):
        assert bytes(cache.fetch(store, *name)) == (objects[0] / name[0]).read_bytes()
    assert kept(tmp_path / "cache") == sorted(names[i][1] for i in (0, 2, 3))
    cache.fetch(store, *names[4]), cache.fetch(store, *names[5]), cache.fetch(store, *names[6])
    assert names[0][1] not in kept(tmp_path / "cache") and bytes(first) == bytes(SIZE)
    assert server[1] == Counter({f"{i}.tar": 1 for i in range(7)})


def test_a_folder_is_mapped_where_it_lies(objects, tmp_path):
    cache = ShardCache(1e9, tmp_path / "cache")
    for name in objects[1]:
        assert bytes(cache.fetch(Store(objects[0]), *name)) == (objects[0] / name[0]).read_bytes()
    assert kept(tmp_path / "cache") == []
    with pytest.raises(NotFound, match=f"{objects[0]}/none.tar does not exist"):
        cache.fetch(Store(objects[0]), "none.tar", "0" * 64)
    (objects[0] / "3.tar").write_bytes(b"")
    with pytest.raises(UserError, match=f"{objects[0]}/3.tar has 0 bytes whose checksum differs"):
        cache.fetch(Store(objects[0]), *objects[1][3])


def fetch_all(uri, folder, names, start, result):
    cache = ShardCache(1e9, folder)
    start.wait()
    result.put([bytes(cache.fetch(Store(uri), *name))[:1] for name in names])


def test_processes_that_want_the_same_objects_fetch_each_once(objects, server, tmp_path):
    context = multiprocessing.get_context("spawn")
    start, result = context.Event(), context.Queue()
    args = (server[0], tmp_path / "cache", objects[1], start, result)
    processes = [context.Process(target=fetch_all, args=args) for _ in range(3)]
    for process in processes:
        process.start()
    start.set()
    assert [result.get(timeout=60) for _ in processes] == [[bytes([i]) for i in range(12)]] * 3
    for process in processes:
        process.join()
    assert server[1] == Counter({name: 1 for name, _ in objects[1]})


def test_different_objects_are_fetched_at_once(objects, tmp_path):
    """Each reply waits until several requests are there: one after the other they would never come."""
    together = threading.Barrier(4, timeout=20)

    def meet(path):
        together.wait()

    names = {name[1][:2]: name for name in objects[1]}  # objects of different locks
    with file_server(objects[0], meet) as uri:
        cache = ShardCache(1e9, tmp_path / "cache")
        threads = [threading.Thread(target=cache.fetch, args=(Store(uri), *name)) for name in list(names.values())[:4]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(kept(tmp_path / "cache")) == 4 and not together.broken


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"\xff" + data[1:], lambda data: b""])
def test_a_damaged_file_is_fetched_again(objects, server, tmp_path, damage):
    store, name = Store(server[0]), objects[1][1]
    ShardCache(1e9, tmp_path / "cache").fetch(store, *name)
    path = tmp_path / "cache" / name[1]
    path.write_bytes(damage(path.read_bytes()))
    assert bytes(ShardCache(1e9, tmp_path / "cache").fetch(store, *name)) == b"\x01" * SIZE
    assert server[1]["1.tar"] == 2 and path.read_bytes() == b"\x01" * SIZE


def test_unfinished_files_of_the_dead_are_removed_and_of_the_living_kept(tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    dead, living = folder / ("aa" + "0" * 62 + ".tmp"), folder / ("bb" + "0" * 62 + ".tmp")
    dead.touch(), living.touch()
    holder = subprocess.Popen(
        [sys.executable, "-c", f"import fcntl; f = open({str(folder / 'bb.lock')!r}, 'w'); fcntl.flock(f, 2); input()"],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    while not (folder / "bb.lock").exists():
        time.sleep(0.01)
    time.sleep(0.1)
    ShardCache(1e9, folder)
    assert living.exists() and not dead.exists()
    holder.kill()
    holder.wait()
    ShardCache(1e9, folder)
    assert not living.exists()


def test_an_object_that_others_leave_no_room_for_stays_in_memory(objects, server, tmp_path, caplog):
    folder, names = tmp_path / "cache", objects[1]
    cache = ShardCache(3 * SIZE, folder)
    cache.fetch(Store(server[0]), *names[0])
    with open(folder / ("ff" + "0" * 62 + ".tmp"), "wb") as unfinished:  # of another process
        unfinished.truncate(3 * SIZE)
    assert bytes(cache.fetch(Store(server[0]), *names[1])) == b"\x01" * SIZE
    assert kept(folder) == sorted([names[0][1], "ff" + "0" * 62 + ".tmp"]) and not caplog.text


def test_a_lock_that_a_stopped_process_keeps_is_not_waited_for_without_end(objects, server, tmp_path, caplog):
    import fcntl

    folder, name = tmp_path / "cache", objects[1][1]
    cache = ShardCache(1e9, folder)
    with open(folder / f"{name[1][:2]}.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert bytes(cache.fetch(Store(server[0], deadline=0.2), *name)) == b"\x01" * SIZE
    assert "was held for 0.2 s" in caplog.text


def test_a_cache_that_cannot_be_written_is_said_once_and_shards_are_held_in_memory(objects, server, tmp_path, caplog):
    (tmp_path / "cache").write_bytes(b"a file where the folder should be")
    cache = ShardCache(1e9, tmp_path / "cache")
    for name in objects[1]:
        assert bytes(cache.fetch(Store(server[0]), *name)) == (objects[0] / name[0]).read_bytes()
    assert caplog.text.count("shards are held in memory") == 1 and str(tmp_path / "cache") in caplog.text


def test_a_full_disk_makes_the_cache_smaller(objects, server, small_disk, caplog):
    cache = ShardCache(1e9, small_disk / "cache")
    for name in objects[1]:
        assert bytes(cache.fetch(Store(server[0]), *name)) == (objects[0] / name[0]).read_bytes()
    assert 3 <= len(kept(small_disk / "cache")) <= 5 and cache.budget <= 5 * SIZE
    assert kept(small_disk / "cache") == sorted(name[1] for name in objects[1][-len(kept(small_disk / "cache")) :])
    assert "held in memory" not in caplog.text


def test_a_disk_that_others_filled_is_said_once(objects, server, small_disk, caplog):
    cache = ShardCache(1e9, small_disk / "cache")
    with suppress(OSError), open(small_disk / "ballast", "wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    for name in objects[1]:
        assert bytes(cache.fetch(Store(server[0]), *name)) == (objects[0] / name[0]).read_bytes()
    assert caplog.text.count("shards are held in memory") == 1 and kept(small_disk / "cache") == []


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "fault, kind, reason",
    [
        (403, AccessDenied, "access denied"),
        (404, NotFound, "does not exist"),
        (500, StoreUnavailable, "500"),
        (200, StoreUnavailable, "body error"),
        (0, StoreUnavailable, "body error"),
    ],
    ids=["forbidden", "missing", "broken", "cut", "silent"],
)
def test_failing_servers_are_named_in_time_and_leave_nothing(objects, tmp_path, fault, kind, reason):
    with file_server(objects[0], lambda path: fault) as uri:
        with pytest.raises(kind, match=f"{uri}/0.tar.*{reason}"):
            ShardCache(1e9, tmp_path / "cache").fetch(Store(uri, deadline=0.4), *objects[1][0])
    assert kept(tmp_path / "cache") == []


def test_passing_faults_are_overcome(objects, tmp_path):
    faults = iter([503, 200, 0, 500])
    with file_server(objects[0], lambda path: next(faults, None)) as uri:
        fetched = ShardCache(1e9, tmp_path / "cache").fetch(Store(uri, deadline=4), *objects[1][5])
    assert bytes(fetched) == b"\x05" * SIZE and next(faults, None) is None


def test_a_wrong_object_is_named_and_not_kept(objects, server, tmp_path):
    Path(objects[0] / "2.tar").write_bytes(b"something else")
    with pytest.raises(UserError, match=f"{server[0]}/2.tar has 14 bytes whose checksum differs"):
        ShardCache(1e9, tmp_path / "cache").fetch(Store(server[0]), *objects[1][2])
    assert kept(tmp_path / "cache") == []
