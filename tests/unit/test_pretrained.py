"""Continued pretraining: timm's and our own weights into every encoder, and refusals before anything is spent."""

import json

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load, load_file, save_file
from torchvision.models import resnet18

from datasets_prep.errors import UserError
from jobs import package, plan, recipes
from service.data.store import Store
from service.engine import loop
from service.export import load_encoder
from service.families import build_family
from service.models.vit import VisionTransformer
from service.pretrained import load_encoder_weights
from tests.configs import tiny
from tests.families import family_config

OPTIONS = {"img_size": 16, "patch_size": 4, "depth": 2}
VIT = ["data.image_size=16", "family.encoder.depth=2", "family.encoder.patch_size=4"]
BLOCKS = ["family.masking.kind=random"]


def timm_file(folder, **options):
    """A file with the weights of a random timm ViT with class token and classifier, and the model."""
    torch.manual_seed(5)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=7, **OPTIONS | options)
    save_file(model.state_dict(), folder / "timm.safetensors")
    return folder / "timm.safetensors", model


def test_timm_weights_fill_context_and_target_encoder(tmp_path):
    path, model = timm_file(tmp_path)
    family = build_family(family_config("ijepa", *VIT, *BLOCKS, f"init_from={path}"))
    theirs = model.state_dict()
    for encoder in (family.context_encoder, family.target_encoder):
        ours = encoder.state_dict()
        assert torch.equal(ours["pos_embed"], theirs["pos_embed"][:, 1:])  # without the class token's
        others = set(ours) - {"pos_embed"}
        assert len(others) == 28 and all(torch.equal(ours[name], theirs[name]) for name in others)
    assert not any(p.requires_grad for p in family.target_encoder.parameters())


def test_weights_mean_the_same_there_and_back(tmp_path):
    options = {"class_token": False, "global_pool": "avg", "fc_norm": False}
    path, model = timm_file(tmp_path, **options)
    ours = VisionTransformer("tiny", 4, 16, depth=2)
    load_encoder_weights(ours, load_file(path), str(path))
    x = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(ours.eval()(x), model.eval().forward_head(model.forward_features(x), pre_logits=True))
    save_file(ours.state_dict(), tmp_path / "ours.safetensors")
    back = timm.create_model("vit_tiny_patch16_224", num_classes=0, **OPTIONS | options)
    back.load_state_dict(load_file(tmp_path / "ours.safetensors"))
    torch.testing.assert_close(back.eval()(x), ours(x))


def test_positions_of_another_grid_are_resampled(tmp_path):
    path, model = timm_file(tmp_path)
    family = build_family(family_config("ijepa", *VIT, *BLOCKS, "data.image_size=32", f"init_from={path}"))
    found = family.context_encoder.pos_embed
    expected = timm.layers.resample_abs_pos_embed(model.pos_embed, [8, 8], num_prefix_tokens=1)[:, 1:]
    assert found.shape == (1, 64, 192)
    torch.testing.assert_close(found, expected.expand_as(found))


def test_torchvision_weights_fill_a_resnet(tmp_path):
    model = resnet18()
    save_file(model.state_dict(), tmp_path / "resnet.safetensors")
    changes = ["family.encoder.depth=18", "family.encoder.stem=224px", "family.encoder.width=64"]
    family = build_family(family_config("image_vicreg", *changes, f"init_from={tmp_path}/resnet.safetensors"))
    x = torch.randn(2, 3, 64, 64)
    model.fc = torch.nn.Identity()
    torch.testing.assert_close(family.encoder.eval()(x), model.eval()(x))


def test_what_does_not_fit_is_listed_before_anything_is_spent(tmp_path, few_digits):
    path, model = timm_file(tmp_path)
    vit = "{kind: vit, depth: 2, patch_size: 4}"
    fits = tiny(few_digits, init_from=path, family__encoder=vit)
    assert plan.make(fits).initial
    for change, message in (
        ({"depth": 3}, "blocks.2.norm1.weight is missing; .*4 more"),
        ({"depth": 1}, "blocks.1.attn.proj.bias has no counterpart; .*4 more"),
        ({"patch_size": 8}, r"patch_embed.proj.weight is \(192, 3, 4, 4\), the encoder's is \(192, 3, 8, 8\)"),
        ({"positions": "rope"}, "pos_embed has no counterpart"),
        ({"layer_scale": 0.1}, "blocks.0.ls1.gamma is missing"),
    ):
        encoder = json.dumps({"kind": "vit", "depth": 2, "patch_size": 4} | change)
        with pytest.raises(UserError, match=f"init_from=.*does not fit family.encoder: .*{message}.*: choose weights"):
            plan.make(tiny(few_digits, init_from=path, family__encoder=encoder))
    (tmp_path / "text.safetensors").write_text("no weights at all, but some text")
    with pytest.raises(UserError, match="text.safetensors is no safetensors file"):
        plan.make(tiny(few_digits, init_from=tmp_path / "text.safetensors", family__encoder=vit))
    with pytest.raises(UserError, match="model.safetensors does not exist"):
        plan.make(tiny(few_digits, init_from=tmp_path / "nowhere", family__encoder=vit))
    with pytest.raises(UserError, match="is a name in MLflow: give the folder `encoder`"):
        recipes.load("demo", ["init_from=models:/demo/1"])


def test_a_run_is_named_by_the_weights_it_starts_from_wherever_they_lie(tmp_path, few_digits):
    def name(uri):
        made = plan.make(tiny(few_digits, init_from=uri, family__encoder="{kind: vit, depth: 2, patch_size: 4}"))
        assert ("init from" in dict(made.rows())) == (uri != "null")
        return package.run_name(made.config, made.fingerprint, "code")

    path, model = timm_file(tmp_path)
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy/model.safetensors").write_bytes(path.read_bytes())
    first = name(path)
    assert first == name(tmp_path / "copy") != name("null")
    with torch.no_grad():
        model.norm.bias.add_(1.0)
    save_file(model.state_dict(), path)
    assert name(path) != first


def test_training_goes_on_from_a_kept_encoder(tmp_path, few_digits):
    first = loop.Run(Store(tmp_path / "first"))
    loop.train(tiny(few_digits, schedule__steps=3), first)
    kept = load_encoder(tmp_path / "first/encoder")
    config = tiny(few_digits, schedule__steps=2, seed=9, optim__lr=1e-12, init_from=tmp_path / "first/encoder")
    loop.train(config.model_copy(update={"optim": config.optim.model_copy(update={"weight_decay": 0.0})}),
               loop.Run(Store(tmp_path / "second")))  # fmt: skip
    second = load(Store(tmp_path / "second/encoder").get("model.safetensors"))
    weights = [name for name in second if "running" not in name and "num_batches" not in name]
    for key in weights:
        np.testing.assert_allclose(second[key], kept.state_dict()[key], atol=1e-6)
    assert any(second[key].std() > 0.01 for key in weights)
