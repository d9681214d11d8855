"""The commands of `tessera` for shards that are there: index foreign ones, verify them, look at them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jobs.terminal import as_json, emit, note, progress, stack_environment

if TYPE_CHECKING:
    from jobs.survey import Survey
    from service.data.split import DataSplit

_BAR = 40  # characters
_CLASSES_SHOWN = 30
_FAULTS_SHOWN = 50
_DEFAULTS = "defaults"


@click.command(
    epilog="\b\nExamples:\n  tessera index s3://bucket/imagenet-wds --class-list names.txt\n"
    "  tessera index data/tars --split train --dry-run\n\n"
    "The tars stay as they are. Samples sorted by class get a warning: "
    "`tessera shard wds` writes them anew in random order."
)
@click.argument("uri")
@click.option("--name", help="Of the data set; by default the address's last part.")
@click.option("--split", help="That all tars belong to; by default each path tells: val/0.tar, set-train-0.tar.")
@click.option("--class-list", type=click.Path(path_type=Path), help="File with a class name a line, in label order.")
@click.option("--workers", type=click.IntRange(1), default=4, show_default=True, help="Tars read at a time.")
@click.option("--dry-run", is_flag=True, help="Read and check the tars, write nothing.")
@as_json
def index(
    uri: str,
    name: str | None,
    split: str | None,
    class_list: Path | None,
    workers: int,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Make foreign WebDataset tars at URI readable: writes sidecars, labels and an index beside them."""
    from datasets_prep.foreign import index_tars
    from service.data.store import Store

    stack_environment()
    store = Store(uri)
    with progress(f"indexing {uri}", "tars") as advance:
        indexed = index_tars(
            store,
            name=name,
            split=split,
            class_list=class_list,
            workers=workers,
            write=not dry_run,
            progress=advance,
        )
    found = indexed.index
    counts = {name: rows.samples for name, rows in found.splits.items()}
    if as_json:
        row: dict[str, Any] = {"uri": store.uri, "name": found.name, "fingerprint": found.fingerprint}
        emit(row | {"samples": counts, "classes": len(found.classes), "warnings": indexed.warnings})
        return
    for warning in indexed.warnings:
        note(f"warning: {warning}")
    what = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    would = "would be indexed as " if dry_run else ""
    click.echo(f"{store.uri}: {would}{found.name}, {what}, fingerprint {found.fingerprint}")


@click.command(
    epilog="\b\nExamples:\n  tessera verify s3://data/imagenet\n  tessera verify data/cifar10 --split test --json\n\n"
    "Exit code 0 without faults, 1 with faults, 2 if there is no data set."
)
@click.argument("uri")
@click.option("--split", help="Only this split.")
@click.option("--workers", type=click.IntRange(1), default=4, show_default=True, help="Shards read at a time.")
@as_json
def verify(uri: str, split: str | None, workers: int, as_json: bool) -> None:
    """Read and decode everything at URI and report every fault: bytes, sidecars, labels, keys, images, leftovers."""
    from datasets_prep.verify import verify as run_checks
    from service.data.split import read_index
    from service.data.store import Store

    stack_environment()
    store = Store(uri)
    found = read_index(store)
    with progress(f"verifying {uri}", "images") as advance:
        report = run_checks(store, found, split, workers=workers, progress=advance)
    if as_json:
        emit(report._asdict() | {"uri": store.uri, "faults": [fault._asdict() for fault in report.faults]})
    else:
        for fault in report.faults:
            click.echo(f"{fault.uri}: {fault.what}")
        what = ", ".join(f"{count:,} {name}" for name, count in report.samples.items())
        verdict = f"{len(report.faults):,} faults" if report.faults else "no faults"
        click.echo(f"{store.uri}: {verdict} in {what}, {report.bytes / 1e6:,.1f} MB, fingerprint {report.fingerprint}")
    sys.exit(1 if report.faults else 0)


@click.command(
    epilog="\b\nExamples:\n  tessera inspect data/cifar10\n"
    "  tessera inspect s3://data/imagenet --split val --out imagenet.png\n"
    "  tessera inspect data/cifar10 --augmented --out views.png\n"
    "  tessera inspect data/cifar10 --augmented cifar10-cpu data.augment.blur=0.5 --out views.png"
)
@click.argument("uri")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--split", default="train", show_default=True)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="PNG to write a contact sheet to.")
@click.option(
    "--augmented",
    "recipe",
    is_flag=False,
    flag_value=_DEFAULTS,
    metavar="[RECIPE]",
    help="Draw views as the training of RECIPE sees them.",
)
@click.option("--images", type=click.IntRange(1), default=256, show_default=True, help="Random ones for the figures.")
@as_json
def inspect(
    uri: str, overrides: tuple[str, ...], split: str, out: Path | None, recipe: str | None, images: int, as_json: bool
) -> None:
    """Show what a split at URI holds: classes, image sizes, colours, and pictures as a PNG."""
    from jobs.survey import survey
    from service.data.split import DataSplit, read_index
    from service.data.store import Store

    stack_environment()
    store = Store(uri)
    opened = DataSplit(store, read_index(store), split)
    figures = survey(opened, images)
    if not as_json:
        _show(opened, figures)
    path = _draw(opened, out, recipe, overrides)
    if as_json:
        row: dict[str, Any] = {"uri": store.uri, "split": split, "fingerprint": opened.index.fingerprint}
        emit(row | vars(figures) | {"out": path and str(path)})
    elif path:
        click.echo(f"wrote {path}")


def _draw(split: DataSplit, out: Path | None, recipe: str | None, overrides: tuple[str, ...]) -> Path | None:
    """Write the PNG that was asked for."""
    from datasets_prep.errors import UserError
    from jobs.inspection import augmented_sheet, contact_sheet

    if recipe is None:
        if overrides:
            raise UserError(f"{overrides[0]} is a setting of a training: add --augmented RECIPE")
        if out is None:
            return None
        sheet = contact_sheet(split)
    else:
        if recipe == _DEFAULTS and overrides:
            raise UserError(f"{overrides[0]} needs a recipe to change: name one, --augmented RECIPE")
        sheet = augmented_sheet(split, None if recipe == _DEFAULTS else _config(split, recipe, overrides))
    path = out or Path("augmented.png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path, "PNG")
    except OSError as error:
        raise UserError(f"--out {path} cannot be written ({error}): choose another file") from error
    return path


def _config(split: DataSplit, recipe: str, overrides: tuple[str, ...]) -> Any:
    from jobs import recipes

    return recipes.load(recipe, (*overrides, f"data.uri={split.store.uri}"))


def _show(split: DataSplit, figures: Survey) -> None:
    """Print a split's figures."""
    click.echo(f"{split.store.uri}: {split.index.name}, fingerprint {split.index.fingerprint}")
    shards = split.rows.shards
    size = sum(shard.bytes for shard in shards) / 1e6
    click.echo(f"{split.name}: {figures.samples:,} images in {len(shards):,} shards, {size:,.1f} MB")
    click.echo(f"\nof {figures.surveyed:,} random images{'least':>12}{'5 %':>10}{'median':>10}{'95 %':>10}{'most':>10}")
    for name in ("width", "height", "bytes"):
        values = "".join(f"{value:>10,}" for value in getattr(figures, name))
        click.echo(f"  {name:<20}{values}")
    for name in ("mean", "std"):
        click.echo(f"  {name:<20}" + "".join(f"{value:>10.3f}" for value in getattr(figures, name)) + "  (R, G, B)")
    if figures.classes:
        click.echo("\n" + "\n".join(_histogram(figures.classes)))


def _histogram(classes: dict[str, int]) -> list[str]:
    """Lines of class, count and bar; of many classes the largest and the smallest ones."""
    rows = list(classes.items())
    most, half = max(classes.values()), _CLASSES_SHOWN // 2
    wide = min(30, max(map(len, classes)))
    if len(rows) > _CLASSES_SHOWN:
        rows.sort(key=lambda row: -row[1])
    lines = [f"  {name[:wide]:<{wide}} {count:>9,} {'█' * -(-count * _BAR // most)}".rstrip() for name, count in rows]
    if len(rows) > _CLASSES_SHOWN:
        lines[half:-half] = [f"  … {len(rows) - 2 * half:,} classes between these"]
    return lines


COMMANDS: tuple[click.Command, ...] = (index, verify, inspect)
