"""Plain lines of progress, against a clock that is passed in."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise

import pytest

from mlx_tune.progress import LONGEST_SILENCE, PlainBar, keep_ticking, progress_bar


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def make_bar(clock: Clock, lines: list[str]) -> Callable[[float | None], PlainBar]:
    return lambda total: PlainBar("work", total, lines.append, clock)


def test_every_trial_has_a_line(make_bar, clock, lines) -> None:
    bar = make_bar(None)
    for size in (1, 2, 4):
        bar.update(text=f"trying {size}")
        bar.update(text=f"trying {size}")
        clock.now += 0.5
    assert lines == ["work: trying 1", "work: trying 2", "work: trying 4 (after 1.00 s)"]


def test_slow_layers_have_a_line_each_and_quick_ones_one_a_second(make_bar, clock, lines) -> None:
    bar = make_bar(4)
    for number in range(4):
        bar.update(text=f"layer {number}")
        clock.now += 3
        bar.advance()
    assert [line.split(" (")[0] for line in lines] == [
        "work: 0 of 4, layer 0", "work: 1 of 4, layer 0", "work: 2 of 4, layer 1", "work: 3 of 4, layer 2",
        "work: 4 of 4, layer 3",
    ]  # fmt: skip
    lines.clear()
    bar = make_bar(1000)
    for _ in range(1000):
        clock.now += 0.01
        bar.advance()
    assert 10 <= len(lines) <= 12
    assert lines[-1].startswith("work: 1000 of 1000")


@pytest.mark.parametrize("total", [None, 7])
def test_silence_is_never_longer_than_ten_seconds(make_bar, clock, lines, total) -> None:
    bar = make_bar(total)
    bar.update(text="a long trial")
    written = [clock.now]
    for _ in range(100):
        clock.now += 1
        before = len(lines)
        bar.tick()
        if len(lines) > before:
            written.append(clock.now)
    assert len(written) == 11
    assert all(b - a <= LONGEST_SILENCE for a, b in pairwise(written))
    assert "a long trial" in lines[-1]
    assert "(after 100 s)" in lines[-1] or "(after 1 min 40 s)" in lines[-1]


def test_work_that_has_said_nothing_yet_is_not_silent_either(make_bar, clock, lines) -> None:
    bar = make_bar(None)
    clock.now += LONGEST_SILENCE
    bar.tick()
    assert lines == ["work: working (after 10.0 s)"]


def test_the_beat_ends_with_the_bar_and_with_its_reader(make_bar, clock, lines) -> None:
    ended = iter([False, False, True])

    def wait(seconds: float) -> bool:
        clock.now += LONGEST_SILENCE
        return next(ended)

    keep_ticking(make_bar(None), wait)
    assert len(lines) == 2

    def gone(text: str) -> None:
        raise BrokenPipeError

    ended = iter([False, True])
    keep_ticking(PlainBar("work", None, gone, clock), wait)
    assert next(ended) is True  # it had not asked again


def test_what_is_said_and_a_new_total_are_written(make_bar, lines) -> None:
    bar = make_bar(None)
    bar.say("weights are bfloat16")
    bar.update(total=3, completed=1)
    assert lines == ["work: weights are bfloat16", "work: 1 of 3"]


def test_a_bar_that_is_not_shown_swallows_everything(capsys) -> None:
    with progress_bar("work", 3, enabled=False) as bar:
        bar.update(completed=1, total=2, text="x")
        bar.advance()
        bar.say("y")
    assert capsys.readouterr() == ("", "")


def test_a_pipe_gets_lines_and_no_control_characters() -> None:
    script = """
from mlx_tune.progress import progress_bar
with progress_bar("work", 2) as bar:
    bar.say("first")
    bar.update(text="layer a")
    bar.advance()
    bar.advance()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == ""
    assert done.stderr.splitlines() == ["work: first", "work: 0 of 2, layer a", "work: 2 of 2, layer a"]


def test_a_terminal_gets_a_bar(monkeypatch, capsys) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    with progress_bar("work", 2) as bar:
        bar.say("[first]")
        bar.update(text="layer a")
        bar.advance()
    err = capsys.readouterr().err
    assert "\x1b[" in err
    assert "[first]" in err
    assert "layer a" in err
