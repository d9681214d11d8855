"""Time of a pass over a loader's batches: CPU-seconds of this process and of all below it, and wall time.

Contestants run in environments of their own and import nothing of the project but this file, which lies beside them.
"""

import json
import resource
import time
from contextlib import suppress

import psutil


def cpu_seconds():
    """User and system time, dead processes' included."""
    spent = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(who)
        spent += usage.ru_utime + usage.ru_stime
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            times = child.cpu_times()
            spent += times.user + times.system + times.children_user + times.children_system
    return spent


def read(epoch, size, warm=True):
    """Take every batch of images, (B, 3, S, S), of `epoch()` and print what it cost.

    A warm reader has been through one epoch before the measured one, as in all epochs of a training but the first.
    """
    if warm:
        for _ in epoch():
            pass
    cpu, wall, images = cpu_seconds(), time.perf_counter(), 0
    for batch in epoch():
        assert tuple(batch.shape[1:]) == (3, size, size), batch.shape
        images += len(batch)
    cpu, wall = cpu_seconds() - cpu, time.perf_counter() - wall
    print(json.dumps({"images": images, "cpu_s": cpu, "wall_s": wall}))
