"""`tessera plan`: what a run would take on a cluster; neither has to be at hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from datasets_prep.errors import UserError
from jobs.terminal import as_json, emit, stack_environment

if TYPE_CHECKING:
    from cluster.profiles import ProfileFile
    from jobs.plan import Outline, Plan
    from service.config import RunConfig

_SECONDS = 5.0  # that an index of public data is waited for


@click.command(
    epilog="\b\nExamples:\n  tessera plan demo data.uri=data/digits\n"
    "  tessera plan ijepa-vitb-imagenet --cluster a100x8\n"
    "  tessera plan ijepa-vitb-imagenet --cluster rtx4090 parallel.workers=1 --samples 1281167\n"
    "  tessera plan rapid --cluster mine.yaml --json"
)
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--cluster", default="local", show_default=True, help="Profile by name or file; nothing has to run.")
@click.option("--samples", type=click.IntRange(1), help="Training samples of data that is not looked at.")
@as_json
def plan(recipe: str, overrides: tuple[str, ...], cluster: str, samples: int | None, as_json: bool) -> None:
    """Say what RECIPE would take on a cluster: steps, memory, time, cost. Nothing is submitted, no cluster is asked.

    Steps come from the data's index, or from --samples; of a public data set that cannot be read, from its published
    size. Bad input, and a step that does not fit the memory, end with exit code 2 and the nearest setting that fits.
    """
    from cluster import profiles
    from jobs import forecast, package, recipes

    file = profiles.read(cluster)
    config = recipes.load(recipe, overrides)
    made = _steps(config, samples)
    found = forecast.forecast(made, cluster, file)
    packed = sum(map(package.size, package.collect().files.values()))
    if as_json:
        emit({"recipe": config.name, **made.summary(), **found.summary(), "package_bytes": packed, **_links(file)})
        return
    rows = [*made.rows(), *found.rows(), ("package", f"{packed / 1024:.0f} KiB")]
    for name, value in [*rows, *((name, value or "not known") for name, value in _links(file).items())]:
        click.echo(f"{name:<10} {value}")


def _steps(config: RunConfig, samples: int | None) -> Plan | Outline:
    """Plan with the data, or without it where its index cannot be read or `samples` stand for it."""
    from jobs.plan import is_public, make, outline
    from service.data.split import read_index
    from service.data.store import Store

    if samples is not None:
        return outline(config, samples)
    stack_environment()
    if is_public(config.data.uri):
        try:
            read_index(Store(config.data.uri, _SECONDS))
        except (UserError, OSError):
            return outline(config)
    return make(config)


def _links(file: ProfileFile) -> dict[str, str | None]:
    """Where jobs, MLflow and runs would be found, as the profile says."""
    return {"jobs": file.jobs_address, "mlflow": file.tracking_uri, "storage": file.storage_uri}


COMMANDS: tuple[click.Command, ...] = (plan,)
