"""Shards of photos and of CIFAR-10 against webdataset.ShardWriter, one process each, from and to local disk.

Our side is whole: every image's header checked, the order permuted, checksums, sidecars, labels and index written.
ShardWriter gets the same images, keys and labels, and shards of the same size. The ratio to `tar cf`, which writes the
photos alone, and what a second process brings to the whole command, are reported beside it. What was written before is
on the disk before each turn.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import webdataset

from datasets_prep.sources import cifar10
from datasets_prep.sources.base import Sample, Source, Span
from datasets_prep.writer import write_dataset
from service.data.store import Store
from tests.bench._report import alternate, close, ratio

DATA = Path(__file__).parents[3] / "shared" / "data"
PHOTOS, MANY, CLASSES, REPEATS, SHARD_MB = 2000, 6000, 10, 7, 64


def unpack(folder, count):
    """The 200 photos as `count` files in ten class folders."""
    with tarfile.open(DATA / "imagenet_photos_200.tar") as archive:
        photos = [archive.extractfile(member).read() for member in archive if member.isfile()]
    for number in range(count):
        path = folder / f"c{number % CLASSES}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photos[number % len(photos)])


def samples(folder):
    files = sorted(folder.rglob("*.jpg"))
    return [Sample(file.stem, "jpg", int(file.parent.name[1:]), Span(str(file))) for file in files]


def ours(all_, out):
    source = Source("bench", tuple("0123456789"), {"test": all_})
    return lambda: write_dataset(source, Store(out / "ours"), shard_mb=SHARD_MB)


def command(folder, out, workers, *options):
    """The whole command; a process of its own, as workers import the module that started them."""
    arguments = ["imagefolder", "--source", folder, "--out", out / "ours", "--workers", str(workers), "--shard-mb", "4"]
    words = [sys.executable, "-m", "jobs.cli", "shard", *arguments, *options]
    return lambda: subprocess.run(words, check=True, capture_output=True)


def peer(all_, out):
    def work():
        (out / "peer").mkdir()
        pattern = str(out / "peer" / "shard-%06d.tar")
        with webdataset.ShardWriter(pattern, maxsize=SHARD_MB << 20, maxcount=len(all_), verbose=0) as writer:
            for sample in all_:
                writer.write({"__key__": sample.key, "jpg": sample.load(), "cls": sample.label})

    return work


def tar(folder, out):
    return lambda: subprocess.run(["tar", "cf", out / "photos.tar", "-C", folder, "."], check=True)


def main():
    with tempfile.TemporaryDirectory(prefix="tessera-bench-") as temporary:
        folder, many, out = (Path(temporary) / name for name in ("photos", "many", "out"))
        unpack(folder, PHOTOS)
        unpack(many, MANY)

        def clean():
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            os.sync()

        def measure(contestants, repeats=REPEATS):
            return alternate(contestants, repeats, before=clean)

        photos, cifar = samples(folder), cifar10.open_source(DATA).splits["train"]
        photo_times = measure({"photos": ours(photos, out), "ShardWriter": peer(photos, out), "tar": tar(folder, out)})
        cifar_times = measure({"CIFAR-10": ours(cifar, out), "ShardWriter": peer(cifar, out)})
        scaled, verbatim = (
            measure({f"{n} processes{title}": command(many, out, n, *words) for n in (1, 2)}, 2)
            for title, words in ((", scaled", ("--short-side", "256")), ("", ()))
        )
    clean_photos = sorted(photo_times["photos"])[REPEATS // 2]
    close(
        "shard_write",
        PHOTOS / clean_photos,
        "photos/s",
        f"webdataset.ShardWriter {webdataset.__version__}",
        ratio(photo_times, "photos", "ShardWriter"),
        cifar_ratio=ratio(cifar_times, "CIFAR-10", "ShardWriter"),
        cifar_per_second=len(cifar) / sorted(cifar_times["CIFAR-10"])[REPEATS // 2],
        ratio_to_tar=ratio(photo_times, "photos", "tar"),
        two_process_ratio=ratio(scaled, "2 processes, scaled", "1 processes, scaled"),
        two_process_verbatim_ratio=ratio(verbatim, "2 processes", "1 processes"),
    )


if __name__ == "__main__":
    sys.exit(main())
