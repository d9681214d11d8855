"""MLflow: runs, metrics and registered encoders. The only file that imports mlflow, and only when it is needed.

The run storage is the truth about metrics, MLflow a copy of it that may come later: rows go to the storage first and
are sent from there, in order, each once.
"""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import re
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from datasets_prep.errors import UserError
from service.config import Frozen
from service.data.store import Store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import ModelSignature

log = logging.getLogger(__name__)

for _name, _value in (
    ("MLFLOW_DISABLE_TELEMETRY", "true"),
    ("MLFLOW_LOGGING_LEVEL", "WARNING"),
    ("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true"),
    ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2"),  # MLflow's own seven last four minutes
    ("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false"),
    ("MLFLOW_UV_AUTO_DETECT", "false"),  # or a uv.lock in the current folder goes into the model
):
    os.environ.setdefault(_name, _value)

CHAMPION = "champion"
LOADER = "service.export"
METRICS = "metrics"

_REACH_SECONDS = 5.0
_FLUSH_SECONDS = 5.0
_RETRY_SECONDS = 10.0  # between attempts while MLflow is away
_CHUNK_ROWS = 1000  # a chunk is rewritten as it grows, so that a long run leaves hundreds of objects, not 100,000
_BATCH = 1000  # metrics that MLflow takes in one request
_NO_ANSWER = re.compile(r"failed with exception|too many \d+ error responses|error code 50[234]|Connection|timed out")
_PARAM_BATCH, _PARAM_LENGTH = 100, 6000  # likewise parameters, and their longest value


Ended = Literal["FINISHED", "FAILED", "KILLED"]


class TrackingAway(UserError):
    """MLflow gives no answer; what was to be told to it can be told later."""


def check(uri: str) -> None:
    """Return when MLflow answers at `uri` and accepts our credentials; raise `UserError` within seconds if not."""
    fix = "start the server (`tessera up` runs one), or correct MLFLOW_TRACKING_URI"
    if urlsplit(uri).scheme in ("", "file"):
        raise UserError(f"MLflow at {uri}: MLflow keeps runs in a database: use http://host:port or sqlite:////file.db")
    if uri.startswith(("http://", "https://")):
        try:
            with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=_REACH_SECONDS):
                pass
        except urllib.error.HTTPError:
            pass  # something answers; the client below finds out whether it is MLflow
        except (OSError, ValueError) as error:
            raise TrackingAway(f"no MLflow at {uri} ({getattr(error, 'reason', error)}): {fix}") from error
    with _faults(uri):
        _client(uri).search_experiments(max_results=1)


def probe(uri: str) -> str:
    """Write to MLflow's registry, remove what was written, and return the server's version."""
    check(uri)
    name = f"tessera-doctor-{uuid.uuid4().hex}"
    with _faults(uri):
        import mlflow

        client = _client(uri)
        client.create_registered_model(name)
        client.delete_registered_model(name)
        if not uri.startswith(("http://", "https://")):
            return mlflow.__version__
        with urllib.request.urlopen(f"{uri.rstrip('/')}/version", timeout=_REACH_SECONDS) as answer:
            return answer.read().decode().strip()


def create_run(uri: str, experiment: str, run_name: str, config: Frozen, tags: Mapping[str, str]) -> str:
    """Create a run with every leaf of the config as a parameter and the whole of it as `config.json`; return its id."""
    from mlflow.entities import Param

    with _faults(uri):
        client = _client(uri)
        run = client.create_run(_experiment(client, uri, experiment), tags=dict(tags), run_name=run_name)
        params = [Param(name, text[:_PARAM_LENGTH]) for name, text in leaves(config.plain())]
        for first in range(0, len(params), _PARAM_BATCH):
            client.log_batch(run.info.run_id, params=params[first : first + _PARAM_BATCH])
        client.log_dict(run.info.run_id, config.plain(), "config.json")
        return run.info.run_id


def log_picture(uri: str, run_id: str, name: str, png: bytes) -> None:
    """Put a picture among a run's artifacts, as `pictures/NAME`."""
    with _faults(uri), tempfile.TemporaryDirectory(prefix="tessera-picture-") as folder:
        path = Path(folder) / name
        path.write_bytes(png)
        _client(uri).log_artifact(run_id, str(path), "pictures")


def log_text(uri: str, run_id: str, name: str, text: str) -> None:
    """Put a text among a run's artifacts."""
    with _faults(uri):
        _client(uri).log_text(run_id, text, name)


def reopen(uri: str, run_id: str) -> None:
    """Mark an earlier run as running again."""
    with _faults(uri):
        _client(uri).update_run(run_id, status="RUNNING")


def finish(uri: str, run_id: str, status: Ended) -> None:
    """End a run."""
    with _faults(uri):
        _client(uri).set_terminated(run_id, status)


Outcome = Callable[[Store, str], Ended | None]


def reconcile(uri: str, storage: str, outcome: Outcome) -> list[str]:
    """End the runs that MLflow takes for running although nobody carries them on; returns their names."""
    found = abandoned(uri, storage, outcome)
    for run_id, _, status in found:
        finish(uri, run_id, status)
    return [name for _, name, _ in found]


def abandoned(uri: str, storage: str, outcome: Outcome) -> list[tuple[str, str, Ended]]:
    """MLflow's id, name and outcome of the runs that it takes for running although nobody carries them on.

    Args:
        uri: MLflow's address.
        storage: address below which the runs lie that may be judged.
        outcome: says how the run in a storage, of an MLflow run's id, ended; None while it goes on.
    """
    found: list[tuple[str, str, Ended]] = []
    below = f"{Store(storage).uri}/"
    with _faults(uri):
        client = _client(uri)
        experiments = [each.experiment_id for each in client.search_experiments()]
        for run in client.search_runs(experiments, "attributes.status = 'RUNNING'") if experiments else []:
            at = run.data.tags.get("storage", "")
            if at.startswith(below) and (status := outcome(Store(at), run.info.run_id)):
                found.append((run.info.run_id, run.data.tags["run"], status))
    return found


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield `(dotted name, value as text)` of every leaf; strings as they are, all else as JSON."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value)


def _client(uri: str) -> MlflowClient:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def _faults(uri: str) -> Generator[None]:
    """Turn MLflow's failures into errors that name the server."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        reason = str(error).strip().split("\n")[0][:500]
        kind = TrackingAway if _NO_ANSWER.search(reason) else UserError
        raise kind(f"MLflow at {uri} failed ({reason}): check the server, its address and your access") from error


def _experiment(client: MlflowClient, uri: str, name: str) -> str:
    """Return the experiment's id; make it where there is none, even when another process does so now."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        # Without a server MLflow would put artifacts into whatever folder the process runs in.
        folder = Path(uri.partition(":///")[2]).parent / "artifacts" if uri.startswith("sqlite:") else None
        try:
            return client.create_experiment(name, artifact_location=folder.absolute().as_uri() if folder else None)
        except MlflowException as error:
            found = client.get_experiment_by_name(name)
            if found is None:
                raise error
    if found.lifecycle_stage == "deleted":
        raise UserError(
            f"tracking.experiment={name} was deleted in MLflow at {uri}: choose another name, or restore it "
            f"(mlflow experiments restore --experiment-id {found.experiment_id})"
        )
    return found.experiment_id


@dataclass(frozen=True)
class Row:
    """Metrics of one step; `time` in milliseconds since 1970 makes a row that is sent twice the same row."""

    step: int
    time: int
    metrics: dict[str, float]


class Tracker:
    """Rank 0's writer of metrics: `log` returns at once, one thread stores the rows, another sends them.

    Rows are stored as `metrics/SESSION-CHUNK.jsonl`, a session being one life of a writer. Rows that storage or MLflow
    do not take wait; training never does, and storing does not wait for MLflow.
    """

    def __init__(self, store: Store, uri: str | None, run_id: str, flush_seconds: float = _FLUSH_SECONDS):
        """Begin a session.

        Args:
            store: the run's storage.
            uri: MLflow's address; None keeps rows in the storage only.
            run_id: the MLflow run.
            flush_seconds: longest time that a row waits before it is stored.
        """
        self._store = store
        self._flush_seconds = flush_seconds
        self._queue: queue.SimpleQueue[Row] = queue.SimpleQueue()
        self._logged = self._stored = 0
        self._unsent: list[str] = []
        self._changed = threading.Condition()
        self._hurry = self._closing = self._storing_ended = False
        self._deadline = math.inf
        self._threads = [threading.Thread(target=self._keep_storing, name="metrics to storage", daemon=True)]
        if uri is not None:
            send = (_Sender(uri, run_id),)
            self._threads += [
                threading.Thread(target=self._keep_sending, args=send, name="metrics to MLflow", daemon=True)
            ]
        for thread in self._threads:
            thread.start()

    def log(self, step: int, row: Mapping[str, float]) -> None:
        """Take the metrics of a step without waiting; within a session the steps of a metric only grow."""
        self._queue.put(Row(step, time.time_ns() // 1_000_000, {name: float(value) for name, value in row.items()}))
        self._logged += 1

    def flush(self, deadline_s: float) -> bool:
        """Wait until all rows logged so far are in the run's storage; say whether they are.

        Called before a checkpoint commits, this leaves no gap in the curves of a run that resumes from it.
        """
        goal = self._logged
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
            return self._changed.wait_for(lambda: self._stored >= goal, deadline_s)

    def close(self, deadline_s: float = 30.0) -> bool:
        """Store and send what is left, for so long at most; say whether nothing is left."""
        with self._changed:
            self._closing, self._deadline = True, time.monotonic() + deadline_s
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(max(0.0, self._deadline - time.monotonic()))
        complete = not any(thread.is_alive() for thread in self._threads) and self._stored == self._logged
        complete = complete and (not self._unsent or len(self._threads) == 1)
        if not complete:
            log.warning("metrics are left unsent: `tessera sync RUN` sends them from %s", self._store.uri)
        return complete

    def _keep_storing(self) -> None:
        chunks = _Chunks(self._store)
        while not self._storing_ended:
            with self._changed:
                self._changed.wait_for(lambda: self._hurry or self._closing, self._flush_seconds)
                self._hurry, last = False, self._closing
            if not (self._logged or last):
                continue  # until the first step nothing competes with it, importing MLflow least of all
            try:
                while not self._queue.empty():
                    chunks.add(self._queue.get())
                chunks.write()
            except Exception as error:  # noqa: BLE001  (whatever it is, rows wait and training goes on)
                log.warning("metrics wait for the run's storage: %s", error)
            with self._changed:
                self._unsent += [name for name in chunks.take_changed() if name not in self._unsent]
                self._stored, self._storing_ended = chunks.stored, last
                self._changed.notify_all()

    def _keep_sending(self, sender: _Sender) -> None:
        away = False
        while time.monotonic() < self._deadline:
            with self._changed:
                self._changed.wait_for(lambda: self._unsent or self._storing_ended)
                if not self._unsent:
                    return
                name = self._unsent.pop(0)  # it comes again when it grows meanwhile
            try:
                sender.send(_parse(self._store.get(name)))
                away = False
            except Exception as error:  # noqa: BLE001  (as above)
                if not away:
                    log.warning("metrics wait for MLflow: %s", str(error).split("\n")[0][:300])
                away = True
                with self._changed:
                    self._unsent.insert(0, name)
                    self._changed.wait(1.0 if self._closing else _RETRY_SECONDS)


class _Chunks:
    """The objects of one session; the last one grows."""

    def __init__(self, store: Store):
        self._store = store
        self._session = self._number = 0
        self._lines: list[str] = []
        self._waiting: list[Row] = []
        self._changed: list[str] = []
        self.stored = 0

    def add(self, row: Row) -> None:
        """Take a row; `write` stores it."""
        self._waiting.append(row)

    def take_changed(self) -> list[str]:
        """Return the objects that hold something new since the last call, the first time those of earlier sessions."""
        changed, self._changed = self._changed, []
        return changed

    def write(self) -> None:
        """Store the waiting rows."""
        if not self._session:
            self._open()
        while self._waiting:
            if len(self._lines) >= _CHUNK_ROWS:
                self._lines, self._number = [], self._number + 1
            rows = self._waiting[: _CHUNK_ROWS - len(self._lines)]
            lines = self._lines + [json.dumps(vars(row)) for row in rows]
            name = f"{METRICS}/{self._session:06d}-{self._number:06d}.jsonl"
            self._store.put(name, ("\n".join(lines) + "\n").encode())
            self._lines, self._waiting = lines, self._waiting[len(rows) :]
            self.stored += len(rows)
            self._changed.append(name)

    def _open(self) -> None:
        """Claim a session of our own, even against a writer that starts at the same time."""
        earlier = self._store.list(METRICS)
        session = 1 + max((int(Path(name).name.split("-")[0]) for name in earlier), default=0)
        while not self._store.create(f"{METRICS}/{session:06d}-000000.jsonl", b""):
            session += 1
        self._session, self._changed = session, earlier


class _Sender:
    """Sends rows to MLflow: in order, and of each metric only the steps that MLflow does not have."""

    def __init__(self, uri: str, run_id: str):
        self._uri, self._run_id = uri, run_id
        self._latest: dict[str, int] | None = None
        self._mlflow: MlflowClient | None = None

    def send(self, rows: Sequence[Row]) -> int:
        """Send what is new of `rows` and return how many metrics that were."""
        from mlflow.entities import Metric

        latest = self._known()
        new = [
            Metric(name, value, row.time, row.step)
            for row in rows
            for name, value in row.metrics.items()
            if row.step > latest.get(name, -1)
        ]
        self._latest = None  # until all has arrived: a request may fail and still have been served
        for first in range(0, len(new), _BATCH):
            self._client.log_batch(self._run_id, metrics=new[first : first + _BATCH])
        self._latest = latest | {metric.key: metric.step for metric in new}
        return len(new)

    def _known(self) -> dict[str, int]:
        """Last step that MLflow has of each metric."""
        if self._latest is None:
            run = self._client.get_run(self._run_id)
            self._latest = {metric.key: metric.step for metric in run.data.to_proto().metrics}
        return self._latest

    @property
    def _client(self) -> MlflowClient:
        if self._mlflow is None:
            self._mlflow = _client(self._uri)
        return self._mlflow


def sync(store: Store, uri: str, run_id: str) -> int:
    """Send all metrics of a run's storage that MLflow does not have, and return how many there were."""
    sender = _Sender(uri, run_id)
    with _faults(uri):
        return sum(sender.send(_parse(store.get(name))) for name in store.list(METRICS))


def stored_metrics(store: Store) -> dict[int, dict[str, float]]:
    """All metrics in a run's storage by step; where lives of the run overlap, those of the later one."""
    found: dict[int, dict[str, float]] = {}
    for name in store.list(METRICS):
        for row in _parse(store.get(name)):
            found.setdefault(row.step, {}).update(row.metrics)
    return found


def _parse(chunk: bytes) -> list[Row]:
    return [Row(**json.loads(line)) for line in chunk.splitlines()]


@dataclass(frozen=True)
class ModelInfo:
    """A registered encoder version."""

    name: str
    version: str
    run_id: str
    tags: dict[str, str]

    @property
    def uri(self) -> str:
        """Address that stays with this version."""
        return f"models:/{self.name}/{self.version}"


def register_encoder(
    uri: str, run_id: str, model_name: str, encoder_dir: Path, tags: Mapping[str, object], requirements: Sequence[str]
) -> str:
    """Register an encoder's files as a version of `model_name`; the same run gets the same version again.

    Nothing is pickled: MLflow loads the folder through `_load_pyfunc` of the module `service.export`.

    Args:
        uri: MLflow's address.
        run_id: the run that trained it.
        model_name: registered model; made where there is none.
        encoder_dir: model.safetensors, config.json, preprocessing.json and whatever else belongs to the encoder;
            preprocessing.json holds `input` and `output`, each with `dtype` and `shape` (−1: any number).
        tags: fingerprint, package hash, protocol, scores; stored as text.
        requirements: pip requirements of a process that loads the encoder.
    """
    signature = _signature(encoder_dir / "preprocessing.json")
    with _faults(uri):
        client = _client(uri)
        existing = client.search_model_versions(f"name='{model_name}' and run_id='{run_id}'")
        if existing:
            return str(existing[0].version)
        model_id = _log_model(client, run_id, model_name, encoder_dir, signature, requirements)
        _ensure_registered(client, model_name)
        version = client.create_model_version(
            model_name,
            source=f"models:/{model_id}",
            run_id=run_id,
            tags={key: str(value) for key, value in tags.items()},
            model_id=model_id,
        )
        return str(version.version)


def _log_model(
    client: MlflowClient,
    run_id: str,
    name: str,
    encoder_dir: Path,
    signature: ModelSignature,
    requirements: Sequence[str],
) -> str:
    """Upload the folder as a logged model of the run and return the model's id."""
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model
    from mlflow.pyfunc import save_model

    run = client.get_run(run_id)
    logged = client.create_logged_model(
        run.info.experiment_id, name, source_run_id=run_id, params=run.data.params, model_type="encoder"
    )
    description = Model(artifact_path=logged.artifact_location, run_id=run_id, model_id=logged.model_id)
    with tempfile.TemporaryDirectory(prefix="tessera-model-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # asks for an example of the input, which the signature describes
        save_model(
            path=f"{folder}/model",
            mlflow_model=description,
            loader_module=LOADER,
            data_path=str(encoder_dir),
            signature=signature,
            pip_requirements=list(requirements),
        )
        client.log_model_artifacts(logged.model_id, f"{folder}/model")
    client.finalize_logged_model(logged.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    return logged.model_id


def _signature(preprocessing: Path) -> ModelSignature:
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    described = json.loads(preprocessing.read_text())
    inputs, outputs = (
        Schema([TensorSpec(np.dtype(described[end]["dtype"]), tuple(described[end]["shape"]))])
        for end in ("input", "output")
    )
    return ModelSignature(inputs=inputs, outputs=outputs)


def _ensure_registered(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def move_champion(uri: str, model_name: str, version: str) -> tuple[bool, str]:
    """Move the alias `champion` to a version that is better beyond doubt; return whether, and why.

    Versions compare by their tags: `val_linear` (validation probe, percent) has to grow by more than the new
    version's standard error `val_linear_se`, with equal `fingerprint` (data) and `protocol` (evaluation).
    """
    with _faults(uri):
        client = _client(uri)
        new = client.get_model_version(model_name, version)
        holder = client.get_registered_model(model_name).aliases.get(CHAMPION)
        old = client.get_model_version(model_name, holder) if holder else None
        moved, reason = _compare(old, new)
        if moved:
            client.set_registered_model_alias(model_name, CHAMPION, version)
        return moved, reason


def _compare(old: ModelVersion | None, new: ModelVersion) -> tuple[bool, str]:
    score, error = (_score(new, tag) for tag in ("val_linear", "val_linear_se"))
    if old is None:
        return True, f"version {new.version} is the first champion ({score:.2f} %)"
    if str(old.version) == str(new.version):
        return False, f"version {new.version} is the champion already"
    for tag in ("fingerprint", "protocol"):
        if old.tags.get(tag) != new.tags.get(tag):
            return False, (
                f"version {new.version} cannot be compared with champion {old.version}: "
                f"{tag} {new.tags.get(tag)} against {old.tags.get(tag)}"
            )
    gain = score - _score(old, "val_linear")
    verdict = "by more than" if gain > error else "not by more than"
    return gain > error, (
        f"version {new.version} has {score:.2f} % on validation, {gain:+.2f} points against champion {old.version}: "
        f"{verdict} its standard error of {error:.2f}"
    )


def _score(version: ModelVersion, tag: str) -> float:
    try:
        return float(version.tags[tag])
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{version.name} version {version.version} has {tag}={version.tags.get(tag)}, "
            "and comparing needs a number: register the run again"
        ) from error


def model_info(uri: str, model_uri: str) -> ModelInfo:
    """Find the version that `models:/NAME@ALIAS` or `models:/NAME/VERSION` stands for."""
    path = model_uri.removeprefix("models:/")
    separator = "@" if "@" in path else "/"
    name, _, which = path.partition(separator)
    if not model_uri.startswith("models:/") or not name or not which:
        raise UserError(f"{model_uri}: an encoder's address is models:/NAME@ALIAS or models:/NAME/VERSION")
    with _faults(uri):
        client = _client(uri)
        versions = {str(each.version): each for each in client.search_model_versions(f"name='{name}'")}
        if not versions:
            known = ", ".join(sorted(model.name for model in client.search_registered_models())) or "none"
            raise UserError(
                f"{model_uri}: MLflow at {uri} has no such model (it has: {known}): train one, or correct it"
            )
        aliases = client.get_registered_model(name).aliases
    version = versions.get(str(aliases.get(which)) if separator == "@" else which)
    if version is None:
        known = ", ".join([f"@{alias}" for alias in sorted(aliases)] + [f"/{number}" for number in versions])
        raise UserError(f"{model_uri}: {name} has no {separator}{which}: it has {known}")
    return ModelInfo(name, str(version.version), version.run_id or "", dict(version.tags))


def download_encoder(uri: str, model_uri: str, into: Path) -> Path:
    """Download a registered encoder below `into` and return the folder with its files."""
    found = model_info(uri, model_uri)
    with _faults(uri):
        from mlflow.artifacts import download_artifacts
        from mlflow.models import Model

        folder = into / found.name / found.version
        folder.mkdir(parents=True, exist_ok=True)
        source = _client(uri).get_model_version_download_uri(found.name, found.version)
        model = download_artifacts(source, dst_path=str(folder), tracking_uri=uri)
        return Path(model) / Model.load(model).flavors["python_function"]["data"]
