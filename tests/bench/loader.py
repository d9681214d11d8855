"""224-pixel training batches from local tars: images per CPU-second of the reader's processes, wall time beside.

Everyone cuts one random crop (scale 0.2–1) of each photo, flips half of them and delivers normalised floats, from the
same JPEG bytes with the same number of workers, and the second epoch is measured; ours resizes with antialiasing.
`decode alone` is the full decoding of the same bytes and nothing else.
"""

import argparse
from functools import partial
from pathlib import Path

from tests.bench._contestants import median, rates, ratio, run, shards, written
from tests.bench._report import close

SOURCE = Path("../shared/data/imagenet_photos_200.tar")
OURS, FIRST = "tessera", "webdataset + PIL + torchvision"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=2400)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    tars = shards(SOURCE, options.samples, 16)
    told = ("--workers", options.workers)
    contestants = {
        OURS: partial(run, "tessera", tars, *told),
        "tessera, uint8": partial(run, "tessera", tars, "--uint8", *told),
        FIRST: partial(run, "webdataset_pil", tars, *told),
        "webdataset + simplejpeg + OpenCV": partial(run, "webdataset_turbo", tars, *told),
        "decode alone": partial(run, "decode_alone", tars, *told),
    }
    for name, script in (("mosaicml-streaming", "mosaicml"), ("litdata", "lit")):
        folder = written(script, SOURCE, options.samples)
        if folder is not None:
            contestants[name] = partial(run, script, folder, *told)
    found = rates(contestants, options.repeats)
    close(
        "loader",
        median(found, OURS),
        "images per CPU-second",
        FIRST,
        ratio(found, OURS, FIRST),
        images_per_s=median(found, OURS, 1),
        peer_images_per_s=median(found, FIRST, 1),
        ratio_to_webdataset_simplejpeg=ratio(found, OURS, "webdataset + simplejpeg + OpenCV"),
        ratio_to_mosaicml_streaming=ratio(found, OURS, "mosaicml-streaming"),
        ratio_to_litdata=ratio(found, OURS, "litdata"),
        ratio_to_decoding_alone=ratio(found, OURS, "decode alone"),
        ratio_of_uint8=ratio(found, "tessera, uint8", FIRST),
        ratio_of_uint8_to_decoding_alone=ratio(found, "tessera, uint8", "decode alone"),
        workers=options.workers,
        samples=options.samples,
    )


if __name__ == "__main__":
    main()
