"""The families on CIFAR-10: a linear probe and k-NN of each, of raw pixels and of the random encoder, over three seeds.

Needs the real images beside the checkout (`../shared/data`). Each run has one thread and some four minutes of
training; as many run at once as there are cores. All train a ViT of width 192, 4 blocks and patch 4 on batches of 64.
The peer of each is its own encoder before the first step. Intervals are Student's over the seeds. Results are kept in
the cache by settings and code, so that a benchmark that was stopped goes on.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.bench._contestants import CACHE
from tests.bench._report import close

SOURCE = Path("../shared/data")
SEEDS = (0, 1, 2)
STUDENT = 4.303  # two-sided 95 % quantile of t with 2 degrees of freedom
VIT = "family.encoder={kind: vit, size: tiny, patch_size: 4, depth: 4, positions: sincos}"
VIEWS = [VIT, "schedule.epochs=0.8", "schedule.warmup_epochs=0.2"]
METHODS = {
    "image_vicreg": ["cifar10-cpu", *VIEWS],
    "sigreg": ["cifar10-cpu", *VIEWS, "family.loss={kind: sigreg, variant: bcs}"],
    "ijepa": ["ijepa-minutes", "schedule.epochs=0.9"],
    "hjepa": ["hjepa-minutes", "schedule.epochs=0.9"],
}
SHARED = ["data.batch_size=64", "compute.threads=1", "compute.precision=bf16", "eval.labels_per_class=[]"]


def train_one(method: str, seed: str, data: str) -> None:
    """Print the result of one run as a JSON line."""
    from jobs import package, recipes
    from service.data.store import Store
    from service.engine.loop import Run, train

    recipe, *settings = METHODS[method]
    config = recipes.load(recipe, [f"data.uri={data}", f"seed={seed}", *SHARED, *settings])
    name = package.run_name(config, "cifar10", package.code_hash())
    kept = CACHE / "families" / f"{name}.json"
    if not kept.exists():
        with tempfile.TemporaryDirectory() as scratch:
            found = train(config, Run(Store(scratch)))
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(found))
    print(kept.read_text())


def result(method: str, seed: int, data: str) -> dict:
    """Result of one run in a process of its own."""
    command = [sys.executable, "-m", "tests.bench.cifar10_families", method, str(seed), data]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    linear = {name: scores["all"] for name, scores in found["scores"].items()}
    print(f"{method} seed {seed}: {linear}, {found['train_seconds']:.0f} s", file=sys.stderr)
    return found


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval."""
    return statistics.mean(values), STUDENT * statistics.stdev(values) / math.sqrt(len(values))


def show(values: list[float]) -> str:
    return "{:6.2f} ± {:.2f}".format(*interval(values))


def main() -> None:
    from jobs.shard import shard

    if not SOURCE.is_dir():
        sys.exit(f"this benchmark needs the real CIFAR-10 images in {SOURCE}")
    with tempfile.TemporaryDirectory() as data, ThreadPoolExecutor(os.cpu_count()) as pool:
        os.environ["TESSERA_CACHE"] = f"{data}/cache"
        shard("cifar10", f"{data}/shards", SOURCE, say=lambda line: None)
        pending = {(m, s): pool.submit(result, m, s, f"{data}/shards") for s in SEEDS for m in METHODS}
        found = {key: future.result() for key, future in pending.items()}
    gains: dict[str, list[float]] = {}
    for method in METHODS:
        runs = [found[method, seed] for seed in SEEDS]
        for name in runs[0]["scores"]:
            linear, knn = ([run["scores"][name][column] for run in runs] for column in ("all", "knn"))
            random = [run["scores"]["random_encoder"]["all"] for run in runs]
            over = [a - b for a, b in zip(linear, random, strict=True)]
            gains[f"{method}/{name}"] = over
            row = f"{method:<13} {name:<16} linear {show(linear)}  k-NN {show(knn)}"
            rank = statistics.mean(run["quality"][name]["rankme"] for run in runs)
            print(f"{row}  over random {show(over)}  RankMe {rank:.0f}", file=sys.stderr)
    levels = [b - a for a, b in zip(gains["hjepa/level1"], gains["hjepa/level2"], strict=True)]
    means = {name: interval(values) for name, values in gains.items()}
    trained = statistics.mean(run["scores"]["trained"]["all"] for run in (found["ijepa", seed] for seed in SEEDS))
    close(
        "cifar10_families",
        trained,
        "% linear probe, I-JEPA",
        "its own encoder at random weights",
        trained / (trained - means["ijepa/trained"][0]),
        points_over_random=means,
        level2_over_level1=interval(levels),
        train_seconds={method: found[method, 0]["train_seconds"] for method in METHODS},
    )


if __name__ == "__main__":
    train_one(*sys.argv[1:]) if len(sys.argv) > 1 else main()
