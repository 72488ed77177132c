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
HOPPER_SHARED_BYTES = 227 * 1024  # no AMD GPU has as much


class Tile(NamedTuple):
    """The sizes with which an attention kernel is compiled.

    `block_q` is `block_m` where heads are not packed. With `mask_all` every tile is masked;
    without, a branch leaves masks out where every query sees every key: worth it where masks cost
    time. `max_registers` a thread make room for more programs on a multiprocessor (NVIDIA only);
    with it a program waits for each product at once, see `wait_for`.
    """

    block_m: int
    block_q: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int
    mask_all: bool = False
    max_registers: int | None = None


def power_of_two(number: int) -> int:
    """The least power of two that is not below `number`."""
    return 1 << max(number - 1, 0).bit_length()


def choose_tile(
    queries: int,
    group: int,
    head_dim: int,
    itemsize: int,
    shared_bytes: int = LEAST_SHARED_BYTES,
    paged: bool = False,
    deep: bool = False,
) -> Tile:
    """Tile for sequences of about `queries` queries each; a tensor core needs 16 rows at least.

    A tile of few rows waits for memory, not for its masks, so that it masks all. `paged` keys come
    in two dependent loads (table, then cache): Triton's pipeliner then holds (num_stages - 1) // 2
    tiles in flight, seen in TTGIR, where it holds num_stages tiles of keys at known addresses. With
    64 KiB (AMD, whose pipeliner counts otherwise) num_stages stays what surely fits. `deep` paged
    tiles of few rows hold three tiles in flight where three fit and Triton counts so.

    With heads of 128, two programs should share a multiprocessor: one waits while the other
    computes. Those of 128 rows read keys half as often as those of 64, and fit twice into 128
    registers a thread; without descriptors (`choose_descriptor_tile`) only `paged` ones gain by it.
    H200, 32/8 heads, TFLOP/s, by rows, warps and tiles of keys in flight; * 128 registers:

                         16 x 512   64 of mean 298   16 x 1024   4 x 4096   1 x 16384
        varlen  64 4 2        234              285         309        393         404
                64 4 3        241              307         325        424         440
               128 8 3        232              292         324        428         472
               128 8 2 *      223              286         315        395         420
        paged   64 4 2        223              280         300        379         398
               128 8 2        203              253         281        380         404
               128 8 1 *      244              319         345        471         471

    Exact float32 products run on no tensor core and keep their factors in registers: larger tiles
    than these put 7 to 23 KB a thread on the stack (sm_90, Triton 3.6).
    """
    block_d = max(16, power_of_two(head_dim))
    row_bytes = block_d * itemsize
    exact = itemsize >= 4
    heads_of_128 = row_bytes == 256 and not exact
    few_registers = paged and heads_of_128 and shared_bytes >= HOPPER_SHARED_BYTES
    half_tile = heads_of_128 and not few_registers and (paged or queries <= 2048)
    most_rows = 32 if exact else 64 if row_bytes > 256 or half_tile else 128
    block_m = min(max(16, power_of_two(queries * group)), most_rows)
    block_m = max(block_m, power_of_two(group))
    few_registers &= block_m == 128
    block_n = 16 if exact else 64 if row_bytes <= 256 else 32
    # Besides queries and keys: weights on their way to the second product, entries of the table.
    spare_bytes = shared_bytes - block_m * row_bytes - (8 * 1024 if paged else 0)
    # Two tiles in flight let three decode programs of head dim 128 share a multiprocessor, and two
    # of 64 rows; one lets two of 128 rows.
    rows_of_two = 64 if heads_of_128 else 32
    counts_pairs = paged and shared_bytes > 64 * 1024
    holds_two = paged and block_m <= rows_of_two and not (deep and counts_pairs)
    most_buffers = 1 if few_registers else 2 if holds_two else 3
    buffers = min(max(spare_bytes, 0) // (2 * block_n * row_bytes), most_buffers)
    num_stages = 2 * buffers + 1 if counts_pairs else max(buffers, 1)
    num_warps = 8 if block_m * block_d >= (32 if exact else 128) * 128 else 4
    return Tile(
        block_m,
        block_m // group,
        block_n,
        block_d,
        num_warps,
        num_stages,
        mask_all=block_m <= 32,
        max_registers=128 if few_registers else None,
    )


def shared_bytes_of(device: torch.device) -> int:
    """Shared memory a program may use (without a GPU, in Triton's interpreter, any figure does)."""
    if device.type != "cuda":
        return LEAST_SHARED_BYTES
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def has_bulk_copies(capability: tuple[int, int]) -> bool:
    """Whether a GPU has Hopper's copies by descriptor; some of AMD's have capability 9, too, and
    none."""
    return capability[0] == 9 and torch.version.hip is None


def fits_descriptor(x: Tensor) -> bool:
    """Whether the copy engine can read x, of 16 bits an element: rows without gaps that begin at
    multiples of 16 bytes, and at one another's distance."""
    *strides, last = x.stride()
    aligned = x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in strides)
    return x.numel() > 0 and aligned and last == 1 and strides[0] > 0  # an expanded tensor's is 0


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
    registers = {} if tile.max_registers is None else {"maxnreg": tile.max_registers}
    return registers | {
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "BLOCK_M": tile.block_m,
        "BLOCK_Q": tile.block_q,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": tile.block_d,
        "MASK_ALL": tile.mask_all,
        # Triton's interpreter has no inline assembly, and nothing to wait for.
        "WAIT": tile.max_registers is not None and not triton.knobs.runtime.interpret,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def positive_scale(q_THD: Tensor, scale: float) -> tuple[Tensor, float]:
    """The same scores with a scale above 0, which `softmax_step` needs: its sign goes into q."""
    if scale > 0:
        return q_THD, scale
    return q_THD * (-1.0 if scale < 0 else 0.0), -scale if scale < 0 else 1.0


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
    T // BLOCK_Q + S without a length. All begins are read at once, where a binary search reads
    nine of 257 one after the other, so that surplus programs of a step can end sooner; for packed
    prompts it made no difference (249 and 250 TFLOP/s at 16 x 512, H200).
    """
    num_left = num_seqs * 0
    for first in range(0, num_seqs, 512):
        seq_S = first + tl.arange(0, 512)
        begin_S = tl.load(cu_seqlens_ptr + seq_S, mask=seq_S < num_seqs, other=0)
        is_left_S = (seq_S < num_seqs) & (begin_S // BLOCK_Q + seq_S <= block)
        num_left += tl.sum(is_left_S.to(tl.int32), 0)
    return num_left - 1


@triton.jit
def search_sequence(cu_seqlens_ptr, block, num_seqs, BLOCK_Q: tl.constexpr):
    """The same by halves, number by number: for Gluon, in which one warp looks far ahead."""
    left = num_seqs * 0
    right = num_seqs
    # A loop of known length: one step more than needed does no harm.
    for _ in range(tl.log2(num_seqs.to(tl.float32)).to(tl.int32) + 2):
        middle = (left + right) // 2
        is_right = tl.load(cu_seqlens_ptr + middle) // BLOCK_Q + middle <= block
        is_right &= left < right
        left = tl.where(is_right, middle + 1, left)
        right = tl.where(is_right, right, middle)
    return left - 1


@triton.jit
def find_queries(
    cu_seqlens_ptr, block, num_seqs, LATEST_FIRST: tl.constexpr, BLOCK_Q: tl.constexpr
):
    """Sequence of a block, its first row, its number of queries, and the block's first query."""
    seq = find_sequence(cu_seqlens_ptr, block, num_seqs, BLOCK_Q)
    q_start, num_queries, first_query = queries_of_block(
        cu_seqlens_ptr, block, seq, LATEST_FIRST, BLOCK_Q
    )
    return seq, q_start, num_queries, first_query


@triton.jit
def queries_of_block(cu_seqlens_ptr, block, seq, LATEST_FIRST: tl.constexpr, BLOCK_Q: tl.constexpr):
    """First row of a block's sequence, its number of queries, and the block's first query.

    LATEST_FIRST turns the blocks of a sequence round: under a causal mask the last queries see most
    keys, and work that starts last should be short. A surplus block begins behind the queries.
    """
    q_start = tl.load(cu_seqlens_ptr + seq)
    num_queries = tl.load(cu_seqlens_ptr + seq + 1) - q_start
    index = block - (q_start // BLOCK_Q + seq)
    if LATEST_FIRST:
        num_blocks = tl.cdiv(num_queries, BLOCK_Q)
        index = tl.where(index < num_blocks, num_blocks - 1 - index, index)
    return q_start, num_queries, index * BLOCK_Q


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
def whole_tiles(
    first,
    last,
    low,
    high,
    num_keys,
    window_left,
    window_right,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The part of `low` to `high` in tiles of which every query sees every key, so without masks.

    What lies before and behind it (window's edge, diagonal, end of the sequence) are edge tiles.
    Without a whole tile the second bound is not above the first.
    """
    whole_low = low
    whole_high = tl.minimum(num_keys, high)
    if HAS_LEFT:
        whole_low = tl.maximum(tl.cdiv(tl.maximum(last - window_left, 0), BLOCK_N) * BLOCK_N, low)
    if HAS_RIGHT:
        whole_high = tl.minimum(first + window_right + 1, whole_high)
    return whole_low, tl.maximum(whole_high, 0) // BLOCK_N * BLOCK_N


@triton.jit
def load_keys(
    ptr_ND,
    key_N,
    num_keys,
    dim_D,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of keys or values; rows behind the sequence are zeros, as is a padded head dim."""
    in_tile_ND = (key_N < num_keys)[:, None]
    if HEAD_DIM < BLOCK_D:
        in_tile_ND = in_tile_ND & (dim_D < HEAD_DIM)[None, :]
    return tl.load(ptr_ND, mask=in_tile_ND, other=0.0)


@triton.jit
def scores(q_MD, k_ND, score_scale, cap_scale, HAS_SOFTCAP: tl.constexpr):
    """Products before the scale, so that scaling and subtracting the maximum is one multiply-add an
    element (`softmax_step`); where there is a cap, scores after it, in base 2."""
    # "ieee": a float32 product in TF32 would keep ten bits of each factor.
    score_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee")
    if HAS_SOFTCAP:  # cap * tanh(x) with tanh(x) = 1 - 2 / (e^2x + 1), which is right at +-inf
        score_MN = cap_scale * (1.0 - 2.0 / (tl.exp2(score_MN * score_scale) + 1.0))
    return score_MN


@triton.jit
def softmax_step(acc_MD, max_M, sum_M, score_MN, v_ND, score_scale, HAS_SOFTCAP: tl.constexpr):
    """Takes one tile's `scores` into the running maximum, sum of exponents and weighted values.

    A pair of query and key that is hidden has score -inf. The scale must be positive.
    """
    unit = score_scale
    if HAS_SOFTCAP:
        unit = 1.0
    new_max_M = tl.maximum(max_M, tl.max(score_MN, 1))
    # A row that has seen no key yet has maximum -inf, and -inf - -inf is NaN.
    base_M = tl.where(new_max_M == float("-inf"), 0.0, new_max_M * unit)
    weight_MN = tl.exp2(score_MN * unit - base_M[:, None])
    shrink_M = tl.exp2(max_M * unit - base_M)
    sum_M = sum_M * shrink_M + tl.sum(weight_MN, 1)
    acc_MD = acc_MD * shrink_M[:, None]
    acc_MD = tl.dot(weight_MN.to(v_ND.dtype), v_ND, acc_MD, input_precision="ieee")
    return acc_MD, new_max_M, sum_M


@triton.jit
def wait_for(acc_MD):
    """The same values; the product that makes them is awaited here.

    Triton would leave it in flight beside the next scores, whose registers (32 a thread at 128 x 64
    in 8 warps) come on top of the weights' (16). If all must fit 128, ptxas serialises every
    product. An empty instruction that reads the values makes Triton wait before it.
    """
    return tl.inline_asm_elementwise("", "=f,0", [acc_MD], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def softmax_finish(acc_MD, max_M, sum_M, score_scale, HAS_SOFTCAP: tl.constexpr):
    """Output and base-2 log of the sum of exponents; 0 and -inf for a row that saw no key."""
    unit = score_scale
    if HAS_SOFTCAP:
        unit = 1.0
    empty_M = sum_M == 0.0
    divisor_M = tl.where(empty_M, 1.0, sum_M)
    lse_M = tl.where(empty_M, float("-inf"), max_M * unit + tl.log2(divisor_M))
    # A division an element would be 150 instructions a thread more at 128 x 128: half a tile's.
    return acc_MD * (1.0 / divisor_M)[:, None], lse_M
