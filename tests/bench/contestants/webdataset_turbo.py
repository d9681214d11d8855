"""webdataset with simplejpeg and OpenCV's linear resizing, which is quick and not antialiased."""

from pathlib import Path

import arguments
import clock
import cv2
import simplejpeg
import torch
import webdataset as wds
from torchvision import transforms
from torchvision.transforms import functional


def turbo(key, data):
    if key.rsplit(".", 1)[-1] in ("jpg", "jpeg", "png"):
        return simplejpeg.decode_jpeg(data, colorspace="RGB")
    return None


class Transform:
    def __init__(self, size):
        self.size = size
        self.normalise = transforms.Normalize(arguments.MEAN, arguments.STD, inplace=True)

    def __call__(self, pixels):
        height, width = pixels.shape[:2]
        shape = torch.empty(0, height, width)
        top, left, h, w = transforms.RandomResizedCrop.get_params(shape, (0.2, 1.0), (3 / 4, 4 / 3))
        crop = cv2.resize(pixels[top : top + h, left : left + w], (self.size, self.size))
        if torch.rand(()) < 0.5:
            crop = cv2.flip(crop, 1)
        return self.normalise(functional.to_tensor(crop))


def label(x):
    return x


def main():
    options = arguments.parse()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    shards = sorted(map(str, Path(options.folder).glob("train/*.tar")))
    dataset = (
        wds.WebDataset(shards, shardshuffle=100)
        .shuffle(1000)
        .decode(turbo)
        .to_tuple("jpg;jpeg;png", "cls")
        .map_tuple(Transform(options.size), label)
        .batched(options.batch)
    )
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=options.workers)
    clock.read(lambda: (images for images, _ in loader), options.size)


if __name__ == "__main__":
    main()
