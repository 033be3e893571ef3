"""Progress: occasional lines in a log, a live line with an ETA in a terminal."""

from __future__ import annotations

import io

import pytest

from quantguard.core import progress
from quantguard.core.progress import Progress, duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Replacement of the time module."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.mark.parametrize(("seconds", "text"), [
    (0, "0 s"), (0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (60, "1 min 00 s"),
    (185, "3 min 05 s"), (3599.4, "59 min 59 s"), (3599.6, "1 h 00 min"), (3600, "1 h 00 min"),
    (7800, "2 h 10 min"), (90_000, "25 h 00 min")])
def test_durations_as_text(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_without_a_terminal_there_are_few_complete_lines(clock: Clock) -> None:
    stream = io.StringIO()
    bar = Progress("train", 100, stream=stream)
    for step in range(100):
        clock.now += 1
        bar.advance(1, f"step {step}")
    bar.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 7 and "\r" not in stream.getvalue()
    assert lines[0] == "train:  15%, 1 min 25 s left  step 14"
    assert lines[-1] == "train: 1 min 40 s  step 99"


def test_in_a_terminal_one_live_line_is_rewritten_with_an_eta(clock: Clock) -> None:
    stream = Terminal()
    bar = Progress("train", 10, stream=stream)
    bar.advance(1, "a long note")
    assert stream.getvalue() == ""
    clock.now += 3
    bar.advance(1)
    long = "train:  20%, 12 s left  a long note"
    assert stream.getvalue() == "\r" + long
    clock.now += 2
    bar.advance(3, "")
    assert stream.getvalue().endswith("\r" + "train:  50%, 5 s left".ljust(len(long)))
    bar.say("something else")
    assert stream.getvalue().endswith("\rsomething else\n")
    clock.now += 1
    bar.advance(5)
    bar.close()
    assert stream.getvalue().endswith("\rtrain: 6 s\n")


def test_skipped_units_do_not_change_the_eta(clock: Clock) -> None:
    stream = Terminal()
    bar = Progress("x", 100, stream=stream)
    bar.skip(50)
    clock.now += 10
    bar.advance(10)
    assert stream.getvalue().endswith("60%, 40 s left")


def test_more_work_than_the_total_is_100_per_cent(clock: Clock) -> None:
    stream = Terminal()
    bar = Progress("x", 2, stream=stream)
    clock.now += 1
    bar.advance(5)
    assert "100%, 0 s left" in stream.getvalue()
    empty = Progress("x", 0, stream=stream)
    empty.advance(0)
    empty.close()


def test_quiet_is_silent(clock: Clock) -> None:
    stream = Terminal()
    bar = Progress("x", 2, show=False, stream=stream)
    clock.now += 60
    bar.advance(1, "note")
    bar.skip(1)
    bar.say("text")
    bar.close()
    assert stream.getvalue() == ""


def test_it_writes_to_standard_error_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    Progress("work", 1).close()
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == "work: 0 s\n"
