"""What the commands share on the terminal: JSON lines, notes, progress, the local stack's environment."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from cluster.profiles import Profile

_LINE_SECONDS = 10

as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON line, for programs.")
on_cluster = click.option(
    "--cluster",
    default="local",
    show_default=True,
    help="Profile name, its file.yaml, or a Ray job address http(s)://host:port.",
)


def emit(row: dict[str, Any]) -> None:
    """Print one JSON line."""
    click.echo(json.dumps(row, ensure_ascii=False, default=str))


def note(line: str) -> None:
    """Print a line on stderr."""
    click.echo(line, err=True)


class progress:  # noqa: N801  (reads as a function)
    """Progress with rates and ETA on stderr: a bar on a terminal, else a line every ten seconds."""

    def __init__(self, title: str, unit: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
        pace = TextColumn("{task.fields[pace]}")
        self._bar = Progress(*columns, pace, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task(title, total=None, pace="")
        self._title, self._unit = title, unit
        self._first: tuple[int, int, float] | None = None
        self._next_line = time.monotonic() + _LINE_SECONDS

    def __enter__(self) -> Callable[[int, int, int], None]:
        self._bar.start()
        return self._advance

    def _advance(self, done: int, total: int, size: int = 0) -> None:
        """Show that `done` of `total` units and `size` bytes are done; the first call's are from before."""
        now = time.monotonic()
        self._first = self._first or (done, size, now)
        if not self._bar.disable:
            self._bar.update(self._task, completed=done, total=total, pace=self._pace(done, total, size, now))
        elif now >= self._next_line:
            self._next_line = now + _LINE_SECONDS
            pace = self._pace(done, total, size, now)
            note(f"{self._title}: {done:,} of {total:,} {self._unit}{', ' if pace else ''}{pace}")

    def _pace(self, done: int, total: int, size: int, now: float) -> str:
        assert self._first is not None
        before, size_before, start = self._first
        if done == before or now == start:
            return ""
        rate = (done - before) / (now - start)
        bandwidth = f", {(size - size_before) / 1e6 / (now - start):.1f} MB/s" if size else ""
        return f"{rate:,.0f} {self._unit}/s{bandwidth}, ETA {timedelta(seconds=round((total - done) / rate))}"

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def stack_environment() -> None:
    """Take over the local stack's addresses and keys, if one runs and the environment names no others."""
    from cluster import local

    stack = local.current()
    if stack is not None:
        for name, value in local.client_environment(stack).items():
            os.environ.setdefault(name, value)


def open_cluster(cluster: str) -> Profile:
    """Resolve a cluster and take over its environment, so that stores and MLflow are reached as its jobs reach them."""
    from cluster import profiles

    profile = profiles.resolve(cluster)
    os.environ.update(profile.env)
    return profile
