"""mosaicml-streaming: JPEG bytes in MDS shards, read by StreamingDataset into a DataLoader."""

from pathlib import Path

import arguments
import clock
import torch
from PIL import Image
from streaming import MDSWriter, StreamingDataset
from torch.utils.data import DataLoader
from torchvision import transforms


class Photos(StreamingDataset):
    def __init__(self, options):
        super().__init__(local=options.folder, shuffle=True, batch_size=options.batch)
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(options.size, scale=(0.2, 1.0)),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(arguments.MEAN, arguments.STD),
            ]
        )

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return self.transform(sample["image"].convert("RGB")), sample["label"]


def main():
    options = arguments.parse()
    torch.set_num_threads(1)
    if options.write:
        with MDSWriter(out=options.folder, columns={"image": "jpeg", "label": "int"}) as out:
            for path in sorted(Path(options.write).glob("train/*/*")):
                out.write({"image": Image.open(path), "label": 0})
        return
    loader = DataLoader(Photos(options), batch_size=options.batch, num_workers=options.workers)
    clock.read(lambda: (images for images, _ in loader), options.size)


if __name__ == "__main__":
    main()
