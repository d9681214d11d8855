"""What a run will do, worked out before anything is spent: data checked, steps counted, `auto` decided."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets_prep.errors import UserError
from datasets_prep.index import Index
from service.config import RunConfig, canonical_partitions


@dataclass(frozen=True)
class Plan:
    """A config whose data exists and fits, with what follows from both."""

    config: RunConfig
    index: Index
    partitions: int
    steps_per_epoch: int
    steps: int

    def rows(self) -> list[tuple[str, str]]:
        """What a person should see before the run starts."""
        data = self.config.data
        split = self.index.splits[data.train_split]
        kept = self.steps_per_epoch * data.batch_size
        return [
            ("data", f"{data.uri}  ({self.index.name}, fingerprint {self.index.fingerprint})"),
            ("training", f"{split.samples:,} samples in {len(split.shards)} shards, read {data.mode}"),
            ("batch", f"{data.batch_size} over {self.config.parallel.workers} workers, {self.partitions} partitions"),
            ("steps", f"{self.steps:,} = {self.steps / self.steps_per_epoch:g} epochs of {self.steps_per_epoch}"),
            ("left out", f"{split.samples - kept} samples an epoch, others each time"),
        ]

    def summary(self) -> dict[str, Any]:
        """The same for programs."""
        return {
            "data": self.config.data.uri,
            "fingerprint": self.index.fingerprint,
            "samples": self.index.splits[self.config.data.train_split].samples,
            "partitions": self.partitions,
            "steps_per_epoch": self.steps_per_epoch,
            "steps": self.steps,
        }


def make(config: RunConfig) -> Plan:
    """Check a config against its data and freeze what was left open.

    Raises:
        UserError: data missing, of another modality, without the splits, or too small for the batch.
    """
    from service.data.plan import SamplePlan
    from service.data.split import DataSplit, read_index, resolve_mode
    from service.data.store import Store

    config = _with(config, uri=_absolute(config.data.uri))
    store = Store(config.data.uri)
    index = read_index(store)
    if index.modality != "image":
        raise UserError(f"{store.uri} holds {index.modality} samples, and family {config.family.kind} takes images")
    split = DataSplit(store, index, config.data.train_split)
    DataSplit(store, index, config.data.val_split)
    if not index.classes:
        raise UserError(f"{store.uri} has no classes, and the linear probe that chooses encoders needs labels")
    partitions = canonical_partitions(config.data.partitions, config.data.batch_size)
    sample_plan = SamplePlan(split.shard_samples, config.data.batch_size, partitions, config.data.window, config.seed)
    config = _with(config, mode=resolve_mode(split, config.data))
    per_epoch = sample_plan.steps_per_epoch
    return Plan(config, index, partitions, per_epoch, config.schedule.length(per_epoch))


def _with(config: RunConfig, **data: Any) -> RunConfig:
    return config.model_copy(update={"data": config.data.model_copy(update=data)})


def _absolute(uri: str) -> str:
    """Turn a relative folder into an absolute one: a job runs in another folder than its submitter."""
    if "://" in uri:
        return uri
    path = Path(os.path.expanduser(uri))
    return str(path.resolve())
