"""Ten minutes of a run on two hosts, a random worker SIGKILLed about every two: the share of time that made progress.

Goodput is what the run itself reports: the time of the steps that it is made of, over its wall time. Beside it stands
what a witness outside saw, more strictly: those steps at the median step's duration, so that whatever makes a step slow
counts as loss. `KILL=node` kills a host instead, which another replaces; `MINUTES`, `EVERY` (s) and `SEED` change the
rest. Checkpoints come every 9 s: with 0.3 s of slower steps for each, √(2 · 0.3 s · 120 s) is best (Young 1974,
doi:10.1145/361147.361115). The model carries what was measured over to 64 GPUs with one failure an hour and the default
checkpoint interval: a failure there costs a restart and half an interval.
"""

import json
import os
import random
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

from service.config import Checkpoint, parse_interval
from service.engine.goodput import goodput, read_events
from tests.bench._report import close
from tests.configs import write_few_digits
from tests.distributed.chaos.faults import kill_node, kill_worker
from tests.distributed.chaos.harness import SETTINGS, Life, Scene, environment, lives, pause
from tests.distributed.chaos.hosts import cluster

MINUTES, EVERY = float(os.environ.get("MINUTES", 10)), float(os.environ.get("EVERY", 120))
SEED, KILL = int(os.environ.get("SEED", 0)), os.environ.get("KILL", "worker")
CHANGES = [
    "schedule={steps: 1000000, warmup_epochs: 1, start_lr: 0}",
    "checkpoint.every=0.15 minutes",
    "tracking={log_every: 10 steps, model: goodput}",
]
KILLS = {"worker": kill_worker, "node": kill_node}


def disturbed(scene: Scene) -> list[float]:
    """Run for the time given, and return when kills came, in seconds since 1970."""
    rng = random.Random(SEED)
    scene.start()
    scene.wait_for(1)
    end, kills = time.time() + 60 * MINUTES, []
    while (pause_s := EVERY * rng.uniform(0.8, 1.2)) < end - time.time():
        time.sleep(pause_s)
        kills.append(time.time())
        KILLS[KILL](scene, rng)
        scene.wait_for(scene.step() + 1)
    time.sleep(max(0.0, end - time.time()))
    scene.end()
    return kills


def shares(ranks: list[Life]) -> dict[str, float]:
    """Where the time of rank 0's lives went, as shares of the time from its first step to its last."""
    lines = [line for life in ranks for line in life.lines]
    wall = max(line.time for line in lines) - lines[0].time
    step = median(b.time - a.time for life in ranks for a, b in pairwise(life.lines))
    kept = len({line.step for line in lines}) - 1
    twice = len(lines) - 1 - kept
    down = sum(b.lines[0].time - a.lines[-1].time for a, b in pairwise(ranks))
    found = {"kept": kept * step, "taken_twice": twice * step, "restarting": down}
    found["slow_steps"] = wall - sum(found.values())  # checkpoints, logging and what else lengthens a step
    return {name: value / wall for name, value in found.items()} | {"step_seconds": step, "wall_seconds": wall}


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="tessera-goodput-"))
    write_few_digits(folder / "digits")
    with cluster(folder / "cluster", cpus=2) as hosts:
        print(f"hosts: {hosts.kind}; logs in {folder}", file=sys.stderr)
        settings = [*SETTINGS, f"data.uri={folder / 'digits'}", *CHANGES]
        scene = Scene(hosts, settings, 1, hosts.env["TESSERA_STORAGE"])
        try:
            kills = disturbed(scene)
        finally:
            scene.end()
        with environment(hosts.s3.env()):
            own = goodput(read_events(scene.run()), alive=False)
        ranks = [life for life in lives(scene.witness) if life.rank == 0]
    found = shares(ranks)
    pauses = [pause(ranks[n : n + 2], ranks[n].lines[-1].time) for n in range(len(ranks) - 1)]
    print(json.dumps({"pauses": pauses}), file=sys.stderr)
    interval = 60 * parse_interval(Checkpoint().every)[0]
    lost = median(pauses or [0.0]) + interval / 2
    close(
        "goodput",
        own.goodput,
        "share of wall time",
        "a run that nothing disturbs",
        own.goodput,
        kills=len(kills),
        killed=KILL,
        seconds_to_a_new_step=median(pauses or [0.0]),
        seconds={phase: round(spent, 1) for phase, spent in own.seconds.items()},
        at_the_median_step=found["kept"],
        seen_from_outside={name: round(share, 4) for name, share in found.items()},
        model_64_gpus_one_failure_an_hour=1 - lost / 3600,
    )


if __name__ == "__main__":
    main()
