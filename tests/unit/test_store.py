import pickle

import pytest

from datasets_prep.errors import UserError
from service.data.store import NotFound, Store, StoreUnavailable
from tests.races import check_one_creates
from tests.servers import free_ports


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "root")


def test_what_is_put_is_got_listed_and_deleted(store, tmp_path):
    (tmp_path / "file").write_bytes(b"from a file")
    store.put("b/two", tmp_path / "file")
    store.put("a", b"one")
    assert store.get("b/two") == b"from a file"
    assert store.list() == ["a", "b/two"]
    assert store.list("b") == ["b/two"]
    assert store.sub("b").list() == ["two"]
    store.delete("a")
    store.delete("a")
    assert not store.exists("a") and store.exists("b/two")


def test_a_put_replaces_and_leaves_nothing_beside(store):
    for size in (40 << 20, 10):
        store.put("x", bytes(size))
        assert len(store.get("x")) == size
    assert [each.name for each in store.local_path.rglob("*")] == ["x"]


def test_a_mutable_buffer_is_copied(store):
    buffer = bytearray(b"before")
    store.put("x", buffer)
    buffer[:] = b"after!"
    assert store.get("x") == b"before"


def test_reading_makes_no_folder(store):
    assert store.list() == [] and not store.exists("x")
    store.delete("x")
    with pytest.raises(NotFound, match="root/x does not exist"):
        store.get("x")
    assert not store.local_path.exists()


@pytest.mark.parametrize(
    ("uri", "canonical"),
    [
        ("file:///tmp/a%20b/", "/tmp/a b"),
        ("/tmp/x/../y/", "/tmp/y"),
        ("s3://bucket/prefix/", "s3://bucket/prefix"),
        ("s3://bucket", "s3://bucket"),
    ],
)
def test_addresses_are_canonical(uri, canonical):
    store = Store(uri)
    assert store.uri == canonical
    assert (store.local_path is None) == uri.startswith("s3")
    assert pickle.loads(pickle.dumps(store)).uri == canonical


@pytest.mark.parametrize("uri", ["ftp://host/x", "s3://", "s3:///x", "file://data/x"])
def test_bad_addresses_are_refused_at_once(uri):
    with pytest.raises(UserError, match=uri):
        Store(uri)


def test_a_dead_server_is_given_up_at_the_deadline(monkeypatch):
    endpoint = f"http://127.0.0.1:{free_ports(1)[0]}"
    for name, value in {"ENDPOINT_URL": endpoint, "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    with pytest.raises(StoreUnavailable, match="s3://data/x: the store failed for 0.5 s"):
        Store("s3://data", deadline=0.5).get("x")


def test_one_process_of_many_creates(store):
    check_one_creates(store)


def test_sizes_and_half_written_files(store):
    store.put("a/b", memoryview(b"12345"))
    store.put("c", b"")
    assert store.sizes() == {"a/b": 5, "c": 0} and store.sizes("a") == {"a/b": 5}
    (store.local_path / "a" / "b#1234").write_bytes(b"of a killed writer")
    (store.local_path / "a" / "b#x").write_bytes(b"somebody's")
    store.sweep()
    assert sorted(each.name for each in store.local_path.rglob("*") if each.is_file()) == ["b", "b#x", "c"]


@pytest.mark.parametrize("name", ["../x", "a/../x", "/x", "a//x", "", "."])
def test_names_do_not_lead_out_of_the_store(store, name):
    with pytest.raises(ValueError):
        store.put(name, b"x")


def test_a_folder_that_cannot_be_written_is_named(store):
    store.put("a", b"")
    with pytest.raises(StoreUnavailable, match=f"{store.uri}/a/b: .*choose another folder"):
        store.put("a/b", b"x")
