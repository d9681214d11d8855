"""Small configs for tests."""

from pathlib import Path
from typing import Any

from jobs import recipes
from service.config import RunConfig

TINY = [
    "data.batch_size=64",
    "data.partitions=8",
    "family.encoder.width=8",
    "family.projector.hidden=32",
    "family.projector.output=32",
    "parallel.workers=1",
    "schedule.epochs=1",
    "eval.labels_per_class=[]",
    "tracking.log_every=1 steps",
]


def tiny(data: str | Path = "data/digits", **changes: Any) -> RunConfig:
    """The demo recipe, cut down to run in seconds; `changes` name settings with `__` for the dot."""
    overrides = [f"{name.replace('__', '.')}={value}" for name, value in changes.items()]
    return recipes.load("demo", [*TINY, f"data.uri={data}", *overrides])
