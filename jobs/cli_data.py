"""The data commands of `tessera`: each imports what it needs when it runs."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from jobs.terminal import as_json, emit, note, progress, stack_environment

if TYPE_CHECKING:
    from jobs.shard import Estimate


@click.command(
    epilog="\b\nExamples:\n  tessera shard digits --out data/digits\n"
    "  tessera shard cifar10 --source ~/data --out s3://data/cifar10\n"
    "  tessera shard imagefolder --source photos --out data/photos --dry-run\n"
    "  tessera shard imagenet100 --source ILSVRC --class-list imagenet100.txt --out data/in100\n"
    "  tessera shard imagenet --source ILSVRC --out s3://data/in1k --short-side 256 --on-error skip\n\n"
    "A command that was killed goes on when it is given again: finished shards are kept."
)
@click.argument("source")
@click.option("--source", "path", type=click.Path(path_type=Path), help="Folder or archive of the original data.")
@click.option("--class-list", type=click.Path(path_type=Path), help="Classes, one a line: of imagenet100, wds.")
@click.option("--image-column", default="image", show_default=True, help="Of parquet files.")
@click.option("--label-column", default="label", show_default=True, help="Of parquet files.")
@click.option("--out", required=True, help="Folder or s3:// address to write to.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of order and validation cut.")
@click.option("--shard-mb", type=click.IntRange(1), default=64, show_default=True, help="MiB of a shard, about.")
@click.option("--val-share", type=click.FloatRange(0, 0.5), default=0.1, show_default=True, help="Cut from train.")
@click.option("--short-side", type=click.IntRange(1), help="Scale larger images down to this; else bytes are kept.")
@click.option("--quality", type=click.IntRange(1, 100), default=90, show_default=True, help="Of scaled JPEG and WebP.")
@click.option(
    "--check",
    type=click.Choice(["header", "full"]),
    default="header",
    show_default=True,
    help="Look at each image's header and end, or decode it.",
)
@click.option(
    "--on-error",
    type=click.Choice(["refuse", "skip"]),
    default="refuse",
    show_default=True,
    help="Name all broken images and stop, or leave them out and list them in skipped.json.",
)
@click.option("--workers", type=click.IntRange(1), help="Processes that write shards; one a CPU by default.")
@click.option("--dry-run", is_flag=True, help="Say what would be written, write nothing.")
@as_json
def shard(
    source: str,
    path: Path | None,
    class_list: Path | None,
    image_column: str,
    label_column: str,
    out: str,
    seed: int,
    shard_mb: int,
    val_share: float,
    short_side: int | None,
    quality: int,
    check: Literal["header", "full"],
    on_error: Literal["refuse", "skip"],
    workers: int | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write SOURCE as WebDataset shards with an index.

    SOURCE is cifar10, cifar100, digits, imagefolder, imagenet, imagenet100, parquet, stl10, tiny-imagenet or wds.
    """
    from datasets_prep.images import ImagePolicy
    from datasets_prep.sources.base import Options
    from jobs import shard as sharding

    options: dict[str, Any] = {
        "options": Options(class_list, image_column, label_column),
        "seed": seed,
        "shard_mb": shard_mb,
        "val_share": val_share,
        "images": ImagePolicy(check, short_side, quality),
        "workers": workers or len(os.sched_getaffinity(0)),
    }
    stack_environment()
    if dry_run:
        _show_estimate(out, sharding.estimate(source, out, path, **options), as_json)
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with progress(f"sharding {source}", "images") as advance:
            index = sharding.shard(source, out, path, on_error=on_error, progress=advance, say=note, **options)
    except KeyboardInterrupt:
        note(f"{out} is not finished: the same command goes on")
        raise
    counts = {name: split.samples for name, split in index.splits.items()}
    if as_json:
        emit({"out": out, "name": index.name, "fingerprint": index.fingerprint, "samples": counts})
    else:
        what = ", ".join(f"{count:,} {name}" for name, count in counts.items())
        click.echo(f"{out}: {index.name}, {what}, fingerprint {index.fingerprint}")


def _show_estimate(out: str, planned: Estimate, as_json: bool) -> None:
    if as_json:
        emit(planned._asdict())
        return
    click.echo(
        f"would write {planned.name}, {planned.classes} classes, to {out}: about {planned.bytes / 1e6:.1f} MB "
        f"in {planned.shards:,} shards, {planned.seconds:.0f} s of work before the store's own"
    )
    for name, samples in planned.samples.items():
        click.echo(f"  {name:<8} {samples:>9,} samples")


COMMANDS: tuple[click.Command, ...] = (shard,)
