"""Random problems for the fused kernels of a decode step, and their answers in float64.

Shapes: T packed tokens, H query heads, K key/value heads, X = H + 2K, D head dim, R rotated part of
D, P rows of the rope tables, N cache blocks, B tokens a block.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor


@dataclass(frozen=True)
class RopeCase:
    """One call of rope_cache_write. `padding` elements lie between the tokens' rows."""

    num_tokens: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    has_norm: bool
    rotates: bool
    dtype: torch.dtype
    padding: int
    seed: int
    has_positions: bool = True
    parts: int = 0


@st.composite
def rope_cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...], most_tokens: int) -> RopeCase:
    num_kv_heads = draw(st.sampled_from([1, 2, 3, 8]))
    head_dim = draw(st.sampled_from([2, 16, 40, 64, 80, 96, 128, 256]))
    return RopeCase(
        num_tokens=draw(st.sampled_from([0, 1, 2]) | st.integers(0, most_tokens)),
        num_q_heads=num_kv_heads * draw(st.sampled_from([1, 2, 3, 8])),
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rotary_dim=2 * draw(st.just(head_dim // 2) | st.integers(1, head_dim // 2)),
        has_norm=draw(st.booleans()),
        rotates=draw(st.sampled_from([True, True, False])),
        dtype=draw(st.sampled_from(dtypes)),
        padding=draw(st.sampled_from([0, 0, 8, 3])),
        seed=draw(st.integers(0, 2**31)),
        has_positions=draw(st.booleans()),
        parts=draw(st.sampled_from([0, 0, 1, 2, 4])),
    )


class RopeProblem(NamedTuple):
    """The operation's arguments in its order, up to `rotates`; the caches hold NaN."""

    qkv_TXD: Tensor
    q_weight_D: Tensor | None
    k_weight_D: Tensor | None
    eps: float
    cos_PR: Tensor
    sin_PR: Tensor
    positions_T: Tensor | None
    k_cache_NBKD: Tensor
    v_cache_NBKD: Tensor
    slots_T: Tensor
    rotates: bool


def make_rope_problem(case: RopeCase, device: str = "cpu") -> RopeProblem:
    generator = torch.Generator().manual_seed(case.seed)
    tokens, dim = case.num_tokens, case.head_dim
    heads = case.num_q_heads + 2 * case.num_kv_heads
    # Rows of very different sizes, so that a norm over the wrong ones shows.
    rows = torch.randn(tokens, heads * dim + case.padding, generator=generator)
    rows *= torch.randint(1, 9, (tokens, 1), generator=generator)
    weights = 1 + torch.randn(2, dim, generator=generator)
    num_rows = 3 * tokens + 5 if case.has_positions else tokens
    angle_PR = torch.rand(num_rows, case.rotary_dim // 2, generator=generator) * 6.28
    positions_T = torch.randint(max(num_rows, 1), (tokens,), generator=generator)
    shape = (tokens // 4 + 2, 4, case.num_kv_heads, dim)
    slots_T = torch.randperm(shape[0] * 4, generator=generator)[:tokens]
    slots_T[torch.rand(tokens, generator=generator) < 0.2] = -1
    q_weight_D, k_weight_D = weights.to(device, case.dtype) if case.has_norm else (None, None)
    qkv_TXD = rows.to(device, case.dtype)[:, : heads * dim].unflatten(1, (heads, dim))
    if case.parts:
        # Of one sign, so that their sum in float32 is as exact as they are.
        share = torch.rand(case.parts, *qkv_TXD.shape, generator=generator).to(device)
        qkv_TXD = (share / share.sum(0) * qkv_TXD.float()).contiguous()
    return RopeProblem(
        qkv_TXD,
        q_weight_D,
        k_weight_D,
        1e-6,
        # As longrope has it, the tables carry a scale.
        (1.2 * angle_PR.cos()).to(device),
        (1.2 * angle_PR.sin()).to(device),
        positions_T.to(device) if case.has_positions else None,
        torch.full(shape, torch.nan, dtype=case.dtype, device=device),
        torch.full(shape, torch.nan, dtype=case.dtype, device=device),
        slots_T.to(device),
        case.rotates,
    )


class RopeExpected(NamedTuple):
    """In float64, with what rounding may add; caches as they are after the call."""

    q_THD: Tensor
    q_error_THD: Tensor
    k_cache_NBKD: Tensor
    k_error_NBKD: Tensor
    v_cache_NBKD: Tensor
    v_error_NBKD: Tensor


def rope_reference(case: RopeCase, problem: RopeProblem) -> RopeExpected:
    """Token by token and head by head, in float64 on the CPU."""
    qkv = problem.qkv_TXD.cpu().double()
    half = case.rotary_dim // 2 if case.rotates else 0
    unit = torch.finfo(case.dtype).eps / 2 + 8 * torch.finfo(torch.float32).eps
    if case.parts:
        qkv = qkv.sum(0)
    # What is only copied is exact, a sum is not.
    out, error = qkv.clone(), unit * qkv.abs() if case.parts else torch.zeros_like(qkv)
    num_q, num_kv = case.num_q_heads, case.num_kv_heads
    for token in range(case.num_tokens):
        positions_T = problem.positions_T
        position = token if positions_T is None else int(positions_T[token])
        cos_R, sin_R = (x[position].cpu().double() for x in (problem.cos_PR, problem.sin_PR))
        for head in range(num_q + num_kv):
            x_D, error_D = qkv[token, head], error[token, head]
            weight_D = problem.q_weight_D if head < num_q else problem.k_weight_D
            if weight_D is not None:
                x_D = x_D / (x_D.pow(2).mean() + problem.eps).sqrt() * weight_D.cpu().double()
                error_D = unit * x_D.abs()
            if half:
                a_R, b_R = x_D[:half], x_D[half : 2 * half]
                size_a = a_R.abs() * cos_R.abs() + b_R.abs() * sin_R.abs()
                size_b = b_R.abs() * cos_R.abs() + a_R.abs() * sin_R.abs()
                turned_D = torch.cat([a_R * cos_R - b_R * sin_R, b_R * cos_R + a_R * sin_R])
                # Of the norm's rounding, where there is one, then of the rotation's own.
                before = unit if weight_D is not None else 8 * torch.finfo(torch.float32).eps
                turned_error = before * torch.cat([size_a, size_b]) + unit * turned_D.abs()
                x_D = torch.cat([turned_D, x_D[2 * half :]])
                error_D = torch.cat([turned_error, error_D[2 * half :]])
            out[token, head], error[token, head] = x_D, error_D
    k_cache, v_cache = (x.cpu().double() for x in (problem.k_cache_NBKD, problem.v_cache_NBKD))
    k_error, v_error = torch.zeros_like(k_cache), torch.zeros_like(v_cache)
    for token, slot in enumerate(problem.slots_T.tolist()):
        if slot >= 0:
            k_cache[slot // 4, slot % 4] = out[token, num_q : num_q + num_kv]
            k_error[slot // 4, slot % 4] = error[token, num_q : num_q + num_kv]
            v_cache[slot // 4, slot % 4] = out[token, num_q + num_kv :]
            v_error[slot // 4, slot % 4] = error[token, num_q + num_kv :]
    return RopeExpected(out[:, :num_q], error[:, :num_q], k_cache, k_error, v_cache, v_error)


@dataclass(frozen=True)
class LinearCase:
    """One call of few_rows_linear. `padding` elements lie between the rows of x and residual."""

    num_rows: int
    num_inputs: int
    num_outputs: int
    has_bias: bool
    has_residual: bool
    has_norm: bool
    norm_offset: float
    activation: str
    dtype: torch.dtype
    padding: int
    seed: int


@st.composite
def linear_cases(
    draw: st.DrawFn, dtypes: tuple[torch.dtype, ...], most: int, in_tiles: bool = False
) -> LinearCase:
    """At most `most` inputs; `in_tiles`: as many rows as tensor cores take, in any dtype."""
    sizes = [size for size in (1, 2, 31, 32, 33, 127, 128, 129, 1024, 3072) if size <= most]
    dtype = draw(st.sampled_from(dtypes))
    rows = st.integers(0, 8)
    if in_tiles or dtype.itemsize == 2:
        rows |= st.sampled_from([9, 15, 16])
    return LinearCase(
        num_rows=draw(rows),
        num_inputs=draw(st.sampled_from(sizes) | st.integers(1, most)),
        num_outputs=draw(st.sampled_from([1, 3, 4, 5, 16]) | st.integers(1, 40)),
        has_bias=draw(st.booleans()),
        has_residual=draw(st.booleans()),
        has_norm=draw(st.booleans()),
        norm_offset=draw(st.sampled_from([0.0, 1.0])),
        activation=draw(st.sampled_from(["", "silu", "gelu_tanh"])),
        dtype=dtype,
        padding=draw(st.sampled_from([0, 0, 8, 3])),
        seed=draw(st.integers(0, 2**31)),
    )


class LinearProblem(NamedTuple):
    """The operation's arguments in its order, up to `activation`."""

    x_TE: Tensor
    weight_GE: Tensor
    bias_G: Tensor | None
    residual_TF: Tensor | None
    norm_weight_E: Tensor | None
    eps: float
    norm_offset: float
    activation: str


def make_linear_problem(case: LinearCase, device: str = "cpu") -> LinearProblem:
    generator = torch.Generator().manual_seed(case.seed)
    rows, inputs, outputs = case.num_rows, case.num_inputs, case.num_outputs
    weight_rows = outputs * (2 if case.activation else 1)

    def normal(*shape: int, scale: float = 1.0, padding: int = 0) -> Tensor:
        x = scale * torch.randn(*shape[:-1], shape[-1] + padding, generator=generator)
        return x.to(device, case.dtype)[..., : shape[-1]]

    bias_G, norm_weight_E = normal(weight_rows), normal(inputs)
    residual_TF = normal(rows, outputs, padding=case.padding)
    x_TE = normal(rows, inputs, padding=case.padding)
    # Rows of different sizes, so that a norm over the wrong one shows.
    x_TE *= torch.arange(1, rows + 1, device=device)[:, None] / 4
    return LinearProblem(
        x_TE,
        normal(weight_rows, inputs, scale=inputs**-0.5),
        bias_G if case.has_bias else None,
        residual_TF if case.has_residual else None,
        norm_weight_E if case.has_norm else None,
        1e-5,
        case.norm_offset,
        case.activation,
    )


def linear_reference(
    case: LinearCase, problem: LinearProblem, in_tiles: bool = False
) -> tuple[Tensor, Tensor]:
    """The answer in float64, and how far float32 and one rounding to the dtype may be from it.

    `in_tiles`: tensor cores multiply, which take a normed x that is rounded to the dtype.
    """
    wide_eps = torch.finfo(torch.float32).eps
    x_TE, weight_GE = problem.x_TE.cpu().double(), problem.weight_GE.cpu().double()
    if problem.norm_weight_E is not None:
        g_E = problem.norm_weight_E.cpu().double() + case.norm_offset
        x_TE = x_TE / (x_TE.pow(2).mean(-1, keepdim=True) + problem.eps).sqrt() * g_E
    out = x_TE @ weight_GE.T
    # A lane adds up a 32nd of a row's products, one after the other, then come a few sums of lanes.
    product_error = (case.num_inputs / 32 + 16) * wide_eps
    if in_tiles:
        # Their sums go on from one step of 16 inputs to the next, and may cut off what they drop.
        product_error = (case.num_inputs / 16 + 16) * 2 * wide_eps
        if problem.norm_weight_E is not None:
            product_error += torch.finfo(case.dtype).eps / 2
    error = product_error * (x_TE.abs() @ weight_GE.abs().T)
    if problem.bias_G is not None:
        out = out + problem.bias_G.cpu().double()
    if case.activation:
        (gate, up), (gate_error, up_error) = out.chunk(2, -1), error.chunk(2, -1)
        is_silu = case.activation == "silu"
        functional = torch.nn.functional
        active = functional.silu(gate) if is_silu else functional.gelu(gate, approximate="tanh")
        # Neither activation is steeper than 1.13. Theirs is an exponential of the argument's cube.
        active_error = 1.13 * gate_error + wide_eps * (8 + gate.abs() ** 3) * active.abs()
        out, error = active * up, active_error * up.abs() + active.abs() * up_error
    if problem.residual_TF is not None:
        out = out + problem.residual_TF.cpu().double()
    return out, error + (torch.finfo(case.dtype).eps / 2 + 4 * wide_eps) * (out.abs() + error)


@dataclass(frozen=True)
class SumNormCase:
    num_rows: int
    num_inputs: int
    parts: int
    norm_offset: float
    dtype: torch.dtype
    seed: int


@st.composite
def sum_norm_cases(
    draw: st.DrawFn, dtypes: tuple[torch.dtype, ...], most_inputs: int
) -> SumNormCase:
    return SumNormCase(
        num_rows=draw(st.integers(0, 9)),
        num_inputs=draw(st.sampled_from([1, 31, 128, 129]) | st.integers(1, most_inputs)),
        parts=draw(st.sampled_from([0, 1, 2, 4, 8])),
        norm_offset=draw(st.sampled_from([0.0, 1.0])),
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(st.integers(0, 2**31)),
    )


class SumNormProblem(NamedTuple):
    """The operation's arguments in its order, up to `norm_offset`."""

    x_TE: Tensor
    part_PTE: Tensor
    norm_weight_E: Tensor
    eps: float
    norm_offset: float


def make_sum_norm_problem(case: SumNormCase, device: str = "cpu") -> SumNormProblem:
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    rows_T = torch.arange(1, case.num_rows + 1)[:, None] / 4  # of different sizes
    return SumNormProblem(
        (normal(case.num_rows, case.num_inputs) * rows_T).to(device, case.dtype),
        normal(case.parts, case.num_rows, case.num_inputs).to(device),
        normal(case.num_inputs).to(device, case.dtype),
        1e-5,
        case.norm_offset,
    )


def sum_norm_reference(problem: SumNormProblem) -> tuple[tuple[Tensor, Tensor], ...]:
    """Sum and norm in float64, each with how far float32 and one rounding may be from it."""
    wide_eps, eps = torch.finfo(torch.float32).eps, torch.finfo(problem.x_TE.dtype).eps
    x_TE, part_PTE = problem.x_TE.cpu().double(), problem.part_PTE.cpu().double()
    sum_TE = x_TE + part_PTE.sum(0)
    sum_error = len(part_PTE) * wide_eps * (x_TE.abs() + part_PTE.abs().sum(0))
    mean_square_T1 = sum_TE.pow(2).mean(-1, keepdim=True) + problem.eps
    g_E = problem.norm_weight_E.cpu().double() + problem.norm_offset
    norm_TE = sum_TE / mean_square_T1.sqrt() * g_E
    # An error of the sums moves the root mean square by its own mean at most.
    moved_T1 = sum_error.pow(2).mean(-1, keepdim=True).sqrt() / mean_square_T1.sqrt()
    norm_error = sum_error / mean_square_T1.sqrt() * g_E.abs()
    norm_error += (moved_T1 + (x_TE.shape[1] / 32 + 16) * wide_eps) * norm_TE.abs()
    return (
        (sum_TE, sum_error + (eps / 2 + wide_eps) * (sum_TE.abs() + sum_error)),
        (norm_TE, norm_error + (eps / 2 + wide_eps) * (norm_TE.abs() + norm_error)),
    )
