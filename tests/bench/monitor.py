"""What monitoring costs at its defaults: steps with measurements against the same steps without, on the CPU.

A block is as many steps as lie between two measurements. The small family is the worst case, as its steps are short.
"""

import os
import statistics

import torch

from jobs import recipes
from service.engine.alarms import Alarms
from service.engine.loop import Every
from service.engine.monitor import Monitor
from service.engine.parallel import place
from service.engine.trainer import Length, Trainer
from service.engine.worker import start_worker
from service.families import build_family
from tests.bench._report import alternate, close, ratio

REPEATS = int(os.environ.get("REPEATS", 5))


def block(recipe, *overrides):
    """Two functions that take a block of steps of a recipe, with and without measuring."""
    config = recipes.load(recipe, ["data.uri=none", "parallel.workers=1", *overrides])
    worker = start_worker(config.compute)
    torch.manual_seed(0)
    every = Every(config.monitor.every, 1000).steps
    length = Length(1000, 10 * int(every), 0)
    family = place(build_family(config), worker, config.compute, config.parallel)
    trainer = Trainer(config, worker, family, length)
    side, size = config.data.image_size, config.data.batch_size
    images, ids = torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8), torch.arange(size)
    monitor = Monitor(config, 0, 1, every, length.total)
    alarms = Alarms(config, 0, {}, 0)

    def without():
        for step in range(int(every)):
            trainer.step(step, images, ids)

    def measured():
        for step in range(int(every)):
            losses = trainer.step(step, images, ids)
            monitor.collect(step + 1, losses.features)
            if monitor.due(step + 1):
                alarms.take(step + 1, monitor.read(trainer.module, trainer.grad_norm))

    features = trainer.step(0, images, ids).features

    def reading():
        for step in range(int(every)):
            monitor.collect(step + 1, features)
        monitor.read(trainer.module, trainer.grad_norm)

    return without, measured, reading


def main():
    without, measured, reading = block("demo")
    times = alternate({"with measurements": measured, "without": without, "a measurement alone": reading}, REPEATS)
    overhead = ratio(times, "without", "with measurements")
    share = statistics.median(times["a measurement alone"]) / statistics.median(times["without"])
    close("monitor", overhead, "with ÷ without", "the same steps without measurements", overhead, share_of_block=share)


if __name__ == "__main__":
    main()
