"""The whole I-JEPA step on the CPU: ViT-S/16, 224 px, batch 8, masks to moving average.

The peer is the published step as the paper and its code have it, re-implemented: fp32, attention as two products and a
softmax, masks by the collator, one tensor at a time in AdamW and in the moving average. It gets normalised images;
ours crops, flips and normalises them too. Both draw context and targets at the paper's scales, but the number of
tokens follows from the algorithm, so ours is also timed with the collator's algorithm.
"""

import os
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

from jobs import recipes
from service.engine.parallel import place
from service.engine.trainer import Length, Trainer
from service.engine.worker import start_worker
from service.families import build_family
from service.models.blocks import patch_coordinates, sincos_positions
from tests.bench import masks
from tests.bench._report import alternate, close, ratio

BATCH, STEPS, REPEATS = 8, 2, 5
DIM, DEPTH, HEADS, PATCH, SIDE = 384, 12, 6, 16, 224
PREDICTOR = {"width": 384, "depth": 6, "heads": 12}
LENGTH = Length(100, 1000, 10)
PEER = "the published step: fp32, naive attention, collator's masks, per-tensor EMA and AdamW (re-implemented)"


def ours(images, *changes):
    settings = ["data.uri=none", f"data.batch_size={BATCH}", f"data.image_size={SIDE}", "compute.device=cpu"]
    settings += ["family.encoder.size=small", f"family.encoder.patch_size={PATCH}"]
    settings += [f"family.predictor.{name}={value}" for name, value in PREDICTOR.items()]
    config = recipes.load("ijepa-cpu", [*settings, f"compute.threads={torch.get_num_threads()}", *changes])
    worker = start_worker(config.compute)
    torch.manual_seed(0)
    trainer = Trainer(config, worker, place(build_family(config), worker, config.compute, config.parallel), LENGTH)
    ids, taken = torch.arange(BATCH), iter(range(LENGTH.total))

    def work():
        for _ in range(STEPS):
            trainer.step(next(taken), images, ids)

    return work


class Block(nn.Module):
    """Pre-norm transformer block with attention written out."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-6) for _ in range(2))
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        x = x + self.proj((weights @ v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def gather(x, patches):
    return torch.gather(x, 1, patches[..., None].expand(-1, -1, x.shape[-1]))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, DIM, PATCH, PATCH)
        self.positions = nn.Parameter(
            sincos_positions(patch_coordinates((SIDE // PATCH,) * 2), DIM)[None], requires_grad=False
        )
        self.blocks, self.norm = nn.ModuleList(Block(DIM, HEADS) for _ in range(DEPTH)), nn.LayerNorm(DIM, eps=1e-6)

    def forward(self, images, context=None):
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        x = x if context is None else gather(x, context)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Predictor(nn.Module):
    def __init__(self):
        super().__init__()
        width = PREDICTOR["width"]
        self.embed, self.project, self.norm = (
            nn.Linear(DIM, width),
            nn.Linear(width, DIM),
            nn.LayerNorm(width, eps=1e-6),
        )
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(
            sincos_positions(patch_coordinates((SIDE // PATCH,) * 2), width)[None], requires_grad=False
        )
        self.blocks = nn.ModuleList(Block(width, PREDICTOR["heads"]) for _ in range(PREDICTOR["depth"]))

    def forward(self, x, context, targets):
        """Every target of every image by itself, (B·M, T, D), targets (M, B, T)."""
        positions = self.positions.expand(len(x), -1, -1)
        x = self.embed(x) + gather(positions, context)
        asked = torch.cat([self.token + gather(positions, target) for target in targets])
        x = torch.cat([x.repeat(len(targets), 1, 1), asked], 1)
        for block in self.blocks:
            x = block(x)
        return self.project(self.norm(x)[:, context.shape[1] :])


def published(images):
    torch.manual_seed(0)
    encoder, predictor = Encoder(), Predictor()
    target_encoder = deepcopy(encoder).requires_grad_(False)
    trained = [p for module in (encoder, predictor) for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-3, weight_decay=0.05, foreach=False, fused=False)
    steps = iter(range(LENGTH.total))

    def step(number):
        context, targets = masks.published(number, BATCH)
        targets = targets.transpose(0, 1)
        with torch.no_grad():
            seen = F.layer_norm(target_encoder(images), (DIM,))
            wanted = torch.cat([gather(seen, target) for target in targets])
        loss = F.smooth_l1_loss(predictor(encoder(images, context), context, targets), wanted)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        momentum = 0.996 + 0.004 * number / LENGTH.total
        with torch.no_grad():
            for ours, theirs in zip(target_encoder.parameters(), encoder.parameters(), strict=True):
                ours.mul_(momentum).add_((1 - momentum) * theirs)

    def work():
        for _ in range(STEPS):
            step(next(steps))

    return work


def main():
    torch.set_num_threads(os.cpu_count() or 1)
    images = torch.randint(0, 256, (BATCH, 3, SIDE, SIDE), dtype=torch.uint8)
    contestants = {
        "tessera bf16": ours(images),
        "tessera fp32": ours(images, "compute.precision=fp32"),
        "tessera bf16, collator's algorithm": ours(images, "family.masking.kind=reference"),
        "published step": published(torch.randn(BATCH, 3, SIDE, SIDE)),
    }
    times = alternate(contestants, REPEATS)
    rate = BATCH * STEPS / sorted(times["tessera bf16"])[REPEATS // 2]
    more = {
        "ratio_at_equal_precision": ratio(times, "tessera fp32", "published step"),
        "ratio_of_the_collators_algorithm": ratio(times, "tessera bf16, collator's algorithm", "published step"),
    }
    compiled = ours(images, "compute.compile=true")
    compiled()
    graphs = counters["stats"]["unique_graphs"]
    again = alternate({"compiled": compiled, "published step": contestants["published step"]}, REPEATS)
    more["ratio_compiled"] = ratio(again, "compiled", "published step")
    more["recompilations_after_warm_up"] = counters["stats"]["unique_graphs"] - graphs
    close("ijepa_step", rate, "images/s", PEER, ratio(times, "tessera bf16", "published step"), **more)


if __name__ == "__main__":
    main()
