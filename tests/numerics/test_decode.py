"""Crops for views against Pillow's antialiased crops of the whole image, and images that are refused or converted."""

import io
import struct
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image

from service.data import decode


@pytest.fixture(scope="module")
def photos(shared_data):
    """JPEGs of 40 ImageNet photos, some grey."""
    with tarfile.open(shared_data / "imagenet_photos_200.tar") as tar:
        members = [member for member in tar if member.name.lower().endswith(".jpeg")][::5]
        return [tar.extractfile(member).read() for member in members]


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def smooth(mode="RGB", size=(64, 48)):
    ramp = Image.linear_gradient("L").resize(size)
    return Image.merge("RGB", [ramp, ramp.rotate(180), ramp]).convert(mode)


def boxes_of(data, rng, at_least, multiple):
    """Two random boxes with sides of at least `at_least`, whose edges are multiples of `multiple`."""
    shape = decode.image_size(data)
    found = []
    for _ in range(2):
        sides = [int(rng.integers(at_least, side + 1)) // multiple * multiple for side in shape]
        found.append(
            [int(rng.integers(0, a - b + 1)) // multiple * multiple for a, b in zip(shape, sides, strict=True)] + sides
        )
    return np.array(found)


def pillow_crops(data, boxes, size):
    image = Image.open(io.BytesIO(data)).convert("RGB")
    cut = [image.crop((left, top, left + width, top + height)) for top, left, height, width in boxes.tolist()]
    return np.stack([np.asarray(each.resize((size, size), Image.Resampling.BILINEAR)) for each in cut])


@pytest.mark.parametrize(
    "scale, at_least, size, mean, worst",
    [(1, 0.5, 224, 0.1, 1), (2, 1.5, 64, 1.1, 32), (4, 1.5, 40, 1.2, 32), (8, 1.5, 20, 1.4, 32)],
)
def test_crops_equal_pillows_antialiased_ones(photos, scale, at_least, size, mean, worst):
    rng = np.random.default_rng(scale)
    shortest = int(at_least * scale * size)
    large = [data for data in photos if min(decode.image_size(data)) >= shortest]
    means, maxima = [], []
    for data in large:
        boxes = boxes_of(data, rng, shortest, scale)
        boxes[0, 2:] = shortest // scale * scale  # so that no larger scale will do
        apart = np.abs(decode.decode_crops(data, (boxes, size))[0].astype(int) - pillow_crops(data, boxes, size))
        means.append(apart.mean())
        maxima.append(apart.max())
    assert len(large) > 20
    assert np.mean(means) < mean
    assert max(maxima) <= worst


def test_edges_between_scaled_pixels_are_rounded_and_stay_inside(photos):
    data = next(data for data in photos if min(decode.image_size(data)) % 2)
    height, width = decode.image_size(data)
    boxes = np.array([[0, 0, height, width], [3, 5, height - 3, width - 5], [1, 1, 97, 97]])
    [crops] = decode.decode_crops(data, (boxes, 32))
    apart = np.abs(crops.astype(int) - pillow_crops(data, boxes, 32))
    assert crops.shape == (3, 32, 32, 3)
    assert apart.mean() < 3  # half a pixel of the image's half size


@pytest.mark.parametrize(
    "mode, kind", [("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG"), ("RGBA", "PNG"), ("RGB", "WEBP")]
)
def test_every_mode_becomes_rgb(mode, kind):
    data = encoded(smooth(mode), kind)
    whole = np.array([[0, 0, 48, 64]])
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert decode.image_size(data) == (48, 64)
    np.testing.assert_allclose(decode.decode_rgb(data).astype(int), expected, atol=3)
    np.testing.assert_allclose(
        decode.decode_crops(data, (whole, 48))[0].astype(int), pillow_crops(data, whole, 48), atol=3
    )


def test_orientation_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    data = encoded(smooth(), "JPEG", exif=exif, quality=95)
    assert decode.image_size(data) == (48, 64)
    assert decode.decode_rgb(data).shape == (48, 64, 3)


def png_that_promises(width, height):
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def jpeg_that_promises(width, height):
    data = bytearray(encoded(smooth(), "JPEG"))
    start = data.index(b"\xff\xc0") + 5
    data[start : start + 4] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize(
    "bomb", [png_that_promises(15000, 14000), png_that_promises(60000, 60000), jpeg_that_promises(60000, 60000)]
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused_by_its_header(bomb):
    for read in (decode.image_size, decode.decode_rgb):
        with pytest.raises(ValueError, match=r"promises .*(×|more than ).* above the cap of 178956970"):
            read(bomb)


@pytest.mark.parametrize("broken", [b"", b"\xff\xd8", b"no image", b"\x80\x04\x95pickle", "cut"])
def test_what_is_no_whole_image_is_a_value_error(broken, photos):
    data = photos[0][:5000] if broken == "cut" else broken
    with pytest.raises(ValueError):
        decode.decode_rgb(data)
    with pytest.raises(ValueError):
        decode.decode_crops(data, (np.array([[0, 0, 32, 32]]), 32))
