"""One function over many arguments, in several processes that end with this one."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

_Result = TypeVar("_Result")

# Calls that are taken ahead, for each process: none waits while results are read.
_AHEAD = 3


def cores() -> int:
    """Cores that this process may use."""
    with contextlib.suppress(AttributeError):  # macOS has no such call
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def in_order(
    function: Callable[..., _Result], calls: Iterable[tuple[Any, ...]], processes: int
) -> Generator[_Result, None, None]:
    """`function(*call)` of each call, in their order; with one process it is this one.

    Others get the function once, when they begin; what it holds must be small to send, for one that
    ends while it begins would leave this one writing to it for ever, if there is more than a pipe
    holds (64 KB). They are new processes, as a copy of one that has threads (torch, tokenizers) may
    hang, and import only what the function needs. Raises what the function raises, RuntimeError
    where a process is killed.
    """
    if processes == 1:
        yield from itertools.starmap(function, calls)
        return
    pending: deque[Future[_Result]] = deque()
    executor = ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(function,)
    )
    try:
        for call in calls:
            with _interrupts_wait():  # a process may be made here
                pending.append(executor.submit(_call, *call))
            if len(pending) == _AHEAD * processes:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise RuntimeError(
            f"one of {processes} processes has ended: was it killed, for want of memory?"
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Blocks Ctrl-C, for good in processes that are made within: it is sent to them, too."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# --- in the other processes ----------------------------------------------------------------------

# The executor's way to keep something in a process is a global of it.
_function: Callable[..., Any] | None = None


def _begin(function: Callable[..., Any]) -> None:
    global _function
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # this is the parallelism
    _function = function


def _call(*arguments: Any) -> Any:
    assert _function is not None
    return _function(*arguments)


def _end_with_parent() -> None:
    """Without it the processes of one that is killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
