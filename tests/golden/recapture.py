"""Losses of 20 float64 steps of each family, pinned: `python -m tests.golden.recapture REASON` writes them anew.

Give the reason in the commit too: a changed loss means that every published number of the family may change.
"""

import json
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import torch

from jobs.shard import shard
from service.data.store import Store
from service.engine.loop import Run, train
from tests.configs import tiny
from tests.families import family_config

FILE = Path(__file__).with_name("losses.json")
STEPS = 20
SETTINGS = {
    "image_vicreg": {"family__encoder__width": 4, "family__projector__norm": "batch"},
    "image_vicreg_vit_lars": {
        "family__encoder__kind": "vit",
        "optim__kind": "lars",
        "schedule__start_lr": 1e-3,
        "data__batch_size": 16,
    },
    "sigreg": {
        "family__loss": "{kind: sigreg, slices: 32}",
        "family__views": 3,
        "data__local": "{count: 2, size: 8}",
        "data__batch_size": 32,
    },
}
IJEPA = ["data.image_size=16", "family.encoder.patch_size=2", "data.batch_size=16", "family.encoder.drop_path=0.1"]
NAMES = [*SETTINGS, "ijepa"]


class Enough(Exception):  # noqa: N818
    """The losses are known: what follows would only evaluate the encoder."""


def losses(name, digits):
    """Every step's loss of a named setting on the embedded digits, one thread."""
    threads = torch.get_num_threads()
    exact = ["compute.precision=fp64", "compute.threads=1", f"schedule.steps={STEPS}"]
    if name == "ijepa":
        config = family_config("ijepa", f"data.uri={digits}", *IJEPA, *exact)
    else:
        config = tiny(digits, **SETTINGS[name], **dict(item.replace(".", "__").split("=") for item in exact))
    found = []

    def take(step, row):
        found.append(row["loss"])
        if step == STEPS:
            raise Enough

    with tempfile.TemporaryDirectory() as folder, suppress(Enough):
        train(config, Run(Store(folder)), rows=take)
    torch.set_num_threads(threads)
    return found


def main():
    if len(sys.argv) < 2:
        sys.exit("give the reason for new golden losses")
    with tempfile.TemporaryDirectory() as digits:
        shard("digits", digits)
        found = {name: losses(name, digits) for name in NAMES}
    FILE.write_text(json.dumps({"reason": " ".join(sys.argv[1:]), "losses": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
