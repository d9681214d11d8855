"""The `tessera` command. Each command imports what it needs when it runs, so that help and errors come at once."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from datasets_prep.errors import UserError
from jobs import cli_checkpoints, cli_data, cli_shards
from jobs.terminal import as_json, emit, note, stack_environment

if TYPE_CHECKING:
    from cluster.profiles import Profile
    from jobs.submit import Submission

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

on_cluster = click.option(
    "--cluster", default="local", show_default=True, help="Profile name, or a Ray job address http://host:port."
)


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
    _reconcile(_profile("local"))
    _links(as_json)
    if not as_json:
        click.echo(f"runs are kept in {stack.storage_uri}; `tessera down` stops the stack and keeps them")


@cli.command()
def down() -> None:
    """Stop exactly what `tessera up` started; data stays."""
    from cluster import local

    stack = local.down()
    click.echo(
        "no stack runs on this machine" if stack is None else f"stopped; `tessera up --data {stack.data}` reopens"
    )


@cli.command()
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


@cli.command()
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


for _command in (*cli_data.COMMANDS, *cli_shards.COMMANDS, cli_checkpoints.checkpoints):
    cli.add_command(_command)


@cli.command(
    epilog="\b\nExamples:\n  tessera submit demo\n  tessera submit rapid optim.lr=0.3 schedule.epochs=100\n"
    "  tessera submit cifar10-cpu data.uri=s3://data/cifar10 --no-follow\n"
    "  tessera submit mine.yaml --dry-run\n"
    "  tessera submit demo optim.lr=0.005 --resume demo-1a2b3c4d5e --allow-change optim.lr\n\n"
    "The same command again follows, resumes or shows the run."
)
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@on_cluster
@click.option("--dry-run", is_flag=True, help="Check and print the plan; submit nothing.")
@click.option("--follow/--no-follow", default=True, show_default=True, help="Show the log until the job ends.")
@click.option("--new", is_flag=True, help="Repeat a run that has finished.")
@click.option("--resume", metavar="RUN", help="Go on with this unfinished run, whatever config and code began it.")
@click.option("--allow-change", "allowed", metavar="KEY", multiple=True, help="Setting that may differ from RUN's.")
@as_json
def submit(
    recipe: str,
    overrides: tuple[str, ...],
    cluster: str,
    dry_run: bool,
    follow: bool,
    new: bool,
    resume: str | None,
    allowed: tuple[str, ...],
    as_json: bool,
) -> None:
    """Train RECIPE on a cluster: start the run, resume it, follow it or show its result."""
    from jobs import plan, recipes

    if resume is None and allowed or resume is not None and new:
        raise UserError("--allow-change goes with --resume RUN, and --new does not: add the one or drop the other")
    if allowed:
        overrides += (f"checkpoint.allow_changes=[{', '.join(allowed)}]",)
    config = recipes.load(recipe, overrides)
    profile = _profile(cluster)
    made = plan.make(config)
    if not as_json:
        for name, value in made.rows():
            click.echo(f"{name:<10} {value}")
    from jobs import submit as submitting

    submitting.prepare(made, profile)
    done = submitting.submit(made, profile, dry_run=dry_run, new=new, resume=resume)
    _announce(done, made.summary(), as_json, follow)
    if done.state == "finished":
        _show_result(profile, done.run, as_json)
    elif done.job and follow:
        sys.exit(_follow(profile, done.run, done.job, as_json))


def _announce(done: Submission, plan: dict[str, Any], as_json: bool, follow: bool) -> None:
    if as_json:
        if done.state != "finished" and not (done.job and follow):
            emit({"run": done.run, "state": done.state, "job": done.job, "package_bytes": done.package_bytes, **plan})
        return
    click.echo(f"{'package':<10} {done.package_bytes / 1024:.0f} KiB at {done.commit or 'no commit'}")
    for name in done.untracked:
        click.echo(f"warning: {name} is not tracked by git and not packed: `git add` it", err=True)
    click.echo(f"{'run':<10} {done.run}  {done.state}" + (f" as job {done.job}" if done.job else ""))


def _follow(profile: Profile, run: str, job: str, as_json: bool) -> int:
    """Show a job's log; the exit code is the job's, 130 when the person stops watching."""
    from jobs import submit as submitting

    with submitting.job_client(profile) as client:
        try:
            code = submitting.follow(client, job, _line_printer(as_json))
        except KeyboardInterrupt:
            note(f"\nthe job goes on: `tessera jobs logs {run}` follows it, `tessera jobs stop {run}` stops it")
            return 130
    if code == 0:
        _show_result(profile, run, as_json)
    return code


def _line_printer(as_json: bool) -> Any:
    """Print log lines; on a terminal, progress lines overwrite one another."""
    terminal = sys.stderr.isatty()
    overwrite = False

    def show(line: str) -> None:
        nonlocal overwrite
        if overwrite:
            click.echo("\r\x1b[K", nl=False, err=True)
        overwrite = terminal and line.startswith("step ")
        click.echo(line, nl=not overwrite, err=as_json or overwrite)

    return show


def _show_result(profile: Profile, run: str, as_json: bool) -> None:
    from jobs import submit as submitting
    from service.data.store import Store

    result = submitting.read_result(Store(profile.storage_uri), run)
    assert result is not None
    if as_json:
        emit({"run": run, **result})
    else:
        _table(result)
        click.echo(f"encoder {result['model_uri']}   MLflow run {result['mlflow_run']}")


def _table(result: dict[str, Any]) -> None:
    from jobs.table import render

    click.echo(render(result))


def _profile(cluster: str) -> Profile:
    """Resolve a cluster and take over its environment, so that stores and MLflow are reached as its jobs reach them."""
    from cluster import profiles

    profile = profiles.resolve(cluster)
    os.environ.update(profile.env)
    return profile


def _reconcile(profile: Profile) -> None:
    from jobs import submit as submitting

    for run in submitting.reconcile(profile):
        note(f"{run} is over, its driver died: MLflow knows now")


@cli.group()
def jobs() -> None:
    """List, follow and stop jobs."""


@jobs.command("list")
@on_cluster
@as_json
def list_jobs(cluster: str, as_json: bool) -> None:
    """List the jobs of runs, oldest first."""
    from jobs import submit as submitting

    profile = _profile(cluster)
    _reconcile(profile)
    with submitting.job_client(profile) as client:
        rows: list[dict[str, Any]] = [
            {
                "run": (job.metadata or {}).get("run"),
                "job": job.submission_id,
                "state": str(job.status.value),
                "started": job.start_time,
                "ended": job.end_time,
                "exit_code": job.driver_exit_code,
            }
            for job in submitting.jobs_of(client)
        ]
    if as_json:
        emit({"jobs": rows})
    for row in [] if as_json else rows:
        seconds = ((row["ended"] or 0) - (row["started"] or 0)) / 1000
        click.echo(f"{row['job']:<40} {row['state']:<10} {f'{seconds:.0f} s' if seconds > 0 else ''}")


@jobs.command()
@click.argument("run")
@on_cluster
@click.option("--follow/--no-follow", default=True, show_default=True)
def logs(run: str, cluster: str, follow: bool) -> None:
    """Show the log of a RUN's newest job, or of a job; the exit code is the job's when followed."""
    from jobs import submit as submitting

    profile = _profile(cluster)
    with submitting.job_client(profile) as client:
        job = submitting.find_job(client, run)
        assert job.submission_id is not None
        if not follow:
            click.echo(client.get_job_logs(job.submission_id), nl=False)
            return
    sys.exit(_follow(profile, (job.metadata or {})["run"], job.submission_id, as_json=False))


@jobs.command()
@click.argument("run")
@on_cluster
def stop(run: str, cluster: str) -> None:
    """Stop a RUN's job; `tessera submit` with the same arguments resumes from its last checkpoint."""
    from jobs import submit as submitting

    with submitting.job_client(_profile(cluster)) as client:
        job = submitting.find_job(client, run)
        assert job.submission_id is not None
        if job.status not in submitting.ALIVE:
            raise UserError(f"job {job.submission_id} has ended already ({job.status.value}): nothing to stop")
        client.stop_job(job.submission_id)
    click.echo(f"stopped {job.submission_id}")


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

    overrides = {"labels_per_class": labels} if labels else {}
    result = run_evaluation(_tracking(tracking_uri), model, data, overrides)
    if as_json:
        emit(result)
        return
    _table(result)
    if result["trained_on"] != result["fingerprint"]:
        click.echo(f"note: trained on data {result['trained_on']}, evaluated on {result['fingerprint']}")


def _tracking(uri: str | None) -> str:
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise UserError("no MLflow server is known: start the stack with `tessera up`, or give --tracking-uri")
    return uri


@cli.command()
@click.argument("run")
@on_cluster
@as_json
def register(run: str, cluster: str, as_json: bool) -> None:
    """Register the encoder of a trained RUN again, after MLflow failed it; the same run keeps its version."""
    from jobs import train

    profile = _profile(cluster)
    result = train.register_again(run, profile.storage_uri, profile.tracking_uri)
    if as_json:
        emit(result)
    else:
        click.echo(f"{result['model_uri']}")


@cli.command()
@click.argument("run")
@on_cluster
def sync(run: str, cluster: str) -> None:
    """Send the metrics of RUN that MLflow does not have yet."""
    from jobs import train
    from service import tracking

    profile = _profile(cluster)
    store, state = train.find_run(run, profile.storage_uri)
    click.echo(f"sent {tracking.sync(store, profile.tracking_uri, state['mlflow_run'])} values")


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

    store = reporting.open_run(run, "" if "/" in run else _profile(cluster).storage_uri)
    found, expected = reporting.report(store, gpus, mtbf_hours)
    if as_json:
        emit({"run": run, **reporting.plain(found, expected)})
    else:
        click.echo(reporting.render(found, expected, gpus, mtbf_hours), nl=False)


@cli.command()
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


@config.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@as_json
def show(recipe: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Print every setting of RECIPE with its overrides."""
    from jobs import recipes as shipped

    resolved = shipped.load(recipe, overrides)
    click.echo(json.dumps(resolved.plain()) if as_json else shipped.to_yaml(resolved), nl=as_json)


@config.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors that complete and check YAML."""
    from jobs import recipes as shipped

    click.echo(shipped.schema())


if __name__ == "__main__":
    main()
