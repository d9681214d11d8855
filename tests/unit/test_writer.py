import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from functools import partial

import numpy as np
import pytest

from datasets_prep.errors import UserError
from datasets_prep.images import ImagePolicy
from datasets_prep.index import INDEX_NAME, LABELS_NAME, Index
from datasets_prep.pending import SKIPPED_NAME
from datasets_prep.permute import key, stratified
from datasets_prep.sources import digits, png
from datasets_prep.sources.base import Sample, Source
from datasets_prep.writer import write_dataset
from jobs.shard import estimate, shard
from service.data.store import Store


def made(count=300, side=40, classes=3, **splits):
    """Noise images, about 5 KB each; `splits` maps names to counts and replaces `train`."""
    rng = np.random.default_rng(0)

    def samples(size):
        pixels = rng.integers(0, 256, (size, side, side, 3), np.uint8)
        return [
            Sample(f"{n % classes}/{n:05d}", "png", n % classes, lambda image=image: png.encode(image))
            for n, image in enumerate(pixels)
        ]

    names = tuple(f"class {n}" for n in range(classes))
    return Source("noise", names, {name: samples(size) for name, size in (splits or {"train": count}).items()})


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "out")


def contents(store):
    return {name: store.get(name) for name in store.list()}


def test_digits_have_the_published_fingerprint(store):
    index = write_dataset(digits.open_source(), store)
    assert {name: split.samples for name, split in index.splits.items()} == {"train": 1167, "val": 130, "test": 500}
    assert index.image_size.median == (16, 16)
    assert index.fingerprint == "452be525ec26c4d3"


def test_index_and_files_agree(store):
    source = made(train=500, test=40)
    index = write_dataset(source, store, shard_mb=1)
    assert Index.model_validate_json(store.get(INDEX_NAME)) == index
    assert list(index.splits) == ["train", "val", "test"]
    assert len(index.splits["train"].shards) == 3
    labels = np.load(io.BytesIO(store.get(LABELS_NAME)))
    assert labels.dtype == np.int32 and len(labels) == 540
    original = {sample.key: sample for sample in source.splits["train"]}
    row = 0
    for shard_row in (each for split in ("train", "val") for each in index.splits[split].shards):
        tar, rows = store.get(shard_row.name), np.load(io.BytesIO(store.get(shard_row.sidecar)))
        assert len(tar) == shard_row.bytes <= 1.1 * (1 << 20) and len(rows) == shard_row.samples
        for each in rows:
            sample = original.pop(each["key"].decode())
            image, label = (tar[at : at + size] for at, size in zip(each["offset"], each["size"], strict=True))
            assert image == sample.load() and int(label) == sample.label == labels[row]
            row += 1
    assert not original and row == index.label_slice("test").start


def test_order_is_global_and_val_is_stratified(store):
    index = write_dataset(made(300), store)
    labels = np.load(io.BytesIO(store.get(LABELS_NAME)))
    assert np.bincount(labels[index.label_slice("val")]).tolist() == [10, 10, 10]
    train = labels[index.label_slice("train")]
    changes = np.count_nonzero(np.diff(train)) / len(train)  # 2/3 in random order, 2/270 sorted
    assert changes == pytest.approx(2 / 3, abs=0.1)


def test_equal_arguments_give_equal_bytes(store):
    write_dataset(made(), store.sub("a"))
    write_dataset(made(), store.sub("b"))
    write_dataset(made(), store.sub("c"), seed=1)
    assert contents(store.sub("a")) == contents(store.sub("b"))
    assert contents(store.sub("a"))[LABELS_NAME] != contents(store.sub("c"))[LABELS_NAME]


def test_webdataset_and_tarfile_read_the_shards(store):
    webdataset = pytest.importorskip("webdataset")
    source = made(60)
    index = write_dataset(source, store, val_share=0.5)
    name = str(store.local_path / index.splits["train"].shards[0].name)
    read = list(webdataset.WebDataset(name, shardshuffle=False).decode("pil").to_tuple("__key__", "png", "cls"))
    original = {sample.key: sample for sample in source.splits["train"]}
    assert len(read) == 30
    for key_, image, label in read:
        np.testing.assert_array_equal(np.asarray(image), _pixels(original[key_].load()))
        assert label == original[key_].label
    with tarfile.open(name) as archive:
        members = archive.getmembers()
    assert len(members) == 60 and {(member.mtime, member.uid, member.mode) for member in members} == {(0, 0, 0o644)}


def _pixels(data):
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(data)))


def test_unlabelled_split_has_no_cls(store):
    source = made(train=20, unlabelled=10)
    source.splits["unlabelled"][:] = [dataclasses.replace(each, label=-1) for each in source.splits["unlabelled"]]
    index = write_dataset(source, store)
    assert index.splits["unlabelled"].fields == ("png",) and index.splits["train"].fields == ("png", "cls")
    assert np.load(io.BytesIO(store.get(LABELS_NAME)))[index.label_slice("unlabelled")].tolist() == [-1] * 10


def test_bad_samples_are_all_counted_and_nothing_looks_complete(store):
    source = made(50)
    whole = source.splits["train"][0].load()
    for position, data in ((3, b"text"), (7, whole[: len(whole) // 2]), (9, b"GIF89a"), (11, b"")):
        source.splits["train"][position] = dataclasses.replace(
            source.splits["train"][position], load=lambda data=data: data
        )
    with pytest.raises(
        UserError,
        match=r"noise: 4 of 50 samples are not whole JPEG, PNG or WebP images(.|\n)*train/0/00003.png: no JPEG",
    ):
        write_dataset(source, store)
    assert not store.exists(INDEX_NAME)


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        (made(train=10, test=0), {}, "no images in test"),
        (Source("void", (), {}), {}, "no images in any split"),
        (made(4), {}, "val_share=0.1 of 4 train images leaves one of train and val empty"),
        (made(4), {"val_share": 1.0}, "val_share=1.0"),
        (made(4), {"shard_mb": 0}, "shard_mb=0 must be at least 1"),
    ],
)
def test_impossible_requests(store, source, arguments, message):
    with pytest.raises(UserError, match=message):
        write_dataset(source, store, **arguments)
    assert store.list() == []


def test_a_key_too_long_for_a_tar(store):
    source = made(20)
    source.splits["train"][5] = dataclasses.replace(source.splits["train"][5], key="k" * 120)
    with pytest.raises(UserError, match="kkk.png: name is too long for a tar"):
        write_dataset(source, store)
    assert store.list() == []


def test_the_same_data_set_is_left_alone(store):
    index = write_dataset(made(), store)
    before = {name: (store.local_path / name).stat().st_mtime_ns for name in store.list()}
    assert write_dataset(made(), store) == index
    assert {name: (store.local_path / name).stat().st_mtime_ns for name in store.list()} == before


@pytest.mark.parametrize("arguments", [{"seed": 1}, {"val_share": 0.2}, {"shard_mb": 1}])
def test_another_data_set_is_not_overwritten(store, arguments):
    write_dataset(made(), store)
    before = contents(store)
    with pytest.raises(UserError, match=f"{store.uri} already holds a different data set"):
        write_dataset(made(), store, **arguments)
    assert contents(store) == before


def test_foreign_shards_are_not_overwritten(store):
    store.put("train/shard-000000.tar", b"somebody's")
    with pytest.raises(UserError, match="1 files like train/shard-000000.tar without index.json"):
        write_dataset(made(), store)
    assert store.list() == ["train/shard-000000.tar"]


_WRITER = """
import sys, time
from service.data.store import Store
from tests.unit.test_writer import made, write_dataset

def slowly(done, total, size):
    if done > 250:
        while not any(name.endswith("/train/shard-000000.json") for name in store.list()):
            time.sleep(0.01)
        print("writing", flush=True)
        time.sleep(60)

store = Store(sys.argv[1])
write_dataset(made(), store, seed=5, shard_mb=1, progress=slowly)
"""


def test_a_killed_writer_leaves_no_index_and_is_cleared_away(store, tmp_path):
    writer = subprocess.Popen([sys.executable, "-c", _WRITER, store.uri], stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "writing\n"
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    assert "train/shard-000000.tar" in store.list() and not store.exists(INDEX_NAME)
    store.put("train/shard-000007.tar", b"of a run with smaller shards")
    write_dataset(made(), store)
    clean = Store(tmp_path / "clean")
    write_dataset(made(), clean)
    assert contents(store) == contents(clean)


def noisy(count=300):
    """`made` by functions that can be sent to processes."""
    return Source(
        "noise", ("a", "b"), {"train": [Sample(f"{n:05d}", "png", n % 2, partial(_noise, n)) for n in range(count)]}
    )


def _noise(seed):
    return png.encode(np.random.default_rng(seed).integers(0, 256, (60, 60, 3), np.uint8))


def test_processes_write_what_one_does(store):
    one = write_dataset(noisy(), store.sub("one"), shard_mb=1)
    assert write_dataset(noisy(), store.sub("two"), shard_mb=1, workers=2) == one
    assert contents(store.sub("one")) == contents(store.sub("two"))
    assert write_dataset(noisy(), store.sub("one"), shard_mb=1, workers=2) == one


class _Interrupted(Exception):
    pass


def interrupted(source, store, samples, **arguments):
    """Write until so many samples are done."""

    def progress(done, total, size):
        if done >= samples:
            raise _Interrupted

    with pytest.raises(_Interrupted):
        write_dataset(source, store, progress=progress, **arguments)


def stamps(store):
    return {name: (store.local_path / name).stat().st_mtime_ns for name in store.list()}


def test_finished_shards_are_kept_and_counted(store):
    interrupted(noisy(), store.sub("cut"), 250, shard_mb=1)
    kept = {name: stamp for name, stamp in stamps(store.sub("cut")).items() if name.startswith("train")}
    assert len(kept) == 6
    said, seen = [], []
    write_dataset(noisy(), store.sub("cut"), shard_mb=1, say=said.append, progress=lambda *state: seen.append(state))
    assert said == ["3 of 5 shards are kept from an earlier run"]
    assert seen[0] == (202, 300, 0) and seen[-1][:2] == (300, 300)
    assert kept.items() <= stamps(store.sub("cut")).items()
    write_dataset(noisy(), store.sub("whole"), shard_mb=1)
    assert contents(store.sub("cut")) == contents(store.sub("whole"))


def _lose_the_sidecar(store, record):
    store.delete("train/shard-000000.npy")


def _cut_the_tar(store, record):
    store.put("train/shard-000000.tar", store.get("train/shard-000000.tar")[:-1])


def _empty_the_record(store, record):
    store.put(record, b"")


def _leave_a_staged_file(store, record):
    (store.local_path / "train" / "shard-000002.tar#123").write_bytes(b"half")


@pytest.mark.parametrize(
    ("damage", "kept"),
    [(_lose_the_sidecar, 2), (_cut_the_tar, 2), (_empty_the_record, 2), (_leave_a_staged_file, 3)],
)
def test_damaged_leftovers_are_written_again(store, damage, kept):
    cut, whole = store.sub("cut"), store.sub("whole")
    interrupted(noisy(), cut, 250, shard_mb=1)
    (record,) = [name for name in cut.list() if name.endswith("/train/shard-000000.json")]
    damage(cut, record)
    said = []
    write_dataset(noisy(), cut, shard_mb=1, say=said.append)
    assert said == [f"{kept} of 5 shards are kept from an earlier run"]
    write_dataset(noisy(), whole, shard_mb=1)
    assert contents(cut) == contents(whole)
    assert not list(cut.local_path.rglob("*#*"))


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"val_share": 0.2}, {"images": ImagePolicy("full")}, {"images": ImagePolicy(short_side=50)}]
)
def test_leftovers_of_another_command_are_not_taken(store, other):
    cut, whole = store.sub("cut"), store.sub("whole")
    interrupted(noisy(), cut, 250, shard_mb=1, **other)
    said = []
    write_dataset(noisy(), cut, shard_mb=1, say=said.append)
    write_dataset(noisy(), whole, shard_mb=1)
    assert said == [] and contents(cut) == contents(whole)


def broken(*positions, **splits):
    source = made(**splits) if splits else made(300)
    for position in positions:
        samples = source.splits["train"]
        samples[position] = dataclasses.replace(samples[position], load=lambda: b"broken")
    return source


def test_broken_images_can_be_skipped(store):
    said = []
    index = write_dataset(broken(7, 100, 200), store.sub("a"), on_error="skip", shard_mb=1, say=said.append)
    assert said == ["3 of 300 images are broken and left out: skipped.json lists them"]
    skipped = json.loads(store.sub("a").get(SKIPPED_NAME))
    rows = [row for split in skipped.values() for row in split]
    assert sorted(row["name"] for row in rows) == ["1/00007.png", "1/00100.png", "2/00200.png"]
    assert {row["reason"] for row in rows} == {"no JPEG, PNG or WebP image"}
    assert {name: split.samples + len(skipped.get(name, [])) for name, split in index.splits.items()} == {
        "train": 270,
        "val": 30,
    }
    labels = np.load(io.BytesIO(store.sub("a").get(LABELS_NAME)))
    read = [
        int(tar[at[1] : at[1] + size[1]])
        for row in (row for split in index.splits.values() for row in split.shards)
        for tar in [store.sub("a").get(row.name)]
        for _, at, size in np.load(io.BytesIO(store.sub("a").get(row.sidecar)))
    ]
    assert labels.tolist() == read and len(read) == 297
    interrupted(broken(7, 100, 200), store.sub("b"), 250, on_error="skip", shard_mb=1)
    write_dataset(broken(7, 100, 200), store.sub("b"), on_error="skip", shard_mb=1)
    assert contents(store.sub("a")) == contents(store.sub("b"))
    assert write_dataset(broken(7, 100, 200), store.sub("a"), on_error="skip", shard_mb=1) == index


def test_after_a_refusal_repaired_images_complete_the_data_set(store):
    cut, whole = store.sub("cut"), store.sub("whole")
    with pytest.raises(UserError, match=r"1 of 300(.|\n)*--on-error skip(.|\n)*00100.png: no JPEG"):
        write_dataset(broken(100), cut, shard_mb=1)
    assert not [name for name in cut.list() if name == INDEX_NAME]
    write_dataset(broken(), cut, shard_mb=1)
    write_dataset(broken(), whole, shard_mb=1)
    assert contents(cut) == contents(whole)


def test_a_split_of_broken_images_only(store):
    with pytest.raises(UserError, match="noise: every image of train is broken"):
        write_dataset(broken(*range(5), train=5, val=5), store, on_error="skip")
    assert not store.exists(INDEX_NAME)


def test_a_shard_of_broken_images_only_is_left_out(store):
    source = noisy()
    names = [row.name for row in write_dataset(source, store.sub("whole"), shard_mb=1).splits["train"].shards]
    rows = np.load(io.BytesIO(store.sub("whole").get("train/shard-000001.npy")))
    gone = {each.decode() for each in rows["key"]}
    source.splits["train"][:] = [
        dataclasses.replace(each, load=partial(bytes, 9)) if each.key in gone else each
        for each in source.splits["train"]
    ]
    index = write_dataset(source, store.sub("rest"), shard_mb=1, on_error="skip")
    assert [row.name for row in index.splits["train"].shards] == [names[0], *names[2:]]
    assert index.splits["train"].samples == 270 - len(gone)


@pytest.mark.parametrize("key_", ["/etc/passwd", "../a", "a/../b", "a/./b", "a.b", "", "a/", "a//b", "a\0b"])
def test_keys_that_are_no_plain_names(store, key_):
    source = made(20)
    source.splits["train"][5] = dataclasses.replace(source.splits["train"][5], key=key_)
    with pytest.raises(UserError, match="must be a relative path without"):
        write_dataset(source, store)
    assert store.list() == []


def test_names_that_are_no_utf8(store):
    source = made(20)
    source.splits["train"][5] = dataclasses.replace(source.splits["train"][5], key="\udcff", load=lambda: b"broken")
    with pytest.raises(UserError, match="train/\ufffd.png: no JPEG"):
        write_dataset(source, store)
    index = write_dataset(source, store, on_error="skip")
    assert sum(split.samples for split in index.splits.values()) == 19


def test_stratified_keeps_shares_and_count():
    labels = np.repeat([0, 1, 2], [70, 20, 11])
    chosen = stratified(key(0), labels, 10)
    assert np.bincount(labels[chosen]).tolist() == [7, 2, 1]
    assert stratified(key(0), labels, 101).all() and not stratified(key(0), labels, 0).any()
    assert (stratified(key(1), labels, 10) != chosen).any()


def test_shard_and_its_estimate(store):
    planned = estimate("digits", store.uri)
    assert store.list() == [] and not planned.occupied
    said = []
    index = shard("digits", store.uri, say=said.append)
    assert said == []
    assert planned.samples == {name: split.samples for name, split in index.splits.items()}
    rows = [row for split in index.splits.values() for row in split.shards]
    assert planned.shards == len(rows) and planned.classes == 10
    assert planned.bytes == pytest.approx(sum(row.bytes for row in rows), rel=0.01)
    shard("digits", store.uri, say=said.append)
    assert said == [f"{store.uri} already holds this data set, fingerprint {index.fingerprint}: nothing written"]
    assert json.loads(store.get(INDEX_NAME))["name"] == "digits"
    assert estimate("digits", store.uri).occupied


def test_unknown_source(store):
    with pytest.raises(UserError, match="source 'mnist' is unknown: choose one of cifar10, cifar100, digits"):
        shard("mnist", store.uri)
