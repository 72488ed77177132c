"""What goes on beside the imports and the loading of a start, and what waits until it is over.

Imports, traces and look-ups in the compile cache are Python's, one thread at a time. A GPU's
context, the reading of weights and the hashes of libraries are not.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# A process must not end in an ordinary way while one of this name is in a library's midst.
THREAD = "minigen-start"


def open_gpu(device: str) -> None:
    """Makes the CUDA context of `device` ("auto", "cuda" or "cuda:n") in a thread.

    torch finds the context and takes it over (it is the device's primary one), so that it is made
    while torch is imported. Where there is no such GPU nothing happens, and torch tells the user.
    """
    kind, _, index = device.partition(":")
    if kind in ("auto", "cuda") and (not index or index.isdecimal()):
        number = int(index or 0)
        _start(_retain_context, number)


def _start(target: Callable[..., None], *arguments: object) -> threading.Thread:
    thread = threading.Thread(target=target, args=arguments, daemon=True, name=THREAD)
    thread.start()
    return thread


def _retain_context(number: int) -> None:
    # No driver, or a number that no C integer holds.
    with contextlib.suppress(OSError, AttributeError, ctypes.ArgumentError):
        driver = ctypes.CDLL("libcuda.so.1")  # its calls do not hold Python's lock
        device, context = ctypes.c_int(), ctypes.c_void_p()
        if not driver.cuInit(0) and not driver.cuDeviceGet(ctypes.byref(device), number):
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)


def pause_collection() -> None:
    """Stops garbage collection while a process starts: a sixth of that time.

    What imports and compiling make is kept, 430,000 objects, and the collector goes through them
    again and again. For a program that owns its process, with `resume_collection` afterwards.
    """
    gc.disable()


def resume_collection() -> None:
    """Ends a pause. What there is by now stays out of collections, 0.2 s each while serving."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def free_engines(device: torch.device) -> None:
    """Takes back the memory of engines that nobody holds any more.

    What is compiled holds on to their weights and caches, and what they are made of holds each
    other: garbage, also among what a start has left out of collections.
    """
    import torch

    torch.compiler.reset()
    is_frozen = gc.get_freeze_count() > 0
    gc.unfreeze()
    gc.collect()
    if is_frozen:
        gc.freeze()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextlib.contextmanager
def compiler_imported(wanted: bool) -> Iterator[None]:
    """Imports torch's compiler in a thread, beside what is done within."""
    if not wanted:
        yield
        return
    threads = [_start(_hash_triton), _start(_import_compiler)]
    try:
        yield
    finally:
        # Also where it fails: Python must not end while a thread imports.
        for thread in threads:
            thread.join()


def _import_compiler() -> None:
    # One that cannot be imported fails again, and is reported, where it is to compile.
    with contextlib.suppress(Exception):
        importlib.import_module("torch._inductor.compile_fx")


def share_triton_cache(device: torch.device) -> None:
    """Has Triton keep what it compiles where torch's compiler keeps that of its own kernels.

    torch's compiler moves Triton's cache there itself, for the whole process, as soon as it makes a
    kernel in it: late in a cold start, whose kernels its workers make, but early in a warm one. So
    a second start does not look for attention's kernels where the first has put them. It compiled
    for 10 to 13 s, a third one for 2 (H200). A `TRITON_CACHE_DIR` that is set stays.
    """
    if device.type == "cuda" and "TRITON_CACHE_DIR" not in os.environ:
        # A private module, where torch 2.11 to 2.13 have it.
        with contextlib.suppress(Exception):
            utils = importlib.import_module("torch._inductor.runtime.cache_dir_utils")
            os.environ["TRITON_CACHE_DIR"] = utils.triton_cache_dir(device.index or 0)


def _hash_triton() -> None:
    """Triton's part of each key of the compile caches: a hash of its library, 0.3 s, kept."""
    with contextlib.suppress(Exception):
        importlib.import_module("triton.runtime.cache").triton_key()
