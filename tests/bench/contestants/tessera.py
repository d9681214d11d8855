"""This project's reader: crops in the decoding threads; flip and normalisation as the training loop does them."""

import json
import os
import sys

import arguments
import clock
import torch

sys.path.insert(0, os.getcwd())
from service.config import Augment
from service.data.augment import random_view
from service.data.dataset import ShardDataset

FLIP_ONLY = Augment(crop_scale=(0.2, 1.0), flip=0.5, jitter=0.0, grey=0.0, solarize=0.0)


def floats(dataset, size, ids):
    for batch in dataset:
        ids.extend(batch.ids.tolist())
        yield random_view(
            batch.images[0], batch.ids, config=FLIP_ONLY, size=size, seed=0, epoch=dataset.epoch, view=0, cropped=True
        )


def main():
    options = arguments.parse("--uint8", "--exactly-once", "--cold")
    torch.set_num_threads(1)
    dataset = ShardDataset(
        options.folder, batch_size=options.batch, image_size=options.size, workers=options.workers, augment=FLIP_ONLY
    )
    ids = []

    def epoch():
        ids.clear()
        return (batch.images[0] for batch in dataset) if options.uint8 else floats(dataset, options.size, ids)

    clock.read(epoch, options.size, warm=not options.cold)
    if options.exactly_once:
        whole = len(dataset) * options.batch
        print(json.dumps({"lost": whole - len(set(ids)), "repeated": len(ids) - len(set(ids))}))


if __name__ == "__main__":
    main()
