"""Losses of 20 float64 steps of each family, pinned: `python -m tests.golden.recapture REASON` writes them anew.

Give the reason in the commit too: a changed loss means that every published number of the family may change.
"""

import json
import sys
import tempfile
from pathlib import Path

from jobs.shard import shard
from tests.configs import tiny
from tests.families import family_config, first_losses

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
VIT = ["data.image_size=16", "family.encoder.patch_size=2", "data.batch_size=16", "family.encoder.drop_path=0.1"]
FAMILIES = {"ijepa": VIT, "hjepa": [*VIT, "optim.lr=1e-3", "family.fpn=add", "parallel.micro_batch=null"]}
NAMES = [*SETTINGS, *FAMILIES]


def losses(name, digits):
    """Every step's loss of a named setting on the embedded digits, one thread."""
    exact = ["compute.precision=fp64", "compute.threads=1", f"schedule.steps={STEPS}"]
    if name in FAMILIES:
        return first_losses(family_config(name, f"data.uri={digits}", *FAMILIES[name], *exact), STEPS)
    options = dict(item.replace(".", "__").split("=") for item in exact)
    return first_losses(tiny(digits, **SETTINGS[name], **options), STEPS)


def main():
    if len(sys.argv) < 2:
        sys.exit("give the reason for new golden losses")
    with tempfile.TemporaryDirectory() as digits:
        shard("digits", digits)
        found = {name: losses(name, digits) for name in NAMES}
    FILE.write_text(json.dumps({"reason": " ".join(sys.argv[1:]), "losses": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
