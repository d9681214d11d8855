"""Manifests of a profile, ready to start its cluster by: one pure function a target, from a profile to named files.

Secrets are named, never written: Kubernetes takes them from its secret `tessera-secrets`, the other targets from a
file of variables that stays on the machine.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from cluster.hardware import GPUS, Node
from cluster.profiles import Image, ProfileFile
from datasets_prep.errors import UserError

IMAGE = "tessera-train:0.1.0"  # what docker/train.Dockerfile is built as
SECRET = "tessera-secrets"
SECRETS_FILE = "~/.tessera/secrets.env"

_GCS, _DASHBOARD, _CLIENT, _METRICS = 6379, 8265, 10001, 8080
_FOLDER = "/opt/tessera"
_TOKEN = "RAY_AUTH_TOKEN"
_GRACE_SECONDS = 60  # for the last checkpoint of workers that are told to go
_WARNING_SECONDS = 180  # before Slurm's time limit
_SYSTEM_SHARE = 0.1  # of a node's CPUs and memory, which pods leave to the system
_HEAD_POD: Mapping[str, str] = {"cpu": "4", "memory": "16Gi"}  # it holds drivers, no workers
_USER = 1000  # of the image

Files = dict[str, str]


def render(target: str, name: str, profile: ProfileFile, run: Sequence[str] = ()) -> Files:
    """Return the files, by name, that start a profile's cluster on a target, or run one recipe there.

    Args:
        target: one of `TARGETS`.
        name: of the profile, or the path of its file.
        profile: what to start.
        run: recipe and its overrides, for the targets that run a job (`JOB_TARGETS`).

    Raises:
        UserError: unknown target, or a profile that lacks what the target needs.
    """
    if target not in TARGETS:
        raise UserError(f"--for {target}: use one of {', '.join(TARGETS)}")
    name = re.sub("[^a-z0-9]+", "-", Path(name).name.removesuffix(".yaml").lower()).strip("-")
    if target not in JOB_TARGETS:
        if run:
            raise UserError(f"--run goes with --for {' or '.join(JOB_TARGETS)}; {target} starts a cluster only")
        return TARGETS[target](name, profile, ())
    missing = [key for key in ("tracking_uri", "storage_uri") if getattr(profile, key) is None]
    if not run or missing:
        missing = [*([] if run else ["--run 'RECIPE key=value'"]), *(f"{key}=ADDRESS" for key in missing)]
        raise UserError(f"--for {target} runs a job and needs {', '.join(missing)}")
    return TARGETS[target](name, profile, run)


def _yaml(comment: str, *documents: Mapping[str, Any]) -> str:
    lines = "".join(f"# {line}\n" for line in comment.splitlines())
    return lines + yaml.safe_dump_all(documents, sort_keys=False, allow_unicode=True, width=120)


def _image(profile: ProfileFile) -> str:
    return profile.runtime.image if isinstance(profile.runtime, Image) else IMAGE


def _environment(profile: ProfileFile) -> dict[str, str]:
    """What every process of the cluster has in its environment, secrets aside."""
    addresses = {"MLFLOW_TRACKING_URI": profile.tracking_uri, "TESSERA_STORAGE": profile.storage_uri}
    return {"RAY_AUTH_MODE": "token", **{k: v for k, v in addresses.items() if v}, **profile.env}


def _secrets(profile: ProfileFile) -> list[str]:
    return list(dict.fromkeys((_TOKEN, *profile.secrets)))


def _head_options(node: Node) -> list[str]:
    """Options of `ray start` on the head; its dashboard, where jobs are submitted, is reached through a tunnel."""
    return ["--head", f"--port={_GCS}", "--dashboard-host=127.0.0.1", *_resources(node)]


def _resources(node: Node) -> list[str]:
    amounts = [f"--num-cpus={node.cpus}", f"--num-gpus={node.gpus}"]
    return [*amounts, f"--metrics-export-port={_METRICS}", "--disable-usage-stats"]


def _ray_yaml(name: str, profile: ProfileFile, run: Sequence[str]) -> Files:
    """Ray's cluster launcher, for machines that are there and answer ssh."""
    if not profile.hosts:
        raise UserError(f"--for ray-yaml starts Ray by ssh, and {name} names no hosts: add hosts=[ADDRESS, …]")
    in_image = isinstance(profile.runtime, Image)
    auth = {"ssh_user": profile.ssh_user, "ssh_private_key": profile.ssh_private_key}
    if in_image and profile.nodes > 1 and not profile.ssh_private_key:
        raise UserError(
            f"--for ray-yaml has the head's container log in to the workers of {name}, and nodes={profile.nodes} with "
            "no ssh_private_key: add ssh_private_key=~/.ssh/KEY, a file of the machine that runs `ray up`"
        )
    environment = " ".join(f"{key}={shlex.quote(value)}" for key, value in _environment(profile).items())
    prepare = f"set -a; . {SECRETS_FILE}; set +a; export {environment}; ulimit -n 65536; "
    activate = "" if in_image else ". ~/tessera/.venv/bin/activate; "
    config: dict[str, Any] = {
        "cluster_name": f"tessera-{name}",
        "max_workers": profile.nodes - 1,
        "provider": {"type": "local", "head_ip": profile.hosts[0], "worker_ips": list(profile.hosts[1:])},
        "auth": {name: value for name, value in auth.items() if value},
        "file_mounts": {SECRETS_FILE: SECRETS_FILE},
        "head_start_ray_commands": [
            f"{activate}ray stop",
            f"{activate}{prepare}ray start --autoscaling-config=~/ray_bootstrap_config.yaml "
            + " ".join(_head_options(profile.node)),
        ],
        "worker_start_ray_commands": [
            f"{activate}ray stop",
            f"{activate}{prepare}ray start --address=$RAY_HEAD_IP:{_GCS} " + " ".join(_resources(profile.node)),
        ],
    }
    if in_image:
        options = [f"--shm-size={profile.node.shm_gib:g}g", "--ulimit=memlock=-1", "--ulimit=nofile=65536"]
        config["docker"] = {"image": _image(profile), "container_name": "tessera", "run_options": options}
    if profile.runtime.kind == "packages":
        lock = "~/tessera/requirements.lock"
        config["file_mounts"][lock] = profile.runtime.lock
        config["setup_commands"] = [
            "test -x ~/tessera/.venv/bin/python || python3 -m venv ~/tessera/.venv",
            f'~/tessera/.venv/bin/pip install --quiet "$(grep ^uv== {lock})"',
            f"~/tessera/.venv/bin/uv pip install --python ~/tessera/.venv/bin/python --requirements {lock}",
        ]
    said = f"ray up {name}.ray.yaml; ray dashboard {name}.ray.yaml\n{SECRETS_FILE} holds {_lines_of(profile)}"
    return {f"{name}.ray.yaml": _yaml(said, config)}


def _lines_of(profile: ProfileFile) -> str:
    return "one line NAME=value for each of " + ", ".join(_secrets(profile))


def _kuberay(name: str, profile: ProfileFile, run: Sequence[str]) -> Files:
    """A RayCluster, for KubeRay 1.5 or newer, which makes Ray's token itself."""
    said = (
        f"kubectl create secret generic {SECRET} --from-env-file=secrets.env   # {', '.join(profile.secrets)}\n"
        f"kubectl apply -f {name}.kuberay.yaml; kubectl port-forward service/tessera-{name}-head-svc {_DASHBOARD}\n"
        f"RAY_AUTH_TOKEN: kubectl get secret tessera-{name} -o jsonpath='{{.data.auth_token}}' | base64 -d"
    )
    manifest = {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {"name": f"tessera-{name}"},
        "spec": _ray_cluster(profile),
    }
    return {f"{name}.kuberay.yaml": _yaml(said, manifest)}


def _rayjob(name: str, profile: ProfileFile, run: Sequence[str]) -> Files:
    """A RayJob: a cluster that lives as long as one run."""
    manifest = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": f"tessera-{name}"},
        "spec": {
            "entrypoint": shlex.join(["python", "-m", "jobs.train", *run]),
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "backoffLimit": 3,  # each with a new cluster, in which the run goes on
            "rayClusterSpec": _ray_cluster(profile),
        },
    }
    said = (
        f"kubectl create secret generic {SECRET} --from-env-file=secrets.env   # {', '.join(profile.secrets)}\n"
        f"kubectl apply -f {name}.rayjob.yaml; kubectl logs -f job/tessera-{name}"
    )
    return {f"{name}.rayjob.yaml": _yaml(said, manifest)}


def _ray_cluster(profile: ProfileFile) -> dict[str, Any]:
    common = {"metrics-export-port": str(_METRICS), "disable-usage-stats": "true"}
    return {
        "rayVersion": version("ray"),
        "authOptions": {"mode": "token"},
        "headGroupSpec": {
            "rayStartParams": {"dashboard-host": "0.0.0.0", "num-cpus": "0", "num-gpus": "0", **common},
            "template": {"spec": _pod(profile, "ray-head", _HEAD_POD, _HEAD_POD)},
        },
        "workerGroupSpecs": [
            {
                "groupName": "workers",
                "replicas": profile.nodes,
                "minReplicas": profile.nodes,
                "maxReplicas": profile.nodes,
                "rayStartParams": {"num-cpus": str(profile.node.cpus), "num-gpus": str(profile.node.gpus), **common},
                "template": {"spec": _worker_pod(profile)},
            }
        ],
    }


def _worker_pod(profile: ProfileFile) -> dict[str, Any]:
    node, share = profile.node, 1 - _SYSTEM_SHARE
    devices = {**({"nvidia.com/gpu": str(node.gpus)} if node.gpus else {}), **profile.interconnect.pod_resources}
    limits = {"memory": f"{int(node.memory_gib * share)}Gi", **devices}
    requests = {"cpu": f"{int(1000 * node.cpus * share)}m", "ephemeral-storage": f"{int(node.disk_gib * share)}Gi"}
    pod = _pod(profile, "ray-worker", {**requests, **limits}, limits)
    if node.gpu:
        pod["nodeSelector"] = {"nvidia.com/gpu.product": GPUS[node.gpu].product.replace(" ", "-")}
    if node.gpus:
        pod["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    return pod


def _pod(profile: ProfileFile, name: str, requests: Mapping[str, str], limits: Mapping[str, str]) -> dict[str, Any]:
    environment: list[dict[str, Any]] = [
        {"name": key, "value": value} for key, value in _environment(profile).items() if key != "RAY_AUTH_MODE"
    ]
    for key in profile.secrets:
        if key != _TOKEN:  # which KubeRay makes
            environment.append({"name": key, "valueFrom": {"secretKeyRef": {"name": SECRET, "key": key}}})
    ports = {"gcs": _GCS, "dashboard": _DASHBOARD, "client": _CLIENT} if name == "ray-head" else {}
    pinned = profile.interconnect.between in ("efa", "infiniband")  # their adapters write to locked memory
    return {
        "terminationGracePeriodSeconds": _GRACE_SECONDS,
        "securityContext": {"runAsNonRoot": True, "runAsUser": _USER, "fsGroup": _USER},
        "containers": [
            {
                "name": name,
                "image": _image(profile),
                "ports": [{"name": k, "containerPort": v} for k, v in {**ports, "metrics": _METRICS}.items()],
                "env": environment,
                "resources": {"requests": dict(requests), "limits": dict(limits)},
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "capabilities": {"drop": ["ALL"], **({"add": ["IPC_LOCK"]} if pinned else {})},
                },
                "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}, {"name": "scratch", "mountPath": "/tmp"}],
            }
        ],
        "volumes": [
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{profile.node.shm_gib:g}Gi"}},
            {"name": "scratch", "emptyDir": {}},
        ],
    }


def _compose(name: str, profile: ProfileFile, run: Sequence[str]) -> Files:
    """What a profile changes of docker/compose.yaml: image, resources and environment of its Ray worker."""
    if profile.nodes > 1:
        raise UserError(f"--for compose is one machine, and {name} has nodes={profile.nodes}: use kuberay, or nodes=1")
    node = profile.node
    worker: dict[str, Any] = {
        "image": _image(profile),
        "command": ["ray", "start", "--block", f"--address=head:{_GCS}", *_resources(node)],
        "shm_size": f"{node.shm_gib:g}gb",
        "cpus": node.cpus,
        "mem_limit": f"{node.memory_gib:g}gb",
        "environment": {key: value.replace("$", "$$") for key, value in _environment(profile).items()}
        | {key: f"${{{key}:?}}" for key in _secrets(profile)},
    }
    if node.gpus:
        device = {"driver": "nvidia", "count": node.gpus, "capabilities": ["gpu"]}
        worker["deploy"] = {"resources": {"reservations": {"devices": [device]}}}
    services = {"head": {"image": _image(profile)}, "worker": worker}
    said = f"docker compose -f docker/compose.yaml -f {name}.compose.yaml --env-file secrets.env up --wait"
    return {f"{name}.compose.yaml": _yaml(said, {"services": services})}


def _slurm(name: str, profile: ProfileFile, run: Sequence[str]) -> Files:
    """A batch script that starts Ray on its nodes, trains, and puts itself back in the queue when it has to go."""
    node = profile.node
    options: dict[str, Any] = {
        "job-name": f"tessera-{name}",
        "nodes": profile.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": node.cpus,
        "mem": f"{int(node.memory_gib * (1 - _SYSTEM_SHARE))}G",
        **({"gpus-per-node": node.gpus} if node.gpus else {}),
        "time": "24:00:00",
        "signal": f"B:USR1@{_WARNING_SECONDS}",
        "open-mode": "append",
        "output": "%x-%j.log",
    }
    lines = [f"#SBATCH --{key}={value}" for key, value in options.items()]
    container = [f"--container-image={_image(profile)}", '--container-mounts="$PWD:$PWD"', '--container-workdir="$PWD"']
    script = _SLURM.format(
        options="\n".join([*lines, "#SBATCH --requeue"]),
        file=f"{name}.sbatch",
        secrets=SECRETS_FILE,
        required="\n".join(f': "${{{key}:?is missing in {SECRETS_FILE}}}"' for key in profile.secrets if key != _TOKEN),
        environment="\n".join(f"export {key}={shlex.quote(value)}" for key, value in _environment(profile).items()),
        container=" ".join(container) if isinstance(profile.runtime, Image) else "",
        port=_GCS,
        head=" ".join(_head_options(node)),
        worker=" ".join(_resources(node)),
        run=shlex.join(run),
    )
    return {f"{name}.sbatch": script}


_SLURM = """\
#!/bin/bash
{options}
# sbatch {file}     in a checkout with `make setup` done, that all nodes see
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
set -a
# shellcheck disable=SC1090
if [ -r {secrets} ]; then . {secrets}; fi
set +a
{required}
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \\n')
export RAY_AUTH_TOKEN
{environment}
export PYTHONPATH=$PWD PATH=$PWD/.venv/bin:$PATH TESSERA_JOB=slurm-$SLURM_JOB_ID

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
step=(srun --overlap --nodes=1 --ntasks=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" {container})
address=$("${{step[@]}}" --nodelist="${{hosts[0]}}" hostname --all-ip-addresses | cut -d ' ' -f 1)
export RAY_ADDRESS=$address:{port}

"${{step[@]}}" --nodelist="${{hosts[0]}}" ray start --block --node-ip-address="$address" {head} &
ray=$!
until "${{step[@]}}" --nodelist="${{hosts[0]}}" ray health-check --address="$RAY_ADDRESS"; do
    kill -0 "$ray" # ends the job when Ray did not start
    sleep 2
done
for host in "${{hosts[@]:1}}"; do
    "${{step[@]}}" --nodelist="$host" ray start --block --address="$RAY_ADDRESS" {worker} &
done

"${{step[@]}}" --nodelist="${{hosts[0]}}" python -m jobs.train {run} &
driver=$! requeue=
# The driver answers SIGUSR1 with a checkpoint of the step it is at; the same script then goes on from there. SIGTERM
# would make srun kill it.
trap 'requeue=yes; kill -USR1 "$driver" || true' USR1
trap 'kill -USR1 "$driver" || true' TERM
code=0
wait "$driver" || code=$?
while kill -0 "$driver" 2>/dev/null; do
    code=0
    wait "$driver" || code=$?
done
if [ "$requeue" ] && [ "$code" -ne 0 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
"""


def _systemd(name: str, profile: ProfileFile, run: Sequence[str]) -> Files:
    """Units that keep Ray running on machines of one's own: the head on one, workers on any others."""
    units = {"head": _head_options(profile.node), "worker": [f"--address=${{TESSERA_HEAD}}:{_GCS}"]}
    units["worker"] += _resources(profile.node)
    environment = {**_environment(profile), "PATH": f"{_FOLDER}/.venv/bin:/usr/local/bin:/usr/bin:/bin"}
    return {
        f"tessera-{role}.service": _UNIT.format(
            role=role,
            name=name,
            folder=_FOLDER,
            lines=_lines_of(profile) + (", TESSERA_HEAD" if role == "worker" else ""),
            environment="\n".join(
                f"Environment={_unit_quoted(f'{key}={value}')}" for key, value in environment.items()
            ),
            options=" ".join(options),
            grace=_GRACE_SECONDS,
        )
        for role, options in units.items()
    }


def _unit_quoted(text: str) -> str:
    """Write a word as systemd reads it back: % begins a specifier, a backslash an escape."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"'


_UNIT = """\
# useradd --system --home-dir /var/lib/tessera tessera; git clone … {folder}; make -C {folder} setup
# /etc/tessera/secrets.env, of root with mode 600, holds {lines}
# cp tessera-{role}.service /etc/systemd/system; systemctl enable --now tessera-{role}
[Unit]
Description=Ray {role} of Tessera on {name}
Wants=network-online.target
After=network-online.target

[Service]
User=tessera
StateDirectory=tessera
WorkingDirectory=/var/lib/tessera
EnvironmentFile=/etc/tessera/secrets.env
Environment=HOME=/var/lib/tessera
{environment}
ExecStart={folder}/.venv/bin/ray start --block {options}
Restart=always
RestartSec=5
TimeoutStopSec={grace}
LimitNOFILE=65536
LimitMEMLOCK=infinity
TasksMax=infinity
NoNewPrivileges=true
ProtectSystem=full

[Install]
WantedBy=multi-user.target
"""

TARGETS: Mapping[str, Callable[[str, ProfileFile, Sequence[str]], Files]] = {
    "ray-yaml": _ray_yaml,
    "kuberay": _kuberay,
    "rayjob": _rayjob,
    "compose": _compose,
    "slurm": _slurm,
    "systemd": _systemd,
}
JOB_TARGETS = ("rayjob", "slurm")
