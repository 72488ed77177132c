"""The fused operations of a decode step on the CPU, and their Triton kernels interpreted.

Shapes: T packed tokens, X heads of the projection, D head dim.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from minigen.kernels import (
    few_rows_linear,
    kv_cache_write,
    linear,
    native,
    rope_cache_write,
    sum_norm,
    tile_linear,
)
from minigen.model import RMSNorm, apply_rope
from tests.attention_cases import assert_within
from tests.fused_cases import (
    LinearCase,
    RopeCase,
    SumNormCase,
    linear_cases,
    linear_reference,
    make_linear_problem,
    make_rope_problem,
    make_sum_norm_problem,
    rope_cases,
    rope_reference,
    sum_norm_cases,
    sum_norm_reference,
)

CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROPE_CASE = RopeCase(5, 6, 3, 40, 24, True, True, torch.float32, 0, 0)
LINEAR_CASE = LinearCase(3, 200, 9, True, True, True, 0.0, "silu", torch.float32, 0, 0)


@given(rope_cases(CPU_DTYPES, 9))
def test_rope_cache_write_equals_definition(case: RopeCase) -> None:
    problem = make_rope_problem(case)
    expected = rope_reference(case, problem)
    q_THD = rope_cache_write(*problem)
    assert q_THD.dtype == case.dtype
    assert_within(q_THD, expected.q_THD, expected.q_error_THD)
    k_cache, v_cache = problem.k_cache_NBKD, problem.v_cache_NBKD
    assert torch.equal(k_cache.isnan(), expected.k_cache_NBKD.isnan())
    assert_within(k_cache.nan_to_num(), expected.k_cache_NBKD.nan_to_num(), expected.k_error_NBKD)
    assert torch.equal(v_cache.isnan(), expected.v_cache_NBKD.isnan())
    assert_within(v_cache.nan_to_num(), expected.v_cache_NBKD.nan_to_num(), expected.v_error_NBKD)


@given(rope_cases((torch.float64, *CPU_DTYPES), 9))
def test_rope_cache_write_equals_the_models_own_operations(case: RopeCase) -> None:
    """To the last bit: on the CPU it is the same composition."""
    problem = make_rope_problem(replace(case, parts=0))
    heads = case.num_q_heads, case.num_kv_heads, case.num_kv_heads
    q_THD, k_TKD, v_TKD = problem.qkv_TXD.split(heads, 1)

    def prepared(x_THD: Tensor, weight_D: Tensor | None) -> Tensor:
        if weight_D is not None:
            norm = RMSNorm(case.head_dim, problem.eps, 0.0)
            norm.weight = torch.nn.Parameter(weight_D, requires_grad=False)
            x_THD = norm(x_THD)
        tables = problem.cos_PR, problem.sin_PR
        if problem.positions_T is not None:
            tables = tuple(table[problem.positions_T] for table in tables)
        return apply_rope(x_THD, *tables) if case.rotates else x_THD

    caches = [torch.full_like(problem.k_cache_NBKD, torch.nan) for _ in "kv"]
    k_cache, v_cache = caches
    kv_cache_write(prepared(k_TKD, problem.k_weight_D), v_TKD, k_cache, v_cache, problem.slots_T)
    assert torch.equal(rope_cache_write(*problem), prepared(q_THD, problem.q_weight_D))
    for cache, expected in zip((problem.k_cache_NBKD, problem.v_cache_NBKD), caches, strict=True):
        torch.testing.assert_close(cache, expected, rtol=0, atol=0, equal_nan=True)


@example(replace(ROPE_CASE, dtype=torch.bfloat16))
@given(rope_cases(CPU_DTYPES, 9))
def test_one_part_is_rounded_as_the_projection_is(case: RopeCase) -> None:
    problem = make_rope_problem(replace(case, parts=0))
    caches = problem.k_cache_NBKD.clone(), problem.v_cache_NBKD.clone()
    in_parts = problem._replace(
        qkv_TXD=problem.qkv_TXD.float()[None].contiguous(),
        k_cache_NBKD=caches[0],
        v_cache_NBKD=caches[1],
    )
    assert torch.equal(rope_cache_write(*in_parts), rope_cache_write(*problem))
    expected = problem.k_cache_NBKD, problem.v_cache_NBKD
    torch.testing.assert_close(caches, expected, rtol=0, atol=0, equal_nan=True)


def test_parts_are_not_for_the_native_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "serves", lambda *tensors: True)
    case = replace(ROPE_CASE, has_norm=False, has_positions=False, parts=2)
    problem = make_rope_problem(case)
    q_THD = rope_cache_write(*problem)
    assert_within(q_THD, *rope_reference(case, problem)[:2])


def test_rope_cache_write_passes_opcheck() -> None:
    problem = make_rope_problem(replace(ROPE_CASE, dtype=torch.bfloat16))
    problem.k_cache_NBKD.zero_()
    problem.v_cache_NBKD.zero_()
    for rotates in (True, False):
        for weights in (problem[1:3], (None, None)):
            for qkv in (problem.qkv_TXD, torch.ones(3, *problem.qkv_TXD.shape)):
                arguments = (qkv, *weights, *problem[3:10], rotates, False)
                torch.library.opcheck(torch.ops.minigen.rope_cache_write.default, arguments)


def test_rope_cache_write_compiles_for_any_number_of_tokens() -> None:
    problem = make_rope_problem(ROPE_CASE)
    positions_T = problem.positions_T
    assert positions_T is not None
    compiled = torch.compile(rope_cache_write, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (5, 3):
        part = problem._replace(
            qkv_TXD=problem.qkv_TXD[:tokens],
            positions_T=positions_T[:tokens],
            slots_T=problem.slots_T[:tokens],
        )
        assert torch.equal(compiled(*part), rope_cache_write(*part))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv_TXD": torch.ones(5, 480)}, "qkv must have 3 dimensions"),
        ({"qkv_TXD": torch.ones(2, 5, 12, 40).half()}, "qkv in parts must be torch.float32"),
        ({"qkv_TXD": torch.ones(0, 5, 12, 40)}, "qkv in parts .* at least one"),
        ({"qkv_TXD": torch.ones(2, 5, 12, 80)[..., ::2]}, "qkv in parts must be contiguous"),
        (
            {"qkv_TXD": torch.ones(2, 5, 12, 40), "k_cache_NBKD": torch.ones(3, 4, 3, 40).int()},
            "k_cache must be torch.float16 or",
        ),
        (
            {"qkv_TXD": torch.ones(2, 5, 12, 40), "v_cache_NBKD": torch.ones(3, 4, 3, 40).half()},
            "v_cache must be torch.float32",
        ),
        ({"qkv_TXD": torch.ones(5, 6, 40)}, "3 heads of keys and of values.* 6 heads in all"),
        ({"qkv_TXD": torch.ones(5, 12, 48)}, "one head dim from 1 to 256, got 48 and 40"),
        ({"qkv_TXD": torch.ones(5, 12, 40).half()}, "k_cache must be torch.float16"),
        ({"q_weight_D": None}, "q_weight and k_weight must be given both or neither"),
        ({"q_weight_D": torch.ones(20)}, "q_weight must be contiguous with one entry for each"),
        ({"cos_PR": torch.ones(20, 12).double()}, "cos must be torch.float32"),
        ({"sin_PR": torch.ones(20, 13)}, "cos and sin must have one shape"),
        ({"cos_PR": torch.ones(20, 21), "sin_PR": torch.ones(20, 21)}, "at most 20 columns"),
        ({"cos_PR": torch.ones(12, 20).T}, "cos must be contiguous"),
        ({"positions_T": torch.zeros(4, dtype=torch.int64)}, "positions must have one entry"),
        ({"positions_T": torch.full((5,), 20)}, "positions must be from 0 to 19"),
        ({"positions_T": None}, "without positions cos and sin must have one row for each of 5"),
        ({"slots_T": torch.zeros(5, dtype=torch.int32)}, "slots must be torch.int64"),
        ({"slots_T": torch.full((5,), 12)}, "slots must be from 0 to 11"),
    ],
)
def test_rope_cache_write_refuses(change: dict[str, Any], message: str) -> None:
    problem = make_rope_problem(ROPE_CASE)
    if "sin_PR" in change:
        problem = problem._replace(cos_PR=torch.ones(20, 12))
    with pytest.raises(ValueError, match=message):
        rope_cache_write(*problem._replace(**change))


@given(linear_cases(CPU_DTYPES, 300))
def test_few_rows_linear_equals_the_models_own_operations(case: LinearCase) -> None:
    """To the last bit: on the CPU it is the same composition."""
    problem = make_linear_problem(case)
    x_TE = problem.x_TE
    if problem.norm_weight_E is not None:
        norm = RMSNorm(case.num_inputs, problem.eps, case.norm_offset)
        norm.weight = torch.nn.Parameter(problem.norm_weight_E, requires_grad=False)
        x_TE = norm(x_TE)
    expected_TF = linear(x_TE, problem.weight_GE, problem.bias_G)
    if case.activation:
        gate, up = expected_TF.chunk(2, -1)
        silu = case.activation == "silu"
        expected_TF = (F.silu(gate) if silu else F.gelu(gate, approximate="tanh")) * up
    if problem.residual_TF is not None:
        expected_TF = problem.residual_TF + expected_TF
    assert torch.equal(few_rows_linear(*problem), expected_TF)


@given(linear_cases((torch.float32,), 300))
def test_few_rows_linear_equals_definition(case: LinearCase) -> None:
    problem = make_linear_problem(case)
    expected_TF, error_TF = linear_reference(case, problem)
    assert_within(few_rows_linear(*problem), expected_TF, 2 * error_TF)


def test_few_rows_linear_passes_opcheck_and_compiles() -> None:
    problem = make_linear_problem(LINEAR_CASE)
    for change in ({}, {"bias_G": None, "residual_TF": None, "norm_weight_E": None}):
        arguments = problem._replace(**change)
        torch.library.opcheck(torch.ops.minigen.few_rows_linear.default, (*arguments, False))
        compiled = torch.compile(few_rows_linear, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*arguments), few_rows_linear(*arguments))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_TE": torch.ones(200)}, "x must have 2 dimensions"),
        ({"x_TE": torch.ones(3, 100)}, "one column for each of 100 columns of x"),
        ({"x_TE": torch.ones(3, 200).half()}, "weight must be torch.float16"),
        ({"weight_GE": torch.ones(200, 18).T}, "weight must be contiguous"),
        ({"weight_GE": torch.ones(17, 200)}, "as many rows for the gate"),
        ({"bias_G": torch.ones(9)}, r"bias must have shape \(18,\)"),
        ({"residual_TF": torch.ones(3, 18)}, r"residual must have shape \(3, 9\)"),
        ({"norm_weight_E": torch.ones(400)[::2]}, "norm_weight must .* be contiguous"),
        ({"norm_weight_E": torch.ones(200).half()}, "norm_weight must be torch.float32"),
        ({"activation": "relu"}, "activation must be '', 'silu' or 'gelu_tanh', got 'relu'"),
    ],
)
def test_few_rows_linear_refuses(change: dict[str, Any], message: str) -> None:
    problem = make_linear_problem(LINEAR_CASE)
    with pytest.raises(ValueError, match=message):
        few_rows_linear(*problem._replace(**change))


@given(linear_cases(CPU_DTYPES, 300))
def test_tile_linear_equals_the_models_own_operations(case: LinearCase) -> None:
    """To the last bit: on the CPU it is the same composition."""
    case = replace(case, has_residual=False, has_norm=False)
    problem = make_linear_problem(case)
    arguments = problem.x_TE, problem.weight_GE, problem.bias_G
    expected_TF = few_rows_linear(*arguments, activation=case.activation)
    assert torch.equal(tile_linear(*arguments, case.activation), expected_TF)


@given(linear_cases(CPU_DTYPES, 300), st.integers(1, 9))
def test_parts_of_tile_linear_add_up_to_it(case: LinearCase, parts: int) -> None:
    case = replace(case, has_residual=False, has_norm=False, activation="")
    problem = make_linear_problem(case)
    part_PTF = tile_linear(problem.x_TE, problem.weight_GE, problem.bias_G, parts=parts)
    assert part_PTF.shape == (parts, case.num_rows, case.num_outputs)
    assert part_PTF.dtype == torch.float32
    # The reference allows for a rounding to the dtype, and here is none: float32's is meant.
    expected_TF, error_TF = linear_reference(replace(case, dtype=torch.float32), problem)
    assert_within(part_PTF.double().sum(0), expected_TF, 2 * error_TF)


@given(sum_norm_cases(CPU_DTYPES, 300))
def test_sum_norm_equals_definition(case: SumNormCase) -> None:
    problem = make_sum_norm_problem(case)
    for found, (expected, error) in zip(
        sum_norm(*problem), sum_norm_reference(problem), strict=True
    ):
        assert found.dtype == case.dtype
        assert_within(found, expected, error)


def test_tile_linear_and_sum_norm_pass_opcheck_and_compile() -> None:
    problem = make_linear_problem(LINEAR_CASE)
    for activation, parts in (("silu", 0), ("", 0), ("", 3)):
        arguments = (problem.x_TE, problem.weight_GE, problem.bias_G, activation, parts)
        torch.library.opcheck(torch.ops.minigen.tile_linear.default, (*arguments, False))
        compiled = torch.compile(tile_linear, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*arguments), tile_linear(*arguments))
    for parts in (0, 3):
        problem = make_sum_norm_problem(SumNormCase(5, 40, parts, 0.0, torch.bfloat16, 0))
        torch.library.opcheck(torch.ops.minigen.sum_norm.default, (*problem, False))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": -1}, "parts must be 0 or more, got -1"),
        ({"parts": 2, "activation": "silu"}, "parts must be 0 beside an activation, got 2"),
        ({"x_TE": torch.ones(3, 100)}, "one column for each of 100 columns of x"),
        ({"bias_G": torch.ones(9)}, r"bias must have shape \(18,\)"),
    ],
)
def test_tile_linear_refuses(change: dict[str, Any], message: str) -> None:
    problem = make_linear_problem(LINEAR_CASE)
    arguments = {"x_TE": problem.x_TE, "weight_GE": problem.weight_GE, **change}
    with pytest.raises(ValueError, match=message):
        tile_linear(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_TE": torch.ones(5)}, "x must have 2 dimensions"),
        ({"part_PTE": torch.ones(3, 5, 40).half()}, "part must be torch.float32"),
        ({"part_PTE": torch.ones(3, 4, 40)}, r"part must .* shape \(3, 5, 40\)"),
        ({"part_PTE": torch.ones(5, 3, 40).transpose(0, 1)}, "part must be contiguous"),
        ({"norm_weight_E": torch.ones(41)}, r"norm_weight must .* shape \(40,\)"),
        ({"norm_weight_E": torch.ones(40).half()}, "norm_weight must be torch.float32"),
    ],
)
def test_sum_norm_refuses(change: dict[str, Any], message: str) -> None:
    problem = make_sum_norm_problem(SumNormCase(5, 40, 3, 0.0, torch.float32, 0))
    with pytest.raises(ValueError, match=message):
        sum_norm(*problem._replace(**change))


INTERPRETED = ("tests/test_gpu_kernels_fused.py", "tests/test_gpu_draw_tokens.py")


def test_triton_kernels_in_the_interpreter() -> None:
    """A process of its own: Triton reads the variable once, when it is imported."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider"]
    finished = subprocess.run(
        [*command, "-k", "not registered", *INTERPRETED],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-2000:]
    assert " passed" in finished.stdout
    assert "skipped" not in finished.stdout
