"""What does not fit or compile: telling it from other errors, and going on afterwards."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from minigen.llm import free_host_memory
from minigen.measure import current_memory, peak_memory, reset_peak_memory, synchronize

OUT_OF_MEMORY = "out of memory"
# How torch's allocators and the libraries that allocate for themselves say it.
_PHRASES = (OUT_OF_MEMORY, "not enough memory", "can't allocate memory", "alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was missing, on the device or the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(phrase in text for phrase in _PHRASES)


def reason_to_leave_out(error: BaseException) -> str | None:
    """Why something cannot be measured here, in few words; None for an error of another kind."""
    from torch._dynamo.exc import TorchDynamoException  # the compiler takes a second to import

    if is_out_of_memory(error):
        return OUT_OF_MEMORY
    if isinstance(error, TorchDynamoException):  # and Inductor's
        return f"does not compile ({type(error).__name__})"
    return None


def release(device: torch.device) -> None:
    """Gives back what nobody holds any more, so that the next to run has all of it."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def extra_memory(function: Callable[[], Any], device: torch.device) -> int:
    """The most bytes that a call takes beyond what is there before it."""
    reset_peak_memory(device)
    before = current_memory(device)
    kept = function()
    synchronize(device)
    del kept
    return max(0, peak_memory(device) - before)


def too_large_for_host(num_bytes: float, device: torch.device) -> bool:
    """Whether a CPU has less memory free than that; a GPU refuses by itself.

    Linux hands out more than there is and then ends the process, which no program can catch.
    """
    free = free_host_memory() if device.type == "cpu" else None
    return free is not None and num_bytes > free
