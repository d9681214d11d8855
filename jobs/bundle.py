"""`tessera package`: a folder that carries a run to a machine that has never seen the repository."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cluster import render
from cluster.credentials import check_address, check_file, own_secrets
from cluster.profiles import ProfileFile
from datasets_prep.errors import UserError
from jobs import package
from service.config import RunConfig

_SCRIPT = """\
#!/bin/sh
# Trains what is packed here; README.md says how. PYTHON=… uses packages that are installed already.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
if [ -z "${{PYTHON:-}}" ]; then
    PYTHON=$here/.venv/bin/python
    if [ ! -e "$here/.venv/installed" ]; then
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {{
            echo "error: Python 3.11 or newer is needed, and python3 is $(python3 --version 2>&1)" >&2; exit 2; }}
        python3 -m venv "$here/.venv"
        "$PYTHON" -m pip install --quiet "$(grep '^uv==' "$here/requirements.lock" || echo uv)"
        "$here/.venv/bin/uv" pip install --quiet --python "$PYTHON" -r "$here/requirements.lock"
        touch "$here/.venv/installed"
    fi
fi
export PYTHONPATH="$here/code"
case "${{1:-}}" in
tessera)
    shift
    exec "$PYTHON" -P -m jobs.cli "$@"
    ;;
--plain)
    export TESSERA_STORAGE="${{TESSERA_STORAGE:-$here/runs}}"
    export MLFLOW_TRACKING_URI="${{MLFLOW_TRACKING_URI:-sqlite:///$here/mlflow.db}}"
    exec "$PYTHON" -P -m jobs.train "$here/run.json" "$@"
    ;;
*)
    exec "$PYTHON" -P -m jobs.cli submit "$here/run.json" --cluster {cluster} "$@"
    ;;
esac
"""

_README = """\
# {name}

A Tessera training run, packed to run anywhere: recipe `{name}`, code at commit {commit}.
It needs Linux and Python 3.11 or newer. The first start installs `requirements.lock` into `.venv`;
`PYTHON=/path/to/python ./run.sh …` uses packages that are there already.

| file | what |
|---|---|
| `run.json` | every setting of the run |
| `code/` | what runs |
| `requirements.lock` | the packages it was made with |
{manifests}
## On the cluster `{cluster}`

{environment}
```
./run.sh --dry-run
./run.sh
```

The first checks the data, the cluster and the settings, and spends nothing. The second submits the run and shows its
log; the same command follows, resumes or shows it. The run reads `{data}`; settings can be changed in either command,
such as `./run.sh data.uri=s3://bucket/data`. `./run.sh tessera jobs list` and the other commands of `tessera` work too.

## Without a cluster

```
./run.sh --plain
```

trains in one process, on a GPU if there is one. It keeps the run in `runs/` and MLflow's records in `mlflow.db`, unless
`TESSERA_STORAGE` and `MLFLOW_TRACKING_URI` say otherwise. The same command resumes it.
"""
_ADDRESSES = {
    "RAY_API_SERVER_ADDRESS": ("jobs_address", "Ray's dashboard, http://host:8265"),
    "TESSERA_STORAGE": ("storage_uri", "where runs are kept, such as s3://runs"),
    "MLFLOW_TRACKING_URI": ("tracking_uri", "MLflow's server"),
}


@dataclass(frozen=True)
class Bundle:
    """What was written: number of files, bytes, commit of the code."""

    files: int
    size: int
    commit: str | None


def write(config: RunConfig, cluster: str, profile: ProfileFile | None, folder: Path) -> Bundle:
    """Write code, config, lock, manifests, `run.sh` and `README.md` into a new folder.

    Args:
        config: of the run.
        cluster: name or file of the profile, or an address.
        profile: what it says; None for an address.
        folder: absent or empty.

    Raises:
        UserError: the folder holds something, or a file, the code's or the profile's, or the address a secret.
    """
    check_address("--cluster", cluster)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"-o {folder} is not empty: name a new folder")
    code = package.collect()
    files: dict[str, Path | bytes] = {f"code/{name}": file for name, file in code.files.items()}
    files |= package.config_document(config)
    files |= {package.LOCK_NAME: code.files[package.LOCK_NAME]}
    manifests = {} if profile is None else _manifests(cluster, profile)
    files |= {f"manifests/{name}": text.encode() for name, text in manifests.items()}
    named = shlex.quote(cluster)
    if cluster.endswith((".yaml", ".yml")):
        files["cluster.yaml"], named = Path(cluster), '"$here/cluster.yaml"'
        cluster = "cluster.yaml"
    files["run.sh"] = _SCRIPT.format(cluster=named).encode()
    files["README.md"] = _readme(config, cluster, profile, code.commit, manifests).encode()
    own = own_secrets(os.environ)
    for name, file in files.items():
        check_file(name, package.read(file), own)
    for name, file in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(package.read(file))
        path.chmod(0o755 if name == "run.sh" else package.mode(file))
    return Bundle(len(files), sum(package.size(file) for file in files.values()), code.commit)


def _manifests(cluster: str, profile: ProfileFile) -> dict[str, str]:
    """What starts the cluster on each target that its profile says enough for."""
    files: dict[str, str] = {}
    for target in render.TARGETS:
        if target not in render.JOB_TARGETS:
            with suppress(UserError):
                made = render.render(target, cluster, profile)
                files |= {f"{target}/{name}": text for name, text in made.items()}
    return files


def _readme(
    config: RunConfig, cluster: str, profile: ProfileFile | None, commit: str | None, manifests: Mapping[str, str]
) -> str:
    return _README.format(
        name=config.name,
        commit=commit or "none",
        cluster=cluster,
        data=config.data.uri,
        environment=_environment(cluster, profile),
        manifests="| `manifests/` | what starts the cluster, a folder for each way |\n" if manifests else "",
    )


def _environment(cluster: str, profile: ProfileFile | None) -> str:
    """What has to be in the environment for a submission, as Markdown."""
    if profile is not None and profile.jobs_address == "local stack":
        return "It is the stack of the machine itself, which `./run.sh tessera up` starts if none runs.\n"
    rows: Sequence[str] = [
        f"| `{variable}` | {what} |"
        for variable, (key, what) in _ADDRESSES.items()
        if (profile is None and key != "jobs_address") or (profile is not None and getattr(profile, key) is None)
    ]
    secrets = dict.fromkeys(("RAY_AUTH_TOKEN", *(profile.secrets if profile else ())))
    rows += [f"| `{name}` | a secret, as the nodes have it |" for name in secrets]
    return "\n".join(["Set before:", "", "| variable | what |", "|---|---|", *rows, ""])
