"""CIFAR-10 from S3 by a submitted `cifar10-cpu` run, against a plain loop given the same wall time.

Needs the real images beside the checkout (`../shared/data`). The peer is a plain single-process training loop written
for this comparison, and a strong one: a 1.2 M-parameter ResNet-10 (32 to 256 channels at full resolution), images in
memory, this project's whole-batch views, bf16 and channels-last on all cores, AdamW, cosine over the time it is given.
Both encoders are scored by the same linear probe and k-NN on the same files.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from tests.bench._report import close

SOURCE = Path("../shared/data")
PEER = "plain single-process loop, 1.2 M ResNet-10, whole-batch views, bf16 (re-implemented), same wall time"
BATCH = 256


def tessera(*arguments):
    done = subprocess.run([sys.executable, "-m", "jobs.cli", *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def submitted(scratch):
    """Result of the recipe, read from the stack's S3 server; the decoded data set is kept for the peer."""
    os.environ["XDG_STATE_HOME"], os.environ["TESSERA_CACHE"] = f"{scratch}/state", f"{scratch}/cache"
    tessera("up", "--data", f"{scratch}/stack", "--s3")
    try:
        tessera("shard", "cifar10", "--source", str(SOURCE), "--out", "s3://data/cifar10")
        out = tessera("submit", "cifar10-cpu", "data.uri=s3://data/cifar10", "--json")
        return json.loads(out.splitlines()[-1])
    finally:
        tessera("down")


def block(inputs, outputs, stride):
    from torchvision.models.resnet import BasicBlock, conv1x1

    shortcut = torch.nn.Sequential(conv1x1(inputs, outputs, stride), torch.nn.BatchNorm2d(outputs))
    return BasicBlock(inputs, outputs, stride, None if inputs == outputs else shortcut)


def plain_loop(images, seconds):
    """Train for so many seconds; returns the encoder and the epochs it saw."""
    from service.config import Augment
    from service.data.augment import random_view

    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    images = torch.from_numpy(images)
    stem = [torch.nn.Conv2d(3, 32, 3, 1, 1, bias=False), torch.nn.BatchNorm2d(32), torch.nn.ReLU()]
    stages = [block(32, 32, 1), block(32, 64, 2), block(64, 128, 2), block(128, 256, 2)]
    encoder = torch.nn.Sequential(*stem, *stages, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    head = [torch.nn.Linear(256, 1024), torch.nn.BatchNorm1d(1024), torch.nn.ReLU(), torch.nn.Linear(1024, 1024)]
    model = torch.nn.Sequential(encoder, *head).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), 1.5e-3, weight_decay=0.05, fused=True)
    start, steps = time.monotonic(), 0
    while True:
        for ids in torch.randperm(len(images)).split(BATCH)[:-1]:
            share = (time.monotonic() - start) / seconds
            if share >= 1:
                return encoder, steps * BATCH / len(images)
            rate = 1.5e-3 * min(1.0, share / 0.1) * 0.5 * (1 + np.cos(np.pi * max(0.0, share - 0.1) / 0.9))
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            drawn = {"config": Augment(), "size": 32, "seed": 0, "epoch": steps}
            views = torch.cat([random_view(images[ids], ids, view=view, **drawn) for view in range(2)])
            with torch.autocast("cpu", torch.bfloat16):
                embedded = model(views.contiguous(memory_format=torch.channels_last))
            z1, z2 = embedded.float().chunk(2)
            loss = (z1 - z2).square().mean()
            for z in (z1, z2):
                centred = z - z.mean(0)
                covariance = centred.T @ centred / (len(z) - 1)
                off = (covariance.square().sum() - covariance.diagonal().square().sum()) / (1024 * 1023)
                loss = loss + torch.relu(1 - torch.sqrt(z.var(0) + 1e-4)).mean() + 80 * off
            loss.backward()
            optimizer.step()
            steps += 1


@torch.inference_mode()
def features(encoder, images):
    from service.data.augment import resize_normalise

    encoder.eval()
    parts = [encoder(resize_normalise(torch.from_numpy(images[i : i + 500]), 32)) for i in range(0, len(images), 500)]
    return torch.cat(parts)


def main():
    from jobs import recipes
    from service.data.resident import load_images
    from service.data.split import DataSplit, read_index
    from service.data.store import Store
    from service.evaluate.report import evaluate_features, percentages

    if not SOURCE.is_dir():
        sys.exit(f"this benchmark needs the real CIFAR-10 images in {SOURCE}")
    with tempfile.TemporaryDirectory() as scratch:
        ours = submitted(scratch)
        print(json.dumps(ours), file=sys.stderr)
        from jobs.shard import shard

        shard("cifar10", f"{scratch}/local", SOURCE)
        store = Store(f"{scratch}/local")
        index = read_index(store)
        splits = [DataSplit(store, index, name) for name in ("train", "test")]
        images = [np.array(load_images(split, 32, 2).images) for split in splits]
        labels = [torch.from_numpy(split.labels.astype(np.int64)) for split in splits]
    encoder, epochs = plain_loop(images[0], ours["train_seconds"])
    x, queries = (features(encoder, part) for part in images)
    options = recipes.load("cifar10-cpu").eval
    scores = percentages(
        evaluate_features(
            x, labels[0], queries, labels[1],
            classes=10, c=options.probe_c, k=options.knn_k, temperature=options.knn_temperature,
            labels_per_class=(), draws=2, seed=0,
        )
    )  # fmt: skip
    linear = ours["scores"]["trained"]["all"]
    close(
        "cifar10_cpu",
        linear,
        "% linear probe",
        PEER,
        linear / scores["all"],
        knn=ours["scores"]["trained"]["knn"],
        train_seconds=ours["train_seconds"],
        peer_linear=scores["all"],
        peer_knn=scores["knn"],
        peer_epochs=epochs,
        points_ahead=linear - scores["all"],
        baselines={name: ours["scores"][name] for name in ("raw_pixels", "random_encoder")},
    )


if __name__ == "__main__":
    main()
