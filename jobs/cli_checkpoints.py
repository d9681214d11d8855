"""`tessera checkpoints`: what a run can be resumed from, whether it is sound, and an encoder out of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from datasets_prep.errors import UserError
from jobs.terminal import as_json, emit, stack_environment

if TYPE_CHECKING:
    from service.data.store import Store


@click.group()
def checkpoints() -> None:
    """List, verify and export the checkpoints of a run.

    URI is the run's folder or s3:// address, as `tessera up` and the driver's log name them.
    """


@checkpoints.command("list", epilog="\b\nExamples:\n  tessera checkpoints list runs/local/runs/demo-1a2b3c4d5e")
@click.argument("uri")
@as_json
def list_(uri: str, as_json: bool) -> None:
    """Show what a run's storage holds, torn writes included."""
    from service.engine import checkpoint

    store = _open(uri)
    committed, torn = checkpoint.listed(store)
    try:
        markers = {folder: checkpoint.read_marker(store, folder) for folder in committed}
    except checkpoint.Damaged as error:
        raise UserError(f"{error}: remove that folder; a run that resumes does so itself") from error
    if as_json:
        rows = [{name: value for name, value in marker.items() if name != "config"} for marker in markers.values()]
        emit({"uri": store.uri, "committed": rows, "torn": torn})
        return
    for folder, marker in markers.items():
        size = sum(file["bytes"] for file in marker["files"].values())
        score = "" if marker["val_linear"] is None else f"   validation probe {marker['val_linear']:.2f} %"
        click.echo(f"{folder}   {size / 1e6:9.1f} MB   {marker['written']}{score}")
    for folder in torn:
        click.echo(f"{folder}   torn: never committed, and not read")


@checkpoints.command(epilog="\b\nExamples:\n  tessera checkpoints verify s3://runs/demo-1a2b3c4d5e")
@click.argument("uri")
@as_json
def verify(uri: str, as_json: bool) -> None:
    """Read every file of every committed checkpoint; exit code 1 when one differs from its checksum."""
    from service.engine import checkpoint

    store = _open(uri)
    found = {folder: checkpoint.faults(store, folder) for folder in checkpoint.committed(store)}
    if as_json:
        emit({"uri": store.uri, "faults": found})
    for folder, faults in {} if as_json else found.items():
        click.echo(f"{folder}   {'sound' if not faults else f'{len(faults)} faults'}")
        for fault in faults:
            click.echo(f"  {fault}")
    sys.exit(1 if any(found.values()) else 0)


@checkpoints.command(
    epilog="\b\nExamples:\n  tessera checkpoints export s3://runs/demo-1a2b3c4d5e --out encoder\n"
    "  tessera checkpoints export s3://runs/demo-1a2b3c4d5e --step 1200 --out encoder\n\n"
    "`init_from=encoder` goes on from it."
)
@click.argument("uri")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write to; a new or empty one.")
@click.option("--step", type=click.IntRange(0), help="Of the checkpoint; the newest by default.")
@as_json
def export(uri: str, out: Path, step: int | None, as_json: bool) -> None:
    """Write a checkpoint's encoder as safetensors, with its config and preprocessing."""
    from service.engine.checkpoint import committed, step_and_lease

    store = _open(uri)
    folders = {step_and_lease(folder)[0]: folder for folder in committed(store)}
    if not folders:
        raise UserError(f"{store.uri} holds no committed checkpoint")
    chosen = max(folders) if step is None else step
    if chosen not in folders:
        raise UserError(f"--step {step}: {store.uri} has a checkpoint of the steps {', '.join(map(str, folders))} only")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} is not empty: name a new folder")
    _export(store, folders[chosen], out)
    if as_json:
        emit({"out": str(out), "step": chosen})
    else:
        click.echo(f"{out}: the encoder of step {chosen}")


def _open(uri: str) -> Store:
    """Storage of a run's checkpoints, given its address or that of the run."""
    from service.data.store import Store
    from service.engine.checkpoint import listed

    stack_environment()
    for store in (Store(uri).sub("checkpoints"), Store(uri)):
        if any(listed(store)):
            return store
    raise UserError(f"{uri} holds no checkpoints: give the folder or address of one run")


def _export(store: Store, folder: str, out: Path) -> None:
    from service.data.store import Store as Written
    from service.engine.average import WeightAverage
    from service.engine.checkpoint import Damaged, config_of, read, read_marker
    from service.export import write_encoder
    from service.families import build_family

    try:
        config = config_of(read_marker(store, folder))
    except Damaged as error:
        raise UserError(f"{error}: choose another with --step") from error
    family = build_family(config.model_copy(update={"init_from": None}))
    ema = config.eval.weight_ema
    averaged = None if ema is None else WeightAverage(family.encoder, ema)
    state = {"model": family.state_dict(), "averaged": {} if averaged is None else averaged.state_dict()}
    try:
        read(store, folder, state)  # into the modules' own tensors
    except Damaged as error:
        raise UserError(f"{error}: choose another with --step, `tessera checkpoints verify` tells which") from error
    write_encoder(Written(out), family.encoder if averaged is None else averaged.module, config)
