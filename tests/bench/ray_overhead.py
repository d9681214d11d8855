"""The same 200 steps under Ray Train and under torchrun, two processes and one thread each: what Ray costs.

Steady state only: wall time and CPU time of the ranks between step 20 and step 200 of the `demo` recipe on the
embedded digits. Start-up is left out; `tessera submit` prints it.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.bench._report import close

STEPS, SKIPPED, REPEATS = 200, 20, 3


def work(told):
    """Train in one rank and note wall and CPU seconds of the steady state."""
    import warnings

    warnings.simplefilter("ignore")
    os.environ["TESSERA_CACHE"] = told["cache"]
    from jobs import recipes
    from service.data.store import Store
    from service.engine.loop import Run, train
    from service.engine.trainer import Trainer

    taken, step = {}, Trainer.step

    def noting(self, number, images, ids):
        if number in (SKIPPED, STEPS - 1):
            taken[number] = (time.perf_counter(), time.process_time())
        return step(self, number, images, ids)

    Trainer.step = noting
    settings = [f"schedule.steps={STEPS}", "eval.labels_per_class=[]", f"data.uri={told['digits']}"]
    with tempfile.TemporaryDirectory() as scratch:
        train(recipes.load("demo", settings), Run(Store(scratch)))
    wall, cpu = (b - a for a, b in zip(taken[SKIPPED], taken[STEPS - 1], strict=True))
    Path(told["out"], f"{os.environ['RANK']}.json").write_text(json.dumps([wall, cpu]))


def under_torchrun(told):
    code = "import json, sys; from tests.bench.ray_overhead import work; work(json.loads(sys.argv[1]))"
    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
        script.write(code)
        script.flush()
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
        subprocess.run([*launch, script.name, json.dumps(told)], check=True, env=environment, capture_output=True)


def under_ray(told):
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    scaling = ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1})
    run = RunConfig(storage_path=told["out"])
    TorchTrainer(work, train_loop_config=told, scaling_config=scaling, run_config=run).fit()


def main():
    import ray

    from jobs.shard import shard

    with tempfile.TemporaryDirectory() as scratch:
        shard("digits", f"{scratch}/digits")
        paths = {"env_vars": {"PYTHONPATH": os.getcwd()}}
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=paths)
        found = {"ray": [], "torchrun": []}
        for repeat in range(REPEATS):
            for name, launch in (("torchrun", under_torchrun), ("ray", under_ray)):
                out = Path(scratch, f"{name}-{repeat}")
                out.mkdir()
                launch({"out": str(out), "digits": f"{scratch}/digits", "cache": f"{scratch}/cache"})
                ranks = [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]
                wall, cpu = max(r[0] for r in ranks), sum(r[1] for r in ranks) / 2
                found[name].append((wall, cpu))
                print(f"{name:<9} wall {wall:.2f} s   CPU per rank {cpu:.2f} s", file=sys.stderr)
        ray.shutdown()
    pairs = list(zip(found["torchrun"], found["ray"], strict=True))
    wall, cpu = (statistics.median(torchrun[i] / with_ray[i] for torchrun, with_ray in pairs) for i in (0, 1))
    rate = (STEPS - 1 - SKIPPED) / statistics.median(r[0] for r in found["ray"])
    close("ray_overhead", rate, "steps/s", "torchrun, same code, 2 processes", wall, cpu_ratio=cpu)


if __name__ == "__main__":
    main()
