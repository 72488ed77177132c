"""How much arithmetic a training step needs, and how much the device could do."""

from __future__ import annotations

import numpy as np

from minigen.model import DecoderConfig

# Dense bf16 with fp32 sums, FLOP/s, by a part of the device's name; the first that fits counts.
# Source: the makers' data sheets, without sparsity.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
}


def peak_flops_of(device_name: str) -> float | None:
    """The peak of a GPU by its name, None for one that is not known."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)


def step_flops(
    config: DecoderConfig, lengths_N: np.ndarray, num_targets_N: np.ndarray
) -> np.ndarray:
    """FLOP of forward and backward for each sample: what is recomputed does not count.

    Six times the weights for each token (the head's for each target), and attention's products over
    the pairs that a causal mask and the layer's window leave; its backward counts twice.
    """
    c = config
    heads = (2 * c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    layer = c.hidden_size * (heads + 3 * c.intermediate_size)
    flops = 6.0 * c.num_layers * layer * lengths_N
    flops += 6.0 * c.hidden_size * c.vocab_size * num_targets_N
    for window in c.layer_windows:
        full = np.minimum(lengths_N, window) if window else lengths_N
        pairs = full * (full + 1) / 2 + (lengths_N - full) * full
        flops += 3 * 4 * c.num_heads * c.head_dim * pairs
    return flops
