"""The kernel of `few_rows_linear` for more rows than plain arithmetic serves: tensor cores.

From 5 to 64 rows a linear layer still waits for its weight, and cuBLAS's tiles, which divide the
inputs of narrow layers among programs, need a second kernel that adds the parts. Here a program
walks over all inputs of a few outputs. What stands before and behind the product (norm, gated
activation, residual) takes part of the same kernel; launched early, it asks for its weight while
the kernel before it still runs.

Shapes: T rows, E inputs, F outputs, G rows of the weight (F, or 2F with an activation).
"""

from typing import NamedTuple

from torch import Tensor

from minigen.kernels.dependent_launch import launch_options, wait_for_predecessor
from minigen.kernels.tiles import on_device_of, power_of_two
from minigen.kernels.triton_import import tl, triton

MAX_DOT_ROWS = 64


class DotTile(NamedTuple):
    """Outputs of a program, inputs of a step of its loop, warps, and tiles on their way at once."""

    block_f: int
    block_e: int
    num_warps: int
    num_stages: int


def choose_dot_tile(num_rows: int, num_outputs: int, has_activation: bool) -> DotTile:
    """Narrow where a GPU's multiprocessors would else lack work; an activation has two products."""
    block_f = 32 if num_outputs >= 3072 and not has_activation else 16
    return DotTile(block_f, 128 if num_rows <= 32 else 64, 4, 5)


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
        tile = choose_dot_tile(num_rows, num_outputs, activation != "")
    with on_device_of(x_TE):
        few_rows_dot_kernel[(-(-num_outputs // tile.block_f),)](
            x_TE,
            weight_GE,
            bias_G,
            residual_TF,
            norm_weight_E,
            out_TF,
            num_rows,
            x_TE.stride(0),
            0 if residual_TF is None else residual_TF.stride(0),
            eps,
            norm_offset,
            NUM_INPUTS=num_inputs,
            NUM_OUTPUTS=num_outputs,
            BLOCK_T=max(power_of_two(num_rows), 16),
            BLOCK_F=tile.block_f,
            BLOCK_E=tile.block_e,
            HAS_BIAS=bias_G is not None,
            HAS_RESIDUAL=residual_TF is not None,
            HAS_NORM=norm_weight_E is not None,
            ACTIVATION=activation,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            **launch_options(pdl),
        )


@triton.jit
def prefetch(ptr, num_bytes):
    """Asks for memory from `ptr` on, 16 bytes aligned, to be brought into the L2; by one thread."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred is_first;
        .reg .u32 thread;
        mov.u32 thread, %tid.x;
        setp.eq.u32 is_first, thread, 0;
        @is_first cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.u32 $0, 0;
        }""",
        "=r,l,r", [ptr.to(tl.int64), num_bytes], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def load_tile(ptr, row_R, stride_r, input_E, NUM_INPUTS: tl.constexpr, BLOCK_E: tl.constexpr):
    ptr_RE = ptr + row_R[:, None] * stride_r + input_E[None, :]
    if NUM_INPUTS % BLOCK_E == 0:
        return tl.load(ptr_RE)
    else:
        return tl.load(ptr_RE, mask=(input_E < NUM_INPUTS)[None, :], other=0.0)


@triton.jit
def load_vector(ptr, input_E, NUM_INPUTS: tl.constexpr):
    return tl.load(ptr + input_E, mask=input_E < NUM_INPUTS, other=0.0)


@triton.jit(do_not_specialize=["num_rows"])
def few_rows_dot_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    norm_weight_ptr,
    out_ptr,
    num_rows,
    x_stride_t,
    residual_stride_t,
    eps,
    norm_offset,
    NUM_INPUTS: tl.constexpr,
    NUM_OUTPUTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
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
    # Rows behind the last one are computed again, and not stored: a mask would be work for all.
    row_T = tl.minimum(tl.arange(0, BLOCK_T), num_rows - 1)
    row_F = tl.minimum(tl.arange(0, BLOCK_F), NUM_OUTPUTS - 1 - first)
    # In 64 bits: the weight may have more than 2**31 elements.
    rows_ptr = weight_ptr + first.to(tl.int64) * NUM_INPUTS
    up_ptr = rows_ptr + NUM_OUTPUTS * NUM_INPUTS
    if PDL:
        if NUM_INPUTS % 8 == 0:
            num_bytes = tl.minimum(NUM_OUTPUTS - first, BLOCK_F) * (NUM_INPUTS * 2)
            prefetch(rows_ptr, num_bytes)
            if ACTIVATION != "":
                prefetch(up_ptr, num_bytes)
        wait_for_predecessor()

    acc_TF = tl.zeros([BLOCK_T, BLOCK_F], tl.float32)
    up_TF = tl.zeros([BLOCK_T, BLOCK_F], tl.float32)
    squares_TE = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    if HAS_NORM:
        # One step ahead, by hand: Triton does not pipeline what is no factor of a product.
        next_g_E = load_vector(norm_weight_ptr, tl.arange(0, BLOCK_E), NUM_INPUTS)
    for start in range(0, NUM_INPUTS, BLOCK_E):
        input_E = start + tl.arange(0, BLOCK_E)
        x_TE = load_tile(x_ptr, row_T, x_stride_t, input_E, NUM_INPUTS, BLOCK_E)
        w_FE = load_tile(rows_ptr, row_F, NUM_INPUTS, input_E, NUM_INPUTS, BLOCK_E)
        if HAS_NORM:
            g_E = next_g_E
            next_g_E = load_vector(norm_weight_ptr, input_E + BLOCK_E, NUM_INPUTS)
            wide_TE = x_TE.to(tl.float32)
            squares_TE += wide_TE * wide_TE
            x_TE = (wide_TE * (g_E.to(tl.float32) + norm_offset)[None, :]).to(x_TE.dtype)
        acc_TF = tl.dot(x_TE, tl.trans(w_FE), acc_TF)
        if ACTIVATION != "":
            up_w_FE = load_tile(up_ptr, row_F, NUM_INPUTS, input_E, NUM_INPUTS, BLOCK_E)
            up_TF = tl.dot(x_TE, tl.trans(up_w_FE), up_TF)

    if HAS_NORM:
        scale_T = tl.rsqrt(tl.sum(squares_TE, 1) * (1.0 / NUM_INPUTS) + eps)
        acc_TF *= scale_T[:, None]
        up_TF *= scale_T[:, None]
    if HAS_BIAS:
        acc_TF += tl.load(bias_ptr + first + row_F).to(tl.float32)[None, :]
    if ACTIVATION != "":
        if HAS_BIAS:
            up_TF += tl.load(bias_ptr + NUM_OUTPUTS + first + row_F).to(tl.float32)[None, :]
        if ACTIVATION == "silu":
            acc_TF = acc_TF / (1.0 + tl.exp(-acc_TF)) * up_TF
        else:
            # (1 + tanh(u)) / 2 is the logistic function of 2u.
            twice_u_TF = 1.5957691216057308 * (acc_TF + 0.044715 * acc_TF * acc_TF * acc_TF)
            acc_TF = acc_TF / (1.0 + tl.exp(-twice_u_TF)) * up_TF
    column_F = first + row_F
    if HAS_RESIDUAL:
        residual_TF = tl.load(residual_ptr + row_T[:, None] * residual_stride_t + column_F[None, :])
        acc_TF += residual_TF.to(tl.float32)
    is_output_TF = (tl.arange(0, BLOCK_T) < num_rows)[:, None]
    is_output_TF &= (first + tl.arange(0, BLOCK_F) < NUM_OUTPUTS)[None, :]
    tl.store(
        out_ptr + row_T[:, None] * NUM_OUTPUTS + column_F[None, :],
        acc_TF.to(out_ptr.dtype.element_ty), mask=is_output_TF,
    )  # fmt: skip
