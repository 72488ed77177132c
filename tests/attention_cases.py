"""Random attention problems and the oracle for them, for the CPU, interpreter and GPU tests.

Shapes: T packed tokens, S sequences, H query heads, K key/value heads, D head dim, N cache blocks,
B tokens a block, W width of the block table, Q queries and L keys of one sequence.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

TILE_EDGES = (0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)


@dataclass(frozen=True)
class Case:
    """One call: lengths of the packed sequences, heads, masks and dtype."""

    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    causal: bool
    window_size: tuple[int, int]
    softcap: float
    scale: float
    block_size: int
    seed: int


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...], max_len: int = 400) -> Case:
    edges = [edge for edge in TILE_EDGES if edge <= max_len]
    lengths = st.sampled_from(edges) | st.integers(0, max_len)
    q_lens = tuple(draw(st.lists(lengths, min_size=1, max_size=4)))
    # Keys: as many as queries (a prefill), more (a chunk, a decode), or anything, fewer included.
    kv_lens = tuple(
        draw(st.just(q_len) | st.integers(q_len, max_len) | lengths) for q_len in q_lens
    )
    num_kv_heads = draw(st.sampled_from([1, 2, 3]))
    head_dim = draw(st.sampled_from([8, 16, 40, 64, 80, 96, 128, 256]))
    side = st.sampled_from([-1, 0, 1, 15, 64, 200]) | st.integers(0, 100)
    return Case(
        q_lens=q_lens,
        kv_lens=kv_lens,
        num_heads=num_kv_heads * draw(st.sampled_from([1, 2, 3, 5, 8])),
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=draw(st.sampled_from(dtypes)),
        causal=draw(st.booleans()),
        window_size=draw(st.just((-1, -1)) | st.tuples(side, side)),
        softcap=draw(st.sampled_from([0.0, 0.0, 2.0, 50.0])),
        scale=draw(st.sampled_from([head_dim**-0.5, 0.5])),
        block_size=draw(st.sampled_from([1, 16, 24])),
        seed=draw(st.integers(0, 2**31)),
    )


def cu_seqlens(lengths: tuple[int, ...], device: str = "cpu") -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int().to(device)


def make_qkv(case: Case, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(case.seed)

    def normal(num_tokens: int, num_heads: int) -> Tensor:
        x_THD = torch.randn(num_tokens, num_heads, case.head_dim, generator=generator)
        return x_THD.to(device, case.dtype)

    num_keys = sum(case.kv_lens)
    return (
        normal(sum(case.q_lens), case.num_heads),
        normal(num_keys, case.num_kv_heads),
        normal(num_keys, case.num_kv_heads),
    )


class Paged(NamedTuple):
    """An unwritten cache (all NaN), shuffled block tables, and the slots of every key."""

    k_cache_NBKD: Tensor
    v_cache_NBKD: Tensor
    kv_lens_S: Tensor
    block_table_SW: Tensor
    slots_T: Tensor


def make_paged(case: Case, device: str = "cpu") -> Paged:
    size = case.block_size
    counts = [-(-kv_len // size) for kv_len in case.kv_lens]
    shape = (sum(counts) + 3, size, case.num_kv_heads, case.head_dim)
    shuffled = torch.randperm(shape[0], generator=torch.Generator().manual_seed(case.seed)).tolist()
    # What lies beyond a sequence's blocks is never to be followed: it points nowhere.
    block_table_SW = torch.full((len(counts), max(counts) + 2), 2**30, dtype=torch.int32)
    slots: list[int] = []
    for seq, (count, kv_len) in enumerate(zip(counts, case.kv_lens, strict=True)):
        blocks = [shuffled.pop() for _ in range(count)]
        block_table_SW[seq, :count] = torch.tensor(blocks, dtype=torch.int32)
        slots += [blocks[key // size] * size + key % size for key in range(kv_len)]
    return Paged(
        torch.full(shape, torch.nan, dtype=case.dtype, device=device),
        torch.full(shape, torch.nan, dtype=case.dtype, device=device),
        torch.tensor(case.kv_lens, dtype=torch.int32, device=device),
        block_table_SW.to(device),
        torch.tensor(slots, dtype=torch.int64, device=device),
    )


class Expected(NamedTuple):
    """The answer in float64, and how far rounding may take the dtype from it."""

    out_THD: Tensor
    lse_HT: Tensor
    out_error_THD: Tensor
    lse_error_HT: Tensor


def reference(case: Case, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Expected:
    """Attention by its definition: sequence by sequence, in float64 on the CPU."""
    parts = [
        _reference_of_one(case, q_QHD, k_LKD, v_LKD)
        for q_QHD, k_LKD, v_LKD in zip(
            q_THD.cpu().split(case.q_lens),
            k_TKD.cpu().split(case.kv_lens),
            v_TKD.cpu().split(case.kv_lens),
            strict=True,
        )
    ]
    outs, lses, out_errors, lse_errors = zip(*parts, strict=True)
    return Expected(
        torch.cat(outs), torch.cat(lses, 1), torch.cat(out_errors), torch.cat(lse_errors, 1)
    )


def _reference_of_one(case: Case, q_QHD: Tensor, k_LKD: Tensor, v_LKD: Tensor) -> Expected:
    group = case.num_heads // case.num_kv_heads
    q_QHD = q_QHD.double()
    k_LHD, v_LHD = (x.double().repeat_interleave(group, 1) for x in (k_LKD, v_LKD))
    score_HQL = torch.einsum("qhd,lhd->hql", q_QHD, k_LHD) * case.scale
    if case.softcap:
        score_HQL = case.softcap * torch.tanh(score_HQL / case.softcap)
    visible_QL = visible(case, len(q_QHD), len(k_LHD))
    lse_HQ = score_HQL.masked_fill(~visible_QL, -torch.inf).logsumexp(-1)
    weight_HQL = torch.where(visible_QL, torch.exp(score_HQL - lse_HQ.unsqueeze(-1)), 0.0)
    out_QHD = torch.einsum("hql,lhd->qhd", weight_HQL, v_LHD)

    # Rounding. A score is a float32 dot product, off by a few float32 eps times the sum of its
    # terms' sizes (and, capped, of the cap); that is the relative error of a weight. Weights and
    # outputs are then rounded to the dtype once each.
    eps = torch.finfo(case.dtype).eps
    wide_eps = torch.finfo(torch.promote_types(case.dtype, torch.float32)).eps
    size_HQL = torch.einsum("qhd,lhd->hql", q_QHD.abs(), k_LHD.abs()) * case.scale
    size_HQ = size_HQL.amax(-1) if len(k_LHD) else torch.zeros_like(lse_HQ)
    score_error_HQ = wide_eps * (8 + 4 * size_HQ + 4 * case.softcap)
    magnitude_QHD = torch.einsum("hql,lhd->qhd", weight_HQL, v_LHD.abs())
    out_error_QHD = (2 * eps + score_error_HQ.T.unsqueeze(-1)) * magnitude_QHD
    lse_error_HQ = eps + score_error_HQ + wide_eps * lse_HQ.abs().nan_to_num(posinf=0.0)
    return Expected(out_QHD, lse_HQ, out_error_QHD, lse_error_HQ)


def visible(case: Case, num_queries: int, num_keys: int) -> Tensor:
    """`[Q, L]`: query i stands at key i + L - Q, and sees its window, and nothing later."""
    position_Q1 = torch.arange(num_queries).unsqueeze(1) + num_keys - num_queries
    distance_QL = torch.arange(num_keys) - position_Q1
    left, right = case.window_size
    visible_QL = torch.ones(num_queries, num_keys, dtype=torch.bool)
    if left >= 0:
        visible_QL &= distance_QL >= -left
    if right >= 0:
        visible_QL &= distance_QL <= right
    if case.causal:
        visible_QL &= distance_QL <= 0
    return visible_QL


def assert_within(actual: Tensor, expected: Tensor, error: Tensor) -> None:
    """Every element within its own bound; infinities must be the same ones."""
    actual = actual.cpu().double()
    assert actual.shape == expected.shape
    finite = expected.isfinite()
    assert torch.equal(actual[~finite], expected[~finite])
    excess = ((actual - expected).abs() - error)[finite]
    # `not <=` so that a NaN fails too; subnormal half floats are as coarse as 6e-8.
    assert excess.numel() == 0 or bool((excess <= 1e-7).all()), f"beyond bound by {excess.max()}"
