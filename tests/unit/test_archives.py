"""Sources in their original formats, written here in small: the archives themselves are not at hand."""

import io
import json
import pickle
import shutil
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy.io import savemat

from datasets_prep.errors import UserError
from datasets_prep.sources import SOURCES, imagenet, open_source
from datasets_prep.sources.base import UNLABELLED, Options
from datasets_prep.writer import write_dataset
from service.data.store import Store

WNIDS = ("n01440764", "n02102040", "n02979186")


def image(seed, size=(12, 10), kind="JPEG"):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def tar_of(files, **options):
    """Bytes of a tar; values are contents or a TarInfo's fields."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            for attribute, value in content.items() if isinstance(content, dict) else ():
                setattr(info, attribute, value)
            data = content if isinstance(content, bytes) else b""
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def outline(source):
    return {name: [(sample.key, sample.label) for sample in samples] for name, samples in source.splits.items()}


def loaded(source):
    """Contents of all samples, after a way through a pickle as a worker process takes it."""
    return {
        (name, sample.key): pickle.loads(pickle.dumps(sample)).load()
        for name, samples in source.splits.items()
        for sample in samples
    }


# ImageNet


@pytest.fixture
def photos():
    """Three train images a class and four validation images with their classes, by number."""
    train = {wnid: {f"{wnid}_{n}.JPEG": image(10 * c + n) for n in (7, 8, 10)} for c, wnid in enumerate(WNIDS)}
    val = [(WNIDS[c], image(100 + number)) for number, c in enumerate((2, 0, 1, 2), 1)]
    return train, val


def val_name(number):
    return f"ILSVRC2012_val_{number:08d}.JPEG"


def devkit(numbers, ids=(3, 1, 2)):
    """The devkit's tarball; `ids` are the classes' numbers there, in no order, below a node with children."""
    dtype = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    rows = [(number, wnid, "words", "gloss", 0) for number, wnid in zip(ids, WNIDS, strict=True)]
    meta = io.BytesIO()
    savemat(meta, {"synsets": np.array([*rows, (4, "n00001740", "entity", "gloss", 3)], dtype)[:, None]})
    truth = "".join(f"{number}\n" for number in numbers).encode()
    files = {
        f"{imagenet.DEVKIT}/data/meta.mat": meta.getvalue(),
        f"{imagenet.DEVKIT}/data/ILSVRC2012_validation_ground_truth.txt": truth,
    }
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return packed.getvalue()


def original_tars(root, photos):
    train, val = photos
    root.mkdir(parents=True)
    inner = {f"{wnid}.tar": tar_of(files) for wnid, files in train.items()}
    (root / imagenet.TRAIN_TAR).write_bytes(tar_of(inner))
    (root / imagenet.VAL_TAR).write_bytes(tar_of({val_name(n): data for n, (_, data) in enumerate(val, 1)}))
    numbers = dict(zip(WNIDS, (3, 1, 2), strict=True))
    (root / f"{imagenet.DEVKIT}.tar.gz").write_bytes(devkit([numbers[wnid] for wnid, _ in val]))
    return root


def write_folders(split, by_class):
    for wnid, files in by_class.items():
        (split / wnid).mkdir(parents=True)
        for name, data in files.items():
            (split / wnid / name).write_bytes(data)


def plain_folders(root, photos):
    train, val = photos
    write_folders(root / "train", train)
    by_class = {wnid: {} for wnid in WNIDS}
    for number, (wnid, data) in enumerate(val, 1):
        by_class[wnid][val_name(number)] = data
    write_folders(root / "val", by_class)
    return root


def kaggle_folders(root, photos):
    train, val = photos
    data = root / "ILSVRC" / "Data" / "CLS-LOC"
    write_folders(data / "train", train)
    (data / "val").mkdir()
    rows = ["ImageId,PredictionString"]
    for number, (wnid, image_) in enumerate(val, 1):
        (data / "val" / val_name(number)).write_bytes(image_)
        rows.append(f"{val_name(number).removesuffix('.JPEG')},{wnid} 1 2 3 4 {wnid} 5 6 7 8 ")
    (root / imagenet.SOLUTION).write_text("\n".join(rows) + "\n")
    return root


LAYOUTS = (original_tars, plain_folders, kaggle_folders)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_imagenet_is_the_same_from_every_layout(layout, photos, tmp_path):
    train, val = photos
    source = open_source("imagenet", layout(tmp_path / "root", photos))
    assert source.name == "imagenet" and source.classes == WNIDS
    assert outline(source) == {
        "train": sorted((f"{w}/{name[:-5]}", c) for c, w in enumerate(WNIDS) for name in train[w]),
        "test": sorted((f"{w}/{val_name(n)[:-5]}", WNIDS.index(w)) for n, (w, _) in enumerate(val, 1)),
    }
    contents = loaded(source)
    assert contents["train", f"{WNIDS[1]}/{WNIDS[1]}_10"] == train[WNIDS[1]][f"{WNIDS[1]}_10.JPEG"]
    assert contents["test", f"{WNIDS[2]}/ILSVRC2012_val_00000004"] == val[3][1]


def test_every_layout_gives_the_same_shards(photos, tmp_path):
    prints = {
        write_dataset(
            open_source("imagenet", layout(tmp_path / layout.__name__, photos)),
            Store(tmp_path / f"{layout.__name__}-shards"),
        ).fingerprint
        for layout in LAYOUTS
    }
    assert len(prints) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_imagenet100_keeps_the_listed_classes(layout, photos, tmp_path):
    (tmp_path / "list.txt").write_text(f"{WNIDS[2]} chain saw\n\n{WNIDS[0]}\n")
    options = Options(class_list=tmp_path / "list.txt")
    source = open_source("imagenet100", layout(tmp_path / "root", photos), options)
    assert source.classes == (WNIDS[0], WNIDS[2])  # sorted, whatever the list's order
    assert [label for _, label in outline(source)["train"]] == [0, 0, 0, 1, 1, 1]
    assert [label for _, label in outline(source)["test"]] == [0, 1, 1]


def _no_labels(root):
    (root / f"{imagenet.DEVKIT}.tar.gz").unlink()


def _too_few_labels(root):
    (root / f"{imagenet.DEVKIT}.tar.gz").write_bytes(devkit([3, 1, 2]))


def _label_out_of_range(root):
    (root / f"{imagenet.DEVKIT}.tar.gz").write_bytes(devkit([3, 1, 2, 4]))


def _half_a_devkit(root):
    file = root / f"{imagenet.DEVKIT}.tar.gz"
    file.write_bytes(file.read_bytes()[:200])


def _truncated_train(root):
    file = root / imagenet.TRAIN_TAR
    file.write_bytes(file.read_bytes()[:9000])


def _truncated_class(root):
    inner = tar_of({"n01440764_1.JPEG": image(0)})
    (root / imagenet.TRAIN_TAR).write_bytes(tar_of({"n01440764.tar": inner[:600]}))


def _symlink(root):
    inner = tar_of({"n01440764_1.JPEG": {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}})
    (root / imagenet.TRAIN_TAR).write_bytes(tar_of({"n01440764.tar": inner}))


def _no_wnid(root):
    (root / imagenet.TRAIN_TAR).write_bytes(tar_of({"tench.tar": tar_of({"1.JPEG": image(0)})}))


def _empty_class_tar(root):
    (root / imagenet.TRAIN_TAR).write_bytes(tar_of({"n01440764.tar": tar_of({})}))


def _no_val(root):
    (root / imagenet.VAL_TAR).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_labels, r"no labels of the validation images: put ILSVRC2012_devkit_t12.tar.gz or LOC_val"),
        (_too_few_labels, r"devkit_t12.tar.gz has 3 validation labels for 4 images"),
        (_label_out_of_range, r"devkit_t12.tar.gz is no whole devkit, or a label in it is no class \(4\)"),
        (_half_a_devkit, r"devkit_t12.tar.gz is no whole devkit"),
        (_truncated_train, r"img_train.tar: it ends before byte \d+, without its end mark: it is truncated"),
        (_truncated_class, r"img_train.tar/n01440764.tar: it ends before byte \d+, without its end mark"),
        (_symlink, r"n01440764.tar: member 'n01440764_1.JPEG' is a symbolic link"),
        (_no_wnid, r"tench.tar: 'tench' is no WordNet id .* use the source imagefolder"),
        (_empty_class_tar, r"n01440764.tar holds no images"),
        (_no_val, r"holds neither val/ nor ILSVRC2012_img_val.tar"),
    ],
)
def test_imagenet_tars_that_are_refused(damage, message, photos, tmp_path):
    root = original_tars(tmp_path / "root", photos)
    damage(root)
    with pytest.raises(UserError, match=message):
        open_source("imagenet", root)


def test_imagenet_folders_that_are_refused(photos, tmp_path):
    root = plain_folders(tmp_path / "root", photos)
    (root / "train" / "n99999999").mkdir()
    with pytest.raises(UserError, match="train/n99999999 is empty"):
        open_source("imagenet", root)
    shutil.rmtree(root / "train" / "n99999999")
    shutil.rmtree(root / "train" / WNIDS[0])
    with pytest.raises(UserError, match=f"class {WNIDS[0]} is in val and not in train"):
        open_source("imagenet", root)
    root = kaggle_folders(tmp_path / "kaggle", photos)
    lines = (root / imagenet.SOLUTION).read_text().splitlines()
    (root / imagenet.SOLUTION).write_text("\n".join(lines[:-1]))
    with pytest.raises(UserError, match="ILSVRC2012_val_00000004.JPEG has no label"):
        open_source("imagenet", root)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("n01440764\nn01440764\n", "'n01440764' occurs twice"),
        ("n01440764\nn00000000\n", "'n00000000' is no class of"),
        ("\n", "is empty"),
    ],
)
def test_class_lists_that_are_refused(lines, message, photos, tmp_path):
    root = plain_folders(tmp_path / "root", photos)
    (tmp_path / "list.txt").write_text(lines)
    with pytest.raises(UserError, match=f"list.txt.*{message}"):
        open_source("imagenet100", root, Options(class_list=tmp_path / "list.txt"))


def test_imagenet_from_real_photos(shared_data, tmp_path):
    with tarfile.open(shared_data / "imagenette224.tar") as archive:
        archive.extractall(tmp_path, filter="data")
    source = open_source("imagenet", tmp_path / "imagenette224")
    counts = {name: np.bincount([label for _, label in rows]).tolist() for name, rows in outline(source).items()}
    assert counts == {"train": [400] * 10, "test": [100] * 10}
    assert source.splits["train"][0].load()[:2] == b"\xff\xd8"


# CIFAR-100


def cifar100_rows(count, seed):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 3072), np.uint8), rng.integers(0, 5, count), rng.integers(0, 2, count)


NAMES = ("apple", "bee", "cup", "dam", "elk")


def write_cifar100(root, version, labels=None):
    folder = root / f"cifar-100-{version}"
    folder.mkdir(parents=True)
    for split, count in (("train", 10), ("test", 4)):
        pixels, fine, coarse = cifar100_rows(count, count)
        fine = fine if labels is None else np.resize(labels, count)
        if version == "binary":
            rows = np.concatenate([coarse[:, None], fine[:, None], pixels], 1).astype(np.uint8)
            (folder / f"{split}.bin").write_bytes(rows.tobytes())
        else:
            batch = {b"data": pixels, b"fine_labels": fine.tolist(), b"coarse_labels": coarse.tolist()}
            data = pickle.dumps(batch, protocol=3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            (folder / split).write_bytes(data)
    if version == "binary":
        (folder / "fine_label_names.txt").write_text("\n".join(NAMES) + "\n")
    else:
        names = {b"fine_label_names": [name.encode() for name in NAMES], b"coarse_label_names": [b"a", b"b"]}
        (folder / "meta").write_bytes(pickle.dumps(names, protocol=3))
    return root


@pytest.mark.parametrize("version", ["python", "binary"])
@pytest.mark.parametrize("packed", [False, True])
def test_cifar100_is_the_same_from_both_versions(version, packed, tmp_path):
    root = write_cifar100(tmp_path / "data", version)
    if packed:
        folder = root / f"cifar-100-{version}"
        with tarfile.open(root / f"{folder.name}.tar.gz", "w:gz") as archive:
            archive.add(folder, folder.name)
        shutil.rmtree(folder)
    source = open_source("cifar100", root)
    pixels, fine, _ = cifar100_rows(10, 10)
    assert source.classes == NAMES and len(source.splits["test"]) == 4
    assert outline(source)["train"] == [(f"train/{n:05d}", label) for n, label in enumerate(fine)]
    decoded = np.asarray(Image.open(io.BytesIO(loaded(source)["train", "train/00003"])))
    np.testing.assert_array_equal(decoded, pixels[3].reshape(3, 32, 32).transpose(1, 2, 0))


@pytest.mark.parametrize("version", ["python", "binary"])
def test_cifar100_refuses_damage(version, tmp_path):
    root = write_cifar100(tmp_path / "range", version, labels=[1, 5])
    with pytest.raises(UserError, match="train has label 5, and there are 5 classes"):
        open_source("cifar100", root)
    root = write_cifar100(tmp_path / "cut", version)
    file = root / f"cifar-100-{version}" / ("train.bin" if version == "binary" else "train")
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(UserError, match=f"{root}: this copy of CIFAR-100 is damaged"):
        open_source("cifar100", root)
    with pytest.raises(UserError, match="holds no CIFAR-100: expected cifar-100-python/"):
        open_source("cifar100", tmp_path)


def test_cifar100_runs_no_code_of_a_batch(tmp_path):
    root = write_cifar100(tmp_path, "python")
    (root / "cifar-100-python" / "test").write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    with pytest.raises(UserError, match="damaged.*a batch needs no os.system"):
        open_source("cifar100", root)


# STL-10


@pytest.fixture
def stl10(tmp_path):
    root = tmp_path / "stl10_binary"
    root.mkdir()
    rng = np.random.default_rng(0)
    for name, count in (("train_X", 4), ("test_X", 3), ("unlabeled_X", 5)):
        (root / f"{name}.bin").write_bytes(rng.integers(0, 256, (count, 3, 96, 96), np.uint8).tobytes())
    (root / "train_y.bin").write_bytes(bytes([1, 10, 3, 3]))
    (root / "test_y.bin").write_bytes(bytes([2, 2, 9]))
    (root / "class_names.txt").write_text("\n".join(f"class{n}" for n in range(10)))
    return root


def test_stl10_is_column_major_and_counts_from_one(stl10):
    source = open_source("stl10", stl10.parent)
    assert {name: [label for _, label in rows] for name, rows in outline(source).items()} == {
        "train": [0, 9, 2, 2],
        "test": [1, 1, 8],
        "unlabelled": [UNLABELLED] * 5,
    }
    stored = np.frombuffer((stl10 / "train_X.bin").read_bytes(), np.uint8).reshape(4, 3, 96, 96)
    decoded = np.asarray(Image.open(io.BytesIO(loaded(source)["train", "000002"])))
    assert decoded[5, 70].tolist() == stored[2, :, 70, 5].tolist()  # row 5, column 70
    np.testing.assert_array_equal(decoded, stored[2].transpose(2, 1, 0))


@pytest.mark.parametrize(
    ("file", "data", "message"),
    [
        ("train_y.bin", bytes([1, 2]), "train_y.bin has 2 labels for 4 images"),
        ("test_y.bin", bytes([1, 2, 11]), r"test_y.bin has labels beyond 1…10"),
        ("test_y.bin", bytes([0, 2, 1]), r"test_y.bin has labels beyond 1…10"),
        ("unlabeled_X.bin", bytes(30_000), "unlabeled_X.bin has 30000 bytes, not a multiple of 27648"),
        ("test_X.bin", None, "is no whole copy of STL-10: test_X.bin missing"),
    ],
)
def test_stl10_refuses(stl10, file, data, message):
    (stl10 / file).unlink() if data is None else (stl10 / file).write_bytes(data)
    with pytest.raises(UserError, match=message):
        open_source("stl10", stl10)


def test_stl10_names_the_command_that_unpacks(tmp_path):
    with pytest.raises(UserError, match="run `tar -xzf .*stl10_binary.tar.gz`"):
        open_source("stl10", tmp_path / "stl10_binary.tar.gz")


# Tiny ImageNet


@pytest.fixture
def tiny(tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    for number, wnid in enumerate(WNIDS):
        (root / "train" / wnid / "images").mkdir(parents=True)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("x")
        for n in range(2):
            (root / "train" / wnid / "images" / f"{wnid}_{n}.JPEG").write_bytes(image(10 * number + n))
    (root / "val" / "images").mkdir(parents=True)
    for n in range(3):
        (root / "val" / "images" / f"val_{n}.JPEG").write_bytes(image(50 + n))
    rows = [f"val_{n}.JPEG\t{wnid}\t0\t32\t44\t62" for n, wnid in enumerate(reversed(WNIDS))]
    (root / "val" / "val_annotations.txt").write_text("\n".join(rows) + "\n")
    (root / "wnids.txt").write_text("\n".join(reversed(WNIDS)) + "\n")
    return root


def test_tiny_imagenet_takes_labels_from_the_annotations(tiny):
    source = open_source("tiny-imagenet", tiny.parent)
    assert source.classes == WNIDS
    assert outline(source)["train"][:3] == [
        (f"{WNIDS[0]}/{WNIDS[0]}_0", 0),
        (f"{WNIDS[0]}/{WNIDS[0]}_1", 0),
        (f"{WNIDS[1]}/{WNIDS[1]}_0", 1),
    ]
    assert outline(source)["test"] == [("val_0", 2), ("val_1", 1), ("val_2", 0)]
    assert loaded(source)["test", "val_1"] == image(51)


def _annotations(tiny, text):
    (tiny / "val" / "val_annotations.txt").write_text(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tiny: (tiny / "val" / "images" / "val_1.JPEG").unlink(), "val_annotations.txt: val_1.JPEG is missing"),
        (lambda tiny: _annotations(tiny, f"val_0.JPEG\t{WNIDS[0]}\n"), "val_1.JPEG has no label; val_2.JPEG has no"),
        (lambda tiny: _annotations(tiny, "".join(f"val_{n}.JPEG\tn0\n" for n in range(3))), "is labelled n0, which is"),
        (lambda tiny: shutil.rmtree(tiny / "train" / WNIDS[1]), f"{WNIDS[1]} is only here or only in wnids.txt"),
        (lambda tiny: shutil.rmtree(tiny / "train" / WNIDS[1] / "images"), f"{WNIDS[1]}/images is missing"),
        (lambda tiny: (tiny / "wnids.txt").unlink(), "is no Tiny ImageNet"),
    ],
)
def test_tiny_imagenet_refuses(tiny, damage, message):
    damage(tiny)
    with pytest.raises(UserError, match=message):
        open_source("tiny-imagenet", tiny)


# Parquet


def write_parquet(path, images, labels=None, names=None, struct=True, column="image"):
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": data, "path": f"{n}.jpg"} for n, data in enumerate(images)] if struct else images
    columns = {column: pa.array(cells)} | ({} if labels is None else {"label": pa.array(labels)})
    table = pa.table(columns)
    if names:
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=2)
    return path


@pytest.mark.parametrize("struct", [True, False])
def test_parquet_in_both_shapes(struct, tmp_path):
    images = [image(n, kind="PNG") for n in range(5)]
    root = tmp_path / "pets"
    write_parquet(root / "data" / "train-00000-of-00001.parquet", images, [1, 0, 1, 1, 0], ["cat", "dog"], struct)
    write_parquet(root / "data" / "validation-00000-of-00001.parquet", images[:3], [0, 0, 1], struct=struct)
    write_parquet(root / "data" / "test-00000-of-00001.parquet", images[3:], [-1, -1], struct=struct)
    source = open_source("parquet", root)
    assert (source.name, source.classes) == ("pets", ("cat", "dog"))
    assert outline(source)["train"] == [
        (f"data/train-00000-of-00001/{n:08d}", label) for n, label in enumerate([1, 0, 1, 1, 0])
    ]
    assert [label for _, label in outline(source)["val"]] == [0, 0, 1]
    assert [label for _, label in outline(source)["test"]] == [UNLABELLED] * 2
    assert [data for (split, _), data in loaded(source).items() if split == "train"] == images
    assert {sample.extension for sample in source.splits["train"]} == {"png"}


def test_parquet_without_labels_and_with_other_columns(tmp_path):
    file = write_parquet(tmp_path / "photos.parquet", [image(0), image(1)], column="jpeg")
    with pytest.raises(UserError, match="no column 'image', it has jpeg: name one by --image-column"):
        open_source("parquet", file)
    source = open_source("parquet", file, Options(image_column="jpeg"))
    assert source.classes == () and [label for _, label in outline(source)["train"]] == [UNLABELLED] * 2
    with pytest.raises(UserError, match="no column 'class'"):
        open_source("parquet", file, Options(image_column="jpeg", label_column="class"))


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ([0, 2, 1], ["a", "b"], "label 2 in train is none of 2 classes"),
        ([0, -2, 1], None, "label -2 in train"),
        ([0, -1, 1], None, "1 of 3 samples of train have no label"),
        ([0, None, 1], None, "column 'label' must hold a number in every row"),
        (["a", "b", "c"], None, "column 'label' must hold a number in every row"),
    ],
)
def test_parquet_labels_that_are_refused(labels, names, message, tmp_path):
    file = write_parquet(tmp_path / "train.parquet", [image(n) for n in range(3)], labels, names)
    with pytest.raises(UserError, match=message):
        open_source("parquet", file)


def test_parquet_damage(tmp_path):
    file = write_parquet(tmp_path / "a" / "train.parquet", [image(n) for n in range(3)])
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match="train.parquet is no whole parquet file"):
        open_source("parquet", file)
    file = write_parquet(tmp_path / "b.parquet", [image(0), None])
    source = open_source("parquet", file)
    with pytest.raises(ValueError, match="b.parquet, row group 0, row 1 holds no image"):
        source.splits["train"][1].load()
    with pytest.raises(UserError, match="column 'image' holds string, not encoded images"):
        open_source("parquet", write_parquet(tmp_path / "c.parquet", ["a", "b"], struct=False))


# WebDataset


def test_wds_reads_samples_where_they_lie(tmp_path):
    root = tmp_path / "foreign"
    root.mkdir()
    (root / "set-train-0000.tar").write_bytes(
        tar_of({"./a/0.jpeg": image(0), "./a/0.cls": b"2\n", "a/1.cls": b"0", "a/1.json": b"{}", "a/1.JPG": image(1)})
    )
    (root / "set-train-0001.tar").write_bytes(tar_of({"b/2.v1.txt": b"x", "b/2.png": image(2), "b/2.cls": b"1"}))
    (root / "set-val-0000.tar").write_bytes(tar_of({"c/3.jpg": image(3), "c/3.cls": b"1"}))
    source = open_source("wds", root)
    assert source.name == "foreign" and source.classes == ("0", "1", "2")
    assert outline(source) == {"train": [("a/0", 2), ("a/1", 0), ("b/2", 1)], "val": [("c/3", 1)]}
    assert [sample.extension for sample in source.splits["train"]] == ["jpg", "jpg", "png"]
    assert list(loaded(source).values()) == [image(n) for n in range(4)]
    (tmp_path / "names").write_text("sea lion\ncat\ndog\n")
    assert open_source("wds", root, Options(class_list=tmp_path / "names")).classes == ("sea lion", "cat", "dog")
    (tmp_path / "names").write_text("sea lion\ncat\n")
    with pytest.raises(UserError, match="label 2 in train is none of 2 classes"):
        open_source("wds", root, Options(class_list=tmp_path / "names"))


def test_wds_keys_that_start_anew_in_each_tar(tmp_path):
    for number in range(2):
        (tmp_path / f"{number}.tar").write_bytes(tar_of({"000.jpg": image(number)}))
    assert outline(open_source("wds", tmp_path)) == {"train": [("0/000", -1), ("1/000", -1)]}


@pytest.mark.parametrize("name", ["imagenet", "imagenet100", "cifar100", "stl10", "tiny-imagenet", "parquet", "wds"])
def test_a_missing_folder_is_named(name, tmp_path):
    (tmp_path / "list").write_text("n01440764")
    options = Options(class_list=tmp_path / "list")
    with pytest.raises(UserError, match="nowhere"):
        SOURCES[name](tmp_path / "nowhere", options)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        SOURCES[name](tmp_path / "empty", options)


def test_options_that_a_source_does_not_read(tmp_path):
    with pytest.raises(UserError, match="source digits does not read --class-list, --label-column: leave it out"):
        open_source("digits", None, Options(class_list=tmp_path, label_column="y"))


def test_names_that_are_not_utf8_are_refused(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "\udce9.jpg").write_bytes(image(0))
    with pytest.raises(UserError, match=r"'cat/\\udce9' is not UTF-8: rename"):
        open_source("imagefolder", tmp_path)
