"""webdataset, Pillow and torchvision's transforms, as I-JEPA's code decodes and crops."""

from pathlib import Path

import arguments
import clock
import torch
import webdataset as wds
from torchvision import transforms


def label(x):
    return x


def main():
    options = arguments.parse()
    torch.set_num_threads(1)
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(options.size, scale=(0.2, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(arguments.MEAN, arguments.STD),
        ]
    )
    shards = sorted(map(str, Path(options.folder).glob("train/*.tar")))
    dataset = (
        wds.WebDataset(shards, shardshuffle=100)
        .shuffle(1000)
        .decode("pilrgb")
        .to_tuple("jpg;jpeg;png", "cls")
        .map_tuple(transform, label)
        .batched(options.batch)
    )
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=options.workers)
    clock.read(lambda: (images for images, _ in loader), options.size)


if __name__ == "__main__":
    main()
