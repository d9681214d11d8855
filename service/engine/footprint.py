"""What a step takes, found without its device: the real step, on tensors that have shapes and no values.

`Trainer` takes one step as rank 0 of ranks that are all alike, under torch's fake tensors, and a ledger keeps book of
the memory that comes and goes. Left out or put in place of the real thing are: the views' augmentation, whose memory is
gone before the model runs; `torch.compile`, which keeps fewer activations; DDP's reducer, whose buckets `_Buckets`
holds; what the device's libraries take for themselves.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from service.collectives import local
from service.config import RunConfig
from service.data.augment import view_kinds
from service.data.stream import Images
from service.engine.accumulate import parts_of
from service.engine.parallel import Wrapped, place
from service.engine.trainer import Length, Trainer
from service.engine.worker import Worker
from service.families import build_family
from service.precision import at_least_fp32

Device = Literal["cpu", "cuda"]
KINDS = ("weights", "target", "optimiser", "gradients", "gathered", "activations", "temporary")
_CPU = torch.device("cpu")
_MOST_TRACED = 5  # micro-batches that are traced one by one; of more, each adds what a third one adds


@dataclass(frozen=True)
class Footprint:
    """What one worker takes.

    Args:
        memory: bytes at the moment of the peak, by `KINDS`: `weights` with buffers, `target` encoder and averaged
            weights, `optimiser` state, `gradients` with DDP's buckets, weights `gathered` by FSDP, `temporary` (what
            backward passes made), `activations` (what the step made else).
        flops: of a step, recomputed ones too; a multiplication and an addition are two.
        parameters: of each part of the family, over all workers.
        trained: how many of them are trained.
        checkpoint: bytes of weights and states, over all workers.
    """

    memory: dict[str, int]
    flops: float
    parameters: dict[str, int]
    trained: int
    checkpoint: int

    @property
    def peak(self) -> int:
        """Most bytes at once."""
        return sum(self.memory.values())


def footprint(config: RunConfig, *, world: int, hosts: int = 1, device: Device) -> Footprint:
    """Trace the step of one worker.

    Masks that grow over the run are traced as they begin and end: memory is the larger one's, FLOPs are the mean.

    Args:
        config: of the run; what it would start from is not read.
        world: workers.
        hosts: machines that they are spread over evenly.
        device: whose rules hold for attention and autocast; it need not be at hand.
    """
    config = _for_tracing(config, device)
    worker = Worker(0, world, hosts, _CPU)
    curriculum = getattr(config.family, "curriculum", None)
    last = 0 if curriculum is None else curriculum.stages - 1
    autocast = device == "cuda" and config.compute.precision in ("bf16", "fp16")
    with _alike_ranks(worker), _CudaAutocast() if autocast else nullcontext():
        found = [_of_stage(config, worker, Length(1, last + 1, 0), stage) for stage in sorted({0, last})]
    largest = max(found, key=lambda each: each.peak)
    flops = sum(each.flops for each in found) / len(found)
    return Footprint(largest.memory, flops, largest.parameters, largest.trained, largest.checkpoint)


def _for_tracing(config: RunConfig, device: Device) -> RunConfig:
    """Leave out what a trace has no use for, and decide what depends on the device."""
    compute = config.compute.model_copy(update={"compile": False})
    family = config.family
    if device == "cuda" and getattr(family.encoder, "attention", None) == "auto":  # as `use_fused` decides there
        family = family.model_copy(update={"encoder": family.encoder.model_copy(update={"attention": "fused"})})
    return config.model_copy(update={"init_from": None, "compute": compute, "family": family})


def _of_stage(config: RunConfig, worker: Worker, length: Length, step: int) -> Footprint:
    size = config.slice_of(worker.world)
    parts = parts_of(size, config.parallel.micro_batch)
    if parts <= _MOST_TRACED:
        return _trace(config, worker, length, step, parts, size // parts)
    two, three = (_trace(config, worker, length, step, n, size // parts) for n in (2, 3))
    return _extrapolated(two, three, parts)


def _extrapolated(two: Footprint, three: Footprint, parts: int) -> Footprint:
    """Footprint of so many micro-batches from those of two and three."""
    memory = {kind: two.memory[kind] + (three.memory[kind] - two.memory[kind]) * (parts - 2) for kind in two.memory}
    flops = two.flops + (three.flops - two.flops) * (parts - 2)
    return Footprint(memory, flops, two.parameters, two.trained, two.checkpoint)


def _trace(config: RunConfig, worker: Worker, length: Length, step: int, parts: int, samples: int) -> Footprint:
    """Take a step of `parts` micro-batches of so many `samples` each."""
    family = _family(config, worker)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, _Ledger(fake) as ledger, ledger.resizes():
        trainer = _Traced(config, worker, family, length)
        trainer.parts = parts
        kinds = view_kinds(config.data, family.views)
        shapes = [(len(kind.numbers), parts * samples, 3, kind.size, kind.size) for kind in kinds]
        images = [torch.empty(shape, dtype=torch.uint8) for shape in shapes]
        trainer.step(step, images, torch.empty(parts * samples, dtype=torch.int64))
        memory = ledger.peak(_owned(trainer))
        counts = {name: sum(p.numel() for p in part.parameters()) for name, part in family.named_children()}
        trained = sum(p.numel() for p in family.parameters() if p.requires_grad)
        return Footprint(memory, ledger.flops, counts, trained, sum(map(_whole_bytes, _kept(trainer))))


def _family(config: RunConfig, worker: Worker) -> Any:
    """Build the family without values, as it is placed on a device."""
    with torch.device("meta"):
        family = build_family(config)
    meta = Worker(worker.rank, worker.world, worker.hosts, torch.device("meta"))
    return place(family, meta, config.compute, config.parallel)


class _Traced(Trainer):
    """A trainer whose family comes to memory when it is wrapped, and whose views are not drawn."""

    def _wrap(self) -> Wrapped:
        modules = [self.family, *([] if self.averaged is None else [self.averaged])]
        if self.worker.world > 1 and self.config.parallel.kind == "ddp":
            _materialise(modules)
            return Wrapped(_Buckets(self.family), {})
        with unset_fake_temporarily():  # FSDP makes its mesh of values
            wrapped = super()._wrap()
        _materialise(modules)
        return wrapped

    def _views(self, images: Images, ids: Tensor, epoch: int) -> list[Tensor]:
        return [torch.empty(each.shape) for each in images]


def _materialise(modules: Iterable[nn.Module]) -> None:
    """Give tensors memory in place of meta ones; `Module.to_empty` refuses fake ones."""
    for module in chain.from_iterable(each.modules() for each in modules):
        for name, p in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty_like(p, device=_CPU), p.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty_like(buffer, device=_CPU)


class _Buckets(DistributedDataParallel):
    """DDP's use of memory, as `gradient_as_bucket_view` makes it: gradients move into buckets that always exist."""

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = module
        self.require_backward_grad_sync = True  # what `no_sync` turns off
        trained = [p for p in module.parameters() if p.requires_grad]
        self.buckets = {p: torch.empty_like(p, requires_grad=False) for p in trained}
        for p in trained:
            p.register_post_accumulate_grad_hook(self._exchange)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def _exchange(self, p: Tensor) -> None:
        if self.require_backward_grad_sync:
            self.buckets[p].copy_(p.grad)  # pyright: ignore[reportArgumentType]
            p.grad = self.buckets[p]


def _owned(trainer: Trainer) -> dict[str, list[Tensor]]:
    """Tensors that outlive a step, by the kind of memory; what earlier kinds have is no later kind's."""
    followers = [module for module in (getattr(trainer.family, "target_encoder", None), trainer.averaged) if module]
    trained = list(trainer.module.parameters())
    buckets = getattr(trainer.module, "buckets", {})
    return {
        "target": local(chain.from_iterable(map(_tensors, followers))),
        "weights": local(_tensors(trainer.module)),
        "gradients": local([*(p.grad for p in trained if p.grad is not None), *buckets.values()]),
        "optimiser": local(_states(trainer)),
    }


def _kept(trainer: Trainer) -> list[Tensor]:
    """Tensors that a checkpoint holds."""
    averaged = {} if trainer.averaged is None else trainer.averaged.state_dict()
    values = [*trainer.family.state_dict().values(), *averaged.values()]
    return [*(value for value in values if isinstance(value, Tensor)), *_states(trainer)]


def _states(trainer: Trainer) -> list[Tensor]:
    values = chain.from_iterable(state.values() for state in trainer.optimizer.state.values())
    return [value for value in values if isinstance(value, Tensor)]


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return chain(module.parameters(), module.buffers())


def _whole_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class _Ledger(TorchDispatchMode):
    """Book of when each storage of a fake mode comes, changes and goes, and of FLOPs.

    A value that is asked for is made up: a flag is true (the gradient is finite), a number is 0 (nothing overflowed).
    """

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.flops = 0
        self._fake = fake
        self._entries: list[tuple[int, int]] = []  # (number of a storage, change of its bytes), in order of time
        self._live: dict[int, tuple[int, int, Any]] = {}  # by address: number, bytes, reference
        self._late: set[int] = set()  # made by a backward pass
        self._gathered: set[int] = set()  # emptied and filled again, as FSDP does

    def peak(self, owned: dict[str, list[Tensor]]) -> dict[str, int]:
        """Bytes by kind at the moment of the most; optimiser state, which the first step makes, counts from before."""
        kinds: dict[int, str] = {}
        for kind, tensors in owned.items():
            for tensor in tensors:
                if (found := self._live.get(tensor.untyped_storage()._cdata)) is not None:
                    kinds.setdefault(found[0], kind)
        always = {"optimiser": sum(size for n, size, _ in self._live.values() if kinds.get(n) == "optimiser")}
        now = dict.fromkeys(KINDS, 0)
        total, most, at_most = 0, 0, dict(now)
        for number, change in self._entries:
            kind = kinds.get(number) or self._kind(number)
            if kind not in always:
                now[kind] += change
                total += change
                if total > most:
                    most, at_most = total, dict(now)
        return at_most | always

    @contextmanager
    def resizes(self) -> Generator[None]:
        """Keep book of storages that are resized by themselves, too."""
        real = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = real(storage, size)
            if (found := self._live.get(storage._cdata)) is not None:
                self._gathered.add(found[0])
                self._change(storage, found)
            return result

        torch.UntypedStorage.resize_ = resize  # pyright: ignore[reportAttributeAccessIssue]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = real

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):  # two of three calls
            return args[0].fake_device
        if any(hasattr(each, "to_local") for each in types):  # a DTensor: its local tensors come by
            return NotImplemented
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            try:
                return func(*args, **kwargs)
            except DataDependentOutputException:
                return args[0].dtype == torch.bool
        # Waiting makes no tensor, though its fake does.
        waits = func is torch.ops._c10d_functional.wait_tensor.default
        out = args[0] if waits else func(*args, **kwargs)
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is self._fake:
            for each in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(each, FakeTensor) and each.fake_device == _CPU:
                    self._take(each.untyped_storage())
            if (formula := flop_registry.get(func._overloadpacket)) is not None:
                self.flops += formula(*args, **kwargs, out_val=out)
        return out

    def _take(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if (found := self._live.get(address)) is not None:
            return self._change(storage, found)
        number, size = len(self._entries), storage.nbytes()
        self._entries.append((number, size))
        self._live[address] = number, size, weakref.ref(storage, lambda _: self._forget(address))
        if torch._C._current_graph_task_id() != -1:
            self._late.add(number)
        return None

    def _change(self, storage: torch.UntypedStorage, found: tuple[int, int, Any]) -> None:
        number, size, reference = found
        if (now := storage.nbytes()) != size:
            self._entries.append((number, now - size))
            self._live[storage._cdata] = number, now, reference

    def _forget(self, address: int) -> None:
        number, size, _ = self._live.pop(address)
        self._entries.append((number, -size))

    def _kind(self, number: int) -> str:
        if number in self._gathered:
            return "gathered"
        return "temporary" if number in self._late else "activations"


class _CudaAutocast(TorchFunctionMode):
    """Rules of CUDA's autocast where the CPU's are others, of what models do in 16 bits."""

    _IN_FP32 = (torch.layer_norm, torch.group_norm, torch.softmax, Tensor.softmax, torch.nn.functional.softmax)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._IN_FP32 and torch.is_autocast_enabled("cpu"):
            args = (at_least_fp32(args[0]), *args[1:])
        return func(*args, **kwargs or {})


@contextmanager
def _alike_ranks(worker: Worker) -> Generator[None]:
    """A world that this process is rank 0 of, whose collectives move nothing, and which gathers what rank 0 has."""
    if worker.world == 1:
        yield
        return
    import torch.distributed._tools.fake_collectives  # noqa: F401  # pyright: ignore  (registers them)
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def gather(found: list[Any], value: Any, group: Any = None) -> None:
        found[:] = [value] * len(found)

    before, real = os.environ.get("LOCAL_WORLD_SIZE"), dist.all_gather_object
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=worker.world)
    os.environ["LOCAL_WORLD_SIZE"] = str(worker.world // worker.hosts)
    dist.all_gather_object = gather
    try:
        yield
    finally:
        dist.all_gather_object = real
        os.environ.pop("LOCAL_WORLD_SIZE")
        if before is not None:
            os.environ["LOCAL_WORLD_SIZE"] = before
        dist.destroy_process_group()
