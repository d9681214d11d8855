"""What a run will do, worked out before anything is spent: data checked, steps counted, `auto` decided."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datasets_prep.errors import UserError
from datasets_prep.index import Index
from service.config import RunConfig, canonical_partitions
from service.data.plan import SamplePlan, check_cache
from service.data.split import DataSplit, read_index, resolve_mode
from service.data.store import Store


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
    config = _with(config, uri=_absolute(config.data.uri))
    store = Store(config.data.uri)
    index = read_index(store)
    if index.modality != "image":
        raise UserError(f"{store.uri} holds {index.modality} samples, and family {config.family.kind} takes images")
    split = DataSplit(store, index, config.data.train_split)
    others = [
        DataSplit(store, index, name)
        for name in (config.data.val_split, config.data.test_split)
        if name == config.data.val_split or name in index.splits
    ]
    if not index.classes:
        raise UserError(f"{store.uri} has no classes, and the linear probe that chooses encoders needs labels")
    _check_labels(split, config, others)
    partitions = canonical_partitions(config.data.partitions, config.data.batch_size)
    sample_plan = SamplePlan(split.shard_samples, config.data.batch_size, partitions, config.data.window, config.seed)
    config = _with(config, mode=resolve_mode(split, config.data))
    if config.data.mode == "stream":
        largest = max(shard.bytes for shard in split.rows.shards)
        check_cache(sample_plan, budget_bytes=config.data.cache_gb * 1e9, shard_bytes=largest, hosts=1)
    per_epoch = sample_plan.steps_per_epoch
    return Plan(config, index, partitions, per_epoch, config.schedule.length(per_epoch))


def check_resources(config: RunConfig, cpus: float, gpus: float) -> bool:
    """Check that a cluster has what a run asks for, and say whether its workers take a GPU each.

    Raises:
        UserError: more CPUs or GPUs asked for than there are, which Ray would wait for without end.
    """
    workers, device = config.parallel.workers, config.compute.device
    on_gpu = device == "cuda" or (device == "auto" and gpus > 0)
    if on_gpu and gpus < workers:
        raise UserError(
            f"compute.device={device} and parallel.workers={workers} need {workers} GPUs, the cluster has {gpus:g}: "
            "use compute.device=cpu, fewer workers or another --cluster"
        )
    if (wanted := workers * config.parallel.cpus_per_worker) > cpus:
        raise UserError(
            f"parallel.workers={workers} × parallel.cpus_per_worker={config.parallel.cpus_per_worker:g} needs "
            f"{wanted:g} CPUs, the cluster has {cpus:g}: lower one of them"
        )
    return on_gpu


def _check_labels(train: DataSplit, config: RunConfig, others: list[DataSplit]) -> None:
    """Check that evaluation will find labels, before training is paid for."""
    for split in [train, *others]:
        if not (split.labels >= 0).any():
            raise UserError(f"{split.store.uri} has no labels in split {split.name!r}, and the linear probe needs them")
    smallest = int(np.bincount(train.labels[train.labels >= 0], minlength=len(train.index.classes)).min())
    most = max(config.eval.labels_per_class, default=0)
    if most > smallest:
        raise UserError(
            f"eval.labels_per_class={list(config.eval.labels_per_class)}: the smallest class of {train.store.uri} has "
            f"{smallest} samples in {train.name!r}: ask for no more than that"
        )


def _with(config: RunConfig, **data: Any) -> RunConfig:
    return config.model_copy(update={"data": config.data.model_copy(update=data)})


def _absolute(uri: str) -> str:
    """Turn a relative folder into an absolute one: a job runs in another folder than its submitter."""
    if "://" in uri:
        return uri
    path = Path(os.path.expanduser(uri))
    return str(path.resolve())
