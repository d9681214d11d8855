"""Footprints of workers that have others, against what two real ranks allocate."""

import pytest

from service.engine.footprint import footprint
from tests.families import family_config
from tests.memory import measure
from tests.ranks import on_ranks

pytestmark = pytest.mark.distributed
SHARED = ["data.batch_size=32", "compute.device=cpu", "compute.threads=1", "optim.kind=adamw"]


@pytest.mark.parametrize("changes", [["parallel.kind=ddp"], ["parallel.kind=ddp", "parallel.micro_batch=4"],
                                     ["parallel.kind=fsdp"]], ids=["ddp", "accumulated", "fsdp"])  # fmt: skip
def test_two_ranks_take_as_much(changes):
    config = family_config("ijepa", *SHARED, *changes)
    found = footprint(config, world=2, device="cpu")
    assert found.peak == pytest.approx(on_ranks(2, measure, config)[0].peak, rel=0.05)
