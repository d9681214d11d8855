import re

import pytest

from jobs import terminal


@pytest.mark.parametrize(
    ("last", "line"),
    [
        ((60, 100, 9_000_000), r"sharding: 60 of 100 images, [\d,]+ images/s, [\d.]+ MB/s, ETA \d+:\d\d:\d\d"),
        ((60, 100), r"sharding: 60 of 100 images, [\d,]+ images/s, ETA \d+:\d\d:\d\d"),
    ],
)
def test_progress_beside_a_terminal_is_lines(capsys, monkeypatch, last, line):
    monkeypatch.setattr(terminal, "_LINE_SECONDS", 0)
    with terminal.progress("sharding", "images") as advance:
        advance(50, 100)
        advance(*last)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "sharding: 50 of 100 images" and re.fullmatch(line, second)


def test_progress_is_silent_for_short_work(capsys):
    with terminal.progress("sharding", "images") as advance:
        advance(1, 1)
    assert capsys.readouterr().err == ""
