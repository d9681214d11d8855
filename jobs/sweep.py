"""A sweep: a recipe, the settings that vary and how, and the rules by which trials are chosen and stopped.

All of this is pure: which points are tried, what a trial's config is and what its rows say follows from the sweep's
file alone. Trials are chosen by the validation split; the test split stays unseen (`eval.report=false`).
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import Field, ValidationError, field_validator, model_validator

from datasets_prep.errors import UserError
from jobs import recipes
from service.config import Count, Fraction, Frozen, NonNegative, Positive, RunConfig

SWEEPS = Path(__file__).parent / "sweeps"
SCORE = "val_linear"
_CHECKED = 64  # points of a space that are validated before a trial starts
_DRAWS = 1000  # in search of a point that was not drawn before

Point = dict[str, Any]
"""Dotted settings of one trial, in the order of the space; those left out are the recipe's own."""
Row = Mapping[str, float]


class _Between(Frozen):
    low: float
    high: float

    @model_validator(mode="after")
    def _check(self) -> _Between:
        if self.low >= self.high:
            raise ValueError(f"low={self.low:g} must be below high={self.high:g}: swap the two values")
        return self

    @property
    def ends(self) -> tuple[Any, ...]:
        """Values between which all others lie."""
        return self.low, self.high

    def holds(self, value: Any) -> bool:
        """Say whether a value can be drawn."""
        return isinstance(value, int | float) and self.low <= value <= self.high


class Uniform(_Between):
    """Any number between two."""

    kind: Literal["uniform"] = "uniform"

    def draw(self, source: random.Random) -> float:
        """Draw a value."""
        return source.uniform(self.low, self.high)


class LogUniform(_Between):
    """Any positive number between two, each factor as likely as any other."""

    kind: Literal["loguniform"] = "loguniform"
    low: Positive

    def draw(self, source: random.Random) -> float:
        """Draw a value."""
        return min(self.high, max(self.low, math.exp(source.uniform(math.log(self.low), math.log(self.high)))))


class QUniform(_Between):
    """`low` and whole steps from it, up to `high`."""

    kind: Literal["quniform"] = "quniform"
    step: Positive

    def draw(self, source: random.Random) -> float:
        """Draw a value."""
        return round(self.low + self.step * source.randint(0, int((self.high - self.low) / self.step + 1e-9)), 12)


class RandInt(_Between):
    """Whole numbers, both ends included."""

    kind: Literal["randint"] = "randint"
    low: int  # pyright: ignore[reportIncompatibleVariableOverride]
    high: int  # pyright: ignore[reportIncompatibleVariableOverride]

    def draw(self, source: random.Random) -> int:
        """Draw a value."""
        return source.randint(self.low, self.high)


class Choice(Frozen):
    """One of some values, of whatever form the setting has."""

    kind: Literal["choice"] = "choice"
    values: Annotated[tuple[Any, ...], Field(min_length=1)]

    @property
    def ends(self) -> tuple[Any, ...]:
        """All values."""
        return self.values

    def holds(self, value: Any) -> bool:
        """Say whether a value can be drawn."""
        return value in self.values

    def draw(self, source: random.Random) -> Any:
        """Draw a value."""
        return source.choice(self.values)


Distribution = Annotated[Uniform | LogUniform | QUniform | RandInt | Choice, Field(discriminator="kind")]


class NoScheduler(Frozen):
    """Every trial trains to its end, unless it collapses."""

    kind: Literal["none"] = "none"


class Asha(Frozen):
    """Asynchronous successive halving (Li et al. 2020): at each rung the better share goes on."""

    kind: Literal["asha"] = "asha"
    grace: Annotated[float, Field(gt=0, lt=1)] = Field(1 / 9, description="share of a run before the first rung")
    reduction: Annotated[float, Field(gt=1)] = Field(3.0, description="of so many trials at a rung, one goes on")


class Pbt(Frozen):
    """Population-based training (Jaderberg et al. 2017): the worst go on from the best's weights, settings changed."""

    kind: Literal["pbt"] = "pbt"
    every: Annotated[float, Field(gt=0, lt=1)] = Field(0.1, description="share of a run between exchanges")
    quantile: Annotated[float, Field(gt=0, le=0.5)] = Field(0.25, description="share that is replaced, and copied")
    resample: Fraction = Field(0.25, description="probability that a setting is drawn anew instead of moved by 20 %")


Scheduler = Annotated[NoScheduler | Asha | Pbt, Field(discriminator="kind")]


class Collapse(Frozen):
    """When a representation counts as collapsed: below either bound in `patience` measurements after the warm-up."""

    min_rank: NonNegative = Field(2.0, description="effective rank")
    min_std: NonNegative = Field(0.1, description="mean standard deviation of the dimensions")
    patience: Count = 2


class Sweep(Frozen):
    """What to try."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$", description="of the sweep; its folder in the storage of runs")
    recipe: str = Field(min_length=1, description="recipe that all trials start from")
    overrides: dict[str, Any] = Field({}, description="dotted settings of all trials, laid over the recipe")
    space: Annotated[dict[str, Distribution], Field(min_length=1)] = Field(
        description="dotted settings that vary, and how"
    )
    search: Literal["random", "grid", "optuna"] = Field(
        "random", description="how points are found; grid: all combinations of choices; optuna: TPE (Bergstra 2011)"
    )
    scheduler: Scheduler = NoScheduler()
    metrics: dict[str, Literal["max", "min"]] = Field(
        {SCORE: "max"}, description="what is chosen by; several make a front, for search=optuna only"
    )
    trials: Count | None = Field(None, description="how many points are tried; a grid has its own number")
    baseline: bool = Field(True, description="the first trial is the recipe as it stands")
    concurrency: Count | None = Field(None, description="trials at once; none: as many as the cluster has room for")
    minutes: Positive | None = Field(None, description="wall time after which all trials are stopped; none: no limit")
    sweep_seed: Annotated[int, Field(ge=0)] = Field(0, description="of the points; that of the runs is `seed`")
    collapse: Collapse | None = Field(Collapse(), description="ends trials early; none: collapsed ones train on")  # pyright: ignore[reportCallIssue]
    map: tuple[str, str] | None = Field(None, description="settings of the heat map; none: the two most important")

    @field_validator("metrics")
    @classmethod
    def _has_metrics(cls, value: dict[str, Any]) -> dict[str, Any]:
        if not value or len(value) > 2:
            raise ValueError("must name one metric, or two that are traded off, such as {val_linear: max}")
        return value

    @model_validator(mode="after")
    def _check(self) -> Sweep:
        ranges = [key for key, values in self.space.items() if not isinstance(values, Choice)]
        if self.search == "grid":
            if ranges:
                raise ValueError(f"search=grid needs choices, and space.{ranges[0]} is a range: give it kind: choice")
            if self.trials is not None:
                raise ValueError(f"trials={self.trials} with search=grid, which tries every combination: leave it out")
        elif self.trials is None:
            raise ValueError(f"trials must be given with search={self.search}, such as trials: 20")
        if len(self.metrics) > 1 and (self.search != "optuna" or self.scheduler.kind != "none"):
            raise ValueError("two metrics need search=optuna and scheduler.kind=none: nothing else trades them off")
        if self.scheduler.kind == "pbt" and self.search == "optuna":
            raise ValueError("scheduler.kind=pbt moves the settings itself: use search=random")
        if missing := sorted(set(self.map or ()) - self.space.keys()):
            raise ValueError(f"map names {missing[0]}, which space does not vary: use {', '.join(self.space)}")
        if both := sorted(self.space.keys() & self.overrides.keys()):
            raise ValueError(f"{both[0]} is in space and in overrides: leave it out of one")
        return self

    def identity(self) -> dict[str, Any]:
        """What decides which trials are run and how they end, besides the config that they share."""
        return self.model_dump(mode="json", exclude={"recipe", "overrides", "concurrency", "minutes", "map"})


_OPTIM_FREE = ("optim.lr", "optim.weight_decay", "optim.clip_norm")  # what a restored optimiser takes from the config
_SCHEDULED = ("optim", "family.loss", "family.regulariser", "family.momentum", "schedule.min_lr", "data.augment")


def names() -> list[str]:
    """Sweeps that ship with Tessera."""
    return sorted(path.stem for path in SWEEPS.glob("*.yaml"))


def describe(name: str) -> str:
    """First comment of a shipped sweep, as one line."""
    return (SWEEPS / f"{name}.yaml").read_text().splitlines()[0].lstrip("# ")


def load(name: str, overrides: Sequence[str] = ()) -> tuple[Sweep, RunConfig]:
    """Read a shipped sweep by name or a YAML file by path, and return it with the config that its trials share.

    An override `key=value` changes the sweep where it has that key (`trials=8`, `scheduler.kind=asha`,
    `space.optim.lr={kind: choice, values: [1e-3]}`), and otherwise that setting of all trials.

    Raises:
        UserError: unknown keys, impossible values, or a point of the space that no run can have.
    """
    tree = _read(name)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"{override!r} is no override: write key=value, such as trials=8 or optim.lr=0.1")
        _set(tree, key, recipes.parse(text))
    try:
        sweep = Sweep.model_validate(tree)
    except ValidationError as error:
        faults = "\n".join(f"  {recipes.explain(each, tree, Sweep)}" for each in error.errors())
        raise UserError(f"sweep {name!r}:\n{faults}") from None
    base = recipes.load(sweep.recipe, assignments(sweep.overrides))
    check(sweep, base)
    return sweep, base


def _read(name: str) -> dict[str, Any]:
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = SWEEPS / f"{name}.yaml"
        if not path.exists():
            raise UserError(f"unknown sweep {name!r}: there are {', '.join(names())}, or give a YAML file")
    content = "a mapping, with recipe and space at least"
    return {"name": path.stem, **recipes.read_yaml(path, "sweep", content)}


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    first, _, rest = key.partition(".")
    if first not in Sweep.model_fields:
        first, rest = "overrides", key
    if not rest:
        tree[first] = value
        return
    before = tree.get(first) or {}
    if not isinstance(before, dict):
        raise UserError(f"{key}={value}: {first}={before} has nothing below it: write {first}={value}")
    below = cast(dict[str, Any], before)
    fresh = rest == "kind" and below.get("kind") != value
    tree[first] = {**({} if fresh else below), rest: value}


def assignments(settings: Mapping[str, Any]) -> list[str]:
    """Dotted settings as the overrides of a command line."""
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def check(sweep: Sweep, base: RunConfig) -> None:
    """Refuse a sweep whose trials could not all run, before any does."""
    faults: dict[str, None] = {}
    for point in _distinct([*_corners(sweep), *points(sweep, base)]):
        try:
            trial_config(sweep, base, point)
        except UserError as error:
            faults |= dict.fromkeys(str(error).splitlines()[1:])
    if faults:
        raise UserError(f"sweep {sweep.name!r} has points that no run can have:\n" + "\n".join(list(faults)[:8]))
    if sweep.scheduler.kind != "none" and base.eval.every is None:
        raise UserError(
            f"scheduler.kind={sweep.scheduler.kind} decides by probes during training, and eval.every is none: "
            "set it, such as eval.every='1 epochs'"
        )
    if sweep.baseline and (sweep.search == "optuna" or sweep.scheduler.kind == "pbt"):
        _check_baseline(sweep, default_point(sweep, base))
    if sweep.scheduler.kind == "pbt":
        _check_movable(sweep)
    _check_monitor(sweep, base)


def _check_baseline(sweep: Sweep, point: Point) -> None:
    for key, values in sweep.space.items():
        if not values.holds(point.get(key)):
            raise UserError(
                f"baseline=true makes the recipe's {key}={point.get(key)} the first trial, which space.{key} does not "
                "hold: widen it, or set baseline=false"
            )


def _check_movable(sweep: Sweep) -> None:
    for key in sweep.space:
        fixed = key.startswith("optim.") and key not in _OPTIM_FREE
        if fixed or not key.startswith(_SCHEDULED):
            raise UserError(
                f"scheduler.kind=pbt changes settings while a run goes on, and {key} is fixed when it begins: "
                f"vary {', '.join(_OPTIM_FREE)}, coefficients of the loss or the augmentation"
            )


def _check_monitor(sweep: Sweep, base: RunConfig) -> None:
    if sweep.collapse is not None and base.monitor.every is None:
        raise UserError("collapse is told by measurements, and monitor.every is none: set it, or collapse=null")


def _corners(sweep: Sweep) -> Iterator[Point]:
    """Points made of the ends of ranges and of choices: all, or some at random where there are too many."""
    ends = {key: values.ends for key, values in sweep.space.items()}
    if math.prod(map(len, ends.values())) <= _CHECKED:
        return _product(ends)
    source = random.Random(sweep.sweep_seed)
    return ({key: source.choice(values) for key, values in ends.items()} for _ in range(_CHECKED))


def _product(choices: Mapping[str, Sequence[Any]]) -> Iterator[Point]:
    return (dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values()))


def points(sweep: Sweep, base: RunConfig) -> list[Point]:
    """Points that are known beforehand, in order: all of a grid or of a random search, of Optuna's the baseline.

    Raises:
        UserError: the space does not have that many different points.
    """
    first = [default_point(sweep, base)] if sweep.baseline else []
    if sweep.search == "grid":
        return _distinct([*first, *_product({key: values.ends for key, values in sweep.space.items()})])
    if sweep.search == "optuna":
        return first
    found, source = list(first), random.Random(sweep.sweep_seed)
    assert sweep.trials is not None
    for _ in range(_DRAWS):
        found = _distinct([*found, {key: values.draw(source) for key, values in sweep.space.items()}])
        if len(found) >= sweep.trials:
            return found[: sweep.trials]
    raise UserError(f"trials={sweep.trials}, and the space has {len(found)} points: lower it, or use search=grid")


def _distinct(found: Sequence[Point]) -> list[Point]:
    return list({json.dumps(point): point for point in found}.values())


def default_point(sweep: Sweep, base: RunConfig) -> Point:
    """The recipe's own values of the settings that vary; those that it does not have are left out."""
    point: Point = {}
    for key in sweep.space:
        node: Any = base.plain()
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        if node is not None:
            point[key] = node
    return point


def encoded(sweep: Sweep, point: Point) -> Point:
    """A point with choices as text, which every searcher takes."""
    return {key: json.dumps(value) if isinstance(sweep.space[key], Choice) else value for key, value in point.items()}


def decoded(sweep: Sweep, point: Point) -> Point:
    """The point that `encoded` was given."""
    return {key: json.loads(value) if isinstance(sweep.space[key], Choice) else value for key, value in point.items()}


def clipped(sweep: Sweep, point: Point) -> Point:
    """An encoded point whose numbers were moved, back within their ranges."""
    return {key: _clip(sweep.space[key], value) for key, value in point.items()}


def _clip(values: Distribution, value: Any) -> Any:
    return value if isinstance(values, Choice) else type(value)(min(values.high, max(values.low, value)))


def trial_count(sweep: Sweep, base: RunConfig) -> int:
    """Number of trials."""
    return sweep.trials or len(points(sweep, base))


def trial_config(sweep: Sweep, base: RunConfig, point: Point) -> RunConfig:
    """Config of a trial: no report on the test split and, in a population, checkpoints to go on from at each probe."""
    settings: dict[str, Any] = {**point, "eval.report": False}
    if sweep.scheduler.kind == "pbt":
        settings |= {"checkpoint.every": base.eval.every, "checkpoint.allow_changes": list(sweep.space)}
    return recipes.overlay(base, assignments(settings), f"{sweep.name} at {point}")


def check_room(sweep: Sweep, base: RunConfig, cpus: float, gpus: float) -> int:
    """Number of trials that a cluster has room for at once, no more than there are.

    Raises:
        UserError: none fits, fewer fit than `concurrency`, or than a population has.
    """
    from jobs.plan import check_resources

    sizes = _corners(sweep) if any(key.startswith(("parallel.", "compute.")) for key in sweep.space) else ()
    needs = [base, *(trial_config(sweep, base, point) for point in sizes)]
    on_gpu = [check_resources(config, cpus, gpus) for config in needs]
    room = min(
        min(
            int(cpus / (config.parallel.workers * config.parallel.cpus_per_worker) + 1e-9),
            int(gpus / config.parallel.workers) if gpu else len(needs) + 10**6,
        )
        for config, gpu in zip(needs, on_gpu, strict=True)
    )
    most = trial_count(sweep, base)
    wanted = most if sweep.scheduler.kind == "pbt" else sweep.concurrency or 1
    if wanted > room:
        name = "trials" if sweep.scheduler.kind == "pbt" else "concurrency"
        raise UserError(
            f"{name}={wanted} at once, and the cluster has room for {room} ({cpus:g} CPUs, {gpus:g} GPUs; "
            f"parallel.workers={base.parallel.workers}, cpus_per_worker={base.parallel.cpus_per_worker:g}): lower one"
        )
    return most if sweep.scheduler.kind == "pbt" else min(sweep.concurrency or room, most)


def summary(sweep: Sweep, base: RunConfig, room: int) -> dict[str, Any]:
    """What a person should see before a sweep starts."""
    space = "; ".join(f"{key} {_said(values)}" for key, values in sweep.space.items())
    goals = ", ".join(f"{name} ({mode})" for name, mode in sweep.metrics.items())
    return {
        "space": space,
        "trials": trial_count(sweep, base),
        "at once": room,
        "chosen by": f"{goals}; search {sweep.search}, scheduler {sweep.scheduler.kind}",
    }


def _said(values: Distribution) -> str:
    if isinstance(values, Choice):
        return "of " + json.dumps(list(values.values))
    return f"{values.kind} {values.low:g} … {values.high:g}"


def reports(rows: Mapping[int, Row], total: int, batch: int) -> list[dict[str, float]]:
    """What a trial reports at each probe: the row, its step, the percentage of the run, the seconds of its steps."""
    found: list[dict[str, float]] = []
    seconds, before, measured = 0.0, 0, {}
    for step in sorted(rows):
        row = rows[step]
        if "images_per_s" in row:
            seconds += (step - before) * batch / max(row["images_per_s"], 1e-9)
            before = step
        measured |= {name: value for name, value in row.items() if name.startswith("monitor/")}
        if SCORE in row:
            found.append({**measured, **row, "step": step, "percent": 100 * step / total, "seconds": seconds})
    return found


def collapsed(rows: Mapping[int, Row], rule: Collapse | None, warmup: int) -> str | None:
    """Say which representation has collapsed and how that shows, None while none has.

    Args:
        rows: of the run, by step.
        rule: bounds of rank and deviation; none: nothing counts as collapsed.
        warmup: steps of the warm-up, which are not judged.
    """
    if rule is None:
        return None
    bounds = {"/effective_rank": rule.min_rank, "/std_mean": rule.min_std}
    series: dict[str, list[float]] = {}
    for step in sorted(rows):
        for name, value in rows[step].items():
            if step > warmup and name.startswith("monitor/") and name.endswith(tuple(bounds)):
                series.setdefault(name, []).append(value)
    for name, values in series.items():
        bound = bounds["/" + name.rsplit("/", 1)[1]]
        last = values[-rule.patience :]
        if len(last) == rule.patience and all(not value >= bound for value in last):
            return f"{name.removeprefix('monitor/')} {last[-1]:.3g}, below {bound:g}"
    return None
