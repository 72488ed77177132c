"""A bar's time goes on while one thing takes long, on a terminal, and only there."""

import io
import time

import pytest
from tqdm import tqdm

from minigen import LLM, report, ticking
from minigen.runner import Runner
from minigen.shapes import SHAPES


class Stream(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


on_both = pytest.mark.parametrize("terminal", [True, False])


def stderr(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> Stream:
    """Standard error from here on; pytest puts its own there before each test."""
    made = Stream(terminal)
    monkeypatch.setattr("sys.stderr", made)
    monkeypatch.setattr(ticking, "INTERVAL", 0.02)
    return made


def wait_for(stream: Stream, text: str, count: int) -> None:
    """Until the text was written so often, or half a second where it shall not be."""
    deadline = time.monotonic() + (10 if stream.terminal else 0.5)
    while stream.getvalue().count(text) < count and time.monotonic() < deadline:
        time.sleep(0.01)


@on_both
def test_the_time_goes_on(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = stderr(monkeypatch, terminal)
    with tqdm(total=1, desc="x", bar_format="{desc}: {elapsed_s:.3f} s") as shown:
        with ticking.ticking(shown):
            wait_for(stream, "x: ", 5)
            shown.update()
        drawn = stream.getvalue()
        time.sleep(0.1)
        assert stream.getvalue() == drawn  # the thread has ended
    times = {part.split()[1] for part in drawn.split("\r") if part.strip()}
    assert len(times) >= 5 if stream.terminal else len(times) <= 2


@on_both
def test_a_hidden_bar_stays_so(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = stderr(monkeypatch, terminal)
    with tqdm(total=1, desc="x", disable=True) as shown, ticking.ticking(shown):
        time.sleep(0.1)
    assert stream.getvalue() == ""


@on_both
def test_a_bar_of_a_measurement_appears_late_and_leaves_nothing(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = stderr(monkeypatch, terminal)
    monkeypatch.setattr(report, "DELAY", 0.2)
    with report.bar(2, "Runs", "run"):
        time.sleep(0.05)
        assert stream.getvalue() == ""
        wait_for(stream, "Runs", 3)
    drawn = stream.getvalue()
    assert drawn.count("Runs") >= 3 if stream.terminal else drawn == ""
    assert drawn.split("\r")[-1].strip() == ""


@on_both
def test_without_ticks_no_thread_draws(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = stderr(monkeypatch, terminal)
    monkeypatch.setattr(report, "DELAY", 0.0)
    with report.bar(2, "Runs", "run", ticks=False):
        time.sleep(0.2)
    assert stream.getvalue().count("Runs") == stream.terminal


@on_both
def test_compiling_shows_its_time(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = stderr(monkeypatch, terminal)
    monkeypatch.setattr(
        Runner, "start_compiling", lambda *_: wait_for(stream, "Compiling: 00:00", 4)
    )
    LLM.from_config(SHAPES["tiny"], device="cpu", num_cache_blocks=8, max_model_len=64)
    count = stream.getvalue().count("Compiling: 00:00")
    assert count >= 4 if stream.terminal else 1 <= count <= 3
