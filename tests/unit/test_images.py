import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from datasets_prep.images import PIXEL_CAP, VERBATIM, BadImage, ImagePolicy, header_size, prepare
from datasets_prep.sources import png

FULL = ImagePolicy("full")


def smooth(width, height, channels=3):
    x, y = np.meshgrid(np.linspace(0, 2, width), np.linspace(0, 1.5, height))
    planes = [127 + 120 * np.sin(x * (1 + c / 4) + y) for c in range(channels)]
    return np.stack(planes, -1).squeeze().astype(np.uint8)


def saved(image, kind="JPEG", **arguments):
    buffer = io.BytesIO()
    image.save(buffer, kind, **arguments)
    return buffer.getvalue()


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90°
    return saved(Image.fromarray(smooth(60, 40)), exif=exif)


RGB = Image.fromarray(smooth(60, 40))
KEPT = {
    "baseline": saved(RGB),
    "progressive": saved(RGB, progressive=True),
    "grey": saved(RGB.convert("L")),
    "cmyk": saved(RGB.convert("CMYK")),
    "rotated": rotated(),
    "restarts": saved(RGB, restart_marker_rows=1),
    "comment": saved(RGB, comment=b"\xff\xd9" * 100),
    "padded": saved(RGB) + bytes(100),
    "png": saved(RGB, "PNG"),
    "png stored": png.encode(smooth(60, 40)),
    "png alpha": saved(RGB.convert("RGBA"), "PNG"),
    "png palette": saved(RGB.quantize(8), "PNG"),
    "webp": saved(RGB, "WEBP"),
    "webp lossless": saved(RGB, "WEBP", lossless=True),
}


@pytest.mark.parametrize("policy", [VERBATIM, FULL, ImagePolicy(short_side=40)], ids=["header", "full", "small enough"])
@pytest.mark.parametrize("name", KEPT)
def test_bytes_are_kept(name, policy):
    assert prepare(KEPT[name], policy) == (KEPT[name], (60, 40))


@pytest.mark.parametrize("name", [name for name in KEPT if "webp" not in name and name != "padded"])
def test_headers_tell_the_size(name):
    assert header_size(KEPT[name]) == (60, 40)


@pytest.mark.parametrize("policy", [VERBATIM, FULL, ImagePolicy(short_side=20)], ids=["header", "full", "scaled"])
@pytest.mark.parametrize("name", [name for name in KEPT if name != "padded"])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.9])
def test_truncated_images_are_refused(name, policy, share):
    with pytest.raises(BadImage):
        prepare(KEPT[name][: int(share * len(KEPT[name]))], policy)


@pytest.mark.parametrize("policy", [VERBATIM, FULL], ids=["header", "full"])
@pytest.mark.parametrize("data", [b"", b"text", saved(RGB, "GIF"), saved(RGB, "BMP"), b"\xff\xd8\xff\xd9"])
def test_what_is_no_image_is_refused(data, policy):
    with pytest.raises(BadImage, match="no JPEG, PNG or WebP image|."):
        prepare(data, policy)


def test_a_flipped_bit_of_a_png_is_found_without_decoding():
    data = bytearray(KEPT["png"])
    data[len(data) // 2] ^= 1
    assert header_size(bytes(data)) is None
    with pytest.raises(BadImage):
        prepare(bytes(data), VERBATIM)


def _png_of(width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [b"IHDR" + header, b"IDAT" + zlib.compress(bytes(10)), b"IEND"]
    framed = [struct.pack(">I", len(each) - 4) + each + struct.pack(">I", zlib.crc32(each)) for each in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def _jpeg_of(width, height):
    data = bytearray(KEPT["baseline"])
    at = data.index(b"\xff\xc0")
    struct.pack_into(">HH", data, at + 5, height, width)
    return bytes(data)


@pytest.mark.parametrize("policy", [VERBATIM, FULL, ImagePolicy(short_side=20)], ids=["header", "full", "scaled"])
@pytest.mark.parametrize("bomb", [_png_of(60_000, 60_000), _jpeg_of(65_000, 65_000)], ids=["png", "jpeg"])
def test_decompression_bombs_are_refused(bomb, policy):
    with pytest.raises(BadImage, match=f"pixels are more than {PIXEL_CAP:,}"):
        prepare(bomb, policy)


@pytest.mark.parametrize("name", [name for name in KEPT if name not in ("padded", "png palette")])
def test_scaled_images_keep_their_format_and_look(name):
    data, size = prepare(KEPT[name], ImagePolicy(short_side=20))
    before, after = Image.open(io.BytesIO(KEPT[name])), Image.open(io.BytesIO(data))
    assert size == after.size == (30, 20) and after.mode == "RGB" and after.format == before.format
    expected = np.asarray(before.convert("RGB").resize((30, 20), Image.Resampling.BICUBIC), int)
    assert np.abs(np.asarray(after) - expected).mean() < 3
    assert prepare(KEPT[name], ImagePolicy(short_side=20))[0] == data


def test_orientation_is_ignored_both_ways():
    kept, scaled = (
        Image.open(io.BytesIO(prepare(rotated(), each)[0])) for each in (VERBATIM, ImagePolicy(short_side=20))
    )
    assert kept.size == (60, 40) and scaled.size == (30, 20)
    assert ImageOps.exif_transpose(kept).size == (40, 60) and not scaled.getexif()


@pytest.mark.parametrize(
    ("size", "expected"), [((2000, 1500), (341, 256)), ((1500, 2000), (256, 341)), ((257, 3000), (256, 2988))]
)
def test_large_photos_are_scaled_from_reduced_ones_without_loss(size, expected):
    data = saved(Image.fromarray(smooth(*size)), quality=95)
    stored, scaled_size = prepare(data, ImagePolicy(short_side=256, quality=95))
    assert scaled_size == expected
    plain = Image.open(io.BytesIO(data)).convert("RGB").resize(expected, Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(Image.open(io.BytesIO(stored)), int) - np.asarray(plain, int)).mean() < 2


def test_quality_decides_the_size():
    noise = saved(Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 80, 3), np.uint8)))
    low, high = (len(prepare(noise, ImagePolicy(short_side=40, quality=quality))[0]) for quality in (50, 95))
    assert low < 0.6 * high
