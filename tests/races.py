"""Races between processes for one object, the same on disk and on S3."""

import subprocess
import sys

from service.data.store import Store

_RACER = """
import sys
from service.data.store import Store
store = Store(sys.argv[1])
store.exists("lease")
print("ready", flush=True)
sys.stdin.readline()
print(store.create("lease", sys.argv[2].encode() * 100_000))
"""


def check_one_creates(store: Store, racers: int = 4) -> None:
    """Let processes create the same object at the same moment; one must win, and its bytes must stay."""
    racing = [
        subprocess.Popen(
            [sys.executable, "-c", _RACER, store.uri, str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(racers)
    ]
    assert [each.stdout.readline() for each in racing] == ["ready\n"] * racers
    for each in racing:
        each.stdin.write("\n")
        each.stdin.flush()
    answers = [each.communicate()[0].strip() for each in racing]
    assert sorted(answers) == ["False"] * (racers - 1) + ["True"]
    assert store.get("lease") == str(answers.index("True")).encode() * 100_000
    assert store.list() == ["lease"]
