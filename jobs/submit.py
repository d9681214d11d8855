"""`tessera submit`: one run, one name. Alive, it is followed; unfinished, it goes on; finished, it is shown."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cluster.profiles import Profile
from datasets_prep.errors import UserError
from jobs import package
from jobs.plan import Plan, check_resources
from jobs.train import RESULT, STATE, is_finished, outcome
from service.data.store import Store

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

ALIVE = ("PENDING", "RUNNING")
_RAY_PREFIX = re.compile(r"^(\x1b\[[0-9;]*m)*\([^)]*pid=\d+[^)]*\)(\x1b\[[0-9;]*m)* ?")


@dataclass(frozen=True)
class Submission:
    """What `submit` did: the run, its job if one runs, and what is known of the code."""

    run: str
    state: Literal["submitted", "resumed", "attached", "finished", "planned"]
    job: str | None
    package_bytes: int
    commit: str | None
    untracked: list[str]


def prepare(made: Plan, profile: Profile) -> None:
    """Check that a cluster can run the plan at all.

    Raises:
        UserError: more CPUs or GPUs asked for than there are, or no MLflow.
    """
    from service import tracking

    check_resources(made.config, profile.cpus, profile.gpus)
    tracking.check(profile.tracking_uri)


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
    with tempfile.TemporaryDirectory(prefix="tessera-package-") as scratch:
        folder = Path(scratch)
        built = package.build(made.config, folder)
        name, config = package.run_name(made.config, made.fingerprint, built.code), made.config
        root = Store(profile.storage_uri)
        if resume is not None:
            check_resumable(root.sub(resume), made)
            name = resume
        while new and root.exists(f"{name}/{RESULT}"):
            config = config.model_copy(update={"repeat": config.repeat + 1})
            name = package.run_name(config, made.fingerprint, built.code)
        (folder / package.CONFIG_NAME).write_text(json.dumps(config.plain(), indent=1))

        def submission(state: Any, job: str | None = None) -> Submission:
            return Submission(name, state, job, built.size, built.commit, built.untracked)

        if dry_run:
            return submission("planned")
        if is_finished(root.sub(name)):
            return submission("finished")
        reconcile(profile)
        with job_client(profile) as client:
            jobs = jobs_of(client, name)
            for job in jobs:
                if job.status in ALIVE:
                    return submission("attached", job.submission_id)
            started = root.exists(f"{name}/{STATE}")
            last = max((int((job.submission_id or "-0").rsplit("-", 1)[-1]) for job in jobs), default=0)
            identifier = f"{name}-{last + 1:02d}"
            client.submit_job(
                entrypoint=f"python -m jobs.train {package.CONFIG_NAME}",
                submission_id=identifier,
                runtime_env={
                    "working_dir": scratch,
                    "env_vars": _job_environment(profile, name, identifier, built.commit),
                },
                metadata={"run": name, "recipe": config.name, "commit": built.commit or "none"},
            )
        return submission("resumed" if started else "submitted", identifier)


def reconcile(profile: Profile) -> list[str]:
    """End the MLflow runs whose driver died, and return their names; none while MLflow is away."""
    from service import tracking

    try:
        return tracking.reconcile(profile.tracking_uri, profile.storage_uri, outcome)
    except tracking.TrackingAway:
        return []


def _job_environment(profile: Profile, run: str, job: str, commit: str | None) -> dict[str, str]:
    """Addresses for the driver; keys are not among them, the cluster's own environment has those."""
    return {
        "MLFLOW_TRACKING_URI": profile.tracking_uri,
        "TESSERA_STORAGE": profile.storage_uri,
        "TESSERA_RUN": run,
        "TESSERA_JOB": job,
        "TESSERA_COMMIT": commit or "none",
        "PYTHONUNBUFFERED": "1",
        "RAY_JOB_STOP_WAIT_TIME_S": "30",  # until SIGKILL: for the driver to end its MLflow run
    }


def read_result(root: Store, run: str) -> dict[str, Any] | None:
    """Result of a run, None while there is none."""
    name = f"{run}/{RESULT}"
    return json.loads(root.get(name)) if root.exists(name) else None


@contextmanager
def job_client(profile: Profile) -> Generator[JobSubmissionClient]:
    """Ray's job API at a cluster, with the token and keys of its profile in the environment."""
    os.environ.update(profile.env)
    from ray.job_submission import JobSubmissionClient

    try:
        client = JobSubmissionClient(profile.jobs_address)
        logging.getLogger("ray").setLevel(logging.WARNING)
        yield client
    except (RuntimeError, OSError) as error:  # what Ray's client raises for refusals and broken connections
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"Ray's job API at {profile.jobs_address} failed: {reason}") from error


def jobs_of(client: JobSubmissionClient, run: str | None = None) -> list[JobDetails]:
    """Submitted jobs, oldest first: all that carry a run's name, or those of one run."""
    jobs = [job for job in client.list_jobs() if job.metadata and "run" in job.metadata]
    if run is not None:
        jobs = [job for job in jobs if job.metadata and job.metadata["run"] == run]
    return sorted(jobs, key=lambda job: job.start_time or 0)


def find_job(client: JobSubmissionClient, name: str) -> JobDetails:
    """Newest job of a run, or the job of that id."""
    jobs = jobs_of(client)
    found = [job for job in jobs if name in (job.submission_id, (job.metadata or {}).get("run"))]
    if not found:
        known = ", ".join(sorted({(job.metadata or {})["run"] for job in jobs})) or "none"
        raise UserError(f"no job or run {name!r} on this cluster; runs with jobs: {known}")
    return found[-1]


def follow(client: JobSubmissionClient, job: str, show: Callable[[str], None]) -> int:
    """Show a job's log lines until it ends, and return the exit code of its driver."""
    from ray.job_submission import JobStatus

    asyncio.run(_tail(client, job, show))
    while not (status := client.get_job_status(job)).is_terminal():
        time.sleep(0.5)
    code = client.get_job_info(job).driver_exit_code
    if status == JobStatus.SUCCEEDED:
        return 0
    return code if code is not None and code > 0 else 1


async def _tail(client: JobSubmissionClient, job: str, show: Callable[[str], None]) -> None:
    rest = ""
    async for text in client.tail_job_logs(job):
        *lines, rest = (rest + text).split("\n")
        for line in lines:
            show(_RAY_PREFIX.sub("", line))
    if rest:
        show(_RAY_PREFIX.sub("", rest))
