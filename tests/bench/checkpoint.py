"""What a checkpoint of a ViT-S costs the training thread: written while it waits, and in the background.

The run is a real one of VICReg on random images, small enough for a CPU; the state is a ViT-S's, weights and AdamW's
moments. Stall is the time that the training thread spends in `save`, and in waiting for the commit where it does. The
cost of a checkpoint to the run also counts by how much the steps beside the background write are slower; divided by
the default interval it is the share of wall time that checkpoints take.
"""

import os
import statistics
import tempfile
from itertools import count

import torch

from jobs import recipes
from service.config import Checkpoint, parse_interval
from service.data.store import Store
from service.engine.checkpoint import Checkpoints
from service.engine.parallel import place
from service.engine.trainer import Length, Trainer
from service.engine.worker import start_worker
from service.families import build_family
from tests.bench._report import alternate, close, ratio

REPEATS = int(os.environ.get("REPEATS", 5))
STEPS = 12  # of a block: the background write ends within it
SETTINGS = [
    "data={uri: none, image_size: 32, batch_size: 4}",
    "family.encoder={kind: vit, size: small, patch_size: 8}",
    "parallel.workers=1",
    f"compute.threads={os.cpu_count()}",
]


def main():
    config = recipes.load("demo", SETTINGS)
    worker = start_worker(config.compute)
    torch.manual_seed(0)
    family = place(build_family(config), worker, config.compute, config.parallel)
    trainer = Trainer(config, worker, family, Length(1000, 10_000, 0))
    side, size = config.data.image_size, config.data.batch_size
    images, ids = torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8), torch.arange(size)
    steps = count(1)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Store(folder), config, worker.environment(), lambda: None, 1)

        def synchronous():
            checkpoints.save(next(steps), trainer.state)
            checkpoints.wait()

        def asynchronous():
            checkpoints.save(next(steps), trainer.state)

        def block():
            for step in range(STEPS):
                trainer.step(step, images, ids)

        def block_with_save():
            asynchronous()
            block()

        block()
        stalls = alternate({"synchronous": synchronous, "asynchronous": asynchronous}, REPEATS, before=checkpoints.wait)
        checkpoints.wait()
        blocks = alternate({"with": block_with_save, "without": block}, REPEATS, before=checkpoints.wait)
        checkpoints.wait()
    cost = statistics.median(a - b for a, b in zip(blocks["with"], blocks["without"], strict=True))
    amount, _ = parse_interval(Checkpoint().every)
    parameters = sum(p.numel() for p in family.parameters())
    close(
        "checkpoint",
        statistics.median(stalls["asynchronous"]),
        "s of stall",
        "the same checkpoint written while training waits",
        ratio(stalls, "asynchronous", "synchronous"),
        million_parameters=parameters / 1e6,
        seconds_of_a_checkpoint=cost,
        share_of_wall=cost / (60 * amount),
    )


if __name__ == "__main__":
    main()
