"""The backward of `varlen_attention` by tensor descriptors: Hopper's bulk copies, and newer ones.

The copy engine brings tiles to shared memory from one instruction each, zero-filled behind the
sequence, so that no thread computes addresses or masks loads. `varlen_attention_backward.py` holds
the kernels that run everywhere, says what is computed, and chooses.

What the kernel of keys reads of each row, shift and delta, matters most. As plain loads they came
to every thread in the layout of the product's columns: at 64 rows in 8 warps 32 copies of four
bytes a thread and tile, four times as many as of the queries and their gradients. Here they are two
more bulk copies, from `rows_2HR`.

Shapes as there; R rows of `rows_2HR`: each sequence's queries, from a multiple of ROW_ALIGNMENT on
(`first_row_of`), because a descriptor begins at a multiple of 16 bytes.
"""

# Triton annotates a descriptor's shape and strides as tensors, and takes numbers.
# pyright: reportArgumentType=false

from minigen.kernels.backward_tiles import (
    BackwardTile,
    BackwardTiles,
    find_block,
    in_window,
    load_rows,
    load_tile,
)
from minigen.kernels.tiles import has_bulk_copies, wait_for
from minigen.kernels.triton_import import tl, triton

ROW_ALIGNMENT = 4  # float32


def padded_rows(num_tokens: int, num_seqs: int) -> int:
    """R: what `num_seqs` sequences of `num_tokens` tokens in all take, whatever their lengths."""
    return (num_tokens // ROW_ALIGNMENT + num_seqs) * ROW_ALIGNMENT


def prefers_backward_descriptors(queries: int, head_dim: int, capability: tuple[int, int]) -> bool:
    """Whether to take these kernels for sequences of about `queries` queries each.

    H200, 32 heads of 128, TFLOP/s with descriptors and of the pair without: 16 x 1024 251 and 233,
    4 x 4096 354 and 346, 1 x 16384 421 and 384. A program first writes its descriptors, about a
    microsecond each; one of a shorter sequence has a tile or two, and was not timed.
    """
    return has_bulk_copies(capability) and 64 <= head_dim <= 128 and queries >= 64


def choose_backward_descriptor_tiles(head_dim: int, keys: int) -> BackwardTiles:
    """For sequences of about `keys` keys each. No tile of these spills on sm_90 (Triton 3.6 and
    3.7), and none serialises its products.

    Two programs of 64 keys in 4 warps share a multiprocessor, so that one's exponents are computed
    while the other multiplies: 251, 354 and 421 where one of 128 keys in 8 warps gives 221, 341 and
    395 (rows as above). For queries that would read keys from the L2 twice as often for three
    products, where keys read queries for four; tiles of 128 queries by 32 keys share one, too, in
    128 registers a thread, and gain where sequences are short (TFLOP/s, 32 and 32/8 heads):

                        16 x 1024   64 of mean 298    4 x 4096   1 x 16384
        128 x 64        252   275        209   232   383   375   437   421
        128 x 32        270   295        226   251   369   372   415   404

    Other heads were not timed. (Those of 80 spill in 128 registers.)
    """
    is_short = head_dim == 128 and keys <= 2048
    queries = BackwardTile(128, 32, 8, 3, 128) if is_short else BackwardTile(128, 64, 8, 3)
    return BackwardTiles(queries, BackwardTile(64, 64, 4, 3 if head_dim <= 64 else 2))


@triton.jit
def first_row_of(start, seq):
    """Where a sequence's rows begin, as blocks of 4 do in `find_block`."""
    return (start // 4 + seq) * 4


@triton.jit(do_not_specialize=["num_rows", "num_seqs", "num_tokens"])
def query_gradient_tma_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    out_ptr,
    lse_ptr,
    dlse_ptr,
    dq_ptr,
    rows_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    num_rows,
    num_tokens,
    num_seqs,
    q_stride_t,
    q_stride_h,
    k_stride_t,
    k_stride_h,
    v_stride_t,
    v_stride_h,
    dout_stride_t,
    dout_stride_h,
    window_left,
    window_right,
    score_scale,
    cap_scale,
    scale,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """As `query_gradient_kernel`; one loop for whole tiles and edges, a branch around the masks."""
    # Late queries see most keys where attention is causal: the longest programs start first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)  # times a stride it may pass 2**31
    seq, q_start, num_queries, first_row = find_block(
        cu_seqlens_q_ptr, block, num_seqs, GROUP, BLOCK_M
    )
    if first_row >= num_queries * GROUP:
        return
    k_start = tl.load(cu_seqlens_k_ptr + seq)
    num_keys = tl.load(cu_seqlens_k_ptr + seq + 1) - k_start
    # A descriptor of no rows is not allowed; nothing is loaded from that one.
    k_desc = tl.make_tensor_descriptor(
        k_ptr + k_start.to(tl.int64) * k_stride_t + kv_head * k_stride_h,
        shape=[tl.maximum(num_keys, 1), HEAD_DIM],
        strides=[k_stride_t, 1],
        block_shape=[BLOCK_N, BLOCK_D],
    )
    v_desc = tl.make_tensor_descriptor(
        v_ptr + k_start.to(tl.int64) * v_stride_t + kv_head * v_stride_h,
        shape=[tl.maximum(num_keys, 1), HEAD_DIM],
        strides=[v_stride_t, 1],
        block_shape=[BLOCK_N, BLOCK_D],
    )

    row_M, in_sequence_M, q_MD, dout_MD, packed, packed_M, shift_M, delta_M = load_rows(
        q_ptr, dout_ptr, out_ptr, lse_ptr, dlse_ptr, q_start, num_queries, first_row, kv_head,
        num_tokens, q_stride_t, q_stride_h, dout_stride_t, dout_stride_h,
        GROUP, HEAD_DIM, BLOCK_D, BLOCK_M,
    )  # fmt: skip
    dim_D = tl.arange(0, BLOCK_D)
    num_heads = tl.num_programs(1) * GROUP
    query_M = row_M // GROUP
    rows_ptr += first_row_of(q_start, seq)
    row_offset_M = (kv_head * GROUP + row_M % GROUP) * num_rows + query_M
    tl.store(rows_ptr + row_offset_M, shift_M, mask=in_sequence_M)
    rows_ptr += num_heads.to(tl.int64) * num_rows
    tl.store(rows_ptr + row_offset_M, delta_M, mask=in_sequence_M)

    # Keys [low, high) are seen by some row of the tile, [full_low, full_high) by every one.
    position_M = query_M + (num_keys - num_queries)
    first = first_row // GROUP + (num_keys - num_queries)
    last = tl.minimum((first_row + BLOCK_M - 1) // GROUP, num_queries - 1) + num_keys - num_queries
    low = num_keys * 0
    high = num_keys
    full_low = low
    full_high = num_keys
    if HAS_LEFT:
        low = tl.maximum(first - window_left, 0) // BLOCK_N * BLOCK_N
        full_low = tl.maximum(last - window_left, 0)
    if HAS_RIGHT:
        high = tl.maximum(tl.minimum(last + window_right + 1, num_keys), low)
        full_high = tl.minimum(first + window_right + 1, num_keys)

    key_N = tl.arange(0, BLOCK_N)
    dq_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(low, high, BLOCK_N):
        k_ND = k_desc.load([start, 0])
        v_ND = v_desc.load([start, 0])
        # "ieee": a float32 product in TF32 would keep ten bits of each factor.
        score_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee") * score_scale
        if HAS_SOFTCAP:  # tanh(x) = 1 - rest, and its slope is rest * (2 - rest)
            rest_MN = 2.0 / (tl.exp2(score_MN) + 1.0)
            score_MN = cap_scale * (1.0 - rest_MN)
        weight_MN = tl.exp2(score_MN - shift_M[:, None])
        if (start < full_low) or (start + BLOCK_N > full_high):
            distance_MN = (start + key_N)[None, :] - position_M[:, None]
            visible_MN = in_window(distance_MN, window_left, window_right, HAS_LEFT, HAS_RIGHT)
            visible_MN &= (start + key_N < num_keys)[None, :]
            weight_MN = tl.where(visible_MN, weight_MN, 0.0)
        dweight_MN = tl.dot(dout_MD, tl.trans(v_ND), input_precision="ieee")
        dscore_MN = weight_MN * (dweight_MN - delta_M[:, None])
        if HAS_SOFTCAP:
            dscore_MN *= rest_MN * (2.0 - rest_MN)
        dq_MD = tl.dot(dscore_MN.to(k_ND.dtype), k_ND, dq_MD, input_precision="ieee")

    tl.store(
        dq_ptr + packed + packed_M[:, None] + dim_D[None, :],
        (dq_MD * scale).to(dq_ptr.dtype.element_ty),
        mask=in_sequence_M[:, None] & (dim_D < HEAD_DIM)[None, :],
    )


@triton.jit(do_not_specialize=["num_rows", "num_seqs"])
def key_gradients_tma_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    dk_ptr,
    dv_ptr,
    rows_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    num_rows,
    num_seqs,
    q_stride_t,
    q_stride_h,
    k_stride_t,
    k_stride_h,
    v_stride_t,
    v_stride_h,
    dout_stride_t,
    dout_stride_h,
    window_left,
    window_right,
    score_scale,
    cap_scale,
    scale,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WAIT: tl.constexpr,
):
    """As `key_gradients_kernel`, but the heads of a group follow one another: a tile has BLOCK_M
    queries of one head.

    Rows behind the sequence come as zeros, and add nothing: their weight of 1 meets dO = 0, and
    their dS of 1 * (0 - 0) meets q = 0.
    """
    kv_head = tl.program_id(1).to(tl.int64)  # times a stride it may pass 2**31
    # Early keys are seen by most queries where attention is causal, and start first as it is.
    seq, k_start, num_keys, first_key = find_block(
        cu_seqlens_k_ptr, tl.program_id(0), num_seqs, 1, BLOCK_N
    )
    if first_key >= num_keys:
        return
    q_start = tl.load(cu_seqlens_q_ptr + seq)
    num_queries = tl.load(cu_seqlens_q_ptr + seq + 1) - q_start
    shown = tl.maximum(num_queries, 1)  # a descriptor of no rows is not allowed
    num_heads = tl.num_programs(1) * GROUP
    q_desc = tl.make_tensor_descriptor(
        q_ptr + q_start.to(tl.int64) * q_stride_t + kv_head * GROUP * q_stride_h,
        shape=[shown, GROUP, HEAD_DIM],
        strides=[q_stride_t, q_stride_h, 1],
        block_shape=[BLOCK_M, 1, BLOCK_D],
    )
    dout_desc = tl.make_tensor_descriptor(
        dout_ptr + q_start.to(tl.int64) * dout_stride_t + kv_head * GROUP * dout_stride_h,
        shape=[shown, GROUP, HEAD_DIM],
        strides=[dout_stride_t, dout_stride_h, 1],
        block_shape=[BLOCK_M, 1, BLOCK_D],
    )
    rows_desc = tl.make_tensor_descriptor(
        rows_ptr + kv_head * GROUP * num_rows + first_row_of(q_start, seq),
        shape=[2, GROUP, shown],
        strides=[num_heads.to(tl.int64) * num_rows, num_rows.to(tl.int64), 1],
        block_shape=[1, 1, BLOCK_M],
    )

    dim_D = tl.arange(0, BLOCK_D)
    key_N = tl.arange(0, BLOCK_N)
    in_sequence_N = first_key + key_N < num_keys
    key_start = (k_start + first_key).to(tl.int64)
    k_ptr += key_start * k_stride_t + kv_head * k_stride_h
    v_ptr += key_start * v_stride_t + kv_head * v_stride_h
    k_ND = load_tile(k_ptr, key_N * k_stride_t, in_sequence_N, dim_D, HEAD_DIM, True)
    v_ND = load_tile(v_ptr, key_N * v_stride_t, in_sequence_N, dim_D, HEAD_DIM, True)

    # Queries [low, high) see some key of the tile, [full_low, full_high) every one.
    first = first_key - (num_keys - num_queries)
    last = tl.minimum(first_key + BLOCK_N, num_keys) - 1 - (num_keys - num_queries)
    low = num_queries * 0
    high = num_queries
    full_low = low
    full_high = high + BLOCK_M  # rows behind the sequence need no mask
    if HAS_LEFT:
        high = tl.maximum(tl.minimum(last + window_left + 1, num_queries), 0)
        full_high = first + window_left + 1
    if HAS_RIGHT:
        # A descriptor wants loads, too, to begin at multiples of 16 bytes.
        low = tl.maximum(first - window_right, 0) // 4 * 4
        full_low = last - window_right
    tiles_a_head = tl.cdiv(tl.maximum(high - low, 0), BLOCK_M)

    dk_ND = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_ND = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for tile in range(0, tiles_a_head * GROUP):
        head = tile * 0
        if GROUP > 1:
            head = tile // tiles_a_head
        start = low + (tile - head * tiles_a_head) * BLOCK_M
        q_MD = q_desc.load([start, head, 0]).reshape(BLOCK_M, BLOCK_D)
        dout_MD = dout_desc.load([start, head, 0]).reshape(BLOCK_M, BLOCK_D)
        shift_M = rows_desc.load([0, head, start]).reshape(BLOCK_M)
        delta_M = rows_desc.load([1, head, start]).reshape(BLOCK_M)
        score_NM = tl.dot(k_ND, tl.trans(q_MD), input_precision="ieee") * score_scale
        if HAS_SOFTCAP:
            rest_NM = 2.0 / (tl.exp2(score_NM) + 1.0)
            score_NM = cap_scale * (1.0 - rest_NM)
        weight_NM = tl.exp2(score_NM - shift_M[None, :])
        if (HAS_LEFT or HAS_RIGHT) and (start < full_low or start + BLOCK_M > full_high):
            query_M = start + tl.arange(0, BLOCK_M)
            distance_NM = (first + key_N)[:, None] - query_M[None, :]
            visible_NM = in_window(distance_NM, window_left, window_right, HAS_LEFT, HAS_RIGHT)
            weight_NM = tl.where(visible_NM, weight_NM, 0.0)
        dv_ND = tl.dot(weight_NM.to(dout_MD.dtype), dout_MD, dv_ND, input_precision="ieee")
        dweight_NM = tl.dot(v_ND, tl.trans(dout_MD), input_precision="ieee")
        dscore_NM = weight_NM * (dweight_NM - delta_M[None, :])
        if HAS_SOFTCAP:
            dscore_NM *= rest_NM * (2.0 - rest_NM)
        dk_ND = tl.dot(dscore_NM.to(q_MD.dtype), q_MD, dk_ND, input_precision="ieee")
        if WAIT:  # else these two, in flight into the next tile, make ptxas serialise all products
            dk_ND = wait_for(dk_ND)
            dv_ND = wait_for(dv_ND)

    stride_t = tl.num_programs(1) * HEAD_DIM
    offset_ND = key_N[:, None] * stride_t + dim_D[None, :]
    base = key_start * stride_t + kv_head * HEAD_DIM
    stored_ND = in_sequence_N[:, None] & (dim_D < HEAD_DIM)[None, :]
    dtype = dk_ptr.dtype.element_ty
    tl.store(dk_ptr + base + offset_ND, (dk_ND * scale).to(dtype), mask=stored_ND)
    tl.store(dv_ptr + base + offset_ND, dv_ND.to(dtype), mask=stored_ND)
