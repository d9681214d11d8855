"""What the commands share on the terminal: JSON lines, notes, progress, the local stack's environment."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import click

as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON line, for programs.")


def emit(row: dict[str, Any]) -> None:
    """Print one JSON line."""
    click.echo(json.dumps(row, ensure_ascii=False, default=str))


def note(line: str) -> None:
    """Print a line on stderr."""
    click.echo(line, err=True)


class progress:  # noqa: N801  (reads as a function)
    """Progress with rate and ETA on stderr; silent when that is not a terminal."""

    def __init__(self, title: str, unit: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
        self._bar = Progress(
            *columns, TextColumn("ETA"), TimeRemainingColumn(), console=console, disable=not console.is_terminal
        )
        self._task = self._bar.add_task(title, total=None)

    def __enter__(self) -> Callable[[int, int], None]:
        self._bar.start()
        return self._advance

    def _advance(self, done: int, total: int) -> None:
        self._bar.update(self._task, completed=done, total=total)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def stack_environment() -> None:
    """Take over the local stack's addresses and keys, if one runs and the environment names no others."""
    from cluster import local

    stack = local.current()
    if stack is not None:
        for name, value in local.client_environment(stack).items():
            os.environ.setdefault(name, value)
