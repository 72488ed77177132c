"""What a start leaves out, and what it does beside other things."""

import contextlib
import ctypes
import gc
import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from minigen import __main__, start
from tests.command_line import ROOT


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_model_is_loaded_without_the_compiler() -> None:
    """It takes longer to import than torch; weights of the meta device would import it."""
    code = (
        "import sys; from minigen import LLM; LLM(compile='eager', device='cpu', progress=False); "
        "LLM.from_config({'model_type': 'qwen3', 'vocab_size': 32, 'hidden_size': 32, "
        "'intermediate_size': 32, 'num_hidden_layers': 1, 'num_attention_heads': 2, "
        "'num_key_value_heads': 2}, "
        "compile='eager', device='cpu', progress=False); "
        "print([m for m in ('torch._dynamo', 'torch._inductor.compile_fx', 'sympy', "
        "'transformers') if m in sys.modules])"
    )
    assert python(code) == "[]"


def test_all_kernels_are_kept_in_one_cache(monkeypatch) -> None:
    """Where torch's compiler makes Triton keep its own, in every start from the first on."""
    from torch._inductor.runtime.cache_dir_utils import triton_cache_dir

    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    start.share_triton_cache(torch.device("cpu"))
    assert "TRITON_CACHE_DIR" not in os.environ
    for index, device in ((0, "cuda"), (0, "cuda:0"), (1, "cuda:1")):
        monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
        expected = triton_cache_dir(index)
        start.share_triton_cache(torch.device(device))
        assert os.environ["TRITON_CACHE_DIR"] == expected
    monkeypatch.setenv("TRITON_CACHE_DIR", "elsewhere")
    start.share_triton_cache(torch.device("cuda"))
    assert os.environ["TRITON_CACHE_DIR"] == "elsewhere"


def test_the_compiler_is_imported_beside_the_loading(monkeypatch) -> None:
    names, inside = [], threading.Event()

    def slow(name: str) -> None:
        assert inside.wait(10)
        time.sleep(0.05)
        names.append(name)
        raise ImportError("reported where it is to compile")

    monkeypatch.setattr(start.importlib, "import_module", slow)
    with contextlib.suppress(KeyError), start.compiler_imported(True):
        inside.set()
        raise KeyError
    # Both have ended, although the loading failed: an interpreter must not end in an import.
    assert sorted(names) == ["torch._inductor.compile_fx", "triton.runtime.cache"]
    with start.compiler_imported(False):
        pass
    assert len(names) == 2


def test_what_a_start_made_is_left_out_of_collections() -> None:
    code = """
import gc
from minigen import start
start.pause_collection()
assert not gc.isenabled()
start.resume_collection()
print(gc.isenabled(), gc.get_freeze_count() > 1000)
"""
    assert python(code) == "True True"


def test_an_engine_that_nobody_holds_is_freed_although_a_start_made_it() -> None:
    code = """
import gc, weakref
import torch
from minigen import LLM, start
start.pause_collection()
llm = LLM(compile="eager", device="cpu", progress=False)
start.resume_collection()
cache = weakref.ref(llm.engine.runner.caches[0][0])
del llm
cpu = torch.device("cpu")
start.free_engines(cpu)
print(cache(), gc.get_freeze_count() > 1000)
gc.unfreeze()
start.free_engines(cpu)
print(gc.get_freeze_count())
"""
    assert python(code) == "None True\n0"


def test_a_program_that_collects_goes_on_as_it_was() -> None:
    frozen = gc.get_freeze_count()
    assert gc.isenabled()
    start.resume_collection()
    assert gc.isenabled()
    assert gc.get_freeze_count() == frozen


@pytest.mark.parametrize(
    ("device", "number"),
    [("auto", 0), ("cuda", 0), ("cuda:3", 3), ("cpu", None), ("cuda:x", None), ("tpu", None)],
)
def test_the_context_is_of_the_device_that_is_asked_for(device: str, number, monkeypatch) -> None:
    asked, done = [], threading.Event()

    def retain(number: int) -> None:
        asked.append(number)
        done.set()

    monkeypatch.setattr(start, "_retain_context", retain)
    start.open_gpu(device)
    if number is not None:
        assert done.wait(10)
    assert asked == ([] if number is None else [number])


class Driver:
    """Counts calls; `fails` is the one that gives an error."""

    def __init__(self, fails: str) -> None:
        self.fails, self.called = fails, []

    def __getattr__(self, name: str):
        def call(*arguments: object) -> int:
            self.called.append(name)
            return 100 * (name == self.fails)

        return call


@pytest.mark.parametrize("fails", ["cuInit", "cuDeviceGet", ""])
def test_a_driver_that_finds_no_gpu_is_left_alone(fails: str, monkeypatch) -> None:
    driver = Driver(fails)
    monkeypatch.setattr(start.ctypes, "CDLL", lambda name: driver)
    start._retain_context(0)
    calls = ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"]
    assert driver.called == calls[: calls.index(fails) + 1 if fails else 3]


def test_a_device_that_no_c_integer_holds_is_left_to_torch(monkeypatch) -> None:
    driver = Driver("cuInit")
    monkeypatch.setattr(driver, "cuInit", lambda flags: 0, raising=False)
    # A real C function: it is ctypes that refuses the number.
    monkeypatch.setattr(driver, "cuDeviceGet", ctypes.CDLL(None).memchr, raising=False)
    monkeypatch.setattr(start.ctypes, "CDLL", lambda name: driver)
    start._retain_context(10**30)
    assert driver.called == []


def test_a_process_does_not_wait_for_a_gpu_that_is_opened(monkeypatch) -> None:
    """A command that is refused ends sooner than the driver has begun."""
    ended, release = [], threading.Event()
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(start, "_retain_context", lambda number: release.wait(10))
    start.open_gpu("cuda")
    with pytest.raises(SystemExit):
        __main__._leave(2)
    assert ended == [2]
    release.set()
    for thread in threading.enumerate():
        if thread.name == start.THREAD:
            thread.join()
    with pytest.raises(SystemExit):
        __main__._leave(2)
    assert ended == [2]


def test_a_machine_without_a_driver_is_no_error(monkeypatch) -> None:
    def none(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(start.ctypes, "CDLL", none)
    start._retain_context(0)
