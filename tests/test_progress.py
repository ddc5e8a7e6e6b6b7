"""What the console says of progress and of the time left, by a clock that the test turns; no time is measured."""

import io
import sys
from types import SimpleNamespace

import pytest

from plumbing import console
from plumbing.console import Pace, duration, progress_bar
from utils import Process


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but where a test turns it: clock.now += seconds."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def through(items, seconds, clock):
    """Go through items that take so many seconds each."""
    for _ in items:
        clock.now += seconds


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (5369, "89 min"), (5400, "1 h 30 min"), (12_000, "3 h 20 min"),
     (129_569, "35 h 59 min"), (129_600, "1 day 12 h"), (183_600, "2 days 3 h"), (172_740, "2 days 0 h")],
)  # fmt: skip
def test_durations_have_two_units_at_most(seconds, words):
    assert duration(seconds) == words


def test_without_a_terminal_there_is_a_line_a_minute_with_the_time_left(clock, capsys):
    through(progress_bar(range(10), desc="scoring", later=20), 25, clock)
    lines = capsys.readouterr().err.splitlines()
    # every third item is more than a minute after the line before; 25 s for each that is left, with the 20 later ones
    assert lines == [
        "scoring: 3 of 10, about 11 min left",
        "scoring: 6 of 10, about 10 min left",
        "scoring: 9 of 10, about 9 min left",
    ]
    through(progress_bar(iter(range(4)), desc="read"), 61, clock)  # of a number that is not known
    assert capsys.readouterr().err.splitlines()[-1] == "read: 4"
    bar = progress_bar(total=200, desc="draw", initial=100)
    clock.now += 60
    bar.update(10)
    bar.close()
    assert capsys.readouterr().err == "draw: 110 of 200, about 9 min left\n"
    through(progress_bar(range(59), desc="quick"), 1, clock)
    assert capsys.readouterr().err == ""


def test_the_first_of_several_processes_speaks_for_all(clock, capsys, monkeypatch):
    monkeypatch.setattr(console, "this_process", lambda: Process(rank=1, world=2))
    pace = Pace()
    pace.expect(100)
    through(pace.steps(range(100), desc="epoch 1"), 100, clock)
    assert capsys.readouterr().err == ""


def test_a_training_says_after_20_steps_how_long_it_takes_and_then_what_is_left(clock, capsys):
    pace = Pace()
    pace.expect(3 * 1000)
    assert pace.left() == ""
    steps = iter(pace.steps(range(1000), desc="epoch 1"))
    for i in range(1, 1001):
        next(steps)
        said = capsys.readouterr().err
        assert ("takes about" in said) == (i == 21), i  # the next step is asked for when the 20th is done
        if i == 21:
            assert said.splitlines()[0] == (
                "the training takes about 2 days 2 h at the pace of its first 20 steps, 60 s each"
            )
        clock.now += 1000 if i <= 5 else 60  # the first steps choose kernels
    assert next(steps, None) is None
    assert pace.left() == ", about 33 h 20 min left"
    assert capsys.readouterr().err == "epoch 1: 1000 of 1000, about 33 h 20 min left\n"
    clock.now += 995 * 60  # an evaluation, as long as the epoch: that of the next epoch will take as long
    assert pace.left() == ", about 2 days 19 h left"
    with pace.paused():
        clock.now += 10**6
    assert pace.left() == ", about 2 days 19 h left"
    through(pace.steps(range(2000), desc="epochs 2 and 3"), 60, clock)
    assert pace.left() == "" and "takes about" not in capsys.readouterr().err


def test_of_a_training_under_a_minute_nothing_is_said(clock, capsys):
    pace = Pace()
    pace.expect(50)
    through(pace.steps(range(25), desc="epoch 1"), 1, clock)
    assert pace.left() == "" and capsys.readouterr().err == ""
    pace = Pace()  # what does not know how much there is to do
    through(pace.steps(range(25), desc="epoch 1"), 100, clock)
    assert pace.left() == "" and "left" not in capsys.readouterr().err.replace("about 0 s left", "")


def test_a_terminal_shows_a_bar_with_the_time_left_in_all(clock, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    pace = Pace()
    pace.expect(200)
    through(pace.steps(range(100), desc="epoch 1"), 60, clock)
    through(pace.steps(range(100), desc="epoch 2"), 60, clock)
    text = terminal.getvalue()
    assert "epoch 2:   0%" in text and "in all about 1 h 40 min left" in text and "\nepoch" not in text
