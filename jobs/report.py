"""`tessera report`: where a run's wall time went, its restarts and checkpoints, and what these would mean elsewhere."""

from __future__ import annotations

import io
import json
import os
import time
from typing import TYPE_CHECKING, Any

from datasets_prep.errors import UserError
from jobs.terminal import note, stack_environment

if TYPE_CHECKING:
    from service.data.store import Store
    from service.engine.goodput import Event, Goodput, Model

SILENT_SECONDS = 60.0  # without a sign of life, after which an unfinished run no longer counts as running
_PHASES = {
    "step": "steps that the run is made of",
    "lost": "steps taken again",
    "down": "no worker at work",
    "start": "starting",
    "restore": "reading a checkpoint",
    "checkpoint": "waiting for a checkpoint",
    "evaluate": "evaluating and measuring",
    "data": "waiting for data",
}


def open_run(run: str, storage_uri: str) -> Store:
    """Storage of a run, given its name, folder or s3:// address."""
    from service.data.store import Store

    stack_environment()
    return Store(run) if "/" in run else Store(storage_uri).sub(run)


def report(store: Store, gpus: int, mtbf_hours: float) -> tuple[Goodput, Model | None]:
    """Add up what a run's storage holds, and keep a picture of it there.

    Args:
        store: the run's.
        gpus: of the job that the model is about.
        mtbf_hours: its mean time between failures.
    """
    from service.engine.goodput import goodput, model, read_events

    events = read_events(store)
    if not any(event["leg"] for event in events):
        raise UserError(f"{store.uri} holds no events of a run: correct it, or wait until its workers have started")
    found = goodput(events, alive=time.time() - events[-1]["time"] < SILENT_SECONDS)
    png = picture(events, found)
    store.put("pictures/goodput.png", png)
    _send(store, png)
    return found, model(found, gpus, mtbf_hours)


def picture(events: list[Event], found: Goodput) -> bytes:
    """Draw where the wall time went: a PNG."""
    from service import plots
    from service.engine.goodput import timeline

    return plots.goodput(found.seconds, **vars(timeline(events)))


def _send(store: Store, png: bytes) -> None:
    """Put the picture into MLflow too, if that can be reached."""
    from service import tracking

    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri or not store.exists("state.json"):
        return
    try:
        tracking.check(uri)
        tracking.log_picture(uri, json.loads(store.get("state.json"))["mlflow_run"], "goodput.png", png)
    except UserError as error:
        note(f"note: the picture is not in MLflow: {error}")


def plain(found: Goodput, expected: Model | None) -> dict[str, Any]:
    """All numbers as JSON-ready values."""
    return found.plain() | {"model": None if expected is None else vars(expected)}


def render(found: Goodput, expected: Model | None, gpus: int, mtbf_hours: float) -> str:
    """Lay it out as text."""
    from rich.console import Console

    text = io.StringIO()
    console = Console(file=text, width=100, highlight=False)
    console.print(_times(found))
    if found.restarts:
        console.print(_restarts(found))
    console.print(_checkpoints(found))
    console.print(_model(found, expected, gpus, mtbf_hours))
    return text.getvalue()


def _times(found: Goodput) -> Any:
    from rich import box
    from rich.table import Table

    title = f"goodput {100 * found.goodput:.1f} % of {_span(found.wall_seconds)}, {found.steps} steps, {found.outcome}"
    table = Table(box=box.SIMPLE_HEAD, title=title)
    table.add_column("where the wall time went")
    table.add_column("time", justify="right")
    table.add_column("%", justify="right")
    for phase, words in _PHASES.items():
        seconds = found.seconds.get(phase, 0.0)
        table.add_row(words, _span(seconds), f"{100 * seconds / max(found.wall_seconds, 1e-9):.1f}")
    return table


def _restarts(found: Goodput) -> Any:
    from rich import box
    from rich.table import Table

    times = f"{len(found.restarts)} restart{'s' * (len(found.restarts) > 1)}"
    table = Table(box=box.SIMPLE_HEAD, title=f"{times}, {found.lost_steps} steps lost")
    for heading in ("cause", "from step", "lost steps", "detected after", "next step after"):
        table.add_column(heading, justify="left" if heading == "cause" else "right")
    for restart in found.restarts:
        detected = "–" if restart.detect_seconds is None else _span(restart.detect_seconds)
        numbers = f"{restart.step}", f"{restart.lost_steps}", detected, _span(restart.down_seconds)
        table.add_row(restart.cause, *numbers)
    return table


def _checkpoints(found: Goodput) -> str:
    from statistics import median

    if not found.stalls:
        return "no checkpoint was begun"
    stalls = f"{len(found.stalls)} checkpoints, training waited {median(found.stalls):.3f} s for each (median), "
    written = f"{median(found.write_seconds):.2f} s until committed" if found.write_seconds else "none committed"
    return f"{stalls}{max(found.stalls):.3f} s at most; {written}"


def _model(found: Goodput, expected: Model | None, gpus: int, mtbf_hours: float) -> str:
    if expected is None:
        return "no interval between checkpoints was measured, which the model of a larger job needs"
    per_failure = f"each loses {_span(expected.lost_per_failure)} (detection, restart and half an interval)"
    basis = "" if found.restarts else "; no restart was measured, the run's own start stands in for one"
    return (
        f"{gpus} GPUs with a failure every {mtbf_hours:g} h: {per_failure}{basis}.\n"
        f"Goodput {100 * expected.goodput:.1f} %, {expected.gpu_hours_lost_a_day:.0f} GPU hours lost a day, "
        f"with a checkpoint every {_span(expected.every_seconds)};\n{100 * expected.optimal_goodput:.1f} % at the "
        f"optimum, every {_span(expected.optimal_every_seconds)} (Young 1974)."
    )


def _span(seconds: float) -> str:
    """Time in the unit that fits: 4.2 s, 12:30 min, 3:05 h."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d} h"
