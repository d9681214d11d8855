"""The store and the writer against a real S3 server."""

import os
import time
import uuid

import boto3
import pytest

from datasets_prep.index import INDEX_NAME
from datasets_prep.sources import digits
from datasets_prep.writer import write_dataset
from service.data.store import AccessDenied, NotFound, Store, StoreUnavailable
from tests.races import check_one_creates
from tests.servers import faulty_proxy, seaweedfs

pytestmark = pytest.mark.distributed


@pytest.fixture
def uri(s3_env):
    return f"s3://{s3_env().bucket}/{uuid.uuid4().hex}"


def test_what_is_put_is_got_listed_and_deleted(uri, tmp_path):
    store = Store(uri)
    large = os.urandom(40 << 20)
    (tmp_path / "file").write_bytes(large)
    store.put("b/large", tmp_path / "file")
    store.put("a", b"one")
    assert store.get("b/large") == large and store.sub("b").list() == ["large"]
    assert store.list() == ["a", "b/large"] and store.list("b") == ["b/large"] and store.list("nothing") == []
    assert store.exists("a") and not store.exists("b")
    assert store.create("c", b"first") and not store.create("c", b"second") and store.get("c") == b"first"
    store.delete("a")
    store.delete("a")
    assert store.list() == ["b/large", "c"]


def test_one_process_of_many_creates(uri):
    check_one_creates(Store(uri))


@pytest.mark.parametrize("keys", [("admin-key", "wrong"), ("nobody", "admin-secret")])
def test_wrong_keys_are_refused_by_name(uri, s3_env, keys):
    Store(uri).put("x", b"x")
    s3_env(keys)
    store = Store(uri)
    for act in (store.get, store.exists, store.list, store.delete, lambda name: store.put(name, b"")):
        with pytest.raises(AccessDenied, match=f"{uri}/x: access denied"):
            act("x")


def test_a_reader_may_only_read(uri, s3, s3_env):
    Store(uri).put("x", b"x")
    s3_env(s3.reader)
    store = Store(uri)
    assert store.get("x") == b"x" and store.list() == ["x"]
    for act in (
        lambda: store.put("y", b""),
        lambda: store.put("y", bytes(40 << 20)),
        lambda: store.create("y", b""),
        lambda: store.delete("x"),
    ):
        with pytest.raises(AccessDenied, match=f"{uri}/[xy]: access denied"):
            act()
    with pytest.raises(AccessDenied, match=f"{uri}/incomplete/"):
        write_dataset(digits.open_source(), store)
    assert store.list() == ["x"]


def test_missing_objects_and_buckets(uri):
    with pytest.raises(NotFound, match=f"{uri}/x does not exist"):
        Store(uri).get("x")
    for act in (Store.list, lambda store: store.get("x")):
        with pytest.raises(NotFound, match="s3://no-such-bucket/p"):
            act(Store("s3://no-such-bucket/p"))


def test_no_credentials_at_all(uri, monkeypatch, tmp_path):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    with pytest.raises(AccessDenied, match=f"{uri}: no credentials found"):
        Store(uri).get("x")


def test_credentials_of_a_profile(uri, s3, monkeypatch, tmp_path):
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.delenv(f"AWS_{name}")
    access, secret = s3.admin
    (tmp_path / "credentials").write_text(f"[team]\naws_access_key_id={access}\naws_secret_access_key={secret}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "team")
    Store(uri).put("x", b"by profile")
    assert Store(uri).get("x") == b"by profile"


def test_the_writer_gives_the_same_bytes_on_s3_and_disk(uri, tmp_path):
    remote, local = Store(uri), Store(tmp_path)
    assert write_dataset(digits.open_source(), remote) == write_dataset(digits.open_source(), local)
    assert remote.list() == local.list()
    assert all(remote.get(name) == local.get(name) for name in local.list())
    assert (
        write_dataset(digits.open_source(), remote).fingerprint
        == write_dataset(digits.open_source(), local).fingerprint
    )


def test_a_dead_server_fails_at_the_deadline_and_leaves_no_index(tmp_path, monkeypatch):
    with seaweedfs(tmp_path / "server") as server:
        for name, value in server.env().items():
            monkeypatch.setenv(name, value)
        store = Store(f"s3://{server.bucket}/p", deadline=1)
        store.put("x", b"x")
    start = time.monotonic()
    with pytest.raises(StoreUnavailable, match=f"s3://{server.bucket}/p/x: the store failed for 1 s"):
        store.get("x")
    assert 0.5 < time.monotonic() - start < 10
    with pytest.raises(StoreUnavailable, match=INDEX_NAME):
        write_dataset(digits.open_source(), store)


def test_a_failed_multipart_upload_is_aborted(uri, s3, s3_env, monkeypatch):
    with faulty_proxy(s3, lambda method, path: 400 if "partNumber=2" in path else None) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        with pytest.raises(StoreUnavailable, match=f"{uri}/x"):
            Store(uri).put("x", bytes(40 << 20))
    s3_env()
    client = boto3.client("s3", endpoint_url=s3.endpoint)
    uploads = client.list_multipart_uploads(Bucket=s3.bucket).get("Uploads", [])
    assert [each["Key"] for each in uploads if uri.endswith(each["Key"].split("/")[0])] == [] and not Store(uri).exists(
        "x"
    )


def test_a_sweep_aborts_uploads_of_killed_writers_below_its_address(uri, s3):
    client = boto3.client("s3", endpoint_url=s3.endpoint)
    prefix = uri.removeprefix(f"s3://{s3.bucket}/")
    for key in (f"{prefix}/train/x.tar", f"{prefix}-other/x.tar"):
        upload = client.create_multipart_upload(Bucket=s3.bucket, Key=key)["UploadId"]
        client.upload_part(Bucket=s3.bucket, Key=key, UploadId=upload, PartNumber=1, Body=bytes(5 << 20))
    Store(uri).put("y", b"kept")
    Store(uri).sweep()
    uploads = [each["Key"] for each in client.list_multipart_uploads(Bucket=s3.bucket).get("Uploads", [])]
    assert [key for key in uploads if key.startswith(prefix)] == [f"{prefix}-other/x.tar"]
    assert Store(uri).list() == ["y"]


def test_busy_replies_and_cut_bodies_are_overcome(uri, s3, monkeypatch):
    data = os.urandom(8 << 20)
    Store(uri).put("x", data)
    faults = iter([503, 503, 200, 200])
    with faulty_proxy(s3, lambda method, path: next(faults, None)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        assert Store(uri, deadline=20).get("x") == data
    assert next(faults, None) is None


def test_a_list_that_breaks_off_is_asked_for_again(uri, s3, monkeypatch):
    Store(uri).put("a/b", b"c")
    faults = iter([200, 503, 200])
    with faulty_proxy(s3, lambda method, path: next(faults, None)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        assert Store(uri).list("a") == ["a/b"]
    assert next(faults, None) is None


def test_the_deadline_ends_endless_busy_replies(uri, s3, monkeypatch):
    with faulty_proxy(s3, lambda method, path: 503) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        for act in (lambda store: store.get("x"), lambda store: store.put("x", b""), Store.list):
            with pytest.raises(StoreUnavailable, match=f"{uri}.*503"):
                act(Store(uri, deadline=0.5))
