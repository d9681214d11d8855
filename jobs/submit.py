"""`tessera submit`: one run, one name. Alive, it is followed; unfinished, it goes on; finished, it is shown."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cluster import address
from cluster.credentials import check_address
from cluster.profiles import Profile
from datasets_prep.errors import UserError
from jobs import package
from jobs.package import Package
from jobs.plan import Plan, check_resources
from jobs.train import RESULT, STATE, is_finished, outcome
from service.config import RunConfig
from service.data.store import Store
from service.engine import MARKER

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

ALIVE = ("PENDING", "RUNNING")
FACTS = ("run", "recipe", "commit", "steps", "package", "identity", "entrypoint")
ENTRYPOINT = f"python -m jobs.train {package.CONFIG_NAME}"
PACKAGES = "packages"  # beside the runs, in their storage
RAY_LIMIT = 100 << 20  # bytes that Ray's dashboard takes in one request
_UNTOLD = {"entrypoint": ENTRYPOINT}
_SECONDS = (5.0, 120.0)  # to connect, and for an answer
_RAY_PREFIX = re.compile(r"^(\x1b\[[0-9;]*m)*\([^)]*pid=\d+[^)]*\)(\x1b\[[0-9;]*m)* ?")


@dataclass(frozen=True)
class Submission:
    """What `submit` did: the run, its job if one runs, and what is known of the code."""

    run: str
    state: Literal["submitted", "resumed", "attached", "finished", "planned"]
    job: str | None
    package_bytes: int
    package: str
    commit: str | None = None
    untracked: list[str] = field(default_factory=list[str])


def prepare(made: Plan, profile: Profile) -> None:
    """Check that a cluster can run the plan at all.

    Raises:
        UserError: other versions there than here, more CPUs or GPUs asked for than there are, or no MLflow.
    """
    from service import tracking

    check_versions(profile)
    check_resources(made.config, profile.cpus, profile.gpus)
    tracking.check(profile.tracking_uri)


def check_versions(profile: Profile) -> None:
    """Check that the cluster runs the Ray and Python that the code is locked to; an image brings its own.

    Raises:
        UserError: their major or minor version differs.
    """
    if profile.file is not None and profile.file.runtime.kind == "image":
        return
    there = address.versions(profile.jobs_address, profile.env)
    pairs = (("Ray", version("ray"), there.ray), ("Python", platform.python_version(), there.python))
    for name, ours, theirs in pairs:
        if ours.split(".")[:2] != theirs.split(".")[:2]:
            raise UserError(
                f"{profile.jobs_address} runs {name} {theirs}, and this is {name} {ours}: start the cluster with "
                f"{name} {ours}, submit from an environment with {name} {theirs}, or use an image (runtime.kind=image)"
            )


def check_resumable(run: Store, made: Plan) -> None:
    """Check that an unfinished run can go on with a plan's config, whatever it was called by.

    Raises:
        UserError: no such run, or one that has finished, has nothing to go on from, read other data, or computed what
            differs otherwise than `checkpoint.allow_changes` admits.
    """
    from service.engine import checkpoint  # torch takes seconds to import

    if not run.exists(STATE):
        raise UserError(f"--resume: there is no run {run.uri}: `tessera jobs list` names the runs")
    if run.exists(RESULT):
        raise UserError(f"--resume: {run.uri} has trained: start another run with init_from={run.uri}/encoder")
    then, now = json.loads(run.get(STATE))["fingerprint"], made.index.fingerprint
    if then != now:
        raise UserError(f"--resume: {run.uri} read data of fingerprint {then}, and data.uri has {now}: use its data")
    store = run.sub("checkpoints")
    folders = checkpoint.committed(store)
    if not folders:
        raise UserError(f"--resume: {run.uri} has no checkpoint to go on from: submit without --resume")
    checkpoint.check_changes(checkpoint.read_marker(store, folders[-1]), made.config)


def submit(
    made: Plan, profile: Profile, *, dry_run: bool = False, new: bool = False, resume: str | None = None
) -> Submission:
    """Start, continue, join or just find the run of a plan, or go on with the run named `resume` by that plan."""
    root, code = Store(profile.storage_uri), package.collect()
    if resume is not None:
        check_resumable(root.sub(resume), made)
    own, config = _named(made, code.hash, root, new)
    name = resume or own
    with tempfile.TemporaryDirectory(prefix="tessera-package-") as scratch:
        built = package.write(code, package.config_document(config), Path(scratch) / "package.zip")
        facts = {"run": name, "recipe": config.name, "commit": code.commit or "none", "steps": str(made.steps)}
        facts |= {"identity": own}
        done = planned(name, built) if dry_run else begin(profile, built, facts)
    return replace(done, commit=code.commit, untracked=code.untracked)


def planned(run: str, built: Package) -> Submission:
    """What would be submitted."""
    return Submission(run, "planned", None, built.size, built.sha)


def _named(made: Plan, code: str, root: Store, new: bool) -> tuple[str, RunConfig]:
    """Name of a plan's run and its config; for a new one, of the first repeat that has not finished."""
    config = made.config
    name = package.run_name(config, made.fingerprint, code)
    while new and root.exists(f"{name}/{RESULT}"):
        config = config.model_copy(update={"repeat": config.repeat + 1})
        name = package.run_name(config, made.fingerprint, code)
    return name, config


def begin(profile: Profile, built: Package, facts: Mapping[str, str]) -> Submission:
    """Start a run's next job, unless one is alive or the run has finished.

    Args:
        profile: where.
        built: what the job runs.
        facts: kept with the job, `run`, `recipe`, `commit`, `steps`; Ray shows them to whoever may see jobs.
            `entrypoint` is the job's shell command, if it is another than a run's; `identity` stands for settings,
            data and code.

    Raises:
        UserError: a job of the run is alive and has another identity.
    """
    root, name = Store(profile.storage_uri), facts["run"]
    done = planned(name, built)
    if is_finished(root.sub(name)):
        return replace(done, state="finished")
    reconcile(profile)
    with job_client(profile) as client:
        jobs = jobs_of(client, name)
        for job in jobs:
            if job.status in ALIVE:
                _check_joins(job, facts)
                return replace(done, state="attached", job=job.submission_id)
        started = root.exists(f"{name}/{STATE}")
        last = max((int((job.submission_id or "-0").rsplit("-", 1)[-1]) for job in jobs), default=0)
        identifier = f"{name}-{last + 1:02d}"
        environment = {"TESSERA_RUN": name, "TESSERA_JOB": identifier, "TESSERA_PACKAGE": built.sha}
        kept = {**facts, "package": built.sha}
        launch(client, profile, built, identifier, facts.get("entrypoint", ENTRYPOINT), environment, kept)
    return replace(done, state="resumed" if started else "submitted", job=identifier)


def _check_joins(job: JobDetails, facts: Mapping[str, str]) -> None:
    """Refuse to follow a job as if it were one's own that goes by other settings, data or code."""
    told = (job.metadata or {}).get("identity", "none")
    if "none" not in (told, facts["identity"]) and told != facts["identity"]:
        name = facts["run"]
        raise UserError(
            f"job {job.submission_id} of {name} is alive with other settings, data or code: "
            f"`tessera jobs attach {name}` follows it as it is, `tessera jobs stop {name}` ends it with a checkpoint"
        )


def launch(
    client: JobSubmissionClient,
    profile: Profile,
    built: Package,
    job: str,
    entrypoint: str,
    environment: Mapping[str, str],
    facts: Mapping[str, str],
) -> None:
    """Upload a package, once for the same contents, and start a job in it.

    Args:
        client: of `job_client`.
        profile: whose addresses and network settings the job gets; keys it finds on its nodes.
        built: the package; it is kept in the storage of runs, from where nodes fetch one that Ray does not take.
        job: its name, never used before.
        entrypoint: shell command, run in the unpacked package.
        environment: of the job, besides the profile's.
        facts: kept with the job.
    """
    stored = keep(Store(profile.storage_uri), built)
    start = partial(client.submit_job, entrypoint=entrypoint, submission_id=job, metadata=dict(facts))
    runtime = runtime_env(profile, environment)
    if built.path.stat().st_size < RAY_LIMIT:
        try:
            start(runtime_env={"working_dir": str(built.path), **runtime})
            return
        except RuntimeError as error:
            if "status code 413" not in str(error):  # a proxy before the cluster may take less than Ray
                raise
    start(runtime_env={"working_dir": stored, **runtime})


def keep(root: Store, built: Package) -> str:
    """Put a package into the storage of runs, unless it is there, and return its address."""
    name = _stored_name(built.sha)
    if not root.exists(name):
        root.put(name, built.path)
    folder = root.local_path
    return f"{root.uri}/{name}" if folder is None else (folder / name).as_uri()


def _stored_name(sha: str) -> str:
    return f"{PACKAGES}/{sha}.zip"


def retry(profile: Profile, name: str) -> Submission:
    """Start the next job of a run as it was submitted last: the same package, so the same code and config.

    Raises:
        UserError: no such run, or one whose package nobody kept.
    """
    check_versions(profile)
    root = Store(profile.storage_uri)
    with job_client(profile) as client:
        facts = _facts(jobs_of(client, name), root.sub(name))
    stored = _stored_name(facts.get("package", ""))
    if not root.exists(stored):
        raise UserError(f"{root.uri} holds no package of run {name!r}: submit its recipe again with `tessera submit`")
    with tempfile.TemporaryDirectory(prefix="tessera-package-") as scratch:
        path = Path(scratch) / "package.zip"
        path.write_bytes(root.get(stored))
        done = begin(profile, Package(path, path.stat().st_size, facts["package"]), facts)
    return replace(done, commit=facts["commit"])


def _facts(jobs: Sequence[JobDetails], run: Store) -> dict[str, str]:
    """What was told of a run's newest job, else of the run itself: Ray forgets jobs when its head ends."""
    if jobs:
        told = jobs[-1].metadata or {}
    elif run.exists(STATE):
        told = json.loads(run.get(STATE))
        told["package"] = told.get("archive")
    else:
        raise UserError(f"no run {run.uri}: `tessera jobs list` names the runs")
    return {name: str(told.get(name, _UNTOLD.get(name, "none"))) for name in FACTS}


def stop(client: JobSubmissionClient, job: str) -> None:
    """Ask a job to stop, and wait until it has: its workers take a checkpoint first, which Ray grants 30 s."""
    client.stop_job(job)
    while not client.get_job_status(job).is_terminal():
        time.sleep(0.3)


def newest_step(run: Store) -> int | None:
    """Step of the newest committed checkpoint; None where there is none."""
    folders = (name.split("/")[0] for name in run.sub("checkpoints").list() if name.endswith(f"/{MARKER}"))
    return max((int(folder.split("-")[1]) for folder in folders), default=None)


def reconcile(profile: Profile) -> list[str]:
    """End the MLflow runs whose driver died, and return their names; none while MLflow is away."""
    from service import tracking

    try:
        return tracking.reconcile(profile.tracking_uri, profile.storage_uri, outcome)
    except tracking.TrackingAway:
        return []


def runtime_env(profile: Profile, environment: Mapping[str, str]) -> dict[str, Any]:
    """What a job finds on its nodes besides its package: environment, and packages to install."""
    return {"env_vars": {**_job_environment(profile), **environment}, **_packages(profile)}


def _job_environment(profile: Profile) -> dict[str, str]:
    """Addresses for the driver and settings of the network; keys are not among them, the nodes' own environment has."""
    addresses = {"MLFLOW_TRACKING_URI": profile.tracking_uri, "TESSERA_STORAGE": profile.storage_uri}
    for name, uri in addresses.items():
        check_address(name, uri)
    grace = {"RAY_JOB_STOP_WAIT_TIME_S": "30"}  # until SIGKILL: for a last checkpoint, and to end the MLflow run
    return {**(profile.file.env if profile.file else {}), **addresses, "PYTHONUNBUFFERED": "1", **grace}


def _packages(profile: Profile) -> dict[str, Any]:
    """What Ray installs on the nodes for the job: the lock, where the profile says so."""
    runtime = None if profile.file is None else profile.file.runtime
    if runtime is None or runtime.kind != "packages":
        return {}
    path = package.ROOT / runtime.lock
    if not path.is_file():
        raise UserError(f"runtime.lock={runtime.lock} of --cluster {profile.name} does not exist: name a lock file")
    lines = (line.split(" #")[0].strip() for line in path.read_text().splitlines())
    wanted = [line for line in lines if line and not line.startswith("#")]
    return {"uv": {"packages": wanted, "uv_pip_install_options": []}}  # none: Ray's own would bypass uv's cache


def read_result(root: Store, run: str) -> dict[str, Any] | None:
    """Result of a run, None while there is none."""
    name = f"{run}/{RESULT}"
    return json.loads(root.get(name)) if root.exists(name) else None


@contextmanager
def job_client(profile: Profile) -> Generator[JobSubmissionClient]:
    """Ray's job API at a cluster, with the token, authority and keys of its profile in the environment."""
    os.environ.update(profile.env)
    import aiohttp
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            return super()._do_request(method, endpoint, timeout=_SECONDS, **options)

    uri = profile.jobs_address
    try:
        client = Client(uri, verify=address.ca_file(profile.env) or True)
        for name in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
            logging.getLogger(name).setLevel(logging.WARNING)
        yield client
    except UserError:
        raise
    except (OSError, aiohttp.ClientError) as error:
        raise UserError(
            f"Ray's job API at {uri} is away ({_first_line(error)}): the same command goes on when it is back"
        ) from error
    except (RuntimeError, AuthenticationError) as error:  # what Ray's client raises for refusals
        raise UserError(f"Ray's job API at {uri} failed: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def jobs_of(client: JobSubmissionClient, run: str | None = None) -> list[JobDetails]:
    """Submitted jobs, oldest first: all that carry a run's name, or those of one run."""
    jobs = [job for job in client.list_jobs() if job.metadata and "run" in job.metadata]
    if run is not None:
        jobs = [job for job in jobs if job.metadata and job.metadata["run"] == run]
    return sorted(jobs, key=lambda job: job.start_time or 0)


def find_job(client: JobSubmissionClient, name: str, ended: str | None = None) -> tuple[str, str]:
    """Name of a run and of its newest job, or of the job of that id.

    Args:
        client: of the cluster.
        name: of a run, or id of a job.
        ended: what to say to who asks for a job that is over; None finds such a job too.
    """
    jobs = jobs_of(client)
    found = [job for job in jobs if name in (job.submission_id, (job.metadata or {}).get("run"))]
    if not found:
        known = ", ".join(sorted({(job.metadata or {})["run"] for job in jobs})) or "none"
        raise UserError(f"no job or run {name!r} on this cluster; runs with jobs: {known}")
    job = found[-1]
    if ended is not None and job.status not in ALIVE:
        raise UserError(f"job {job.submission_id} has ended already ({job.status.value}): {ended}")
    return (job.metadata or {})["run"], job.submission_id or ""


def follow(client: JobSubmissionClient, job: str, show: Callable[[str], None]) -> int:
    """Show a job's log lines until it ends, and return the exit code of its driver."""
    import aiohttp
    from ray.job_submission import JobStatus

    log = _Log(show)
    while True:
        log.begin()
        try:
            asyncio.run(_tail(client, job, log))
        except (RuntimeError, aiohttp.ClientError) as error:  # a proxy hung up; if it was the cluster, the next line
            logging.getLogger(__name__).debug("the log broke off: %s", error)  # says so
        info = client.get_job_info(job)
        if info.status.is_terminal():
            break
        time.sleep(0.5)
    log.begin()
    log.take(client.get_job_logs(job))
    log.end()
    if info.status == JobStatus.SUCCEEDED:
        return 0
    code = info.driver_exit_code
    return code if code is not None and code > 0 else 1


async def _tail(client: JobSubmissionClient, job: str, log: _Log) -> None:
    async for text in client.tail_job_logs(job):
        log.take(text)


class _Log:
    """Shows the lines of a text that comes in pieces, and again from its beginning when the connection broke."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self._taken = self._at = 0
        self._rest = ""

    def begin(self) -> None:
        """The text comes from its beginning."""
        self._at = 0

    def take(self, text: str) -> None:
        """Show what of the next piece has not been shown."""
        fresh = text[max(0, self._taken - self._at) :]
        self._at += len(text)
        self._taken = max(self._taken, self._at)
        *lines, self._rest = (self._rest + fresh).split("\n")
        for line in lines:
            self._show(_RAY_PREFIX.sub("", line))

    def end(self) -> None:
        """Show an unfinished line."""
        if self._rest:
            self._show(_RAY_PREFIX.sub("", self._rest))
