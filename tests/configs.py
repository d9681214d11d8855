"""Small configs and data for tests."""

from dataclasses import replace
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


def write_few_digits(folder: str | Path) -> None:
    """Three hundred of the embedded digits as shards."""
    from datasets_prep.sources.digits import open_source
    from datasets_prep.writer import write_dataset
    from service.data.store import Store

    whole = open_source()
    splits = {"train": whole.splits["train"][:300], "test": whole.splits["test"][:60]}
    write_dataset(replace(whole, splits=splits), Store(folder))
