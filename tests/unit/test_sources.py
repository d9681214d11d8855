import io
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from datasets_prep.errors import UserError
from datasets_prep.sources import SOURCES, cifar10, digits, imagefolder, png


def decoded(data):
    return np.asarray(Image.open(io.BytesIO(data)))


def save(path, shape=(8, 8, 3), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8)).save(path)


@pytest.mark.parametrize("shape", [(16, 16), (5, 3, 3), (200, 400, 3)])
def test_stored_png_is_lossless(shape):
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    np.testing.assert_array_equal(decoded(png.encode(image)), image)


def test_digits_are_split_for_good_and_by_class():
    source = digits.open_source()
    assert {name: len(samples) for name, samples in source.splits.items()} == {"train": 1297, "test": 500}
    counts = np.bincount([sample.label for sample in source.splits["test"]])
    assert counts.min() >= 48 and counts.max() <= 51
    assert [sample.key for sample in source.splits["test"][:4]] == ["0004", "0005", "0007", "0013"]


def test_digits_are_doubled_bilinearly():
    values = np.random.default_rng(0).integers(0, 17, (3, 8, 8))
    doubled = digits.double(values)
    for small, large in zip(values, doubled, strict=True):
        expected = Image.fromarray((small * 255 / 16).astype(np.float32)).resize((16, 16), Image.Resampling.BILINEAR)
        np.testing.assert_allclose(large, np.asarray(expected), atol=1)
    assert doubled.dtype == np.uint8 and digits.double(np.full((1, 2, 2), 16)).min() == 255


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(("cat/a.png", "cat/b.v2.JPG", "dog/deep/c.jpeg")):
        save(tmp_path / "pets" / name, seed=number)
    return tmp_path / "pets"


def test_imagefolder_keeps_bytes(folder):
    (folder / "cat" / ".DS_Store").write_bytes(b"hidden")
    source = imagefolder.open_source(folder)
    rows = [(sample.key, sample.extension, sample.label) for sample in source.splits["train"]]
    assert rows == [("cat/a", "png", 0), ("cat/b_v2", "jpg", 0), ("dog/deep/c", "jpg", 1)]
    assert source.name == "pets" and source.classes == ("cat", "dog")
    assert source.splits["train"][1].load() == (folder / "cat" / "b.v2.JPG").read_bytes()


def test_imagefolder_with_splits(folder, tmp_path):
    root = tmp_path / "root"
    for split in ("train", "test"):
        save(root / split / "cat" / "1.png")
    save(root / "train" / "dog" / "1.png")
    save(root / "unlabelled" / "x.png")
    source = imagefolder.open_source(root)
    labels = {name: [sample.label for sample in samples] for name, samples in source.splits.items()}
    assert labels == {"train": [0, 1], "test": [0], "unlabelled": [-1]}


def _empty_class(folder):
    (folder / "bird").mkdir()


def _strange_files(folder):
    for name in ("cat/x.gif", "dog/y.txt"):
        (folder / name).write_bytes(b"")


def _duplicate_keys(folder):
    save(folder / "cat" / "a.jpg")


def _a_split_among_classes(folder):
    save(folder / "train" / "cat" / "a.png")


def _unknown_test_class(folder):
    for name in ("cat", "dog"):
        (folder / name).rename(folder.parent / name)
    save(folder / "train" / "cat" / "a.png")
    save(folder / "test" / "fish" / "a.png")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_empty_class, "bird is empty"),
        (_strange_files, r"2 files are neither .png nor .jpg nor .webp \(cat/x.gif, dog/y.txt\)"),
        (_duplicate_keys, r"1 duplicate keys \(cat/a\)"),
        (_a_split_among_classes, r"mixes splits with other folders \(cat, dog\)"),
        (_unknown_test_class, r"classes \['fish'\] are missing in train"),
    ],
)
def test_imagefolder_refuses(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message):
        imagefolder.open_source(folder)


@pytest.mark.parametrize("name", ["cifar10", "imagefolder"])
def test_a_missing_folder_is_named(name, tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        SOURCES[name](tmp_path / "nowhere")
    with pytest.raises(UserError, match=str(tmp_path)):
        SOURCES[name](tmp_path)


def _write_batches(root):
    rng = np.random.default_rng(0)
    pixels = {}
    for name in sum(cifar10.BATCHES.values(), ()):
        pixels[name] = rng.integers(0, 256, (4, 3072), np.uint8)
        batch = pickle.dumps({b"data": pixels[name], b"labels": [3, 1, 4, 1]}, protocol=3)
        (root / name).write_bytes(batch.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    return pixels


@pytest.mark.parametrize("packed", [False, True])
def test_cifar10_reads_the_python_batches(tmp_path, packed):
    root = tmp_path / cifar10.FOLDER
    root.mkdir()
    pixels = _write_batches(root)
    if packed:
        with tarfile.open(tmp_path / cifar10.ARCHIVE, "w:gz") as archive:
            archive.add(root, cifar10.FOLDER)
        root.rename(tmp_path / "elsewhere")
    source = cifar10.open_source(tmp_path)
    assert {name: len(samples) for name, samples in source.splits.items()} == {"train": 20, "test": 4}
    sample = source.splits["train"][6]
    assert (sample.key, sample.label) == ("data_batch_2/0002", 4)
    expected = pixels["data_batch_2"][2].reshape(3, 32, 32).transpose(1, 2, 0)
    np.testing.assert_array_equal(decoded(sample.load()), expected)


def test_cifar10_runs_no_code_of_a_batch(tmp_path):
    _write_batches(tmp_path)
    (tmp_path / "test_batch").write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    with pytest.raises(UserError, match="damaged.*a batch needs no os.system"):
        cifar10.open_source(tmp_path)


def test_cifar10_reads_the_tarballs(shared_data):
    source = cifar10.open_source(shared_data)
    assert {name: len(samples) for name, samples in source.splits.items()} == {"train": 50_000, "test": 10_000}
    assert np.bincount([sample.label for sample in source.splits["test"]]).tolist() == [1000] * 10
    assert decoded(source.splits["test"][-1].load()).shape == (32, 32, 3)
