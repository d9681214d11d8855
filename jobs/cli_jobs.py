"""The commands of `tessera` for runs on a cluster: submit one, list, follow, stop its jobs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from datasets_prep.errors import UserError
from jobs.terminal import as_json, emit, note, on_cluster, open_cluster

if TYPE_CHECKING:
    from cluster.profiles import Profile
    from jobs.submit import Submission


follow_job = click.option(
    "--follow/--no-follow", default=True, show_default=True, help="Show the log until the job ends."
)


@click.command(
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
@follow_job
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
    from jobs import forecast, plan, recipes

    if resume is None and allowed or resume is not None and new:
        raise UserError("--allow-change goes with --resume RUN, and --new does not: add the one or drop the other")
    if allowed:
        overrides += (f"checkpoint.allow_changes=[{', '.join(allowed)}]",)
    config = recipes.load(recipe, overrides)
    profile = open_cluster(cluster)
    made = plan.make(config)
    if not as_json:
        for name, value in made.rows():
            click.echo(f"{name:<10} {value}")
    from jobs import submit as submitting

    submitting.prepare(made, profile)
    found = forecast.at(made, profile)
    if not as_json:
        for name, value in [] if found is None else found.rows():
            click.echo(f"{name:<10} {value}")
    done = submitting.submit(made, profile, dry_run=dry_run, new=new, resume=resume)
    _finish(done, profile, made.summary() | ({} if found is None else found.summary()), follow, as_json)


def _finish(done: Submission, profile: Profile, plan: dict[str, Any], follow: bool, as_json: bool) -> None:
    """Say what a submission did, and show the job's log and the run's result."""
    _announce(done, plan, as_json, follow)
    if done.state == "finished":
        _show_result(profile, done.run, as_json)
    elif done.job and follow:
        sys.exit(_follow(profile, done.run, done.job, as_json))


def _announce(done: Submission, plan: dict[str, Any], as_json: bool, follow: bool) -> None:
    if as_json:
        if done.state != "finished" and not (done.job and follow):
            emit(
                {
                    "run": done.run,
                    "state": done.state,
                    "job": done.job,
                    "package": done.package,
                    "package_bytes": done.package_bytes,
                    **plan,
                }
            )
        return
    click.echo(f"{'package':<10} {done.package_bytes / 1024:.0f} KiB at {done.commit or 'no commit'}")
    for name in done.untracked:
        click.echo(f"warning: {name} is not tracked by git and not packed: `git add` it", err=True)
    click.echo(f"{'run':<10} {done.run}  {done.state}" + (f" as job {done.job}" if done.job else ""))


def _follow(profile: Profile, run: str, job: str, as_json: bool) -> int:
    """Show a job's log and its result; the exit code is the job's, 130 when the person stops watching."""
    code = follow_log(profile, run, job, as_json)
    if code == 0:
        _show_result(profile, run, as_json)
    return code


def follow_log(profile: Profile, run: str, job: str, as_json: bool) -> int:
    """Show a job's log; the exit code is the job's, 130 when the person stops watching."""
    from jobs import submit as submitting

    with submitting.job_client(profile) as client:
        try:
            return submitting.follow(client, job, _line_printer(as_json))
        except KeyboardInterrupt:
            note(f"\nthe job goes on: `tessera jobs attach {run}` follows it, `tessera jobs stop {run}` stops it")
            return 130


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
    from jobs.sensitivity import summary_line
    from jobs.table import render
    from service.data.store import Store

    result = submitting.read_result(Store(profile.storage_uri), run)
    assert result is not None
    if as_json:
        emit({"run": run, **result})
    elif "sweep" in result:
        click.echo(summary_line(result))
    else:
        click.echo(render(result))
        click.echo(f"encoder {result.get('model_uri', 'not registered')}   MLflow run {result['mlflow_run']}")


def tell_dead(profile: Profile) -> None:
    """End the MLflow runs whose driver died, and say which."""
    from jobs import submit as submitting

    for run in submitting.reconcile(profile):
        note(f"{run} is over, its driver died: MLflow knows now")


@click.group()
def jobs() -> None:
    """List, follow and stop jobs."""


@jobs.command("list", epilog="\b\nExamples:\n  tessera jobs list\n  tessera jobs list --cluster mine.yaml --json")
@on_cluster
@as_json
def list_jobs(cluster: str, as_json: bool) -> None:
    """List the runs that have jobs, and how far they are, by the start of the newest job."""
    from jobs import listing
    from jobs import submit as submitting
    from service.data.store import Store

    profile = open_cluster(cluster)
    tell_dead(profile)
    with submitting.job_client(profile) as client:
        found = submitting.jobs_of(client)
    rows = listing.rows(found, Store(profile.storage_uri))
    if as_json:
        emit({"jobs": rows})
    elif rows:
        click.echo(listing.render(rows), nl=False)
    else:
        click.echo("no run has a job on this cluster: `tessera submit RECIPE` starts one")


@jobs.command(
    epilog="\b\nExamples:\n  tessera jobs logs demo-1a2b3c4d5e\n  tessera jobs logs demo-1a2b3c4d5e --no-follow"
)
@click.argument("run")
@on_cluster
@click.option("--follow/--no-follow", default=True, show_default=True)
def logs(run: str, cluster: str, follow: bool) -> None:
    """Show the log of a RUN's newest job, or of a job; the exit code is the job's when followed."""
    from jobs import submit as submitting

    profile = open_cluster(cluster)
    with submitting.job_client(profile) as client:
        name, job = submitting.find_job(client, run)
        if not follow:
            click.echo(client.get_job_logs(job), nl=False)
            return
    sys.exit(_follow(profile, name, job, as_json=False))


@jobs.command(epilog="\b\nExamples:\n  tessera jobs attach demo-1a2b3c4d5e\n\nCtrl-C detaches; the job goes on.")
@click.argument("run")
@on_cluster
@as_json
def attach(run: str, cluster: str, as_json: bool) -> None:
    """Follow the job of RUN that is alive, and show the result; the exit code is the job's."""
    from jobs import submit as submitting

    profile = open_cluster(cluster)
    with submitting.job_client(profile) as client:
        cure = f"`tessera jobs logs {run}` shows its log, `tessera jobs retry {run}` goes on with the run"
        name, job = submitting.find_job(client, run, cure)
    sys.exit(_follow(profile, name, job, as_json))


@jobs.command(epilog="\b\nExamples:\n  tessera jobs stop demo-1a2b3c4d5e")
@click.argument("run")
@on_cluster
@as_json
def stop(run: str, cluster: str, as_json: bool) -> None:
    """Stop RUN's job after a checkpoint; `tessera jobs retry RUN`, or the same `submit`, goes on from it."""
    from jobs import submit as submitting
    from jobs.tune_submit import TRIALS
    from service.data.store import Store

    profile = open_cluster(cluster)
    with submitting.job_client(profile) as client:
        name, job = submitting.find_job(client, run, "nothing to stop")
        submitting.stop(client, job)
    kept = Store(profile.storage_uri).sub(name)
    step = submitting.newest_step(kept)
    if as_json:
        emit({"run": name, "job": job, "step": step})
        return
    at = "before its first checkpoint" if step is None else f"with a checkpoint of step {step:,}"
    if kept.exists(TRIALS):
        at = "and the runs of its trials, each with a checkpoint of its own"
    click.echo(f"stopped {job} {at}; `tessera jobs retry {name}` goes on")


@jobs.command(
    epilog="\b\nExamples:\n  tessera jobs retry demo-1a2b3c4d5e\n  tessera jobs retry demo-1a2b3c4d5e --no-follow"
)
@click.argument("run")
@on_cluster
@follow_job
@as_json
def retry(run: str, cluster: str, follow: bool, as_json: bool) -> None:
    """Go on with RUN by the code and config that it was submitted with last."""
    from jobs import submit as submitting

    profile = open_cluster(cluster)
    _finish(submitting.retry(profile, run), profile, {}, follow, as_json)


@click.command(
    epilog="\b\nExamples:\n  tessera package rapid data.uri=s3://data/cifar10 --cluster rtx4090 -o rapid-4090\n"
    "  tessera package mine.yaml --cluster mine-cluster.yaml -o bundle\n\n"
    "The folder's README.md says how to run it."
)
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@on_cluster
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder to write; absent or empty.")
@as_json
def package(recipe: str, overrides: tuple[str, ...], cluster: str, out: Path, as_json: bool) -> None:
    """Write RECIPE as a folder that runs where the repository is not: code, config, lock, manifests, run.sh."""
    from cluster import profiles
    from jobs import bundle, plan, recipes

    config = plan.absolute(recipes.load(recipe, overrides))
    file = None if "://" in cluster else profiles.read(cluster)
    written = bundle.write(config, cluster, file, out)
    if as_json:
        emit({"out": str(out), "bytes": written.size, "files": written.files, "commit": written.commit})
    else:
        click.echo(
            f"{out}: {written.size / 1024:,.0f} KiB at {written.commit or 'no commit'}; {out}/README.md says how"
        )


COMMANDS: tuple[click.Command, ...] = (submit, jobs, package)
