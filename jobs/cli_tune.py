"""The commands of `tessera` for sweeps."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from jobs.terminal import as_json, emit, on_cluster, open_cluster

_OWN_HELP = ("-h", "--help")


class _Sweeps(click.Group):
    """Takes `tessera tune SWEEP` as `tessera tune run SWEEP`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Called by click with what follows `tune`."""
        if args and args[0] not in self.commands and args[0] not in _OWN_HELP:
            args = ["run", *args]
        return super().parse_args(ctx, args)


@click.group(
    cls=_Sweeps,
    epilog="\b\nExamples:\n  tessera tune list\n  tessera tune vicreg-grid data.uri=s3://data/cifar10\n"
    "  tessera tune rapid-lr trials=8 scheduler.kind=none --dry-run\n"
    "  tessera tune mine.yaml name=mine-2 --no-follow\n  tessera tune report vicreg-grid\n\n"
    "The same command again follows the sweep, goes on with it or shows its result; `tessera tune run --help` "
    "shows its options.",
)
def tune() -> None:
    """Search settings: `tessera tune SWEEP [KEY=VALUE]...` tries points of a space, each as a run of its own."""


@tune.command(
    "run",
    epilog="\b\nExamples:\n  tessera tune run vicreg-grid data.uri=s3://data/cifar10 --dry-run\n"
    "  tessera tune vicreg-grid data.uri=s3://data/cifar10       the same without `run`\n"
    "  tessera tune mine.yaml name=mine-2 --cluster rtx4090 --no-follow",
)
@click.argument("sweep")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@on_cluster
@click.option("--dry-run", is_flag=True, help="Check and print the plan; submit nothing.")
@click.option("--follow/--no-follow", default=True, show_default=True, help="Show the log until the job ends.")
@as_json
def run(sweep: str, overrides: tuple[str, ...], cluster: str, dry_run: bool, follow: bool, as_json: bool) -> None:
    """Try points of SWEEP's space on a cluster; KEY is one of the sweep, or a setting of all its trials."""
    from jobs import plan
    from jobs import sweep as sweeps

    settings, base = sweeps.load(sweep, overrides)
    profile = open_cluster(cluster)
    made = plan.make(base)
    room = sweeps.check_room(settings, base, profile.cpus, profile.gpus)
    planned = sweeps.summary(settings, base, room)
    if not as_json:
        for name, value in (*made.rows(), *planned.items()):
            click.echo(f"{name:<12} {value}")
    from jobs import tune_submit

    done = tune_submit.submit(settings, made, profile, dry_run=dry_run)
    if as_json and not (done.job and follow):
        emit({"sweep": done.run, "state": done.state, "job": done.job, **planned, **made.summary()})
    elif not as_json:
        click.echo(f"{'sweep':<12} {done.run}  {done.state}" + (f" as job {done.job}" if done.job else ""))
    if done.job and follow:
        from jobs.cli_jobs import follow_log

        code = follow_log(profile, done.run, done.job, as_json)
        if code:
            sys.exit(code)
    if done.state == "finished" or done.job and follow:
        _show(profile.storage_uri, settings.name, None, as_json)


@tune.command(
    epilog="\b\nExamples:\n  tessera tune report vicreg-grid\n  tessera tune report vicreg-grid --out pictures"
)
@click.argument("name", metavar="RUN")
@on_cluster
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the best recipe and the pictures; by default one of the sweep's name.",
)
@as_json
def report(name: str, cluster: str, out: Path | None, as_json: bool) -> None:
    """Show the trials of sweep RUN, which settings matter, and write its best recipe and pictures.

    RUN may still go on. Pictures: heat map over two settings, parallel coordinates, importance.
    """
    profile = open_cluster(cluster)
    _show(profile.storage_uri, name, out or Path(name), as_json)


def _show(storage: str, name: str, out: Path | None, as_json: bool) -> None:
    from jobs import sensitivity

    settings, entries, result = sensitivity.read(storage, name)
    written = sensitivity.write(settings, entries, result, out) if out else []
    if as_json:
        emit({**result, "trials": entries, "written": written})
        return
    click.echo(sensitivity.render(settings, result, entries))
    for path in written:
        click.echo(f"wrote {path}")


@tune.command("list", epilog="\b\nExamples:\n  tessera tune list\n  tessera tune list --json")
@as_json
def list_sweeps(as_json: bool) -> None:
    """List the sweeps that ship with Tessera."""
    from jobs import sweep as sweeps

    rows: dict[str, Any] = {name: sweeps.describe(name) for name in sweeps.names()}
    if as_json:
        emit(rows)
    for name, text in {} if as_json else rows.items():
        click.echo(f"{name:<{max(map(len, rows))}} {text}")


COMMANDS: tuple[click.Command, ...] = (tune,)
