"""Two hosts: a run killed twice on them, and one that is submitted, watched, stopped and resumed from outside.

The table of all faults is `make chaos`.
"""

import json
import re
import signal
import subprocess
import sys
import time

import pytest

from service.data.store import Store
from tests.configs import TINY, write_few_digits
from tests.distributed.chaos import harness
from tests.distributed.chaos.faults import kill_driver, kill_worker
from tests.distributed.chaos.harness import Fault
from tests.distributed.chaos.hosts import ROOT, cluster, runs

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def expected(few_digits, tmp_path_factory):
    return harness.undisturbed(str(few_digits), tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    with cluster(tmp_path_factory.mktemp("hosts"), cpus=2) as hosts:
        yield hosts
        began = [pid for host in hosts.hosts for pid in host.pids()]
    assert began and not any(map(runs, began))


def both(scene, rng):
    kill_worker(scene, rng)
    scene.wait_for(scene.step() + 15)
    kill_driver(scene, rng)


def test_killed_twice_a_run_on_two_hosts_is_bitwise_the_undisturbed_one(hosts, few_digits, expected):
    assert sorted(expected.losses) == list(range(1, harness.STEPS + 1))
    result = harness.disturb(hosts, "both", Fault(both, again=()), 0, str(few_digits), expected)
    assert result["outcome"] == harness.PROMISED, result
    assert result["restarts"] == 2 and 0 < result["lost_steps"] < 80


@pytest.fixture
def tessera(hosts, monkeypatch, tmp_path):
    """Starts a command on this machine, which belongs to neither host and reaches the cluster by its addresses."""
    env = {key: value for key, value in hosts.env.items() if key != "PYTHONPATH"}
    env["TESSERA_CACHE"] = str(tmp_path / "cache")

    def start(*words):
        command = [sys.executable, "-u", "-m", "jobs.cli", *words]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, cwd=ROOT)

    return start


def test_a_submitted_job_trains_on_both_hosts_and_is_left_stopped_and_resumed(hosts, tessera, monkeypatch):
    import mlflow

    for name, value in hosts.s3.env().items():
        monkeypatch.setenv(name, value)
    data = f"s3://{hosts.s3.bucket}/digits"
    write_few_digits(data)
    there = ("--cluster", hosts.dashboard)
    settings = [*TINY, f"data.uri={data}", "data.mode=stream", "parallel.workers=2", "parallel.cpus_per_worker=2"]
    submit = ("submit", "demo", *settings, "schedule.steps=240", "checkpoint.every=1000 steps", *there)

    def ended(*words, code=0):
        process = tessera(*words)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == code, output
        return output

    watching = tessera(*submit)
    lines = iter(watching.stdout.readline, "")
    seen = "".join(line for line in until(lines, "step "))
    run = re.search(r"^run +(\S+)", seen, re.MULTILINE)[1]
    assert {host.address for host in hosts.hosts} == set(re.findall(r"\(ip=([\d.]+), pid=\d+\) world_rank", seen))
    watching.send_signal(signal.SIGINT)
    assert watching.wait(30) == 130

    attached = tessera("jobs", "attach", run, *there)
    ended("jobs", "stop", run, *there)
    told, _ = attached.communicate(timeout=60)
    assert attached.returncode not in (0, 2, 130), told
    stopped = int(re.search(r"stopped after step (\d+) of 240", told)[1])
    assert f"{run}-01" in ended("jobs", "stop", run, *there, code=2)
    store = Store(hosts.env["TESSERA_STORAGE"]).sub(run)
    assert max(harness.losses_of(store)) == stopped, "the last step before the stop is in a checkpoint"
    told = ended("jobs", "list", "--json", *there)
    [listed] = [job for job in json.loads(told.splitlines()[-1])["jobs"] if job["run"] == run]
    assert (listed["state"], listed["step"], listed["steps"]) == ("STOPPED", stopped, 240)
    client = mlflow.MlflowClient(hosts.env["MLFLOW_TRACKING_URI"])
    assert client.get_run(json.loads(store.get("state.json"))["mlflow_run"]).info.status == "KILLED"

    assert f"resumed from the checkpoint of step {stopped}" in ended("jobs", "retry", run, *there)
    assert f"{run}  finished" in ended(*submit)
    assert sorted(harness.losses_of(store)) == list(range(1, 241))


def test_the_doctor_tries_both_hosts_and_the_link_between_them(hosts, tessera):
    process = tessera("doctor", "--cluster", hosts.dashboard, "--json")
    output, _ = process.communicate(timeout=120)
    found = {row["name"]: row for row in json.loads(output.splitlines()[-1])["checks"]}
    assert found["nodes"]["found"].startswith("2 run tasks")
    reached = ("same versions", "one Ray a node", "clocks of nodes", "storage from nodes", "MLflow from nodes")
    assert {name: found[name]["state"] for name in reached if found[name]["state"] in ("fail", "skipped")} == {}
    assert "2 ranks on 2 nodes by gloo" in found["all-reduce"]["found"], output


def until(lines, beginning):
    """Lines up to and with the first that begins so."""
    end = time.monotonic() + 120
    for line in lines:
        yield line
        if line.startswith(beginning) or time.monotonic() > end:
            return
