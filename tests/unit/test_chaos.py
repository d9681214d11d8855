"""What the chaos suite concludes from what it saw, on made-up runs."""

from tests.distributed.chaos.harness import STEPS, Life, Line, differing, ids_of, pause, summary

LOSSES = {step: 1 / step for step in range(1, STEPS + 1)}


def life(rank, first, last, start, seconds=1.0, ids=(0, 1)):
    lines = [Line(start + seconds * n, step, 2, list(ids)) for n, step in enumerate(range(first, last + 1))]
    return Life(rank, 100 * rank + first, lines)


def seen(**changes):
    return {step: {loss} for step, loss in LOSSES.items()} | {int(k[1:]): v for k, v in changes.items()}


def test_a_loss_that_differs_in_the_last_bit_or_is_missing_is_told():
    assert differing(seen(), LOSSES, exact=True, until=STEPS) == []
    one_bit = LOSSES[7] * (1 + 2**-52)
    assert differing(seen(s7={LOSSES[7], one_bit}), LOSSES, exact=True, until=STEPS) == [
        "1 losses differ, first of step 7"
    ]
    assert differing(seen(s7={one_bit}), LOSSES, exact=False, until=STEPS) == []
    assert differing(seen(s7={LOSSES[7] * (1 + 1e-8)}), LOSSES, exact=False, until=STEPS)
    assert differing(seen(s7={0.0}), LOSSES, exact=True, until=6) == []
    gone = {step: losses for step, losses in seen().items() if step != 9}
    assert differing(gone, LOSSES, exact=True, until=STEPS) == ["1 rows are missing, first of step 9"]
    assert differing(seen(s7={float("nan")}), LOSSES, exact=True, until=STEPS)


def test_the_pause_is_counted_to_the_first_step_that_is_new():
    before, after = life(0, 1, 10, start=0.0), life(0, 6, 20, start=30.0)
    assert pause([before, after], began=9.5) == 26.0  # from 9 s to 35 s, when step 11 ends
    assert pause([before], began=4.5) == 1.0


def test_attempts_are_told_apart_by_the_processes_of_each_rank():
    lives = [life(0, 1, 2, 0.0, ids=(4, 0)), life(1, 1, 1, 0.1, ids=(3, 2)), life(0, 2, 2, 9.0), life(1, 2, 2, 9.1)]
    assert ids_of(lives) == [{1: [0, 2, 3, 4], 2: [0, 4]}, {2: [0, 0, 1, 1]}]


def test_the_table_gives_medians_and_the_worst():
    runs = [{"outcome": "finished, equal", "lost_steps": n, "seconds": 2.0 * n} for n in (1, 2, 9)]
    table = summary([{"fault": "f", "seed": n} | run for n, run in enumerate([*runs, {"outcome": "hangs"}])])
    assert table.splitlines()[-1] == "| f | 4 | 3 | 2 (≤ 9) | 4.0 (≤ 18.0) |"
