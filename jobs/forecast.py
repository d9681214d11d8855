"""What a run takes on a cluster, before anything is spent: memory, time and money, or the setting that makes it fit.

Memory, FLOPs and sizes come from a trace of the real step (`service.engine.footprint`). Time is a range, because a
trace knows how much is computed and not how fast: see `UTILISATION`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

from cluster.hardware import GPUS
from cluster.profiles import Profile, ProfileFile
from datasets_prep.errors import UserError
from jobs.package import code_hash
from jobs.plan import Outline, Plan, check_resources
from service.config import RunConfig, ViT
from service.data.cache import cache_root

if TYPE_CHECKING:
    from service.engine.footprint import Footprint

# Share of a GPU's peak that training sustains, lowest and highest, by the encoder's kind; docs/planning.md says why.
UTILISATION = {"vit": (0.20, 0.45), "resnet": (0.08, 0.30)}
# 10¹² operations a second that a CPU core sustains, lowest and highest: without and with matrix units.
CORE_TFLOPS = {"bf16": (0.02, 0.35), "fp16": (0.002, 0.35), "fp32": (0.02, 0.12), "fp64": (0.01, 0.06)}
_GIB = 2**30
_UNTRACED = ("name", "repeat", "init_from", "checkpoint", "tracking", "monitor", "guard")
_PROCESS_GIB = 1.0  # of a worker besides tensors: on a GPU, CUDA's context, kernels and workspaces
_PEERS_GIB = 1.0  # of a GPU's worker that has others: NCCL's channels
_FRAGMENTS = 1.05  # what CUDA's caching allocator reserves for each byte that is in use


@dataclass(frozen=True)
class Forecast:
    """A run on a cluster that it fits.

    Args:
        config: of the run.
        cluster: name of the profile.
        file: the profile.
        world: workers.
        nodes: machines that they need.
        on_gpu: whether each worker has a GPU.
        footprint: of one worker.
        data: bytes of the data set that a GPU holds.
        steps: of the run.
    """

    config: RunConfig
    cluster: str
    file: ProfileFile
    world: int
    nodes: int
    on_gpu: bool
    footprint: Footprint
    data: int
    steps: int

    @property
    def needed_gib(self) -> float:
        """Memory that a worker needs, with what its process takes besides tensors."""
        tensors = (self.footprint.peak + self.data) / _GIB
        if not self.on_gpu:
            return tensors + _PROCESS_GIB
        return tensors * _FRAGMENTS + _PROCESS_GIB + _PEERS_GIB * (self.world > 1)

    @property
    def room_gib(self) -> float | None:
        """Memory that a worker can have; None on a GPU that is not known."""
        node = self.file.node
        if self.on_gpu:
            return GPUS[node.gpu].memory_gib if node.gpu else None
        return node.memory_gib / math.ceil(self.world / self.nodes)

    @property
    def fits(self) -> bool:
        """Whether the memory suffices, as far as it is known."""
        return self.room_gib is None or self.needed_gib <= self.room_gib

    @property
    def tflops(self) -> tuple[float, float] | None:
        """10¹² operations a second that a worker sustains, lowest and highest; None on a GPU that is not known.

        No precision is taken to be faster than the one that the profile calls fastest.
        """
        precisions = (self.config.compute.precision, self.file.precision)
        if not self.on_gpu:
            cores = self.config.parallel.cpus_per_worker
            low, high = map(min, zip(*(CORE_TFLOPS[each] for each in precisions), strict=True))
            return cores * low, cores * high
        if not self.file.node.gpu:
            return None
        peak = min(GPUS[self.file.node.gpu].tflops[each] for each in precisions)
        low, high = UTILISATION[self.config.family.encoder.kind]
        return peak * low, peak * high

    @property
    def hours(self) -> tuple[float, float] | None:
        """Of training, without start and evaluation, shortest and longest."""
        if self.tflops is None:
            return None
        work = self.steps * self.footprint.flops / 1e12 / 3600
        return work / self.tflops[1], work / self.tflops[0]

    @property
    def cost(self) -> tuple[float, float] | None:
        """Of the nodes for as long, lowest and highest, in the profile's currency; None without a price."""
        price = self.file.price_per_node_hour
        if price is None or self.hours is None:
            return None
        return price * self.nodes * self.hours[0], price * self.nodes * self.hours[1]

    def rows(self) -> list[tuple[str, str]]:
        """What a person should see before the run starts."""
        return [
            *self._tokens(),
            ("parameters", self._parameters()),
            ("memory", self._memory()),
            ("precision", self._precision()),
            ("compute", f"{self.footprint.flops / 1e12:,.3g} TFLOP a step and worker"),
            ("time", self._time()),
            ("cost", self._cost()),
            ("checkpoint", f"{self.footprint.checkpoint / 1e9:.2f} GB"),
        ]

    def summary(self) -> dict[str, Any]:
        """The same for programs."""
        return {
            "cluster": self.cluster,
            "workers": self.world,
            "nodes": self.nodes,
            "on_gpu": self.on_gpu,
            "parameters": self.footprint.parameters,
            "trained": self.footprint.trained,
            "memory_bytes": {**self.footprint.memory, "data": self.data},
            "memory_needed_gib": self.needed_gib,
            "memory_gib": self.room_gib,
            "precision": self.config.compute.precision,
            "fastest_precision": self.file.precision,
            "flops_per_step": self.footprint.flops,
            "hours": self.hours,
            "cost": self.cost,
            "currency": self.file.currency,
            "checkpoint_bytes": self.footprint.checkpoint,
        }

    def _tokens(self) -> list[tuple[str, str]]:
        data, encoder = self.config.data, self.config.family.encoder
        if not isinstance(encoder, ViT):
            return []
        view = (data.image_size // encoder.patch_size) ** 2
        crops = 0 if data.local is None else data.local.count * (data.local.size // encoder.patch_size) ** 2
        step = data.batch_size * (self.config.family.views * view + crops)
        return [("tokens", f"{view} a view, {step:,} a step, {step * self.steps:.3g} in all, before masks")]

    def _parameters(self) -> str:
        counts = self.footprint.parameters
        parts = ", ".join(f"{name} {_millions(count)}" for name, count in counts.items())
        return f"{parts}; {_millions(sum(counts.values()))} in all, {_millions(self.footprint.trained)} trained"

    def _memory(self) -> str:
        held = {**self.footprint.memory, "data": self.data}
        parts = ", ".join(f"{name} {size / _GIB:.2f}" for name, size in held.items() if size >= 0.005 * _GIB)
        room = "an unknown GPU's" if self.room_gib is None else f"{self.room_gib:.1f}"
        where = "GPU" if self.on_gpu else "worker"
        return (
            f"{(self.footprint.peak + self.data) / _GIB:.2f} GiB a {where} at the peak ({parts}); "
            f"{self.needed_gib:.1f} of {room} GiB with what its process takes"
        )

    def _precision(self) -> str:
        own, fastest = self.config.compute.precision, self.file.precision
        return own if own == fastest else f"{own}; {self.cluster} is fastest in {fastest}: compute.precision={fastest}"

    def _time(self) -> str:
        if self.hours is None or self.tflops is None:
            return "not known: the profile names no GPU of a known speed"
        return (
            f"{_span(*map(_duration, self.hours))} of training at {self.tflops[0]:.3g}–{self.tflops[1]:.3g} TFLOP/s "
            "a worker; start and evaluation come on top"
        )

    def _cost(self) -> str:
        nodes = f"{self.nodes} of {self.file.nodes} nodes"
        if self.cost is None:
            return f"{nodes}; the profile names no price"
        low, high = (f"{amount:,.2f}" if amount < 100 else f"{amount:,.0f}" for amount in self.cost)
        note = f" ({self.file.price_note})" if self.file.price_note else ""
        return f"{_span(low, high)} {self.file.currency} for {nodes}{note}"


def forecast(made: Plan | Outline, cluster: str, file: ProfileFile) -> Forecast:
    """Work out what a run takes on a cluster.

    Raises:
        UserError: more workers than there is room for, or not enough memory, with the nearest setting that fits.
    """
    on_gpu, world, nodes = _placed(made.config, cluster, file)
    found = _traced(made.config, made, cluster, file, world, nodes, on_gpu)
    if found.fits:
        return found
    who = f"--cluster {cluster}: a {'GPU' if on_gpu else 'worker'}"
    problem = f"{who} has {found.room_gib:.1f} GiB, and a step needs {found.needed_gib:.1f} GiB"
    for settings, other in _alternatives(found, made):
        if other.fits:
            named = " ".join(f"{name}={value}" for name, value in settings.items())
            raise UserError(f"{problem}: use {named}, which needs {other.needed_gib:.1f} GiB")
    raise UserError(
        f"{problem}: no parallel.micro_batch fits, with sharded weights and recomputed activations neither: "
        "take a smaller encoder, smaller images, more workers, or another --cluster"
    )


def at(made: Plan, profile: Profile) -> Forecast | None:
    """As `forecast`, on a cluster that answers; None for one of which only the address is known."""
    file = profile.file
    if file is None:
        return None
    if file.nodes == 1:  # what Ray was given of this machine may be another number than it has
        found = {"cpus": int(profile.cpus), "gpus": int(profile.gpus)}
        file = file.model_copy(update={"node": file.node.model_copy(update=found)})
    return forecast(made, profile.name, file)


def _placed(config: RunConfig, cluster: str, file: ProfileFile) -> tuple[bool, int, int]:
    """Whether workers take GPUs, how many start, and how many nodes they fill."""
    node, parallel = file.node, config.parallel
    on_gpu = check_resources(config, file.nodes * node.cpus, file.nodes * node.gpus)
    on_node = int(node.cpus / parallel.cpus_per_worker)
    if on_gpu:
        on_node = min(on_node, node.gpus)
    room = on_node * file.nodes
    fewest = parallel.min_workers or parallel.workers
    if room < fewest:
        raise UserError(
            f"--cluster {cluster}: each of its {file.nodes} nodes, of {node.cpus} CPUs and {node.gpus} GPUs, has room "
            f"for {on_node} workers of parallel.cpus_per_worker={parallel.cpus_per_worker:g}, and the run needs "
            f"{fewest}: lower parallel.cpus_per_worker or parallel.workers"
        )
    world = next(n for n in range(min(room, parallel.workers), 0, -1) if _shareable(config, n))
    return on_gpu, world, math.ceil(world / on_node)


def _shareable(config: RunConfig, workers: int) -> bool:
    try:
        config.slice_of(workers)
    except ValueError:
        return False
    return True


def _traced(
    config: RunConfig, made: Plan | Outline, cluster: str, file: ProfileFile, world: int, nodes: int, on_gpu: bool
) -> Forecast:
    hosts = nodes if world % nodes == 0 else 1
    found = _footprint(config, world, hosts, "cuda" if on_gpu else "cpu")
    data = made.resident_bytes if on_gpu else 0
    return Forecast(config, cluster, file, world, nodes, on_gpu, found, data, made.steps)


def _footprint(config: RunConfig, world: int, hosts: int, device: Literal["cpu", "cuda"]) -> Footprint:
    """Trace a step, or take what an earlier trace of the same by the same code has found."""
    from service.engine.footprint import Footprint, footprint  # torch takes seconds to import

    tree = config.plain()
    for name in _UNTRACED:
        del tree[name]
    del tree["data"]["uri"]
    asked = json.dumps([tree, world, hosts, device, version("torch"), code_hash()], sort_keys=True)
    kept = cache_root() / "footprints" / f"{hashlib.sha256(asked.encode()).hexdigest()[:32]}.json"
    with suppress(OSError, ValueError, TypeError):
        return Footprint(**json.loads(kept.read_text()))
    found = footprint(config, world=world, hosts=hosts, device=device)
    with suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        unfinished = kept.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(asdict(found)))
        unfinished.rename(kept)
    return found


def _alternatives(base: Forecast, made: Plan | Outline) -> Iterator[tuple[dict[str, Any], Forecast]]:
    """Settings that take less memory, those that cost least first: micro-batches, then shards, then recomputing."""
    config = base.config
    sharded = {"parallel.kind": "fsdp"} if config.parallel.kind == "ddp" and base.world > 1 else {}
    encoder = config.family.encoder
    recomputed = (
        {"family.encoder.checkpointing": True} if isinstance(encoder, ViT) and not encoder.checkpointing else {}
    )
    tried: list[dict[str, Any]] = []
    for changes in ({}, sharded, recomputed, sharded | recomputed):
        if changes in tried:
            continue
        tried.append(changes)
        whole = base if not changes else _retraced(base, made, changes)
        yield changes, whole
        yield from _micro_batches(base, made, changes, whole)


def _micro_batches(
    base: Forecast, made: Plan | Outline, changes: dict[str, Any], whole: Forecast
) -> Iterator[tuple[dict[str, Any], Forecast]]:
    """The largest micro-batch that may fit, if one does, and smaller ones until the asker has enough."""
    size = base.config.slice_of(base.world)
    now = min(size, base.config.parallel.micro_batch or size)
    sizes = [n for n in range(1, now) if size % n == 0]
    if not sizes or not _allowed(base.config, sizes[0], base.world):
        return
    least = _retraced(base, made, changes | {"parallel.micro_batch": sizes[0]})
    if not least.fits:
        return
    assert whole.room_gib is not None
    slope = (whole.needed_gib - least.needed_gib) / (now - sizes[0])
    near = [n for n in sizes[1:] if least.needed_gib + slope * (n - sizes[0]) <= whole.room_gib]
    for n in reversed(near):  # memory grows with the micro-batch, so that the first hardly ever is too large
        settings = changes | {"parallel.micro_batch": n}
        yield settings, _retraced(base, made, settings)
    yield changes | {"parallel.micro_batch": sizes[0]}, least


def _allowed(config: RunConfig, micro_batch: int, world: int) -> bool:
    parallel = config.parallel.model_copy(update={"micro_batch": micro_batch})
    return _shareable(config.model_copy(update={"parallel": parallel}), world)


def _retraced(base: Forecast, made: Plan | Outline, settings: dict[str, Any]) -> Forecast:
    config = base.config
    for name, value in settings.items():
        config = _with(config, name.split("."), value)
    found = _traced(config, made, base.cluster, base.file, base.world, base.nodes, base.on_gpu)
    return replace(found, config=config)


def _with(tree: Any, path: list[str], value: Any) -> Any:
    """Copy a config with one setting changed."""
    inner = value if len(path) == 1 else _with(getattr(tree, path[0]), path[1:], value)
    return tree.model_copy(update={path[0]: inner})


def _millions(count: int) -> str:
    return f"{count / 1e6:.3g} M" if count < 1e9 else f"{count / 1e9:.3g} G"


def _duration(hours: float) -> str:
    if hours < 1 / 30:
        return f"{hours * 3600:.0f} s"
    if hours < 2:
        return f"{hours * 60:.0f} min"
    return f"{hours:.1f} h" if hours < 72 else f"{hours / 24:.1f} days"


def _span(low: str, high: str) -> str:
    """'2.1–4.8 h', the unit once if both have it."""
    low_unit, high_unit = (text.partition(" ")[2] for text in (low, high))
    return f"{low.removesuffix(f' {high_unit}') if low_unit == high_unit else low}–{high}"
