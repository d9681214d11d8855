"""Masks of 256 images on a 14×14 grid: ours against the published I-JEPA collator, re-implemented mask by mask.

The peer follows the published algorithm in plain Python and torch: a size a batch, then for each image four target
blocks and a context block, each drawn as a grid of ones, checked, turned into indices, and cut to the batch's smallest.
"""

import math

import torch

from service.config import PaperMasking, ReferenceMasking
from tests.bench._report import alternate, close, ratio

BATCH, GRID, REPEATS, STEPS, MIN_KEEP = 256, (14, 14), 5, 10, 10
PEER = "the published collator's algorithm in Python and torch, image by image (re-implemented)"


def size(generator, scale, aspect):
    u = torch.rand(1, generator=generator).item()
    area = int(GRID[0] * GRID[1] * (scale[0] + u * (scale[1] - scale[0])))
    ratio = aspect[0] + u * (aspect[1] - aspect[0])
    sides = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    return min(sides[0], GRID[0] - 1), min(sides[1], GRID[1] - 1)


def block(shape, regions=()):
    """Indices of a block's patches, and the grid without it; every 20 failures give up one more region."""
    tries = 0
    while True:
        top = torch.randint(0, GRID[0] - shape[0], (1,))  # stays a tensor, as in the published code
        left = torch.randint(0, GRID[1] - shape[1], (1,))
        mask = torch.zeros(GRID, dtype=torch.int32)
        mask[top : top + shape[0], left : left + shape[1]] = 1
        for region in regions[: max(len(regions) - tries // 20, 0)]:
            mask *= region
        indices = torch.nonzero(mask.flatten())
        if len(indices) > MIN_KEEP:
            break
        tries += 1
    rest = torch.ones(GRID, dtype=torch.int32)
    rest[top : top + shape[0], left : left + shape[1]] = 0
    return indices.squeeze(), rest


def published(step, count=BATCH):
    """Contexts (B, K) and targets (B, 4, T) of a batch."""
    generator = torch.Generator().manual_seed(step)
    target_size = size(generator, (0.15, 0.2), (0.75, 1.5))
    context_size = size(generator, (0.85, 1.0), (1.0, 1.0))
    contexts, targets = [], []
    for _ in range(count):
        drawn = [block(target_size) for _ in range(4)]
        targets.append([indices for indices, _ in drawn])
        contexts.append(block(context_size, [rest for _, rest in drawn])[0])
    fewest = min(len(context) for context in contexts)
    least = min(len(target) for of_image in targets for target in of_image)
    cut = [torch.stack([target[:least] for target in of_image]) for of_image in targets]
    return torch.stack([context[:fewest] for context in contexts]), torch.stack(cut)


def drawing(draw):
    return lambda: [draw(step) for step in range(STEPS)]


def main():
    torch.set_num_threads(1)
    maskings = {"tessera": PaperMasking().build(GRID), "tessera, reference": ReferenceMasking().build(GRID)}
    contestants = {
        name: drawing(lambda step, m=masking: [torch.from_numpy(part) for part in m.draw(0, step, 0, BATCH)])
        for name, masking in maskings.items()
    }
    times = alternate(contestants | {"collator": drawing(published)}, REPEATS)
    per_batch = sorted(times["tessera"])[REPEATS // 2] / STEPS
    same = ratio(times, "tessera, reference", "collator")
    speedup = ratio(times, "tessera", "collator")
    close("masks", per_batch, "s/batch", PEER, speedup, ratio_of_the_same_algorithm=same)


if __name__ == "__main__":
    main()
