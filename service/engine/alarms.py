"""What goes wrong in a run, judged from its metrics alone; each alarm names the settings that cure it."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import gt, lt
from statistics import fmean, median, pstdev

from service.config import RunConfig
from service.tracking import leaves

Row = dict[str, float]
Series = Mapping[str, Sequence[tuple[int, float]]]
"""Of each metric, (step, value) in the order of the steps."""

PREFIX = "alarm/"
# What to do with which settings; a star stands for the part of a family that has such a term.
CURES = {
    "collapse": (
        ("raise", "family.*.std"),
        ("raise", "family.*.sigreg"),
        ("raise", "family.*.weight"),
        ("lower", "family.*.temperature"),
        ("set", "family.regulariser"),
        ("set", "family.momentum"),
        ("raise", "family.momentum.start"),
        ("enlarge", "family.masking.targets.scale"),
        ("lower", "optim.lr"),
    ),
    "correlated": (
        ("raise", "family.*.cov"),
        ("raise", "family.*.sigreg"),
        ("raise", "family.*.weight"),
        ("lower", "family.*.temperature"),
        ("set", "family.regulariser"),
        ("raise", "family.momentum.start"),
        ("enlarge", "family.masking.targets.scale"),
    ),
    "not_finite": (
        ("lower", "optim.lr"),
        ("set", "optim.clip_norm"),
        ("lower", "optim.clip_norm"),
        ("lengthen", "schedule.warmup_epochs"),
    ),
    "spike": (
        ("lower", "optim.lr"),
        ("set", "optim.clip_norm"),
        ("lower", "optim.clip_norm"),
        ("lengthen", "schedule.warmup_epochs"),
    ),
    "no_learning": (
        ("raise", "optim.lr"),
        ("shorten", "schedule.warmup_epochs"),
        ("weaken", "data.augment.crop_scale"),
    ),
    "over_fitting": (
        ("raise", "optim.weight_decay"),
        ("lower", "schedule.epochs"),
        ("widen", "data.augment.crop_scale"),
    ),
}
_LOSSES = 10  # rows whose spread tells a change of the loss from noise
_SPIKE_LOSSES = (20, 100)  # fewest and most losses that tell a leap from noise
_LEAST_DEVIATION = 1e-3  # of the median, for losses that hardly vary
_FALLS = 2  # validation probes in a row that are worse than the best


def cure(alarm: str, config: RunConfig) -> str:
    """What to change, in the settings that this run has: 'raise family.loss.std (now 0.0) or …'.

    What is none can only be set, and what is set only be changed.
    """
    settings = dict(leaves(config.plain()))
    advice = ((verb, name) for verb, pattern in CURES[alarm] for name in fnmatch.filter(settings, pattern))
    fitting = ((verb, name) for verb, name in advice if (verb == "set") == (settings[name] == "null"))
    return " or ".join(f"{verb} {name} (now {settings[name]})" for verb, name in fitting)


def judge(series: Series, config: RunConfig, warmup: int) -> dict[str, str]:
    """Alarms that the metrics so far justify: name → what was seen.

    An alarm lasts as long as its condition holds; what a run's first steps look like raises none.

    Args:
        series: metrics of the run, its first loss included.
        config: with the thresholds, `monitor`.
        warmup: steps of the warm-up.
    """
    if not config.monitor.alarms:
        return {}
    newest = max((points[-1][0] for points in series.values() if points), default=0)
    found = {name: check(series, config) for name, check in _CHECKS.items() if newest > warmup or name == "not_finite"}
    return {name: seen for name, seen in found.items() if seen}


def _collapse(series: Series, config: RunConfig) -> str | None:
    return _lasting(series, "variance", lt, config.monitor.min_variance, config)


def _correlated(series: Series, config: RunConfig) -> str | None:
    return _lasting(series, "correlation", gt, config.monitor.max_correlation, config)


def _lasting(
    series: Series, metric: str, bad: Callable[[float, float], bool], limit: float, config: RunConfig
) -> str | None:
    """Name the first representation whose metric was bad in the last `patience` measurements."""
    for name, points in series.items():
        last = [value for _, value in points[-config.monitor.patience :]]
        if name.endswith(f"/{metric}") and len(last) == config.monitor.patience and all(bad(v, limit) for v in last):
            side = "below" if bad is lt else "above"
            return f"{name.split('/')[1]} has {metric} {last[-1]:.2g}, {side} {limit:g}"
    return None


def _not_finite(series: Series, config: RunConfig) -> str | None:
    for name, points in series.items():
        last = [value for _, value in points[-config.monitor.patience :]]
        if name.startswith("monitor/") and len(last) == config.monitor.patience and not any(map(math.isfinite, last)):
            return f"{name} is {last[-1]}"
    return None


def _spike(series: Series, config: RunConfig) -> str | None:
    """Whether the last loss lies many deviations, 1.4826 times the median absolute one, above the median before it."""
    finite = [value for _, value in series.get("loss", ()) if math.isfinite(value)]
    fewest, most = _SPIKE_LOSSES
    *before, last = finite[-most - 1 :] or [math.nan]
    if config.guard.spike == "none" or len(before) < fewest:
        return None
    middle = median(before)
    deviation = max(1.4826 * median(abs(value - middle) for value in before), _LEAST_DEVIATION * abs(middle))
    if not last - middle > config.guard.spike_deviations * deviation:
        return None
    return f"loss {last:.4g} after {middle:.4g} ± {deviation:.2g}"


def _no_learning(series: Series, config: RunConfig) -> str | None:
    """Whether the last losses cannot be told from the first: their mean is within two of their deviations of it."""
    points = series.get("loss", ())
    if len(points) <= _LOSSES:
        return None
    first, last = points[0][1], [value for _, value in points[-_LOSSES:] if math.isfinite(value)]
    if not last:
        return None
    mean, noise = fmean(last), pstdev(last)
    return f"loss {mean:.4g} ± {noise:.2g} began at {first:.4g}" if abs(mean - first) <= 2 * noise else None


def _over_fitting(series: Series, config: RunConfig) -> str | None:
    """Whether the validation probe has left its best beyond two standard errors while the loss went on falling."""
    scores, errors = series.get("val_linear", ()), series.get("val_linear_se", ())
    if len(scores) <= _FALLS:
        return None
    best_step, best = max(scores[:-_FALLS], key=lambda point: point[1])
    last = zip(scores[-_FALLS:], errors[-_FALLS:], strict=True)
    if not all(score < best - 2 * error for (_, score), (_, error) in last):
        return None
    if not _loss_at(series, scores[-1][0]) < _loss_at(series, best_step):
        return None
    return f"validation probe {scores[-1][1]:.2f} % after {best:.2f} % at step {best_step}, with a lower loss"


def _loss_at(series: Series, step: int) -> float:
    before = [value for at, value in series.get("loss", ()) if at <= step]
    return fmean(before[-_LOSSES:]) if before else math.nan


_CHECKS = {
    "not_finite": _not_finite,
    "collapse": _collapse,
    "correlated": _correlated,
    "spike": _spike,
    "no_learning": _no_learning,
    "over_fitting": _over_fitting,
}


class Alarms:
    """Alarms of one run: told when they begin and when they end, once, whatever restarts come between.

    Args:
        config: of the run.
        warmup: steps of its warm-up.
        history: metrics of steps that the run has taken before, by step.
        start: step that it goes on from.
    """

    def __init__(self, config: RunConfig, warmup: int, history: Mapping[int, Row], start: int) -> None:
        self._config, self._warmup = config, warmup
        self._series: dict[str, list[tuple[int, float]]] = {}
        events = ((step, name, value) for step, row in history.items() for name, value in row.items())
        self._told = [event for event in events if event[1].startswith(PREFIX)]
        for step in sorted(step for step in history if step <= start):
            self._add(step, history[step])
        if start and "loss" not in self._series:
            self._series["loss"] = [(0, math.nan)]  # the first loss is not known
        self.active = judge(self._series, config, warmup)

    def take(self, step: int, row: Row) -> Row:
        """Judge the run with a row of metrics, and return 1 for each alarm that begins and 0 for each that ends."""
        self._add(step, row)
        found = judge(self._series, self._config, self._warmup)
        changed = {f"{PREFIX}{name}": float(name in found) for name in found.keys() ^ self.active.keys()}
        self.active = found
        return changed

    def messages(self, step: int, changed: Row) -> Iterator[str]:
        """What to tell of alarms that changed, but for what an earlier life of the run has told of them."""
        for metric, began in changed.items():
            before = max((event for event in self._told if event[0] <= step and event[1] == metric), default=None)
            self._told.append((step, metric, began))
            if before is None or before[2] != began:
                name = metric.removeprefix(PREFIX)
                yield self.message(name, step) if began else f"alarm {name} ended at step {step}"

    def message(self, name: str, step: int) -> str:
        """An active alarm with its cure."""
        return f"alarm {name} at step {step}: {self.active[name]}: {cure(name, self._config)}"

    def sound_until(self, alarm: str) -> int:
        """Last step before a collapse or a spike of the loss, 0 if there is none.

        Before a collapse, that is the last at which every representation varied enough.
        """
        if alarm == "spike":
            return max((step for step, _ in self._series["loss"][:-1]), default=0)
        limit = self._config.monitor.min_variance
        points = [points for name, points in self._series.items() if name.endswith("/variance")]
        bad = {step for each in points for step, value in each if not value >= limit}
        good = {step for each in points for step, _ in each} - bad
        return max(good, default=0)

    def _add(self, step: int, row: Row) -> None:
        for name, value in row.items():
            if name in _WATCHED or name.endswith(("/variance", "/correlation")):
                self._series.setdefault(name, []).append((step, value))


_WATCHED = {"loss", "val_linear", "val_linear_se", "monitor/grad_norm"}
