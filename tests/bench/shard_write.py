"""Shards of photos and of CIFAR-10 against webdataset.ShardWriter, one process each, from and to local disk.

Our side is whole: every image's header checked, the order permuted, checksums, sidecars, labels and index written.
ShardWriter gets the same images, keys and labels, and shards of the same size. The ratio to `tar cf`, which writes the
photos alone, and what a second process brings, are reported beside it.
"""

import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import webdataset

from datasets_prep.images import ImagePolicy
from datasets_prep.sources import cifar10
from datasets_prep.sources.base import Sample, Source, Span
from datasets_prep.writer import write_dataset
from service.data.store import Store
from tests.bench._report import alternate, close, ratio

DATA = Path(__file__).parents[3] / "shared" / "data"
PHOTOS, REPEATED, REPEATS, SHARD_MB = 2000, 6, 5, 64


def unpack(folder):
    """The 200 photos as 2,000 files."""
    with tarfile.open(DATA / "imagenet_photos_200.tar") as archive:
        photos = [archive.extractfile(member).read() for member in archive if member.isfile()]
    for number in range(PHOTOS):
        (folder / f"{number:06d}.jpg").write_bytes(photos[number % len(photos)])


def samples(folder, repeated=1):
    files = sorted(folder.glob("*.jpg"))
    return [
        Sample(f"{number}/{file.stem}", "jpg", position % 10, Span(str(file)))
        for number in range(repeated)
        for position, file in enumerate(files)
    ]


def ours(all_, out, **arguments):
    source = Source("bench", tuple("0123456789"), {"test": all_})
    return lambda: write_dataset(source, Store(out / "ours"), shard_mb=SHARD_MB, **arguments)


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
        folder, out = Path(temporary) / "photos", Path(temporary) / "out"
        folder.mkdir()
        unpack(folder)

        def clean():
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()

        def measure(contestants, repeats=REPEATS):
            return alternate(contestants, repeats, before=clean)

        photos, cifar = samples(folder), cifar10.open_source(DATA).splits["train"]
        photo_times = measure({"photos": ours(photos, out), "ShardWriter": peer(photos, out), "tar": tar(folder, out)})
        cifar_times = measure({"CIFAR-10": ours(cifar, out), "ShardWriter": peer(cifar, out)})
        many, scaled = samples(folder, REPEATED), ImagePolicy(short_side=256)
        process_times = measure({f"{n} processes": ours(many, out, workers=n) for n in (1, 2)}, 3)
        scaled_times = measure({f"{n} scale": ours(photos, out, workers=n, images=scaled) for n in (1, 2)}, 3)
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
        two_process_ratio=ratio(scaled_times, "2 scale", "1 scale"),
        two_process_verbatim_ratio=ratio(process_times, "2 processes", "1 processes"),
    )


if __name__ == "__main__":
    sys.exit(main())
