"""One function over many arguments, in several processes that end with this one."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import warnings
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

    Others get the function once, pickled, with all that it holds. They are new ones, as a copy of
    a process that has threads (torch, tokenizers) may hang, and import only what the function
    needs. Raises what the function raises, RuntimeError where a process is killed.
    """
    if processes == 1:
        yield from itertools.starmap(function, calls)
        return
    pending: deque[Future[_Result]] = deque()
    # Not among the arguments of a process: one that ends while it starts would leave this one
    # writing to it for ever, if there is more than a pipe holds.
    with tempfile.NamedTemporaryFile(prefix="minigen-") as file:
        pickle.dump(function, file)
        file.flush()
        executor = ProcessPoolExecutor(
            processes,
            multiprocessing.get_context("spawn"),
            initializer=_begin,
            initargs=(file.name,),
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


def _begin(file: str) -> None:
    global _function
    threading.Thread(target=_end_with_parent, args=(file,), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # this is the parallelism
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the first process has said it
        with open(file, "rb") as stream:
            _function = pickle.load(stream)


def _call(*arguments: Any) -> Any:
    assert _function is not None
    return _function(*arguments)


def _end_with_parent(file: str) -> None:
    """Without it the processes of one that is killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    with contextlib.suppress(OSError):
        os.unlink(file)
    os._exit(1)
