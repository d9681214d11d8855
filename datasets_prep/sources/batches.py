"""Pixels of CIFAR's archives: files out of a folder or a tarball, pickled batches without running what they name."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datasets_prep.sources.base import Sample
from datasets_prep.sources.png import encode

DAMAGE = (tarfile.TarError, OSError, EOFError, pickle.UnpicklingError, KeyError, ValueError)


def reader(path: Path, folder: str, archive: str, probe: str) -> Callable[[str], bytes] | None:
    """Return how to read a file by name from `path`, the `folder` in it or its tarball; None where `probe` is not."""
    for place in (path, path / folder):
        if (place / probe).is_file():
            return lambda name: (place / name).read_bytes()
    tarball = path if path.name == archive else path / archive
    if not tarball.is_file():
        return None
    with tarfile.open(tarball, "r:gz") as opened:
        files = {Path(member.name).name: opened.extractfile(member) for member in opened.getmembers()}
        held = {name: file.read() for name, file in files.items() if file is not None}
    return held.__getitem__


def samples(name: str, pixels: NDArray[Any], labels: Any, classes: int, digits: int = 4) -> Iterator[Sample]:
    """Yield (N, 3072) pixels, channels first, as stored PNGs keyed `name/0000` and so on.

    Raises:
        ValueError: counts that differ, or a label that is none of the classes.
    """
    images = np.asarray(pixels, np.uint8).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    if len(images) != len(labels):
        raise ValueError(f"{name} has {len(images)} images and {len(labels)} labels")
    for number, (image, label) in enumerate(zip(images, map(int, labels), strict=True)):
        if not 0 <= label < classes:
            raise ValueError(f"{name} has label {label}, and there are {classes} classes")
        yield Sample(f"{name}/{number:0{digits}d}", "png", label, partial(encode, image))


def unpickle(data: bytes) -> dict[bytes, Any]:
    """Load a batch of arrays, lists and strings; anything else in it raises UnpicklingError."""
    return _BatchUnpickler(io.BytesIO(data), encoding="bytes").load()


class _BatchUnpickler(pickle.Unpickler):
    """Loads arrays, lists and strings; any other name in the file could run code and is refused."""

    _ALLOWED = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("numpy.core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"a batch needs no {module}.{name}") from None
