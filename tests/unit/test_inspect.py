import io
import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from datasets_prep.errors import UserError
from datasets_prep.index import LABELS_NAME
from datasets_prep.sources.base import Sample, Source
from datasets_prep.sources.png import encode
from datasets_prep.writer import write_dataset
from jobs.cli import cli
from jobs.inspection import augmented, contact_sheet
from jobs.sheet import Row, draw
from jobs.survey import choose, read_pictures, survey
from service.config import Data
from service.data.augment import MEAN, STD, random_view
from service.data.batches import open_batches
from service.data.split import DataSplit, make_plan, read_index
from service.data.store import Store
from tests.unit.test_archives import tar_of


def made(folder, sides, labels, classes):
    """A data set of noise images with sides (width, height) in an only split `train`, and the pixels by key."""
    rng = np.random.default_rng(0)
    pixels = {f"{n:03d}": rng.integers(0, 256, (h, w, 3), np.uint8) for n, (w, h) in enumerate(sides)}
    samples = [Sample(key, "png", label, lambda image=image: encode(image))
               for (key, image), label in zip(pixels.items(), labels, strict=True)]  # fmt: skip
    store = Store(folder)
    index = write_dataset(Source("noise", classes, {"train": samples, "val": samples[:1]}), store, shard_mb=1)
    return DataSplit(store, index, "train"), pixels


@pytest.fixture
def noise(tmp_path):
    sides = [(20 + n % 7, 30 - n % 5) for n in range(60)]
    return made(tmp_path / "noise", sides, [n % 3 if n < 50 else 1 for n in range(60)], ("ant", "bee", "cow", "dog"))


def test_pictures_are_read_by_id(noise):
    split, pixels = noise
    pictures = read_pictures(split, np.array([59, 0, 7]))
    assert [picture.id for picture in pictures] == [59, 0, 7]
    for picture in pictures:
        np.testing.assert_array_equal(picture.pixels, pixels[picture.key])
        assert picture.label == split.labels[picture.id] and picture.data == encode(pixels[picture.key])


def test_a_survey_of_all_images_is_exact(noise):
    split, pixels = noise
    figures = survey(split, images=100)
    assert figures.samples == figures.surveyed == 60
    assert figures.classes == {"ant": 17, "bee": 27, "cow": 16, "dog": 0}
    widths, heights = (sorted(image.shape[axis] for image in pixels.values()) for axis in (1, 0))
    assert figures.width[::2] == [20, int(np.median(widths)), 26]
    assert figures.height[::2] == [26, int(np.median(heights)), 30]
    sizes = [len(encode(image)) for image in pixels.values()]
    assert (figures.bytes[0], figures.bytes[-1]) == (min(sizes), max(sizes))
    levels = [image.reshape(-1, 3) / 255 for image in pixels.values()]
    mean = np.mean([each.mean(0) for each in levels], 0)
    variance = np.mean([np.square(each).mean(0) for each in levels], 0) - mean**2
    np.testing.assert_allclose(figures.mean, mean, rtol=1e-9)
    np.testing.assert_allclose(figures.std, np.sqrt(variance), rtol=1e-4)


def test_chosen_images_are_of_every_class():
    labels = np.repeat([0, 1, 2], [100, 5, 1]).astype(np.int32)
    ids = choose(labels, 9)
    assert labels[ids].tolist() == [0] * 4 + [1] * 4 + [2] and len({*ids.tolist()}) == 9
    assert len(choose(labels, 500)) == 106
    assert choose(labels, 9, seed=1).tolist() != ids.tolist()


def test_a_sheet_shows_every_picture_in_its_place():
    red, blue = (np.full((32, 32, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 0, 255)))
    wide = np.full((100, 400, 3), (0, 255, 0), np.uint8)
    sheet = np.asarray(draw("title", [Row([red, blue], "class"), Row([wide], captions=["a" * 200])], ["one", "two"]))
    areas = [(sheet == colour).all(-1).nonzero() for colour in ([255, 0, 0], [0, 0, 255], [0, 255, 0])]
    assert [len(area[0]) for area in areas] == [128 * 128, 128 * 128, 128 * 32]
    assert areas[0][1].max() < areas[1][1].min() and areas[0][0].max() < areas[2][0].min()


@pytest.mark.parametrize("classes", [4, 40])
def test_contact_sheets_of_few_and_of_many_classes(classes, tmp_path):
    split, _ = made(tmp_path, [(16, 16)] * 90, [n % classes for n in range(90)], tuple(map(str, range(classes))))
    sheet = contact_sheet(split)
    rows = 4 if classes == 4 else 8
    assert 128 * rows < sheet.height < 170 * (rows + 1) and 1280 < sheet.width < 1500


@pytest.mark.parametrize("square", [True, False])
@pytest.mark.parametrize("local", [None, {"count": 3, "size": 12, "crop_scale": (0.1, 0.2)}], ids=["global", "local"])
def test_augmented_views_are_those_of_training(square, local, tmp_path):
    sides = [(24, 24)] * 32 if square else [(40 + n, 70 - n) for n in range(32)]
    split, _ = made(tmp_path, sides, [0] * 32, ("noise",))
    settings = {"image_size": 24, "batch_size": 16, "partitions": 1, "augment": {"blur": 0.5}, "local": local}
    data = Data.model_validate({"uri": split.store.uri, **settings})
    plan = make_plan([split], data, seed=3)
    reader = open_batches([split], plan, data, views=2, seed=3, device=torch.device("cpu"), hosts=1)
    epoch, step = 1, 3  # of two steps an epoch
    images, ids = next(iter(reader.iterate(step, step + 1, 0, 1)))[:2]
    assert torch.is_tensor(images) == square
    shown = augmented(split, read_pictures(split, ids.numpy()), data, views=2, epochs=2, seed=3)
    of_epoch = 5 if local else 2
    assert all(len(row) == 2 * of_epoch for row in shown)
    for view in range(of_epoch):
        small = view >= 2
        augment, side = (data.local_augment, 12) if small else (data.augment, 24)
        crops = images if square else images[small][view - 2 * small]
        options = {"config": augment, "size": side, "seed": 3, "epoch": epoch, "view": view}
        seen = random_view(crops, ids, cropped=not square, **options)
        levels = (seen * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)) * 255
        drawn = torch.from_numpy(np.stack([row[of_epoch * epoch + view] for row in shown])).permute(0, 3, 1, 2)
        assert drawn.shape == (16, 3, side, side) and (drawn - levels).abs().max() <= 0.501


# Commands


def run(*arguments):
    return CliRunner().invoke(cli, [str(each) for each in arguments])


@pytest.fixture
def alone(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def test_inspect_prints_figures_and_draws(noise, tmp_path, alone):
    split, _ = noise
    done = run("inspect", split.store.uri, "--out", tmp_path / "sheet.png")
    assert done.exit_code == 0, done.output
    assert "train: 60 images" in done.output and "ant" in done.output and "█" in done.output
    Image.open(tmp_path / "sheet.png").verify()
    row = json.loads(run("inspect", split.store.uri, "--images", 5, "--json").output)
    assert row["surveyed"] == 5 and row["classes"]["bee"] == 27 and row["out"] is None


def test_inspect_draws_the_views_of_a_recipe(noise, tmp_path, alone):
    split, _ = noise
    out = tmp_path / "views.png"
    done = run("inspect", split.store.uri, "--augmented", "cifar10-cpu", "data.image_size=16", "--out", out, "--json")
    assert json.loads(done.output)["out"] == str(out)
    assert Image.open(out).width > 7 * 128
    assert run("inspect", split.store.uri, "--augmented", "--out", out).exit_code == 0
    for arguments, message in (
        (["data.image_size=16"], "add --augmented RECIPE"),
        (["--augmented", "cifar10-cpy"], "unknown recipe 'cifar10-cpy'"),
        (["--augmented", "cifar10-cpu", "data.image_sze=16"], "image_sze"),
        (["--split", "tst"], "has no split 'tst'"),
        (["--out", "/proc/x/y.png"], "cannot be written"),
    ):
        done = run("inspect", split.store.uri, *arguments)
        assert isinstance(done.exception, UserError) and message in str(done.exception)


def test_verify_has_three_exit_codes(noise, alone):
    split, _ = noise
    done = run("verify", split.store.uri)
    assert done.exit_code == 0 and "no faults in 60 train, 1 val" in done.output
    split.store.put(LABELS_NAME, b"")
    done = run("verify", split.store.uri, "--json")
    row = json.loads(done.output)
    assert done.exit_code == 1 and [fault["uri"] for fault in row["faults"]] == [f"{split.store.uri}/{LABELS_NAME}"]
    done = run("verify", split.store.sub("nothing").uri)
    assert isinstance(done.exception, UserError) and "holds no index.json" in str(done.exception)


def test_index_says_what_it_would_do_then_does_it(tmp_path, alone):
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9)).save(buffer, "JPEG")
    files = {f"{n:02d}.{what}": data for n in range(20)
             for what, data in (("jpg", buffer.getvalue()), ("cls", b"%d" % (n // 10)))}  # fmt: skip
    store = Store(tmp_path / "tars")
    store.put("0.tar", tar_of(files))
    done = run("index", store.uri, "--split", "train", "--dry-run")
    assert done.exit_code == 0 and "would be indexed as tars, 20 train" in done.output
    assert "train is sorted by class" in done.output and store.list() == ["0.tar"]
    row = json.loads(run("index", store.uri, "--split", "train", "--json").stdout)
    assert row["samples"] == {"train": 20} and row["fingerprint"] == read_index(store).fingerprint
    assert len(row["warnings"]) == 1
