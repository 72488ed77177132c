"""The forward of `varlen_attention` by tensor descriptors: Hopper's bulk copies, and newer ones.

The copy engine brings a tile of keys to shared memory from one instruction, zero-filled behind the
sequence, so that no thread computes addresses or masks loads. `varlen_attention.py` holds the
kernel that runs everywhere, with the same arguments, and chooses.

Shapes: T packed tokens, S sequences, H query heads, K key/value heads, G = H / K query heads that
share a key/value head, D head dim; M rows of a tile, N keys of a tile.
"""

# Triton annotates a descriptor's shape and strides as tensors, and takes numbers.
# pyright: reportArgumentType=false

import contextvars
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minigen.kernels.tiles import (
    HOPPER_SHARED_BYTES,
    Tile,
    find_queries,
    has_bulk_copies,
    key_range,
    power_of_two,
    scores,
    softmax_finish,
    softmax_step,
    visible_keys,
    wait_for,
    whole_tiles,
)
from minigen.kernels.triton_import import tl, triton


def fits_tensor_descriptors(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> bool:
    """Bulk copies want rows of 16 bytes and more that start at multiples of 16 bytes."""
    itemsize = q_THD.element_size()
    return itemsize == 2 and all(
        x.data_ptr() % 16 == 0
        and x.shape[2] * itemsize % 16 == 0
        and x.stride(0) > 0  # an expanded tensor's is 0
        and x.stride(0) * itemsize % 16 == 0
        and x.stride(1) * itemsize % 16 == 0
        for x in (q_THD, k_TKD, v_TKD)
    )


def prefers_descriptors(queries: int, head_dim: int, capability: tuple[int, int]) -> bool:
    """Whether this kernel is the faster one for sequences of about `queries` queries each.

    H200, 32/8 heads of 128, TFLOP/s with descriptors and of the best tile without: 1 x 16384 492
    and 472, 4 x 4096 518 and 428, 16 x 1024 366 and 325, 16 x 512 250 and 241, 64 sequences of mean
    298 335 and 307. A program first writes its two descriptors, about 1.7 us, so that shorter
    sequences, which were not measured, should gain nothing. Heads of 64: 437 and 420, 398 and 398,
    275 and 300.
    """
    enough = 4096 if head_dim == 64 else 256
    return has_bulk_copies(capability) and 64 <= head_dim <= 128 and queries >= enough


def choose_descriptor_tile(
    queries: int, group: int, head_dim: int, itemsize: int, shared_bytes: int
) -> Tile:
    """Tile without specialised warps.

    At head dim 128, 128 registers a thread and two tiles of keys let two programs of 128 x 64 in 8
    warps share a multiprocessor. H200, TFLOP/s of two programs and of one with three tiles:

                      16 x 512   64 of mean 298   16 x 1024   4 x 4096   1 x 16384
        32/8 heads    250, 193         335, 257    366, 291   518, 445    492, 503
        16/8 heads                     300, 244    335, 288   493, 458    521, 506

    At 64 two share it anyway (111 registers).
    """
    block_d = max(16, power_of_two(head_dim))
    block_m, block_n = 128, 64
    row_bytes = block_d * itemsize
    two_share = row_bytes == 256 and shared_bytes >= HOPPER_SHARED_BYTES
    most_stages = 2 if two_share or block_d > 128 else 3
    num_stages = max((shared_bytes - block_m * row_bytes - 4096) // (2 * block_n * row_bytes), 1)
    return Tile(
        block_m,
        block_m // group if group <= block_m else block_m,
        block_n,
        block_d,
        num_warps=8,
        num_stages=min(num_stages, most_stages),
        max_registers=128 if two_share else None,
    )


def launch_with_descriptors(
    grid: Any, arguments: Any, options: dict[str, Any], device: torch.device
) -> None:
    """Launches with memory for the descriptors, which the programs write themselves.

    Four warps and tiles of unpacked heads of at least 128 queries (two groups of four warps, 64
    rows each) are specialised: one more group of warps then only starts copies.
    """
    specialize = options["num_warps"] == 4 and options["BLOCK_Q"] == options["BLOCK_M"] >= 128

    def launch() -> None:
        varlen_attention_tma_kernel[grid](*arguments, **options, WARP_SPECIALIZE=specialize)

    with_descriptor_memory(launch, device)


def with_descriptor_memory(launch: Callable[[], None], device: torch.device) -> None:
    """Calls `launch`, whose programs write descriptors.

    Triton asks the context's allocator for their memory. It is set in a copy of the context, so
    that a caller's own allocator stays in place.
    """

    def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)

    def run() -> None:
        triton.set_allocator(allocate)
        launch()

    contextvars.copy_context().run(run)


@triton.jit(
    do_not_specialize=["num_tokens", "num_seqs", "num_slots", "window_left", "window_right"]
)
def varlen_attention_tma_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    num_tokens,
    num_seqs,
    num_slots,
    q_stride_t,
    q_stride_h,
    k_stride_t,
    k_stride_h,
    v_stride_t,
    v_stride_h,
    window_left,
    window_right,
    score_scale,
    cap_scale,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SLOTS_A_KEY_HEAD: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASK_ALL: tl.constexpr,
    WAIT: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
):
    """One program: BLOCK_Q queries of one sequence, GROUP heads that share keys, all their keys.

    As `varlen_attention_kernel`. With WARP_SPECIALIZE it keeps to what Triton 3.6 and 3.7
    specialise (as their TTGIR shows; else they leave it out, or fail): no early return, no `while`,
    no `else`, and queries that come by a two-dimensional descriptor. So all tiles are masked, and a
    surplus program runs no tile.
    """
    slot = tl.program_id(0) % num_slots
    kv_head = slot // SLOTS_A_KEY_HEAD
    seq, q_start, num_queries, first_query = find_queries(
        cu_seqlens_q_ptr, tl.program_id(0) // num_slots, num_seqs, HAS_RIGHT, BLOCK_Q
    )
    k_start = tl.load(cu_seqlens_k_ptr + seq)
    num_keys = tl.load(cu_seqlens_k_ptr + seq + 1) - k_start
    # A descriptor ends with its sequence: what is loaded from behind it is zeros. One row at least,
    # because a descriptor of none is not allowed; nothing is loaded from it.
    k_desc = tl.make_tensor_descriptor(
        k_ptr + k_start.to(tl.int64) * k_stride_t + kv_head.to(tl.int64) * k_stride_h,
        shape=[tl.maximum(num_keys, 1), HEAD_DIM],
        strides=[k_stride_t, 1],
        block_shape=[BLOCK_N, BLOCK_D],
    )
    v_desc = tl.make_tensor_descriptor(
        v_ptr + k_start.to(tl.int64) * v_stride_t + kv_head.to(tl.int64) * v_stride_h,
        shape=[tl.maximum(num_keys, 1), HEAD_DIM],
        strides=[v_stride_t, 1],
        block_shape=[BLOCK_N, BLOCK_D],
    )

    row_M = tl.arange(0, BLOCK_M)
    query_M = first_query + row_M // GROUP
    head_M = slot * GROUP + row_M % GROUP
    dim_D = tl.arange(0, BLOCK_D)
    token_M = (q_start + query_M).to(tl.int64)
    in_tile_M = (row_M < BLOCK_Q * GROUP) & (query_M < num_queries)
    in_tile_MD = in_tile_M[:, None] & (dim_D < HEAD_DIM)[None, :]
    if GROUP == 1:
        # The row is counted in the batch, not in the sequence, so that it is a value of its own:
        # where Triton 3.6 and 3.7 give each group of warps its 64 rows, they add 64 to a
        # descriptor's row for the second group, and then to all else that is computed from the
        # same value. With `first_query` here, `query_M` was 64 too high there, and that group's
        # rows were stored 64 rows late (`mappings.map(coordVal, ...)` in WSDataPartition.cpp).
        q_desc = tl.make_tensor_descriptor(
            q_ptr + slot.to(tl.int64) * q_stride_h,
            shape=[tl.maximum(q_start + num_queries, 1), HEAD_DIM],
            strides=[q_stride_t, 1],
            block_shape=[BLOCK_M, BLOCK_D],
        )
        q_MD = q_desc.load([q_start + first_query, 0])
    else:
        q_offset_MD = (token_M * q_stride_t + head_M.to(tl.int64) * q_stride_h)[:, None] + dim_D[
            None, :
        ]
        q_MD = tl.load(q_ptr + q_offset_MD, mask=in_tile_MD, other=0.0)

    position_M = query_M + (num_keys - num_queries)
    first = first_query + (num_keys - num_queries)
    last = tl.minimum(first + BLOCK_Q, num_keys) - 1
    low, high = key_range(
        first, last, num_keys, window_left, window_right, HAS_LEFT, HAS_RIGHT, BLOCK_N
    )
    high = tl.where(first_query < num_queries, high, low)

    acc_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    max_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    whole_low, whole_high = whole_tiles(
        first, last, low, high, num_keys, window_left, window_right, HAS_LEFT, HAS_RIGHT, BLOCK_N
    )
    for start in tl.range(low, high, BLOCK_N, warp_specialize=WARP_SPECIALIZE):
        k_ND = k_desc.load([start, 0])
        v_ND = v_desc.load([start, 0])
        score_MN = scores(q_MD, k_ND, score_scale, cap_scale, HAS_SOFTCAP)
        if (MASK_ALL or WARP_SPECIALIZE) or (start < whole_low or start >= whole_high):
            visible_MN = visible_keys(
                position_M,
                start + tl.arange(0, BLOCK_N),
                num_keys,
                window_left,
                window_right,
                HAS_LEFT,
                HAS_RIGHT,
            )
            score_MN = tl.where(visible_MN, score_MN, float("-inf"))
        acc_MD, max_M, sum_M = softmax_step(
            acc_MD, max_M, sum_M, score_MN, v_ND, score_scale, HAS_SOFTCAP
        )
        if WAIT:
            acc_MD = wait_for(acc_MD)

    out_MD, lse_M = softmax_finish(acc_MD, max_M, sum_M, score_scale, HAS_SOFTCAP)
    out_row_M = token_M * (num_slots * GROUP) + head_M
    out_offset_MD = (out_row_M * HEAD_DIM)[:, None] + dim_D[None, :]
    tl.store(out_ptr + out_offset_MD, out_MD.to(out_ptr.dtype.element_ty), mask=in_tile_MD)
    lse_offset_M = head_M.to(tl.int64) * num_tokens + token_M
    # 0.693... = ln 2: from base 2 to the natural log that callers expect.
    tl.store(lse_ptr + lse_offset_M, lse_M * 0.6931471805599453, mask=in_tile_M)
