"""Private memory of a reader over epochs, and the plan of a data set of ImageNet-22k's size.

The ratio is the last quarter's mean over the first's, after an epoch to warm up; mapped shards are the page cache's,
so only memory that is the process's own is counted.
"""

import argparse
import statistics
import time
import tracemalloc

import psutil

from service.data.dataset import ShardDataset
from service.data.plan import SamplePlan
from tests.bench._contestants import say, shards
from tests.bench._report import close
from tests.bench.loader import SOURCE

SAMPLES, SHARDS = 14_000_000, 15_000


def private_mb():
    memory = psutil.Process().memory_info()
    return (memory.rss - memory.shared) / 1e6


def read(folder, epochs):
    """MB after each batch of `epochs` epochs."""
    dataset = ShardDataset(str(folder), batch_size=64, image_size=224, views=2, workers=2)
    series = []
    for epoch in range(1 + epochs):
        for _ in dataset:
            series += [private_mb()] * bool(epoch)
    return series


def plan():
    """Seconds and peak MB of making the plan, and one batch of one rank of eight."""
    tracemalloc.start()
    start = time.perf_counter()
    even = SAMPLES // SHARDS
    counts = (even + SAMPLES - even * SHARDS, *[even] * (SHARDS - 1))
    SamplePlan(counts, 4096, 64, 1000, 0).batch(0, 0, 8)
    return time.perf_counter() - start, tracemalloc.get_traced_memory()[1] / 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=2400)
    parser.add_argument("--epochs", type=int, default=16)
    options = parser.parse_args()
    seconds, megabytes = plan()
    series = read(shards(SOURCE, options.samples, 4), options.epochs)
    quarter = len(series) // 4
    first, last = statistics.mean(series[:quarter]), statistics.mean(series[-quarter:])
    say("MB: " + " ".join(f"{mb:.0f}" for mb in series[:: max(1, len(series) // 40)]))
    close(
        "reader_memory",
        last,
        "MB",
        "the first quarter of the same epochs",
        last / first,
        plan_samples=SAMPLES,
        plan_shards=SHARDS,
        plan_seconds=seconds,
        plan_peak_mb=megabytes,
    )


if __name__ == "__main__":
    main()
