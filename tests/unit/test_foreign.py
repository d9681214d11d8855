import io
import tarfile
from functools import partial

import numpy as np
import pytest

from datasets_prep.errors import UserError
from datasets_prep.foreign import MARK, index_tars
from datasets_prep.index import INDEX_NAME, LABELS_NAME, parse_array
from datasets_prep.sources import open_source
from datasets_prep.sources.base import Sample, Source
from datasets_prep.verify import verify
from datasets_prep.writer import write_dataset
from service.data import ShardDataset
from service.data.split import DataSplit, read_index
from service.data.store import Store
from tests.unit.test_archives import image, tar_of


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "foreign")


def shuffled(start, stop, classes=3):
    """Members of samples `start` … `stop − 1` with labels in random order."""
    labels = np.random.default_rng(start).integers(0, classes, stop - start)
    return {
        name: data
        for n, label in zip(range(start, stop), labels, strict=True)
        for name, data in ((f"{n:04d}.jpg", image(n)), (f"{n:04d}.cls", b"%d" % label), (f"{n:04d}.json", b"{}"))
    }


def contents(store):
    return {name: store.get(name) for name in store.list()}


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_indexed_tars_are_read_like_our_own(store, format):
    long = "f" * 60 + "/" + "g" * 60
    store.put("train/0.tar", tar_of(shuffled(0, 30), format=format))
    store.put("train/1.tar", tar_of({f"{long}/ümläut.jpeg": image(30), f"{long}/ümläut.cls": b" 2\n"}, format=format))
    store.put("val/0.tar", tar_of(shuffled(40, 44), format=format))
    before = contents(store)
    indexed = index_tars(store, name="odd", workers=2)
    assert contents(store).items() >= before.items() and MARK not in store.list()
    assert read_index(store) == indexed.index and indexed.warnings == []
    assert indexed.index.classes == ("0", "1", "2") and indexed.index.image_size.max == (12, 10)
    assert {name: split.samples for name, split in indexed.index.splits.items()} == {"train": 31, "val": 4}
    split = DataSplit(store, indexed.index, "train")
    opened = split.open_shard(split.rows.shards[1])
    assert opened.rows["key"][0].decode() == f"{long}/ümläut" and split.labels[-1] == 2
    assert opened.encoded(0) == image(30)
    assert verify(store, indexed.index).faults == []


def test_labels_and_sidecars_of_every_sample(store):
    store.put("a.tar", tar_of(shuffled(0, 20)))
    index = index_tars(store).index
    with tarfile.open(fileobj=io.BytesIO(store.get("a.tar"))) as archive:
        expected = {m.name: (m.offset_data, m.size, archive.extractfile(m).read()) for m in archive}
    rows, labels = parse_array(store.get("a.npy")), parse_array(store.get(LABELS_NAME))
    assert index.splits["train"].fields == ("jpg", "cls") and len(rows) == 20
    for row, label in zip(rows, labels, strict=True):
        key = row["key"].decode()
        for field, offset, size in zip(("jpg", "cls"), row["offset"], row["size"], strict=True):
            assert expected[f"{key}.{field}"][:2] == (offset, size)
        assert int(expected[f"{key}.cls"][2]) == label


def test_splits_and_classes_that_are_given(store, tmp_path):
    (tmp_path / "names").write_text("cat\nsea lion\ndog\n")
    store.put("test/0.tar", tar_of(shuffled(0, 20)))
    index = index_tars(store, split="holdout", class_list=tmp_path / "names").index
    assert list(index.splits) == ["holdout"] and index.classes == ("cat", "sea lion", "dog")
    assert index.name == "foreign"


def test_unlabelled_tars(store):
    store.put("0.tar", tar_of({f"{n}.webp": image(n, kind="WEBP") for n in range(3)}))
    index = index_tars(store).index
    assert index.splits["train"].fields == ("webp",) and index.classes == ()
    assert parse_array(store.get(LABELS_NAME)).tolist() == [-1] * 3
    assert verify(store, index).faults == []


def sorted_tar(start, classes, each):
    files = {}
    for n in range(classes * each):
        files |= {f"{start + n:04d}.jpg": image(0), f"{start + n:04d}.cls": b"%d" % (n // each)}
    return tar_of(files)


def test_a_warning_of_samples_sorted_by_class(store):
    store.put("train/0.tar", sorted_tar(0, 10, 10))
    store.put("val/0.tar", tar_of(shuffled(0, 100)))
    (warning,) = index_tars(store).warnings
    assert warning.startswith("train is sorted by class: 91% of neighbours share their class, 10.0% would in random")


BAD = {
    "truncated": (
        lambda tar: tar[: len(tar) // 2],
        r"bad.tar: it ends before byte \d+, without its end mark: it is truncated",
    ),
    "0 bytes": (lambda tar: b"", r"bad.tar: it ends before byte 512, without its end mark"),
    "empty": (lambda tar: tar_of({}), "bad.tar holds no samples"),
    "no tar": (lambda tar: b"x" * 9000, "bad.tar: there is no tar header at byte 0"),
    "damaged in the middle": (lambda tar: tar[:1536] + b"x" * 512 + tar[2048:], "no tar header at byte 1536"),
    "symlink": (
        lambda tar: tar_of({"9.jpg": {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}}),
        "bad.tar: member '9.jpg' is a symbolic link",
    ),
    "hard link": (
        lambda tar: tar_of({"8.jpg": image(0), "9.jpg": {"type": tarfile.LNKTYPE, "linkname": "8.jpg"}}),
        "bad.tar: member '9.jpg' is a hard link",
    ),
    "absolute": (lambda tar: tar_of({"/etc/9.jpg": image(0)}), "member '/etc/9.jpg' leads out of the archive"),
    "dots": (lambda tar: tar_of({"a/../../9.jpg": image(0)}), r"member 'a/../../9.jpg' leads out of the archive"),
    "not UTF-8": (
        lambda tar: tar_of({"\udce9.jpg": image(0)}, format=tarfile.GNU_FORMAT, errors="surrogateescape"),
        r"member '\\\\xe9.jpg' has a name that is not UTF-8",
    ),
    "pickle": (lambda tar: tar_of({"9.jpg": image(0), "9.meta.PYD": b"cos\n"}), "'9.meta.PYD' may hold a pickle"),
    "objects": (
        lambda tar: tar_of({"9.jpg": image(0), "9.npy": objects()}),
        "member '9.npy' is no plain array or holds pickled objects",
    ),
    "key twice": (lambda tar: tar_of({"9.jpg": image(0), "8.jpg": image(0), "9.cls": b"0"}), "key '9' occurs twice"),
    "key in two tars": (lambda tar: tar_of({"0003.jpg": image(0), "0003.cls": b"0"}), "key '0003' occurs 2 times"),
    "no image": (lambda tar: tar_of({"9.cls": b"1"}), "sample '9' needs one image .* and has cls"),
    "two images": (lambda tar: tar_of({"9.jpg": image(0), "9.png": image(0)}), "needs one image .* and has jpg, png"),
    "empty image": (lambda tar: tar_of({"9.jpg": b""}), "member '9.jpg' is empty"),
    "broken image": (lambda tar: tar_of({"9.jpg": image(0)[:200], "9.cls": b"0"}), "bad.tar: member '9.jpg': "),
    "text as label": (lambda tar: tar_of({"9.jpg": image(0), "9.cls": b"cat"}), "'9.cls' is no number: b'cat'"),
    "negative label": (lambda tar: tar_of({"9.jpg": image(0), "9.cls": b"-1"}), "'9.cls' is no number: b'-1'"),
    "no label": (lambda tar: tar_of({"9.jpg": image(0)}), "1 of 31 samples of train have no label"),
}


def objects():
    buffer = io.BytesIO()
    np.save(buffer, np.array([print], object), allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize("damage", BAD)
def test_tars_that_are_refused_leave_nothing(store, damage):
    make, message = BAD[damage]
    store.put("train/good.tar", tar_of(shuffled(0, 30)))
    store.put("train/bad.tar", make(tar_of(shuffled(30, 40))))
    before = contents(store)
    with pytest.raises(UserError, match=message):
        index_tars(store)
    assert contents(store) == before


def test_labels_beyond_the_class_list(store, tmp_path):
    (tmp_path / "names").write_text("cat\ndog\n")
    store.put("0.tar", tar_of(shuffled(0, 30)))
    with pytest.raises(UserError, match="label 2 in train is none of 2 classes"):
        index_tars(store, class_list=tmp_path / "names")


def test_every_bad_tar_is_counted(store):
    for n in range(7):
        store.put(f"{n}.tar", tar_of({f"{n}.cls": b"0"}))
    with pytest.raises(UserError, match=r"0.tar: sample '0' needs .*4.tar: .* and 2 more: mend the tars"):
        index_tars(store, workers=3)


def test_nothing_is_written_over(store):
    store.put("0.tar", tar_of(shuffled(0, 3)))
    store.put("0.npy", b"somebody's")
    with pytest.raises(UserError, match="0.npy and 0 more files lie where sidecars go"):
        index_tars(store)
    assert store.get("0.npy") == b"somebody's"
    store.put(MARK, b"{}")  # of a run that was killed
    index = index_tars(store).index
    assert verify(store, index).faults == []
    with pytest.raises(UserError, match="has an index.json already: check it with `tessera verify"):
        index_tars(store)


def test_a_dry_run_writes_nothing(store):
    store.put("0.tar", tar_of(shuffled(0, 3)))
    assert index_tars(store, write=False).index.splits["train"].samples == 3
    assert store.list() == ["0.tar"]
    with pytest.raises(UserError, match="holds no .tar files"):
        index_tars(store.sub("elsewhere"))


def test_our_reader_takes_shards_of_webdatasets_writer(store, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    store.local_path.mkdir()
    with webdataset.ShardWriter(str(store.local_path / "train-%04d.tar"), maxcount=8, verbose=0) as writer:
        for n in range(20):
            writer.write({"__key__": f"{n:05d}", "jpg": image(n), "cls": n % 4, "json": {"n": n}})
    index = index_tars(store).index
    assert index.splits["train"].samples == 20 and len(index.splits["train"].shards) == 3
    assert verify(store, index).faults == []
    assert DataSplit(store, index, "train").labels.tolist() == [n % 4 for n in range(20)]
    again = open_source("wds", store.local_path)
    assert [sample.label for sample in again.splits["train"]] == [n % 4 for n in range(20)]
    assert INDEX_NAME in store.list()


def test_our_own_shards_get_their_own_sidecars_back(store, tmp_path):
    samples = [Sample(f"{n % 4}/{n:03d}", "jpg", n % 4, partial(image, n)) for n in range(40)]
    written = write_dataset(Source("foreign", ("0", "1", "2", "3"), {"train": samples}), store)
    before = contents(store)
    for name in store.list():
        if not name.endswith(".tar"):
            store.delete(name)
    assert index_tars(store).index == written
    assert contents(store) == before


def test_foreign_tars_become_batches(store):
    for number in range(3):
        store.put(f"{number}.tar", tar_of(shuffled(100 * number, 100 * number + 20)))
    index = index_tars(store).index
    labels = DataSplit(store, index, "train").labels
    seen = []
    for batch in ShardDataset(store.uri, batch_size=12, image_size=8, views=2, partitions=2):
        assert batch.images.shape == (2, 12, 3, 8, 8)
        assert batch.labels.tolist() == labels[batch.ids].tolist()
        seen += batch.ids.tolist()
    assert sorted(seen) == list(range(60))
