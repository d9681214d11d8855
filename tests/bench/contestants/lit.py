"""litdata: images optimised into chunks of 64 MB, read by StreamingDataset into a StreamingDataLoader."""

from pathlib import Path

import arguments
import clock
import litdata
import torch
from PIL import Image
from torchvision.transforms import v2


def sample(path):
    return {"image": Image.open(path), "label": 0}


class Photos(litdata.StreamingDataset):
    def __init__(self, options):
        super().__init__(options.folder, shuffle=True)
        self.transform = v2.Compose(
            [
                v2.ToImage(),
                v2.RGB(),
                v2.RandomResizedCrop(options.size, scale=(0.2, 1.0), antialias=True),
                v2.RandomHorizontalFlip(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(arguments.MEAN, arguments.STD),
            ]
        )

    def __getitem__(self, index):
        return self.transform(super().__getitem__(index)["image"])


def main():
    options = arguments.parse()
    torch.set_num_threads(1)
    if options.write:
        paths = [str(path) for path in sorted(Path(options.write).glob("train/*/*"))]
        litdata.optimize(
            sample, paths, output_dir=options.folder, chunk_bytes="64MB", num_workers=options.workers, verbose=False
        )
        return
    loader = litdata.StreamingDataLoader(Photos(options), batch_size=options.batch, num_workers=options.workers)
    clock.read(lambda: loader, options.size)


if __name__ == "__main__":
    main()
