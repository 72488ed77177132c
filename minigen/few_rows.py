"""A layer over the few rows of a small decode step, in seven to nine kernels where it else
takes sixteen.

At one or two rows a layer's weights stream in 7 us (Qwen3-0.6B, H200), and each kernel takes 2 to 3
for itself: what counts is how many there are. A step of one sequence takes 0.71 ms in place of
1.39. Steps of more rows, or of a family that needs more, run the compiled layer. Shape suffixes as
in `model.py`.
"""

import torch
from torch import Tensor

from minigen.kernels import few_rows_linear, paged_attention, rope_cache_write
from minigen.kernels.few_rows_linear import MAX_INPUTS, PLAIN_ROWS, multiplies_tiles
from minigen.model import Block, DecoderConfig, LayerKV

# How the kernel names what config.json calls so.
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
# The four linear layers of Qwen3-0.6B with what is around them take 16, 20, 23 and 24 us at 2, 4, 8
# and 16 rows, cuBLAS's products with Inductor's kernels 33, 37, 31 and 31. With a second tile of
# rows at 24 it is 35 and 32 (H200).
MAX_ROWS = 16


def serves_few_rows(
    config: DecoderConfig, num_rows: int, device: torch.device, dtype: torch.dtype
) -> bool:
    """Whether `few_rows_layer` does what a layer of this model is, and is quicker."""
    widest = max(config.hidden_size, config.num_heads * config.head_dim, config.intermediate_size)
    return (
        device.type == "cuda"
        and num_rows <= MAX_ROWS
        and (num_rows <= PLAIN_ROWS or multiplies_tiles(num_rows, widest, dtype))
        and widest <= MAX_INPUTS
        and config.activation in _ACTIVATIONS
        and not config.post_norms
    )


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
    q_weight_D = k_weight_D = None
    if config.qk_norm:
        q_weight_D, k_weight_D = attention.q_norm.weight, attention.k_norm.weight
    # Kernels begin while the one before still runs, see `dependent_launch`.
    norm = {"eps": config.rms_norm_eps, "norm_offset": config.norm_offset, "pdl": True}
    qkv_TF = few_rows_linear(
        x_TE, attention.qkv_proj.weight, attention.qkv_proj.bias,
        norm_weight_E=block.input_norm.weight, **norm,
    )  # fmt: skip
    q_THD = rope_cache_write(
        qkv_TF.unflatten(-1, (-1, config.head_dim)), q_weight_D, k_weight_D, config.rms_norm_eps,
        cos_TR, sin_TR, None, kv.k_cache_NBKD, kv.v_cache_NBKD, kv.slots_T, attention.rotates, True,
    )  # fmt: skip
    out_THD = paged_attention(
        q_THD, kv.k_cache_NBKD, kv.v_cache_NBKD, cu_seqlens_S1, kv.kv_lens_S, kv.block_table_SW,
        scale=config.attention_scale, window_size=attention.window_size,
        softcap=config.attention_softcap, pdl=True,
    )  # fmt: skip
    x_TE = few_rows_linear(
        out_THD.flatten(1), attention.o_proj.weight, attention.o_proj.bias, x_TE, pdl=True
    )
    hidden_TF = few_rows_linear(
        x_TE, mlp.gate_up_proj.weight, mlp.gate_up_proj.bias, norm_weight_E=block.mlp_norm.weight,
        activation=_ACTIVATIONS[config.activation], **norm,
    )  # fmt: skip
    return few_rows_linear(hidden_TF, mlp.down_proj.weight, mlp.down_proj.bias, x_TE, pdl=True)
