"""`make chaos`: every fault at some seeds, as a markdown table and a JSON line; results are kept, so it can be stopped.

A kept result belongs to the code that gave it: other code is tried anew.
"""

import argparse
import json
import signal
import sys
import tempfile
from pathlib import Path

from service.data.store import Store
from tests.bench._contestants import CACHE
from tests.configs import write_few_digits
from tests.distributed.chaos import harness
from tests.distributed.chaos.faults import FAULTS
from tests.distributed.chaos.hosts import cluster


def main() -> int:
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--fault", action="append", choices=FAULTS, help="one of the table; repeat for more")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(143))  # so that the hosts are taken down
    kept = Store(CACHE / "chaos" / harness.code())
    wanted = [(name, seed) for seed in range(options.seeds) for name in options.fault or FAULTS]
    missing = [(name, seed) for name, seed in wanted if not kept.exists(_key(name, seed))]
    kind = "results kept from before"
    if missing:
        kind = _try(missing, kept)
    results = [json.loads(kept.get(_key(name, seed))) for name, seed in wanted]
    print(harness.summary(results))
    bad = [each for each in results if each["outcome"] != harness.PROMISED]
    for each in bad:
        print(f"{each['fault']}, seed {each['seed']}, at step {each['at']}: {each['outcome']}", file=sys.stderr)
    line = {
        "metric": "chaos",
        "value": len(results) - len(bad),
        "unit": "runs that end as promised",
        "of": len(results),
    }
    print(json.dumps(line | {"hosts": kind, "results": results}))
    return min(1, len(bad))


def _try(missing: list[tuple[str, int]], kept: Store) -> str:
    """Run what is missing on one cluster, keep each result, and say what the hosts were."""
    folder = Path(tempfile.mkdtemp(prefix="tessera-chaos-"))
    digits = folder / "digits"
    write_few_digits(digits)
    expected = {
        settings: harness.undisturbed(str(digits), folder / f"undisturbed-{n}", *settings)
        for n, settings in enumerate({FAULTS[name].settings for name, _ in missing})
    }
    with cluster(folder / "cluster", cpus=2) as hosts:
        print(f"hosts: {hosts.kind}; logs in {folder}", file=sys.stderr)
        for name, seed in missing:
            result = harness.disturb(hosts, name, FAULTS[name], seed, str(digits), expected[FAULTS[name].settings])
            print(json.dumps(result), file=sys.stderr)
            kept.put(_key(name, seed), json.dumps(result).encode())
        return hosts.kind


def _key(name: str, seed: int) -> str:
    return f"{name.replace(' ', '-')}-{seed}.json"


if __name__ == "__main__":
    sys.exit(main())
