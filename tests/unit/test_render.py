"""Rendered manifests pass the schema or tool of whoever reads them, and say what their profile says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from click.testing import CliRunner

from cluster.profiles import names, read
from cluster.render import IMAGE, JOB_TARGETS, TARGETS, render
from jobs import cli_cluster
from jobs.cli import cli

ROOT = Path(__file__).parents[2]
RUN = ("rapid", "data.uri=s3://data/cifar 10", "optim.lr=0.3")
WHERE = ("storage_uri=s3://runs", "tracking_uri=http://mlflow:5000")
PROFILES = [name for name in names() if name != "local"]
SECRETS = {"RAY_AUTH_TOKEN": "t0ken-value", "AWS_ACCESS_KEY_ID": "key-value", "AWS_SECRET_ACCESS_KEY": "secret-value"}


def _rendered(target: str, name: str, *overrides: str) -> dict[str, str]:
    nodes = read(name, overrides).nodes
    hosts = f"hosts=[{', '.join(f'10.0.0.{number}' for number in range(1, nodes + 1))}]"
    file = read(name, [*WHERE, *overrides, *([hosts] if target == "ray-yaml" else [])])
    return render(target, name, file, RUN if target in JOB_TARGETS else ())


def _document(target: str, name: str, *overrides: str) -> dict[str, Any]:
    (text,) = _rendered(target, name, *overrides).values()
    return yaml.safe_load(text)


def _tool(name: str) -> str:
    path = shutil.which(name, path=str(Path(sys.executable).parent))
    assert path is not None, f"{name} is in the dev packages"
    return path


# What KubeRay's API (ray.io/v1, ray-operator/apis/ray/v1/*_types.go) calls the keys that are used here, and their
# types; an unknown key, or a value of another type, is refused by the cluster.
STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
POD = {
    "type": "object",
    "required": ["spec"],
    "additionalProperties": False,
    "properties": {"metadata": {"type": "object"}, "spec": {"type": "object"}},
}


def _keys(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "required": required, "properties": properties}


COUNT = {"type": "integer", "minimum": 0}
GROUP = {"rayStartParams": STRINGS, "template": POD}
RAY_CLUSTER = _keys(
    ["headGroupSpec"],
    rayVersion={"type": "string"},
    authOptions=_keys([], mode={"enum": ["disabled", "token"]}),
    headGroupSpec=_keys(["rayStartParams", "template"], **GROUP),
    workerGroupSpecs={
        "type": "array",
        "items": _keys(
            ["groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"],
            groupName={"type": "string"}, replicas=COUNT, minReplicas=COUNT, maxReplicas=COUNT, **GROUP,
        ),
    },
)  # fmt: skip
RAY_JOB = _keys(
    [],
    entrypoint={"type": "string"},
    shutdownAfterJobFinishes={"type": "boolean"},
    ttlSecondsAfterFinished=COUNT,
    backoffLimit=COUNT,
    rayClusterSpec=RAY_CLUSTER,
)


def _check_kubernetes(document: dict[str, Any], kind: str, schema: dict[str, Any]) -> None:
    assert (document["apiVersion"], document["kind"]) == ("ray.io/v1", kind)
    jsonschema.validate(document["spec"], schema)
    cluster = document["spec"].get("rayClusterSpec", document["spec"])
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **group["template"]}
        kubernetes_validate.validate(pod, "1.34", strict=True)


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize(
    ("target", "kind", "schema"), [("kuberay", "RayCluster", RAY_CLUSTER), ("rayjob", "RayJob", RAY_JOB)]
)
def test_kubernetes_takes_the_manifests(target, kind, schema, name):
    _check_kubernetes(_document(target, name), kind, schema)


def test_a_misspelt_key_is_found_by_the_schemas():
    document = _document("kuberay", "rtx4090")
    container = document["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    container["imagePullPolice"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError, match="imagePullPolice"):
        _check_kubernetes(document, "RayCluster", RAY_CLUSTER)
    del container["imagePullPolice"], document["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"]
    document["spec"]["headGroupSpec"]["rayStartParams"]["num-gpus"] = 0
    with pytest.raises(jsonschema.ValidationError, match="0 is not of type 'string'"):
        _check_kubernetes(document, "RayCluster", RAY_CLUSTER)


@pytest.mark.parametrize("runtime", [(), (f"runtime.image={IMAGE}", "runtime.kind=image")])
@pytest.mark.parametrize("name", ["rtx4090", "a100x8x4"])
def test_ray_s_cluster_launcher_takes_the_config(name, runtime):
    from ray.autoscaler._private.util import prepare_config, validate_config

    overrides = ("runtime={kind: packages}", *runtime) if not runtime else ("runtime={}", *runtime)
    document = _document("ray-yaml", name, *overrides, "ssh_private_key=~/.ssh/id_ed25519")
    config = prepare_config(document)
    validate_config(config)
    assert config["auth"] == {"ssh_user": "ubuntu", "ssh_private_key": "~/.ssh/id_ed25519"}
    assert config["provider"]["worker_ips"] == [f"10.0.0.{n}" for n in range(2, read(name).nodes + 1)]
    assert ("docker" in document, "setup_commands" in document) == (bool(runtime), not runtime)
    for command in (
        *config["head_start_ray_commands"],
        *config["worker_start_ray_commands"],
        *config["setup_commands"],
    ):
        subprocess.run(["bash", "-n", "-c", command], check=True)


def test_without_a_key_the_launcher_takes_those_of_the_nodes():
    assert _document("ray-yaml", "a100x8x4", "runtime={kind: packages}")["auth"] == {"ssh_user": "ubuntu"}


def _check_compose(document: dict[str, Any]) -> None:
    schema = (files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json").read_text()
    jsonschema.Draft202012Validator(json.loads(schema)).validate(document)


@pytest.mark.parametrize("name", [name for name in PROFILES if read(name).nodes == 1])
def test_compose_takes_the_file(name):
    document = _document("compose", name)
    _check_compose(document)
    worker, node = document["services"]["worker"], read(name).node
    assert (worker["cpus"], worker["shm_size"]) == (node.cpus, f"{node.shm_gib:g}gb")
    assert worker["deploy"]["resources"]["reservations"]["devices"][0]["count"] == node.gpus


# Of the manual of sbatch.
SBATCH = {"job-name", "nodes", "ntasks-per-node", "cpus-per-task", "mem", "gpus-per-node", "time", "signal",
          "open-mode", "output", "requeue"}  # fmt: skip


@pytest.mark.parametrize("name", ["a100x8x4", "cpu-cluster", "rtx4090"])
def test_the_batch_script_is_sound(name, tmp_path):
    (text,) = _rendered("slurm", name).values()
    script = tmp_path / "job.sbatch"
    script.write_text(text)
    subprocess.run(["bash", "-n", str(script)], check=True)
    checked = subprocess.run([_tool("shellcheck"), str(script)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    lines = text.splitlines()
    options = {line.removeprefix("#SBATCH --").split("=")[0] for line in lines if line.startswith("#SBATCH ")}
    assert options <= SBATCH and text.startswith("#!/bin/bash\n#SBATCH ")
    assert ("gpus-per-node" in options) == (read(name).node.gpus > 0)
    assert "python -m jobs.train rapid 'data.uri=s3://data/cifar 10' optim.lr=0.3 &" in text


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not on this machine")
@pytest.mark.parametrize("name", ["rtx4090", "rtx4090x2"])
def test_systemd_takes_the_units(name, tmp_path):
    units = _rendered("systemd", name, "env.ODD='50% of \"x\"'")
    assert sorted(units) == ["tessera-head.service", "tessera-worker.service"]
    for unit, text in units.items():
        assert 'Environment="ODD=50%% of \\"x\\""' in text
        assert "StateDirectory=tessera\n" in text and "Environment=HOME=/var/lib/tessera\n" in text
        assert "useradd --system --home-dir /var/lib/tessera tessera;" in text
        (tmp_path / unit).write_text(text.replace("/opt/tessera/.venv/bin/ray", shutil.which("true") or ""))
    paths = [str(tmp_path / unit) for unit in units]
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", *paths], capture_output=True, text=True)
    assert done.returncode == 0 and str(tmp_path) not in done.stderr, done.stderr


@pytest.mark.parametrize("target", TARGETS)
def test_secrets_are_named_and_never_written(target, monkeypatch):
    for key, value in SECRETS.items():
        monkeypatch.setenv(key, value)
    text = "".join(_rendered(target, "rtx4090").values())
    assert not [value for value in SECRETS.values() if value in text]
    assert [key for key in SECRETS if key not in text] == (["RAY_AUTH_TOKEN"] if target == "rayjob" else [])


def _starts(target: str) -> list[str]:
    """Each command of a target that starts Ray, as one line."""
    units = _rendered(target, "rtx4090").values()
    if target in ("slurm", "systemd"):
        return [line for text in units for line in text.splitlines() if "ray start" in line]
    (document,) = map(yaml.safe_load, units)
    if target == "compose":
        return [" ".join(document["services"]["worker"]["command"])]
    if target == "ray-yaml":
        return [document[f"{role}_start_ray_commands"][-1] for role in ("head", "worker")]
    spec = document["spec"].get("rayClusterSpec", document["spec"])
    groups = (spec["headGroupSpec"], *spec["workerGroupSpecs"])
    return ["ray start " + " ".join(f"--{name}" for name in group["rayStartParams"]) for group in groups]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_ray_start_knows_every_option():
    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in parameter.opts}
    for target in TARGETS:
        for line in _starts(target):
            used = set(re.findall(r"--[a-z-]+", line.split("ray start")[1]))
            assert {"--num-cpus", "--num-gpus", "--metrics-export-port"} < used <= known, target


CHANGES = [
    ("kuberay", "nodes=3", "replicas: 3"),
    ("kuberay", "node.cpus=10", "cpu: 9000m"),
    ("kuberay", "node.memory_gib=100", "memory: 90Gi"),
    ("kuberay", "node.disk_gib=100", "ephemeral-storage: 90Gi"),
    ("kuberay", "node.shm_gib=3", "sizeLimit: 3Gi"),
    ("kuberay", "node.gpus=4", "nvidia.com/gpu: '4'"),
    ("kuberay", "node.gpu=h200", "nvidia.com/gpu.product: NVIDIA-H200"),
    ("kuberay", "interconnect.pod_resources={rdma/hca: '1'}", "rdma/hca: '1'"),
    ("kuberay", "interconnect.between=infiniband", "- IPC_LOCK"),
    ("kuberay", "secrets=[WANDB_API_KEY]", "key: WANDB_API_KEY"),
    ("kuberay", "env.NCCL_DEBUG=INFO", "value: INFO"),
    ("kuberay", "storage_uri=gs://mine", "value: gs://mine"),
    ("rayjob", "tracking_uri=http://mine", "value: http://mine"),
    ("ray-yaml", "ssh_user=me", "ssh_user: me"),
    ("ray-yaml", "node.gpus=4", "--num-gpus=4"),
    ("ray-yaml", "env.NCCL_DEBUG=a b", "NCCL_DEBUG='a b'"),
    ("ray-yaml", "runtime.lock=other.lock", "other.lock"),
    ("slurm", "runtime={kind: image, image: mine:1}", "--container-image=mine:1"),
    ("slurm", "node.memory_gib=100", "#SBATCH --mem=90G"),
    ("compose", "node.memory_gib=100", "mem_limit: 100gb"),
    ("compose", "runtime={kind: image, image: 'mine:1'}", "image: mine:1"),
    ("compose", "env.PRICE=5$", "PRICE: 5$$"),
    ("systemd", "node.cpus=7", "--num-cpus=7"),
]


@pytest.mark.parametrize(("target", "change", "said"), CHANGES)
def test_what_the_profile_says_is_in_the_manifest(target, change, said):
    nodes = ["interconnect.between=ethernet"] if change.startswith("nodes") else []
    before = "".join(_rendered(target, "rtx4090").values())
    after = "".join(_rendered(target, "rtx4090", *nodes, change).values())
    assert said in after and said not in before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("rtx4090 --for ray-yaml", "rtx4090 names no hosts: add hosts=[ADDRESS, …]"),
        ("rtx4090 --for ray-yaml hosts=[10.0.0.1,10.0.0.2]", "names 2 of nodes=1"),
        (
            "cpu-cluster --for ray-yaml hosts=[10.0.0.1,10.0.0.2,10.0.0.3,10.0.0.4]",
            "nodes=4 with no ssh_private_key: add ssh_private_key=~/.ssh/KEY",
        ),
        ("a100x8x4 --for compose", "has nodes=4: use kuberay, or nodes=1"),
        ("rtx4090 --for rayjob", "needs --run 'RECIPE key=value', tracking_uri=ADDRESS, storage_uri=ADDRESS"),
        ("rtx4090 --for kuberay --run demo", "kuberay starts a cluster only"),
        ("rtx4090 --for slurm --run no-such-recipe", "unknown recipe 'no-such-recipe'"),
        ("rtx4090 --for slurm --run ijepa-vitb-imagenet", "need 8 GPUs, the cluster has 1"),
        ("rtx4090 --for rayjob --run demo storage_uri=s3://r tracking_uri=http://m", "is a folder of this machine"),
        ("rtx4090 --for kuberay node.cpu=4", "node.cpu is no key of a profile"),
        ("rtx4090 --for kuberay node.cpus", "'node.cpus' is no override: write key.sub=value"),
        ("rtx4090 --for kuberay 'node.cpus=['", "node.cpus='['"),
        ("rtx5090 --for kuberay", "unknown profile"),
    ],
)
def test_what_cannot_be_rendered_is_said(arguments, said):
    import shlex

    done = CliRunner().invoke(cli, ["cluster", "render", *shlex.split(arguments)])
    assert done.exit_code != 0 and said in str(done.exception), done.output


def test_rendering_writes_files_and_shows_what_it_wrote(tmp_path):
    out = tmp_path / "new" / "units"
    shown = CliRunner().invoke(cli, ["cluster", "render", "rtx4090", "--for", "systemd", "-o", str(out)])
    assert shown.output.split() == [str(out / f"tessera-{role}.service") for role in ("head", "worker")]
    assert "ray start --block --head" in (out / "tessera-head.service").read_text()
    row = CliRunner().invoke(cli, ["cluster", "render", "My_Box.yaml", "--for", "kuberay", "--json"])
    assert "there is no such file" in str(row.exception)
    (tmp_path / "My_Box.yaml").write_text(yaml.safe_dump(read("rtx4090").model_dump(mode="json")))
    row = CliRunner().invoke(cli, ["cluster", "render", str(tmp_path / "My_Box.yaml"), "--for", "kuberay", "--json"])
    assert list(json.loads(row.output)["files"]) == ["my-box.kuberay.yaml"]


@pytest.mark.parametrize("name", [*PROFILES, "local"])
def test_what_is_shown_reads_back_as_the_same_profile(name, tmp_path):
    shown = CliRunner().invoke(cli, ["cluster", "show", name, "price_per_node_hour=1.5"]).output
    (tmp_path / "mine.yaml").write_text(shown)
    assert read(str(tmp_path / "mine.yaml")) == read(name, ["price_per_node_hour=1.5"])
    as_json = CliRunner().invoke(cli, ["cluster", "show", name, "--json"]).output
    assert json.loads(as_json) == read(name).model_dump(mode="json")


def test_every_profile_is_listed_with_what_it_is():
    text = CliRunner().invoke(cli, ["cluster", "list"]).output
    assert re.search(r"^a100x8x4 +Four nodes with eight A100 of 80 GB each", text, re.MULTILINE)
    rows = json.loads(CliRunner().invoke(cli, ["cluster", "list", "--json"]).output)
    assert list(rows) == names() and rows["rtx4090"]["node"]["gpus"] == 1


def test_the_command_offers_every_target_and_the_image_has_our_version():
    import tomllib

    assert tuple(TARGETS) == cli_cluster._TARGETS and set(JOB_TARGETS) < set(TARGETS)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert IMAGE == f"tessera-train:{version}"
