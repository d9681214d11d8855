import json
import os
import subprocess
import sys
import time

import pytest

from service.data.store import Store
from service.engine import lease
from service.engine.lease import Holder, Lease, LeaseLost, RunAlive


def abandon(run, epoch, holder, beat):
    run.put(f"lease/{epoch:06d}.json", json.dumps(vars(holder)).encode())
    run.put(f"lease/{epoch:06d}.beat", str(beat).encode())


def test_a_living_holder_keeps_the_run(tmp_path):
    run = Store(tmp_path)
    with Lease(run, job="job-1") as held:
        assert held.epoch == 1
        with pytest.raises(RunAlive, match="job-1"):
            Lease(run)
    with Lease(run) as next_one:
        assert next_one.epoch == 2


def test_a_holder_that_died_here_is_replaced_at_once(tmp_path):
    code = (
        "import sys; from service.engine.lease import Lease; from service.data.store import Store; import os, signal;"
        "Lease(Store(sys.argv[1])).__enter__(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -9
    assert Lease(Store(tmp_path)).epoch == 2


def test_a_reused_pid_is_not_the_holder(tmp_path):
    me = Holder.me()
    abandon(Store(tmp_path), 4, Holder(me.host, os.getpid(), me.started - 100, None), time.time())
    assert Lease(Store(tmp_path)).epoch == 5


def test_a_holder_elsewhere_counts_as_long_as_it_beats(tmp_path, monkeypatch):
    run, elsewhere = Store(tmp_path), Holder("elsewhere", 1, 0.0, None)
    abandon(run, 1, elsewhere, time.time())
    with pytest.raises(RunAlive, match="on elsewhere"):
        Lease(run)
    monkeypatch.setattr(lease, "RECHECK_SECONDS", 0)
    abandon(run, 1, elsewhere, time.time() - lease.DEAD_AFTER_SECONDS - 1)
    assert Lease(run).epoch == 2


def test_a_holder_elsewhere_that_an_outage_silenced_keeps_the_run(tmp_path, monkeypatch):
    run, elsewhere = Store(tmp_path), Holder("elsewhere", 1, 0.0, None)
    abandon(run, 1, elsewhere, time.time() - lease.DEAD_AFTER_SECONDS - 1)
    monkeypatch.setattr(lease.time, "sleep", lambda seconds: abandon(run, 1, elsewhere, time.time()))
    with pytest.raises(RunAlive, match="on elsewhere"):
        Lease(run)


def test_the_request_to_stop_is_for_one_lease(tmp_path):
    run = Store(tmp_path)
    with Lease(run) as held:
        assert not lease.asked_to_stop(run, held.epoch)
        lease.ask_to_stop(run, held.epoch)
        assert lease.asked_to_stop(run, held.epoch)
    with Lease(run) as next_one:
        assert next_one.epoch == 2 and not lease.asked_to_stop(run, 2)


def test_a_driver_that_comes_back_is_fenced(tmp_path):
    run = Store(tmp_path)
    abandon(run, 1, Holder("elsewhere", 1, 0.0, None), 0)
    lease.check_lease(run, 1)
    with Lease(run):
        with pytest.raises(LeaseLost, match="epoch 2 is newer than this driver's 1"):
            lease.check_lease(run, 1)
        lease.check_lease(run, 2)


def test_the_heartbeat_is_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.01)
    run = Store(tmp_path)
    with Lease(run):
        first = float(run.get("lease/000001.beat"))
        deadline = time.monotonic() + 10
        while float(run.get("lease/000001.beat")) == first:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert float(run.get("lease/000001.beat")) == 0
