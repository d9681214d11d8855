"""simplejpeg's full decoding of the same bytes, held in memory, by as many threads as the readers have workers."""

import json
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import arguments
import clock
import simplejpeg


def decode(data):
    simplejpeg.decode_jpeg(data, colorspace="RGB")


def main():
    options = arguments.parse()
    photos = []
    for shard in sorted(Path(options.folder).glob("train/*.tar")):
        with tarfile.open(shard) as tar:
            photos += [tar.extractfile(member).read() for member in tar if not member.name.endswith(".cls")]
    with ThreadPoolExecutor(options.workers) as pool:
        list(pool.map(decode, photos))
        cpu, wall = clock.cpu_seconds(), time.perf_counter()
        list(pool.map(decode, photos))
    cpu, wall = clock.cpu_seconds() - cpu, time.perf_counter() - wall
    print(json.dumps({"images": len(photos), "cpu_s": cpu, "wall_s": wall}))


if __name__ == "__main__":
    main()
