"""minigen::tile_linear: a linear layer for the rows of a decode step, with its gated activation, or
with its inputs divided among programs.

What is divided leaves float32 parts, which `sum_norm` adds to the residual on its way to the next
norm: no kernel of its own, as cuBLAS's divided products need. Runs in Gluon where `fits_tiles` says
so, and elsewhere as torch's operations.

Shapes: T rows, E inputs, F outputs, P parts of the inputs, G rows of the weight (F, or 2F with an
activation).
"""

import torch
from torch import Tensor

from minigen.kernels.checks import check_tile_linear
from minigen.kernels.cpu import gated_linear
from minigen.kernels.dependent_launch import has_dependent_launch
from minigen.kernels.tile_linear_gluon import (
    GluonLinearTile,
    choose_rows_tile,
    fits_tiles,
    launch_tile_linear,
)


def tile_linear(
    x_TE: Tensor,
    weight_GE: Tensor,
    bias_G: Tensor | None = None,
    activation: str = "",
    parts: int = 0,
    pdl: bool = False,
) -> Tensor:
    """activation(x @ weight.T + bias): [T, F] in the dtype of x; or, in parts, float32 [P, T, F]
    that add up to it.

    Products are summed in float32; in Gluon all is rounded once, at the end.

    Args:
        x_TE: float16, bfloat16 or float32 (on the CPU also float64).
        weight_GE: contiguous, dtype of x. `bias_G`: of this dtype, too.
        activation: "" for none; "silu" and "gelu_tanh" take the first half of the weight's rows for
            the gate and the second for what it is multiplied by: activation(gate) * up.
        parts: 0 for the output itself; P for parts, which allow no activation.
        pdl: start while the kernel before still runs, where the GPU can (sm_90 and later). It may
            write x, but no weight: see `dependent_launch`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown activation, parts below 0
            or of something that is activated.
    """
    return torch.ops.minigen.tile_linear(x_TE, weight_GE, bias_G, activation, parts, pdl)


@torch.library.custom_op("minigen::tile_linear", mutates_args=(), device_types="cpu")
def _cpu(
    x_TE: Tensor,
    weight_GE: Tensor,
    bias_G: Tensor | None,
    activation: str,
    parts: int,
    pdl: bool,
) -> Tensor:
    check_tile_linear(x_TE, weight_GE, bias_G, activation, parts)
    return _with_torch(x_TE, weight_GE, bias_G, activation, parts)


def _with_torch(
    x_TE: Tensor, weight_GE: Tensor, bias_G: Tensor | None, activation: str, parts: int
) -> Tensor:
    if parts == 0:
        return gated_linear(x_TE, weight_GE, bias_G, activation)
    inputs = zip(x_TE.tensor_split(parts, 1), weight_GE.tensor_split(parts, 1), strict=True)
    part_PTF = torch.stack([x_Te.float() @ weight_Fe.float().T for x_Te, weight_Fe in inputs])
    if bias_G is not None:
        part_PTF[0] += bias_G
    return part_PTF


@_cpu.register_fake
def _fake(
    x_TE: Tensor,
    weight_GE: Tensor,
    bias_G: Tensor | None,
    activation: str,
    parts: int,
    pdl: bool,
) -> Tensor:
    check_tile_linear(x_TE, weight_GE, bias_G, activation, parts)
    return _empty(x_TE, weight_GE, activation, parts)


@_cpu.register_kernel("cuda")
def _cuda(
    x_TE: Tensor,
    weight_GE: Tensor,
    bias_G: Tensor | None,
    activation: str,
    parts: int,
    pdl: bool,
) -> Tensor:
    check_tile_linear(x_TE, weight_GE, bias_G, activation, parts)
    if not fits_tiles(x_TE, weight_GE):
        return _with_torch(x_TE, weight_GE, bias_G, activation, parts)
    pdl = pdl and has_dependent_launch(x_TE.device)
    return tile_linear_gluon(x_TE, weight_GE, bias_G, activation, parts, pdl)


def tile_linear_gluon(
    x_TE: Tensor,
    weight_GE: Tensor,
    bias_G: Tensor | None = None,
    activation: str = "",
    parts: int = 0,
    pdl: bool = False,
    tile: GluonLinearTile | None = None,
) -> Tensor:
    """Launches the kernel on checked arguments that fit; `tile` is chosen by size unless given."""
    out = _empty(x_TE, weight_GE, activation, parts)
    if out.numel() > 0:
        if tile is None:
            num_rows, num_inputs = x_TE.shape
            tile = choose_rows_tile(num_rows, num_inputs, out.shape[-1], activation != "", parts)
        launch_tile_linear(x_TE, weight_GE, bias_G, out, activation, pdl, tile)
    return out


def _empty(x_TE: Tensor, weight_GE: Tensor, activation: str, parts: int) -> Tensor:
    num_rows, num_outputs = x_TE.shape[0], weight_GE.shape[0] // (2 if activation else 1)
    if parts == 0:
        return x_TE.new_empty(num_rows, num_outputs)
    return x_TE.new_empty(parts, num_rows, num_outputs, dtype=torch.float32)
