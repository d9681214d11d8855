"""What a run is at, from its events: worked out by hand."""

from types import SimpleNamespace

import pytest

from jobs import listing
from jobs.submit import _Log
from service.data.store import Store


def leg(number, *events):
    return [
        {"leg": number, "event": name, "time": at, "stepped": at, "step": step, "seconds": {"step": spent}}
        for name, at, step, spent in events
    ]


FIRST = leg(1, ("begin", 0.0, 0, 0.0), ("restored", 1.0, 0, 0.0), ("first", 2.0, 1, 1.0), ("progress", 12.0, 21, 9.0))
SECOND = leg(
    2, ("begin", 20.0, 0, 0.0), ("restored", 21.0, 10, 0.0), ("first", 24.0, 11, 1.0), ("progress", 34.0, 15, 6.0)
)


def test_progress_counts_from_the_newest_leg():
    found = listing.progress(FIRST, 100, now=13.0)
    assert (found["step"], found["steps"], found["goodput"]) == (21, 100, 9 / 12)
    assert found["eta_s"] == pytest.approx((100 - 21) * (12 - 2) / (21 - 1))
    again = listing.progress(FIRST + SECOND, 100, now=35.0)
    assert again["step"] == 15 and again["eta_s"] == pytest.approx((100 - 15) * (34 - 24) / (15 - 11))


def test_a_silent_run_has_no_eta_and_keeps_what_is_committed():
    found = listing.progress(FIRST, 100, now=12.0 + listing.SILENT_SECONDS + 1)
    assert (found["step"], found["eta_s"], found["goodput"]) == (0, None, 0.0)


def test_before_the_second_step_nothing_is_foretold():
    assert listing.progress([], None, 0.0) == {"step": None, "steps": None, "eta_s": None, "goodput": None}
    assert listing.progress(FIRST[:3], 100, now=2.5)["eta_s"] is None
    assert listing.progress(FIRST, None, now=13.0)["eta_s"] is None


def job(run, number, start, state="RUNNING", **told):
    return SimpleNamespace(
        metadata={"run": run, **told}, submission_id=f"{run}-{number:02d}", status=SimpleNamespace(value=state),
        start_time=start, end_time=None, driver_exit_code=None,
    )  # fmt: skip


def test_a_run_is_one_row_with_its_newest_job(tmp_path):
    jobs = [
        job("a", 1, 1000, "STOPPED", steps="9"),
        job("b", 1, 2000, "FAILED"),
        job("a", 2, 3000, recipe="demo", steps="9"),
    ]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "result.json").write_text('{"steps": 5, "goodput": {"goodput": 0.875}}')
    rows = listing.rows(jobs, Store(tmp_path))
    assert [(row["run"], row["job"], row["jobs"], row["state"]) for row in rows] == [
        ("b", "b-01", 1, "FAILED"),
        ("a", "a-02", 2, "RUNNING"),
    ]
    assert (rows[0]["step"], rows[0]["goodput"], rows[1]["step"], rows[1]["steps"]) == (5, 0.875, None, 9)
    lines = listing.render(rows).splitlines()
    assert "5 of 5" in lines[3] and "87.5 %" in lines[3] and "demo" in lines[4] and "– of 9" in lines[4]


def test_a_sweep_that_has_ended_is_listed_without_steps(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "result.json").write_text('{"sweep": "s", "best": {}}')
    [row] = listing.rows([job("s", 1, 1000, "SUCCEEDED", steps="9")], Store(tmp_path))
    assert (row["step"], row["steps"], row["goodput"]) == (None, 9, None) and "SUCCEEDED" in listing.render([row])


@pytest.mark.parametrize("cut", range(0, 18))
def test_a_log_that_breaks_off_is_shown_once(cut):
    text, shown = "one\ntwo\n\nfour\nend", []
    log = _Log(shown.append)
    log.begin()
    log.take(text[:cut])
    log.begin()
    for first in range(0, len(text), 3):
        log.take(text[first : first + 3])
    log.begin()
    log.take(text)
    log.end()
    assert shown == ["one", "two", "", "four", "end"]
