"""The whole two-view step on the CPU: ResNet-18, projector 2048, batch 64, augmentation to optimiser.

The peer is the same maths as the field writes it, re-implemented: torchvision's per-image transforms in loader
workers, fp32, explicit covariances, the optimiser tensor by tensor. Ours is timed in bf16 and in fp32. A published code
pads the 3×3 stem by 2, so that its maps are 34×34: a mistake that is not the same maths, so it is timed beside.
"""

import os

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from jobs import recipes
from service.engine.parallel import place
from service.engine.trainer import Length, Trainer
from service.engine.worker import start_worker
from service.families import build_family
from tests.bench._report import alternate, close, ratio
from tests.bench.vicreg_loss import plain as plain_loss

BATCH, STEPS, REPEATS = 64, 2, 5
SETTINGS = ["data.uri=none", f"data.batch_size={BATCH}", "family.projector.hidden=2048", "family.projector.output=2048"]
LOSS = ["family.loss.inv=25", "family.loss.std=25", "family.loss.cov=1", "family.loss.cov_norm=paper"]
PEER = "torchvision per-image views in 2 loader workers, fp32, D×D covariance, per-tensor SGD (re-implemented)"


def ours(images, precision):
    config = recipes.load("rapid", [*SETTINGS, *LOSS, f"compute.precision={precision}", "compute.device=cpu"])
    worker = start_worker(config.compute)
    torch.manual_seed(0)
    trainer = Trainer(config, worker, place(build_family(config), worker, config.compute, config.parallel), LENGTH)
    ids = torch.arange(BATCH)

    def work():
        for step in range(STEPS):
            trainer.step(step, images, ids)

    return work


LENGTH = Length(100, 1000, 10)


def convolutions():
    """The convolutions of our bf16 step and nothing else, forward and backward: no other change can beat them."""
    encoder = build_family(recipes.load("rapid", SETTINGS)).encoder.to(
        torch.bfloat16, memory_format=torch.channels_last
    )
    seen = []
    for module in encoder.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda conv, inputs, y: seen.append((conv, inputs[0].detach(), y.detach())))
    views = torch.randn(2 * BATCH, 3, 32, 32, dtype=torch.bfloat16)
    encoder(views.contiguous(memory_format=torch.channels_last))
    recorded = list(seen)

    def work():
        for _ in range(STEPS):
            for conv, x, slope in recorded:
                wanted = [conv.weight] if x.shape[1] == 3 else [conv.weight, x.requires_grad_()]
                y = F.conv2d(x, conv.weight, stride=conv.stride, padding=conv.padding)
                torch.autograd.grad(y, wanted, slope)

    return work


def published_view():
    """One random view of one image, as the published loops draw it."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(32, scale=(0.2, 1.0)),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomSolarize(128, 0.1),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )


class Views(Dataset):
    """Two views of each image, drawn one image at a time as the published loops do."""

    def __init__(self, images):
        from PIL import Image

        self.images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        self.view = published_view()

    def __len__(self):
        return BATCH * STEPS

    def __getitem__(self, i):
        image = self.images[i % len(self.images)]
        return self.view(image), self.view(image)


def field(images, stem_padding=1):
    config = recipes.load("rapid", [*SETTINGS, *LOSS, "compute.device=cpu"])
    torch.manual_seed(0)
    family = build_family(config)
    family.encoder.conv1.padding = (stem_padding, stem_padding)
    model = torch.nn.Sequential(family.encoder, family.projector)
    velocity = {p: torch.zeros_like(p) for p in model.parameters()}
    loader = DataLoader(Views(images), batch_size=BATCH, num_workers=2, persistent_workers=True)

    def work():
        for first, second in loader:
            model.zero_grad()
            plain_loss(model(first), model(second)).backward()
            with torch.no_grad():
                for p, v in velocity.items():
                    grad = p.grad + 1e-4 * p
                    if p.ndim > 1:
                        grad = grad * min(1.0, float(0.02 * p.norm() / grad.norm() / 0.5))
                    v.mul_(0.9).add_(grad)
                    p.sub_(0.05 * v)

    return work


def main():
    torch.set_num_threads(os.cpu_count() or 1)
    images = torch.randint(0, 256, (BATCH, 3, 32, 32), dtype=torch.uint8)
    contestants = {
        "tessera bf16": ours(images, "bf16"),
        "tessera fp32": ours(images, "fp32"),
        "field": field(images),
        "field, stem padded by 2": field(images, 2),
        "convolutions alone, bf16": convolutions(),
    }
    times = alternate(contestants, REPEATS)
    rate = BATCH * STEPS / sorted(times["tessera bf16"])[REPEATS // 2]
    equal = ratio(times, "tessera fp32", "field")
    close(
        "image_step",
        rate,
        "images/s",
        PEER,
        ratio(times, "tessera bf16", "field"),
        ratio_at_equal_precision=equal,
        ratio_to_stem_padded_by_2=ratio(times, "tessera bf16", "field, stem padded by 2"),
        ratio_of_convolutions_alone=ratio(times, "convolutions alone, bf16", "field"),
    )


if __name__ == "__main__":
    main()
