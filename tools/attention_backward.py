"""The backward of attention for `tools/bench_attention.py`: tiles to try, one call, its check.

Shape suffixes as in `kernels/varlen_attention_backward.py`; L tokens of one sequence.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minigen.kernels import varlen_attention
from minigen.kernels.backward_tiles import (
    BackwardTile,
    BackwardTiles,
    backward_tile_arguments,
    choose_backward_tiles,
)
from minigen.kernels.checks import Window
from minigen.kernels.tiles import HOPPER_SHARED_BYTES, score_arguments, window_arguments
from minigen.kernels.varlen_attention_backward import (
    key_gradients_kernel,
    query_gradient_kernel,
    varlen_attention_backward,
    varlen_attention_backward_triton,
)
from minigen.kernels.varlen_attention_backward_tma import (
    choose_backward_descriptor_tiles,
    key_gradients_tma_kernel,
    query_gradient_tma_kernel,
)

CAUSAL = Window(None, 0)


class BackwardCandidate(NamedTuple):
    """One way to compile the two kernels."""

    tiles: BackwardTiles
    descriptors: bool

    def __str__(self) -> str:
        def words(tile: BackwardTile) -> str:
            registers = f" r{tile.max_registers}" if tile.max_registers else ""
            return f"{tile.block_m}x{tile.block_n} w{tile.num_warps} s{tile.num_stages}{registers}"

        both = f"{words(self.tiles.queries)} + {words(self.tiles.keys)}"
        return f"{both} tma" if self.descriptors else both


def backward_candidates(group: int, head_dim: int) -> list[BackwardCandidate]:
    """The chosen pair, and with one of its two tiles replaced: what each gains adds up.

    Chosen by registers, stack, shared memory and serialised products of sm_90 (`--list`).
    """
    plain = choose_backward_tiles(1024 * group, 1024, head_dim, 2, HOPPER_SHARED_BYTES)
    pair = choose_backward_descriptor_tiles(head_dim, 4096)
    if head_dim == 64:
        queries = [BackwardTile(128, 64, 4, 2), BackwardTile(128, 128, 8, 2)]
        keys = [BackwardTile(64, 128, 8, 2), BackwardTile(64, 128, 8, 3)]
    else:
        queries = [
            BackwardTile(128, 64, 8, 2),
            BackwardTile(128, 128, 8, 2),
            BackwardTile(128, 32, 8, 3, 128),  # two programs a multiprocessor, as all of 4 warps
            BackwardTile(256, 32, 16, 2),
            BackwardTile(64, 64, 4, 2),
        ]
        keys = [
            BackwardTile(64, 128, 8, 2),
            BackwardTile(64, 128, 8, 3),
            BackwardTile(32, 128, 8, 3),
            BackwardTile(32, 64, 4, 4),
        ]
    tried = [
        pair,
        *(pair._replace(queries=tile) for tile in queries),
        *(pair._replace(keys=tile) for tile in keys),
    ]
    return [BackwardCandidate(plain, False), *(BackwardCandidate(t, True) for t in tried)]


class BackwardInputs(NamedTuple):
    """What the forward took and gave, and the gradient that arrives at its output."""

    dout_THD: Tensor
    q_THD: Tensor
    k_TKD: Tensor
    v_TKD: Tensor
    out_THD: Tensor
    lse_HT: Tensor
    cu_seqlens: Tensor


def backward_inputs(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, cu_seqlens: Tensor, seed: int
) -> BackwardInputs:
    """Runs the forward; `dout` is normal."""
    generator = torch.Generator(q_THD.device).manual_seed(seed)
    dout_THD = torch.empty_like(q_THD).normal_(generator=generator)
    out_THD, lse_HT = varlen_attention(q_THD, k_TKD, v_TKD, cu_seqlens, cu_seqlens)
    return BackwardInputs(dout_THD, q_THD, k_TKD, v_TKD, out_THD, lse_HT, cu_seqlens)


def run_backward(
    x: BackwardInputs, dlse_HT: Tensor, candidate: BackwardCandidate | None
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK, dV by one candidate; None is the operation as it chooses."""
    of_forward = x.q_THD, x.k_TKD, x.v_TKD, x.out_THD, x.lse_HT, x.cu_seqlens, x.cu_seqlens
    if candidate is None:
        return varlen_attention_backward(
            x.dout_THD, dlse_HT, *of_forward, True, None, [-1, -1], 0.0
        )
    return varlen_attention_backward_triton(
        x.dout_THD, dlse_HT, *of_forward, window=CAUSAL, scale=x.q_THD.shape[2] ** -0.5,
        softcap=0.0, tiles=candidate.tiles, tensor_descriptors=candidate.descriptors,
    )  # fmt: skip


def check_gradients(
    gradients: tuple[Tensor, Tensor, Tensor], dout_LHD: Tensor, q_LHD: Tensor,
    k_LKD: Tensor, v_LKD: Tensor,
) -> None:  # fmt: skip
    """One causal sequence against float64; ValueError beyond two roundings of what is summed."""
    group = q_LHD.shape[1] // k_LKD.shape[1]
    scale, eps = q_LHD.shape[2] ** -0.5, torch.finfo(q_LHD.dtype).eps
    q, dout, k, v = (
        x.double().repeat_interleave(n, 1).transpose(0, 1)
        for x, n in ((q_LHD, 1), (dout_LHD, 1), (k_LKD, group), (v_LKD, group))
    )
    length = q.shape[1]
    hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    weight = (q @ k.mT * scale).masked_fill(hidden, -math.inf).softmax(-1)
    delta = (dout * (weight @ v)).sum(-1, keepdim=True)
    dweight = dout @ v.mT
    dscore = weight * (dweight - delta) * scale
    # The forward's output is rounded, too, and delta is a sum of its products.
    size_of_delta = (dout.abs() * (weight @ v.abs())).sum(-1, keepdim=True)
    size = weight * (dweight.abs() + size_of_delta) * scale

    def grouped(x_HLD: Tensor) -> Tensor:
        return x_HLD.unflatten(0, (-1, group)).sum(1)

    expected = dscore @ k, grouped(dscore.mT @ q), grouped(weight.mT @ dout)
    sizes = size @ k.abs(), grouped(size.mT @ q.abs()), grouped(weight.mT @ dout.abs())
    for name, got, right, bound in zip("qkv", gradients, expected, sizes, strict=True):
        wrong = (got.double().transpose(0, 1) - right).abs() - 2 * eps * bound
        excess = wrong.max().item()
        if not excess <= 1e-4:
            raise ValueError(f"d{name} is wrong by {excess:.2g} beyond rounding, {length} tokens")


def backward_kernels(
    candidate: BackwardCandidate, group: int, head_dim: int
) -> dict[str, tuple[Any, dict[str, Any]]]:
    """The candidate's kernels and their constants, by what they write."""
    constants: dict[str, Any] = {
        **window_arguments(CAUSAL),
        **score_arguments(head_dim**-0.5, 0.0),
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "BLOCK_D": head_dim,
        "WAIT": True,
    }
    for name in ("window_left", "window_right", "score_scale", "cap_scale"):
        del constants[name]
    kernels = (
        (query_gradient_tma_kernel, key_gradients_tma_kernel)
        if candidate.descriptors
        else (query_gradient_kernel, key_gradients_kernel)
    )
    return {
        name: (kernel, constants | backward_tile_arguments(tile))
        for name, kernel, tile in zip(("dq", "dk dv"), kernels, candidate.tiles, strict=True)
    }


def flash_backward(x: BackwardInputs, longest: int) -> Any:
    """A call of FlashAttention 2's backward as torch builds it in, over the same packed numbers."""
    ops, ends = torch.ops.aten, (x.cu_seqlens, x.cu_seqlens, longest, longest)
    qkv = x.q_THD, x.k_TKD, x.v_TKD
    out, lse, state, unused, _ = ops._flash_attention_forward(*qkv, *ends, 0.0, True, False)
    return lambda: ops._flash_attention_backward(
        x.dout_THD, *qkv, out, lse, *ends, 0.0, True, state, unused
    )


def cudnn_backward(x: BackwardInputs, num_seqs: int) -> Any:
    """A call of cuDNN's backward on sequences of equal lengths."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v, dout = (
        t.unflatten(0, (num_seqs, -1)).transpose(1, 2).detach()
        for t in (x.q_THD, x.k_TKD, x.v_TKD, x.dout_THD)
    )
    inputs = q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = torch.nn.functional.scaled_dot_product_attention(
            *inputs, is_causal=True, enable_gqa=True
        )
    return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)
