"""Alarms from metrics: when they begin, when they end, what they advise, what a restart repeats."""

import fnmatch
import math

import pytest

from datasets_prep.errors import UserError
from jobs import recipes
from service.engine.alarms import CURES, Alarms, cure, judge
from tests.configs import tiny


def config(**changes):
    return tiny(**{f"monitor__{name}": value for name, value in changes.items()})


def series(**metrics):
    """Metrics at steps 10, 20, …; `__` stands for the slash."""
    return {name.replace("__", "/"): [(10 * i, v) for i, v in enumerate(vs, 1)] for name, vs in metrics.items()}


def judged(found, **changes):
    return set(judge(found, config(**changes), warmup=0))


def test_a_lasting_loss_of_variance_is_a_collapse():
    found = series(monitor__encoder__variance=[0.5] * 4, monitor__projector__variance=[0.5, 0.009, 0.002, 0.001])
    [(name, seen)] = judge(found, config(), warmup=0).items()
    assert (name, seen) == ("collapse", "projector has variance 0.001, below 0.01")
    assert judged(found, patience=4) == set()
    assert judged(found, min_variance=0.001) == set()
    assert judged(found, alarms="false") == set()
    assert judge(found, config(), warmup=40) == {}
    found["monitor/projector/variance"].append((50, 0.02))
    assert judged(found) == set()


def test_lasting_correlation_is_an_alarm():
    found = series(monitor__level1__correlation=[0.2, 0.6, 0.7, 0.8])
    assert judge(found, config(), warmup=0) == {"correlated": "level1 has correlation 0.8, above 0.5"}
    assert judged(found, max_correlation=0.65) == set()


def test_what_is_no_number_is_told_even_in_the_warm_up():
    found = series(monitor__grad_norm=[1.0, math.inf, math.inf, math.nan])
    assert set(judge(found, config(), warmup=1000)) == {"not_finite"}
    assert judged(found, patience=4) == set()
    assert judged(series(monitor__encoder__variance=[math.nan] * 3)) == {"not_finite"}


def test_losses_that_cannot_be_told_from_the_first_are_no_learning():
    flat = [2.0 + 0.1 * (-1) ** i for i in range(20)]
    assert judged(series(loss=flat)) == {"no_learning"}
    assert judged(series(loss=flat[:10])) == set()
    assert judged(series(loss=[2.5, *flat])) == set()
    assert judged(series(loss=[2.0 * 0.95**i for i in range(20)])) == set()
    assert judged(series(loss=[math.nan, *flat])) == set()
    assert judged(series(loss=[*flat, math.nan])) == {"no_learning"} and judged(series(loss=[math.nan] * 20)) == set()


def test_a_probe_that_falls_with_the_loss_is_over_fitting():
    found = series(loss=[10 - i for i in range(10)])
    found["val_linear"] = [(20, 60.0), (40, 70.0), (60, 66.0), (80, 65.0)]
    found["val_linear_se"] = [(step, 1.0) for step, _ in found["val_linear"]]
    assert judge(found, config(), warmup=0) == {
        "over_fitting": "validation probe 65.00 % after 70.00 % at step 40, with a lower loss"
    }
    worse = [(step, 10.0 - value) for step, value in found["loss"]]
    assert judged({**found, "loss": worse}) == set()
    assert judged({**found, "val_linear_se": [(step, 3.0) for step, _ in found["val_linear"]]}) == set()
    assert (
        judged({**found, "val_linear": found["val_linear"][:3], "val_linear_se": found["val_linear_se"][:3]}) == set()
    )


@pytest.mark.parametrize("name", recipes.names())
def test_every_alarm_of_every_recipe_has_a_cure_among_its_settings(name):
    for alarm in CURES:
        assert cure(alarm, recipes.load(name)).count(" (now ") >= 1


LOSSES = ("{kind: nt_xent}", "{kind: vicreg_sigreg, cov_norm: paper}")


def test_every_cure_is_a_setting_of_some_run():
    configs = [recipes.load(name, changes) for name in recipes.names() for changes in ([], ["optim.clip_norm=1"])]
    configs += [recipes.load("rapid", [f"family.loss={loss}"]) for loss in LOSSES]
    for alarm, advice in CURES.items():
        said = " or ".join(cure(alarm, each) for each in configs)
        assert all(fnmatch.filter(said.split(" or "), f"{verb} {setting} (now *)") for verb, setting in advice)
    assert cure("collapse", recipes.load("rapid")).startswith("raise family.loss.std (now 25.0) or ")


def test_what_is_none_is_set_and_what_is_set_is_changed():
    advice = cure("not_finite", config())
    assert "set optim.clip_norm (now null)" in advice and "lower optim.clip_norm" not in advice
    advice = cure("not_finite", tiny(optim__clip_norm=2))
    assert "lower optim.clip_norm (now 2.0)" in advice and "set optim.clip_norm" not in advice


def measured(variance):
    return {"monitor/encoder/variance": variance, "monitor/encoder/rankme": 3.0}


VARIANCES = [1.0, 0.001, 0.001, 0.001, 0.001, 1.0, 1.0]


def told(alarms, steps):
    """Messages and rows of a life that measures at steps 10, 20, …"""
    messages, rows = [], {}
    for step in steps:
        row = measured(VARIANCES[step // 10 - 1])
        changed = alarms.take(step, row)
        messages += alarms.messages(step, changed)
        rows[step] = row | changed
    return messages, rows


def test_an_alarm_is_told_when_it_begins_and_when_it_ends():
    messages, rows = told(Alarms(config(), 0, {}, 0), range(10, 80, 10))
    assert messages == [
        "alarm collapse at step 40: encoder has variance 0.001, below 0.01: "
        "raise family.loss.std (now 1.0) or lower optim.lr (now 0.01)",
        "alarm collapse ended at step 60",
    ]
    assert {step: row["alarm/collapse"] for step, row in rows.items() if "alarm/collapse" in row} == {40: 1, 60: 0}


@pytest.mark.parametrize("died", range(10, 80, 10))
@pytest.mark.parametrize("start", range(0, 80, 10))
def test_lives_of_a_run_together_tell_each_alarm_once(start, died):
    if start > died:
        return
    whole, rows = told(Alarms(config(), 0, {}, 0), range(10, 80, 10))
    first, history = told(Alarms(config(), 0, {}, 0), range(10, died + 10, 10))
    resumed = Alarms(config(), 0, history, start)
    assert resumed.active.keys() == ({"collapse"} if start in (40, 50) else set())
    second, again = told(resumed, range(start + 10, 80, 10))
    assert first + second == whole
    assert history | again == rows


def test_a_first_loss_that_is_not_known_raises_nothing():
    alarms = Alarms(config(), 0, {}, 500)
    assert all(not alarms.take(step, {"loss": 1.0}) for step in range(510, 710, 10))


def test_the_last_sound_step():
    alarms = Alarms(config(), 0, {}, 0)
    assert alarms.sound_until("collapse") == 0
    told(alarms, (10, 20, 30))
    assert alarms.sound_until("collapse") == 10


NOISE = [2.0 + 0.1 * math.sin(12.9898 * i * i) for i in range(300)]


def spiked(losses, config=None, **changes):
    config = config or tiny(**{f"guard__{name}": value for name, value in changes.items()})
    return judge(series(loss=losses), config, warmup=0).get("spike")


def test_a_leap_of_the_loss_is_a_spike():
    assert spiked([*[1.0, 3.0] * 25, 40.0]) == "loss 40 after 2 ± 1.5"
    assert spiked([*NOISE[:20], 4.0]) and not spiked([*NOISE[:19], 4.0])
    assert not spiked([*NOISE, 4.0], spike="none") and spiked([*NOISE, 4.0], spike="stop")
    assert spiked([*NOISE, 2.5], spike_deviations=3) and not spiked([*NOISE, 2.5])
    assert spiked([*NOISE, *[4.0] * 20]) and not spiked([*NOISE, *[4.0] * 60])  # a new level becomes the usual one


def test_noise_falling_losses_and_holes_are_no_spike():
    plain = config()
    assert not any(spiked(NOISE[:n], plain) for n in range(1, 301, 3))
    falling = [10 * 0.98**i + noise for i, noise in enumerate(NOISE)]
    assert not any(spiked(falling[:n], plain) for n in range(1, 301, 3))
    assert not spiked([*NOISE, -4.0]) and not spiked([*NOISE, math.nan])
    assert spiked([*NOISE, math.nan, 4.0])
    assert not spiked([*[1.0] * 50, 1.005]) and spiked([*[1.0] * 50, 1.01])


def test_a_spike_needs_the_alarms_to_end_a_run():
    with pytest.raises(UserError, match="guard.spike=stop acts on an alarm, and monitor.alarms=False raises none"):
        tiny(guard__spike="stop", monitor__alarms="false")
    alarms = Alarms(tiny(), 0, {}, 0)
    for step, loss in enumerate([*NOISE, 4.0], 1):
        alarms.take(step, {"loss": loss})
    assert "spike" in alarms.active and alarms.sound_until("spike") == 300
    assert "lower optim.lr" in alarms.message("spike", 301)
