"""A decoder's layers over the paged cache in one native operation, for few rows on a CPU.

As separate operations a layer of one row is nine calls, in most of which threads wake, stream a
part of the weights and wait; here they wake once a step.

Shapes: T packed tokens, S sequences, E model width, F outputs of a linear layer, D head dim, R
rotated part of D, K key/value heads, N cache blocks, B tokens a block, W blocks a sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minigen.kernels.checks import check_paged, check_rope_cache_write, resolve_window


@dataclass(frozen=True)
class LayerWeights:
    """A layer's weights, all contiguous and of one dtype; None: no layer has them."""

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


def decoder_layers(
    x_TE: Tensor,
    weights: Sequence[LayerWeights],
    cos_TR: Tensor,
    sin_TR: Tensor,
    caches: Sequence[tuple[Tensor, Tensor]],
    slots_T: Tensor,
    cu_seqlens_S1: Tensor,
    kv_lens_S: Tensor,
    block_table_SW: Tensor,
    *,
    eps: float,
    scale: float,
    rotates: Sequence[bool],
    window_sizes: Sequence[tuple[int, int]],
) -> Tensor:
    """Each layer after the other: x + attention of its norm, and to that the gated MLP (silu) of
    its norm: [T, E].

    `weights`, `caches` (k and v, [N, B, K, D]), `rotates` and `window_sizes`: one entry a layer.
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
            x_TE, weights[0], cos_TR, sin_TR, *caches[0], slots_T, cu_seqlens_S1, kv_lens_S,
            block_table_SW,
        )  # fmt: skip
    lefts = [resolve_window(True, window).left for window in window_sizes]

    def each(name: str) -> list[Tensor]:
        return [t for t in (getattr(layer, name) for layer in weights) if t is not None]

    return torch.ops.minigen.native_decoder_layers(
        x_TE, each("norm_E"), each("qkv_FE"), each("qkv_bias_F"), each("q_norm_D"),
        each("k_norm_D"), each("o_EF"), each("o_bias_E"), each("mlp_norm_E"), each("gate_up_FE"),
        each("gate_up_bias_F"), each("down_EF"), each("down_bias_E"), cos_TR, sin_TR,
        [k_NBKD for k_NBKD, _ in caches], [v_NBKD for _, v_NBKD in caches], slots_T, cu_seqlens_S1,
        kv_lens_S, block_table_SW, eps, scale, list(rotates),
        [-1 if left is None else left for left in lefts],
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
    """As far as the operator does not: what a layer's two halves' own checks say of the rows
    between. That all layers are alike is the operator's to check."""
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
