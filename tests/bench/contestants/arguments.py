"""What every contestant of the loader benchmarks is told."""

import argparse

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def parse(*more):
    """Folder, workers, batch and size; `more` are a contestant's own flags."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--write", metavar="PHOTOS", help="make the folder from a folder of photos, and end")
    for flag in more:
        parser.add_argument(flag, action="store_true")
    return parser.parse_args()
