"""minigen::sum_norm: the residual's sum with the parts that a divided linear layer left, and the
norm of it.

Shapes: T rows, E columns, P parts.
"""

import torch
from torch import Tensor

from minigen.kernels.checks import check_sum_norm
from minigen.kernels.cpu import rms_norm
from minigen.kernels.dependent_launch import (
    has_dependent_launch,
    launch_options,
    wait_for_predecessor,
)
from minigen.kernels.tiles import on_device_of, power_of_two
from minigen.kernels.triton_import import tl, triton


def sum_norm(
    x_TE: Tensor,
    part_PTE: Tensor,
    norm_weight_E: Tensor,
    eps: float,
    norm_offset: float = 0.0,
    pdl: bool = False,
) -> tuple[Tensor, Tensor]:
    """(x + sum of parts, its RMS norm), both [T, E] in the dtype of x.

    Computed in float32. The norm (arXiv 1910.07467) is of the sum before its rounding.

    Args:
        x_TE: float16, bfloat16 or float32 (on the CPU also float64).
        part_PTE: contiguous float32; P may be 0.
        norm_weight_E: of the dtype of x; `norm_offset` is added to it (Gemma stores weight - 1).
        pdl: start while the kernel before still runs, where the GPU can (sm_90 and later). It may
            write x and the parts, but not the weight: see `dependent_launch`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    return torch.ops.minigen.sum_norm(x_TE, part_PTE, norm_weight_E, eps, norm_offset, pdl)


@torch.library.custom_op("minigen::sum_norm", mutates_args=(), device_types="cpu")
def _cpu(
    x_TE: Tensor,
    part_PTE: Tensor,
    norm_weight_E: Tensor,
    eps: float,
    norm_offset: float,
    pdl: bool,
) -> tuple[Tensor, Tensor]:
    check_sum_norm(x_TE, part_PTE, norm_weight_E)
    sum_TE = x_TE.float() + part_PTE.sum(0)
    normed_TE = rms_norm(sum_TE, norm_weight_E, eps, norm_offset)
    return sum_TE.to(x_TE.dtype), normed_TE.to(x_TE.dtype)


@_cpu.register_fake
def _fake(
    x_TE: Tensor,
    part_PTE: Tensor,
    norm_weight_E: Tensor,
    eps: float,
    norm_offset: float,
    pdl: bool,
) -> tuple[Tensor, Tensor]:
    check_sum_norm(x_TE, part_PTE, norm_weight_E)
    shape = tuple(x_TE.shape)
    return x_TE.new_empty(shape), x_TE.new_empty(shape)


@_cpu.register_kernel("cuda")
def _cuda(
    x_TE: Tensor,
    part_PTE: Tensor,
    norm_weight_E: Tensor,
    eps: float,
    norm_offset: float,
    pdl: bool,
) -> tuple[Tensor, Tensor]:
    check_sum_norm(x_TE, part_PTE, norm_weight_E)
    sum_TE = x_TE.new_empty(tuple(x_TE.shape))
    pdl = pdl and has_dependent_launch(x_TE.device)
    return sum_TE, norm_rows(x_TE, part_PTE, norm_weight_E, sum_TE, eps, norm_offset, pdl)


def norm_rows(
    x_TE: Tensor,
    part_PTE: Tensor | None,
    norm_weight_E: Tensor,
    sum_TE: Tensor | None,
    eps: float,
    norm_offset: float,
    pdl: bool,
) -> Tensor:
    """Launches the kernel on checked arguments: on a GPU, or on the CPU in Triton's interpreter.

    Gives the norm of x and the parts, and writes the sum where `sum_TE` is given.
    """
    if x_TE.stride(1) != 1:
        x_TE = x_TE.contiguous()
    num_rows, num_inputs = x_TE.shape
    normed_TE = x_TE.new_empty(num_rows, num_inputs)
    if normed_TE.numel() == 0:
        return normed_TE
    block_e = power_of_two(num_inputs)
    with on_device_of(x_TE):
        norm_rows_kernel[(num_rows,)](
            x_TE,
            part_PTE,
            norm_weight_E,
            sum_TE,
            normed_TE,
            x_TE.stride(0),
            num_rows,
            eps,
            norm_offset,
            NUM_INPUTS=num_inputs,
            BLOCK_E=block_e,
            PARTS=0 if part_PTE is None else part_PTE.shape[0],
            # The least time at 1,024 columns and 4 or 8 parts: 1.1 and 1.4 us, 4 warps take 1.6 and
            # 2.3 (32 rows, H200).
            num_warps=min(max(block_e // 128, 1), 8),
            **launch_options(pdl),
        )
    return normed_TE


@triton.jit(do_not_specialize=["num_rows"])
def norm_rows_kernel(
    x_ptr,
    part_ptr,
    weight_ptr,
    sum_ptr,
    out_ptr,
    x_stride_t,
    num_rows,
    eps,
    norm_offset,
    NUM_INPUTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: a row's sum, rounded once, and the norm of it, rounded once."""
    row = tl.program_id(0).to(tl.int64)
    input_E = tl.arange(0, BLOCK_E)
    inside_E = input_E < NUM_INPUTS
    weight_E = tl.load(weight_ptr + input_E, mask=inside_E, other=0.0).to(tl.float32) + norm_offset
    if PDL:
        wait_for_predecessor()
    x_E = tl.load(x_ptr + row * x_stride_t + input_E, mask=inside_E, other=0.0).to(tl.float32)
    for part in tl.static_range(PARTS):  # pyright: ignore[reportGeneralTypeIssues]
        part_row = part * num_rows + row
        x_E += tl.load(part_ptr + part_row * NUM_INPUTS + input_E, mask=inside_E, other=0.0)
    out_row = row * NUM_INPUTS
    if sum_ptr is not None:
        tl.store(sum_ptr + out_row + input_E, x_E.to(sum_ptr.dtype.element_ty), mask=inside_E)
    scale = tl.rsqrt(tl.sum(x_E * x_E, 0) * (1.0 / NUM_INPUTS) + eps)
    out_E = (x_E * scale * weight_E).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + out_row + input_E, out_E, mask=inside_E)
