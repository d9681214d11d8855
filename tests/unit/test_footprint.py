"""The traced footprint of a step is what the real step allocates and computes, and what is published of models."""

import pytest
import torch

from service.engine import footprint as module
from service.engine.footprint import footprint
from service.models.encoder import build_encoder
from tests.families import GROUP, family_config
from tests.memory import measure

TINY = ["data.batch_size=16", "data.partitions=8", "compute.device=cpu", "compute.threads=1"]
BLOCK = ["family.encoder.depth=1", "family.predictor.depth=1"]
CASES = {
    "resnet": ("image_vicreg", ["family.encoder.depth=8", "compute.precision=fp32"]),
    "accumulated": ("image_vicreg", ["family.encoder.depth=8", "parallel.micro_batch=8", *GROUP]),
    "ijepa": ("ijepa", [*BLOCK, "compute.precision=bf16", "optim.kind=adamw"]),
    "recomputed": ("ijepa", [*BLOCK, "family.encoder.checkpointing=true", "eval.weight_ema=0.9", "optim.kind=lamb"]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_real_step_takes_as_much(case, one_thread):
    kind, changes = CASES[case]
    config = family_config(kind, *TINY, *changes)
    found, real = footprint(config, world=1, device="cpu"), measure(config)
    assert found.peak == pytest.approx(real.peak, rel=0.02)
    assert found.flops == pytest.approx(real.flops, rel=0.01)  # the views come on top
    assert found.checkpoint == pytest.approx(real.checkpoint, rel=0.001)


@pytest.mark.parametrize(
    "size, patch, millions", [("small", 16, 22), ("base", 16, 86), ("large", 16, 304), ("huge", 14, 632)]
)
def test_encoders_have_the_published_sizes(size, patch, millions):
    with torch.device("meta"):
        encoder = build_encoder("vit", 224, size=size, patch_size=patch, positions="sincos")
    assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(millions, rel=0.02)


@pytest.mark.parametrize("kind, changes", [("ijepa", BLOCK), ("image_vicreg", ["family.encoder.depth=8", *GROUP])])
def test_more_micro_batches_are_extrapolated_exactly(kind, changes, monkeypatch):
    config = family_config(kind, *TINY, *changes, "data.batch_size=12", "data.partitions=4", "parallel.micro_batch=2")
    extrapolated = footprint(config, world=1, device="cpu")
    monkeypatch.setattr(module, "_MOST_TRACED", 6)
    traced = footprint(config, world=1, device="cpu")
    assert extrapolated.flops == pytest.approx(traced.flops, rel=1e-3)  # a Gram matrix grows with the square
    assert extrapolated.peak == pytest.approx(traced.peak, rel=1e-3)


def test_shards_divide_what_every_worker_holds():
    config = family_config("ijepa", *TINY, "parallel.kind=fsdp", "optim.kind=adamw")
    whole, shared = (footprint(config, world=world, device="cpu") for world in (1, 4))
    for kind in ("weights", "target", "optimiser"):
        assert shared.memory[kind] == pytest.approx(whole.memory[kind] / 4, rel=0.05)
    assert (shared.parameters, shared.checkpoint) == (whole.parameters, whole.checkpoint)
    on_host = footprint(
        config.model_copy(update={"parallel": config.parallel.model_copy(update={"shard": "host"})}),
        world=4,
        hosts=2,
        device="cpu",
    )
    assert on_host.memory["optimiser"] == pytest.approx(whole.memory["optimiser"] / 2, rel=0.05)
    assert not torch.distributed.is_initialized()


def test_plain_attention_keeps_its_scores_in_fp32_on_a_gpu():
    config = family_config("ijepa", *TINY, *BLOCK, "family.encoder.attention=plain", "compute.precision=bf16")
    cpu, gpu = (footprint(config, world=1, device=device) for device in ("cpu", "cuda"))
    auto = footprint(family_config("ijepa", *TINY, *BLOCK, "compute.precision=bf16"), world=1, device="cuda")
    assert auto.peak < cpu.peak < gpu.peak
