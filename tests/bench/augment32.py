"""Two views of a batch of 32-pixel images on the CPU, two threads: ours, torchvision on Pillow images, kornia."""

import argparse
import json
import statistics
import subprocess

import torch

from service.config import Augment
from service.data.augment import random_view
from tests.bench._contestants import SCRIPTS, environment, say
from tests.bench._report import alternate, close, ratio
from tests.bench.image_step import published_view

PEER = "torchvision's transforms on Pillow images"
THREADS = 2


def kornia(batch, repeats):
    """Seconds of kornia's repeats, or None."""
    python = environment("kornia_views")
    if python is None:
        return None
    command = [python, str(SCRIPTS / "kornia_views.py"), *map(str, (batch, repeats, THREADS))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        say(f"kornia failed and is left out: {done.stderr.strip()[-400:]}")
        return None
    return json.loads(done.stdout.splitlines()[-1])["seconds"]


def main():
    from PIL import Image

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    images = torch.randint(0, 256, (options.batch, 3, 32, 32), dtype=torch.uint8)
    ids = torch.arange(options.batch)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    view = published_view()
    drawn = {"config": Augment(), "size": 32, "seed": 0, "epoch": 0}
    contestants = {
        "tessera": lambda: [random_view(images, ids, view=v, **drawn) for v in range(2)],
        PEER: lambda: [torch.stack([view(picture) for picture in pictures]) for _ in range(2)],
    }
    times = alternate(contestants, options.repeats)
    ours, theirs = statistics.median(times["tessera"]), kornia(options.batch, options.repeats)
    close(
        "augment32",
        2 * options.batch / ours,
        "views/s",
        PEER,
        ratio(times, "tessera", PEER),
        ratio_to_kornia=theirs and statistics.median(theirs) / ours,
        batch=options.batch,
    )


if __name__ == "__main__":
    main()
