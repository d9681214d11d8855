"""Sweeps before any trial: what is refused, which points are tried, what rows say, what is found."""

import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from datasets_prep.errors import UserError
from jobs import recipes, sensitivity, sweep
from service.config import changed_settings
from service.data.store import Store

STD, COV = "family.loss.std", "family.loss.cov"


def written(tmp_path, **changes):
    """A sweep of the demo recipe as a file."""
    tree = {
        "recipe": "demo",
        "overrides": {"eval.every": "10 epochs"},
        "space": {
            STD: {"kind": "uniform", "low": 1, "high": 100},
            COV: {"kind": "loguniform", "low": 0.5, "high": 100},
        },
        "trials": 6,
    }
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in (tree | changes).items() if v is not None}, sort_keys=False))
    return str(path)


@pytest.mark.parametrize("name", sweep.names())
def test_every_shipped_sweep_can_run(name):
    settings, base = sweep.load(name)
    known = sweep.points(settings, base)
    assert settings.name == name and len(sweep.describe(name)) > 20
    assert len({str(point) for point in known}) == len(known) <= sweep.trial_count(settings, base)
    assert known[0] == sweep.default_point(settings, base)
    config = sweep.trial_config(settings, base, known[-1])
    assert not config.eval.report and config.eval.every and config.monitor.every
    assert set(changed_settings(base, config)) <= {
        "eval.report",
        *(name for key in settings.space for name in changed_settings(base, config) if name.startswith(key)),
    }
    room = 8 if base.compute.device == "auto" else 32
    assert sweep.check_room(settings, base, cpus=64, gpus=8) == min(room, sweep.trial_count(settings, base))


def test_points_are_drawn_by_seed_alone_and_stay_within(tmp_path):
    path = written(tmp_path)
    settings, base = sweep.load(path)
    points = sweep.points(settings, base)
    assert points == sweep.points(*sweep.load(path)) and len(points) == 6
    assert points[0] == {STD: 1.0, COV: 3.0}  # the recipe's own
    assert all(1 <= point[STD] <= 100 and 0.5 <= point[COV] <= 100 for point in points)
    assert sweep.points(*sweep.load(path, ["sweep_seed=1"]))[1:] != points[1:]
    assert sweep.points(*sweep.load(path, ["trials=4"])) == points[:4]
    assert sweep.points(*sweep.load(path, ["baseline=false"]))[0] == points[1]
    source = random.Random(0)
    drawn = {sweep.QUniform(low=0, high=1, step=0.25).draw(source) for _ in range(99)}
    assert drawn == {0, 0.25, 0.5, 0.75, 1}
    assert {sweep.RandInt(low=2, high=4).draw(source) for _ in range(99)} == {2, 3, 4}
    logs = np.log([sweep.LogUniform(low=1e-4, high=1).draw(source) for _ in range(2000)])
    assert logs.mean() == pytest.approx(np.log(1e-4) / 2, abs=0.2)  # a uniform draw would have -1


def test_a_grid_has_all_combinations_and_the_recipe_once(tmp_path):
    space = {STD: {"kind": "choice", "values": [1.0, 25.0]}, COV: {"kind": "choice", "values": [1.0, 3.0]}}
    path = written(tmp_path, space=space, search="grid", trials=None)
    points = sweep.points(*sweep.load(path))
    assert len(points) == 4 and points[0] == {STD: 1.0, COV: 3.0} and {STD: 25.0, COV: 1.0} in points
    assert (
        len(sweep.points(*sweep.load(path, ["family.loss.gamma=2", f"space.{COV}={{kind: choice, values: [1]}}"]))) == 3
    )


@pytest.mark.parametrize(
    ("changes", "overrides", "said"),
    [
        ({}, ["space.family.loss.sdt={kind: choice, values: [1]}"], "did you mean 'std'"),
        ({}, ["trails=3"], "trails is no setting"),
        ({}, [f"space.{STD}={{kind: uniform, low: -1, high: 5}}"], "family.loss.std=-1.0"),
        ({}, [f"space.{STD}={{kind: uniform, low: 5, high: 1}}"], "must be below high"),
        ({}, ["space.optim.lr={kind: uniform, low: 0, high: 1}"], "greater than 0"),
        ({}, [f"space.{STD}={{kind: normal, low: 5, high: 1}}"], "is none of"),
        ({}, ["search=grid"], "give it kind: choice"),
        ({}, [f"{STD}=3"], "in space and in overrides"),
        ({}, ["scheduler.kind=asha", "eval.every=null"], "eval.every is none"),
        ({}, ["monitor.every=null"], "collapse=null"),
        ({}, ["map=[family.loss.std, optim.lr]"], "which space does not vary"),
        ({}, ["metrics={val_linear: max, seconds: min}"], "need search=optuna"),
        (
            {},
            ["search=optuna", "family.loss.cov_norm=paper", f"space.{STD}={{kind: uniform, low: 2, high: 3}}"],
            "widen",
        ),
        (
            {},
            ["scheduler.kind=pbt", "space.optim.betas={kind: choice, values: [[0.9, 0.9]]}", "baseline=false"],
            "fixed",
        ),
        ({"trials": None}, [], "trials must be given"),
        ({}, ["trials=9", f"space={{{STD}: {{kind: choice, values: [1, 2]}}}}"], "has 3 points"),
        ({}, ["trials"], "is no override"),
        ({}, ["optim.lr=[1"], "optim.lr='\\[1'"),
        ({"search": "random"}, ["search.kind=random"], "search.kind=random: .* write search=random"),
        ({}, ["name.x=1"], "write name=1"),
        ({"scheduler": "asha"}, ["scheduler.grace=0.2"], "write scheduler=0.2"),
        ({}, ["collapse=null", "collapse.patience=0"], "collapse.patience=0"),
        ({"overrides": {}}, ["eval.every=0 epochs"], "eval.every='0 epochs'"),
        ({"space": None}, [], "space must be given"),
    ],
)
def test_what_cannot_be_is_refused_before_a_trial(tmp_path, changes, overrides, said):
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        sweep.load(written(tmp_path, **changes), overrides)


def test_the_guides_example_is_a_sweep(tmp_path):
    guide = Path(__file__).parents[2] / "docs" / "sweeps.md"
    (tmp_path / "example.yaml").write_text(guide.read_text().split("```yaml\n")[1].split("```")[0])
    settings, base = sweep.load(str(tmp_path / "example.yaml"), ["optim.weight_decay=0.1"])
    assert settings.trials == 12 and base.optim.weight_decay == 0.1


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(UserError, match="vicreg-grid"):
        sweep.load("vicreg-gird")
    with pytest.raises(UserError, match="no sweep file"):
        sweep.load(str(tmp_path / "none.yaml"))


def test_trials_at_once_are_what_the_cluster_has_room_for(tmp_path):
    settings, base = sweep.load(written(tmp_path))  # two workers of one CPU
    assert sweep.check_room(settings, base, cpus=5, gpus=0) == 2
    assert sweep.check_room(settings, base, cpus=100, gpus=0) == 6
    with pytest.raises(UserError, match="needs 2 CPUs, the cluster has 1"):
        sweep.check_room(settings, base, cpus=1, gpus=0)
    with pytest.raises(UserError, match="concurrency=3 at once, and the cluster has room for 2"):
        sweep.check_room(*sweep.load(written(tmp_path, concurrency=3)), cpus=5, gpus=0)
    with pytest.raises(UserError, match="trials=6 at once"):
        sweep.check_room(*sweep.load(written(tmp_path), ["scheduler.kind=pbt"]), cpus=5, gpus=0)
    on_gpu = sweep.load(written(tmp_path), ["compute.device=cuda"])
    assert sweep.check_room(*on_gpu, cpus=100, gpus=5) == 2


def test_a_population_writes_what_a_clone_starts_from(tmp_path):
    settings, base = sweep.load(written(tmp_path), ["scheduler.kind=pbt"])
    config = sweep.trial_config(settings, base, {STD: 2.0})
    assert config.checkpoint.every == config.eval.every == "10 epochs"
    assert config.checkpoint.allow_changes == (STD, COV)
    moved = {STD: 300.0, COV: 0.1}
    assert sweep.clipped(settings, moved) == {STD: 100.0, COV: 0.5}


def test_reports_come_at_probes_with_share_and_time():
    rows = {
        2: {"images_per_s": 100.0, "loss": 1.0},
        4: {"images_per_s": 50.0, "val_linear": 60.0, "val_linear_se": 1.0},
        5: {"monitor/encoder/effective_rank": 3.0},
        8: {"images_per_s": 100.0, "val_linear": 70.0},
    }
    first, last = sweep.reports(rows, total=8, batch=10)
    assert (first["step"], first["percent"], first["val_linear"]) == (4, 50.0, 60.0)
    assert first["seconds"] == pytest.approx(2 * 10 / 100 + 2 * 10 / 50)
    assert last["seconds"] == pytest.approx(first["seconds"] + 4 * 10 / 100)
    assert last["monitor/encoder/effective_rank"] == 3.0 and last["percent"] == 100


def test_collapse_is_told_by_rank_or_deviation_that_stay_low():
    rule = sweep.Collapse(min_rank=2.0, min_std=0.01, patience=2)

    def rows(*ranks, name="effective_rank"):
        return {10 * (i + 1): {f"monitor/encoder/{name}": rank} for i, rank in enumerate(ranks)}

    assert sweep.collapsed(rows(9, 1.5, 1.2), rule, warmup=0) == "encoder/effective_rank 1.2, below 2"
    assert sweep.collapsed(rows(1.5, 9, 1.2), rule, warmup=0) is None
    assert sweep.collapsed(rows(1.5, 1.2), rule, warmup=10) is None
    assert sweep.collapsed(rows(float("nan"), float("nan")), rule, warmup=0)
    assert sweep.collapsed(rows(0.5, 0.001, 0.002, name="std_mean"), rule, warmup=0)
    assert sweep.collapsed(rows(0.001, 0.001), None, warmup=0) is None


def entries(settings, base, scores, states=None):
    points = sweep.points(settings, base)
    return [
        {"number": i, "point": p, "state": s, "percent": 100, "metrics": {"val_linear": v}, "run": f"r{i}", "why": ""}
        for i, (p, v, s) in enumerate(zip(points, scores, states or ["finished"] * len(scores), strict=True))
    ]


def test_the_best_recipe_is_the_best_trials_config(tmp_path):
    settings, base = sweep.load(written(tmp_path))
    found = entries(settings, base, [50, 60, 90, 70, 65, 55], ["finished"] * 2 + ["stopped"] + ["finished"] * 3)
    result = sensitivity.conclude(settings, base, found)
    assert result["best"]["number"] == 3  # the stopped one has not been trained to its end
    assert result["default"]["number"] == 0 and result["states"] == {"finished": 5, "stopped": 1}
    files = sensitivity.write(settings, found, result, tmp_path / "out")
    assert {file.rsplit("/", 1)[1] for file in files} == {
        "best.yaml",
        "heat_map.png",
        "parallel.png",
        "importance.png",
    }
    best = recipes.load(str(tmp_path / "out" / "best.yaml"))
    wanted = sweep.trial_config(settings, base, result["best"]["point"])
    assert set(changed_settings(best, wanted)) == {"eval.report"} and best.eval.report
    assert best.name == "mine-best"
    for file in files[1:]:
        image = Image.open(file)
        assert min(image.size) > 100 and len(np.unique(np.asarray(image))) > 20
    text = sensitivity.render(settings, result, found)
    assert "best trial 3: val_linear 70.00, the recipe as it stands 50.00" in text
    with pytest.raises(UserError, match="no trial of sweep mine has a score"):
        sensitivity.conclude(settings, base, [{"number": 0, "state": "failed", "why": ""}])


def test_importance_is_that_of_the_setting_that_decides(tmp_path):
    settings, base = sweep.load(written(tmp_path), ["trials=40"])
    points = sweep.points(settings, base)
    found = entries(settings, base, [point[STD] + 0.01 * np.log(point[COV]) for point in points])
    shares = sensitivity.importance(settings, found)
    assert list(shares) == [STD, COV] and shares[STD] > 0.9 and sum(shares.values()) == pytest.approx(1)
    assert sensitivity.importance(settings, found[:3]) == {}


def test_the_front_trades_metrics_off(tmp_path):
    settings, base = sweep.load(
        written(tmp_path), ["search=optuna", "metrics={val_linear: max, seconds: min}", f"{'family.loss.inv'}=2"]
    )
    found = [
        {"number": i, "state": "finished", "metrics": {"val_linear": score, "seconds": seconds}, "point": {}}
        for i, (score, seconds) in enumerate([(90, 10), (80, 5), (79, 6), (90, 11)])
    ]
    assert [entry["number"] for entry in sensitivity.front(found, settings)] == [0, 1]


def test_heat_maps_of_grids_have_a_cell_for_each_pair():
    from service import plots

    points = [{"a": a, "b": b} for a in (1, 10) for b in ({"kind": "paper"}, {"kind": "guide"})]
    png = plots.heat_map(points, [1.0, 2.0, 3.0, 4.0], ["", "stopped", "", ""], ["a", "b"], "probe")
    assert Image.open(io.BytesIO(png)).size == (800, 600)


def test_a_name_belongs_to_one_sweep(tmp_path, few_digits):
    from jobs import plan, tune_submit

    path, data = written(tmp_path), f"data.uri={few_digits}"

    def loaded(*overrides, code="c0de"):
        settings, base = sweep.load(path, [data, *overrides])
        return settings, plan.make(base), code

    run, (settings, made, _) = Store(tmp_path).sub("mine"), loaded()
    tune_submit.check_same(run, tune_submit.identity(*loaded()))  # nothing is there
    run.put("state.json", b"{}")
    with pytest.raises(UserError, match="is a run: give the sweep another name, such as name=mine-2"):
        tune_submit.check_same(run, tune_submit.identity(*loaded()))
    tune_submit.keep(run, settings, made.config, tune_submit.identity(*loaded()))
    assert tune_submit.unpacked(run.get("sweep.json")) == (settings, made.config)
    for same in ((), ("concurrency=1",), ("data.workers=1",)):
        tune_submit.check_same(run, tune_submit.identity(*loaded(*same)))
    with pytest.raises(UserError, match=r"base.optim.lr was 0.01, is 0.5; set them back, or .* name=mine-2"):
        tune_submit.check_same(run, tune_submit.identity(*loaded("optim.lr=0.5")))
    with pytest.raises(UserError, match="sweep.trials was 6, is 5"):
        tune_submit.check_same(run, tune_submit.identity(*loaded("trials=5")))
    with pytest.raises(UserError, match="code was c0de, is other"):
        tune_submit.check_same(run, tune_submit.identity(*loaded(code="other")))


def test_a_resumed_search_draws_other_points(tmp_path):
    from jobs import tune

    settings, base = sweep.load(written(tmp_path), ["search=optuna", "trials=6"])

    def drawn(ledger, count):
        searcher = tune._optuna(settings, base, ledger)
        searcher.set_search_properties("val_linear", "max", {"trial": tune._space(settings, base, ledger)})
        return [searcher.suggest(str(number))["trial"]["point"] for number in range(count)]

    ledger = tune.Ledger(Store(tmp_path / "run"), settings, 1)
    first = drawn(ledger, 4)
    assert first[0] == {STD: 1.0, COV: 3.0}
    ledger.entries = [{"number": number, "point": point} for number, point in enumerate(first)]
    resumed = drawn(ledger, 6)
    assert resumed[:4] == first and all(point not in first for point in resumed[4:])


def test_the_runs_of_living_trials_are_told_by_their_leases(tmp_path):
    from jobs import tune
    from service.engine.lease import Lease

    run = Store(tmp_path)
    with Lease(run), Lease(run.sub("mine/demo-1")), Lease(run.sub("mine/demo-2")):
        found = tune.living_trials(run.sub("mine"))
    assert {trial.uri: epoch for trial, epoch in found.items()} == {
        run.sub("mine/demo-1").uri: 1,
        run.sub("mine/demo-2").uri: 1,
    }
    assert not tune.living_trials(run.sub("mine"))


def test_a_population_that_goes_on_acts_on_newest_probes_alone(tmp_path, few_digits):
    from jobs import trial

    settings, base = sweep.load(written(tmp_path), [f"data.uri={few_digits}", "scheduler.kind=pbt"])
    encoded = sweep.encoded(settings, {STD: 2.0, COV: 3.0})

    def rows(found):
        lines = (json.dumps({"step": step, "time": 0, "metrics": row}) for step, row in found.items())
        return "\n".join(lines).encode()

    def member(**ended):
        given = trial.Given(settings.plain(), base.plain(), str(tmp_path / "runs"), {}, True, ended)

        class Given(trial.Trial):
            def setup(self, config):
                super().setup(config, given)

        return Given(config={"trial": {"point": encoded}})

    made = member()
    total, probe = made._made.steps, {"images_per_s": 1.0}
    steps = [total // 4, total // 2, total]
    made._store.put("metrics/000001.jsonl", rows({step: {**probe, sweep.SCORE: step} for step in steps[:2]}))
    assert member().step()["step"] == steps[1]
    assert member(**{made._run: "collapsed"}).step()["state"] == "collapsed"
    made._store.put("metrics/000002.jsonl", rows({total: {**probe, sweep.SCORE: 1.0}}))
    made._store.put("result.json", b"{}")
    last = member().step()
    assert last["done"] and last["state"] == "finished" and last["step"] == total
