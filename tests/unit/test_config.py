import ast
import json
import re
import subprocess
import sys
from inspect import signature
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError
from torch.optim import SGD, AdamW

from datasets_prep.errors import UserError
from jobs import recipes
from service.config import RunConfig, parse_interval
from service.engine.accumulate import parts_of

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_loads_and_states_its_covariance_divisor(name):
    config = recipes.load(name)
    assert config.name == name
    assert recipes.describe(name)
    if config.family.kind == "image_vicreg" and "vicreg" in config.family.loss.kind:
        assert "cov_norm" in (recipes.RECIPES / f"{name}.yaml").read_text()


def test_rapid_and_long_hold_the_guide_values():
    rapid, long = recipes.load("rapid"), recipes.load("long")
    assert (rapid.data.batch_size, rapid.data.workers, rapid.seed) == (512, 16, 42)
    assert (rapid.family.encoder.depth, rapid.family.encoder.stem) == (18, "32px")
    assert (rapid.family.projector.hidden, rapid.family.projector.output) == (4096, 4096)
    loss = rapid.family.loss
    assert (loss.inv, loss.std, loss.cov) == (1.0, 25.0, 1.0)
    assert (rapid.optim.kind, rapid.optim.lr, rapid.optim.weight_decay) == ("lars", 0.5, 1e-4)
    schedule = rapid.schedule
    assert (schedule.epochs, schedule.warmup_epochs, schedule.start_lr, schedule.min_lr) == (50, 5, 3e-5, 0)
    assert (rapid.compute.precision, rapid.compute.device) == ("bf16", "auto")
    assert (rapid.tracking.log_every, rapid.checkpoint.snapshot_every) == ("5 epochs", "50 epochs")
    assert (long.optim.lr, long.schedule.epochs, long.data.batch_size) == (0.3, 800, 512)
    differing = {"name", "optim", "schedule"}
    assert {k for k, v in rapid.plain().items() if long.plain()[k] != v} == differing


def test_a_kind_clears_its_siblings_and_partial_overrides_keep_them():
    kept = recipes.load("rapid", ["optim.lr=0.1"]).optim
    assert (kept.kind, kept.lr, kept.trust) == ("lars", 0.1, 0.02)
    changed = recipes.load("rapid", ["optim.kind=adamw", "optim.lr=1e-3"]).optim
    assert (changed.kind, changed.lr, changed.weight_decay) == ("adamw", 1e-3, 0.05)
    assert recipes.load("rapid", ["family.encoder.kind=vit"]).family.encoder.size == "tiny"


def test_all_errors_come_at_once_with_the_nearest_names():
    bad = ["data.batchsize=3", "optim.lr=-1", "family.encoder.depht=3", "famly.kind=x", "nonsense", "optim.trust=abc"]
    with pytest.raises(UserError) as error:
        recipes.load("rapid", bad)
    text = str(error.value)
    assert text.startswith("6 errors in the config of recipe 'rapid'")
    for part in (
        "data.batchsize is no setting: did you mean 'batch_size'?",
        "optim.lr=-1: Input should be greater than 0",
        "family.encoder.depht is no setting: did you mean 'depth'?",
        "famly is no setting: did you mean 'family'?",
        "'nonsense' is no override: write key.sub=value",
        "optim.trust='abc'",
    ):
        assert part in text


@pytest.mark.parametrize(
    "override, message",
    [
        ("parallel.workers=3", "use parallel.workers=2 or 4, or data.batch_size=513"),
        ("parallel.workers=128", "use parallel.workers=64, or raise data.partitions"),
        ("parallel.micro_batch=256", "cuts the 512 samples that each of 1 workers has, and with family.encoder.norm="),
        ("parallel={workers: 4, min_workers: 2, micro_batch: 128}", "cuts the 256 samples that each of 2 workers has"),
        ("data.partitions=3", "parallel.workers=4 must divide the 2 canonical partitions"),
        ("optim.kind=adm", "optim.kind='adm' is none of 'lars', 'lamb', 'sgd', 'adam', 'adamw'"),
        ("data.augment.crop_scale=[0.9,0.2]", "low ≤ high: swap"),
        ("data.augment.crop_scale=[0.1,1.5]", "a part cannot exceed its image"),
        ("data.augment.three_augment=1", "in place of grey=0.2, blur=0.0, solarize=0.1: set these three to 0"),
        ("data.augment.randaugment.magnitude=11", "magnitude=11: Input should be less than or equal to 10"),
        ("data.augment.erase_scale=[0.5,0.1]", "erase_scale=(0.5, 0.1) must be (low, high)"),
        ("data.val_split=train", "must differ: scores need unseen samples"),
        ("tracking.model=team/vit", "tracking.model='team/vit'"),
        ("optim.weight_decay_of.predictor=0.04", "names no trained component of family 'image_vicreg': use encoder or"),
        ("optim.layer_decay=0", "optim.layer_decay=0: Input should be greater than 0"),
        ("schedule.min_lr=9", "must not exceed optim.lr"),
        ("tracking.log_every=3 minutes", "in steps or epochs"),
        ("checkpoint.every=0 steps", "positive number and a unit"),
        ("family.loss={}", "did not"),
    ],
)
def test_impossible_values_name_the_fix(override, message):
    overrides = [override] + (["parallel.workers=4"] if "partitions" in override else [])
    if override == "family.loss={}":
        assert recipes.load("rapid", overrides).family.loss.std == 25.0  # an empty change changes nothing
        return
    with pytest.raises(UserError, match="1 error") as error:
        recipes.load("rapid", overrides)
    assert message in str(error.value)


def test_the_kind_of_what_is_no_union_leaves_its_siblings():
    config = recipes.load("rapid", ["parallel={workers: 2, sync_batchnorm: true}", "parallel.kind=fsdp"])
    assert (config.parallel.kind, config.parallel.workers, config.parallel.sync_batchnorm) == ("fsdp", 2, True)


def test_any_number_of_workers_takes_the_same_batch_in_parts_that_fit():
    no_batch_norm = ["family.encoder.norm=group", "family.projector.norm=layer"]
    config = recipes.load("rapid", ["data.batch_size=480", "parallel.micro_batch=100", *no_batch_norm])
    slices = [config.slice_of(workers) for workers in (1, 2, 4, 5, 30)]
    assert slices == [480, 240, 120, 96, 16]
    assert [parts_of(size, config.parallel.micro_batch) for size in slices] == [5, 3, 2, 1, 1]
    assert parts_of(7, 4) == 7 and parts_of(480, None) == 1
    with pytest.raises(ValueError, match="parallel.workers=8 must divide the 60 .* use parallel.workers=6 or 10, or"):
        config.slice_of(8)


def test_vit_patches_must_tile_the_image():
    with pytest.raises(UserError, match="patch_size=5 does not divide data.image_size=32"):
        recipes.load("rapid", ["family.encoder.kind=vit", "family.encoder.patch_size=5"])
    with pytest.raises(UserError, match="patch_size=4 does not divide data.eval_image_size=66"):
        recipes.load("rapid", ["family.encoder.kind=vit", "data.eval_image_size=66"])


def test_local_crops_must_fit_and_be_of_use():
    local = "data.local={count: 2, size: 16}"
    assert recipes.load("rapid", [local, "data.local.size=24"]).data.local.size == 24
    assert recipes.load("rapid", [local, "data.local=null"]).data.local is None
    for recipe, overrides, message in (
        ("rapid", ["data.local={count: 2}"], "data.local.size must be given"),
        ("rapid", [local, "data.local.size=40"], "local.size=40 must not exceed image_size=32"),
        ("rapid", [local, "data.local.crop_scale=[0.3,0.1]"], "low ≤ high"),
        ("rapid", [local, "family.encoder={kind: vit, patch_size: 32}"], "does not divide data.local.size=16"),
        (
            "ijepa-cpu",
            [local],
            "data.local gives small crops to the regulariser, and family.regulariser is none: set it",
        ),
    ):
        with pytest.raises(UserError, match="1 error.*\n.*" + message):
            recipes.load(recipe, overrides)


def test_losses_of_views_have_their_published_defaults():
    for variant, weight, slices in (("bcs", 10.0, 256), ("lejepa", 0.02, 1024)):
        loss = recipes.load("rapid", ["family.loss.kind=sigreg", f"family.loss.variant={variant}"]).family.loss
        assert (loss.weight, loss.slices) == (weight, slices)
    with pytest.raises(UserError, match="weight=10.0 must not exceed 1.*use variant=bcs"):
        recipes.load("rapid", ["family.loss.kind=sigreg", "family.loss.weight=10"])
    with pytest.raises(UserError, match="family.loss.cov_norm must be given"):
        recipes.load("rapid", ["family.loss.kind=vicreg_sigreg"])


def test_masks_that_cannot_exist_are_config_errors():
    with pytest.raises(UserError, match=r"family.masking.targets.scale=.* leaves no context on a 4×4 grid"):
        recipes.load("ijepa-cpu", ["family.encoder.patch_size=8"])
    with pytest.raises(UserError, match=r"family.masking.targets.scale=.*min_keep=10 asks for more"):
        recipes.load("ijepa-cpu", ["family.masking.kind=reference"])
    with pytest.raises(UserError, match="width=100 must be divisible by 4 × heads=12: use width=96"):
        recipes.load("ijepa-cpu", ["family.predictor.width=100", "family.predictor.heads=12"])


@pytest.mark.parametrize("page", ["optimisers", "augmentation"])
def test_settings_shown_in_the_docs_are_settings(page):
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / f"{page}.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        shown = yaml.safe_load(block)
        rooms = {"data": shown} if "augment" in shown else shown
        overrides = [f"{room}={json.dumps(settings)}" for room, settings in rooms.items()]
        assert recipes.load("ijepa-cpu", overrides) != recipes.load("ijepa-cpu")


def test_unknown_recipes_and_broken_files(tmp_path):
    with pytest.raises(UserError, match="unknown recipe 'rapd': did you mean 'rapid'"):
        recipes.load("rapd")
    with pytest.raises(UserError, match="no recipe file"):
        recipes.load(str(tmp_path / "none.yaml"))
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1")
    with pytest.raises(UserError, match="not valid YAML"):
        recipes.load(str(broken))


def test_a_recipe_changes_its_base(tmp_path):
    whole, changed = recipes.load("hjepa-cpu"), recipes.load("hjepa-sigreg")
    assert (changed.name, changed.family.regulariser.kind) == ("hjepa-sigreg", "sigreg")
    differing = {k for k, v in changed.plain().items() if whole.plain()[k] != v}
    assert differing == {"name", "family"}
    own = {"family": changed.family.model_copy(update={"regulariser": whole.family.regulariser}), "name": "hjepa-cpu"}
    assert changed.model_copy(update=own) == whole
    circle = tmp_path / "circle.yaml"
    circle.write_text(f"base: {circle}")
    with pytest.raises(UserError, match="is its own base"):
        recipes.load(str(circle))
    circle.write_text("base: hjepa-cp")
    with pytest.raises(UserError, match="unknown recipe 'hjepa-cp': did you mean 'hjepa-cpu'"):
        recipes.load(str(circle))


def test_a_resolved_config_is_a_recipe_file(tmp_path):
    config = recipes.load("demo", ["seed=7"])
    (tmp_path / "run.json").write_text(json.dumps(config.plain()))
    assert recipes.load(str(tmp_path / "run.json")) == config
    (tmp_path / "run.yaml").write_text(recipes.to_yaml(config))
    assert recipes.load(str(tmp_path / "run.yaml")) == config


def test_configs_are_frozen():
    with pytest.raises(ValidationError):
        recipes.load("demo").seed = 1


def test_the_schema_describes_every_setting():
    schema = json.loads(recipes.schema())
    assert schema["properties"]["data"]["$ref"].endswith("/Data")
    assert {"Lars", "Sgd", "AdamW", "ResNet", "ViT", "VicregLoss"} <= set(schema["$defs"])


def test_intervals():
    assert parse_interval("2.5 minutes") == (2.5, "minutes")
    for bad in ("5", "5 days", "-1 steps", "0 epochs", "five steps"):
        with pytest.raises(ValueError):
            parse_interval(bad)


def config_leaves(model, found):
    """(config type, field) of every leaf below a type."""
    for name, field in model.model_fields.items():
        variants = recipes._variants(field.annotation)
        for variant in variants:
            config_leaves(variant, found)
        if not variants:
            found.setdefault(name, set()).add(model.__name__)
    return found


def names_read(paths):
    """Attribute names, keyword parameters and string constants that code outside the config module mentions."""
    read = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                read.add(node.attr)
            elif isinstance(node, ast.arg):
                read.add(node.arg)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                read.add(node.value)
    return read


def test_every_setting_is_read_somewhere():
    sources = [p for room in ("service", "jobs") for p in (ROOT / room).rglob("*.py") if p.name != "config.py"]
    passed_on = {name for kind in (SGD, AdamW) for name in signature(kind).parameters}  # by `build_optimizer`
    read = names_read(sources) | passed_on
    leaves = config_leaves(RunConfig, {})
    assert len(leaves) > 70
    unread = {f"{'/'.join(sorted(owners))}.{name}" for name, owners in leaves.items() if name not in read}
    assert unread - {"RunConfig.repeat"} == set()  # `repeat` only changes the run's name: test_package checks that


def test_help_and_configs_import_nothing_heavy():
    code = (
        "import sys, jobs.cli, jobs.recipes as r; r.load('demo'); print({'torch', 'ray', 'mlflow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "set()"
