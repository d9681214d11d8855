"""What a run will do, worked out before anything is spent: data checked, steps counted, `auto` decided."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datasets_prep.errors import UserError
from datasets_prep.index import Index
from datasets_prep.layout import Layout
from service.config import RunConfig, canonical_partitions
from service.data.plan import SamplePlan, check_cache
from service.data.split import (
    DataSplit,
    decode_side,
    make_plan,
    open_sources,
    read_index,
    remote_bytes,
    resolve_mode,
    shards_of,
)
from service.data.store import Store


@dataclass(frozen=True)
class Plan:
    """A config whose data exists and fits, with what follows from both; `initial` is the hash of `init_from`."""

    config: RunConfig
    index: Index
    sources: tuple[DataSplit, ...]
    partitions: int
    steps_per_epoch: int
    steps: int
    initial: str | None = None

    @property
    def fingerprint(self) -> str:
        """Of all that the run reads: the index's own, or one that covers mixed sources and initial weights too."""
        mixed = [source.index.fingerprint for source in self.sources] if self.config.data.mixture else []
        parts = [self.index.fingerprint, *mixed, *([self.initial] if self.initial else [])]
        if len(parts) == 1:
            return self.index.fingerprint
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]

    def rows(self) -> list[tuple[str, str]]:
        """What a person should see before the run starts."""
        data = self.config.data
        shards = len(shards_of(self.sources))
        left_out = self._samples - self.steps_per_epoch * data.batch_size
        rows = [
            ("data", f"{data.uri}  ({self.index.name}, fingerprint {self.fingerprint})"),
            ("training", f"{self._samples:,} samples in {shards} shards, read {data.mode}"),
            ("batch", f"{data.batch_size} over {self.config.parallel.workers} workers, {self.partitions} partitions"),
            ("steps", f"{self.steps:,} = {self.steps / self.steps_per_epoch:g} epochs of {self.steps_per_epoch}"),
        ]
        if self.initial:
            rows.append(("init from", f"{self.config.init_from}  (SHA-256 {self.initial[:12]})"))
        if not data.mixture:
            return [*rows, ("left out", f"{left_out} samples an epoch, others each time")]
        total = sum(source.weight for source in data.mixture.values())
        shares = (f"{source.weight / total:.1%} {name}" for name, source in data.mixture.items())
        return [*rows, ("mixture", ", ".join(shares))]

    @property
    def resident_bytes(self) -> int:
        """Decoded samples that a GPU worker holds: all of a resident split, else none."""
        if self.config.data.mode != "resident":
            return 0
        return self._samples * 3 * decode_side(self.sources[0], self.config.data.largest_side) ** 2

    @property
    def _samples(self) -> int:
        return sum(source.samples for source in self.sources)

    def summary(self) -> dict[str, Any]:
        """The same for programs."""
        return {
            "data": self.config.data.uri,
            "fingerprint": self.fingerprint,
            "samples": self._samples,
            "partitions": self.partitions,
            "steps_per_epoch": self.steps_per_epoch,
            "steps": self.steps,
        }


# Training images of public data sets as published, by the last part of data.uri.
PUBLISHED = {"imagenet": 1_281_167, "imagenette": 9_469, "cifar10": 50_000, "cifar100": 50_000}


@dataclass(frozen=True)
class Outline:
    """Steps of a config whose data is not at hand, from a number of samples; `origin` says where that comes from."""

    config: RunConfig
    samples: int
    origin: str
    partitions: int
    steps_per_epoch: int
    steps: int

    @property
    def resident_bytes(self) -> int:
        """Decoded samples that a GPU worker holds, if `data.mode` says that it does."""
        data = self.config.data
        return self.samples * 3 * data.largest_side**2 if data.mode == "resident" else 0

    def rows(self) -> list[tuple[str, str]]:
        """As `Plan.rows`."""
        data = self.config.data
        return [
            ("data", f"{data.uri} was not read"),
            ("training", f"{self.samples:,} samples, {self.origin}; shards are not known"),
            ("batch", f"{data.batch_size} over {self.config.parallel.workers} workers, {self.partitions} partitions"),
            ("steps", f"{self.steps:,} = {self.steps / self.steps_per_epoch:g} epochs of {self.steps_per_epoch}"),
        ]

    def summary(self) -> dict[str, Any]:
        """As `Plan.summary`, without a fingerprint."""
        return {
            "data": self.config.data.uri,
            "fingerprint": None,
            "samples": self.samples,
            "partitions": self.partitions,
            "steps_per_epoch": self.steps_per_epoch,
            "steps": self.steps,
        }


def is_public(uri: str) -> bool:
    """Say whether a data set has the name of a public one whose size is known."""
    return _last(uri) in PUBLISHED


def _last(uri: str) -> str:
    return uri.rstrip("/").rsplit("/", 1)[-1]


def outline(config: RunConfig, samples: int | None = None) -> Outline:
    """Count the steps of a config without its data.

    Args:
        config: of the run.
        samples: to train on; none takes what `tessera shard` leaves of a public data set's, by `data.uri`'s last part.

    Raises:
        UserError: the number is not known, or too small for the batch.
    """
    data = config.data
    origin = "as stated"
    if samples is None:
        if not is_public(data.uri):
            raise UserError(f"data.uri={data.uri} cannot be read and is no public data set by name: give --samples N")
        published = PUBLISHED[_last(data.uri)]
        samples = published - round(Layout().val_share * published)
        origin = f"of {published:,} as published, less a tenth for validation"
    partitions = canonical_partitions(data.partitions, data.batch_size)
    if data.steps_per_epoch is not None:
        per_epoch = data.steps_per_epoch
    else:
        per_epoch = SamplePlan((samples,), data.batch_size, partitions, 1, config.seed).steps_per_epoch
    return Outline(config, samples, origin, partitions, per_epoch, config.schedule.length(per_epoch))


def make(config: RunConfig) -> Plan:
    """Check a config against its data and freeze what was left open.

    Raises:
        UserError: data missing, of another modality, without the splits, or too small for the batch; weights of
            `init_from` missing or of another encoder.
    """
    config = absolute(config)
    mixed = config.data.mixture
    store = Store(config.data.uri)
    index = read_index(store)
    split = DataSplit(store, index, config.data.train_split)
    others = [
        DataSplit(store, index, name)
        for name in (config.data.val_split, config.data.test_split)
        if name == config.data.val_split or name in index.splits
    ]
    sources = tuple(open_sources(config.data)) if mixed else (split,)
    for each in (split, *sources):
        if each.index.modality != "image":
            raise UserError(
                f"{each.store.uri} holds {each.index.modality} samples, and family {config.family.kind} takes images"
            )
    if not index.classes:
        raise UserError(f"{store.uri} has no classes, and the linear probe that chooses encoders needs labels")
    _check_labels(split, config, others)
    sample_plan = make_plan(sources, config.data, config.seed)
    config = _with(config, mode=resolve_mode(split, config.data))
    if config.data.mode == "stream":
        budget = config.data.cache_gb * 1e9
        check_cache(sample_plan, budget_bytes=budget, shard_bytes=remote_bytes(sources), hosts=1)
    per_epoch = sample_plan.steps_per_epoch
    steps = config.schedule.length(per_epoch)
    return Plan(config, index, sources, sample_plan.partitions, per_epoch, steps, _check_initial(config))


def absolute(config: RunConfig) -> RunConfig:
    """Name the folders of a config from the root: a job runs in another folder than its submitter."""
    mixed = {n: m.model_copy(update={"uri": _absolute(m.uri)}) for n, m in config.data.mixture.items()}
    config = _with(config, uri=_absolute(config.data.uri), mixture=mixed)
    if config.init_from is not None:
        config = config.model_copy(update={"init_from": _absolute(config.init_from)})
    return config


def check_resources(config: RunConfig, cpus: float, gpus: float) -> bool:
    """Check that a cluster has what a run asks for, and say whether its workers take a GPU each.

    Raises:
        UserError: more CPUs or GPUs asked for than there are, which Ray would wait for without end.
    """
    parallel, device = config.parallel, config.compute.device
    name = "workers" if parallel.min_workers is None else "min_workers"
    workers: int = getattr(parallel, name)
    on_gpu = device == "cuda" or (device == "auto" and gpus > 0)
    if on_gpu and gpus < workers:
        raise UserError(
            f"compute.device={device} and parallel.{name}={workers} need {workers} GPUs, the cluster has {gpus:g}: "
            "use compute.device=cpu, fewer workers or another --cluster"
        )
    if (wanted := workers * parallel.cpus_per_worker) > cpus:
        raise UserError(
            f"parallel.{name}={workers} × parallel.cpus_per_worker={parallel.cpus_per_worker:g} needs "
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


def _check_initial(config: RunConfig) -> str | None:
    """Hash of the weights to start from, which fit the encoder; None where there are none."""
    if config.init_from is None:
        return None
    from service.pretrained import check_initial  # torch and timm cost seconds to import

    return check_initial(config)


def _with(config: RunConfig, **data: Any) -> RunConfig:
    return config.model_copy(update={"data": config.data.model_copy(update=data)})


def _absolute(uri: str) -> str:
    if "://" in uri:
        return uri
    path = Path(os.path.expanduser(uri))
    return str(path.resolve())
