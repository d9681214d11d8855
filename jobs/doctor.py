"""`tessera doctor`: everything a job will need, tried before one is: this host, the servers, the data, every node."""

from __future__ import annotations

import json
import shlex
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import doctor, local, profiles
from cluster.doctor import Finding, failed
from datasets_prep.errors import UserError
from jobs import package, plan
from jobs.probe import probe_store
from jobs.terminal import note
from service.config import RunConfig
from service.data.cache import cache_root
from service.data.split import read_index
from service.data.store import Store

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

_JOB_SECONDS = 120.0
_INSTALL_SECONDS = 1200.0  # torch and CUDA are gigabytes; Ray itself gives up sooner
_STOP_SECONDS = 40.0  # longer than a job is given to end before it is killed
_LINES = 3


@dataclass(frozen=True)
class Subject:
    """What is examined; what nobody named is None and skipped.

    Args:
        located: the cluster, as far as it can be found without asking it.
        env: environment of a client of the cluster.
        data: folder or address of a data set.
        config: recipe that is to run.
    """

    located: profiles.Located | None
    env: Mapping[str, str]
    data: str | None = None
    config: RunConfig | None = None

    @property
    def storage(self) -> str | None:
        """Root of all runs."""
        return self.env.get("TESSERA_STORAGE")

    @property
    def tracking(self) -> str | None:
        """MLflow's address."""
        return self.env.get("MLFLOW_TRACKING_URI")


def examine(subject: Subject, unlocated: UserError | None = None) -> Iterator[Finding]:
    """Yield a finding a check, as soon as it is known; `unlocated` tells why the cluster could not be found."""
    for name, check in HOST:
        try:
            yield from check(subject)
        except UserError as error:
            yield failed(name, error)
    if subject.located is None:
        yield failed("Ray", unlocated or UserError("no cluster is known: name one with --cluster"))
    else:
        yield from _cluster(subject, subject.located)


# This host


def _packages(_: Subject) -> Iterator[Finding]:
    yield doctor.judge_packages(doctor.installed_requirements())


def _machine(subject: Subject) -> Iterator[Finding]:
    folder = Store(subject.storage).local_path if subject.storage else None
    facts = doctor.examine([cache_root(), *([folder] if folder else [])])
    for judge in (doctor.judge_disks, doctor.judge_shm, doctor.judge_rays):
        yield judge([facts])


def _stack(subject: Subject) -> Iterator[Finding]:
    stack = local.last_started()
    if stack is None or subject.located is None or subject.located.jobs_address != stack.ray_address:
        return
    dead = [server.name for server in local.status() if not server.alive]
    if dead:
        cure = f"`tessera up --data {stack.data}` starts it again; {stack.data}/logs tells why it ended"
        yield Finding("local stack", "fail", f"{' and '.join(dead)} no longer runs", cure)
    else:
        yield Finding("local stack", "ok", f"{', '.join(stack.names)} run from {stack.data}")


def _clock(subject: Subject) -> Iterator[Finding]:
    pages = {"MLflow": _page(subject.tracking, "health"), "S3": subject.env.get("AWS_ENDPOINT_URL")}
    if subject.located is not None:
        pages["Ray"] = _page(subject.located.jobs_address, "api/version")
    said = {name: doctor.http_offset(page) for name, page in pages.items() if page}
    yield doctor.judge_clock({name: offset for name, offset in said.items() if offset is not None})


def _page(address: str | None, path: str) -> str | None:
    return f"{address.rstrip('/')}/{path}" if address and address.startswith(("http://", "https://")) else None


def _credentials(subject: Subject) -> Iterator[Finding]:
    now = time.time()
    yield from doctor.judge_tokens(subject.env, now)
    if any(uri and uri.startswith(("s3://", "s3a://")) for uri in (subject.storage, subject.data)):
        yield doctor.judge_aws(subject.env, now)


def _mlflow(subject: Subject) -> Iterator[Finding]:
    if subject.tracking is None:
        yield Finding("MLflow", "skipped", "no MLFLOW_TRACKING_URI")
        return
    from service import tracking

    version = tracking.probe(subject.tracking)
    yield Finding("MLflow", "ok", f"version {version} at {subject.tracking}, takes and removes a registered model")


def _storage(subject: Subject) -> Iterator[Finding]:
    if subject.storage is None:
        yield Finding("storage", "skipped", "no TESSERA_STORAGE")
        return
    seconds = probe_store(subject.storage)
    each = ", ".join(f"{what} {took * 1e3:.0f} ms" for what, took in seconds.items())
    yield Finding("storage", "ok", f"{subject.storage}: {each}")


def _data(subject: Subject) -> Iterator[Finding]:
    if subject.config is not None:
        made = plan.make(subject.config)
        index, config = made.index, made.config
    elif subject.data is not None:
        index, made, config = read_index(Store(subject.data)), None, None
    else:
        yield Finding("data", "skipped", "name it with --data or --recipe")
        return
    counts = ", ".join(f"{rows.samples:,} {name}" for name, rows in index.splits.items())
    yield Finding("data", "ok", f"{index.name}: {counts}, fingerprint {index.fingerprint}")
    if made is not None and config is not None:
        found = (
            f"{made.partitions} partitions for {config.parallel.workers} workers, batches of "
            f"{config.data.batch_size}, {made.steps:,} steps, read {config.data.mode}"
        )
        yield Finding("partitions", "ok", found)


HOST: tuple[tuple[str, Callable[[Subject], Iterable[Finding]]], ...] = (
    ("packages", _packages),
    ("disk", _machine),
    ("local stack", _stack),
    ("credentials", _credentials),
    ("clock", _clock),
    ("MLflow", _mlflow),
    ("storage", _storage),
    ("data", _data),
)

# The cluster


def _cluster(subject: Subject, located: profiles.Located) -> Iterator[Finding]:
    reached = "Ray"
    try:
        profile = profiles.ask(located)
        yield Finding(reached, "ok", f"{located.jobs_address}: {profile.cpus:g} CPUs, {profile.gpus:g} GPUs")
        if subject.config is not None:
            yield _room(subject.config, profile)
        reached = NODES[0][0]
        facts = ask_nodes(profile, subject)
    except UserError as error:
        yield failed(reached, error)
        for name, _ in NODES:
            if name != reached:
                yield Finding(name, "skipped", "no node was asked")
        return
    answers = Answers(doctor.examine(), facts, located.file, subject)
    for name, check in NODES if answers.nodes else NODES[:1]:
        yield replace(check(answers), name=name)


def _room(config: RunConfig, profile: profiles.Profile) -> Finding:
    try:
        on_gpu = plan.check_resources(config, profile.cpus, profile.gpus)
    except UserError as error:
        return failed("room", error)
    return Finding("room", "ok", f"{config.parallel.workers} workers fit, on {'GPUs' if on_gpu else 'CPUs'}")


@dataclass(frozen=True)
class Answers:
    """What the nodes said, and what it is compared with."""

    here: Mapping[str, Any]
    facts: Mapping[str, Any]
    file: profiles.ProfileFile | None
    subject: Subject

    @property
    def nodes(self) -> Sequence[Mapping[str, Any]]:
        """Facts of the nodes that answered."""
        return self.facts["nodes"]


def judge_nodes(answers: Answers) -> Finding:
    """Judge whether every node runs a task."""
    there, silent = answers.nodes, answers.facts["silent"]
    if silent:
        address, reason = next(iter(silent.items()))
        found = f"{len(silent)} of {len(silent) + len(there)} run no task: {address}: {reason}"
        return Finding("nodes", "fail", found, "look into that node's Ray logs, or drain it")
    cpus, gpus = (sum(node[kind] for node in there) for kind in ("ray_cpus", "ray_gpus"))
    return Finding("nodes", "ok", f"{len(there)} run tasks: {cpus:g} CPUs, {gpus:g} GPUs")


def judge_clocks(answers: Answers) -> Finding:
    """Judge the nodes' clocks by that of the node that the driver runs on."""
    return doctor.judge_clock({node["host"]: tuple(node["clock"]) for node in answers.nodes if node["clock"]})


def judge_tracking(answers: Answers) -> Finding:
    """Judge whether each node reaches MLflow, as rank 0 must."""
    if _page(answers.subject.tracking, "health") is None:
        return Finding("", "skipped", "it has no address that nodes could reach")
    away = [node["host"] for node in answers.nodes if not node["tracking"]]
    if away:
        cure = "name MLflow by an address that nodes reach, and open its port to them"
        return Finding("", "fail", f"{answers.subject.tracking} does not answer on {', '.join(away)}", cure)
    return Finding("", "ok", f"{answers.subject.tracking} answers everywhere")


def judge_data(answers: Answers) -> Finding:
    """Judge whether each node reads the same data set."""
    if all("fingerprint" not in node and "data_error" not in node for node in answers.nodes):
        return Finding("", "skipped", "name it with --data or --recipe")
    for node in answers.nodes:
        if error := node.get("data_error"):
            finding = failed("", UserError(error))
            return replace(finding, found=f"{node['host']}: {finding.found}")
    found = sorted({node["fingerprint"] for node in answers.nodes})
    if len(found) > 1:
        return Finding("", "fail", f"nodes read different data sets: {', '.join(found)}", "use one s3:// address")
    return Finding("", "ok", f"fingerprint {found[0]} everywhere")


def judge_storage(answers: Answers) -> Finding:
    """Judge the storage as each node finds it."""
    if answers.subject.storage is None:
        return Finding("", "skipped", "no TESSERA_STORAGE")
    return doctor.judge_store(answers.nodes)


def judge_gpus(answers: Answers) -> Finding:
    """Judge the GPUs of all nodes by what the profile states."""
    stated = None if answers.file is None else answers.file.node.gpu
    return doctor.judge_gpus(answers.nodes, None if stated is None else profiles.GPUS[stated].memory_gib)


def judge_all_reduce(answers: Answers) -> Finding:
    """Judge the links between ranks by what the profile states."""
    stated = None if answers.file is None else answers.file.interconnect
    return doctor.judge_all_reduce(answers.facts["all_reduce"], stated)


NODES: tuple[tuple[str, Callable[[Answers], Finding]], ...] = (
    ("nodes", judge_nodes),
    ("same versions", lambda answers: doctor.judge_versions(answers.here, answers.nodes)),
    ("GPUs", judge_gpus),
    ("disk of nodes", lambda answers: doctor.judge_disks(answers.nodes)),
    ("shared memory of nodes", lambda answers: doctor.judge_shm(answers.nodes)),
    ("one Ray a node", lambda answers: doctor.judge_rays(answers.nodes)),
    ("clocks of nodes", judge_clocks),
    ("storage from nodes", judge_storage),
    ("data from nodes", judge_data),
    ("MLflow from nodes", judge_tracking),
    ("all-reduce", judge_all_reduce),
)


def ask_nodes(profile: profiles.Profile, subject: Subject) -> dict[str, Any]:
    """Ask every node through a job with this code, which leaves nothing behind."""
    data = subject.config.data.uri if subject.config is not None else subject.data
    told = {"storage": subject.storage, "tracking": _page(subject.tracking, "health"), "data": data and Store(data).uri}
    return run_job(profile, "jobs.nodes", told)


def run_job(profile: profiles.Profile, module: str, told: Mapping[str, Any]) -> dict[str, Any]:
    """Run a module of this code on a cluster, and return the answer that it prints; the job is forgotten then.

    Raises:
        UserError: other versions there than here, or a job that fails, or does not end within two minutes after what
            its profile has the nodes install.
    """
    from jobs import submit
    from jobs.nodes import ANSWER

    submit.check_versions(profile)
    with tempfile.TemporaryDirectory(prefix="tessera-package-") as scratch, submit.job_client(profile) as client:
        built = package.write(package.collect(), {}, Path(scratch) / "package.zip")
        runtime = submit.runtime_env(profile, {})
        job = client.submit_job(
            entrypoint=f"python -m {module} {shlex.quote(json.dumps(told))}",
            runtime_env={"working_dir": str(built.path), **runtime},
        )
        if installs := "uv" in runtime:
            note("the nodes install the packages of the profile's lock first, unless they have them: minutes")
        try:
            info = _ended(client, job, _INSTALL_SECONDS if installs else _JOB_SECONDS)
            log = client.get_job_logs(job)
        finally:
            _forget(client, job)
    for line in log.splitlines():
        if ANSWER in line:
            return json.loads(line.split(ANSWER, 1)[1])
    last = " | ".join([*log.strip().splitlines()[-_LINES:], info.message or ""])
    raise UserError(f"the job that asks the nodes ended as {info.status.value}: {last}")


def _ended(client: JobSubmissionClient, job: str, start_seconds: float) -> JobDetails:
    """Wait for the end of a job that has `start_seconds` to begin, and two minutes from then."""
    limits = {"PENDING": start_seconds, "RUNNING": _JOB_SECONDS}
    state, since = "", 0.0
    while not (info := client.get_job_info(job)).status.is_terminal():
        if info.status.value != state:
            state, since = info.status.value, time.monotonic()
        if time.monotonic() - since > limits[state]:
            raise UserError(
                f"job {job}, which asks the nodes, was {state} for {limits[state]:g} s: look for what hinders it in "
                "runtime_env_setup-*.log and job-driver-*.log of Ray's session folder on the head"
            )
        time.sleep(0.3)
    return info


def _forget(client: JobSubmissionClient, job: str) -> None:
    """Delete a job; stop it first if it has not ended."""
    end = time.monotonic() + _STOP_SECONDS
    if not client.get_job_status(job).is_terminal():
        client.stop_job(job)
    while not client.get_job_status(job).is_terminal():
        if time.monotonic() > end:
            note(f"job {job} does not end yet: `ray job delete {job}` once it has")
            return
        time.sleep(0.3)
    client.delete_job(job)
