"""minigen::few_rows_linear: a linear layer for the few rows of a small decode step, with what is
around it: the norm before, the gated activation or the residual after.

At 2 rows cuBLAS takes (us a call, H200, bf16, by its inputs -> outputs; in brackets what reading
the weight takes at full bandwidth): 1024 -> 4096 5.2 (2.1), 2048 -> 1024 9.9 (1.1), 1024 -> 6144
5.2 (3.1), 3072 -> 1024 6.6 (1.6). Its tiles are made for tensor cores and leave most
multiprocessors without work. Here a program holds a few whole rows of the weight in registers, so
that all of it is on its way at once, and multiplies them on plain arithmetic units by one row of x
after another. By reckoning 8 rows take these units as long as reading the weight takes (1.1 us of
multiply-adds for 4096 x 1024, and about as much around them), so that is the most; from 5 on
`few_rows_dot` multiplies 16-bit numbers on tensor cores.

Shapes: T packed tokens, E inputs, F outputs, G rows of the weight (F, or 2F with an activation).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from minigen.kernels.checks import check_few_rows_linear
from minigen.kernels.cpu import gated_linear, rms_norm
from minigen.kernels.dependent_launch import (
    has_dependent_launch,
    launch_options,
    wait_for_predecessor,
)
from minigen.kernels.few_rows_dot import (
    MAX_CHUNKS,
    MAX_DOT_INPUTS,
    MAX_DOT_ROWS,
    DotTile,
    few_rows_dot_triton,
    gated,
)
from minigen.kernels.tiles import on_device_of, power_of_two
from minigen.kernels.triton_import import tl, triton

PLAIN_ROWS, MAX_PLAIN_ROWS = 4, 8  # on plain units by choice, and at most
MAX_INPUTS = 16384  # wider rows would not fit the registers of eight warps


def few_rows_linear(
    x_TE: Tensor,
    weight_GE: Tensor,
    bias_G: Tensor | None = None,
    residual_TF: Tensor | None = None,
    norm_weight_E: Tensor | None = None,
    eps: float = 0.0,
    norm_offset: float = 0.0,
    activation: str = "",
    pdl: bool = False,
) -> Tensor:
    """residual + activation(norm(x) @ weight.T + bias): [T, F] in the dtype of x.

    On a GPU all of it is float32 and rounded once, at the end; for the rows that go to tensor cores
    the norm's output is rounded, too. The separate operations also round the product, the
    activation and the sum to the dtype, so that their results differ from this by a few units in
    the last place, and are those farther from exact. (Up to 4 rows the root mean square, one number
    a row, is divided out of the sum of products.)

    Args:
        x_TE: float16, bfloat16 or float32 (on the CPU also float64), on a GPU at most 8 rows
            of 16,384, in 16 bits also 16 of 4,096.
        weight_GE: contiguous, dtype of x. `bias_G`, `residual_TF`: of this dtype, too.
        norm_weight_E: weight of an RMS norm of x (arXiv 1910.07467), which `norm_offset` is added
            to (Gemma stores weight - 1) and whose `eps` this is; None for no norm.
        activation: "" for none; "silu" and "gelu_tanh" take the first half of the weight's rows for
            the gate and the second for what it is multiplied by: activation(gate) * up.
        pdl: start while the kernel before still runs, where the GPU can (sm_90
            and later). It may write x and the residual, but no weight: see `dependent_launch`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown activation.
    """
    return torch.ops.minigen.few_rows_linear(
        x_TE, weight_GE, bias_G, residual_TF, norm_weight_E, eps, norm_offset, activation, pdl
    )


@torch.library.custom_op("minigen::few_rows_linear", mutates_args=(), device_types="cpu")
def _cpu(
    x_TE: Tensor,
    weight_GE: Tensor,
    bias_G: Tensor | None,
    residual_TF: Tensor | None,
    norm_weight_E: Tensor | None,
    eps: float,
    norm_offset: float,
    activation: str,
    pdl: bool,
) -> Tensor:
    check_few_rows_linear(x_TE, weight_GE, bias_G, residual_TF, norm_weight_E, activation)
    if norm_weight_E is not None:
        x_TE = rms_norm(x_TE, norm_weight_E, eps, norm_offset)
    out = gated_linear(x_TE, weight_GE, bias_G, activation)
    return out if residual_TF is None else residual_TF + out


@_cpu.register_fake
def _fake(
    x_TE: Tensor,
    weight_GE: Tensor,
    bias_G: Tensor | None,
    residual_TF: Tensor | None,
    norm_weight_E: Tensor | None,
    eps: float,
    norm_offset: float,
    activation: str,
    pdl: bool,
) -> Tensor:
    check_few_rows_linear(x_TE, weight_GE, bias_G, residual_TF, norm_weight_E, activation)
    return x_TE.new_empty(x_TE.shape[0], weight_GE.shape[0] // (2 if activation else 1))


@_cpu.register_kernel("cuda")
def _cuda(
    x_TE: Tensor,
    weight_GE: Tensor,
    bias_G: Tensor | None,
    residual_TF: Tensor | None,
    norm_weight_E: Tensor | None,
    eps: float,
    norm_offset: float,
    activation: str,
    pdl: bool,
) -> Tensor:
    check_few_rows_linear(x_TE, weight_GE, bias_G, residual_TF, norm_weight_E, activation)
    pdl = pdl and has_dependent_launch(x_TE.device)
    return few_rows_linear_triton(
        x_TE, weight_GE, bias_G, residual_TF, norm_weight_E, eps, norm_offset, activation, pdl
    )


def multiplies_tiles(num_rows: int, num_inputs: int, dtype: torch.dtype) -> bool:
    """Whether x of this shape goes to the tensor cores."""
    few = PLAIN_ROWS < num_rows <= MAX_DOT_ROWS
    return few and num_inputs <= MAX_DOT_INPUTS and dtype.itemsize == 2


class LinearTile(NamedTuple):
    """Outputs that a program computes, and its warps."""

    block_f: int
    num_warps: int


def choose_linear_tile(num_outputs: int, num_inputs: int, has_activation: bool) -> LinearTile:
    """By reckoning: a thread holds 64 or 128 elements of the weight, and each of a GPU's 132
    multiprocessors gets three programs or more, which wait for memory in turns. Two outputs or more
    a program share the work that a row of x makes."""
    block_e = power_of_two(num_inputs)
    num_warps = min(max(block_e // 1024, 1), 8)
    held = block_e // (32 * num_warps) * (2 if has_activation else 1)
    block_f = max(128 // held, 1) if held >= 8 else 16
    while block_f > 1 and num_outputs // block_f < 3 * 132:
        block_f //= 2
    return LinearTile(min(block_f, 16), num_warps)


def few_rows_linear_triton(
    x_TE: Tensor,
    weight_GE: Tensor,
    bias_G: Tensor | None = None,
    residual_TF: Tensor | None = None,
    norm_weight_E: Tensor | None = None,
    eps: float = 0.0,
    norm_offset: float = 0.0,
    activation: str = "",
    pdl: bool = False,
    tile: LinearTile | DotTile | None = None,
) -> Tensor:
    """Launches the kernel on checked arguments: on a GPU, or on the CPU in Triton's interpreter.

    `pdl` needs a GPU of sm_90 or later. `tile` is chosen by size unless given, and says which
    kernel it is for. Raises ValueError for more rows or inputs than the kernels take.
    """
    num_rows, num_inputs = x_TE.shape
    if tile is None:
        in_tiles = multiplies_tiles(num_rows, num_inputs, x_TE.dtype)
    else:
        in_tiles = isinstance(tile, DotTile)
    most_rows, most_inputs = MAX_PLAIN_ROWS, MAX_INPUTS
    if in_tiles:
        most_rows, most_inputs = MAX_DOT_ROWS, MAX_DOT_INPUTS
        if isinstance(tile, DotTile):
            most_inputs = MAX_CHUNKS * tile.block_e
    if num_rows > most_rows or num_inputs > most_inputs:
        raise ValueError(
            f"few_rows_linear takes {MAX_PLAIN_ROWS} rows of {MAX_INPUTS} at most, or "
            f"{MAX_DOT_ROWS} of {MAX_DOT_INPUTS} in 16 bits, but x has shape "
            f"{tuple(x_TE.shape)} and is {x_TE.dtype}: use linear"
        )
    if x_TE.stride(1) != 1:
        x_TE = x_TE.contiguous()
    if residual_TF is not None and residual_TF.stride(1) != 1:
        residual_TF = residual_TF.contiguous()
    num_outputs = weight_GE.shape[0] // (2 if activation else 1)
    out_TF = x_TE.new_empty(num_rows, num_outputs)
    if out_TF.numel() == 0:
        return out_TF
    if in_tiles:
        assert tile is None or isinstance(tile, DotTile)
        few_rows_dot_triton(
            x_TE, weight_GE, bias_G, residual_TF, norm_weight_E, out_TF, eps, norm_offset,
            activation, pdl, tile,
        )  # fmt: skip
        return out_TF
    if not isinstance(tile, LinearTile):
        tile = choose_linear_tile(num_outputs, num_inputs, activation != "")
    with on_device_of(x_TE):
        few_rows_linear_kernel[(-(-num_outputs // tile.block_f),)](
            x_TE,
            weight_GE,
            bias_G,
            residual_TF,
            norm_weight_E,
            out_TF,
            x_TE.stride(0),
            0 if residual_TF is None else residual_TF.stride(0),
            eps,
            norm_offset,
            NUM_ROWS=num_rows,
            NUM_INPUTS=num_inputs,
            NUM_OUTPUTS=num_outputs,
            BLOCK_F=tile.block_f,
            BLOCK_E=power_of_two(num_inputs),
            HAS_BIAS=bias_G is not None,
            HAS_RESIDUAL=residual_TF is not None,
            HAS_NORM=norm_weight_E is not None,
            ACTIVATION=activation,
            num_warps=tile.num_warps,
            **launch_options(pdl),
        )
    return out_TF


@triton.jit
def load_row(ptr, input_E, NUM_INPUTS: tl.constexpr, BLOCK_E: tl.constexpr):
    if NUM_INPUTS == BLOCK_E:
        return tl.load(ptr + input_E)
    else:
        return tl.load(ptr + input_E, mask=input_E < NUM_INPUTS, other=0.0)


@triton.jit
def load_rows(
    ptr, row_F, input_E, NUM_INPUTS: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_E: tl.constexpr
):
    ptr_FE = ptr + row_F[:, None] * NUM_INPUTS + input_E[None, :]
    if NUM_INPUTS == BLOCK_E:
        return tl.load(ptr_FE)
    else:
        return tl.load(ptr_FE, mask=(input_E < NUM_INPUTS)[None, :], other=0.0)


@triton.jit
def few_rows_linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    norm_weight_ptr,
    out_ptr,
    x_stride_t,
    residual_stride_t,
    eps,
    norm_offset,
    NUM_ROWS: tl.constexpr,
    NUM_INPUTS: tl.constexpr,
    NUM_OUTPUTS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_E: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: BLOCK_F outputs of all rows of x."""
    first = tl.program_id(0) * BLOCK_F
    # Behind the last output it is computed again: a mask would be more work in all other programs.
    row_F = tl.minimum(tl.arange(0, BLOCK_F), NUM_OUTPUTS - 1 - first)
    input_E = tl.arange(0, BLOCK_E)
    # In 64 bits: the weight may have more than 2**31 elements.
    rows_ptr = weight_ptr + first.to(tl.int64) * NUM_INPUTS
    w_FE = load_rows(rows_ptr, row_F, input_E, NUM_INPUTS, BLOCK_F, BLOCK_E)
    if ACTIVATION != "":
        up_ptr = rows_ptr + NUM_OUTPUTS * NUM_INPUTS
        up_w_FE = load_rows(up_ptr, row_F, input_E, NUM_INPUTS, BLOCK_F, BLOCK_E)
    if HAS_NORM:
        g_E = load_row(norm_weight_ptr, input_E, NUM_INPUTS, BLOCK_E).to(tl.float32) + norm_offset
    if HAS_BIAS:
        bias_F = tl.load(bias_ptr + first + row_F).to(tl.float32)
        if ACTIVATION != "":
            up_bias_F = tl.load(bias_ptr + NUM_OUTPUTS + first + row_F).to(tl.float32)
    if PDL:
        wait_for_predecessor()

    is_output_F = first + tl.arange(0, BLOCK_F) < NUM_OUTPUTS
    next_x_E = load_row(x_ptr, input_E, NUM_INPUTS, BLOCK_E)
    for t in tl.static_range(NUM_ROWS):  # pyright: ignore[reportGeneralTypeIssues]
        x_E = next_x_E.to(tl.float32)
        if t + 1 < NUM_ROWS:
            # Asked for before the sums below: the compiler moves no load across their barriers.
            next_x_E = load_row(x_ptr + (t + 1) * x_stride_t, input_E, NUM_INPUTS, BLOCK_E)
        scale = 1.0
        if HAS_NORM:
            scale = tl.rsqrt(tl.sum(x_E * x_E, 0) * (1.0 / NUM_INPUTS) + eps)
            x_E *= g_E
        out_F = tl.sum(w_FE.to(tl.float32) * x_E[None, :], 1) * scale
        if HAS_BIAS:
            out_F += bias_F
        if ACTIVATION != "":
            up_F = tl.sum(up_w_FE.to(tl.float32) * x_E[None, :], 1) * scale
            if HAS_BIAS:
                up_F += up_bias_F
            out_F = gated(out_F, up_F, ACTIVATION)
        if HAS_RESIDUAL:
            residual_F = tl.load(residual_ptr + t * residual_stride_t + first + row_F)
            out_F += residual_F.to(tl.float32)
        out_ptr_F = out_ptr + t * NUM_OUTPUTS + first + row_F
        tl.store(out_ptr_F, out_F.to(out_ptr.dtype.element_ty), mask=is_output_F)
