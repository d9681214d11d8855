import dataclasses
import hashlib
import io
import re
import tarfile

import numpy as np
import pytest

from datasets_prep.errors import UserError
from datasets_prep.index import INDEX_NAME, LABELS_NAME, parse_array
from datasets_prep.members import Stream, members
from datasets_prep.sources.base import Sample, Source
from datasets_prep.tar import npy
from datasets_prep.verify import verify
from datasets_prep.writer import write_dataset
from service.data.store import Store
from tests.unit.test_archives import image, tar_of

IMAGES = {f"{n:03d}": image(n, kind=("JPEG", "PNG", "WEBP")[n % 3]) for n in range(30)}
FIRST = "train/shard-000000.tar"


@pytest.fixture
def data(tmp_path):
    samples = [Sample(key, "jpg", n % 3, lambda data=data: data) for n, (key, data) in enumerate(IMAGES.items())]
    store = Store(tmp_path / "data")
    index = write_dataset(Source("made", ("a", "b", "c"), {"train": samples[:20], "test": samples[20:]}), store)
    return store, index


def faults(store, index, split=None):
    """Faults with paths below the data set's root, without what the change of a tar's bytes alone causes."""
    found = verify(store, index, split, workers=2).faults
    return [(fault.uri.removeprefix(f"{store.uri}/"), fault.what) for fault in found if "checksum" not in fault.what]


def edit(store, name, change):
    """Change the members of a tar, a dict of contents by name, and pack them again."""
    with tarfile.open(fileobj=io.BytesIO(store.get(name))) as archive:
        held = {member.name: archive.extractfile(member).read() for member in archive}
    store.put(name, tar_of(change(held), format=tarfile.USTAR_FORMAT)[: len(store.get(name))])
    return held


def first_key(store):
    return next(members(io.BytesIO(store.get(FIRST)))).name.removesuffix(".jpg")


def test_a_whole_data_set_has_no_faults(data):
    store, index = data
    advanced = []
    report = verify(store, index, progress=lambda *done: advanced.append(done))
    assert report.faults == [] and report.samples == {"train": 18, "val": 2, "test": 10}
    assert report.bytes == sum(shard.bytes for split in index.splits.values() for shard in split.shards)
    assert advanced[-1] == (30, 30, report.bytes) and len(advanced) == 3
    assert verify(store, index, "test").samples == {"test": 10}
    with pytest.raises(UserError, match="has no split 'tst', it has: train, val, test"):
        verify(store, index, "tst")


def test_a_changed_byte_is_a_wrong_checksum(data):
    store, index = data
    tar = bytearray(store.get(FIRST))
    tar[-1] = 1
    store.put(FIRST, bytes(tar))
    assert verify(store, index).faults == [
        (f"{store.uri}/{FIRST}", "its checksum differs from the index: it was changed or replaced")
    ]


def test_a_truncated_tar(data):
    store, index = data
    store.put(FIRST, store.get(FIRST)[:5000])
    kinds = [what for _, what in faults(store, index)]
    assert any("has 5000 bytes, the index says" in what for what in kinds)
    assert any("samples, the index says 18" in what for what in kinds)
    assert any("without its end mark: it is truncated" in what for what in kinds)


@pytest.mark.parametrize("name", [FIRST, FIRST.replace(".tar", ".npy"), LABELS_NAME])
def test_missing_objects(data, name):
    store, index = data
    store.delete(name)
    ((where, what),) = faults(store, index)
    assert where == name and f"{store.uri}/{name} does not exist" in what


def test_an_image_that_does_not_decode(data):
    store, index = data

    def spoil(held):
        name = next(iter(held))
        return held | {name: held[name][:30] + bytes(len(held[name]) - 30)}

    edit(store, FIRST, spoil)
    ((where, what),) = faults(store, index)
    assert where == FIRST and what.startswith(f"member '{first_key(store)}.jpg' does not decode: ")


def test_a_label_that_disagrees(data):
    store, index = data
    key = first_key(store)
    held = edit(store, FIRST, lambda held: held | {f"{key}.cls": b"%d" % ((int(held[f"{key}.cls"]) + 1) % 3)})
    label = int(held[f"{key}.cls"])
    assert faults(store, index) == [(FIRST, f"sample {key!r} has label {(label + 1) % 3} and in labels.npy {label}")]


def test_members_that_moved(data):
    store, index = data

    def swap(held):
        names = list(held)
        return {name: held[name] for name in [*names[2:4], *names[:2], *names[4:]]}

    edit(store, FIRST, swap)
    kinds = [what for _, what in faults(store, index)]
    assert sum("stands as" in what for what in kinds) == 2
    assert all("stands as" in what or "lies elsewhere" in what or "in labels.npy" in what for what in kinds)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held: held | {next(iter(held)).replace(".jpg", ".pkl"): b"x"}, "may hold a pickle"),
        (lambda held: held | {"../x.jpg": image(0)}, "'../x.jpg' leads out of the archive"),
        (
            lambda held: held | {"x.jpg": {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}},
            "'x.jpg' is a symbolic link",
        ),
        (lambda held: held | {"x.txt": b""}, "sample 'x' needs one image"),
    ],
)
def test_members_that_do_not_belong(data, change, message):
    store, index = data
    edit(store, FIRST, change)
    assert any(message in what for where, what in faults(store, index) if where == FIRST)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            lambda labels: np.where(np.arange(30) == 4, 3, labels).astype("<i4"),
            "sample 4 of train has label 3, not 0…2",
        ),
        (lambda labels: labels[:-1], r"holds int32 of shape \(29,\), the index has 30 samples"),
        (lambda labels: labels.astype("<i8"), "holds int64"),
        (lambda labels: np.array([print] * 30, object), "cannot be read as an array"),
    ],
)
def test_labels_that_disagree(data, labels, message):
    store, index = data
    changed = labels(parse_array(store.get(LABELS_NAME)))
    buffer = io.BytesIO()
    np.save(buffer, changed, allow_pickle=True)
    store.put(LABELS_NAME, buffer.getvalue())
    found = [what for where, what in faults(store, index) if where == LABELS_NAME]
    assert len(found) == 1
    assert re.search(message, found[0])


def test_sidecars_that_disagree(data):
    store, index = data
    name = FIRST.replace(".tar", ".npy")
    store.put(name, npy(parse_array(store.get(name))[:-1]))
    ((uri, what),) = verify(store, index).faults
    assert uri.endswith(name) and "checksum differs from the index" in what


def test_repeated_keys_of_a_split(data, tmp_path):
    _, index = data
    store = Store(tmp_path / "twice")
    samples = [Sample(key, "jpg", 0, lambda data=data: data) for key, data in [*IMAGES.items()][:20]]
    twins = [*samples, dataclasses.replace(samples[3], label=0)]
    index = write_dataset(Source("twins", ("a",), {"train": twins, "val": samples[:1]}), store)
    found = verify(store, index).faults
    assert (f"{store.uri}/train", "key '003' occurs 2 times") in found


def test_leftovers(data):
    store, index = data
    store.put("incomplete/ab/train/shard-000000.json", b"{}")
    store.put("train/shard-000009.tar", b"x")
    store.put("README.md", b"people may write here")
    assert faults(store, index) == [
        ("incomplete/ab/train/shard-000000.json", "is left of a writer that was killed, or one still writes here"),
        ("train/shard-000009.tar", "is not in the index, yet a reader of all tars would find it"),
    ]


def test_every_fault_is_found_at_once(data):
    store, index = data
    store.delete("test/shard-000000.tar")
    store.put("val/shard-000000.npy", b"no array")
    store.put(FIRST, b"")
    store.put("extra.tar", b"")
    where = {uri.removeprefix(f"{store.uri}/") for uri, _ in verify(store, index).faults}
    assert where == {"test/shard-000000.tar", "val/shard-000000.npy", FIRST, "extra.tar"}
    assert INDEX_NAME in store.list()


@pytest.mark.parametrize("chunk", [1, 7, 512, 4096, 1 << 20])
def test_a_stream_reads_and_passes_over_chunks(chunk):
    data = tar_of({f"{n}.jpg": image(n) for n in range(5)})
    stream = Stream(data[at : at + chunk] for at in range(0, len(data), chunk))
    found = {member.name: stream.read(member.size) for member in members(stream)}
    assert found == {f"{n}.jpg": image(n) for n in range(5)}
    assert stream.finish() == (len(data), hashlib.sha256(data).hexdigest())


def test_sizes_above_8_gib_and_no_bytes_of_them_are_read(tmp_path):
    info = tarfile.TarInfo("big.jpg")
    info.size = 9 << 30
    with open(tmp_path / "big.tar", "wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.truncate((9 << 30) + 512 + 1024)
    with open(tmp_path / "big.tar", "rb") as file:
        assert list(members(file)) == [("big.jpg", 512, 9 << 30, "")]
