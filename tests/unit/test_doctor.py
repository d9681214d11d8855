"""What the doctor makes of the facts: pure judgements, and the facts of this host."""

import base64
import json
import os
from contextlib import nullcontext
from types import SimpleNamespace

import psutil
import pytest
from ray.job_submission import JobStatus

from cluster import doctor, profiles
from cluster.doctor import Finding
from cluster.hardware import Interconnect
from datasets_prep.errors import UserError
from jobs import doctor as checks
from jobs import package, submit
from jobs.probe import PLACE, probe_store
from service.data.store import Store, StoreUnavailable
from tests.configs import tiny

GIB = 2**30
DAY = 86400.0


def host(name="a", **facts):
    """Facts of a node in good order."""
    return {
        "host": name,
        "python": "3.11.7",
        "packages": {"ray": "2.60.0", "torch": "2.15.0"},
        "disks": [["/tmp", 50 * GIB, 100 * GIB]],
        "shm": [8 * GIB, 8 * GIB],
        "gpus": [],
        "rays": {"session_1": [1]},
        "ray_cpus": 8.0,
        "ray_gpus": 0.0,
        "clock": [0.0, 0.001],
        "store": {"put": 0.02, "get": 0.01, "create": 0.01, "delete": 0.01},
        "tracking": True,
        **facts,
    }


def answers(*nodes, silent=None, all_reduce=None, **env):
    facts = {"nodes": list(nodes), "silent": silent or {}, "all_reduce": all_reduce or {"skipped": "one GPU"}}
    subject = checks.Subject(None, {"TESSERA_STORAGE": "s3://runs", "MLFLOW_TRACKING_URI": "http://m:5000", **env})
    return checks.Answers(host("here"), facts, None, subject)


def states(given):
    return {name: check(given).state for name, check in checks.NODES}


def test_healthy_nodes_pass_every_check():
    found = states(answers(host("a"), host("b")))
    assert {name for name, state in found.items() if state == "skipped"} == {"GPUs", "data from nodes", "all-reduce"}
    assert set(found.values()) == {"ok", "skipped"}


@pytest.mark.parametrize(
    ("facts", "name", "state", "words"),
    [
        ({"disks": [["/tmp", GIB // 2, 100 * GIB]]}, "disk of nodes", "fail", "512.0 MiB free of 100.0 GiB in /tmp"),
        ({"disks": [["/tmp", 11 * GIB, 300 * GIB]]}, "disk of nodes", "warn", "tessera gc"),
        ({"shm": [63 << 20, 64 << 20]}, "shared memory of nodes", "fail", "--shm-size"),
        ({"shm": [GIB // 2, GIB]}, "shared memory of nodes", "warn", "512.0 MiB free"),
        ({"rays": {"one": [1, 2], "two": [3]}}, "one Ray a node", "fail", "one (processes 1, 2); two (processes 3)"),
        ({"clock": [-3.0, 0.5]}, "clocks of nodes", "warn", "b is 3.00 ± 0.50 s behind"),
        ({"clock": [40.0, 0.5]}, "clocks of nodes", "fail", "chrony"),
        ({"store_error": "s3://runs: denied: check the keys"}, "storage from nodes", "fail", "b: s3://runs: denied"),
        ({"store": {"put": 0.9, "get": 0.7}}, "storage from nodes", "warn", "get 700 ms on b"),
        ({"tracking": False}, "MLflow from nodes", "fail", "does not answer on b"),
        ({"data_error": "no index: write it"}, "data from nodes", "fail", "b: no index"),
        ({"packages": {"ray": "2.59.0", "torch": "2.15.0"}}, "same versions", "fail", "ray 2.59.0 on b, 2.60.0 here"),
        ({"packages": {"ray": "2.60.0"}}, "same versions", "fail", "torch none on b, 2.15.0 here"),
        ({"python": "3.12.1"}, "same versions", "fail", "Python 3.12.1 on b"),
        ({"python": "3.11.9"}, "same versions", "warn", "Python 3.11.9 on b"),
        ({"ray_gpus": 2.0}, "GPUs", "fail", "nvidia-smi shows none"),
        ({"ray_gpus": 2.0, "gpus": [{}]}, "GPUs", "fail", "nvidia-smi shows 1"),
        ({"gpus": [{}]}, "GPUs", "warn", "--num-gpus"),
    ],
)
def test_one_node_that_is_wrong_is_named_with_the_cure(facts, name, state, words):
    given = answers(host("a", fingerprint="f" * 16), host("b", fingerprint="f" * 16) | facts)
    finding = dict(checks.NODES)[name](given)
    assert finding.state == state and finding.cure
    assert words in f"{finding.found} → {finding.cure}"


def test_gpus_are_told_by_kind_and_mixed_drivers_are_a_warning():
    gpu = {"name": "NVIDIA A100", "memory_mib": "81920", "driver": "550.1"}
    two = host(ray_gpus=2.0, gpus=[gpu, gpu])
    assert doctor.judge_gpus([two]) == Finding("GPUs", "ok", "2 × NVIDIA A100 80 GiB, driver 550.1")
    assert doctor.judge_gpus([two], memory_gib=80).state == "ok" and doctor.judge_gpus([two], 96).state == "fail"
    other = host(ray_gpus=1.0, gpus=[gpu | {"driver": "535.2"}])
    assert doctor.judge_gpus([two, other]).state == "warn"


def test_nodes_that_run_no_task_and_read_other_data_fail():
    given = answers(host(fingerprint="a"), host(fingerprint="b"), silent={"10.0.0.3": "no answer within 40 s"})
    assert "1 of 3 run no task: 10.0.0.3: no answer" in checks.judge_nodes(given).found
    assert "a, b" in checks.judge_data(given).found


def test_bus_bandwidth_is_that_of_a_ring():
    assert doctor.bus_bandwidth(2, 1000, 1.0) == 1000  # each of two sends half of it twice
    assert doctor.bus_bandwidth(8, 800, 2.0) == pytest.approx(2 * 7 / 8 * 400)


def test_an_all_reduce_is_held_to_the_links_that_the_profile_states():
    result = {"ranks": 16, "nodes": 2, "backend": "nccl", "bytes": 256 << 20, "right": True, "seconds": 0.05}
    speed = doctor.bus_bandwidth(16, 256 << 20, 0.05)
    assert f"{speed / 1e9:.2f} GB/s" in doctor.judge_all_reduce(result).found
    assert doctor.judge_all_reduce(result, Interconnect(gbit_per_second=speed * 8e-9 * 1.9)).state == "ok"
    slow = doctor.judge_all_reduce(result, Interconnect(gbit_per_second=speed * 8e-9 * 2.1))
    assert slow.state == "warn" and "NCCL_DEBUG" in slow.cure
    assert doctor.judge_all_reduce(result | {"right": False}).state == "fail"
    assert "NCCL_SOCKET_IFNAME" in doctor.judge_all_reduce(result | {"error": "timed out"}).cure


def test_nvlink_is_to_be_faster_than_pcie_could_be():
    seconds = doctor.bus_bandwidth(8, 256 << 20, 1.0) / 31.5e9  # that PCIe 4.0 takes
    result = {"ranks": 8, "nodes": 1, "backend": "nccl", "bytes": 256 << 20, "right": True}
    fast, slow = result | {"seconds": 0.99 * seconds}, result | {"seconds": 1.01 * seconds}
    nvlink, pcie = Interconnect(kind="nvlink", gbit_per_second=1e6), Interconnect(kind="pcie", gbit_per_second=1e6)
    assert [doctor.judge_all_reduce(fast, kind).state for kind in (nvlink, pcie)] == ["ok", "ok"]
    assert [doctor.judge_all_reduce(slow, kind).state for kind in (nvlink, pcie)] == ["warn", "ok"]
    assert "states NVLink within a node" in doctor.judge_all_reduce(slow, nvlink).cure
    assert doctor.judge_all_reduce(slow | {"backend": "gloo"}, nvlink).state == "ok"


def test_a_clock_is_as_far_off_as_it_must_be_at_least():
    assert doctor.offset(105.0, 100.0, 102.0) == (4.0, 1.0)
    assert doctor.offset(100.0, 100.5, 100.7, resolution=1.0) == pytest.approx((-0.1, 0.6))
    far, unsure = doctor.judge_clock({"a": (5.0, 0.5)}), doctor.judge_clock({"a": (5.0, 4.5)})
    assert (far.state, unsure.state) == ("warn", "ok")
    assert doctor.judge_clock({}).state == "skipped"


class Jobs:
    """A job API whose one job is in the states of a schedule, by seconds; a clock that runs while one sleeps."""

    def __init__(self, schedule, log=""):
        self.schedule, self.log, self.now, self.calls = schedule, log, 0.0, []

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds

    def submit_job(self, **_):
        return "raysubmit_1"

    def get_job_status(self, job):
        return max((at, state) for at, state in self.schedule if at <= self.now)[1]

    def get_job_info(self, job):
        return SimpleNamespace(status=self.get_job_status(job), message="")

    def get_job_logs(self, job):
        return self.log

    def stop_job(self, job):
        self.calls.append("stop")
        self.schedule.append((self.now + 5, JobStatus.STOPPED))

    def delete_job(self, job):
        assert self.get_job_status(job).is_terminal()
        self.calls.append("delete")


def asked(monkeypatch, profile, jobs):
    """What the doctor's job on a profile's cluster answers."""
    monkeypatch.setattr(checks, "time", jobs)
    monkeypatch.setattr(submit, "check_versions", lambda profile: None)
    monkeypatch.setattr(submit, "job_client", lambda profile: nullcontext(jobs))
    monkeypatch.setattr(package, "collect", lambda: package.Code({}, "", None, []))
    where = {"jobs_address": "http://r", "tracking_uri": "http://m", "storage_uri": "s3://r", "env": {}}
    there = profiles.Profile(name=profile, cpus=1, gpus=0, file=profiles.read(profile), **where)
    return checks.run_job(there, "jobs.nodes", {})


def test_a_job_may_wait_for_packages_longer_than_it_may_run(monkeypatch, capsys):
    jobs = Jobs([(0, JobStatus.PENDING), (900, JobStatus.RUNNING), (1000, JobStatus.SUCCEEDED)], 'answer {"nodes": []}')
    assert asked(monkeypatch, "rtx4090", jobs) == {"nodes": []}
    assert jobs.calls == ["delete"] and "install the packages" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("profile", "schedule", "said", "seconds"),
    [
        ("rtx4090", [(0, JobStatus.PENDING), (900, JobStatus.RUNNING)], "was RUNNING for 120 s", 1020),
        ("rtx4090", [(0, JobStatus.PENDING)], "was PENDING for 1200 s", 1200),
        ("a100x8", [(0, JobStatus.PENDING)], "was PENDING for 120 s", 120),
    ],
)
def test_a_job_that_hangs_is_stopped_and_forgotten(monkeypatch, profile, schedule, said, seconds):
    jobs = Jobs(schedule)
    with pytest.raises(UserError, match=said):
        asked(monkeypatch, profile, jobs)
    assert jobs.calls == ["stop", "delete"] and jobs.now == pytest.approx(seconds + 5, abs=2)


def test_a_job_that_cannot_be_stopped_is_named(monkeypatch, capsys):
    jobs = Jobs([(0, JobStatus.PENDING)])
    monkeypatch.setattr(jobs, "stop_job", jobs.calls.append)
    with pytest.raises(UserError, match="was PENDING"):
        asked(monkeypatch, "a100x8", jobs)
    assert jobs.calls == ["raysubmit_1"] and "`ray job delete raysubmit_1` once it has" in capsys.readouterr().err


def jwt(**claims):
    body = base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=").decode()
    return f"e30.{body}.c2ln"


def test_the_end_of_tokens(tmp_path):
    assert doctor.token_end(jwt(exp=1234)) == 1234
    assert doctor.token_end(jwt(sub="me")) is None and doctor.token_end("5f" * 32) is None
    path = tmp_path / "token"
    path.write_text(jwt(exp=1000 + 2 * DAY))
    env = {"RAY_AUTH_TOKEN_PATH": str(path), "MLFLOW_TRACKING_TOKEN": jwt(exp=900.0), "RAY_AUTH_TOKEN": ""}
    ray, mlflow = doctor.judge_tokens(env, now=1000.0)
    assert (ray.name, ray.state, ray.found) == ("Ray token", "ok", "RAY_AUTH_TOKEN_PATH ends in 2 days")
    assert (mlflow.name, mlflow.state) == ("MLflow token", "fail") and "ended 100 s ago" in mlflow.found


@pytest.mark.parametrize(
    ("env", "state", "words"),
    [
        ({}, "ok", "without an end"),
        ({"AWS_SESSION_TOKEN": "t"}, "warn", "nobody states"),
        ({"AWS_SESSION_TOKEN": "t", "AWS_CREDENTIAL_EXPIRATION": "2026-01-01T02:00:00Z"}, "warn", "ends in 2 h"),
        ({"AWS_SESSION_TOKEN": "t", "AWS_CREDENTIAL_EXPIRATION": "2025-12-31T23:00:00Z"}, "fail", "ended 60 min ago"),
    ],
)
def test_the_end_of_s3_keys(env, state, words):
    finding = doctor.judge_aws({"AWS_ACCESS_KEY_ID": "k", **env}, now=1767225600.0)  # 2026-01-01
    assert finding.state == state and words in finding.found and bool(finding.cure) == (state != "ok")


def test_a_web_identity_is_judged_by_its_token(tmp_path):
    env = {"AWS_WEB_IDENTITY_TOKEN_FILE": str(tmp_path / "token")}
    assert "cannot be read" in doctor.judge_aws(env, now=0.0).found
    (tmp_path / "token").write_text(jwt(exp=3600.0))
    assert doctor.judge_aws(env, now=0.0).state == "ok"  # its file is written anew before that
    assert doctor.judge_aws(env, now=3601.0).state == "fail"


def test_keys_of_a_process_are_fetched(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    config = tmp_path / "config"
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert doctor.judge_aws({}, now=0.0).found == "none found"
    keys = {"Version": 1, "AccessKeyId": "k", "SecretAccessKey": "s", "Expiration": "2999-01-01T00:00:00Z"}
    (tmp_path / "keys.json").write_text(json.dumps(keys))
    config.write_text(f"[default]\ncredential_process = cat {tmp_path / 'keys.json'}\n")
    assert doctor.judge_aws({}, now=0.0).found == "by custom-process, renewed by themselves"
    (tmp_path / "keys.json").unlink()
    assert doctor.judge_aws({}, now=0.0).state == "fail"


def test_packages_are_held_to_what_the_project_asks_for():
    there = {"torch": "2.13.0", "numpy": "2.4.6", "ray": "2.60.0"}
    asked = ["torch>=2.14,<3", "numpy>=2", "ray[default]>=2.60", "pytest>=8; extra == 'dev'", "obstore>=0.12"]
    finding = doctor.judge_packages(asked, there.get)
    assert finding.state == "fail" and finding.found == "torch 2.13.0 is not <3,>=2.14; obstore is missing"
    assert doctor.judge_packages(asked[1:3], there.get).state == "ok"
    assert doctor.judge_packages(None, there.get).state == "warn"
    assert doctor.judge_packages(doctor.installed_requirements()).state == "ok"


def test_the_facts_of_this_host(tmp_path):
    facts = doctor.examine([tmp_path / "not" / "there"])
    assert facts["packages"]["numpy"] and facts["host"]
    path, free, total = next(row for row in facts["disks"] if row[0] == str(tmp_path / "not" / "there"))
    assert 0 <= free <= total and total == psutil.disk_usage(str(tmp_path)).total
    assert json.loads(json.dumps(facts))["python"] == facts["python"]


def test_an_error_becomes_a_row_with_its_cure():
    error = UserError("no MLflow at http://m:5000 (refused): start the server")
    assert doctor.failed("MLflow", error) == Finding(
        "MLflow", "fail", "no MLflow at http://m:5000 (refused)", "start the server"
    )
    assert doctor.failed("x", UserError("nothing")) == Finding("x", "fail", "nothing")


def test_a_store_is_tried_and_left_as_it_was(tmp_path):
    assert set(probe_store(str(tmp_path / "runs"))) == {"put", "get", "create", "delete"}
    assert Store(tmp_path / "runs").list() == []


def test_a_store_that_overwrites_conditional_writes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Store, "create", lambda self, name, data: self.put(name, data) or True)
    with pytest.raises(UserError, match=f"{tmp_path}/{PLACE} overwrites"):
        probe_store(str(tmp_path))


def test_a_full_disk_fails(small_disk):
    assert doctor.judge_disks([doctor.examine([small_disk])]).state == "fail"
    (small_disk / "filler").write_bytes(bytes(os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize))
    with pytest.raises(StoreUnavailable, match="free space there"):
        probe_store(str(small_disk))


def findings(subject):
    return {finding.name: finding for finding in checks.examine(subject)}


def test_data_is_held_to_the_recipe(few_digits, tmp_path):
    def found(**changes):
        config = tiny(few_digits, **changes)
        return {f.name: f for f in checks._data(checks.Subject(None, {}, None, config))}

    good = found()
    assert "300" not in good["data"].found and "fingerprint" in good["data"].found
    assert good["partitions"].found.startswith("8 partitions for 1 workers, batches of 64")
    with pytest.raises(UserError, match="lower data.batch_size"):
        found(data__batch_size=2048)
    missing = findings(checks.Subject(None, {}, str(tmp_path)))["data"]
    assert missing.state == "fail" and "holds no index.json" in missing.found


def test_nothing_named_is_skipped_and_the_host_is_judged_all_the_same():
    found = findings(checks.Subject(None, {}))
    assert {name for name, finding in found.items() if finding.state == "skipped"} == {
        *("clock", "MLflow", "storage", "data")
    }
    assert found["Ray"].state == "fail" and "--cluster" in found["Ray"].cure
