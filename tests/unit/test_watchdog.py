import subprocess
import sys

STUCK = """
import threading, time
from service import watchdog
with watchdog.watch(0.4):
    for _ in range(10):
        time.sleep(0.1)
        watchdog.beat()
    print("beaten", flush=True)
    {end}
print("left", flush=True)
time.sleep(1)
print("slept", flush=True)
"""


def run(end):
    return subprocess.run(
        [sys.executable, "-c", STUCK.format(end=end)], capture_output=True, text=True, check=False, timeout=60
    )


def test_a_process_without_progress_ends_and_tells_where_it_hung():
    hung = run("threading.Lock().acquire() and threading.Event().wait(60)")
    assert hung.returncode == 1 and hung.stdout == "beaten\n"
    assert "Timeout" in hung.stderr and "in wait" in hung.stderr


def test_progress_keeps_a_process_and_the_end_of_the_watch_frees_it():
    done = run("pass")
    assert (done.returncode, done.stdout) == (0, "beaten\nleft\nslept\n")
