"""`rapid` and `fast` on one GPU for a bounded time, without Ray and MLflow: seconds an epoch, images/s, memory, probe.

    python -m tests.bench.gpu_image [RECIPE…] [--minutes M] [--data FOLDER] [key=value …]

Needs torch, numpy, pydantic, PyYAML and Pillow; CIFAR-10 as ImageFolder tarballs or an .npz of the decoded splits.
The peer is the guide's claim for one RTX 4090: 3,800 images/s.
"""

import argparse
import io
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from jobs import recipes
from service.config import canonical_partitions
from service.data.augment import resize_normalise
from service.data.plan import SamplePlan
from service.data.resident import ResidentBatches
from service.engine.parallel import place
from service.engine.trainer import Length, Trainer
from service.engine.worker import start_worker
from service.evaluate import knn, linear_probe
from service.families import build_family
from tests.bench._report import close

CLAIMED = 3800.0


def read_tarball(path):
    """Images (N, 3, 32, 32) uint8 and labels (N,) of an ImageFolder tarball, classes in alphabetical order."""
    images, names = [], []
    with tarfile.open(path) as tar:
        for member in tar:
            if member.isfile():
                images.append(np.asarray(Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB")))
                names.append(Path(member.name).parent.name)
    labels = np.unique(names, return_inverse=True)[1]
    return np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2)), torch.from_numpy(labels)


@torch.inference_mode()
def features(trainer, images):
    encoder, precision = trainer.evaluated, trainer.config.compute.precision
    encoder.eval()
    parts = []
    for first in range(0, len(images), 2000):
        x = resize_normalise(torch.from_numpy(images[first : first + 2000]).to(trainer.worker.device), 32)
        with trainer.worker.autocast(precision):
            parts.append(encoder(x.contiguous(memory_format=torch.channels_last)).float())
    trainer.family.train()
    return torch.cat(parts)


def probe(trainer, train, test):
    (x, y), (queries, truth) = (
        (features(trainer, images), labels.to(trainer.worker.device)) for images, labels in (train, test)
    )
    a, b = linear_probe.standardise(x, queries)
    fitted = linear_probe.fit(a, y, 10, trainer.config.eval.probe_c)
    linear = float(linear_probe.accuracy(fitted, b, truth)[0])
    return linear, knn.accuracy(x, y, queries, truth, classes=10, k=20, temperature=0.07)[0]


def run(name, overrides, minutes, train, test):
    config = recipes.load(name, ["data.uri=none", *overrides])
    worker = start_worker(config.compute)
    data = config.data
    plan = SamplePlan(
        (len(train[0]),),
        data.batch_size,
        canonical_partitions(data.partitions, data.batch_size),
        data.window or 4096,
        config.seed,
    )
    batches = ResidentBatches(train[0], plan, worker.device)
    torch.manual_seed(config.seed)
    family = place(build_family(config), worker, config.compute, config.parallel)
    length = Length.of(config, plan.steps_per_epoch)
    trainer = Trainer(config, worker, family, length)
    every = max(1, length.total // plan.steps_per_epoch // 10) * plan.steps_per_epoch
    began, spent, done, curve = time.monotonic(), 0.0, 0, []
    for step, (images, ids) in enumerate(batches.iterate(0, length.total, 0, 1)):
        losses = trainer.step(step, images, ids)
        done = step + 1
        if done % every and done != length.total and spent + time.monotonic() - began < minutes * 60:
            continue
        if worker.device.type == "cuda":
            torch.cuda.synchronize()
        spent += time.monotonic() - began
        linear, neighbours = probe(trainer, train, test)
        epoch = done / plan.steps_per_epoch
        curve.append({"epoch": round(epoch, 1), "seconds": round(spent, 1), "linear": linear, "knn": neighbours})
        print(f"{name} {curve[-1]} loss {losses.total.item():.4f}", file=sys.stderr, flush=True)
        if spent > minutes * 60:
            break
        began = time.monotonic()
    rate = done * data.batch_size / spent
    memory = torch.cuda.max_memory_allocated() / 2**30 if worker.device.type == "cuda" else 0.0
    seconds = spent / (done / plan.steps_per_epoch)
    close(
        f"gpu_image {name}", rate, "images/s", "claimed: rapid on one RTX 4090, 3,800 images/s", rate / CLAIMED,
        seconds_per_epoch=seconds, peak_gib=memory, curve=curve,
    )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="recipes and key=value overrides")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    options = parser.parse_args()
    train, test = (read_tarball(options.data / f"cifar10_{split}.tar.gz") for split in ("train", "test"))
    overrides = [word for word in options.words if "=" in word]
    for name in [word for word in options.words if "=" not in word] or ["rapid", "fast"]:
        run(name, overrides, options.minutes, train, test)


if __name__ == "__main__":
    main()
