"""The `loader` benchmark's batches from an S3 server with a cold cache, against the same shards in a local folder.

Images per CPU-second of the reader's processes; the server and the fault proxy are others, and on two cores they take
wall time from the reader, so that stands beside. Then the same with 2 % of the requests answered by 503 or cut off half
way: every sample must come exactly once.
"""

import argparse
import itertools
import os
import tempfile
from functools import partial
from pathlib import Path

from service.data.store import Store
from tests.bench._contestants import median, rates, ratio, run, say, shards
from tests.bench._report import close
from tests.bench.loader import SOURCE
from tests.servers import faulty_proxy, seaweedfs

LOCAL, REMOTE, FAULTY = "local folder", "S3, cold cache", "S3, cold cache, 2 % faults"


def cold(address, env):
    """Read with an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        found = run("tessera", address, "--exactly-once", "--cold", env=env | {"TESSERA_CACHE": cache})
    if found is None or found["lost"] or found["repeated"]:
        raise SystemExit(f"{address}: not every sample came exactly once: {found}")
    return found


def upload(folder, address):
    store = Store(address)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            store.put(str(path.relative_to(folder)), path.read_bytes())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=2400)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    tars = shards(SOURCE, options.samples, 4)
    count = itertools.count()
    injected = []

    def fault(method, path):
        """Spoil every fiftieth request, by 503 and by a cut body in turn."""
        number = next(count)
        if number % 50 != 7:
            return None
        injected.append(path)
        return 503 if len(injected) % 2 else 200

    with (
        tempfile.TemporaryDirectory() as folder,
        seaweedfs(Path(folder)) as s3,
        faulty_proxy(s3, fault) as spoilt,
    ):
        address = f"s3://{s3.bucket}/photos"
        os.environ |= s3.env()
        upload(tars, address)
        contestants = {
            LOCAL: partial(cold, tars, {}),
            REMOTE: partial(cold, address, s3.env()),
            FAULTY: partial(cold, address, spoilt.env()),
        }
        found = rates(contestants, options.repeats)
    say(f"{len(injected)} of {next(count)} requests spoilt, no sample lost or repeated")
    close(
        "loader_s3",
        median(found, REMOTE),
        "images per CPU-second",
        "the same shards in a local folder",
        ratio(found, REMOTE, LOCAL),
        ratio_with_faults=ratio(found, FAULTY, LOCAL),
        requests_spoilt=len(injected),
        images_per_s=median(found, REMOTE, 1),
        images_per_s_local=median(found, LOCAL, 1),
        images_per_s_with_faults=median(found, FAULTY, 1),
        samples=options.samples,
    )


if __name__ == "__main__":
    main()
