"""Checkpoints of several ranks: read back bit for bit in any other world, agreed on when something fails."""

import copy
import errno
import os
from contextlib import contextmanager
from itertools import count

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from service.collectives import from_rank_0, rank, world_size
from service.data.store import Store, StoreUnavailable
from service.engine import checkpoint, loop
from service.engine.checkpoint import Checkpoints, TrainingState
from service.engine.control import Control
from tests.configs import tiny
from tests.ranks import on_ranks

pytestmark = pytest.mark.distributed
SMALL = {"data__batch_size": 16, "family__encoder__width": 2, "family__encoder__depth": 8}
WAYS = [(1, "ddp"), (2, "ddp"), (2, "fsdp"), (4, "ddp"), (4, "fsdp")]


class Net(nn.Module):
    """Of sizes that no world divides, with a parameter of which some ranks hold nothing, and with buffers."""

    def __init__(self):
        super().__init__()
        self.norm, self.tokens = nn.BatchNorm1d(5), nn.Parameter(torch.randn(1, 3, 5))
        self.body, self.head = nn.Linear(5, 7), nn.Linear(7, 3)


def make_state(kind, seed):
    """A state as training has it, of parameters alike on all ranks and buffers that differ."""
    torch.manual_seed(seed)
    net, averaged = Net().double(), Net().double()
    if kind == "fsdp":
        mesh = init_device_mesh("cpu", (world_size(),))
        for module in (net.body, net, averaged.body, averaged):
            fully_shard(module, mesh=mesh)
    optimizer = torch.optim.AdamW(net.parameters(), 0.1)
    wrapped = DistributedDataParallel(net) if kind == "ddp" and world_size() > 1 else net
    nn.init.constant_(net.norm.running_mean, seed + 0.5 * rank())  # the first rank's count
    state = TrainingState(wrapped, optimizer, averaged, torch.amp.GradScaler("cpu", init_scale=seed + 3.0))
    take_steps(state)
    return state


def take_steps(state):
    for _ in range(2):
        for parameter in state.module.parameters():
            parameter.grad = parameter.detach().sin()
        state.optimizer.step()


def whole(state):
    """All that a state holds, unsharded, by name."""
    found = {}
    for path, leaf in pytree.tree_flatten_with_path(state.plain())[0]:
        leaf = leaf.full_tensor() if hasattr(leaf, "full_tensor") else leaf
        found[pytree.keystr(path)] = copy.deepcopy(leaf)
    return found


def differing(a, b):
    """Names of what is not the same to the last bit."""
    equal = {
        name: torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else a[name] == b[name] for name in a
    }
    return [name for name in equal if not equal[name]] + sorted(a.keys() ^ b.keys())


def opened(folder, store=None, **options):
    config = tiny("none", **SMALL, **{f"checkpoint__{name}": value for name, value in options.items()})
    return Checkpoints(store or Store(folder), config, {}, lambda: None, 1)


def join(ranks, rendezvous):
    place = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=place, world_size=ranks)


@contextmanager
def world_of(ranks, rendezvous):
    """The first `ranks` processes as a world of their own; of one process, without a group."""
    taking_part = int(os.environ["RANK"]) < ranks
    if taking_part and ranks > 1:
        join(ranks, rendezvous)
    yield taking_part
    if dist.is_initialized():
        dist.destroy_process_group()


def save_and_load_in_all_worlds(folder):
    """Write a checkpoint in each way and read it in each; returns what differs, by ways."""
    numbers, written, found = count(), {}, {}
    dist.destroy_process_group()
    for ranks, kind in WAYS:
        with world_of(ranks, f"{folder}/{next(numbers)}") as taking_part:
            if not taking_part:
                continue
            state = make_state(kind, seed=len(written))
            written[ranks, kind] = whole(state)
            checkpoints = opened(f"{folder}/{ranks}-{kind}")
            checkpoints.save(1, state)
            take_steps(state)  # must not reach what is written in the background
            checkpoints.settle()
            found[ranks, kind] = differing(written[ranks, kind], whole(state))
    for ranks, kind in WAYS:
        with world_of(ranks, f"{folder}/{next(numbers)}") as taking_part:
            for source in WAYS if taking_part else []:
                state = make_state(kind, seed=9)
                step = opened("{}/{}-{}".format(folder, *source)).restore(state)
                expected = from_rank_0(written.get(source))
                found[source, (ranks, kind)] = (step, differing(expected, whole(state)))
    join(4, f"{folder}/{next(numbers)}")
    return found


def test_a_checkpoint_of_any_world_is_read_bitwise_in_any_other(tmp_path):
    ranks = on_ranks(4, save_and_load_in_all_worlds, tmp_path)
    moved = {ways: names for ways, names in ranks[0].items() if ways in WAYS}
    assert len(moved) == 5 and all("['model']['tokens']" in names for names in moved.values())
    read = {ways: result for ways, result in ranks[0].items() if ways not in WAYS}
    assert len(read) == 25
    for each in ranks:
        assert {ways: result for ways, result in each.items() if ways not in WAYS and result != (1, [])} == {}
    files = sorted(path.name.split("__")[-1] for path in tmp_path.glob("4-fsdp/*/*.distcp"))
    assert files == [f"{rank}_0.distcp" for rank in range(4)]
    assert len(list(tmp_path.glob("4-ddp/*/*.distcp"))) == 1
    assert len(ranks[3]) < len(ranks[0])  # of the worlds of one and two it had no part
    for folder in tmp_path.glob("*-*"):
        store = Store(folder)
        assert checkpoint.faults(store, *checkpoint.committed(store)) == []


class Failing(Store):
    """Fails to write as often as it is told, or to delete."""

    def __init__(self, uri, error, times, deletes=True):
        super().__init__(uri)
        self.error, self.times, self.deletes = error, times, deletes

    def delete(self, name):
        if not self.deletes:
            raise self.error
        super().delete(name)

    def put(self, name, data):
        if self.times > 0:
            self.times -= 1
            raise self.error
        super().put(name, data)


def fail_on_rank_1(folder, error, times, **options):
    """Save steps 1 and 2 where rank 1 fails to write; returns errors seen and steps committed."""
    state = make_state("fsdp", seed=1)
    store = Failing(folder, error, times if rank() == 1 else 0)
    checkpoints, seen = opened(folder, store, **options), []
    for step in (1, 2):
        try:
            checkpoints.save(step, state)
            if step == 2 or options:
                checkpoints.wait()
        except (OSError, ArithmeticError, StoreUnavailable) as raised:
            seen.append(repr(raised))
    checkpoints.settle()
    return seen, [checkpoint.step_and_lease(each)[0] for each in checkpoint.committed(store)], store.list()


def fail_to_remove(folder, error):
    """Save steps 1 and 2 where rank 0 cannot remove the first; returns the steps committed."""
    state = make_state("fsdp", seed=1)
    checkpoints = opened(folder, Failing(folder, error, 0, deletes=False), keep_last=1)
    for step in (1, 2):
        checkpoints.save(step, state)
        checkpoints.settle()
    return checkpoints.steps()


def spoil_what_rank_1_reads(folder):
    """Restore where the newest checkpoint's file of rank 1 is spoilt; returns steps restored and what then differs."""
    state = make_state("fsdp", seed=1)
    checkpoints = opened(folder, keep_last=3)
    expected = from_rank_0(whole(state))  # whose buffers count
    for step in (1, 2):
        checkpoints.save(step, state)
        checkpoints.settle()
        take_steps(state)
    if rank() == 0:
        for path in folder.glob("step-00000002-*/*__1_0.distcp"):
            path.write_bytes(path.read_bytes()[:-1])
    dist.barrier()
    other = make_state("fsdp", seed=2)
    return opened(folder).restore(other), differing(expected, whole(other))


def train_and_stop(data, folder):
    """A run whose second rank asks it to stop; returns message and steps it took."""
    config = tiny(data, **SMALL, parallel__workers=2, schedule__steps=50, checkpoint__every="5 minutes")
    seen = []

    def stop():
        seen.append(len(seen) + 1)
        return rank() == 1 and len(seen) == 3

    try:
        loop.train(config, loop.Run(Store(folder)), stop_requested=stop)
    except loop.Interrupted as interrupted:
        return str(interrupted), len(seen)


def resume_shards(data, folder):
    """Losses of a sharded run with averaged weights, undisturbed, and stopped and resumed."""
    config = tiny(data, **SMALL, parallel__workers=2, parallel__kind="fsdp", schedule__steps=6, eval__weight_ema=0.5)
    whole, parts, asked = {}, {}, count(1)
    loop.train(config, loop.Run(Store(folder / "whole")), rows=lambda step, row: whole.setdefault(step, row))
    run = loop.Run(Store(folder / "parts"))
    with pytest.raises(loop.Interrupted):
        loop.train(
            config,
            run,
            rows=lambda step, row: parts.setdefault(step, row),
            stop_requested=lambda: next(asked) == 2,
        )
    result = loop.train(config, run, rows=lambda step, row: parts.setdefault(step, row))
    losses = [{step: row["loss"] for step, row in rows.items() if "loss" in row} for rows in (whole, parts)]
    return result["resumed_from"], *losses


def minutes_of_rank_0(data, folder):
    """A run on a clock by which time passes on rank 0 alone, 16 s a step."""
    clock = [0.0]

    def pass_time(step, row):
        clock[0] += 16.0

    options = {"checkpoint__every": "0.5 minutes", "checkpoint__snapshot_every": "0.5 minutes"}
    options |= {"checkpoint__keep_last": 9, "monitor__every": "null", "schedule__steps": 6}
    config = tiny(data, **SMALL, **options, parallel__workers=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.time, "monotonic", lambda: clock[0])
        loop.train(config, loop.Run(Store(folder)), rows=pass_time)
    return [checkpoint.step_and_lease(each)[0] for each in checkpoint.committed(Store(folder).sub("checkpoints"))]


def raise_flags(steps):
    """Offer flags by rank and step; returns those that came back at each step."""
    control = Control("a", "b")
    return [sorted(control(a=step == 1 and rank() == 1, b=step == 2)) for step in range(steps)]


def all_of_two_ranks(data, folder):
    full = OSError(errno.ENOSPC, "No space left on device")
    return {
        "again": fail_on_rank_1(folder / "again", full, 1, patience_minutes=1.0),
        "superseded": fail_on_rank_1(folder / "superseded", full, 1),
        "impatient": fail_on_rank_1(folder / "impatient", full, 1, patience_minutes=0.0),
        "other": fail_on_rank_1(folder / "other", ZeroDivisionError("by rank 1"), 1, patience_minutes=1.0),
        "kept": fail_to_remove(folder / "kept", full),
        "spoilt": spoil_what_rank_1_reads(folder / "spoilt"),
        "flags": raise_flags(5),
        "stopped": train_and_stop(data, folder / "stopped"),
        "shards": resume_shards(data, folder / "shards"),
        "minutes": minutes_of_rank_0(data, folder / "minutes"),
    }


@pytest.fixture(scope="module")
def two_ranks(few_digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_ranks")
    return on_ranks(2, all_of_two_ranks, few_digits, folder), folder


@pytest.mark.parametrize(
    ("case", "errors", "committed"),
    [
        ("again", [], [1, 2]),
        ("superseded", [], [2]),
        ("impatient", ["OSError(28, 'No space left on device')"], [2]),
        ("other", ["ZeroDivisionError('by rank 1')"], [2]),
    ],
)
def test_a_rank_that_fails_to_write_makes_all_abandon_or_repeat_a_checkpoint(two_ranks, case, errors, committed):
    for seen, steps, names in (found[case] for found in two_ranks[0]):
        assert (seen, steps) == (errors, committed)
        left = [name for name in names if int(name.split("-")[1]) not in committed]
        assert left == [] or case == "other"  # what no storage was to blame for leaves a torn folder


def test_what_cannot_be_removed_stays_and_harms_nobody(two_ranks):
    assert [found["kept"] for found in two_ranks[0]] == [[1, 2]] * 2


def test_what_one_rank_finds_damaged_makes_all_fall_back(two_ranks):
    assert [found["spoilt"] for found in two_ranks[0]] == [(1, [])] * 2


def test_flags_reach_all_ranks_at_the_same_step(two_ranks):
    assert [found["flags"] for found in two_ranks[0]] == [[[], [], ["a"], ["b"], []]] * 2


def test_all_ranks_stop_at_the_step_that_is_committed(two_ranks):
    found, folder = two_ranks
    assert [each["stopped"] for each in found] == [(found[0]["stopped"][0], 4)] * 2
    assert found[0]["stopped"][0].startswith("stopped after step 4 of 50")
    assert checkpoint.committed(Store(folder / "stopped/checkpoints")) == ["step-00000004-lease-0000"]


def test_shards_resume_bitwise(two_ranks):
    found, folder = two_ranks
    resumed_from, whole, parts = found[0]["shards"]
    assert resumed_from == 3 and len(whole) == 6 and whole == parts
    kept = [Store(folder / f"shards/{name}/encoder").get("model.safetensors") for name in ("whole", "parts")]
    assert kept[0] == kept[1]


def test_minutes_are_those_of_rank_0(two_ranks):
    found, folder = two_ranks
    assert [each["minutes"] for each in found] == [[3, 5, 6]] * 2
    assert [name[-20:-12] for name in Store(folder / "minutes").list("snapshots")] == ["00000003", "00000005"]
