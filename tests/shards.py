"""Data sets for tests by tarfile and numpy alone: any number of shards, and images that show their id."""

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from datasets_prep.index import INDEX_NAME, LABELS_NAME, Index, Shard, SizeQuantiles, Split, sidecar_dtype

CLASSES = 7


def picture(id_: int, *, sizes: bool = True) -> bytes:
    """A JPEG or PNG of one colour, by which `shown_id` knows it; of many sizes, or all 24×24."""
    width, height = (24 + 9 * id_ % 50, 24 + 5 * id_ % 40) if sizes else (24, 24)
    colour = (id_ % 8 * 32 + 16, id_ // 8 % 8 * 32 + 16, id_ // 64 % 8 * 32 + 16)
    data = io.BytesIO()
    image = Image.new("RGB", (width, height), colour)
    image.save(data, "PNG") if id_ % 3 == 0 else image.save(data, "JPEG", quality=95, subsampling=0)
    return data.getvalue()


def shown_id(pixels) -> int:
    """Id of the picture that (3, S, S) uint8 pixels were cut from."""
    r, g, b = (int(c) // 32 for c in np.asarray(pixels).reshape(3, -1).mean(1).round())
    return r + 8 * g + 64 * b


def label(id_: int) -> int:
    return id_ % CLASSES


def write(folder: Path, splits: dict[str, list[int]], *, sizes: bool = True, bad: tuple[int, ...] = ()) -> Path:
    """Write splits of shards with so many samples each; in a split ids count from 0, `bad` ones are no images."""
    rows, labels = {}, []
    for name, per_shard in splits.items():
        first, shards = 0, []
        for number, count in enumerate(per_shard):
            ids = range(first, first + count)
            contents = [b"no image" if i in bad else picture(i, sizes=sizes) for i in ids]
            shards.append(_shard(folder, f"{name}/shard-{number:06d}", ids, contents))
            labels += [label(i) for i in ids]
            first += count
        rows[name] = Split(fields=("jpg",), shards=tuple(shards))
    array = _npy(np.array(labels, np.int32))
    (folder / LABELS_NAME).write_bytes(array)
    side = SizeQuantiles(min=(24, 24), median=(40, 40) if sizes else (24, 24), max=(73, 63) if sizes else (24, 24))
    names = tuple(f"class {i}" for i in range(CLASSES))
    sha256 = hashlib.sha256(array).hexdigest()
    index = Index(name="colours", classes=names, image_size=side, labels_sha256=sha256, splits=rows)
    (folder / INDEX_NAME).write_bytes(index.to_json())
    return folder


def _shard(folder: Path, stem: str, ids: range, contents: list[bytes]) -> Shard:
    tar_data, rows = io.BytesIO(), np.zeros(len(ids), sidecar_dtype(6, 1))
    with tarfile.open(fileobj=tar_data, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for row, id_, content in zip(rows, ids, contents, strict=True):
            info = tarfile.TarInfo(f"{id_:06d}.jpg")
            info.size = len(content)
            row["key"], row["offset"], row["size"] = f"{id_:06d}".encode(), tar.offset + 512, len(content)
            tar.addfile(info, io.BytesIO(content))
    tar_bytes, sidecar = tar_data.getvalue(), _npy(rows)
    (folder / stem).parent.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.tar").write_bytes(tar_bytes)
    (folder / f"{stem}.npy").write_bytes(sidecar)
    checksums = (hashlib.sha256(data).hexdigest() for data in (tar_bytes, sidecar))
    return Shard(
        name=f"{stem}.tar",
        samples=len(ids),
        bytes=len(tar_bytes),
        sha256=next(checksums),
        sidecar_sha256=next(checksums),
    )


def _npy(array: np.ndarray) -> bytes:
    data = io.BytesIO()
    np.save(data, array)
    return data.getvalue()
