"""The `tessera` command. Each command imports what it needs when it runs, so that help and errors come at once."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import click

from datasets_prep.errors import UserError
from jobs import cli_checkpoints, cli_cluster, cli_data, cli_doctor, cli_jobs, cli_plan, cli_shards, cli_tune
from jobs.terminal import as_json, emit, on_cluster, open_cluster, stack_environment

_EXAMPLES = """
\b
Examples:
  tessera up                                     start Ray, MLflow and storage on this machine
  tessera shard digits --out data/digits         write the embedded data set as shards
  tessera submit demo                            train, follow, register the encoder
  tessera submit rapid optim.lr=0.3 --dry-run    show what would run, spend nothing
  tessera evaluate models:/demo@champion         score a registered encoder
  tessera down                                   stop what `up` started
"""


@click.group(epilog=_EXAMPLES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="tessera-jepa")
def cli() -> None:
    """Train, evaluate and register joint-embedding predictive encoders."""


def main() -> None:
    """Run the command line: exit code 2 for what the user can mend, without a traceback."""
    try:
        cli(standalone_mode=False)
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(130)


@cli.command(epilog="\b\nExamples:\n  tessera up\n  tessera up --data runs/demo\n  tessera up --s3")
@click.option("--data", type=click.Path(path_type=Path, file_okay=False), default=Path("runs/local"), show_default=True)
@click.option("--s3", is_flag=True, help="Also start an S3 server, and keep runs in it.")
@click.option("--cpus", type=click.IntRange(1), help="CPUs that Ray may use; all by default.")
@as_json
def up(data: Path, s3: bool, cpus: int | None, as_json: bool) -> None:
    """Start the local stack: Ray (token on), MLflow, and an S3 server if asked for."""
    from cluster import local

    stack = local.up(data, s3=s3, cpus=cpus, report=lambda line: click.echo(line, err=as_json))
    cli_jobs.tell_dead(open_cluster("local"))
    _links(as_json)
    if not as_json:
        click.echo(f"runs are kept in {stack.storage_uri}; `tessera down` stops the stack and keeps them")


@cli.command(epilog="\b\nExamples:\n  tessera down")
def down() -> None:
    """Stop exactly what `tessera up` started; data stays."""
    from cluster import local

    stack = local.down()
    click.echo(
        "no stack runs on this machine" if stack is None else f"stopped; `tessera up --data {stack.data}` reopens"
    )


@cli.command(epilog="\b\nExamples:\n  tessera status\n  tessera status --json")
@as_json
def status(as_json: bool) -> None:
    """Show the local stack's servers; exit code 1 when one of them is down."""
    from cluster import local

    servers = local.status()
    if as_json:
        emit({"servers": [server.model_dump() for server in servers]})
    elif not servers:
        click.echo("no stack runs on this machine: `tessera up` starts one")
    for server in [] if as_json else servers:
        state = f"{server.memory / 2**20:.0f} MiB" if server.alive else "down"
        click.echo(f"{server.name:<8} {server.address:<28} pid {server.pid:<8} {state}")
    sys.exit(0 if servers and all(server.alive for server in servers) else 1)


@cli.command(epilog="\b\nExamples:\n  tessera ui\n  tessera ui --open")
@click.option("--open", "open_browser", is_flag=True, help="Open the pages in a browser.")
@as_json
def ui(open_browser: bool, as_json: bool) -> None:
    """Print links to the MLflow and Ray pages of the local stack."""
    links = _links(as_json)
    if open_browser:
        import webbrowser

        for link in links.values():
            webbrowser.open(link)


def _links(as_json: bool) -> dict[str, str]:
    from cluster import local

    stack = local.current()
    if stack is None:
        raise UserError("no stack runs on this machine: `tessera up` starts one")
    links = {"mlflow": stack.mlflow_uri, "ray": stack.ray_address}
    if as_json:
        emit(links | {"storage": stack.storage_uri, "s3": stack.s3_endpoint})
    else:
        click.echo(f"MLflow  {links['mlflow']}\nRay     {links['ray']}")
        token = stack.env.get("RAY_AUTH_TOKEN_PATH")
        if token:
            click.echo(f"        (asks for the token in {token})")
    return links


for _command in (
    *cli_cluster.COMMANDS,
    *cli_data.COMMANDS,
    *cli_doctor.COMMANDS,
    *cli_jobs.COMMANDS,
    *cli_plan.COMMANDS,
    *cli_shards.COMMANDS,
    *cli_tune.COMMANDS,
    cli_checkpoints.checkpoints,
):
    cli.add_command(_command)


@cli.command(
    epilog="\b\nExamples:\n  tessera evaluate models:/demo@champion\n"
    "  tessera evaluate models:/cifar10-cpu/3 --data s3://data/cifar10 --json"
)
@click.argument("model")
@click.option("--data", help="Data set to evaluate on; by default the one it was trained on.")
@click.option("--labels", multiple=True, type=click.IntRange(1), help="Labels a class of a few-label probe; repeat it.")
@click.option("--tracking-uri", envvar="MLFLOW_TRACKING_URI", help="MLflow server; by default the local stack's.")
@as_json
def evaluate(model: str, data: str | None, labels: tuple[int, ...], tracking_uri: str | None, as_json: bool) -> None:
    """Score a registered encoder MODEL (models:/NAME@ALIAS) beside raw pixels and random weights."""
    stack_environment()
    from jobs.evaluate import evaluate as run_evaluation
    from jobs.table import render

    overrides = {"labels_per_class": labels} if labels else {}
    result = run_evaluation(_tracking(tracking_uri), model, data, overrides)
    if as_json:
        emit(result)
        return
    click.echo(render(result))
    if result["trained_on"] != result["fingerprint"]:
        click.echo(f"note: trained on data {result['trained_on']}, evaluated on {result['fingerprint']}")


def _tracking(uri: str | None) -> str:
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise UserError("no MLflow server is known: start the stack with `tessera up`, or give --tracking-uri")
    return uri


@cli.command(epilog="\b\nExamples:\n  tessera register demo-1a2b3c4d5e")
@click.argument("run")
@on_cluster
@as_json
def register(run: str, cluster: str, as_json: bool) -> None:
    """Register the encoder of a trained RUN again, after MLflow failed it; the same run keeps its version."""
    from jobs import train

    profile = open_cluster(cluster)
    result = train.register_again(run, profile.storage_uri, profile.tracking_uri)
    if as_json:
        emit(result)
    else:
        click.echo(f"{result['model_uri']}")


@cli.command(
    epilog="\b\nExamples:\n  tessera sync demo-1a2b3c4d5e\n  tessera sync demo-1a2b3c4d5e --cluster a100x8 --json"
)
@click.argument("run")
@on_cluster
@as_json
def sync(run: str, cluster: str, as_json: bool) -> None:
    """Send the metrics of RUN that MLflow does not have yet."""
    from jobs import train
    from service import tracking

    profile = open_cluster(cluster)
    store, state = train.find_run(run, profile.storage_uri)
    sent = tracking.sync(store, profile.tracking_uri, state["mlflow_run"])
    if as_json:
        emit({"run": run, "sent": sent})
    else:
        click.echo(f"sent {sent} values")


@cli.command(
    epilog="\b\nExamples:\n  tessera report demo-1a2b3c4d5e\n  tessera report runs/local/runs/demo-1a2b3c4d5e --json\n"
    "  tessera report demo-1a2b3c4d5e --gpus 64 --mtbf-hours 1"
)
@click.argument("run")
@on_cluster
@click.option("--gpus", type=click.IntRange(1), default=64, show_default=True, help="Of the job to model.")
@click.option(
    "--mtbf-hours",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    help="Between its failures.",
)
@as_json
def report(run: str, cluster: str, gpus: int, mtbf_hours: float, as_json: bool) -> None:
    """Show where the wall time of RUN went: steps, restarts, checkpoints.

    RUN is a name, a folder or an s3:// address; it may still train. The picture is kept as pictures/goodput.png.
    """
    from jobs import report as reporting

    store = reporting.open_run(run, "" if "/" in run else open_cluster(cluster).storage_uri)
    found, expected = reporting.report(store, gpus, mtbf_hours)
    if as_json:
        emit({"run": run, **reporting.plain(found, expected)})
    else:
        click.echo(reporting.render(found, expected, gpus, mtbf_hours), nl=False)


@cli.command(epilog="\b\nExamples:\n  tessera recipes\n  tessera recipes --json")
@as_json
def recipes(as_json: bool) -> None:
    """List the recipes."""
    from jobs import recipes as shipped

    rows = {name: shipped.describe(name) for name in shipped.names()}
    if as_json:
        emit(rows)
    for name, text in {} if as_json else rows.items():
        click.echo(f"{name:<{max(map(len, rows))}} {text}")


@cli.command(
    epilog="\b\nExamples:\n  tessera masks ijepa-cpu --out masks.png\n"
    "  tessera masks ijepa-cpu family.masking.kind=guide"
)
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=Path("masks.png"), show_default=True)
@as_json
def masks(recipe: str, overrides: tuple[str, ...], out: Path, as_json: bool) -> None:
    """Draw the masks of RECIPE and how often each patch is context and target."""
    from jobs import recipes as shipped
    from service.config import Jepa
    from service.plots import mask_sheet

    config = shipped.load(recipe, overrides)
    if not isinstance(config.family, Jepa):
        raise UserError(f"family.kind={config.family.kind} draws no masks: choose a recipe such as ijepa-cpu")
    grid = config.family.grid(config.data.image_size)
    built = config.family.maskings(config.data.image_size)[-1]
    mask_sheet(built, grid, config.seed).save(out)
    if as_json:
        emit({"out": str(out), "grid": grid, "context_tokens": built.context_tokens})
    else:
        click.echo(f"{out}: {grid[0]}×{grid[1]} patches, context {built.context_tokens}")


@cli.group()
def config() -> None:
    """Show configs and their schema."""


@config.command(
    epilog="\b\nExamples:\n  tessera config show rapid\n  tessera config show rapid optim.lr=0.3 > mine.yaml"
)
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@as_json
def show(recipe: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Print every setting of RECIPE with its overrides."""
    from jobs import recipes as shipped

    resolved = shipped.load(recipe, overrides)
    click.echo(json.dumps(resolved.plain()) if as_json else shipped.to_yaml(resolved), nl=as_json)


@config.command(epilog="\b\nExamples:\n  tessera config schema > recipe.schema.json")
def schema() -> None:
    """Print the JSON schema of recipes, for editors that complete and check YAML."""
    from jobs import recipes as shipped

    click.echo(shipped.schema())


if __name__ == "__main__":
    main()
