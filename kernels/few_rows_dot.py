"""The kernel of `few_rows_linear` for more rows than plain arithmetic serves: tensor cores.

As the plain kernel, a program holds some whole rows of the weight in registers, asked for all at
once and, launched early, while the kernel before it still runs. They are multiplied in one piece a
warp: each warp takes its part of the inputs, and the parts are added at the end. A norm gets a
kernel of its own: in this one, of whose hundreds of programs each normed all rows, it took 3 us.
(A loop over inputs that brings tiles to shared memory, five of them on their way, took twice as
long: us a call at 8 rows, with what is around the product: 2048 -> 1024 5.6, here 3.0, cuBLAS's
product alone 6.0; 1024 -> 3072 gated, without the norm, 7.4, 5.8, 6.1; 3072 -> 1024 7.5, 4.0, 7.6.)

Shapes: T rows, E inputs, C inputs of a chunk and a warp, B warps, F outputs, G rows of the weight
(F, or 2F with an activation).
"""

from typing import NamedTuple

from torch import Tensor

from minigen.kernels.dependent_launch import launch_options, wait_for_predecessor
from minigen.kernels.sum_norm import norm_rows
from minigen.kernels.tiles import on_device_of, power_of_two
from minigen.kernels.triton_import import tl, triton

MAX_DOT_ROWS = 16  # as many as a tensor core takes at a time
MAX_CHUNKS = 4  # whose weights the kernel names
MAX_DOT_INPUTS = MAX_CHUNKS * 1024


class DotTile(NamedTuple):
    """Outputs of a program, inputs of a chunk, and warps."""

    block_f: int
    block_e: int
    num_warps: int


def choose_dot_tile(num_inputs: int) -> DotTile:
    """The least outputs that a tensor core takes, so that the most multiprocessors have work, in
    chunks of 1,024 inputs, or of less where there are less: the best of eight tiles for each of
    Qwen3-0.6B's four layers (H200)."""
    return DotTile(8, min(max(power_of_two(num_inputs), 64), 1024), 4)


def few_rows_dot_triton(
    x_TE: Tensor,
    weight_GE: Tensor,
    bias_G: Tensor | None,
    residual_TF: Tensor | None,
    norm_weight_E: Tensor | None,
    out_TF: Tensor,
    eps: float,
    norm_offset: float,
    activation: str,
    pdl: bool,
    tile: DotTile | None = None,
) -> None:
    """Launches the kernel on checked arguments, rows of x and residual contiguous."""
    num_rows, num_inputs = x_TE.shape
    num_outputs = out_TF.shape[1]
    if tile is None:
        tile = choose_dot_tile(num_inputs)
    with on_device_of(x_TE):
        if norm_weight_E is not None:
            x_TE = norm_rows(x_TE, None, norm_weight_E, None, eps, norm_offset, pdl)
        few_rows_dot_kernel[(-(-num_outputs // tile.block_f),)](
            x_TE,
            weight_GE,
            bias_G,
            residual_TF,
            out_TF,
            num_rows,
            x_TE.stride(0),
            0 if residual_TF is None else residual_TF.stride(0),
            NUM_INPUTS=num_inputs,
            NUM_OUTPUTS=num_outputs,
            BLOCK_T=MAX_DOT_ROWS,
            BLOCK_F=tile.block_f,
            BLOCK_E=tile.block_e,
            NUM_WARPS=tile.num_warps,
            HAS_BIAS=bias_G is not None,
            HAS_RESIDUAL=residual_TF is not None,
            ACTIVATION=activation,
            num_warps=tile.num_warps,
            **launch_options(pdl),
        )


@triton.jit
def load_chunk(
    ptr, row_R, stride_r, CHUNK: tl.constexpr, NUM_INPUTS: tl.constexpr, BLOCK_E: tl.constexpr,
    NUM_WARPS: tl.constexpr,
):  # fmt: skip
    """Inputs of a chunk, [B, R, C]; none of a chunk that the inputs do not reach."""
    PART: tl.constexpr = BLOCK_E // NUM_WARPS
    input_BC = (
        CHUNK * BLOCK_E + tl.arange(0, NUM_WARPS)[:, None] * PART + tl.arange(0, PART)[None, :]
    )
    ptr_BRC = ptr + (row_R * stride_r)[None, :, None] + input_BC[:, None, :]
    if (CHUNK + 1) * BLOCK_E <= NUM_INPUTS:
        return tl.load(ptr_BRC)
    else:
        return tl.load(ptr_BRC, mask=(input_BC < NUM_INPUTS)[:, None, :], other=0.0)


@triton.jit
def load_weight(
    ptr, row_F, NUM_INPUTS: tl.constexpr, BLOCK_E: tl.constexpr, NUM_WARPS: tl.constexpr
):
    """All chunks of some rows: MAX_CHUNKS tensors by name, for Triton has no list of them that a
    constant range could walk over. Of those that the inputs do not reach none is read."""
    w0_BFC = load_chunk(ptr, row_F, NUM_INPUTS, 0, NUM_INPUTS, BLOCK_E, NUM_WARPS)
    w1_BFC = w0_BFC
    w2_BFC = w0_BFC
    w3_BFC = w0_BFC
    if NUM_INPUTS > BLOCK_E:
        w1_BFC = load_chunk(ptr, row_F, NUM_INPUTS, 1, NUM_INPUTS, BLOCK_E, NUM_WARPS)
    if NUM_INPUTS > 2 * BLOCK_E:
        w2_BFC = load_chunk(ptr, row_F, NUM_INPUTS, 2, NUM_INPUTS, BLOCK_E, NUM_WARPS)
    if NUM_INPUTS > 3 * BLOCK_E:
        w3_BFC = load_chunk(ptr, row_F, NUM_INPUTS, 3, NUM_INPUTS, BLOCK_E, NUM_WARPS)
    return w0_BFC, w1_BFC, w2_BFC, w3_BFC


@triton.jit
def multiply(x_BTC, weight, CHUNK: tl.constexpr, acc_BTF):
    """x of a chunk times the same chunk of `load_weight`."""
    return tl.dot(x_BTC, tl.permute(weight[CHUNK], (0, 2, 1)), acc_BTF)


@triton.jit
def gated(gate, up, ACTIVATION: tl.constexpr):
    """activation(gate) * up: "silu" or "gelu_tanh"."""
    twice_u = gate
    if ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 is the logistic function of 2u.
        twice_u = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    return gate / (1.0 + tl.exp(-twice_u)) * up


@triton.jit(do_not_specialize=["num_rows"])
def few_rows_dot_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    num_rows,
    x_stride_t,
    residual_stride_t,
    BLOCK_T: tl.constexpr,
    NUM_INPUTS: tl.constexpr,
    NUM_OUTPUTS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_E: tl.constexpr,
    NUM_WARPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: BLOCK_F outputs of all rows of x."""
    first = tl.program_id(0) * BLOCK_F
    row_F = tl.minimum(tl.arange(0, BLOCK_F), NUM_OUTPUTS - 1 - first)
    column_F = first + row_F
    # In 64 bits: the weight may have more than 2**31 elements.
    rows_ptr = weight_ptr + first.to(tl.int64) * NUM_INPUTS
    up_ptr = rows_ptr + NUM_OUTPUTS * NUM_INPUTS
    weight = load_weight(rows_ptr, row_F, NUM_INPUTS, BLOCK_E, NUM_WARPS)
    if ACTIVATION != "":
        up_weight = load_weight(up_ptr, row_F, NUM_INPUTS, BLOCK_E, NUM_WARPS)
    if HAS_BIAS:
        bias_F = tl.load(bias_ptr + column_F).to(tl.float32)
        if ACTIVATION != "":
            up_bias_F = tl.load(bias_ptr + NUM_OUTPUTS + column_F).to(tl.float32)
    if PDL:
        wait_for_predecessor()

    # Rows behind the last one are computed again, and not stored: a mask would be work for all.
    token_T = tl.arange(0, BLOCK_T)
    row_T = tl.minimum(token_T, num_rows - 1)
    if HAS_RESIDUAL:
        residual_TF = tl.load(residual_ptr + row_T[:, None] * residual_stride_t + column_F[None, :])
    acc_BTF = tl.zeros([NUM_WARPS, BLOCK_T, BLOCK_F], tl.float32)
    up_BTF = tl.zeros([NUM_WARPS, BLOCK_T, BLOCK_F], tl.float32)
    next_BTC = load_chunk(x_ptr, row_T, x_stride_t, 0, NUM_INPUTS, BLOCK_E, NUM_WARPS)
    for chunk in tl.static_range((NUM_INPUTS + BLOCK_E - 1) // BLOCK_E):  # pyright: ignore[reportGeneralTypeIssues]
        x_BTC = next_BTC
        if (chunk + 1) * BLOCK_E < NUM_INPUTS:
            next_BTC = load_chunk(
                x_ptr, row_T, x_stride_t, chunk + 1, NUM_INPUTS, BLOCK_E, NUM_WARPS
            )
        acc_BTF = multiply(x_BTC, weight, chunk, acc_BTF)
        if ACTIVATION != "":
            up_BTF = multiply(x_BTC, up_weight, chunk, up_BTF)

    out_TF = tl.sum(acc_BTF, 0)
    if HAS_BIAS:
        out_TF += bias_F[None, :]
    if ACTIVATION != "":
        up_TF = tl.sum(up_BTF, 0)
        if HAS_BIAS:
            up_TF += up_bias_F[None, :]
        out_TF = gated(out_TF, up_TF, ACTIVATION)
    if HAS_RESIDUAL:
        out_TF += residual_TF.to(tl.float32)
    is_output_TF = (token_T < num_rows)[:, None]
    is_output_TF &= (first + tl.arange(0, BLOCK_F) < NUM_OUTPUTS)[None, :]
    tl.store(
        out_ptr + row_T[:, None] * NUM_OUTPUTS + column_F[None, :],
        out_TF.to(out_ptr.dtype.element_ty),
        mask=is_output_TF,
    )
