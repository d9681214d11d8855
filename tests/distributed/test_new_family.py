"""A new family is one file in `families/` and one class in `config.py`, entered in its union."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).parents[2]
CONFIG = '''class Toy(FamilyConfig):
    """Representations that ought to have length 1."""

    components: ClassVar[tuple[str, ...]] = ("encoder",)
    kind: Literal["toy"] = "toy"
    views: Literal[1] = 1
    encoder: Encoder = ResNet()
    power: Count = 2


Family = Annotated[Toy | '''
MODULE = """from service.families.base import Batch, Embedded, Family, Losses
from service.models.encoder import build_encoder


class ToyFamily(Family):
    batch_statistics = False

    def __init__(self, config, image_size):
        super().__init__()
        self.power = config.power
        self.encoder = build_encoder(image_size=image_size, **config.encoder_options())

    def embed(self, batch: Batch) -> Embedded:
        return {"encoder": self.encoder(batch.views[0])}

    def losses(self, embedded: Embedded, batch: Batch) -> Losses:
        length = embedded["encoder"].norm(dim=1)
        return Losses(((length - 1) ** self.power).mean(), {}, {"encoder": embedded["encoder"].detach()[None]})
"""
RECIPE = """data: {{uri: {digits}, image_size: 8, batch_size: 16}}
family: {{kind: toy, encoder: {{kind: resnet, depth: 8, width: 4, norm: group}}, power: 4}}
optim: {{kind: adamw, lr: 1e-2}}
schedule: {{steps: 8, warmup_epochs: 0, start_lr: 0.0}}
compute: {{device: cpu, precision: fp32}}
tracking: {{log_every: 1 steps}}
"""
TRAIN = """import json, sys
from jobs import recipes
from service.data.store import Store
from service.engine.loop import Run, train
from service.export import load_encoder
from pathlib import Path
losses = []


def take(step, row):
    losses.extend(value for name, value in row.items() if name == "loss")


train(recipes.load(sys.argv[1]), Run(Store(sys.argv[2])), take)
print(json.dumps({"losses": losses, "dim": load_encoder(Path(sys.argv[2]) / "encoder").dim}))
"""


def test_a_family_is_one_file_and_one_config_class(tmp_path, few_digits):
    for room in ("service", "jobs", "datasets_prep"):
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    config = tmp_path / "service/config.py"
    text = config.read_text()
    assert text.count("Family = Annotated[") == 1
    config.write_text(text.replace("Family = Annotated[", CONFIG))
    (tmp_path / "service/families/toy.py").write_text(MODULE)
    (tmp_path / "toy.yaml").write_text(RECIPE.format(digits=few_digits))
    command = [sys.executable, "-c", TRAIN, "toy.yaml", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert len(told["losses"]) == 8 and told["losses"][-1] < told["losses"][0] and told["dim"] == 16
