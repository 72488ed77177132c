"""The decoder's parameters run in the ways that pad, to be compared with the flat batch.

Shape suffixes as in `minigen/model.py`, and B rows of a padded batch, L its longest prompt, C the
rows of its cache for a sequence (L and what is decoded), G query heads that share a key head.
Padding stands on the right, so that a causal prefill needs no mask: no real token looks behind
itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from minigen.kernels import varlen_attention
from minigen.model import Attention, Block, Decoder, apply_rope

# (layer, q_BLHD, k_BLKD, v_BLKD) -> out_BLHD
Attend = Callable[[Attention, Tensor, Tensor, Tensor], Tensor]
Cache = list[tuple[Tensor, Tensor]]


def check_supported(decoder: Decoder) -> None:
    """Raises ValueError for a family whose attention torch's scaled_dot_product_attention lacks."""
    config = decoder.config
    if config.attention_softcap or config.rope_switch:
        what = "soft-capped scores" if config.attention_softcap else "long rope"
        raise ValueError(f"{config.model_type} has {what}: the padded ways cannot run it")


def block_output(
    block: Block, x_BLE: Tensor, cos_TR: Tensor, sin_TR: Tensor, attend: Attend
) -> Tensor:
    """What the layer gives for a padded batch; the rope tables are those of all B * L rows."""
    attention, config = block.attention, block.attention.config
    H, K, D = config.num_heads, config.num_kv_heads, config.head_dim

    def rotated(x_BLXD: Tensor) -> Tensor:
        return apply_rope(x_BLXD.flatten(0, 1), cos_TR, sin_TR).view_as(x_BLXD)

    # As rows: the CPU's kernel for few of them takes no rectangle.
    def by_row(layer: nn.Module, x_BLE: Tensor) -> Tensor:
        return layer(x_BLE.flatten(0, 1)).view(*x_BLE.shape[:2], -1)

    qkv = by_row(attention.qkv_proj, block.input_norm(x_BLE)).unflatten(-1, (H + 2 * K, D))
    q_BLHD, k_BLKD, v_BLKD = qkv.split((H, K, K), 2)
    if config.qk_norm:
        q_BLHD, k_BLKD = attention.q_norm(q_BLHD), attention.k_norm(k_BLKD)
    if attention.rotates:
        q_BLHD, k_BLKD = rotated(q_BLHD), rotated(k_BLKD)
    out = by_row(attention.o_proj, attend(attention, q_BLHD, k_BLKD, v_BLKD).flatten(2))
    x_BLE = x_BLE + (block.post_attention_norm(out) if block.post_attention_norm else out)
    out = by_row(block.mlp, block.mlp_norm(x_BLE))
    return x_BLE + (block.post_mlp_norm(out) if block.post_mlp_norm else out)


def hidden_states(
    decoder: Decoder,
    tokens_BL: Tensor,
    positions_BL: Tensor,
    layer: Callable[..., Tensor],
    cache: Cache,
    *shared: Tensor,
) -> Tensor:
    """Hidden states [B, L, E] of a padded batch, before the last norm.

    layer: one of the functions below, or a compiled form of it; called for each block with the
        rope tables of all B * L rows, the block's part of the cache, and what all layers share.
    """
    x_BLE = decoder.embedded(tokens_BL, decoder.embed.weight.dtype)
    cos_TR = decoder.cos_PR[positions_BL.flatten()]
    sin_TR = decoder.sin_PR[positions_BL.flatten()]
    for block, caches in zip(decoder.blocks, cache, strict=True):
        x_BLE = layer(block, x_BLE, cos_TR, sin_TR, *caches, *shared)
    return x_BLE


@dataclass
class PaddedBatch:
    """Prompts as a rectangle, and where its real tokens lie in it."""

    tokens_BL: Tensor
    positions_BL: Tensor
    lengths_B: Tensor
    real_T: Tensor  # rows of the flattened rectangle, prompt by prompt
    cu_seqlens_S1: Tensor

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], device: torch.device) -> PaddedBatch:
        longest = max(map(len, prompts))
        rows = [[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts]
        real = [b * longest + i for b, prompt in enumerate(prompts) for i in range(len(prompt))]
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        ends = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0))).int()
        positions_BL = torch.arange(longest).repeat(len(prompts), 1)
        return cls(
            torch.tensor(rows).to(device), positions_BL.to(device), lengths.to(device),
            torch.tensor(real).to(device), ends.to(device),
        )  # fmt: skip


def new_cache(decoder: Decoder, rows: int, capacity: int) -> Cache:
    """A (k, v) pair [B, K, C, D] a layer, every byte of it touched."""
    config, weight = decoder.config, decoder.embed.weight
    shape = (rows, config.num_kv_heads, capacity, config.head_dim)

    def zeros() -> Tensor:
        # Not torch.zeros: the system would hand the memory out only where it is written.
        return torch.empty(shape, dtype=weight.dtype, device=weight.device).fill_(0)

    return [(zeros(), zeros()) for _ in range(config.num_layers)]


def _keep(k_BKCD: Tensor, v_BKCD: Tensor, k_BLKD: Tensor, v_BLKD: Tensor) -> None:
    k_BKCD[:, :, : k_BLKD.shape[1]] = k_BLKD.transpose(1, 2)
    v_BKCD[:, :, : v_BLKD.shape[1]] = v_BLKD.transpose(1, 2)


def _append(
    k_BKCD: Tensor, v_BKCD: Tensor, kv_lens_B: Tensor, k_B1KD: Tensor, v_B1KD: Tensor
) -> None:
    row_B = torch.arange(len(kv_lens_B), device=kv_lens_B.device)
    k_BKCD[row_B, :, kv_lens_B] = k_B1KD[:, 0]
    v_BKCD[row_B, :, kv_lens_B] = v_B1KD[:, 0]


def sdpa_rectangle(layer: Attention, q_BLHD: Tensor, k_BLKD: Tensor, v_BLKD: Tensor) -> Tensor:
    """Attention over the whole rectangle, by torch's scaled_dot_product_attention."""
    left = layer.window_size[0]
    mask_LL = None
    if left >= 0:
        at_L = torch.arange(q_BLHD.shape[1], device=q_BLHD.device)
        distance_LL = at_L[:, None] - at_L[None, :]
        mask_LL = (distance_LL >= 0) & (distance_LL <= left)
    out_BHLD = F.scaled_dot_product_attention(
        q_BLHD.transpose(1, 2), k_BLKD.transpose(1, 2), v_BLKD.transpose(1, 2),
        attn_mask=mask_LL, is_causal=mask_LL is None, scale=layer.config.attention_scale,
        enable_gqa=True,
    )  # fmt: skip
    return out_BHLD.transpose(1, 2)


def unpadded_rectangle(
    layer: Attention,
    q_BLHD: Tensor,
    k_BLKD: Tensor,
    v_BLKD: Tensor,
    real_T: Tensor,
    cu_seqlens_S1: Tensor,
) -> Tensor:
    """Takes the real rows out, attends over them alone, and puts them back among zeros."""
    # index_select: its gradient is one addition by row, that of brackets sorts the rows first.
    q_THD, k_TKD, v_TKD = (
        x.flatten(0, 1).index_select(0, real_T) for x in (q_BLHD, k_BLKD, v_BLKD)
    )
    out_THD, _ = varlen_attention(
        q_THD, k_TKD, v_TKD, cu_seqlens_S1, cu_seqlens_S1,
        scale=layer.config.attention_scale, window_size=layer.window_size,
    )  # fmt: skip
    flat = out_THD.new_zeros(q_BLHD.shape[0] * q_BLHD.shape[1], *out_THD.shape[1:])
    return flat.index_copy(0, real_T, out_THD).view_as(q_BLHD)


def sdpa_prefill_layer(
    block: Block, x_BLE: Tensor, cos_TR: Tensor, sin_TR: Tensor, k_BKCD: Tensor, v_BKCD: Tensor
) -> Tensor:
    """The block over prompts, attention over the whole rectangle."""

    def attend(layer: Attention, q_BLHD: Tensor, k_BLKD: Tensor, v_BLKD: Tensor) -> Tensor:
        _keep(k_BKCD, v_BKCD, k_BLKD, v_BLKD)
        return sdpa_rectangle(layer, q_BLHD, k_BLKD, v_BLKD)

    return block_output(block, x_BLE, cos_TR, sin_TR, attend)


def unpadded_prefill_layer(
    block: Block,
    x_BLE: Tensor,
    cos_TR: Tensor,
    sin_TR: Tensor,
    k_BKCD: Tensor,
    v_BKCD: Tensor,
    real_T: Tensor,
    cu_seqlens_S1: Tensor,
) -> Tensor:
    """The block over prompts: takes its real rows out for attention and puts them back."""

    def attend(layer: Attention, q_BLHD: Tensor, k_BLKD: Tensor, v_BLKD: Tensor) -> Tensor:
        _keep(k_BKCD, v_BKCD, k_BLKD, v_BLKD)
        return unpadded_rectangle(layer, q_BLHD, k_BLKD, v_BLKD, real_T, cu_seqlens_S1)

    return block_output(block, x_BLE, cos_TR, sin_TR, attend)


def seen_keys(kv_lens_B: Tensor, capacity: int, dtype: torch.dtype) -> Tensor:
    """What is added to the scores [B, C] of a decode step: 0 where there is a key, else -inf."""
    key_C = torch.arange(capacity, device=kv_lens_B.device)
    bias_BC = torch.zeros(len(kv_lens_B), capacity, dtype=dtype, device=kv_lens_B.device)
    return bias_BC.masked_fill(key_C[None, :] > kv_lens_B[:, None], float("-inf"))


def sdpa_decode_layer(
    block: Block,
    x_B1E: Tensor,
    cos_TR: Tensor,
    sin_TR: Tensor,
    k_BKCD: Tensor,
    v_BKCD: Tensor,
    kv_lens_B: Tensor,
    bias_BC: Tensor,
) -> Tensor:
    """The block over one more token a row; kv_lens_B counts the keys before it."""

    def attend(layer: Attention, q_B1HD: Tensor, k_B1KD: Tensor, v_B1KD: Tensor) -> Tensor:
        _append(k_BKCD, v_BKCD, kv_lens_B, k_B1KD, v_B1KD)
        mask_BC, left = bias_BC, layer.window_size[0]
        if left >= 0:
            key_C = torch.arange(k_BKCD.shape[2], device=kv_lens_B.device)
            gone_BC = key_C[None, :] < kv_lens_B[:, None] - left
            mask_BC = bias_BC.masked_fill(gone_BC, float("-inf"))
        # The queries that share a key head as rows of one: torch has no fast kernel that takes
        # both a mask and fewer key heads.
        q_BKGD = q_B1HD[:, 0].unflatten(1, (k_BKCD.shape[1], -1))
        out_BKGD = F.scaled_dot_product_attention(
            q_BKGD, k_BKCD, v_BKCD, attn_mask=mask_BC[:, None, None],
            scale=layer.config.attention_scale,
        )  # fmt: skip
        return out_BKGD.flatten(1, 2)[:, None]

    return block_output(block, x_B1E, cos_TR, sin_TR, attend)


def unpadded_decode_layer(
    block: Block,
    x_B1E: Tensor,
    cos_TR: Tensor,
    sin_TR: Tensor,
    k_BKCD: Tensor,
    v_BKCD: Tensor,
    kv_lens_B: Tensor,
    key_row_T: Tensor,
    key_at_T: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
) -> Tensor:
    """The same, gathering the real keys of its padded cache.

    key_row_T, key_at_T, cu_seqlens_k: where they lie in B and C, the new token's included.
    cu_seqlens_q: 0 to B.
    """

    def attend(layer: Attention, q_B1HD: Tensor, k_B1KD: Tensor, v_B1KD: Tensor) -> Tensor:
        _append(k_BKCD, v_BKCD, kv_lens_B, k_B1KD, v_B1KD)
        k_TKD, v_TKD = (x_BKCD[key_row_T, :, key_at_T] for x_BKCD in (k_BKCD, v_BKCD))
        out_BHD, _ = varlen_attention(
            q_B1HD[:, 0], k_TKD, v_TKD, cu_seqlens_q, cu_seqlens_k,
            scale=layer.config.attention_scale, window_size=layer.window_size,
        )  # fmt: skip
        return out_BHD[:, None]

    return block_output(block, x_B1E, cos_TR, sin_TR, attend)
