"""Encoders with levels from training to files and back: what is scored, kept, exported and loaded."""

import pytest
import torch
from safetensors.torch import save_file

from datasets_prep.errors import UserError
from jobs import table
from service.data.store import Store
from service.engine.loop import Run, train
from service.export import load_encoder, read_config
from service.families import build_family
from service.models.encoder import build_encoder, every_level
from service.pretrained import check_initial, load_initial
from tests.families import family_config

pytestmark = pytest.mark.distributed  # two runs with their evaluation: too long for the quick tier
SMALL = ["data.image_size=16", "data.batch_size=8", "family.encoder.patch_size=2", "schedule.steps=2",
         "compute.threads=1", "compute.precision=fp32", "eval.knn_k=5"]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory, few_digits):
    folder = tmp_path_factory.mktemp("run")
    threads = torch.get_num_threads()
    config = family_config("hjepa", f"data.uri={few_digits}", *SMALL, "family.fpn=add", "family.eval_level=1")
    result = train(config, Run(Store(folder)))
    torch.set_num_threads(threads)
    return folder / "encoder", result


def test_every_level_and_the_other_encoder_are_scored(trained):
    scores = trained[1]["scores"]
    assert list(scores) == ["raw_pixels", "random_encoder", "trained", "level1", "level2", "context_encoder"]
    assert scores["trained"] == scores["level1"] and scores["level1"] != scores["level2"]
    assert {gain["over"] for gain in trained[1]["paired"].values()} <= {"raw_pixels", "random_encoder"}
    text = table.render(trained[1])
    assert "level2" in text and "context encoder" in text


def test_weights_and_config_are_enough_to_load_any_level(trained):
    config, encoder = read_config(trained[0]), load_encoder(trained[0])
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    whole, parts = every_level(encoder)
    assert parts == {"level1": slice(0, 192), "level2": slice(192, 384), "trained": slice(0, 192)}
    torch.testing.assert_close(encoder(x), whole(x)[:, :192])
    second = build_encoder(image_size=16, **config.family.encoder_options() | {"eval_level": 2}).eval()
    second.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(second(x), whole(x)[:, 192:])
    assert not torch.allclose(second(x), encoder(x), atol=1e-3)


def test_an_encoder_with_levels_starts_from_kept_weights_or_from_plain_ones(trained, tmp_path):
    changes = [*SMALL, "data.uri=none", "family.fpn=add", f"init_from={trained[0]}"]
    config, kept = family_config("hjepa", *changes), load_encoder(trained[0])
    assert len(check_initial(config)) == 64
    family = build_family(config)
    for encoder in (family.context_encoder, family.target_encoder):
        torch.testing.assert_close(encoder.state_dict(), kept.state_dict())
    plain = {name: tensor for name, tensor in kept.state_dict().items() if not name.startswith("fpn.")}
    save_file(plain, tmp_path / "vit.safetensors")
    torch.manual_seed(5)
    family = build_family(family_config("hjepa", *changes[:-1]))
    before = family.context_encoder.fpn.lateral[0].weight.clone()
    load_initial(family, str(tmp_path / "vit.safetensors"))
    torch.testing.assert_close(family.context_encoder.fpn.lateral[0].weight, before)
    torch.testing.assert_close(family.context_encoder.norm.weight, plain["norm.weight"])
    with pytest.raises(UserError, match="fpn.lateral.0.weight has no counterpart"):
        load_initial(build_family(family_config("hjepa", *changes[:-2])), str(trained[0]))


def test_both_encoders_of_ijepa_are_scored(few_digits, tmp_path):
    threads = torch.get_num_threads()
    changes = ["family.momentum.start=0.5", "family.eval_encoder=context", "optim.lr=1e-2", "schedule.warmup_epochs=0"]
    config = family_config("ijepa", f"data.uri={few_digits}", *SMALL, *changes, "family.masking.kind=block")
    scores = train(config, Run(Store(tmp_path)))["scores"]
    torch.set_num_threads(threads)
    assert list(scores) == ["raw_pixels", "random_encoder", "trained", "target_encoder"]
    assert scores["trained"] != scores["target_encoder"]
