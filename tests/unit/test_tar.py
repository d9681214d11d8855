import io
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets_prep.errors import UserError
from datasets_prep.tar import TarBuilder, headers, tar_bytes

NAMES = [
    "a.jpg",
    "ü" * 40 + ".png",
    "\udcff.jpg",
    "x" * 96 + ".jpg",
    "x" * 155 + "/" + "y" * 100,
    "d" * 60 + "/" + "e" * 60 + "/" + "f" * 60 + ".cls",
    "x/" * 50 + "y.jpg",
    "x/" * 100 + "y.jpg",
]


@pytest.mark.parametrize("size", [0, 1, 511, 123_456_789, 8**11 - 1])
def test_headers_are_those_of_tarfile(size):
    rows = headers(NAMES, np.full(len(NAMES), size))
    for name, row in zip(NAMES, rows, strict=True):
        info = tarfile.TarInfo(name)
        info.size = size
        assert row.tobytes() == info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape")


@pytest.mark.parametrize("name", ["x" * 101, "x" * 156 + "/y", "x/" + "y" * 101, "x" * 300])
def test_names_that_fit_no_header(name):
    with pytest.raises(ValueError):
        tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT)
    with pytest.raises(UserError, match="name is too long for a tar"):
        headers(["short", name], np.zeros(2, np.int64))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.tuples(st.binary(max_size=1500), st.binary(max_size=3)), min_size=1), min_size=1))
def test_archives_are_read_by_tarfile_and_by_their_sidecars(archives):
    builder = TarBuilder()
    builder.add("left over", (b"by an exception",))
    for samples in archives:
        builder.clear()
        for number, contents in enumerate(samples):
            builder.add(f"k/{number}", contents)
        tar, sidecar = builder.finish(("bin", "cls"))
        assert len(tar) == tar_bytes(len(each) for contents in samples for each in contents) + 1024
        with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
            read = {member.name: archive.extractfile(member).read() for member in archive}
        assert read == {
            f"k/{n}.{f}": c for n, row in enumerate(samples) for f, c in zip(("bin", "cls"), row, strict=True)
        }
        for row, contents in zip(np.load(io.BytesIO(sidecar)), samples, strict=True):
            assert tuple(bytes(tar[a : a + s]) for a, s in zip(row["offset"], row["size"], strict=True)) == contents
