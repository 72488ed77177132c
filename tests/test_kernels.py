"""The three operations on the CPU, their registration, and the Triton kernels in the interpreter.

Shapes: T packed tokens, S sequences, H query heads, K key/value heads, D head dim, N cache blocks,
B tokens a block, W width of the block table.
"""

import dataclasses
import importlib
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code

from minigen.kernels import kv_cache_write, paged_attention, varlen_attention
from tests.attention_cases import (
    Case,
    assert_within,
    cases,
    cu_seqlens,
    make_paged,
    make_qkv,
    reference,
    visible,
)

CPU_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

PLAIN = Case(
    q_lens=(5, 1, 0, 9),
    kv_lens=(5, 7, 3, 9),
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    dtype=torch.float32,
    causal=True,
    window_size=(-1, -1),
    softcap=0.0,
    scale=0.5,
    block_size=4,
    seed=0,
)


def options(case: Case) -> dict[str, Any]:
    return {
        "causal": case.causal,
        "scale": case.scale,
        "window_size": case.window_size,
        "softcap": case.softcap,
    }


def run_varlen(case: Case, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> tuple[Tensor, Tensor]:
    lengths = cu_seqlens(case.q_lens), cu_seqlens(case.kv_lens)
    return varlen_attention(q_THD, k_TKD, v_TKD, *lengths, **options(case))


def run_paged(case: Case, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
    paged = make_paged(case)
    kv_cache_write(k_TKD, v_TKD, paged.k_cache_NBKD, paged.v_cache_NBKD, paged.slots_T)
    return paged_attention(
        q_THD,
        paged.k_cache_NBKD,
        paged.v_cache_NBKD,
        cu_seqlens(case.q_lens),
        paged.kv_lens_S,
        paged.block_table_SW,
        **options(case),
    )


@given(cases(CPU_DTYPES))
def test_varlen_equals_definition(case: Case) -> None:
    qkv = make_qkv(case)
    expected = reference(case, *qkv)
    out_THD, lse_HT = run_varlen(case, *qkv)
    assert_within(out_THD, expected.out_THD, expected.out_error_THD)
    assert_within(lse_HT, expected.lse_HT, expected.lse_error_HT)
    assert lse_HT.dtype == (torch.float64 if case.dtype == torch.float64 else torch.float32)


@given(cases(CPU_DTYPES))
def test_paged_equals_definition(case: Case) -> None:
    qkv = make_qkv(case)
    expected = reference(case, *qkv)
    assert_within(run_paged(case, *qkv), expected.out_THD, expected.out_error_THD)


@given(cases((torch.float64,), max_len=70))
def test_packed_equals_padded(case: Case) -> None:
    """The batch that minigen never builds, [S, H, longest, D], through torch's own attention."""
    case = dataclasses.replace(case, softcap=0.0)
    q_THD, k_TKD, v_TKD = make_qkv(case)
    num_seqs, most_q, most_k = len(case.q_lens), max(case.q_lens), max(case.kv_lens)
    group = case.num_heads // case.num_kv_heads
    q_SHQD = q_THD.new_zeros(num_seqs, case.num_heads, most_q, case.head_dim)
    k_SHLD, v_SHLD = q_THD.new_zeros(2, num_seqs, case.num_heads, most_k, case.head_dim)
    visible_SQL = torch.zeros(num_seqs, most_q, most_k, dtype=torch.bool)
    parts = zip(
        q_THD.split(case.q_lens), k_TKD.split(case.kv_lens), v_TKD.split(case.kv_lens), strict=True
    )
    for seq, (q, k, v) in enumerate(parts):
        q_SHQD[seq, :, : len(q)] = q.transpose(0, 1)
        k_SHLD[seq, :, : len(k)] = k.repeat_interleave(group, 1).transpose(0, 1)
        v_SHLD[seq, :, : len(v)] = v.repeat_interleave(group, 1).transpose(0, 1)
        visible_SQL[seq, : len(q), : len(k)] = visible(case, len(q), len(k))
    score_SHQL = (q_SHQD @ k_SHLD.transpose(-1, -2)) * case.scale
    score_SHQL = score_SHQL.masked_fill(~visible_SQL.unsqueeze(1), -torch.inf)
    padded_SHQD = score_SHQL.softmax(-1).nan_to_num(0.0) @ v_SHLD

    out_THD, _ = run_varlen(case, q_THD, k_TKD, v_TKD)
    for seq, out_QHD in enumerate(out_THD.split(case.q_lens)):
        real_QHD = padded_SHQD[seq, :, : len(out_QHD)].transpose(0, 1)
        torch.testing.assert_close(out_QHD, real_QHD, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("num_queries", "causal", "window_size", "seen"),
    [
        (4, True, (-1, -1), ["x...", "xx..", "xxx.", "xxxx"]),
        (2, True, (-1, -1), ["xxx.", "xxxx"]),
        (6, True, (-1, -1), ["....", "....", "x...", "xx..", "xxx.", "xxxx"]),
        (4, True, (1, -1), ["x...", "xx..", ".xx.", "..xx"]),  # a sliding_window of 2
        (4, True, (1, 2), ["x...", "xx..", ".xx.", "..xx"]),
        (4, False, (-1, -1), ["xxxx"] * 4),
        (4, False, (0, 1), ["xx..", ".xx.", "..xx", "...x"]),
        (6, False, (-1, 1), ["....", "x...", "xx..", "xxx.", "xxxx", "xxxx"]),
    ],
)
def test_which_keys_a_query_sees(
    num_queries: int, causal: bool, window_size: tuple[int, int], seen: list[str]
) -> None:
    """Equal scores over one-hot values: the output of a query is a picture of the keys it sees."""
    case = dataclasses.replace(
        PLAIN,
        q_lens=(num_queries,),
        kv_lens=(4,),
        num_heads=1,
        num_kv_heads=1,
        head_dim=4,
        causal=causal,
        window_size=window_size,
    )
    q_THD, k_TKD = torch.zeros(num_queries, 1, 4), torch.zeros(4, 1, 4)
    v_TKD = torch.eye(4).unsqueeze(1)
    out_THD, lse_HT = run_varlen(case, q_THD, k_TKD, v_TKD)
    picture = ["".join("x" if part > 0 else "." for part in row) for row in out_THD[:, 0].tolist()]
    assert picture == seen
    counts = torch.tensor([[row.count("x") for row in seen]])
    torch.testing.assert_close(lse_HT, counts.log())
    assert torch.equal(run_paged(case, q_THD, k_TKD, v_TKD), out_THD)


def rows_of_first(case: Case, lengths: tuple[int, ...], qkv: Sequence[Tensor]) -> Tensor:
    """Attention with offsets from `lengths`, cut to the rows that belong to the first sequence."""
    q_THD, k_TKD, v_TKD = qkv
    offsets = cu_seqlens(lengths)
    out_THD, _ = varlen_attention(q_THD, k_TKD, v_TKD, offsets, offsets, **options(case))
    return out_THD[: case.q_lens[0]]


@pytest.mark.parametrize("dtype", CPU_DTYPES)
@pytest.mark.parametrize("causal", [True, False])
def test_neighbours_cannot_leak(dtype: torch.dtype, causal: bool) -> None:
    case = dataclasses.replace(
        PLAIN, q_lens=(7, 30, 3), kv_lens=(7, 30, 3), dtype=dtype, causal=causal
    )
    mine = make_qkv(case)
    others = make_qkv(dataclasses.replace(case, seed=1))
    disturbed = tuple(torch.cat([a[:7], b[7:]]) for a, b in zip(mine, others, strict=True))
    right = case.q_lens
    assert torch.equal(rows_of_first(case, right, mine), rows_of_first(case, right, disturbed))
    for poison in (torch.nan, torch.inf):
        poisoned = tuple(torch.cat([a[:7], torch.full_like(a[7:], poison)]) for a in mine)
        assert torch.equal(rows_of_first(case, right, mine), rows_of_first(case, right, poisoned))


def test_a_leak_would_be_noticed() -> None:
    """Offsets that give my sequence one row of my neighbour: the comparison above must see it."""
    case = dataclasses.replace(PLAIN, q_lens=(7, 30), kv_lens=(7, 30), causal=False)
    mine = make_qkv(case)
    others = make_qkv(dataclasses.replace(case, seed=1))
    disturbed = tuple(torch.cat([a[:7], b[7:]]) for a, b in zip(mine, others, strict=True))
    wrong = (8, 29)
    assert not torch.equal(rows_of_first(case, wrong, mine), rows_of_first(case, wrong, disturbed))


def test_paged_neighbours_and_unused_rows_cannot_leak() -> None:
    case = dataclasses.replace(PLAIN, q_lens=(1, 6), kv_lens=(10, 6))
    q_THD, k_TKD, v_TKD = make_qkv(case)
    before_THD = run_paged(case, q_THD, k_TKD, v_TKD)
    k_TKD, v_TKD = k_TKD.clone(), v_TKD.clone()
    k_TKD[10:], v_TKD[10:] = torch.nan, torch.nan
    after_THD = run_paged(case, q_THD, k_TKD, v_TKD)
    assert torch.equal(before_THD[:1], after_THD[:1])
    assert after_THD[1:].isnan().all()


@given(cases(CPU_DTYPES, max_len=70))
def test_cache_write_changes_its_slots_only(case: Case) -> None:
    _, k_TKD, v_TKD = make_qkv(case)
    paged = make_paged(case)
    slots_T = paged.slots_T.clone()
    slots_T[::3] = -1
    kv_cache_write(k_TKD, v_TKD, paged.k_cache_NBKD, paged.v_cache_NBKD, slots_T)
    for cache_NBKD, x_TKD in ((paged.k_cache_NBKD, k_TKD), (paged.v_cache_NBKD, v_TKD)):
        expected_NBKD = torch.full_like(cache_NBKD, torch.nan)
        for token, slot in enumerate(slots_T.tolist()):
            if slot >= 0:
                expected_NBKD[slot // case.block_size, slot % case.block_size] = x_TKD[token]
        torch.testing.assert_close(cache_NBKD, expected_NBKD, rtol=0, atol=0, equal_nan=True)


def test_strided_inputs_equal_contiguous_ones() -> None:
    """q, k and v as slices of one fused projection, as the decoder passes them."""
    case = dataclasses.replace(PLAIN, q_lens=(5, 9), kv_lens=(5, 9))
    q_THD, k_TKD, v_TKD = make_qkv(case)
    fused = torch.cat([x.flatten(1) for x in (q_THD, k_TKD, v_TKD)], 1)
    q_size, kv_size = 4 * 8, 2 * 8
    slices = fused.split([q_size, kv_size, kv_size], 1)
    q, k, v = (x.unflatten(1, (-1, 8)) for x in slices)
    assert not q.is_contiguous()
    assert torch.equal(run_varlen(case, q, k, v)[0], run_varlen(case, q_THD, k_TKD, v_TKD)[0])
    assert torch.equal(run_paged(case, q, k, v), run_paged(case, q_THD, k_TKD, v_TKD))


def test_null_rows_and_empty_batches() -> None:
    case = dataclasses.replace(PLAIN, q_lens=(1, 2, 4), kv_lens=(0, 0, 4))
    qkv = make_qkv(case)
    assert not run_paged(case, *qkv)[:3].any()
    assert run_paged(case, *qkv)[3:].any()
    out_THD, lse_HT = run_varlen(case, *qkv)
    assert not out_THD[:3].any()
    assert (lse_HT[:, :3] == -torch.inf).all()
    empty = dataclasses.replace(PLAIN, q_lens=(0, 0), kv_lens=(0, 3))
    assert run_paged(empty, *make_qkv(empty)).shape == (0, 4, 8)
    none_THD = torch.zeros(0, 4, 8)
    zero = torch.zeros(1, dtype=torch.int32)
    out_THD, lse_HT = varlen_attention(none_THD, none_THD, none_THD, zero, zero)
    assert out_THD.shape == (0, 4, 8)
    assert lse_HT.shape == (4, 0)


def test_cache_beyond_32_bit_indexes() -> None:
    """2**31 elements and more. The pages of an empty tensor that nobody writes cost no memory."""
    block_size, num_kv_heads, head_dim = 16, 8, 256
    num_blocks = 2**31 // (block_size * num_kv_heads * head_dim) + 2
    shape = (num_blocks, block_size, num_kv_heads, head_dim)
    try:
        k_cache, v_cache = (torch.empty(shape, dtype=torch.bfloat16) for _ in range(2))
    except RuntimeError:
        pytest.skip("this machine does not promise 9 GB of address space")
    k_TKD, v_TKD = torch.randn(2, 3, num_kv_heads, head_dim).bfloat16()
    last = (num_blocks - 1) * block_size
    kv_cache_write(k_TKD, v_TKD, k_cache, v_cache, torch.arange(last, last + 3))
    q_THD = torch.randn(3, num_kv_heads, head_dim).bfloat16()
    lengths = cu_seqlens((3,))
    table = torch.tensor([[num_blocks - 1]], dtype=torch.int32)
    kv_lens = torch.tensor([3], dtype=torch.int32)
    out_THD = paged_attention(q_THD, k_cache, v_cache, lengths, kv_lens, table)
    expected_THD, _ = varlen_attention(q_THD, k_TKD, v_TKD, lengths, lengths)
    assert torch.equal(out_THD, expected_THD)


# Errors: each names the argument, what it was and what is expected.


def varlen_arguments() -> dict[str, Any]:
    q_THD, k_TKD, v_TKD = make_qkv(dataclasses.replace(PLAIN, q_lens=(2, 3), kv_lens=(2, 3)))
    lengths = cu_seqlens((2, 3))
    return {
        "q_THD": q_THD,
        "k_TKD": k_TKD,
        "v_TKD": v_TKD,
        "cu_seqlens_q": lengths,
        "cu_seqlens_k": lengths,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_THD": torch.zeros(5, 32)}, r"q must have 3 dimensions, got shape \(5, 32\)"),
        ({"q_THD": torch.zeros(5, 4, 8).long()}, "q must be torch.float16 or .*got torch.int64"),
        ({"k_TKD": torch.zeros(5, 2, 8).double()}, "k must be torch.float32, got torch.float64"),
        ({"v_TKD": torch.zeros(4, 2, 8)}, r"k and v must have one shape, got \(5, 2, 8\) and \(4,"),
        ({"q_THD": torch.zeros(5, 3, 8)}, "heads of q must be a multiple .* got 3 and 2"),
        ({"q_THD": torch.zeros(5, 4, 16)}, "q has head dim 16, k has 8"),
        ({"cu_seqlens_q": torch.tensor([0, 2, 5])}, "cu_seqlens_q must be torch.int32, got .*64"),
        ({"cu_seqlens_q": cu_seqlens((5,))}, "one entry more .* got 2 and 3 entries"),
        ({"cu_seqlens_q": cu_seqlens((2, 4))}, r"cu_seqlens_q must start at 0.*5 .*\[0, 2, 6\]"),
        ({"cu_seqlens_k": cu_seqlens((7, -2))}, r"cu_seqlens_k .*never decrease.*\[0, 7, 5\]"),
        ({"window_size": (-2, 0)}, r"window_size must be .* at least -1 .* got \(-2, 0\)"),
        ({"softcap": -1.0}, "softcap must be positive, or 0 for off, got -1.0"),
        ({"softcap": float("nan")}, "softcap must be positive, or 0 for off, got nan"),
    ],
)
def test_varlen_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        varlen_attention(**(varlen_arguments() | change))


def paged_arguments() -> dict[str, Any]:
    case = dataclasses.replace(PLAIN, q_lens=(2, 3), kv_lens=(6, 3))
    paged = make_paged(case)
    return {
        "q_THD": make_qkv(case)[0],
        "k_cache_NBKD": paged.k_cache_NBKD.zero_(),
        "v_cache_NBKD": paged.v_cache_NBKD.zero_(),
        "cu_seqlens_q": cu_seqlens(case.q_lens),
        "kv_lens_S": paged.kv_lens_S,
        "block_table_SW": paged.block_table_SW,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k_cache_NBKD": torch.zeros(6, 4, 2, 16)}, "k_cache and v_cache must have one shape"),
        ({"v_cache_NBKD": torch.zeros(6, 4, 2, 8).half()}, "v_cache must be torch.float32, got"),
        (
            {"v_cache_NBKD": torch.zeros(6, 2, 4, 8).transpose(1, 2)},
            "v_cache must be contiguous",
        ),
        ({"kv_lens_S": torch.tensor([6]).int()}, "kv_lens and the rows of block_table .*got 1, 2"),
        ({"kv_lens_S": torch.tensor([-1, 3]).int()}, r"kv_lens\[0\] must be from 0 to 16.* got -1"),
        ({"kv_lens_S": torch.tensor([6, 17]).int()}, r"kv_lens\[1\] must be from 0 to 16.* got 17"),
        (
            {"block_table_SW": torch.full((2, 4), 6).int()},
            r"block_table\[0\] must name blocks from 0 to 5, got \[6, 6\]",
        ),
    ],
)
def test_paged_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paged_attention(**(paged_arguments() | change))


@pytest.mark.parametrize(
    ("slots", "k_shape", "message"),
    [
        ([0, 24], (2, 2, 8), r"slots must be from 0 to 23, or -1 to skip a token, got \[0, 24\]"),
        ([0, -2], (2, 2, 8), r"slots .*got \[0, -2\]"),
        ([0], (2, 2, 8), r"k must have one row a slot .*\(1, 2, 8\), got \(2, 2, 8\)"),
        ([0, 1], (2, 1, 8), r"k must have .*\(2, 2, 8\), got \(2, 1, 8\)"),
    ],
)
def test_cache_write_refuses(slots: list[int], k_shape: tuple[int, ...], message: str) -> None:
    cache_NBKD = torch.zeros(6, 4, 2, 8)
    with pytest.raises(ValueError, match=message):
        kv_cache_write(
            torch.ones(k_shape),
            torch.ones(k_shape),
            cache_NBKD,
            cache_NBKD.clone(),
            torch.tensor(slots),
        )
    assert not cache_NBKD.any()


# Registration.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_opcheck(dtype: torch.dtype, softcap: float) -> None:
    case = dataclasses.replace(PLAIN, dtype=dtype, softcap=softcap)
    q_THD, k_TKD, v_TKD = make_qkv(case)
    paged = make_paged(case)
    write = (k_TKD, v_TKD, paged.k_cache_NBKD, paged.v_cache_NBKD, paged.slots_T)
    kv_cache_write(*write)  # opcheck compares outputs, and NaN is not equal to itself
    paged.k_cache_NBKD.nan_to_num_()
    paged.v_cache_NBKD.nan_to_num_()
    lengths = cu_seqlens(case.q_lens), cu_seqlens(case.kv_lens)
    window = [3, -1]
    torch.library.opcheck(
        torch.ops.minigen.varlen_attention.default,
        (q_THD, k_TKD, v_TKD, *lengths, True, None, window, softcap, False),
    )
    torch.library.opcheck(
        torch.ops.minigen.paged_attention.default,
        (q_THD, *write[2:4], lengths[0], *paged[2:4], 0.3, window, softcap, True, False, False),
    )
    torch.library.opcheck(torch.ops.minigen.kv_cache_write.default, write)


def decode_step(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    k_cache_NBKD: Tensor,
    v_cache_NBKD: Tensor,
    cu_seqlens_q: Tensor,
    kv_lens_S: Tensor,
    block_table_SW: Tensor,
    slots_T: Tensor,
) -> tuple[Tensor, Tensor]:
    kv_cache_write(k_TKD * 2, v_TKD, k_cache_NBKD, v_cache_NBKD, slots_T)
    out_THD = paged_attention(
        q_THD + 1, k_cache_NBKD, v_cache_NBKD, cu_seqlens_q, kv_lens_S, block_table_SW
    )
    packed_THD, _ = varlen_attention(q_THD, k_TKD, v_TKD, cu_seqlens_q, cu_seqlens_q)
    return out_THD * 3, packed_THD + 1


def step_arguments(lengths: tuple[int, ...], seed: int) -> tuple[Tensor, ...]:
    case = dataclasses.replace(PLAIN, q_lens=lengths, kv_lens=lengths, seed=seed)
    q_THD, k_TKD, v_TKD = make_qkv(case)
    # Fixed by the engine: the cache and the table's width. Dynamic: tokens and sequences.
    k_cache_NBKD, v_cache_NBKD = (torch.zeros(37, 16, 2, 8) for _ in "kv")
    block_table_SW = torch.arange(len(lengths) * 4, dtype=torch.int32).view(-1, 4)
    slots_T = torch.cat([torch.arange(n) + 64 * seq for seq, n in enumerate(lengths)])
    kv_lens_S = torch.tensor(lengths, dtype=torch.int32)
    offsets = cu_seqlens(lengths)
    for tensor in (q_THD, k_TKD, v_TKD, slots_T, kv_lens_S, block_table_SW):
        torch._dynamo.mark_dynamic(tensor, 0, min=2, max=4096)
    torch._dynamo.mark_dynamic(offsets, 0, min=3, max=4097)  # one more than there are sequences
    return (
        q_THD,
        k_TKD,
        v_TKD,
        k_cache_NBKD,
        v_cache_NBKD,
        offsets,
        kv_lens_S,
        block_table_SW,
        slots_T,
    )


@pytest.mark.usefixtures("cold_compiler")
def test_one_compilation_for_every_mix_of_lengths() -> None:
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(decode_step, backend=counter, fullgraph=True)
    for seed, lengths in enumerate([(5, 3), (1, 1), (1, 1, 1), (2, 1, 1), (0, 60, 9), (1,) * 9]):
        eager_arguments, arguments = step_arguments(lengths, seed), step_arguments(lengths, seed)
        expected = decode_step(*eager_arguments)
        for actual_THD, expected_THD in zip(compiled(*arguments), expected, strict=True):
            torch.testing.assert_close(actual_THD, expected_THD)
        assert torch.equal(arguments[3], eager_arguments[3])  # the cache was written in place
    assert counter.frame_count == 1


def largest_buffer(code: str) -> int:
    """Elements of the largest buffer of fixed size that the generated code makes."""
    sizes = re.findall(r"empty_strided\w*\(\(([\d, ]+)\)", code)
    return max((math.prod(int(n) for n in re.findall(r"\d+", size)) for size in sizes), default=0)


@pytest.mark.usefixtures("cold_compiler")
@pytest.mark.parametrize("one_allocation", [False, True])
def test_compiled_step_copies_no_cache(one_allocation: bool) -> None:
    """Fails as it should where k and v are views of one tensor: those the compiler copies."""
    arguments = list(step_arguments((5, 3), 0))
    if one_allocation:
        arguments[3:5] = torch.zeros(2, *arguments[3].shape)
    compiled = torch.compile(decode_step, fullgraph=True)
    _, (code,) = run_and_get_code(compiled, *arguments)
    assert "minigen.kv_cache_write" in code
    assert (largest_buffer(code) >= arguments[3].numel()) == one_allocation


def test_triton_kernels_in_the_interpreter() -> None:
    """The GPU tests, small, with Triton's interpreter in place of the GPU.

    A process of its own: Triton reads the variable once, when it is imported. Gluon has none.
    """
    pytest.importorskip("triton")
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider"]
    finished = subprocess.run(
        [*command, "-k", "not registered and not gluon", "tests/test_gpu_kernels.py"],
        cwd=root,
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-2000:]
    assert " passed" in finished.stdout
    assert "skipped" not in finished.stdout


def test_attention_starts_early_only_beside_lengths_that_are_not_copied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What copies them is the kernel before, which an early start would not wait for."""
    module = importlib.import_module("minigen.kernels.paged_attention")
    early: list[bool] = []
    monkeypatch.setattr(module, "paged_attention_triton", lambda *_, pdl, **__: early.append(pdl))
    monkeypatch.setattr(module, "has_dependent_launch", lambda device: True)
    q_THD, cache_NBKD = torch.zeros(2, 4, 8), torch.zeros(1, 4, 2, 8)
    offsets, kv_lens = (torch.arange(n, dtype=torch.int32) for n in (3, 2))
    table = torch.zeros(2, 1, dtype=torch.int32)

    def starts_early(offsets: Tensor, kv_lens: Tensor, pdl: bool = True) -> bool:
        lengths = offsets, kv_lens, table
        module._cuda(q_THD, cache_NBKD, cache_NBKD, *lengths, None, (-1, -1), 0.0, True, False, pdl)
        return early.pop()

    assert starts_early(offsets, kv_lens)
    assert not starts_early(offsets, kv_lens, pdl=False)
    assert not starts_early(offsets.repeat_interleave(2)[::2], kv_lens)
    assert not starts_early(offsets, kv_lens.repeat_interleave(2)[::2])
