"""A layer over the rows of a decode step, in seven to nine kernels that begin before the last one
ends, where it else takes eleven to sixteen.

At one or two rows a layer's weights stream in 7 us (Qwen3-0.6B, H200), and each kernel takes 2 to 3
for itself: what counts is how many there are, and what each has done when the one before ends. A
step of one sequence takes 0.69 ms in place of 1.39, one of 32 takes 1.17 in place of 1.61. Steps of
more rows, or of a family that needs more, run the compiled layer. Shape suffixes as in `model.py`,
and P parts that a linear layer is divided in.
"""

import torch
from torch import Tensor, nn

from minigen.kernels import (
    few_rows_linear,
    paged_attention,
    rope_cache_write,
    sum_norm,
    tile_linear,
)
from minigen.kernels.few_rows_linear import MAX_INPUTS, PLAIN_ROWS, multiplies_tiles
from minigen.kernels.tile_linear_gluon import choose_parts
from minigen.kernels.varlen_attention_gluon import runs_gluon
from minigen.model import Attention, Block, DecoderConfig, LayerKV

# How the kernel names what config.json calls so.
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
# The four linear layers of Qwen3-0.6B with what is around them take 16, 20, 23 and 24 us at 2, 4, 8
# and 16 rows, cuBLAS's products with Inductor's kernels 33, 37, 31 and 31. With a second tile of
# rows at 24 it is 35 and 32 (H200).
MAX_ROWS = 16
# The least and most rows of `tiled_layer`. A whole layer of Qwen3-0.6B takes it 22.0, 22.4, 24.1
# and 25.1 us at 1, 2, 4 and 8 rows, `few_rows_layer` 19.7, 24.3, 31.1 and 32.1; of Llama-3.1-8B 124
# at 2 rows for 163 (H200).
TILED_ROWS = (2, 256)
# Of wider layers than this: a step of Llama-3.1-8B takes 4.41 ms at 32 rows, with cuBLAS 5.01. No
# width between 4,096 and its 14,336 was timed.
TILED_WIDTH, WIDE_ROWS = 4096, (1, 32)
# Up to here the projection is divided, too, and `rope_cache_write` adds its parts: at 8 rows a
# layer of Qwen3-0.6B takes 25.1 us in place of 25.6, at 48 42.4 in place of 43.7, at 128 83.1 in
# place of 81.9 (H200).
QKV_PARTS_ROWS = 64


def serves_few_rows(
    config: DecoderConfig, num_rows: int, device: torch.device, dtype: torch.dtype
) -> bool:
    """Whether `few_rows_layer` does what a layer of this model is, and is quicker."""
    widest = _widest(config)
    return (
        _is_known(config, device)
        and num_rows <= MAX_ROWS
        and (num_rows <= PLAIN_ROWS or multiplies_tiles(num_rows, widest, dtype))
        and widest <= MAX_INPUTS
    )


def serves_tiles(
    config: DecoderConfig, num_rows: int, device: torch.device, dtype: torch.dtype
) -> bool:
    """Whether `tiled_layer` does what a layer of this model is, and is quicker."""
    least, most = TILED_ROWS if _widest(config) <= TILED_WIDTH else WIDE_ROWS
    return (
        _is_known(config, device)
        and runs_gluon(device)
        and least <= num_rows <= most
        and dtype.itemsize == 2
        # Rows of descriptors are multiples of 16 bytes.
        and all(width % 8 == 0 for width in _widths(config))
    )


def _is_known(config: DecoderConfig, device: torch.device) -> bool:
    known = config.activation in _ACTIVATIONS and not config.post_norms
    return device.type == "cuda" and known


def _widths(config: DecoderConfig) -> tuple[int, int, int]:
    return config.hidden_size, config.num_heads * config.head_dim, config.intermediate_size


def _widest(config: DecoderConfig) -> int:
    return max(_widths(config))


def few_rows_layer(
    block: Block,
    x_TE: Tensor,
    cos_TR: Tensor,
    sin_TR: Tensor,
    cu_seqlens_S1: Tensor,
    kv: LayerKV,
) -> Tensor:
    """What `block` gives for rows that attend over `kv`: [T, E], T at most `MAX_ROWS`.

    Rounded to the dtype less often than by the separate operations.
    """
    attention, mlp = block.attention, block.mlp
    config = attention.config
    # Kernels begin while the one before still runs, see `dependent_launch`.
    norm = {"eps": config.rms_norm_eps, "norm_offset": config.norm_offset, "pdl": True}
    qkv_TF = few_rows_linear(
        x_TE, attention.qkv_proj.weight, attention.qkv_proj.bias,
        norm_weight_E=block.input_norm.weight, **norm,
    )  # fmt: skip
    out_TE = _attend(attention, qkv_TF, cos_TR, sin_TR, cu_seqlens_S1, kv)
    x_TE = few_rows_linear(out_TE, attention.o_proj.weight, attention.o_proj.bias, x_TE, pdl=True)
    hidden_TF = few_rows_linear(
        x_TE, mlp.gate_up_proj.weight, mlp.gate_up_proj.bias, norm_weight_E=block.mlp_norm.weight,
        activation=_ACTIVATIONS[config.activation], **norm,
    )  # fmt: skip
    return few_rows_linear(hidden_TF, mlp.down_proj.weight, mlp.down_proj.bias, x_TE, pdl=True)


def tiled_layer(
    block: Block,
    x_TE: Tensor,
    part_PTE: Tensor,
    cos_TR: Tensor,
    sin_TR: Tensor,
    cu_seqlens_S1: Tensor,
    kv: LayerKV,
) -> tuple[Tensor, Tensor]:
    """What `block` gives for x + the sum of parts, as another x and float32 parts [P, T, E].

    T as in `TILED_ROWS`. Rounded to the dtype less often than by the separate operations.
    """
    attention, mlp = block.attention, block.mlp
    eps, offset = attention.config.rms_norm_eps, attention.config.norm_offset
    activation = _ACTIVATIONS[attention.config.activation]
    # Kernels begin while the one before still runs, see `dependent_launch`.
    x_TE, normed_TE = sum_norm(x_TE, part_PTE, block.input_norm.weight, eps, offset, True)
    qkv = _in_parts(normed_TE, attention.qkv_proj, len(x_TE) <= QKV_PARTS_ROWS)
    out_TE = _attend(attention, qkv, cos_TR, sin_TR, cu_seqlens_S1, kv)
    part_PTE = _in_parts(out_TE, attention.o_proj)
    x_TE, normed_TE = sum_norm(x_TE, part_PTE, block.mlp_norm.weight, eps, offset, True)
    hidden_TF = tile_linear(
        normed_TE, mlp.gate_up_proj.weight, mlp.gate_up_proj.bias, activation, pdl=True
    )
    return x_TE, _in_parts(hidden_TF, mlp.down_proj)


def _in_parts(x_TE: Tensor, linear: nn.Linear, divided: bool = True) -> Tensor:
    """[P, T, F]; not `divided` [T, F]."""
    parts = choose_parts(x_TE.shape[0], *reversed(linear.weight.shape)) if divided else 0
    return tile_linear(x_TE, linear.weight, linear.bias, parts=parts, pdl=True)


def _attend(
    attention: Attention,
    qkv: Tensor,
    cos_TR: Tensor,
    sin_TR: Tensor,
    cu_seqlens_S1: Tensor,
    kv: LayerKV,
) -> Tensor:
    """Norms of queries and keys, rope, cache write and attention: [T, H * D].

    `qkv`: the projection [T, F], or its parts [P, T, F].
    """
    config = attention.config
    q_weight_D = k_weight_D = None
    if config.qk_norm:
        q_weight_D, k_weight_D = attention.q_norm.weight, attention.k_norm.weight
    q_THD = rope_cache_write(
        qkv.unflatten(-1, (-1, config.head_dim)), q_weight_D, k_weight_D, config.rms_norm_eps,
        cos_TR, sin_TR, None, kv.k_cache_NBKD, kv.v_cache_NBKD, kv.slots_T, attention.rotates, True,
    )  # fmt: skip
    out_THD = paged_attention(
        q_THD, kv.k_cache_NBKD, kv.v_cache_NBKD, cu_seqlens_S1, kv.kv_lens_S, kv.block_table_SW,
        scale=config.attention_scale, window_size=attention.window_size,
        softcap=config.attention_softcap, pdl=True,
    )  # fmt: skip
    return out_THD.flatten(1)
