"""A decoder layer over the paged cache in one native operation, for few rows on a CPU.

As separate operations a layer of one row is nine calls, in most of which threads wake, stream a
part of the weights and wait; here they wake once a layer. A step of one request (SmolLM2-135M,
bf16, two cores) spends 5.7 ms in its graph, where it spent 7.0.

Shapes: T packed tokens, S sequences, E model width, F outputs of a linear layer, D head dim, R
rotated part of D, K key/value heads, N cache blocks, B tokens a block, W blocks a sequence.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from minigen.kernels.checks import check_paged, check_rope_cache_write, resolve_window


@dataclass(frozen=True)
class LayerWeights:
    """A layer's weights, all contiguous and of one dtype; None: it has none."""

    norm_E: Tensor
    qkv_FE: Tensor  # heads of queries, then of keys, then of values
    qkv_bias_F: Tensor | None
    q_norm_D: Tensor | None  # both of them or neither
    k_norm_D: Tensor | None
    o_EF: Tensor
    o_bias_E: Tensor | None
    mlp_norm_E: Tensor
    gate_up_FE: Tensor  # gate above up
    gate_up_bias_F: Tensor | None
    down_EF: Tensor
    down_bias_E: Tensor | None


def decoder_layer(
    x_TE: Tensor,
    weights: LayerWeights,
    cos_TR: Tensor,
    sin_TR: Tensor,
    k_cache_NBKD: Tensor,
    v_cache_NBKD: Tensor,
    slots_T: Tensor,
    cu_seqlens_S1: Tensor,
    kv_lens_S: Tensor,
    block_table_SW: Tensor,
    *,
    eps: float,
    rotates: bool,
    scale: float,
    window_size: tuple[int, int],
) -> Tensor:
    """x + attention of its norm, and to that the gated MLP (silu) of its norm: [T, E].

    Keys and values are written into the cache first, as `rope_cache_write` does; attention is
    `paged_attention`'s, causal. Up to 32 rows, what is added to x and gate and up are float32, not
    rounded as by the separate operations, and a row's numbers are bitwise the same whoever its
    neighbours are. Only where `native.serves` these tensors.

    Raises:
        ValueError: a weight whose shape or dtype does not fit; a slot, length or block that the
            cache does not hold.
    """
    if not torch.compiler.is_dynamo_compiling():  # traced, Dynamo has seen the shapes
        _check(
            x_TE, weights, cos_TR, sin_TR, k_cache_NBKD, v_cache_NBKD, slots_T, cu_seqlens_S1,
            kv_lens_S, block_table_SW,
        )  # fmt: skip
    left, right = resolve_window(True, window_size)
    return torch.ops.minigen.native_decoder_layer(
        x_TE, weights.norm_E, weights.qkv_FE, weights.qkv_bias_F, weights.q_norm_D,
        weights.k_norm_D, weights.o_EF, weights.o_bias_E, weights.mlp_norm_E, weights.gate_up_FE,
        weights.gate_up_bias_F, weights.down_EF, weights.down_bias_E, cos_TR, sin_TR, k_cache_NBKD,
        v_cache_NBKD, slots_T, cu_seqlens_S1, kv_lens_S, block_table_SW, eps, rotates, scale,
        -1 if left is None else left, -1 if right is None else right,
    )  # fmt: skip


def _check(
    x_TE: Tensor,
    weights: LayerWeights,
    cos_TR: Tensor,
    sin_TR: Tensor,
    k_cache_NBKD: Tensor,
    v_cache_NBKD: Tensor,
    slots_T: Tensor,
    cu_seqlens_S1: Tensor,
    kv_lens_S: Tensor,
    block_table_SW: Tensor,
) -> None:
    """As far as the operator does not: what its two halves' own checks say of the rows between."""
    if x_TE.ndim != 2 or k_cache_NBKD.ndim != 4:
        raise ValueError(
            f"x must be [T, E] and k_cache [N, B, K, D], got shapes {tuple(x_TE.shape)} and "
            f"{tuple(k_cache_NBKD.shape)}"
        )
    num_kv_heads, head_dim = k_cache_NBKD.shape[2:]
    qkv_TXD = x_TE.new_empty(x_TE.shape[0], weights.qkv_FE.shape[0] // head_dim, head_dim)
    caches = k_cache_NBKD, v_cache_NBKD
    norms = weights.q_norm_D, weights.k_norm_D
    check_rope_cache_write(qkv_TXD, *norms, cos_TR, sin_TR, None, *caches, slots_T)
    q_THD = qkv_TXD[:, 2 * num_kv_heads :]
    check_paged(q_THD, *caches, cu_seqlens_S1, kv_lens_S, block_table_SW, 0.0)
