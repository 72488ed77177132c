"""Bars whose time goes on while one thing takes long. Nothing here imports torch."""

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

INTERVAL = 1.0  # seconds between two drawings


@contextlib.contextmanager
def ticking(shown: "tqdm[Any]") -> Iterator[None]:
    """Within it a thread draws the bar anew each second; tqdm itself does when a part is done.

    Only on a terminal: in a file every drawing would stay. Begins after the bar's own delay.
    """
    if shown.disable or sys.stderr is None or not sys.stderr.isatty():
        yield
        return
    ended = threading.Event()

    def tick() -> None:
        wait = max(shown.delay, INTERVAL)
        while not ended.wait(wait):
            # Or a bar that was drawn here only would not be removed when it is closed.
            shown.delay = 0.0
            shown.refresh()
            wait = INTERVAL

    thread = threading.Thread(target=tick, daemon=True, name="minigen-bar")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
