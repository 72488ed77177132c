"""minigen's operations on the flat batch: `torch.library` operations with CPU and GPU kernels."""

from minigen.kernels.decoder_layers import LayerWeights, decoder_layers
from minigen.kernels.few_rows_linear import few_rows_linear
from minigen.kernels.kv_cache_write import kv_cache_write
from minigen.kernels.linear import linear
from minigen.kernels.paged_attention import paged_attention
from minigen.kernels.rope_cache_write import rope_cache_write
from minigen.kernels.sum_norm import sum_norm
from minigen.kernels.tile_linear import tile_linear
from minigen.kernels.varlen_attention import varlen_attention

__all__ = [
    "LayerWeights",
    "decoder_layers",
    "few_rows_linear",
    "kv_cache_write",
    "linear",
    "paged_attention",
    "rope_cache_write",
    "sum_norm",
    "tile_linear",
    "varlen_attention",
]
