"""The data commands of `tessera`: each imports what it needs when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from jobs.terminal import as_json, emit, note, progress, stack_environment


@click.command(
    epilog="\b\nExamples:\n  tessera shard digits --out data/digits\n"
    "  tessera shard cifar10 --source ~/data --out s3://data/cifar10\n"
    "  tessera shard imagefolder --source photos --out data/photos --dry-run"
)
@click.argument("source")
@click.option("--source", "path", type=click.Path(path_type=Path), help="Folder or archive of the original data.")
@click.option("--out", required=True, help="Folder or s3:// address to write to.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of order and validation cut.")
@click.option("--shard-mb", type=click.IntRange(1), default=64, show_default=True, help="Largest shard, in MiB.")
@click.option("--val-share", type=click.FloatRange(0, 0.5), default=0.1, show_default=True, help="Cut from train.")
@click.option("--dry-run", is_flag=True, help="Say what would be written, write nothing.")
@as_json
def shard(
    source: str, path: Path | None, out: str, seed: int, shard_mb: int, val_share: float, dry_run: bool, as_json: bool
) -> None:
    """Write SOURCE (digits, cifar10, imagefolder) as WebDataset shards with an index."""
    from jobs import shard as sharding

    options: dict[str, Any] = {"seed": seed, "shard_mb": shard_mb, "val_share": val_share}
    stack_environment()
    if dry_run:
        planned = sharding.estimate(source, out, path, **options)
        if as_json:
            emit(planned._asdict())
            return
        click.echo(
            f"would write {planned.name}, {planned.classes} classes, to {out}: about {planned.bytes / 1e6:.1f} MB"
        )
        for name, samples in planned.samples.items():
            click.echo(f"  {name:<8} {samples:>9,} samples")
        return
    with progress(f"sharding {source}", "images") as advance:
        index = sharding.shard(source, out, path, progress=advance, say=note, **options)
    counts = {name: split.samples for name, split in index.splits.items()}
    if as_json:
        emit({"out": out, "name": index.name, "fingerprint": index.fingerprint, "samples": counts})
    else:
        what = ", ".join(f"{count:,} {name}" for name, count in counts.items())
        click.echo(f"{out}: {index.name}, {what}, fingerprint {index.fingerprint}")


COMMANDS: tuple[click.Command, ...] = (shard,)
