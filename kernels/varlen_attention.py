"""minigen::varlen_attention: attention over packed sequences, without padding.

Shapes: T packed tokens (of queries, or of keys), S sequences, H query heads, K key/value heads,
G = H / K query heads that share a key/value head, D head dim.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minigen.kernels.checks import (
    Window,
    check_varlen,
    read_cu_seqlens,
    resolve_scale,
    resolve_window,
)
from minigen.kernels.cpu import attend_sequence
from minigen.kernels.tiles import (
    Tile,
    choose_tile,
    find_queries,
    key_range,
    load_keys,
    on_device_of,
    positive_scale,
    score_arguments,
    scores,
    shared_bytes_of,
    softmax_finish,
    softmax_step,
    tile_arguments,
    visible_keys,
    wait_for,
    whole_tiles,
    window_arguments,
)
from minigen.kernels.triton_import import tl, triton
from minigen.kernels.varlen_attention_backward import varlen_attention_backward
from minigen.kernels.varlen_attention_gluon import (
    GluonTile,
    choose_gluon_tile,
    fits_gluon,
    launch_gluon,
    prefers_gluon,
)
from minigen.kernels.varlen_attention_tma import (
    choose_descriptor_tile,
    fits_tensor_descriptors,
    launch_with_descriptors,
    prefers_descriptors,
)

# A tile has at most 2**7 rows of keys; their offsets stay below 2**31. Wider tensors are copied.
MAX_TOKEN_STRIDE = 2**23


def varlen_attention(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention in which sequence s is rows cu_seqlens[s] to cu_seqlens[s + 1], and sees itself.

    Args:
        q_THD: queries, float16, bfloat16 or float32 (on the CPU also float64).
        k_TKD, v_TKD: keys and values of the same dtype; H must be a multiple of K.
        cu_seqlens_q, cu_seqlens_k: int32 `[S + 1]`, from 0 to the number of rows. A sequence may be
            empty, and may have fewer queries than keys.
        causal: query i of Q stands at key i + L - Q of L (bottom-right aligned), and sees no later.
        scale: factor on the scores, `D ** -0.5` if None.
        window_size: keys seen to the (left, right) of the query's own, -1 for all. Hugging Face's
            `sliding_window=w` is `(w - 1, 0)`.
        softcap: scores become `softcap * tanh(score / softcap)`; 0 is off.
        validate: read and check the offsets on a GPU too, which waits for it.

    Returns:
        `out_THD`, shape and dtype of `q_THD`, and `lse_HT`, the natural log of the sum of
        exponents, float32 (float64 for float64). A query that sees no key has output 0, lse -inf.

    Raises:
        ValueError: shapes, dtypes, head counts, devices or (where read) offsets that do not fit.

    Both outputs have gradients for q, k and v, see `varlen_attention_backward`; only first ones.
    """
    return torch.ops.minigen.varlen_attention(
        q_THD,
        k_TKD,
        v_TKD,
        cu_seqlens_q,
        cu_seqlens_k,
        causal,
        scale,
        window_size,
        softcap,
        validate,
    )


def _empty_outputs(q_THD: Tensor) -> tuple[Tensor, Tensor]:
    num_tokens, num_heads, _ = q_THD.shape
    lse_dtype = torch.promote_types(q_THD.dtype, torch.float32)
    out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    return out_THD, torch.empty(num_heads, num_tokens, dtype=lse_dtype, device=q_THD.device)


@torch.library.custom_op("minigen::varlen_attention", mutates_args=(), device_types="cpu")
def _cpu(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool,
    scale: float | None,
    window_size: Sequence[int],
    softcap: float,
    validate: bool,
) -> tuple[Tensor, Tensor]:
    check_varlen(q_THD, k_TKD, v_TKD, cu_seqlens_q, cu_seqlens_k, softcap)
    window = resolve_window(causal, window_size)
    scale = resolve_scale(scale, q_THD.shape[2])
    q_offsets = read_cu_seqlens(cu_seqlens_q, q_THD.shape[0], "cu_seqlens_q")
    k_offsets = read_cu_seqlens(cu_seqlens_k, k_TKD.shape[0], "cu_seqlens_k")
    q_THD, k_TKD, v_TKD = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (q_THD, k_TKD, v_TKD)
    )
    out_THD, lse_HT = _empty_outputs(q_THD)
    for seq in range(len(q_offsets) - 1):
        queries = slice(q_offsets[seq], q_offsets[seq + 1])
        keys = slice(k_offsets[seq], k_offsets[seq + 1])
        attend_sequence(
            q_THD[queries],
            k_TKD[keys],
            v_TKD[keys],
            out_THD[queries],
            lse_HT[:, queries],
            scale=scale,
            window=window,
            softcap=softcap,
        )
    return out_THD, lse_HT


@_cpu.register_fake
def _fake(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool,
    scale: float | None,
    window_size: Sequence[int],
    softcap: float,
    validate: bool,
) -> tuple[Tensor, Tensor]:
    check_varlen(q_THD, k_TKD, v_TKD, cu_seqlens_q, cu_seqlens_k, softcap)
    resolve_window(causal, window_size)
    return _empty_outputs(q_THD)


@_cpu.register_kernel("cuda")
def _cuda(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool,
    scale: float | None,
    window_size: Sequence[int],
    softcap: float,
    validate: bool,
) -> tuple[Tensor, Tensor]:
    check_varlen(q_THD, k_TKD, v_TKD, cu_seqlens_q, cu_seqlens_k, softcap)
    window = resolve_window(causal, window_size)
    scale = resolve_scale(scale, q_THD.shape[2])
    if validate:
        read_cu_seqlens(cu_seqlens_q, q_THD.shape[0], "cu_seqlens_q")
        read_cu_seqlens(cu_seqlens_k, k_TKD.shape[0], "cu_seqlens_k")
    queries = q_THD.shape[0] // max(cu_seqlens_q.shape[0] - 1, 1)
    head_dim = q_THD.shape[2]
    in_gluon = prefers_gluon(queries, head_dim) and fits_gluon(q_THD, k_TKD, v_TKD, softcap)
    capability = torch.cuda.get_device_capability(q_THD.device)
    descriptors = not in_gluon and prefers_descriptors(queries, head_dim, capability)
    return varlen_attention_triton(
        q_THD,
        k_TKD,
        v_TKD,
        cu_seqlens_q,
        cu_seqlens_k,
        window=window,
        scale=scale,
        softcap=softcap,
        tile=choose_gluon_tile(queries, head_dim) if in_gluon else None,
        tensor_descriptors=descriptors and fits_tensor_descriptors(q_THD, k_TKD, v_TKD),
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors_and_options, _validate = inputs
    ctx.save_for_backward(*tensors_and_options[:5], *output)
    ctx.options = tensors_and_options[5:]


def _backward(ctx: Any, dout_THD: Tensor, dlse_HT: Tensor) -> tuple[Tensor | None, ...]:
    *qkv, cu_seqlens_q, cu_seqlens_k, out_THD, lse_HT = ctx.saved_tensors
    gradients = varlen_attention_backward(
        dout_THD, dlse_HT, *qkv, out_THD, lse_HT, cu_seqlens_q, cu_seqlens_k, *ctx.options
    )
    return *gradients, *(None for _ in range(7))  # offsets and options


_cpu.register_autograd(_backward, setup_context=_save_for_backward)


def varlen_attention_triton(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    window: Window,
    scale: float,
    softcap: float,
    tile: Tile | GluonTile | None = None,
    tensor_descriptors: bool = False,
) -> tuple[Tensor, Tensor]:
    """Launches a kernel on checked arguments: on a GPU, or on the CPU in Triton's interpreter.

    `tile` is chosen by size unless given. `tensor_descriptors` runs the kernel of
    `varlen_attention_tma.py`, which wants `fits_tensor_descriptors`; a `GluonTile` that of
    `varlen_attention_gluon.py`, which wants `fits_gluon`.
    """
    q_THD, k_TKD, v_TKD = (
        x if x.stride(-1) == 1 and x.stride(0) < MAX_TOKEN_STRIDE else x.contiguous()
        for x in (q_THD, k_TKD, v_TKD)
    )
    out_THD, lse_HT = _empty_outputs(q_THD)
    num_tokens, num_heads, head_dim = q_THD.shape
    group = num_heads // k_TKD.shape[1]
    num_seqs = cu_seqlens_q.shape[0] - 1
    if num_tokens == 0 or num_seqs == 0:
        return out_THD, lse_HT
    if isinstance(tile, GluonTile):
        lengths = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
        launch_gluon(
            q_THD, k_TKD, v_TKD, out_THD, lse_HT, *lengths, window=window, scale=scale, tile=tile
        )
        return out_THD, lse_HT
    q_THD, scale = positive_scale(q_THD, scale)
    if tile is None:
        choose = choose_descriptor_tile if tensor_descriptors else choose_tile
        tile = choose(
            -(-num_tokens // num_seqs),
            group,
            head_dim,
            q_THD.element_size(),
            shared_bytes_of(q_THD.device),
        )
    packed = group if tile.block_q < tile.block_m else 1
    num_slots = num_heads // packed
    grid = ((num_tokens // tile.block_q + num_seqs) * num_slots,)
    arguments = (
        q_THD,
        k_TKD,
        v_TKD,
        out_THD,
        lse_HT,
        cu_seqlens_q.contiguous(),
        cu_seqlens_k.contiguous(),
        num_tokens,
        num_seqs,
        num_slots,
        *q_THD.stride()[:2],
        *k_TKD.stride()[:2],
        *v_TKD.stride()[:2],
    )
    options = {
        **window_arguments(window),
        **score_arguments(scale, softcap),
        **tile_arguments(tile, packed, head_dim),
        "SLOTS_A_KEY_HEAD": group // packed,
    }
    with on_device_of(q_THD):
        if tensor_descriptors:
            launch_with_descriptors(grid, arguments, options, q_THD.device)
        else:
            varlen_attention_kernel[grid](*arguments, **options)
    return out_THD, lse_HT


@triton.jit(
    do_not_specialize=["num_tokens", "num_seqs", "num_slots", "window_left", "window_right"]
)
def varlen_attention_kernel(
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
):
    """One program: BLOCK_Q queries of one sequence, GROUP heads that share keys, all their keys.

    A slot is such a set of heads: all that share a key/value head, or, not packed, a single one.
    Programs that start together have the same queries and other slots.
    """
    slot = tl.program_id(0) % num_slots
    kv_head = slot // SLOTS_A_KEY_HEAD
    seq, q_start, num_queries, first_query = find_queries(
        cu_seqlens_q_ptr, tl.program_id(0) // num_slots, num_seqs, HAS_RIGHT, BLOCK_Q
    )
    if first_query >= num_queries:
        return
    k_start = tl.load(cu_seqlens_k_ptr + seq)
    num_keys = tl.load(cu_seqlens_k_ptr + seq + 1) - k_start

    row_M = tl.arange(0, BLOCK_M)
    query_M = first_query + row_M // GROUP
    head_M = slot * GROUP + row_M % GROUP
    dim_D = tl.arange(0, BLOCK_D)
    # Row numbers times strides pass 2**31 in long batches, so they are taken in 64 bits.
    token_M = (q_start + query_M).to(tl.int64)
    in_tile_M = (row_M < BLOCK_Q * GROUP) & (query_M < num_queries)
    in_tile_MD = in_tile_M[:, None] & (dim_D < HEAD_DIM)[None, :]
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
    whole_low, whole_high = whole_tiles(
        first, last, low, high, num_keys, window_left, window_right, HAS_LEFT, HAS_RIGHT, BLOCK_N
    )

    # Offsets within a tile are hoisted, and fit 32 bits (MAX_TOKEN_STRIDE); the tile's first row
    # moves, in 64.
    tile_N = tl.arange(0, BLOCK_N)
    k_ptr += k_start.to(tl.int64) * k_stride_t + kv_head.to(tl.int64) * k_stride_h
    v_ptr += k_start.to(tl.int64) * v_stride_t + kv_head.to(tl.int64) * v_stride_h
    k_offset_ND = (tile_N * k_stride_t)[:, None] + dim_D[None, :]
    v_offset_ND = (tile_N * v_stride_t)[:, None] + dim_D[None, :]

    acc_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    max_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    for start in range(low, high, BLOCK_N):
        row = tl.cast(start, tl.int64)
        key_N = start + tile_N
        k_ND = load_keys(
            k_ptr + row * k_stride_t + k_offset_ND, key_N, num_keys, dim_D, HEAD_DIM, BLOCK_D
        )
        v_ND = load_keys(
            v_ptr + row * v_stride_t + v_offset_ND, key_N, num_keys, dim_D, HEAD_DIM, BLOCK_D
        )
        score_MN = scores(q_MD, k_ND, score_scale, cap_scale, HAS_SOFTCAP)
        if MASK_ALL or (start < whole_low or start >= whole_high):
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
