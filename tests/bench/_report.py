"""What benchmarks share: alternating repeats, medians, the machine, and the closing JSON line."""

import json
import statistics
import sys
import time
from collections.abc import Callable

import torch


def machine() -> str:
    """Instruction set and threads, which ratios depend on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else torch.backends.cpu.get_cpu_capability()
    bf16 = "bf16 in hardware" if not torch.cuda.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported() else ""
    return f"{device} {bf16}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def alternate(
    contestants: dict[str, Callable[[], object]], repeats: int, before: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each contestant's repeats, taken in turn after one warm-up of each; `before` is not timed."""
    for work in contestants.values():
        before()
        work()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, work in contestants.items():
            before()
            times[name].append(seconds(work))
    for name, values in times.items():
        spread = f"{min(values):.4f} … {max(values):.4f}"
        print(f"{name:<40} median {statistics.median(values):.4f} s   {spread}", file=sys.stderr)
    return times


def ratio(times: dict[str, list[float]], ours: str, peer: str) -> float:
    """Median over repeats of the peer's time divided by ours, pair by pair."""
    return statistics.median(b / a for a, b in zip(times[ours], times[peer], strict=True))


def close(metric: str, value: float, unit: str, peer: str, ratio: float, **more: object) -> None:
    """Print the closing line."""
    line = {"metric": metric, "value": value, "unit": unit, "peer": peer, "ratio": ratio, "machine": machine(), **more}
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()}))
