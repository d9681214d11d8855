"""`tessera jobs list`: what runs of a cluster are at, from its jobs and from the runs' own storage."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, TypedDict

from datasets_prep.errors import UserError
from jobs.train import RESULT
from service.data.store import Store
from service.engine.goodput import Event, goodput, read_events

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

SILENT_SECONDS = 60.0  # without a sign of life, after which a run's newest steps count as lost


class Progress(TypedDict):
    """How far a run is; None where that is not known yet. `goodput` is a share, `eta_s` in seconds."""

    step: int | None
    steps: int | None
    eta_s: float | None
    goodput: float | None


class Row(Progress):
    """A run with its newest job; times in milliseconds since 1970."""

    run: str
    recipe: str | None
    commit: str | None
    job: str | None
    jobs: int
    state: str
    started: int | None
    ended: int | None
    exit_code: int | None


def rows(jobs: Sequence[JobDetails], root: Store) -> list[Row]:
    """One row a run, oldest newest job first.

    Args:
        jobs: that carry a run's name, oldest first.
        root: storage of all runs.
    """
    by_run: dict[str, list[JobDetails]] = {}
    for job in jobs:
        by_run.setdefault((job.metadata or {})["run"], []).append(job)
    newest = sorted(by_run.values(), key=lambda own: own[-1].start_time or 0)
    return [_row(own, root) for own in newest]


def _row(own: Sequence[JobDetails], root: Store) -> Row:
    job, told = own[-1], own[-1].metadata or {}
    steps = told.get("steps", "")
    return {
        "run": told["run"],
        "recipe": told.get("recipe"),
        "commit": told.get("commit"),
        "job": job.submission_id,
        "jobs": len(own),
        "state": str(job.status.value),
        "started": job.start_time,
        "ended": job.end_time,
        "exit_code": job.driver_exit_code,
        **_progress(root.sub(told["run"]), int(steps) if steps.isdigit() else None),
    }


def _progress(run: Store, steps: int | None) -> Progress:
    try:
        if run.exists(RESULT):
            result = json.loads(run.get(RESULT))
            taken, share = result.get("steps"), result.get("goodput", {}).get("goodput")  # a sweep has neither
            return {"step": taken, "steps": taken or steps, "eta_s": 0.0, "goodput": share}
        return progress(read_events(run), steps, time.time())
    except UserError:  # the storage cannot be reached from here: the jobs can still be listed
        return progress([], steps, time.time())


def progress(events: Sequence[Event], steps: int | None, now: float) -> Progress:
    """How far a run is that has not trained to its end.

    Args:
        events: as `read_events` returns them.
        steps: of the whole run, None where nobody knows.
        now: in seconds since 1970.
    """
    if not any(event["leg"] for event in events):
        return {"step": None, "steps": steps, "eta_s": None, "goodput": None}
    alive = now - events[-1]["time"] < SILENT_SECONDS
    found = goodput(events, alive=alive)
    eta = remaining_seconds(events, steps) if alive and steps is not None else None
    return {"step": found.steps, "steps": steps, "eta_s": eta, "goodput": found.goodput}


def remaining_seconds(events: Sequence[Event], steps: int) -> float | None:
    """Time to a run's last step at the pace of its newest leg, evaluations and all; None before its second step."""
    leg = [event for event in events if event["leg"] == max(event["leg"] for event in events)]
    first = next((event for event in leg if event["event"] == "first"), None)
    last = max(leg, key=lambda event: event["stepped"])
    if first is None or last["step"] <= first["step"]:
        return None
    return (steps - last["step"]) * (last["stepped"] - first["stepped"]) / (last["step"] - first["step"])


def render(found: Sequence[Row]) -> str:
    """Lay rows out as a table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("run", "recipe", "commit", "state", "step", "ETA", "goodput", "took"):
        table.add_column(heading, justify="left" if heading in ("run", "recipe", "commit", "state") else "right")
    for row in found:
        table.add_row(*_cells(row))
    text = io.StringIO()
    Console(file=text, width=140, highlight=False).print(table)
    return text.getvalue()


def _cells(row: Row) -> tuple[str, ...]:
    commit, seconds = row["commit"] or "", ((row["ended"] or time.time() * 1e3) - (row["started"] or 0)) / 1e3
    marked = commit[:9] + "+" * (commit.endswith("+") and len(commit) > 9)
    step = "–" if row["step"] is None else f"{row['step']:,}"
    eta, share = row["eta_s"], row["goodput"]
    return (
        row["run"],
        row["recipe"] or "",
        marked,
        row["state"],
        step if row["steps"] is None else f"{step} of {row['steps']:,}",
        str(timedelta(seconds=round(eta))) if eta else "",
        "" if share is None else f"{100 * share:.1f} %",
        str(timedelta(seconds=round(seconds))) if row["started"] else "",
    )
