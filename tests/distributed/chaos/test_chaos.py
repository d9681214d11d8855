"""Two faults in one run on two hosts: a worker is killed, then the driver; the table of all faults is `make chaos`."""

import pytest

from tests.distributed.chaos import harness
from tests.distributed.chaos.faults import kill_driver, kill_worker
from tests.distributed.chaos.harness import Fault
from tests.distributed.chaos.hosts import cluster, runs

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def expected(few_digits, tmp_path_factory):
    return harness.undisturbed(str(few_digits), tmp_path_factory.mktemp("undisturbed"))


def both(scene, rng):
    kill_worker(scene, rng)
    scene.wait_for(scene.step() + 15)
    kill_driver(scene, rng)


def test_killed_twice_a_run_on_two_hosts_is_bitwise_the_undisturbed_one(few_digits, expected, tmp_path_factory):
    assert sorted(expected.losses) == list(range(1, harness.STEPS + 1))
    with cluster(tmp_path_factory.mktemp("chaos"), cpus=2) as hosts:
        result = harness.disturb(hosts, "both", Fault(both, again=()), 0, str(few_digits), expected)
        began = [pid for host in hosts.hosts for pid in host.pids()]
    assert result["outcome"] == harness.PROMISED, result
    assert result["restarts"] == 2 and 0 < result["lost_steps"] < 80
    assert began and not any(map(runs, began))
