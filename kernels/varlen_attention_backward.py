"""minigen::varlen_attention_backward: gradients of attention over packed sequences.

With P the attention weights and S the scores (FlashAttention-2, Dao 2023, section 3.2):

    delta = rowsum(dO * O) - dlse        dV = P^T dO        dP = dO V^T
    dS = P * (dP - delta)                dQ = scale * dS K  dK = scale * dS^T Q

P is computed again from the saved lse. One Triton kernel owns tiles of queries and writes dQ, one
owns tiles of keys and writes dK and dV, so that nothing is added atomically: the result does not
depend on which program runs first.

Shapes: T packed tokens (of queries, or of keys), S sequences, H query heads, K key/value heads,
G = H / K query heads that share a key/value head, D head dim; in kernels M rows and N keys of a
tile. A row is a query and one of the G heads: row = query * G + head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minigen.kernels.backward_tiles import (
    BackwardTiles,
    backward_tile_arguments,
    choose_backward_tiles,
    find_block,
    in_window,
    load_rows,
    load_tile,
    row_offsets,
)
from minigen.kernels.checks import (
    Window,
    check_varlen,
    check_varlen_gradients,
    read_cu_seqlens,
    resolve_scale,
    resolve_window,
)
from minigen.kernels.cpu_backward import attend_sequence_backward
from minigen.kernels.tiles import (
    on_device_of,
    power_of_two,
    score_arguments,
    shared_bytes_of,
    window_arguments,
)
from minigen.kernels.triton_import import tl, triton
from minigen.kernels.varlen_attention_backward_tma import (
    choose_backward_descriptor_tiles,
    key_gradients_tma_kernel,
    padded_rows,
    prefers_backward_descriptors,
    query_gradient_tma_kernel,
)
from minigen.kernels.varlen_attention_tma import fits_tensor_descriptors, with_descriptor_memory

Gradients = tuple[Tensor, Tensor, Tensor]


@torch.library.custom_op("minigen::varlen_attention_backward", mutates_args=(), device_types="cpu")
def varlen_attention_backward(
    dout_THD: Tensor,
    dlse_HT: Tensor,
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    out_THD: Tensor,
    lse_HT: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool,
    scale: float | None,
    window_size: Sequence[int],
    softcap: float,
) -> Gradients:
    """Gradients of `varlen_attention` for queries, keys and values, in that order.

    `dout_THD` and `dlse_HT` are the gradients that arrive at `out_THD` and `lse_HT`; the rest is
    what the forward took and gave. A query that sees no key gets and gives gradient 0.

    Raises:
        ValueError: shapes, dtypes, head counts, devices or (on the CPU) offsets that do not fit.
    """
    check_varlen(q_THD, k_TKD, v_TKD, cu_seqlens_q, cu_seqlens_k, softcap)
    check_varlen_gradients(q_THD, out_THD, lse_HT, dout_THD, dlse_HT)
    window = resolve_window(causal, window_size)
    scale = resolve_scale(scale, q_THD.shape[2])
    q_offsets = read_cu_seqlens(cu_seqlens_q, q_THD.shape[0], "cu_seqlens_q")
    k_offsets = read_cu_seqlens(cu_seqlens_k, k_TKD.shape[0], "cu_seqlens_k")
    dq_THD, dk_TKD, dv_TKD = _empty_gradients(q_THD, k_TKD)
    for seq in range(len(q_offsets) - 1):
        queries = slice(q_offsets[seq], q_offsets[seq + 1])
        keys = slice(k_offsets[seq], k_offsets[seq + 1])
        attend_sequence_backward(
            dout_THD[queries],
            dlse_HT[:, queries],
            q_THD[queries],
            k_TKD[keys],
            v_TKD[keys],
            out_THD[queries],
            lse_HT[:, queries],
            dq_THD[queries],
            dk_TKD[keys],
            dv_TKD[keys],
            scale=scale,
            window=window,
            softcap=softcap,
        )
    return dq_THD, dk_TKD, dv_TKD


def _empty_gradients(q_THD: Tensor, k_TKD: Tensor) -> Gradients:
    dq_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    dk_TKD = torch.empty(k_TKD.shape, dtype=k_TKD.dtype, device=k_TKD.device)
    return dq_THD, dk_TKD, torch.empty_like(dk_TKD)


@varlen_attention_backward.register_fake
def _fake(
    dout_THD: Tensor,
    dlse_HT: Tensor,
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    out_THD: Tensor,
    lse_HT: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool,
    scale: float | None,
    window_size: Sequence[int],
    softcap: float,
) -> Gradients:
    check_varlen(q_THD, k_TKD, v_TKD, cu_seqlens_q, cu_seqlens_k, softcap)
    check_varlen_gradients(q_THD, out_THD, lse_HT, dout_THD, dlse_HT)
    resolve_window(causal, window_size)
    return _empty_gradients(q_THD, k_TKD)


@varlen_attention_backward.register_kernel("cuda")
def _cuda(
    dout_THD: Tensor,
    dlse_HT: Tensor,
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    out_THD: Tensor,
    lse_HT: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool,
    scale: float | None,
    window_size: Sequence[int],
    softcap: float,
) -> Gradients:
    check_varlen(q_THD, k_TKD, v_TKD, cu_seqlens_q, cu_seqlens_k, softcap)
    check_varlen_gradients(q_THD, out_THD, lse_HT, dout_THD, dlse_HT)
    return varlen_attention_backward_triton(
        dout_THD,
        dlse_HT,
        q_THD,
        k_TKD,
        v_TKD,
        out_THD,
        lse_HT,
        cu_seqlens_q,
        cu_seqlens_k,
        window=resolve_window(causal, window_size),
        scale=resolve_scale(scale, q_THD.shape[2]),
        softcap=softcap,
    )


def varlen_attention_backward_triton(
    dout_THD: Tensor,
    dlse_HT: Tensor,
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    out_THD: Tensor,
    lse_HT: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    window: Window,
    scale: float,
    softcap: float,
    tiles: BackwardTiles | None = None,
    tensor_descriptors: bool | None = None,
) -> Gradients:
    """Launches the kernels on checked arguments: on a GPU, or on the CPU in Triton's interpreter.

    `tiles` and `tensor_descriptors` take the place of the chosen ones, so that a benchmark can try
    others.
    """
    dout_THD, q_THD, k_TKD, v_TKD = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (dout_THD, q_THD, k_TKD, v_TKD)
    )
    dq_THD, dk_TKD, dv_TKD = _empty_gradients(q_THD, k_TKD)
    num_tokens, num_heads, head_dim = q_THD.shape
    num_keys, num_kv_heads, _ = k_TKD.shape
    num_seqs = cu_seqlens_q.shape[0] - 1
    if num_seqs == 0:
        return dq_THD, dk_TKD, dv_TKD
    group = num_heads // num_kv_heads
    if tensor_descriptors is None:
        tensor_descriptors = (
            q_THD.is_cuda
            and prefers_backward_descriptors(
                num_tokens // num_seqs, head_dim, torch.cuda.get_device_capability(q_THD.device)
            )
            and all(fits_tensor_descriptors(q_THD, k_TKD, x) for x in (v_TKD, dout_THD))
            # Heads are a dimension of these, and a mean over heads expands its gradient.
            and all(x.stride(1) > 0 for x in (q_THD, dout_THD))
        )
    if tiles is None and tensor_descriptors:
        tiles = choose_backward_descriptor_tiles(head_dim, num_keys // num_seqs)
    elif tiles is None:
        tiles = choose_backward_tiles(
            -(-num_tokens // num_seqs) * group,
            -(-num_keys // num_seqs),
            head_dim,
            q_THD.element_size(),
            shared_bytes_of(q_THD.device),
        )
    # What a row needs of the forward, shift and delta, as the kernel of keys reads it: [K, T, G],
    # or R rows of each head.
    num_rows = padded_rows(num_tokens, num_seqs) if tensor_descriptors else num_tokens
    rows_2HR = torch.empty(2, num_heads, num_rows, dtype=torch.float32, device=q_THD.device)
    lengths = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    strides = [x.stride(dim) for x in (q_THD, k_TKD, v_TKD, dout_THD) for dim in (0, 1)]
    common = {
        **window_arguments(window),
        **score_arguments(scale, softcap),
        "scale": scale,
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, power_of_two(head_dim)),
    }
    inputs = q_THD, k_TKD, v_TKD, dout_THD
    of_forward = out_THD.contiguous(), lse_HT.contiguous(), dlse_HT.contiguous()
    row_blocks = num_tokens * group // tiles.queries.block_m + num_seqs
    key_blocks = num_keys // tiles.keys.block_n + num_seqs
    of_queries = common | backward_tile_arguments(tiles.queries)
    of_keys = common | backward_tile_arguments(tiles.keys)

    def launch() -> None:
        query_gradient_kernel[(row_blocks, num_kv_heads)](
            *inputs, *of_forward, dq_THD, *rows_2HR, *lengths,
            num_tokens, num_seqs, *strides, **of_queries,
        )  # fmt: skip
        key_gradients_kernel[(key_blocks, num_kv_heads)](
            *inputs, dk_TKD, dv_TKD, *rows_2HR, *lengths,
            num_tokens, num_seqs, *strides, **of_keys,
        )  # fmt: skip

    def launch_with_descriptors() -> None:
        query_gradient_tma_kernel[(row_blocks, num_kv_heads)](
            *inputs, *of_forward, dq_THD, rows_2HR, *lengths,
            num_rows, num_tokens, num_seqs, *strides, **of_queries,
        )  # fmt: skip
        key_gradients_tma_kernel[(key_blocks, num_kv_heads)](
            *inputs, dk_TKD, dv_TKD, rows_2HR, *lengths,
            num_rows, num_seqs, *strides, **of_keys, WAIT=q_THD.is_cuda,  # no interpreter
        )  # fmt: skip

    with on_device_of(q_THD):
        if tensor_descriptors:
            with_descriptor_memory(launch_with_descriptors, q_THD.device)
        else:
            launch()
    return dq_THD, dk_TKD, dv_TKD


@triton.jit
def query_gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    out_ptr,
    lse_ptr,
    dlse_ptr,
    dq_ptr,
    shift_ptr,
    delta_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
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
    """One program: BLOCK_M rows of one sequence and key/value head, all their keys.

    Also writes what the other kernel needs of each row: shift and delta (`load_rows`).
    """
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

    row_M, in_sequence_M, q_MD, dout_MD, packed, packed_M, shift_M, delta_M = load_rows(
        q_ptr, dout_ptr, out_ptr, lse_ptr, dlse_ptr, q_start, num_queries, first_row, kv_head,
        num_tokens, q_stride_t, q_stride_h, dout_stride_t, dout_stride_h,
        GROUP, HEAD_DIM, BLOCK_D, BLOCK_M,
    )  # fmt: skip
    dim_D = tl.arange(0, BLOCK_D)
    k_ptr += k_start.to(tl.int64) * k_stride_t + kv_head * k_stride_h
    v_ptr += k_start.to(tl.int64) * v_stride_t + kv_head * v_stride_h
    row_offset = (kv_head * num_tokens + q_start) * GROUP
    tl.store(shift_ptr + row_offset + row_M, shift_M, mask=in_sequence_M)
    tl.store(delta_ptr + row_offset + row_M, delta_M, mask=in_sequence_M)

    # Keys [low, high) are seen by some row of the tile, [full_low, full_high) by every one: those
    # need no mask, and are most of a long sequence.
    position_M = row_M // GROUP + (num_keys - num_queries)
    first = first_row // GROUP + (num_keys - num_queries)
    last = tl.minimum((first_row + BLOCK_M - 1) // GROUP, num_queries - 1) + num_keys - num_queries
    low = num_keys * 0
    high = num_keys
    full_low = low
    full_high = high
    if HAS_LEFT:
        low = tl.maximum(first - window_left, 0) // BLOCK_N * BLOCK_N
        full_low = low + tl.cdiv(tl.maximum(last - window_left - low, 0), BLOCK_N) * BLOCK_N
    if HAS_RIGHT:
        high = tl.maximum(tl.minimum(last + window_right + 1, num_keys), low)
        full_high = tl.minimum(first + window_right + 1, num_keys)
    full_low = tl.minimum(full_low, high)
    full_high = low + tl.maximum(full_high - low, 0) // BLOCK_N * BLOCK_N
    full_high = tl.maximum(full_high, full_low)

    dq_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if HAS_LEFT:
        dq_MD = add_query_gradient(
            dq_MD, low, full_low, True, q_MD, dout_MD, shift_M, delta_M, position_M,
            k_ptr, v_ptr, k_stride_t, v_stride_t, num_keys, window_left, window_right,
            score_scale, cap_scale, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HEAD_DIM, BLOCK_D, BLOCK_N,
        )  # fmt: skip
    dq_MD = add_query_gradient(
        dq_MD, full_low, full_high, False, q_MD, dout_MD, shift_M, delta_M, position_M,
        k_ptr, v_ptr, k_stride_t, v_stride_t, num_keys, window_left, window_right,
        score_scale, cap_scale, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HEAD_DIM, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    dq_MD = add_query_gradient(
        dq_MD, full_high, high, True, q_MD, dout_MD, shift_M, delta_M, position_M,
        k_ptr, v_ptr, k_stride_t, v_stride_t, num_keys, window_left, window_right,
        score_scale, cap_scale, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HEAD_DIM, BLOCK_D, BLOCK_N,
    )  # fmt: skip

    tl.store(
        dq_ptr + packed + packed_M[:, None] + dim_D[None, :],
        (dq_MD * scale).to(dq_ptr.dtype.element_ty),
        mask=in_sequence_M[:, None] & (dim_D < HEAD_DIM)[None, :],
    )


@triton.jit
def add_query_gradient(
    dq_MD,
    begin,
    end,
    MASKED: tl.constexpr,
    q_MD,
    dout_MD,
    shift_M,
    delta_M,
    position_M,
    k_ptr,
    v_ptr,
    k_stride_t,
    v_stride_t,
    num_keys,
    window_left,
    window_right,
    score_scale,
    cap_scale,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dQ / scale of the tile's rows, with the keys from `begin` to `end` added."""
    key_N = tl.arange(0, BLOCK_N)
    dim_D = tl.arange(0, BLOCK_D)
    for start in range(begin, end, BLOCK_N):
        at = tl.cast(start, tl.int64)
        in_sequence_N = start + key_N < num_keys
        k_ND = load_tile(
            k_ptr + at * k_stride_t, key_N * k_stride_t, in_sequence_N, dim_D, HEAD_DIM, MASKED
        )
        v_ND = load_tile(
            v_ptr + at * v_stride_t, key_N * v_stride_t, in_sequence_N, dim_D, HEAD_DIM, MASKED
        )
        # "ieee": a float32 product in TF32 would keep ten bits of each factor.
        score_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee") * score_scale
        if HAS_SOFTCAP:  # tanh(x) = 1 - rest, and its slope is rest * (2 - rest)
            rest_MN = 2.0 / (tl.exp2(score_MN) + 1.0)
            score_MN = cap_scale * (1.0 - rest_MN)
        weight_MN = tl.exp2(score_MN - shift_M[:, None])
        if MASKED:
            distance_MN = (start + key_N)[None, :] - position_M[:, None]
            visible_MN = in_window(distance_MN, window_left, window_right, HAS_LEFT, HAS_RIGHT)
            weight_MN = tl.where(visible_MN & in_sequence_N[None, :], weight_MN, 0.0)
        dweight_MN = tl.dot(dout_MD, tl.trans(v_ND), input_precision="ieee")
        dscore_MN = weight_MN * (dweight_MN - delta_M[:, None])
        if HAS_SOFTCAP:
            dscore_MN *= rest_MN * (2.0 - rest_MN)
        dq_MD = tl.dot(dscore_MN.to(k_ND.dtype), k_ND, dq_MD, input_precision="ieee")
    return dq_MD


@triton.jit
def key_gradients_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    dk_ptr,
    dv_ptr,
    shift_ptr,
    delta_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
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
    """One program: BLOCK_N keys of one sequence and head, all rows (of G heads) that see them.

    Scores stand transposed, [N, M], so that no product of them needs a transpose in registers.
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

    dim_D = tl.arange(0, BLOCK_D)
    key_N = tl.arange(0, BLOCK_N)
    in_sequence_N = first_key + key_N < num_keys
    key_start = (k_start + first_key).to(tl.int64)
    k_ptr += key_start * k_stride_t + kv_head * k_stride_h
    v_ptr += key_start * v_stride_t + kv_head * v_stride_h
    k_ND = load_tile(k_ptr, key_N * k_stride_t, in_sequence_N, dim_D, HEAD_DIM, True)
    v_ND = load_tile(v_ptr, key_N * v_stride_t, in_sequence_N, dim_D, HEAD_DIM, True)
    q_ptr += q_start.to(tl.int64) * q_stride_t + kv_head * GROUP * q_stride_h
    dout_ptr += q_start.to(tl.int64) * dout_stride_t + kv_head * GROUP * dout_stride_h
    row_offset = (kv_head * num_tokens + q_start) * GROUP
    shift_ptr += row_offset
    delta_ptr += row_offset

    # Queries [low, high) see some key of the tile, [full_low, full_high) every one.
    first = first_key - (num_keys - num_queries)
    last = tl.minimum(first_key + BLOCK_N, num_keys) - 1 - (num_keys - num_queries)
    low = num_queries * 0
    high = num_queries * GROUP
    full_low = low
    full_high = high
    if HAS_LEFT:
        high = tl.maximum(tl.minimum(last + window_left + 1, num_queries), 0) * GROUP
        full_high = tl.minimum(first + window_left + 1, num_queries) * GROUP
    if HAS_RIGHT:
        low = tl.maximum(first - window_right, 0) * GROUP
        full_low = tl.maximum(last - window_right, 0) * GROUP
        full_low = low + tl.cdiv(full_low - low, BLOCK_M) * BLOCK_M
    full_low = tl.minimum(full_low, high)
    full_high = low + tl.maximum(full_high - low, 0) // BLOCK_M * BLOCK_M
    full_high = tl.maximum(full_high, full_low)

    dk_ND = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_ND = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    key_position_N = first + key_N
    if HAS_RIGHT:
        dk_ND, dv_ND = add_key_gradients(
            dk_ND, dv_ND, low, full_low, True, k_ND, v_ND, key_position_N,
            q_ptr, dout_ptr, shift_ptr, delta_ptr, q_stride_t, q_stride_h, dout_stride_t,
            dout_stride_h, num_queries, window_left, window_right, score_scale, cap_scale,
            HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, GROUP, HEAD_DIM, BLOCK_D, BLOCK_M,
        )  # fmt: skip
    dk_ND, dv_ND = add_key_gradients(
        dk_ND, dv_ND, full_low, full_high, False, k_ND, v_ND, key_position_N,
        q_ptr, dout_ptr, shift_ptr, delta_ptr, q_stride_t, q_stride_h, dout_stride_t,
        dout_stride_h, num_queries, window_left, window_right, score_scale, cap_scale,
        HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, GROUP, HEAD_DIM, BLOCK_D, BLOCK_M,
    )  # fmt: skip
    dk_ND, dv_ND = add_key_gradients(
        dk_ND, dv_ND, full_high, high, True, k_ND, v_ND, key_position_N,
        q_ptr, dout_ptr, shift_ptr, delta_ptr, q_stride_t, q_stride_h, dout_stride_t,
        dout_stride_h, num_queries, window_left, window_right, score_scale, cap_scale,
        HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, GROUP, HEAD_DIM, BLOCK_D, BLOCK_M,
    )  # fmt: skip

    stride_t = tl.num_programs(1) * HEAD_DIM
    offset_ND = key_N[:, None] * stride_t + dim_D[None, :]
    base = key_start * stride_t + kv_head * HEAD_DIM
    stored_ND = in_sequence_N[:, None] & (dim_D < HEAD_DIM)[None, :]
    dtype = dk_ptr.dtype.element_ty
    tl.store(dk_ptr + base + offset_ND, (dk_ND * scale).to(dtype), mask=stored_ND)
    tl.store(dv_ptr + base + offset_ND, dv_ND.to(dtype), mask=stored_ND)


@triton.jit
def add_key_gradients(
    dk_ND,
    dv_ND,
    begin,
    end,
    MASKED: tl.constexpr,
    k_ND,
    v_ND,
    key_position_N,
    q_ptr,
    dout_ptr,
    shift_ptr,
    delta_ptr,
    q_stride_t,
    q_stride_h,
    dout_stride_t,
    dout_stride_h,
    num_queries,
    window_left,
    window_right,
    score_scale,
    cap_scale,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """dK / scale and dV of the tile's keys, with the rows from `begin` to `end` added.

    Keys past the sequence spoil only rows of dK and dV that nobody stores, and need no mask. Rows
    past it load as q = dO = 0 and shift = +inf, which makes their weights 0.
    """
    dim_D = tl.arange(0, BLOCK_D)
    for start in range(begin, end, BLOCK_M):
        row_M = start + tl.arange(0, BLOCK_M)
        in_sequence_M = row_M < num_queries * GROUP
        base, offset_M = row_offsets(start, row_M, q_stride_t, q_stride_h, GROUP)
        q_MD = load_tile(q_ptr + base, offset_M, in_sequence_M, dim_D, HEAD_DIM, MASKED)
        base, offset_M = row_offsets(start, row_M, dout_stride_t, dout_stride_h, GROUP)
        dout_MD = load_tile(dout_ptr + base, offset_M, in_sequence_M, dim_D, HEAD_DIM, MASKED)
        score_NM = tl.dot(k_ND, tl.trans(q_MD), input_precision="ieee") * score_scale
        if MASKED:
            shift_M = tl.load(shift_ptr + row_M, mask=in_sequence_M, other=float("inf"))
        else:
            shift_M = tl.load(shift_ptr + row_M)
        if HAS_SOFTCAP:
            rest_NM = 2.0 / (tl.exp2(score_NM) + 1.0)
            score_NM = cap_scale * (1.0 - rest_NM)
        weight_NM = tl.exp2(score_NM - shift_M[None, :])
        if MASKED:
            distance_NM = key_position_N[:, None] - (row_M // GROUP)[None, :]
            visible_NM = in_window(distance_NM, window_left, window_right, HAS_LEFT, HAS_RIGHT)
            weight_NM = tl.where(visible_NM, weight_NM, 0.0)
        dv_ND = tl.dot(weight_NM.to(dout_MD.dtype), dout_MD, dv_ND, input_precision="ieee")
        dweight_NM = tl.dot(v_ND, tl.trans(dout_MD), input_precision="ieee")
        if MASKED:
            delta_M = tl.load(delta_ptr + row_M, mask=in_sequence_M, other=0.0)
        else:
            delta_M = tl.load(delta_ptr + row_M)
        dscore_NM = weight_NM * (dweight_NM - delta_M[None, :])
        if HAS_SOFTCAP:
            dscore_NM *= rest_NM * (2.0 - rest_NM)
        dk_ND = tl.dot(dscore_NM.to(q_MD.dtype), q_MD, dk_ND, input_precision="ieee")
    return dk_ND, dv_ND
