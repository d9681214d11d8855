"""Two views of a batch of 32-pixel images by kornia: seconds of each repeat, after one to warm up."""

import json
import sys
import time

import kornia.augmentation as K
import torch

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main():
    batch, repeats, threads = map(int, sys.argv[1:])
    torch.set_num_threads(threads)
    images = torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8)
    view = K.AugmentationSequential(
        K.RandomResizedCrop((32, 32), scale=(0.2, 1.0)),
        K.ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8),
        K.RandomGrayscale(p=0.2),
        K.RandomSolarize(thresholds=(0.5, 0.5), additions=(0.0, 0.0), p=0.1),
        K.RandomHorizontalFlip(p=0.5),
        K.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
    )
    times = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        for _ in range(2):
            view(images.float() / 255)
        times.append(time.perf_counter() - start)
    print(json.dumps({"seconds": times[1:]}))


if __name__ == "__main__":
    main()
