"""What a sweep has found: the best trial and its recipe, which settings matter, pictures of both."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from datasets_prep.errors import UserError
from jobs.sweep import Choice, Point, Sweep, default_point
from jobs.tune_submit import IDENTITY, TRIALS, unpacked
from service import plots
from service.config import RunConfig
from service.data.store import Store

BEST = "best.yaml"
Entry = dict[str, Any]
_FEWEST = 4  # trials that tell which settings matter


def score(entry: Entry, settings: Sweep) -> float:
    """First metric of a trial, nan while it has none."""
    return entry.get("metrics", {}).get(next(iter(settings.metrics)), math.nan)


def ranking(entries: Sequence[Entry], settings: Sweep) -> list[Entry]:
    """Trials with a score, the best first: those that trained to their end before those that did not."""
    sign = -1 if next(iter(settings.metrics.values())) == "max" else 1
    scored = [entry for entry in entries if math.isfinite(score(entry, settings))]
    return sorted(scored, key=lambda entry: (entry["state"] != "finished", sign * score(entry, settings)))


def front(entries: Sequence[Entry], settings: Sweep) -> list[Entry]:
    """Finished trials that no other is better than in every metric."""

    def costs(entry: Entry) -> list[float]:
        return [entry["metrics"][name] * (-1 if mode == "max" else 1) for name, mode in settings.metrics.items()]

    done = [entry for entry in entries if entry["state"] == "finished"]
    return [entry for entry in done if not any(_dominates(costs(other), costs(entry)) for other in done)]


def _dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True)) and list(a) != list(b)


def read(storage: str, name: str) -> tuple[Sweep, list[Entry], dict[str, Any]]:
    """A sweep by name, its trials so far and what they say.

    Raises:
        UserError: no such sweep, or no trial with a score.
    """
    run = Store(storage).sub(name)
    if not run.exists(TRIALS):
        raise UserError(f"no sweep {name!r} in {storage}: `tessera tune SWEEP` starts one")
    settings, base = unpacked(run.get(IDENTITY))
    entries: list[Entry] = json.loads(run.get(TRIALS))["trials"]
    return settings, entries, {"sweep": name, **conclude(settings, base, entries)}


def write(settings: Sweep, entries: Sequence[Entry], result: Mapping[str, Any], out: Path) -> list[str]:
    """Write the best recipe and the pictures into a folder; returns the files."""
    out.mkdir(parents=True, exist_ok=True)
    files = {BEST: recipe(settings, result["best"]["point"]).encode(), **pictures(settings, entries)}
    for name, content in files.items():
        (out / name).write_bytes(content)
    return [str(out / name) for name in files]


def conclude(settings: Sweep, base: RunConfig, entries: Sequence[Entry]) -> dict[str, Any]:
    """What a sweep's trials say.

    Raises:
        UserError: no trial has a score.
    """
    ranked = ranking(entries, settings)
    if not ranked:
        why = next((entry["why"] for entry in entries if entry.get("why")), "none has probed its encoder")
        raise UserError(f"no trial of sweep {settings.name} has a score: {why}")
    best = ranked[0]
    default = [entry for entry in entries if entry.get("point") == default_point(settings, base)]
    states = [entry["state"] for entry in entries]
    return {
        "metrics": settings.metrics,
        "best": best,
        "default": default[0] if default else None,
        "front": [entry["number"] for entry in front(entries, settings)],
        "states": {state: states.count(state) for state in sorted(set(states))},
        "importance": importance(settings, entries),
    }


def recipe(settings: Sweep, point: Point) -> str:
    """Recipe of a trial, ready to submit: the sweep's recipe and what differs from it."""
    tree: dict[str, Any] = {"name": f"{settings.name}-best", "base": settings.recipe}
    for key, value in {**settings.overrides, **point}.items():
        node, (*folders, last) = tree, key.split(".")
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = value
    return f"# Best trial of sweep {settings.name}\n{yaml.safe_dump(tree, sort_keys=False)}"


def importance(settings: Sweep, entries: Sequence[Entry]) -> dict[str, float]:
    """Share of the score's variance that each setting explains, the largest first; empty for too few trials.

    By functional ANOVA over a random forest (Hutter, Hoos and Leyton-Brown 2014).
    """
    scored = [entry for entry in ranking(entries, settings) if entry["point"].keys() == settings.space.keys()]
    if len(scored) < _FEWEST or len({score(entry, settings) for entry in scored}) < 2:
        return {}
    import optuna
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    spread = {key: _distribution(settings, key, [entry["point"][key] for entry in scored]) for key in settings.space}
    for entry in scored:
        point = {key: _flat(settings, key, value) for key, value in entry["point"].items()}
        trial = optuna.trial.create_trial(params=point, distributions=spread, value=score(entry, settings))
        study.add_trial(trial)
    shares = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))
    return {key: float(share) for key, share in shares.items()}


def _distribution(settings: Sweep, key: str, seen: Sequence[Any]) -> Any:
    from optuna import distributions

    values = settings.space[key]
    if isinstance(values, Choice):
        return distributions.CategoricalDistribution(sorted({json.dumps(each) for each in [*values.values, *seen]}))
    low, high = min(values.low, *seen), max(values.high, *seen)
    return distributions.FloatDistribution(low, high, log=values.kind == "loguniform")


def _flat(settings: Sweep, key: str, value: Any) -> Any:
    return json.dumps(value) if isinstance(settings.space[key], Choice) else float(value)


def axes_of(settings: Sweep, weights: Mapping[str, float]) -> list[str]:
    """The two settings of the heat map: those that the sweep names, else the most important, else the first."""
    return list(settings.map or [*weights, *(key for key in settings.space if key not in weights)][:2])


def pictures(settings: Sweep, entries: Sequence[Entry]) -> dict[str, bytes]:
    """Heat map over two settings, parallel coordinates, importance: PNGs by file name, as far as they can be drawn."""
    ranked = [entry for entry in ranking(entries, settings) if entry["point"].keys() == settings.space.keys()]
    if not ranked:
        return {}
    title = next(iter(settings.metrics))
    scores = [score(entry, settings) for entry in ranked]
    points = [entry["point"] for entry in ranked]
    weights = importance(settings, entries)
    logarithmic = {key for key, values in settings.space.items() if values.kind == "loguniform"}
    drawn = {"parallel.png": plots.parallel_coordinates(points, scores, title, logarithmic)}
    if len(settings.space) > 1:
        chosen = axes_of(settings, weights)
        marks = ["" if entry["state"] == "finished" else entry["state"] for entry in ranked]
        drawn["heat_map.png"] = plots.heat_map(points, scores, marks, chosen, title, logarithmic)
    if weights:
        drawn["importance.png"] = plots.importance(weights, title)
    return drawn


def line(entry: Entry, settings: Sweep, progress: str) -> str:
    """One line on a trial for the driver's log."""
    point = "  ".join(f"{key.rsplit('.', 1)[-1]} {_short(value)}" for key, value in entry.get("point", {}).items())
    found = score(entry, settings)
    value = f"  {next(iter(settings.metrics))} {found:.2f}" if math.isfinite(found) else ""
    why = f" ({entry['why']})" if entry.get("why") else ""
    state = f"{entry['state']}{why} at {entry.get('percent', 0):.0f} %"
    return f"trial {entry['number']:>3}  {point}  {state}{value}  [{progress}]"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value)


def render(settings: Sweep, result: Mapping[str, Any], entries: Sequence[Entry]) -> str:
    """Lay out a sweep's trials, the best first, and what matters, as text."""
    names = [key.rsplit(".", 1)[-1] for key in settings.space]
    lines = [
        f"{'trial':>5}  {'  '.join(f'{name:>12}' for name in names)}  {next(iter(settings.metrics)):>12}  {'of run':>6}"
    ]
    ranked = ranking(entries, settings)
    for entry in [*ranked, *(entry for entry in entries if entry not in ranked)]:
        cells = "  ".join(f"{_short(entry.get('point', {}).get(key)):>12}" for key in settings.space)
        share = f"{entry.get('percent', 0):.0f} %"
        lines.append(f"{entry['number']:>5}  {cells}  {score(entry, settings):>12.4g}  {share:>6}  {entry['state']}")
    weights = "  ".join(f"{key} {share:.0%}" for key, share in result["importance"].items())
    return "\n".join([*lines, *([f"importance  {weights}"] if weights else []), summary_line(dict(result))])


def summary_line(result: dict[str, Any]) -> str:
    """One line that tells how a sweep ended."""
    best, metric = result["best"], next(iter(result["metrics"]))
    text = f"best trial {best['number']}: {metric} {best['metrics'][metric]:.2f}"
    if (default := result["default"]) is not None and metric in default.get("metrics", {}):
        text += f", the recipe as it stands {default['metrics'][metric]:.2f} ({default['state']})"
    return text
