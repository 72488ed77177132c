"""minigen::paged_attention: attention of packed queries over the paged key/value cache.

Shapes: T packed query tokens, S sequences, H query heads, K key/value heads, G = H / K query heads
that share a key/value head, D head dim, N cache blocks, B tokens a block, W blocks a sequence may
have (the block table's width), L keys of one sequence.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minigen.kernels.checks import (
    check_paged,
    read_block_tables,
    read_cu_seqlens,
    resolve_scale,
    resolve_window,
)
from minigen.kernels.cpu import attend_sequence


def paged_attention(
    q_THD: Tensor,
    k_cache_NBKD: Tensor,
    v_cache_NBKD: Tensor,
    cu_seqlens_q: Tensor,
    kv_lens_S: Tensor,
    block_table_SW: Tensor,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    causal: bool = True,
    validate: bool = False,
) -> Tensor:
    """Attention of each sequence's queries over its keys in the cache: prefill, chunk and decode.

    The queries of sequence s are rows cu_seqlens_q[s] to cu_seqlens_q[s + 1], and stand at the last
    of its kv_lens[s] keys, which count those of this step. Key j lies in row `j % B` of block
    `block_table[s, j // B]`.

    Args:
        q_THD: queries, float16, bfloat16 or float32 (on the CPU also float64).
        k_cache_NBKD, v_cache_NBKD: contiguous caches of the same dtype; H a multiple of K.
        cu_seqlens_q: int32 `[S + 1]`, from 0 to T.
        kv_lens_S: int32. A sequence of length 0 (a null row) gives output 0.
        block_table_SW: int32; entries beyond a sequence's last block are not read.
        scale, window_size, softcap, causal: as in `varlen_attention`.
        validate: read and check lengths and table on a GPU too, which waits for it.

    Returns:
        `out_THD`, shape and dtype of `q_THD`. A query that sees no key has output 0.

    Raises:
        ValueError: shapes, dtypes, head counts, devices or (where read) values that do not fit.
    """
    return torch.ops.minigen.paged_attention(
        q_THD,
        k_cache_NBKD,
        v_cache_NBKD,
        cu_seqlens_q,
        kv_lens_S,
        block_table_SW,
        scale,
        window_size,
        softcap,
        causal,
        validate,
    )


@torch.library.custom_op("minigen::paged_attention", mutates_args=(), device_types="cpu")
def _cpu(
    q_THD: Tensor,
    k_cache_NBKD: Tensor,
    v_cache_NBKD: Tensor,
    cu_seqlens_q: Tensor,
    kv_lens_S: Tensor,
    block_table_SW: Tensor,
    scale: float | None,
    window_size: Sequence[int],
    softcap: float,
    causal: bool,
    validate: bool,
) -> Tensor:
    check_paged(q_THD, k_cache_NBKD, v_cache_NBKD, cu_seqlens_q, kv_lens_S, block_table_SW, softcap)
    window = resolve_window(causal, window_size)
    scale = resolve_scale(scale, q_THD.shape[2])
    num_blocks, block_size = k_cache_NBKD.shape[:2]
    offsets = read_cu_seqlens(cu_seqlens_q, q_THD.shape[0], "cu_seqlens_q")
    kv_lens, tables = read_block_tables(kv_lens_S, block_table_SW, num_blocks, block_size)
    if q_THD.stride(-1) != 1:
        q_THD = q_THD.contiguous()
    out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype)
    for seq, (kv_len, blocks) in enumerate(zip(kv_lens, tables, strict=True)):
        start, stop = offsets[seq], offsets[seq + 1]
        if start == stop:
            continue
        first_block = 0
        if window.left is not None:  # blocks that even the first query no longer sees
            first_block = max(kv_len - (stop - start) - window.left, 0) // block_size
        num_keys = kv_len - first_block * block_size
        blocks = blocks[first_block:]
        attend_sequence(
            q_THD[start:stop],
            _gather(k_cache_NBKD, blocks, num_keys),
            _gather(v_cache_NBKD, blocks, num_keys),
            out_THD[start:stop],
            None,
            scale=scale,
            window=window,
            softcap=softcap,
        )
    return out_THD


def _gather(cache_NBKD: Tensor, blocks: list[int], num_keys: int) -> Tensor:
    """The sequence's rows `[L, K, D]`: a view where its blocks lie in a row, as in a single chat."""
    first = blocks[0] if blocks else 0
    if blocks == list(range(first, first + len(blocks))):
        return cache_NBKD[first : first + len(blocks)].flatten(0, 1)[:num_keys]
    return cache_NBKD.index_select(0, torch.tensor(blocks)).flatten(0, 1)[:num_keys]


@_cpu.register_fake
def _fake(
    q_THD: Tensor,
    k_cache_NBKD: Tensor,
    v_cache_NBKD: Tensor,
    cu_seqlens_q: Tensor,
    kv_lens_S: Tensor,
    block_table_SW: Tensor,
    scale: float | None,
    window_size: Sequence[int],
    softcap: float,
    causal: bool,
    validate: bool,
) -> Tensor:
    check_paged(q_THD, k_cache_NBKD, v_cache_NBKD, cu_seqlens_q, kv_lens_S, block_table_SW, softcap)
    resolve_window(causal, window_size)
    return torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
