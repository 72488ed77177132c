"""The fused kernels of a decode step in Triton: on a GPU, or (as in test_gpu_kernels) interpreted.

Shapes: T packed tokens, H query heads, K key/value heads, D head dim, N cache blocks, B tokens a
block, R rotated part of D.
"""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from minigen.kernels import sum_norm, tile_linear
from minigen.kernels.dependent_launch import has_dependent_launch
from minigen.kernels.few_rows_dot import MAX_CHUNKS, MAX_DOT_INPUTS, DotTile, choose_dot_tile
from minigen.kernels.few_rows_linear import (
    MAX_INPUTS,
    LinearTile,
    choose_linear_tile,
    few_rows_linear_triton,
    multiplies_tiles,
)
from minigen.kernels.rope_cache_write import rope_cache_write_triton, rope_constants
from minigen.kernels.sum_norm import norm_rows
from minigen.kernels.tile_linear import tile_linear_gluon
from minigen.kernels.tile_linear_gluon import GluonLinearTile, choose_parts, fits_tiles
from minigen.kernels.tiles import power_of_two
from tests.attention_cases import assert_within
from tests.fused_cases import (
    LinearCase,
    RopeCase,
    RopeProblem,
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
from tests.interpreted import DEVICE, DTYPES, INTERPRETED

# Triton's interpreter multiplies no bfloat16, which is what the tensor cores get otherwise.
DOT_DTYPE = torch.float16 if INTERPRETED else torch.bfloat16

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(), reason="needs a CUDA GPU"
    ),
]

ROPE_CASE = RopeCase(
    num_tokens=5,
    num_q_heads=6,
    num_kv_heads=3,
    head_dim=40,
    rotary_dim=24,
    has_norm=True,
    rotates=True,
    dtype=torch.float16,
    padding=0,
    seed=0,
)
LINEAR_CASE = LinearCase(
    num_rows=3,
    num_inputs=200,
    num_outputs=9,
    has_bias=True,
    has_residual=True,
    has_norm=True,
    norm_offset=0.0,
    activation="silu",
    dtype=torch.float16,
    padding=8,
    seed=0,
)


def assert_rope(case: RopeCase, problem: RopeProblem, q_THD: Tensor) -> None:
    expected = rope_reference(case, problem._replace(**unwritten(problem)))
    assert q_THD.is_contiguous()
    assert q_THD.dtype == case.dtype
    assert_within(q_THD, expected.q_THD, expected.q_error_THD)
    for cache, wanted, error in (
        (problem.k_cache_NBKD, expected.k_cache_NBKD, expected.k_error_NBKD),
        (problem.v_cache_NBKD, expected.v_cache_NBKD, expected.v_error_NBKD),
    ):
        assert torch.equal(cache.isnan().cpu(), wanted.isnan())
        assert_within(cache.nan_to_num(), wanted.nan_to_num(), error)


def unwritten(problem: RopeProblem) -> dict[str, Tensor]:
    names = ("k_cache_NBKD", "v_cache_NBKD")
    return {name: torch.full_like(getattr(problem, name), torch.nan) for name in names}


@example(dataclasses.replace(ROPE_CASE, rotates=False))
@example(dataclasses.replace(ROPE_CASE, rotates=False, parts=2))
@example(dataclasses.replace(ROPE_CASE, has_norm=False, parts=4))
@example(dataclasses.replace(ROPE_CASE, num_q_heads=8, num_kv_heads=8, head_dim=128))
@example(ROPE_CASE)
@given(rope_cases(DTYPES, 6 if INTERPRETED else 40))
def test_rope_cache_write_equals_definition(case: RopeCase) -> None:
    problem = make_rope_problem(case, DEVICE)
    assert_rope(case, problem, rope_cache_write_triton(*problem))


@given(st.integers(1, 64), st.integers(1, 256), st.data())
def test_rope_programs_take_every_head(
    num_kv_heads: int, head_dim: int, data: st.DataObject
) -> None:
    half = data.draw(st.integers(0, head_dim // 2))
    constants = rope_constants(2 * num_kv_heads, num_kv_heads, head_dim, half, half > 0)
    for name in ("BLOCK_HEADS", "BLOCK_HALF", "BLOCK_REST", "BLOCK_DIM"):
        assert constants[name] in (0, power_of_two(constants[name]))
    assert constants["NUM_Q_GROUPS"] * constants["BLOCK_HEADS"] >= 2 * num_kv_heads
    assert constants["NUM_KV_GROUPS"] * constants["BLOCK_HEADS"] >= num_kv_heads
    assert 2 * constants["BLOCK_HALF"] + constants["BLOCK_REST"] >= head_dim


def test_rope_cache_write_ends_at_the_edges_of_tables_and_cache() -> None:
    problem = make_rope_problem(ROPE_CASE, DEVICE)
    num_rows, num_slots = problem.cos_PR.shape[0], problem.k_cache_NBKD[..., 0, 0].numel()
    expected_THD = rope_cache_write_triton(*problem)
    caches = unwritten(problem)
    problem = problem._replace(**caches)
    assert problem.positions_T is not None
    problem.positions_T[1], problem.positions_T[3] = -1, num_rows
    problem.slots_T[:] = torch.tensor([0, -2, num_slots, num_slots - 1, 2**40])
    q_THD = rope_cache_write_triton(*problem)
    for token in (0, 2, 4):
        assert torch.equal(q_THD[token], expected_THD[token])
    for token in (1, 3):
        assert q_THD[token, :, :24].isnan().all()
    written = ~problem.v_cache_NBKD.flatten(0, 1)[:, 0, 0].isnan()
    assert written.nonzero().flatten().tolist() == [0, num_slots - 1]


def test_the_parts_of_one_row_may_have_any_stride() -> None:
    case = dataclasses.replace(ROPE_CASE, num_tokens=1, parts=3)
    problem = make_rope_problem(case, DEVICE)
    qkv_PTXD = problem.qkv_TXD.squeeze(1)[None].transpose(0, 1)
    assert qkv_PTXD.is_contiguous()
    assert qkv_PTXD.stride(1) == 3 * qkv_PTXD.stride(0)
    problem = problem._replace(qkv_TXD=qkv_PTXD)
    assert_rope(case, problem, rope_cache_write_triton(*problem))


def test_rope_cache_write_beyond_32_bit_indexes() -> None:
    shape = (2**31 // (16 * 8 * 256) + 2, 16, 8, 256)
    try:
        caches = [torch.empty(shape, dtype=torch.float16, device=DEVICE) for _ in "kv"]
    except RuntimeError:
        pytest.skip("this machine has no 9 GB for the two caches")
    qkv = torch.randn(1, 24, 256).to(DEVICE, torch.float16)
    table = torch.ones(1, 128, device=DEVICE)
    last = torch.full((1,), shape[0] * 16 - 1, device=DEVICE)
    zero, (k_cache, v_cache) = torch.zeros_like(last), caches
    rope_cache_write_triton(
        qkv, None, None, 0.0, table, table, zero, k_cache, v_cache, last, rotates=False
    )
    assert torch.equal(k_cache[-1, -1], qkv[0, 8:16])
    assert torch.equal(v_cache[-1, -1], qkv[0, 16:])


@example(
    dataclasses.replace(LINEAR_CASE, activation="gelu_tanh", norm_offset=1.0, dtype=torch.float32)
)
@example(dataclasses.replace(LINEAR_CASE, activation=""))
@example(LINEAR_CASE)
@given(linear_cases(DTYPES, 300 if INTERPRETED else 4000))
def test_few_rows_linear_equals_definition(case: LinearCase) -> None:
    problem = make_linear_problem(case, DEVICE)
    in_tiles = multiplies_tiles(case.num_rows, case.num_inputs, case.dtype)
    assert_within(few_rows_linear_triton(*problem), *linear_reference(case, problem, in_tiles))


@pytest.mark.parametrize("tile", [LinearTile(1, 1), LinearTile(2, 4), LinearTile(16, 1)])
def test_few_rows_linear_with_any_tile(tile: LinearTile) -> None:
    problem = make_linear_problem(LINEAR_CASE, DEVICE)
    out_TF = few_rows_linear_triton(*problem, tile=tile)
    assert_within(out_TF, *linear_reference(LINEAR_CASE, problem))


DOT_TILES = (DotTile(8, 64, 1), DotTile(16, 128, 4), DotTile(16, 1024, 8))


@st.composite
def cases_in_tiles(draw: st.DrawFn) -> tuple[LinearCase, DotTile]:
    tile = draw(st.sampled_from(DOT_TILES))
    most = min(MAX_CHUNKS * tile.block_e, 300 if INTERPRETED else MAX_DOT_INPUTS)
    return draw(linear_cases((DOT_DTYPE,), most, in_tiles=True)), tile


@example((dataclasses.replace(LINEAR_CASE, num_rows=16), DOT_TILES[0]))
@example((dataclasses.replace(LINEAR_CASE, num_rows=7, num_outputs=130), DOT_TILES[2]))
@given(cases_in_tiles())
def test_few_rows_linear_in_tiles_equals_definition(found: tuple[LinearCase, DotTile]) -> None:
    case, tile = found
    case = dataclasses.replace(case, dtype=DOT_DTYPE)
    problem = make_linear_problem(case, DEVICE)
    out_TF = few_rows_linear_triton(*problem, tile=tile)
    assert_within(out_TF, *linear_reference(case, problem, in_tiles=True))


@given(st.integers(1, MAX_DOT_INPUTS))
def test_tiles_for_tensor_cores_reach_all_inputs(num_inputs: int) -> None:
    tile = choose_dot_tile(num_inputs)
    assert MAX_CHUNKS * tile.block_e >= num_inputs
    assert tile.block_e // tile.num_warps >= 16  # what a tensor core takes of the inputs at once


@given(st.integers(1, 300_000), st.integers(1, MAX_INPUTS), st.booleans())
def test_linear_tiles_fit_registers(
    num_outputs: int, num_inputs: int, has_activation: bool
) -> None:
    tile = choose_linear_tile(num_outputs, num_inputs, has_activation)
    weights = tile.block_f * power_of_two(num_inputs) * (2 if has_activation else 1)
    assert weights // (32 * tile.num_warps) <= 128
    assert tile.block_f == power_of_two(tile.block_f)
    assert tile.num_warps in (1, 2, 4, 8)


def test_few_rows_linear_refuses_many_rows_and_wide_ones() -> None:
    half, brain = torch.float16, torch.bfloat16
    for shape, dtype in (
        ((9, 32), torch.float32),
        ((17, 32), half),
        ((9, MAX_DOT_INPUTS + 1), brain),
        ((1, MAX_INPUTS + 1), brain),
    ):
        x_TE = torch.ones(shape, device=DEVICE, dtype=dtype)
        with pytest.raises(ValueError, match=rf"takes 8 rows .* {shape[1]}\) .* use linear"):
            few_rows_linear_triton(x_TE, torch.ones(1, shape[1], device=DEVICE, dtype=dtype))


def test_a_tile_that_is_given_refuses_what_it_would_leave_out() -> None:
    """Rows behind the 16th and chunks behind the fourth would be missing without a word."""
    tile = DotTile(8, 64, 1)
    for shape in ((17, 32), (2, MAX_CHUNKS * tile.block_e + 1)):
        x_TE = torch.ones(shape, device=DEVICE, dtype=torch.float16)
        weight_GE = torch.ones(8, shape[1], device=DEVICE, dtype=torch.float16)
        with pytest.raises(ValueError, match="few_rows_linear takes"):
            few_rows_linear_triton(x_TE, weight_GE, tile=tile)


@given(sum_norm_cases(DTYPES, 300 if INTERPRETED else 5000))
def test_norm_rows_equals_definition(case: SumNormCase) -> None:
    problem = make_sum_norm_problem(case, DEVICE)
    x_TE, part_PTE, norm_weight_E, eps, offset = problem
    sum_TE = torch.full_like(x_TE, torch.nan)
    normed_TE = norm_rows(x_TE, part_PTE, norm_weight_E, sum_TE, eps, offset, False)
    for found, (expected, error) in zip(
        (sum_TE, normed_TE), sum_norm_reference(problem), strict=True
    ):
        assert_within(found, expected, error)


# What only a GPU shows. The run in the interpreter leaves these out by name.


def test_registered_rope_cache_write_passes_opcheck_and_waits_for_nothing() -> None:
    problem = make_rope_problem(ROPE_CASE, DEVICE)
    problem.k_cache_NBKD.zero_()
    problem.v_cache_NBKD.zero_()
    operator = torch.ops.minigen.rope_cache_write.default
    torch.library.opcheck(operator, (*problem, False))
    in_parts = make_rope_problem(dataclasses.replace(ROPE_CASE, parts=2), DEVICE)
    caches = problem.k_cache_NBKD, problem.v_cache_NBKD
    torch.library.opcheck(operator, (*in_parts[:7], *caches, *in_parts[9:], False))
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        operator(*problem, False)
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_registered_rope_cache_write_starts_early_with_the_same_result() -> None:
    if not has_dependent_launch(torch.device("cuda", 0)):
        pytest.skip("needs a GPU with programmatic dependent launch (sm_90)")
    problem = make_rope_problem(ROPE_CASE, DEVICE)
    weight = torch.randn(4096, problem.qkv_TXD[0].numel(), device=DEVICE, dtype=torch.float16)
    x = torch.randn(5, 4096, device=DEVICE, dtype=torch.float16) / 64
    for _ in range(20):  # each round the projection before it is another
        x = x.roll(1, 1)
        qkv_TXD = (x @ weight).view(problem.qkv_TXD.shape)
        early_THD = rope_cache_write_triton(*problem._replace(qkv_TXD=qkv_TXD), pdl=True)
        assert torch.equal(early_THD, rope_cache_write_triton(*problem._replace(qkv_TXD=qkv_TXD)))


def test_registered_few_rows_linear_passes_opcheck() -> None:
    problem = make_linear_problem(LINEAR_CASE, DEVICE)
    torch.library.opcheck(torch.ops.minigen.few_rows_linear.default, (*problem, False))


def assert_early_replays_give_the_same(chain: Callable[[bool], Tensor], x_TE: Tensor) -> None:
    """`chain` of x, launched early and captured as a step is, and launched one after the other."""
    chain(True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured_TE = chain(True)
    for _ in range(20):
        x_TE.normal_()
        graph.replay()
        assert torch.equal(captured_TE, chain(False))


def fits_tiles_here() -> bool:
    one_TE = torch.zeros(1, 8, dtype=torch.bfloat16, device=DEVICE)
    return not INTERPRETED and torch.cuda.is_available() and fits_tiles(one_TE, one_TE)


# What is chosen, weights and rows whose places are used again, places used once.
LINEAR_TILES = (
    None,
    GluonLinearTile(8, 64, 64, x_stages=2, weight_stages=3),
    GluonLinearTile(64, 64, 128, x_stages=3, weight_stages=2),
    GluonLinearTile(128, 128, 64, x_stages=3, weight_stages=2),
    GluonLinearTile(32, 64, 256, x_stages=2, weight_stages=2),
)


@st.composite
def tiled_cases(draw: st.DrawFn) -> tuple[LinearCase, int]:
    case = draw(linear_cases((torch.bfloat16,), 40))
    # Few of them: each pair of sizes is compiled for itself.
    inputs, outputs = draw(st.sampled_from([(8, 33), (520, 64), (1024, 65), (3072, 300)]))
    parts = draw(st.sampled_from([0, 0, 1, 4]))
    return dataclasses.replace(
        case,
        num_rows=draw(st.sampled_from([1, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 256])),
        num_inputs=inputs,
        num_outputs=outputs,
        activation="" if parts or case.activation == "gelu_tanh" else case.activation,
        has_residual=False,
        has_norm=False,
        padding=8 * (case.padding % 2),
    ), parts


def test_registered_tile_linear_in_gluon_equals_definition() -> None:
    if not fits_tiles_here():
        pytest.skip("needs a Hopper GPU, and a Triton whose Gluon was tried")

    @settings(max_examples=60)
    @given(tiled_cases(), st.sampled_from(LINEAR_TILES))
    def check(found: tuple[LinearCase, int], tile: GluonLinearTile | None) -> None:
        case, parts = found
        problem = make_linear_problem(case, DEVICE)
        x_TE, weight_GE, bias_G = problem[:3]
        assert fits_tiles(x_TE, weight_GE)
        out = tile_linear_gluon(x_TE, weight_GE, bias_G, case.activation, parts, tile=tile)
        exact = dataclasses.replace(case, dtype=torch.float32) if parts else case
        expected_TF, error_TF = linear_reference(exact, problem, in_tiles=True)
        assert_within(out.double().sum(0) if parts else out, expected_TF, error_TF)

    check()


def test_registered_tile_linear_passes_opcheck() -> None:
    case = dataclasses.replace(LINEAR_CASE, num_rows=33, num_inputs=200, dtype=DOT_DTYPE)
    problem = make_linear_problem(case, DEVICE)
    for activation, parts in (("silu", 0), ("", 3)):
        arguments = (*problem[:3], activation, parts, False)
        torch.library.opcheck(torch.ops.minigen.tile_linear.default, arguments)
    problem = make_sum_norm_problem(SumNormCase(5, 40, 3, 0.0, DOT_DTYPE, 0), DEVICE)
    torch.library.opcheck(torch.ops.minigen.sum_norm.default, (*problem, False))


@pytest.mark.parametrize("num_rows", [1, 17, 64, 100, 256])
def test_registered_tile_linear_starts_early_with_the_same_result(num_rows: int) -> None:
    """A chain in which each kernel reads what the one before wrote, captured as a step is."""
    if not fits_tiles_here():
        pytest.skip("needs a Hopper GPU, and a Triton whose Gluon was tried")

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE).bfloat16()

    x_TE = normal(num_rows, 1024)
    wide = [normal(3072, 1024) / 32 for _ in range(6)]
    narrow = [normal(1024, 1536) / 32 for _ in range(6)]
    norm_weight_E = torch.ones(1024, device=DEVICE).bfloat16()
    parts = choose_parts(num_rows, 1536, 1024)

    def chain(pdl: bool) -> Tensor:
        y_TE, part_PTE = x_TE + 0, x_TE.new_zeros(0, *x_TE.shape, dtype=torch.float32)
        for up, down in zip(wide, narrow, strict=True):
            y_TE, normed_TE = sum_norm(y_TE, part_PTE, norm_weight_E, 1e-6, pdl=pdl)
            hidden = tile_linear(normed_TE, up, None, "silu", pdl=pdl)
            part_PTE = tile_linear(hidden, down, parts=parts, pdl=pdl)
        return sum_norm(y_TE, part_PTE, norm_weight_E, 1e-6, pdl=pdl)[1]

    assert_early_replays_give_the_same(chain, x_TE)


@pytest.mark.parametrize("num_rows", [2, 8, 16])
def test_registered_few_rows_linear_starts_early_with_the_same_result(num_rows: int) -> None:
    """A chain in which each kernel reads what the one before wrote, captured as a step is."""
    if not has_dependent_launch(torch.device("cuda", 0)):
        pytest.skip("needs a GPU with programmatic dependent launch (sm_90)")

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE).bfloat16()

    x_TE = normal(num_rows, 1024)
    wide = [normal(3072, 1024) / 32 for _ in range(6)]
    narrow = [normal(1024, 1536) / 32 for _ in range(6)]
    norm_weight_E = torch.ones(1024, device=DEVICE).bfloat16()

    def chain(pdl: bool) -> Tensor:
        y_TE = x_TE + 0
        for up, down in zip(wide, narrow, strict=True):
            norm = norm_weight_E, 1e-6, 0.0
            hidden = few_rows_linear_triton(y_TE, up, None, None, *norm, "silu", pdl=pdl)
            y_TE = few_rows_linear_triton(hidden, down, None, y_TE, pdl=pdl)
        return y_TE

    assert_early_replays_give_the_same(chain, x_TE)
