"""Contestants of a benchmark, each in a process and, where it is a peer, an environment of its own."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tessera-bench"
SCRIPTS = Path(__file__).parent / "contestants"
TORCH = ("torch==2.15.0", "torchvision==0.29.2", "psutil==7.2.2", "pillow==13.0.0")
PACKAGES = {
    "webdataset_pil": (*TORCH, "webdataset==1.0.2"),
    "webdataset_turbo": (*TORCH, "webdataset==1.0.2", "simplejpeg==1.9.0", "opencv-python-headless==5.0.0.93"),
    "mosaicml": (*TORCH, "mosaicml-streaming==0.13.0"),
    "lit": (*TORCH, "litdata==0.2.76"),
    "kornia_views": (*TORCH, "kornia==0.9.0"),
}


def say(text):
    print(text, file=sys.stderr, flush=True)


def environment(name):
    """Python that runs a contestant: this one, or the peer's own, made once; None where it cannot be installed."""
    if name not in PACKAGES:
        return sys.executable
    folder = CACHE / "environments" / name
    python, made = folder / "bin" / "python", folder / "installed"
    wanted = "\n".join(PACKAGES[name])
    if made.exists() and made.read_text() == wanted:
        return str(python)
    uv = str(Path(sys.executable).with_name("uv"))
    install = [uv, "pip", "install", "--quiet", "--python", str(python), *PACKAGES[name]]
    for command in ([uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)], install):
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        if done.returncode:
            say(f"{name} cannot be installed and is left out: {done.stderr.strip()[-300:]}")
            return None
    made.write_text(wanted)
    return str(python)


def run(name, *arguments, env=None):
    """Run a contestant; returns what its JSON lines say, None where it is not installed or failed."""
    python = environment(name)
    if python is None:
        return None
    command = [python, str(SCRIPTS / f"{name}.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | (env or {}), timeout=1800)
    if done.returncode:
        say(f"{name} failed and is left out: {done.stderr.strip()[-600:]}")
        return None
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {key: value for line in lines for key, value in line.items()}


def photos(source, samples):
    """Folder of `samples` photos and 200 for validation, one class each: the real ones, linked again and again."""
    folder = CACHE / f"photos-{samples}"
    if folder.exists():
        return folder
    unfinished = folder.with_suffix(".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    with tarfile.open(source) as tar:
        real = [(Path(m.name).parent.name, tar.extractfile(m).read()) for m in tar if m.name.endswith(".JPEG")]
    for split, count in (("train", samples), ("val", len(real))):
        for i in range(count):
            name, data = real[i % len(real)]
            path = unfinished / split / name / f"{i // len(real):04d}.jpeg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    unfinished.rename(folder)
    return folder


def shards(source, samples, shard_mb):
    """The photos as shards of this project, which webdataset reads too."""
    from jobs.shard import shard

    out = CACHE / f"shards-{samples}-{shard_mb}mb"
    shard("imagefolder", str(out), photos(source, samples), shard_mb=shard_mb, say=say)
    return out


def written(name, source, samples):
    """The photos in a peer's own format, written by itself."""
    folder = CACHE / f"{name}-{samples}"
    if folder.exists():
        return folder
    unfinished = folder.with_suffix(".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    if run(name, unfinished, "--write", photos(source, samples)) is None:
        return None
    unfinished.rename(folder)
    return folder


def rates(contestants, repeats):
    """Images per CPU-second and per second of each contestant, {name: [(rate, wall rate) of each repeat]}.

    `contestants` maps names to functions that return a run's result. They take turns; the first turn only warms up, and
    who fails in it is left out.
    """
    found = {name: [] for name, work in contestants.items() if work() is not None}
    for _ in range(repeats):
        for name in list(found):
            result = contestants[name]()
            found[name].append((result["images"] / result["cpu_s"], result["images"] / result["wall_s"]))
    for name, values in found.items():
        cpu, wall = (statistics.median(column) for column in zip(*values, strict=True))
        say(f"{name:<46} {cpu:8.1f} images per CPU-second   {wall:8.1f} images/s")
    return found


def ratio(found, ours, peer):
    """Median over repeats of our images per CPU-second divided by the peer's; None where the peer is missing."""
    if peer not in found:
        return None
    return statistics.median(a[0] / b[0] for a, b in zip(found[ours], found[peer], strict=True))


def median(found, name, column=0):
    """Median rate of a contestant: per CPU-second, or per second with `column=1`."""
    return statistics.median(values[column] for values in found[name]) if name in found else None
