"""A local stack for the files whose tests submit jobs."""

import subprocess
import sys
from pathlib import Path

import pytest

from cluster import local

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    """A stack of this module's own, with runs in S3; the state folder keeps it apart from a user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        patch.setenv("TESSERA_CACHE", str(tmp_path_factory.mktemp("job_cache")))
        running = local.up(tmp_path_factory.mktemp("stack"), s3=True)
        for name, value in running.env.items():
            if name.startswith("AWS_"):
                patch.setenv(name, value)
        try:
            yield running
        finally:
            local.down()


@pytest.fixture(scope="module")
def tessera(stack):
    def call(*arguments, code=0, env=None):
        done = subprocess.run(
            [sys.executable, "-m", "jobs.cli", *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=env,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr, done.stderr
        return done.stdout if code == 0 else done.stderr

    return call
