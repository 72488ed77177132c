"""What the Triton attention kernels share: finding a tile's sequence, its keys, online softmax.

A tile has BLOCK_M rows: BLOCK_Q queries of one sequence times the G query heads that share one
key/value head, so that a tile of keys is read once for all of them (query = row // G). Softmax runs
in base 2 and float32 (FlashAttention-2, Dao 2023, section 3.1).

Shapes: M rows of a tile, N keys of a tile, D head dim, H query heads, K key/value heads.
"""

import contextlib
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minigen.kernels.checks import Window
from minigen.kernels.triton_import import tl, triton

LOG2_E = math.log2(math.e)
# What every GPU since sm_80 grants a program (sm_86 and sm_89 least); the launcher asks the device.
LEAST_SHARED_BYTES = 99 * 1024


class Tile(NamedTuple):
    """The sizes with which an attention kernel is compiled."""

    block_m: int
    block_q: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int


def power_of_two(number: int) -> int:
    """The least power of two that is not below `number`."""
    return 1 << max(number - 1, 0).bit_length()


def choose_tile(
    queries: int, group: int, head_dim: int, itemsize: int, shared_bytes: int = LEAST_SHARED_BYTES
) -> Tile:
    """Tile for sequences of about `queries` queries each; a tensor core needs 16 rows at least."""
    block_d = max(16, power_of_two(head_dim))
    row_bytes = block_d * itemsize
    most_rows = 64 if row_bytes > 256 else 128
    block_m = min(max(16, power_of_two(queries * group)), most_rows)
    block_m = max(block_m, power_of_two(group))
    block_n = 64 if row_bytes <= 256 else 32
    if row_bytes > 512:
        block_n = 16
    spare_bytes = shared_bytes - block_m * row_bytes
    num_stages = min(max(spare_bytes // (2 * block_n * row_bytes), 1), 3)
    num_warps = 8 if block_m * block_d >= 128 * 128 else 4
    return Tile(block_m, block_m // group, block_n, block_d, num_warps, num_stages)


def shared_bytes_of(device: torch.device) -> int:
    """Shared memory a program may use (without a GPU, in Triton's interpreter, any figure does)."""
    if device.type != "cuda":
        return LEAST_SHARED_BYTES
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def window_arguments(window: Window) -> dict[str, Any]:
    """A side of 2**30 keys or more is open: no sequence is longer, and sums stay in 32 bits."""
    left, right = (None if side is None or side >= 2**30 else side for side in window)
    return {
        "window_left": left or 0,
        "window_right": right or 0,
        "HAS_LEFT": left is not None,
        "HAS_RIGHT": right is not None,
    }


def tile_arguments(tile: Tile, group: int, head_dim: int) -> dict[str, Any]:
    return {
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "BLOCK_M": tile.block_m,
        "BLOCK_Q": tile.block_q,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": tile.block_d,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def score_arguments(scale: float, softcap: float) -> dict[str, Any]:
    """Factors that take q·k to a score in base 2, see `softmax_step`."""
    if softcap == 0:
        return {"score_scale": scale * LOG2_E, "cap_scale": 0.0, "HAS_SOFTCAP": False}
    return {
        "score_scale": 2 * LOG2_E * scale / softcap,
        "cap_scale": softcap * LOG2_E,
        "HAS_SOFTCAP": True,
    }


@triton.jit
def find_sequence(cu_seqlens_ptr, block, num_seqs, BLOCK_Q: tl.constexpr):
    """The sequence of a block of queries: s begins at block cu_seqlens[s] // BLOCK_Q + s.

    Every sequence gets at least the blocks it needs, and the host can bound their number by
    T // BLOCK_Q + S without a length.
    """
    left = 0
    right = num_seqs
    while left < right:
        middle = (left + right) // 2
        if tl.load(cu_seqlens_ptr + middle) // BLOCK_Q + middle <= block:
            left = middle + 1
        else:
            right = middle
    return left - 1


@triton.jit
def key_range(
    first,
    last,
    num_keys,
    window_left,
    window_right,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The keys that queries at positions `first` to `last` see; begins at a tile's edge."""
    low = num_keys * 0
    high = num_keys
    if HAS_LEFT:
        low = tl.maximum(first - window_left, 0) // BLOCK_N * BLOCK_N
    if HAS_RIGHT:
        high = tl.minimum(last + window_right + 1, num_keys)
    return low, high


@triton.jit
def visible_keys(
    position_M,
    key_N,
    num_keys,
    window_left,
    window_right,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
):
    """True where the query of the row sees the key."""
    visible_MN = (key_N < num_keys)[None, :] & (position_M == position_M)[:, None]
    if HAS_LEFT:
        visible_MN &= key_N[None, :] >= position_M[:, None] - window_left
    if HAS_RIGHT:
        visible_MN &= key_N[None, :] <= position_M[:, None] + window_right
    return visible_MN


@triton.jit
def softmax_step(
    acc_MD,
    max_M,
    sum_M,
    q_MD,
    k_DN,
    v_ND,
    visible_MN,
    score_scale,
    cap_scale,
    HAS_SOFTCAP: tl.constexpr,
):
    """Takes one tile of keys into the running maximum, sum of exponents and weighted values."""
    # "ieee": a float32 product in TF32 would keep ten bits of each factor.
    score_MN = tl.dot(q_MD, k_DN, input_precision="ieee") * score_scale
    if HAS_SOFTCAP:  # cap * tanh(x) with tanh(x) = 1 - 2 / (e^2x + 1), which is right at +-inf
        score_MN = cap_scale * (1.0 - 2.0 / (tl.exp2(score_MN) + 1.0))
    score_MN = tl.where(visible_MN, score_MN, float("-inf"))
    new_max_M = tl.maximum(max_M, tl.max(score_MN, 1))
    # A row that has seen no key yet has maximum -inf, and -inf - -inf is NaN.
    base_M = tl.where(new_max_M == float("-inf"), 0.0, new_max_M)
    weight_MN = tl.exp2(score_MN - base_M[:, None])
    shrink_M = tl.exp2(max_M - base_M)
    sum_M = sum_M * shrink_M + tl.sum(weight_MN, 1)
    acc_MD = acc_MD * shrink_M[:, None]
    acc_MD = tl.dot(weight_MN.to(v_ND.dtype), v_ND, acc_MD, input_precision="ieee")
    return acc_MD, new_max_M, sum_M


@triton.jit
def softmax_finish(acc_MD, max_M, sum_M):
    """Output and base-2 log of the sum of exponents; 0 and -inf for a row that saw no key."""
    empty_M = sum_M == 0.0
    divisor_M = tl.where(empty_M, 1.0, sum_M)
    lse_M = tl.where(empty_M, float("-inf"), max_M + tl.log2(divisor_M))
    return acc_MD / divisor_M[:, None], lse_M
