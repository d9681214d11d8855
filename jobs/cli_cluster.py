"""`tessera cluster`: what the profiles say, and the manifests that start their clusters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from datasets_prep.errors import UserError
from jobs.terminal import as_json, emit

if TYPE_CHECKING:
    from cluster.profiles import ProfileFile

_TARGETS = ("ray-yaml", "kuberay", "rayjob", "compose", "slurm", "systemd")


@click.group()
def cluster() -> None:
    """Show cluster profiles and write the manifests that start them."""


@cluster.command("list", epilog="\b\nExamples:\n  tessera cluster list\n  tessera cluster list --json")
@as_json
def list_profiles(as_json: bool) -> None:
    """List the profiles that `--cluster` takes by name."""
    from cluster import profiles

    rows = {name: profiles.describe(name) for name in profiles.names()}
    if as_json:
        emit({name: _plain(profiles.read(name)) | {"description": text} for name, text in rows.items()})
    for name, text in {} if as_json else rows.items():
        click.echo(f"{name:<{max(map(len, rows))}} {text}")


@cluster.command(
    epilog="\b\nExamples:\n  tessera cluster show a100x8x4\n"
    "  tessera cluster show rtx4090 node.cpus=24 hosts=[10.0.0.5] > mine.yaml\n"
    "  tessera submit rapid --cluster mine.yaml"
)
@click.argument("profile")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@as_json
def show(profile: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Print every key of PROFILE, a name or a file, as YAML to make one's own from."""
    import yaml

    from cluster import profiles

    plain = _plain(profiles.read(profile, overrides))
    if as_json:
        emit(plain)
    else:
        click.echo(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), nl=False)


@cluster.command(
    epilog="\b\nExamples:\n  tessera cluster render a100x8x4 --for kuberay | kubectl apply -f -\n"
    "  tessera cluster render rtx4090 --for systemd -o units\n"
    "  tessera cluster render rtx4090x2 --for ray-yaml hosts=[10.0.0.5] ssh_user=ml -o .\n"
    "  tessera cluster render a100x8 --for slurm --run 'rapid data.uri=s3://data/cifar10' \\\n"
    "      storage_uri=s3://runs tracking_uri=http://mlflow:5000 -o .\n\n"
    "KEY=VALUE changes the profile. Manifests name secrets and hold none."
)
@click.argument("profile")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--for", "target", type=click.Choice(_TARGETS), required=True, help="What starts the cluster.")
@click.option("--run", metavar="'RECIPE KEY=VALUE'", default="", help="The job of a rayjob or slurm manifest.")
@click.option("-o", "--out", type=click.Path(path_type=Path, file_okay=False), help="Folder to write to, not stdout.")
@as_json
def render(profile: str, overrides: tuple[str, ...], target: str, run: str, out: Path | None, as_json: bool) -> None:
    """Write the manifests that start the cluster of PROFILE, or run a job on it."""
    import shlex

    from cluster import profiles
    from cluster import render as rendering

    file = profiles.read(profile, overrides)
    words = shlex.split(run)
    if words:
        _check_run(words, file, target)
    files = rendering.render(target, profile, file, words)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (out / name).write_text(text)
    written = [str(out / name) for name in files] if out is not None else []
    if as_json:
        emit({"files": files, "written": written})
        return
    for line in written if out is not None else files.values():
        click.echo(line, nl=out is not None)


def _check_run(words: list[str], file: ProfileFile, target: str) -> None:
    """Check that a recipe loads, fits the profile, and reads data that its nodes can find."""
    from jobs import plan, recipes

    config = recipes.load(words[0], words[1:])
    plan.check_resources(config, file.nodes * file.node.cpus, file.nodes * file.node.gpus)
    if target == "rayjob" and "://" not in config.data.uri and not config.data.uri.startswith("/"):
        raise UserError(f"data.uri={config.data.uri} is a folder of this machine: give --run data.uri=s3://…")


def _plain(file: ProfileFile) -> dict[str, Any]:
    return file.model_dump(mode="json")


COMMANDS: tuple[click.Command, ...] = (cluster,)
