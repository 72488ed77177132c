"""The Triton backward of varlen_attention: on a GPU, or (as in test_gpu_kernels) interpreted.

What it is held against is the CPU implementation in float64, which passes gradcheck.
"""

import dataclasses

import pytest
import torch
from hypothesis import given
from torch import Tensor

pytest.importorskip("triton")

from minigen.kernels import varlen_attention
from minigen.kernels.backward_tiles import BackwardTile, BackwardTiles
from minigen.kernels.checks import resolve_window
from minigen.kernels.varlen_attention import varlen_attention_triton
from minigen.kernels.varlen_attention_backward import (
    varlen_attention_backward,
    varlen_attention_backward_triton,
)
from minigen.kernels.varlen_attention_backward_tma import choose_backward_descriptor_tiles
from tests.attention_cases import Case, assert_within, cases, cu_seqlens, make_qkv
from tests.command_line import PROFILE
from tests.gradient_cases import make_upstream, rounding
from tests.interpreted import DEVICE, DTYPES, INTERPRETED, smaller

MAX_LEN = 40 if INTERPRETED else 700

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(), reason="needs a CUDA GPU"
    ),
]


# The kernels with descriptors run in the interpreter, too, where nothing chooses them.
NEEDS_DESCRIPTORS = pytest.mark.skipif(
    not INTERPRETED and torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0),
    reason="needs a GPU with bulk copies",
)
BOTH_WAYS = pytest.mark.parametrize(
    "descriptors", [False, pytest.param(True, marks=NEEDS_DESCRIPTORS)]
)


def triton_gradients(
    case: Case,
    qkv: tuple[Tensor, ...],
    upstream: tuple[Tensor, Tensor],
    tiles: BackwardTiles | None = None,
    descriptors: bool | None = None,
) -> tuple[Tensor, ...]:
    offsets = cu_seqlens(case.q_lens, DEVICE), cu_seqlens(case.kv_lens, DEVICE)
    window = resolve_window(case.causal, case.window_size)
    q_THD, k_TKD, v_TKD = qkv
    out_THD, lse_HT = varlen_attention_triton(
        q_THD, k_TKD, v_TKD, *offsets, window=window, scale=case.scale, softcap=case.softcap
    )
    return varlen_attention_backward_triton(
        *upstream,
        q_THD,
        k_TKD,
        v_TKD,
        out_THD,
        lse_HT,
        *offsets,
        window=window,
        scale=case.scale,
        softcap=case.softcap,
        tiles=tiles,
        tensor_descriptors=descriptors,
    )


def float64_gradients(
    case: Case, qkv: tuple[Tensor, ...], upstream: tuple[Tensor, Tensor]
) -> tuple[Tensor, ...]:
    q_THD, k_TKD, v_TKD, dout_THD, dlse_HT = (x.cpu().double() for x in (*qkv, *upstream))
    offsets = cu_seqlens(case.q_lens), cu_seqlens(case.kv_lens)
    out_THD, lse_HT = varlen_attention(
        q_THD,
        k_TKD,
        v_TKD,
        *offsets,
        causal=case.causal,
        scale=case.scale,
        window_size=case.window_size,
        softcap=case.softcap,
    )
    return varlen_attention_backward(
        dout_THD,
        dlse_HT,
        q_THD,
        k_TKD,
        v_TKD,
        out_THD,
        lse_HT,
        *offsets,
        case.causal,
        case.scale,
        case.window_size,
        case.softcap,
    )


def test_a_gradient_that_is_one_for_all_heads() -> None:
    """Expanded, as the gradient of a mean over heads is: its heads lie 0 apart."""
    lens = 70, 64
    case = Case(lens, lens, 4, 2, 64, torch.float16, True, (-1, -1), 0.0, 0.125, 16, 0)
    qkv = make_qkv(case, DEVICE)
    dout_THD, dlse_HT = make_upstream(case, DEVICE)
    upstream = dout_THD[:, :1].expand_as(dout_THD), dlse_HT
    expected = triton_gradients(case, qkv, (upstream[0].contiguous(), dlse_HT), descriptors=False)
    for got, right in zip(triton_gradients(case, qkv, upstream), expected, strict=True):
        torch.testing.assert_close(got, right)


def assert_equal_to_float64(
    case: Case, tiles: BackwardTiles | None = None, descriptors: bool | None = None
) -> None:
    qkv, upstream = make_qkv(case, DEVICE), make_upstream(case, DEVICE)
    actual = triton_gradients(case, qkv, upstream, tiles, descriptors)
    expected = float64_gradients(case, qkv, upstream)
    bounds = rounding(case, qkv, *upstream)
    for ours, theirs, bound in zip(actual, expected, bounds, strict=True):
        assert ours.dtype == case.dtype
        assert_within(ours, theirs, bound)


# A GPU run compiles three kernels, two seconds each, for each combination of these: twenty drawn at
# random took 78 s on an H100. So the `ci` profile draws lengths, sides of windows and contents for
# eight, which hold each head dim, dtype, group and mask; `deep` draws all, as does the interpreter.
FEW_KERNELS = not INTERPRETED and PROFILE == "ci"
KERNELS = {  # head dim: dtype, group, causal, window on the (left, right), softcap
    8: (torch.float16, 8, False, (True, True), 2.0),
    16: (torch.bfloat16, 5, True, (False, False), 0.0),
    40: (torch.float32, 3, False, (False, False), 50.0),
    64: (torch.bfloat16, 1, True, (True, False), 0.0),
    80: (torch.float16, 3, False, (False, True), 0.0),
    96: (torch.bfloat16, 2, False, (False, False), 2.0),
    128: (torch.bfloat16, 8, True, (False, False), 0.0),
    256: (torch.float32, 2, True, (True, False), 0.0),
}


def of_few_kernels(case: Case) -> Case:
    if not FEW_KERNELS:
        return case
    dtype, group, causal, sides, softcap = KERNELS[case.head_dim]
    left, right = (
        (15 if side < 0 else side) if limited else -1
        for side, limited in zip(case.window_size, sides, strict=True)
    )
    return dataclasses.replace(
        case, dtype=dtype, num_heads=group * case.num_kv_heads, causal=causal,
        window_size=(left, right), softcap=softcap,
    )  # fmt: skip


@given(cases(DTYPES, MAX_LEN).map(smaller(3, 2)).map(of_few_kernels))
def test_gradients_equal_float64(case: Case) -> None:
    assert_equal_to_float64(case)


CASE = Case(
    q_lens=(7, 50, 0, 33, 9),
    kv_lens=(7, 50, 4, 21, 40),
    num_heads=6,
    num_kv_heads=2,
    head_dim=40,
    dtype=torch.float16,
    causal=True,
    window_size=(-1, -1),
    softcap=0.0,
    scale=0.2,
    block_size=1,
    seed=0,
)
# What is about tiles and sequences needs no second key/value head in the interpreter;
# `test_gradients_equal_float64` draws two.
TILED = smaller(len(CASE.q_lens), 1)(CASE)


@pytest.mark.parametrize("window", [(-1, -1), (20, -1), (25, 30)])
@pytest.mark.parametrize("causal", [True, False])
@BOTH_WAYS
def test_small_tiles_equal_float64(
    window: tuple[int, int], causal: bool, descriptors: bool
) -> None:
    """Tiles so small that every loop runs: masked on both sides, unmasked between, tails."""
    tiles = BackwardTiles(BackwardTile(32, 16, 4, 2), BackwardTile(16, 16, 4, 2))
    case = dataclasses.replace(TILED, window_size=window, causal=causal, softcap=3.0)
    assert_equal_to_float64(case, tiles, descriptors)


@pytest.mark.parametrize("keys", [300, 5000])
@NEEDS_DESCRIPTORS
def test_tiles_of_short_and_of_long_sequences_equal_float64(keys: int) -> None:
    """What is chosen for heads of 128, across its borders."""
    lens = (33, 1, 0, 65) if INTERPRETED else (129, 1, 0, 127, 300, 128, 64, 31)
    case = dataclasses.replace(
        CASE, q_lens=lens, kv_lens=lens, num_heads=2, num_kv_heads=1, head_dim=128
    )
    assert_equal_to_float64(case, choose_backward_descriptor_tiles(128, keys), True)


@BOTH_WAYS
def test_two_runs_are_bitwise_equal(descriptors: bool) -> None:
    case = TILED if INTERPRETED else dataclasses.replace(CASE, q_lens=(3000,), kv_lens=(3000,))
    qkv, upstream = make_qkv(case, DEVICE), make_upstream(case, DEVICE)
    first, second = (
        triton_gradients(case, qkv, upstream, descriptors=descriptors) for _ in range(2)
    )
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("causal", [True, False])
@BOTH_WAYS
def test_neighbours_cannot_leak(causal: bool, descriptors: bool) -> None:
    """Also not through a tile's rows beyond the sequence, whose weights are 0: 0 * NaN is NaN.

    Sequence 3 has queries that stand before its first key, and NaN before and after it.
    """
    case = dataclasses.replace(TILED, causal=causal)
    tiles = BackwardTiles(BackwardTile(32, 16, 4, 2), BackwardTile(16, 16, 4, 2))
    qkv, upstream = make_qkv(case, DEVICE), make_upstream(case, DEVICE)
    lens = (case.q_lens, case.kv_lens, case.kv_lens)
    for used in (None, tiles):
        before = triton_gradients(case, qkv, upstream, used, descriptors)
        for poisoned in ((0, 2, 4), (1, 2, 4)):
            poison = [x.clone() for x in (*qkv, *upstream)]
            for x, n in zip(poison, (*lens, case.q_lens, case.q_lens), strict=True):
                parts = (x if x.ndim == 3 else x.T).split(n)  # dlse_HT counts tokens last
                for seq in poisoned:
                    parts[seq].fill_(torch.nan)
            disturbed = tuple(poison[:3]), (poison[3], poison[4])
            after = triton_gradients(case, *disturbed, used, descriptors)
            for one, other, n in zip(before, after, lens, strict=True):
                for seq, (x, y) in enumerate(zip(one.split(n), other.split(n), strict=True)):
                    unmoved = seq not in poisoned or seq == 2  # whose keys nobody sees
                    assert torch.equal(x, y) == unmoved


@BOTH_WAYS
def test_queries_that_see_no_key(descriptors: bool) -> None:
    """Their gradients are 0, also where NaN arrives at their lse of -inf."""
    case = dataclasses.replace(CASE, q_lens=(5, 9), kv_lens=(0, 4))
    qkv, (dout_THD, dlse_HT) = make_qkv(case, DEVICE), make_upstream(case, DEVICE)
    dlse_HT[:, :10] = torch.nan
    gradients = triton_gradients(case, qkv, (dout_THD, dlse_HT), descriptors=descriptors)
    assert not gradients[0][:10].any()
    assert gradients[0][10:].any()
    assert all(x.isfinite().all() for x in gradients)


@BOTH_WAYS
def test_scores_far_below_zero(descriptors: bool) -> None:
    """A key behind the sequence has score 0, 2 ** 184 times the weight of those that are there."""
    case = dataclasses.replace(CASE, causal=False)
    q_THD, k_TKD, v_TKD = make_qkv(case, DEVICE)
    qkv = q_THD.fill_(4.0), k_TKD.fill_(-4.0), v_TKD
    upstream = make_upstream(case, DEVICE)
    actual = triton_gradients(case, qkv, upstream, descriptors=descriptors)
    expected = float64_gradients(case, qkv, upstream)
    for ours, theirs, bound in zip(actual, expected, rounding(case, qkv, *upstream), strict=True):
        assert_within(ours, theirs, bound)


def test_strided_inputs_equal_contiguous_ones() -> None:
    """q, k and v as slices of one projection, and the broadcast gradient of a sum."""
    case = dataclasses.replace(CASE, kv_lens=CASE.q_lens)
    qkv, (_, dlse_HT) = make_qkv(case, DEVICE), make_upstream(case, DEVICE)
    fused = torch.cat([x.flatten(1) for x in qkv], 1)
    slices = fused.split([6 * 40, 2 * 40, 2 * 40], 1)
    strided = tuple(x.unflatten(1, (-1, 40)) for x in slices)
    ones_THD = torch.ones_like(qkv[0])
    one_THD = ones_THD[:1, :1, :1].expand(ones_THD.shape)
    expected = triton_gradients(case, qkv, (ones_THD, dlse_HT))
    actual = triton_gradients(case, strided, (one_THD, dlse_HT.T.contiguous().T))
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


# What only a GPU shows. The run in the interpreter leaves these out by name.


def test_registered_backward_passes_opcheck() -> None:
    q_THD, k_TKD, v_TKD = (x.requires_grad_() for x in make_qkv(CASE, DEVICE))
    offsets = cu_seqlens(CASE.q_lens, DEVICE), cu_seqlens(CASE.kv_lens, DEVICE)
    options = (True, None, [3, -1], 5.0)
    torch.library.opcheck(
        torch.ops.minigen.varlen_attention.default,
        (q_THD, k_TKD, v_TKD, *offsets, *options, False),
    )
    with torch.no_grad():
        outputs = varlen_attention(q_THD, k_TKD, v_TKD, *offsets, window_size=(3, -1), softcap=5.0)
        torch.library.opcheck(
            torch.ops.minigen.varlen_attention_backward.default,
            (*make_upstream(CASE, DEVICE), q_THD, k_TKD, v_TKD, *outputs, *offsets, *options),
        )


def test_registered_backward_never_waits_for_the_gpu() -> None:
    q_THD, k_TKD, v_TKD = (x.requires_grad_() for x in make_qkv(CASE, DEVICE))
    offsets = cu_seqlens(CASE.q_lens, DEVICE), cu_seqlens(CASE.kv_lens, DEVICE)
    dout_THD, dlse_HT = make_upstream(CASE, DEVICE)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs = varlen_attention(q_THD, k_TKD, v_TKD, *offsets)
        torch.autograd.backward(outputs, (dout_THD, dlse_HT))
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert all(x.grad is not None for x in (q_THD, k_TKD, v_TKD))
