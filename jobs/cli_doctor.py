"""`tessera doctor` and `tessera gc`: what is wrong before a job is tried, and what dead ones left."""

from __future__ import annotations

import os
import re
import sys
import time
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from datasets_prep.errors import UserError
from jobs.terminal import as_json, emit, note, on_cluster

if TYPE_CHECKING:
    from cluster.doctor import Finding
    from cluster.profiles import Located
    from jobs.leftovers import Row

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red", "skipped": "bright_black"}
_NAME = 24
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


@click.command(
    epilog="\b\nExamples:\n  tessera doctor\n  tessera doctor --cluster a100x8 --recipe ijepa-vitb-imagenet\n"
    "  tessera doctor --data s3://data/cifar10 --json\n\n"
    "Exit code 0 when nothing fails, 1 when something does, 2 for bad input."
)
@on_cluster
@click.option("--data", help="Data set that has to be there: folder or s3:// address.")
@click.option("--recipe", help="Recipe whose data, batches and workers have to fit.")
@as_json
def doctor(cluster: str, data: str | None, recipe: str | None, as_json: bool) -> None:
    """Check this host, the cluster, its storage, MLflow and the data, and say what cures what is wrong."""
    from jobs import doctor as checks
    from jobs import recipes

    begin = time.monotonic()
    config = None if recipe is None else recipes.load(recipe, [f"data.uri={data}"] if data else [])
    located, unlocated = _locate(cluster)
    subject = checks.Subject(located, {**os.environ, **(located.env if located else {})}, data, config)
    os.environ.update(located.env if located else {})
    found: list[Finding] = []
    for finding in checks.examine(subject, unlocated):
        found.append(finding)
        if not as_json:
            _show(finding)
    states = Counter(finding.state for finding in found)
    if as_json:
        emit({"checks": [asdict(each) for each in found], **states, "seconds": round(time.monotonic() - begin, 1)})
    else:
        click.echo(", ".join(f"{count} {state}" for state, count in states.items()) + f", {_since(begin)}")
    sys.exit(1 if states["fail"] else 0)


def _locate(cluster: str) -> tuple[Located | None, UserError | None]:
    """Find the cluster; a profile that exists and leads nowhere is a finding, an unknown one is bad input."""
    from cluster import local, profiles

    if not cluster.startswith(("http://", "https://")):
        profiles.read(cluster)
    try:
        return profiles.locate(cluster, local.last_started()), None
    except UserError as error:
        return None, error


def _show(finding: Finding) -> None:
    state = click.style(f"{finding.state:<8}", fg=_COLOURS[finding.state])
    click.echo(f"{state}{finding.name:<{_NAME}}{finding.found}")
    if finding.cure:
        click.echo(f"{'':<{_NAME + 8}}→ {finding.cure}")


def _since(begin: float) -> str:
    return f"{time.monotonic() - begin:.1f} s"


class Duration(click.ParamType[float]):
    """A number and its unit, such as 30m, 12h or 2d; as seconds."""

    name = "duration"

    def convert(self, value: str | float, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Called by click, on defaults too."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", str(value))
        if match is None:
            self.fail(f"{value!r} is no duration: write a number and s, m, h or d, such as 12h", param, ctx)
        return float(match[1]) * _UNITS[match[2]]


@click.command(
    epilog="\b\nExamples:\n  tessera gc --dry-run\n  tessera gc --older-than 7d\n"
    "  tessera gc --cluster a100x8 --json\n\n"
    "What a living run holds is never touched. Exit code 1 when something could not be removed or looked at."
)
@on_cluster
@click.option("--dry-run", is_flag=True, help="Show what would be removed; remove nothing.")
@click.option("--older-than", type=Duration(), default="1d", show_default=True, help="Leave alone what is younger.")
@click.option(
    "--cache-gb", type=click.FloatRange(0), default=20.0, show_default=True, help="Keep that much cached data."
)
@as_json
def gc(cluster: str, dry_run: bool, older_than: float, cache_gb: float, as_json: bool) -> None:
    """Remove what dead runs left on this host, on the nodes, in the storage, in MLflow and in Ray."""
    from jobs import leftovers

    located, unlocated = _locate(cluster)
    os.environ.update(located.env if located else {})
    rows: list[Row] = []
    unreached: list[str] = [str(unlocated)] if unlocated else []
    for part in leftovers.parts(located, older_than, cache_gb * 1e9, dry_run):
        try:
            for row in part():
                if (row.host, row.kind, row.where) not in {(known.host, known.kind, known.where) for known in rows}:
                    rows.append(row)
                    if not as_json:
                        _show_row(row)
        except UserError as error:
            unreached.append(str(error))
    size = sum(row.size for row in rows if row.state != "kept")
    if as_json:
        emit({"dry_run": dry_run, "leftovers": [asdict(row) for row in rows], "bytes": size, "unreached": unreached})
    else:
        for reason in unreached:
            note(f"not looked at: {reason}")
        click.echo(f"{len(rows)} leftovers, {size / 1e6:,.1f} MB{', nothing was removed' if dry_run else ' removed'}")
    sys.exit(1 if located and unreached or any(row.state == "kept" for row in rows) else 0)


def _show_row(row: Row) -> None:
    age = "" if row.age is None else f"{row.age / 3600:.1f} h old"
    click.echo(f"{row.state:<8} {row.kind:<18} {row.size / 1e6:>10,.1f} MB  {age:<12} {row.where}")
    if row.reason:
        click.echo(f"{'':<9}{row.reason}")


COMMANDS: tuple[click.Command, ...] = (doctor, gc)
