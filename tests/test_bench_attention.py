"""The attention benchmark without a GPU: arithmetic, candidates, checks that fail, its sentence."""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.command_line import ROOT

pytest.importorskip("triton")

from minigen.kernels.gluon_import import KNOWN_GLUON
from minigen.kernels.varlen_attention_gluon import GluonTile
from tools import bench_attention as bench

LIMITS = {"copy_gbs": 4000.0, "matmul_tflops": 800.0}


def row(section: str, lengths: list[int], target: float, unit: str) -> bench.Row:
    return bench.Row(section, bench.Heads(32, 8, 128), "row", lengths, target, unit)


def test_skewed_lengths_are_those_of_the_published_figures() -> None:
    lengths = bench.skewed_lengths()
    assert (len(lengths), sum(lengths), min(lengths), max(lengths)) == (64, 19060, 16, 2423)


def test_arithmetic_of_a_prefill_row() -> None:
    one = row("varlen", [1000, 2000], 300, "TFLOP/s")
    # Two products of 2 * 128 FLOP for each of 32 heads and each visible pair, half of 5e6.
    assert bench.flop_of(one) == 2 * (2 * 128) * 32 * 2.5e6
    summary = bench.summarise(one, {"a": 256.0, "b": 512.0, "FA2": 100.0, "c": "failed"}, LIMITS)
    assert summary["best"] == "a"
    assert summary["figures"] == {"a": 160.0, "b": 80.0, "FA2": 409.6}
    assert summary["reached"] == round(160 / 300, 3)
    assert summary["floor_us"] == 51.2
    assert summary["of_limit"] == 0.2


def test_arithmetic_of_a_decode_row() -> None:
    one = row("decode", [4096] * 2, 3500, "GB/s")
    assert bench.cache_bytes_of(one) == 2 * 4096 * 8 * 128 * 2 * 2
    summary = bench.summarise(one, {"a": 10.0}, LIMITS)
    assert summary["figures"] == {"a": 3355.4}
    assert summary["of_limit"] == 0.84
    by_time = bench.summarise(row("decode", [4096], 20, "us"), {"a": 40.0}, LIMITS)
    assert by_time["figures"] == {"a": 40.0}
    assert by_time["reached"] == 0.5


def test_nothing_ran() -> None:
    summary = bench.summarise(row("varlen", [5], 300, "TFLOP/s"), {"a": "failed"}, LIMITS)
    assert summary["best"] is None
    bench.print_table([summary])


@pytest.mark.parametrize("section", bench.SECTIONS)
def test_candidates_differ_and_fit_their_rows(section: str) -> None:
    assert list(bench.rows_of(section))
    for heads in bench.heads_of(section):
        candidates = bench.CANDIDATES[section](heads)
        assert len({str(candidate) for candidate in candidates}) == len(candidates)
        for candidate in candidates if section != "backward" else []:
            if isinstance(candidate.tile, GluonTile):
                assert section in ("varlen", "prefill")
                continue
            assert candidate.tile.block_d == heads.dim
            assert candidate.tile.block_q in (
                candidate.tile.block_m,
                candidate.tile.block_m * heads.key // heads.query,
            )


def test_an_error_without_a_text_is_reported_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench.sentence_of(AssertionError()) == "AssertionError: no text"
    assert bench.sentence_of(ValueError("wrong\nand more")) == "ValueError: wrong"

    def timers(row: bench.Row, candidates: list[bench.Candidate]) -> bench.Timers:
        def fails() -> float:
            raise AssertionError

        return {"a": fails, "b": lambda: 1.0}

    monkeypatch.setattr(bench, "packed_timers", timers)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    times = bench.time_row(row("varlen", [5], 300, "TFLOP/s"), [])
    assert times == {"a": "AssertionError: no text", "b": 1.0}


def test_what_is_chosen_is_timed_first_and_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """The better time counts: the first of a row may be of a clock that is down."""
    spans = iter([5.0, 4.0, 3.0])

    def timers(row: bench.Row, candidates: list[bench.Candidate]) -> bench.Timers:
        return {name: lambda: next(spans) for name in (bench.CHOSEN, "a")}

    monkeypatch.setattr(bench, "packed_timers", timers)
    assert bench.time_row(row("varlen", [5], 300, "TFLOP/s"), []) == {bench.CHOSEN: 3.0, "a": 4.0}


@pytest.mark.parametrize("wrong", [None, 0, 1, 2])
def test_a_wrong_gradient_is_noticed(wrong: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench.run_backward

    def run(*args: Any) -> tuple[torch.Tensor, ...]:
        return tuple(x * (1.02 if i == wrong else 1) for i, x in enumerate(right(*args)))

    monkeypatch.setattr(bench, "run_backward", run)
    kind, heads = bench.Kind("cpu", torch.float16), bench.Heads(2, 1, 64)
    if wrong is None:
        bench.check_candidate("backward", heads, None, kind)
    else:
        with pytest.raises(ValueError, match=f"d{'qkv'[wrong]} is wrong by"):
            bench.check_candidate("backward", heads, None, kind)


def test_arithmetic_of_a_backward_row() -> None:
    """Five products in place of the forward's two."""
    forward, backward = (row(name, [1000, 2000], 300, "TFLOP/s") for name in ("varlen", "backward"))
    assert bench.flop_of(backward) == 2.5 * bench.flop_of(forward)


def answer(jobs: list[Any], connection: Any) -> None:
    """In place of `_check_in_child`: a job says what becomes of its process."""
    import os
    import time

    for _, _, what in jobs:
        if what == "dies":
            os._exit(7)
        if what == "hangs":
            time.sleep(60)
        connection.send(None if what == "right" else "ValueError: wrong by 1")


def test_a_candidate_that_dies_or_hangs_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_check_in_child", answer)
    heads = bench.Heads(4, 2, 64)
    kinds = ("right", "wrong", "dies", "hangs")
    jobs: dict[str, Any] = {kind: [("varlen", heads, kind)] for kind in kinds}
    jobs["mixed"] = [("decode", heads, kind) for kind in ("right", "dies", "right ")]
    failures = bench.check_all(jobs, processes=4, seconds=3, start="fork")
    assert failures == {
        ("varlen", heads, "wrong"): "ValueError: wrong by 1",
        ("varlen", heads, "dies"): "its process ended with 7",
        ("varlen", heads, "hangs"): "no answer in 3 s",
        ("decode", heads, "dies"): "its process ended with 7",
        ("decode", heads, "right "): "its process ended with 7",
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_it_says_so_in_one_sentence() -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "tools.bench_attention", "--what", "decode"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0
    assert finished.stderr == ""
    assert finished.stdout.strip() == bench.NO_GPU.format(torch.__version__)


def test_list_compiles_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def last(candidates: Callable[[bench.Heads], list[bench.Candidate]]) -> Any:
        return lambda heads: candidates(heads)[-1:]

    monkeypatch.setitem(bench.CANDIDATES, "varlen", last(bench.varlen_candidates))
    bench.list_candidates(["varlen"])
    *_, document = capsys.readouterr().out.splitlines()
    made = json.loads(document)["candidates"]
    assert len(made) == len(bench.VARLEN_TARGETS)
    for one in made:
        assert one["registers"] <= 255
        assert one["stack_bytes"] == 0
        assert one["warp_specialized"]


@pytest.mark.skipif(not KNOWN_GLUON, reason="this Triton's Gluon was never tried")
def test_list_compiles_gluon(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(
        bench.CANDIDATES, "prefill", lambda heads: bench.gluon_candidates(heads)[1:]
    )
    bench.list_candidates(["prefill"])
    *_, document = capsys.readouterr().out.splitlines()
    (made,) = json.loads(document)["candidates"]
    assert made["candidate"] == "gluon 128x64 s4"
    assert made["stack_bytes"] == 0
    assert made["num_warps"] == 12


def test_list_compiles_both_kernels_of_a_backward(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = bench.CANDIDATES["backward"](bench.Heads(32, 8, 128))[1:2]
    monkeypatch.setitem(bench.CANDIDATES, "backward", lambda heads: chosen)
    bench.list_candidates(["backward"])
    *_, document = capsys.readouterr().out.splitlines()
    made = json.loads(document)["candidates"]
    assert len(made) == 2 * len(bench.BACKWARD_TARGETS)
    assert {one["candidate"].rpartition(": ")[2] for one in made} == {"dq", "dk dv"}
    assert not any(one["serialised"] or one["stack_bytes"] for one in made)
