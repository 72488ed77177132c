"""minigen::paged_attention: attention of packed queries over the paged key/value cache.

Shapes: T packed query tokens, S sequences, H query heads, K key/value heads, G = H / K query heads
that share a key/value head, D head dim, N cache blocks, B tokens a block, W blocks a sequence may
have (the block table's width), L keys of one sequence, P parts its keys are split into.
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from minigen.kernels import native
from minigen.kernels.checks import (
    Window,
    check_paged,
    read_block_tables,
    read_cu_seqlens,
    resolve_scale,
    resolve_window,
)
from minigen.kernels.cpu import attend_sequence
from minigen.kernels.dependent_launch import (
    has_dependent_launch,
    launch_options,
    wait_for_predecessor,
)
from minigen.kernels.tiles import (
    Tile,
    choose_tile,
    find_queries,
    key_range,
    load_keys,
    on_device_of,
    positive_scale,
    power_of_two,
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
from minigen.kernels.varlen_attention_gluon import (
    CACHE_BOX,
    GluonTile,
    choose_gluon_tile,
    fits_gluon,
    launch_gluon,
    prefers_gluon,
)

# Rows of a prompt's tile, at least: how many queries a prompt has is known to the GPU alone.
PROMPT_ROWS = 128
MAX_SPLITS = 64  # the merge holds as many partial rows of D in registers


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
    pdl: bool = False,
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
        pdl: start while the kernel before still runs, where the GPU can (sm_90
            and later). It may write q and the caches, but neither lengths nor table: see
            `dependent_launch`.

    Returns:
        `out_THD`, shape and dtype of `q_THD`. A query that sees no key has output 0.

    Raises:
        ValueError: shapes, dtypes, head counts, devices or (where read) values that do not fit.
    """
    if native.serves(q_THD, k_cache_NBKD):
        if not torch.compiler.is_dynamo_compiling():  # traced, the operator's fake checks
            check_paged(
                q_THD, k_cache_NBKD, v_cache_NBKD, cu_seqlens_q, kv_lens_S, block_table_SW, softcap
            )
        left, right = resolve_window(causal, window_size)
        return torch.ops.minigen.native_paged_attention(
            q_THD,
            k_cache_NBKD,
            v_cache_NBKD,
            cu_seqlens_q,
            kv_lens_S,
            block_table_SW,
            resolve_scale(scale, q_THD.shape[2]),
            -1 if left is None else left,
            -1 if right is None else right,
            softcap,
        )
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
        pdl,
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
    pdl: bool,
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
    """The sequence's rows `[L, K, D]`: a view where its blocks are consecutive, as in one chat."""
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
    pdl: bool,
) -> Tensor:
    check_paged(q_THD, k_cache_NBKD, v_cache_NBKD, cu_seqlens_q, kv_lens_S, block_table_SW, softcap)
    resolve_window(causal, window_size)
    return torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)


@_cpu.register_kernel("cuda")
def _cuda(
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
    pdl: bool,
) -> Tensor:
    check_paged(q_THD, k_cache_NBKD, v_cache_NBKD, cu_seqlens_q, kv_lens_S, block_table_SW, softcap)
    window = resolve_window(causal, window_size)
    scale = resolve_scale(scale, q_THD.shape[2])
    if validate:
        num_blocks, block_size = k_cache_NBKD.shape[:2]
        read_cu_seqlens(cu_seqlens_q, q_THD.shape[0], "cu_seqlens_q")
        read_block_tables(kv_lens_S, block_table_SW, num_blocks, block_size)
    return paged_attention_triton(
        q_THD,
        k_cache_NBKD,
        v_cache_NBKD,
        cu_seqlens_q,
        kv_lens_S,
        block_table_SW,
        window=window,
        scale=scale,
        softcap=softcap,
        # Lengths that have to be copied are written by the very kernel that is not waited for.
        pdl=pdl
        and has_dependent_launch(q_THD.device)
        and cu_seqlens_q.is_contiguous()
        and kv_lens_S.is_contiguous(),
    )


@functools.cache  # a layer asks what all others ask, and the reckoning takes 60 us
def choose_num_splits(num_programs: int, num_tiles: int, num_slots: int) -> int:
    """Programs that a sequence's keys are divided among, for the least time by this reckoning.

    `num_programs` without a split run `num_slots` at a time. One takes as many steps as it has
    tiles of keys (`num_tiles` at most: the host knows the block table's width, not the lengths;
    programs that the real lengths leave without keys end at once), and two until its first tile
    has arrived. A started wave counts by halves, because a few programs that are left share the
    memory's bandwidth among fewer. The merge of parts is a second launch: about two steps, and more
    with more parts. A tenth must be gained: 32 sequences of 1,024 take 38.6 us whole and 45.7 in
    two parts, which this reckoning puts at 0.95 (H200, 8 key/value heads of 128).
    """

    def steps(splits: int) -> float:
        return reckon_steps(num_programs, splits, num_tiles, num_slots)

    best = min(range(1, min(max(num_tiles, 1), MAX_SPLITS) + 1), key=steps)
    return best if steps(best) < 0.9 * steps(1) else 1


@functools.cache
def choose_whole_tiles(num_splits: int, num_programs: int, num_tiles: int, num_slots: int) -> int:
    """The most tiles of keys up to which `num_splits` parts gain no tenth over one piece.

    The parts are chosen for all the tiles (`num_tiles`) that the block table has room for. The GPU
    knows how many a sequence has, and does not divide one of no more than these: three parts for 32
    sequences (8 key/value heads, 396 slots, a table of 4,096 keys) are of use from 21 tiles on.
    """

    def is_longer_whole(tiles: int) -> bool:
        whole = reckon_steps(num_programs, 1, tiles, num_slots)
        return reckon_steps(num_programs, num_splits, tiles, num_slots) < 0.9 * whole

    longer = filter(is_longer_whole, range(1, num_tiles + 1))
    return next(longer, num_tiles + 1) - 1


def reckon_steps(
    num_programs: int, splits: int, num_tiles: int, num_slots: int, in_flight: int = 2
) -> float:
    """What a launch takes by the reckoning of `choose_num_splits`, in tiles of keys."""
    waves = max(math.ceil(2 * num_programs * splits / num_slots) / 2, 1)
    merge = 0 if splits == 1 else 2 + splits / 32
    return waves * (math.ceil(num_tiles / splits) + in_flight) + merge


def gains_by_depth(num_programs: int, num_tiles: int, num_slots: int, deep_slots: int) -> bool:
    """Whether a launch that reads keys of one query a sequence is quicker with a third tile of keys
    in flight, for which fewer programs fit (`deep_slots` at a time in place of `num_slots`).

    Where all programs run at once anyway, no. Else a wave takes as long as its programs have tiles,
    and one more for each that is in flight, and that the longer the more of them share the
    bandwidth; what is left for the last wave may suit either. A twentieth must be gained. By this
    64 sequences of 2,048 (8 key/value heads, 396 and 264 slots) gain 9 %, measured 11: 4,101 GB/s
    in place of 3,640; 256 of 1,024 lose 2 (measured 1), 256 of 4,096 gain 2 (measured 1) (H200).
    """
    if num_programs <= num_slots:
        return False
    three = reckon_steps(num_programs, 1, num_tiles, deep_slots, in_flight=3) * deep_slots
    return three < 0.95 * reckon_steps(num_programs, 1, num_tiles, num_slots) * num_slots


@functools.cache
def resident_programs(tile: Tile, itemsize: int, device: torch.device) -> int:
    """How many programs of a tile the GPU holds at once, by shared memory (registers suffice for as
    many), at most four a multiprocessor."""
    if device.type != "cuda":
        return 1
    properties = torch.cuda.get_device_properties(device)
    buffers = max((tile.num_stages - 1) // 2, 1)
    keys = 2 * buffers * tile.block_n * tile.block_d
    queries_and_weights = tile.block_m * (tile.block_d + tile.block_n)
    # Entries of the table, and 1 KiB that CUDA takes.
    program_bytes = (keys + queries_and_weights) * itemsize + 2048
    per_sm = properties.shared_memory_per_multiprocessor // program_bytes
    return properties.multi_processor_count * min(max(per_sm, 1), 4)


def paged_attention_triton(
    q_THD: Tensor,
    k_cache_NBKD: Tensor,
    v_cache_NBKD: Tensor,
    cu_seqlens_q: Tensor,
    kv_lens_S: Tensor,
    block_table_SW: Tensor,
    *,
    window: Window,
    scale: float,
    softcap: float,
    num_splits: int | None = None,
    whole_tiles_most: int | None = None,
    tile: Tile | GluonTile | None = None,
    pdl: bool = False,
) -> Tensor:
    """Launches the kernels on checked arguments: on a GPU, or on the CPU in Triton's interpreter.

    Sequences of one query and others, whose tiles are made for different work, get a launch each
    where a step may have both. `num_splits` (1 to 64), `whole_tiles_most` (tiles of keys up to
    which a sequence is left whole all the same; 0 divides every one) and `tile` are chosen by size
    unless given; a given tile serves all. `pdl` needs a GPU of sm_90 or later. A `GluonTile` runs
    the kernel of `varlen_attention_gluon.py` without a split, and wants `fits_gluon` and cache
    blocks of 16. It is chosen for the others where neither tile nor split is given, see
    `prefers_gluon`; how long their prompts are is known to the GPU alone, so that the mean over all
    sequences decides.
    """
    if q_THD.stride(-1) != 1:
        q_THD = q_THD.contiguous()
    num_tokens, num_heads, head_dim = q_THD.shape
    num_seqs = block_table_SW.shape[0]
    out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    if num_tokens == 0 or num_seqs == 0:
        return out_THD
    cu_seqlens_q, kv_lens_S = cu_seqlens_q.contiguous(), kv_lens_S.contiguous()
    if isinstance(tile, GluonTile):
        launch_gluon(
            q_THD, *_rows_of(k_cache_NBKD, v_cache_NBKD), out_THD, None, cu_seqlens_q, kv_lens_S,
            block_table_SW.contiguous(), window=window, scale=scale, tile=tile,
        )  # fmt: skip
        return out_THD
    q_THD, scale = positive_scale(q_THD, scale)
    group = num_heads // k_cache_NBKD.shape[2]
    mean = -(-num_tokens // num_seqs)
    if num_tokens == num_seqs:
        launches = [("guess one", 1)]
    elif tile is not None:
        launches = [("any", mean)]
    elif num_seqs == 1:
        launches = [("many", mean)]
    else:
        # In this order: the merge of "many" also writes the rows of "one".
        launches = [("many", max(mean, PROMPT_ROWS // group)), ("one", 1)]
    block_size = k_cache_NBKD.shape[1]
    in_gluon = (
        tile is None
        and num_splits is None
        and prefers_gluon(mean, head_dim)
        and block_size == CACHE_BOX
        and fits_gluon(q_THD, *_rows_of(k_cache_NBKD, v_cache_NBKD), softcap)
    )
    for queries, number in launches:
        sizes = (number, group, head_dim, q_THD.element_size(), shared_bytes_of(q_THD.device))
        chosen = tile or choose_tile(*sizes, paged=True)
        needs = _needs(q_THD, k_cache_NBKD, block_table_SW, chosen, queries)
        if tile is None and number == 1:
            deep = choose_tile(*sizes, paged=True, deep=True)
            deep_needs = _needs(q_THD, k_cache_NBKD, block_table_SW, deep, queries)
            if gains_by_depth(*needs, deep_needs[2]):
                chosen, needs = deep, deep_needs
        splits = num_splits or choose_num_splits(*needs)
        if in_gluon and queries == "many" and splits == 1:
            launch_gluon(
                q_THD, *_rows_of(k_cache_NBKD, v_cache_NBKD), out_THD, None, cu_seqlens_q,
                kv_lens_S, block_table_SW.contiguous(), window=window, scale=scale,
                tile=choose_gluon_tile(mean, head_dim, block_table_SW.shape[1] * block_size),
                skips_one=True,
            )  # fmt: skip
            continue
        whole = choose_whole_tiles(splits, *needs) if whole_tiles_most is None else whole_tiles_most
        _launch(
            q_THD, k_cache_NBKD, v_cache_NBKD, out_THD, cu_seqlens_q, kv_lens_S, block_table_SW,
            window, scale, softcap, splits, whole, chosen, queries, pdl,
        )  # fmt: skip
    return out_THD


def _rows_of(k_cache_NBKD: Tensor, v_cache_NBKD: Tensor) -> tuple[Tensor, Tensor]:
    """The caches as `launch_gluon` wants them, `[N * B, K, D]`."""
    return k_cache_NBKD.flatten(0, 1), v_cache_NBKD.flatten(0, 1)


def _needs(
    q_THD: Tensor, k_cache_NBKD: Tensor, block_table_SW: Tensor, tile: Tile, queries: str
) -> tuple[int, int, int]:
    """What a launch's parts are reckoned from: its programs without a split, the tiles of keys that
    the table has room for, and the programs that run at a time."""
    num_seqs, width = block_table_SW.shape
    block_size, num_kv_heads = k_cache_NBKD.shape[1:3]
    num_blocks = num_seqs if queries == "one" else max(q_THD.shape[0] // tile.block_q, num_seqs)
    num_tiles = -(-width * block_size // tile.block_n)
    num_slots = resident_programs(tile, q_THD.element_size(), q_THD.device)
    return num_blocks * num_kv_heads, num_tiles, num_slots


def _launch(
    q_THD: Tensor,
    k_cache_NBKD: Tensor,
    v_cache_NBKD: Tensor,
    out_THD: Tensor,
    cu_seqlens_q: Tensor,
    kv_lens_S: Tensor,
    block_table_SW: Tensor,
    window: Window,
    scale: float,
    softcap: float,
    num_splits: int,
    whole_tiles_most: int,
    tile: Tile,
    queries: str,
    pdl: bool,
) -> None:
    """Writes the rows of `out_THD` whose sequences have so many `queries` (`paged_attention_kernel`
    says which words there are)."""
    num_tokens, num_heads, head_dim = q_THD.shape
    num_seqs = block_table_SW.shape[0]
    block_size, num_kv_heads = k_cache_NBKD.shape[1:3]
    num_blocks = num_seqs if queries == "one" else num_tokens // tile.block_q + num_seqs
    num_programs = num_blocks * num_kv_heads
    part_PRHD, lse_PRH = out_THD, out_THD  # not used without a split
    num_rows = (num_seqs if queries == "one" else num_tokens) * num_heads
    if num_splits > 1:
        rows = (num_splits, num_rows)
        part_PRHD = torch.empty(*rows, head_dim, dtype=torch.float32, device=q_THD.device)
        lse_PRH = torch.empty(rows, dtype=torch.float32, device=q_THD.device)
    with on_device_of(q_THD):
        paged_attention_kernel[(num_programs * num_splits,)](
            q_THD,
            k_cache_NBKD,
            v_cache_NBKD,
            out_THD,
            part_PRHD,
            lse_PRH,
            cu_seqlens_q,
            kv_lens_S,
            block_table_SW,
            num_rows,
            num_seqs,
            num_splits,
            whole_tiles_most,
            *q_THD.stride()[:2],
            *block_table_SW.stride(),
            **window_arguments(window),
            **score_arguments(scale, softcap),
            **tile_arguments(tile, num_heads // num_kv_heads, head_dim),
            NUM_KV_HEADS=num_kv_heads,
            CACHE_BLOCK=block_size,
            IS_SPLIT=num_splits > 1,
            QUERIES=queries,
            **launch_options(pdl),
        )
        if num_splits > 1:
            merge_splits_kernel[(num_rows,)](
                part_PRHD,
                lse_PRH,
                out_THD,
                cu_seqlens_q,
                num_rows,
                num_splits,
                NUM_HEADS=num_heads,
                HEAD_DIM=head_dim,
                BLOCK_P=power_of_two(num_splits),
                BLOCK_D=tile.block_d,
                QUERIES=queries,
                num_warps=1 if num_splits <= 8 else 4,
                **launch_options(pdl),
            )


@triton.jit
def cache_rows(
    table_row_ptr,
    table_stride_w,
    start,
    num_keys,
    CACHE_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Rows of the cache, of K heads each, that hold the keys from `start`, where a tile begins.

    One entry of the table is read for each cache block where blocks and tiles divide each other.
    Entries behind the sequence are not read: they need not name a block.
    """
    tile_N = tl.arange(0, BLOCK_N)
    if CACHE_BLOCK % BLOCK_N == 0:
        cache_block = tl.load(table_row_ptr + start // CACHE_BLOCK * table_stride_w).to(tl.int64)
        return cache_block * CACHE_BLOCK + start % CACHE_BLOCK + tile_N
    elif BLOCK_N % CACHE_BLOCK == 0:
        NUM_BLOCKS: tl.constexpr = BLOCK_N // CACHE_BLOCK
        entry_B = start // CACHE_BLOCK + tl.arange(0, NUM_BLOCKS)
        cache_block_B = tl.load(
            table_row_ptr + entry_B * table_stride_w,
            mask=entry_B * CACHE_BLOCK < num_keys,
            other=0,
        )
        first_row_B = cache_block_B.to(tl.int64) * CACHE_BLOCK
        row_BN = first_row_B[:, None] + tl.arange(0, CACHE_BLOCK)[None, :]
        return tl.reshape(row_BN, [BLOCK_N])
    else:
        key_N = start + tile_N
        cache_block_N = tl.load(
            table_row_ptr + key_N // CACHE_BLOCK * table_stride_w, mask=key_N < num_keys, other=0
        )
        return cache_block_N.to(tl.int64) * CACHE_BLOCK + key_N % CACHE_BLOCK


@triton.jit
def guess_query(
    cu_seqlens_ptr, kv_lens_ptr, block, num_seqs, LATEST_FIRST: tl.constexpr, BLOCK_Q: tl.constexpr
):
    """What `find_queries` finds, and the sequence's length, where each has one query most likely.

    The search takes a part of the time that a decoding sequence takes for its keys. As many queries
    as sequences are one for each in a step that decodes; any other division
    is seen in the numbers that are needed anyway, and then searched.
    """
    # With one query each, sequence s begins at block s // BLOCK_Q + s.
    seq = tl.minimum(block - block // (BLOCK_Q + 1), num_seqs - 1)
    q_start = tl.load(cu_seqlens_ptr + seq)
    num_queries = tl.load(cu_seqlens_ptr + seq + 1) - q_start
    num_keys = tl.load(kv_lens_ptr + seq)
    first_query = block - (q_start // BLOCK_Q + seq)
    if (first_query != 0) | (num_queries != 1):
        seq, q_start, num_queries, first_query = find_queries(
            cu_seqlens_ptr, block, num_seqs, LATEST_FIRST, BLOCK_Q
        )
        num_keys = tl.load(kv_lens_ptr + seq)
    return seq, q_start, num_queries, first_query, num_keys


@triton.jit(
    do_not_specialize=[
        "num_rows",
        "num_seqs",
        "num_splits",
        "whole_tiles_most",
        "table_stride_s",  # the table's width, which grows while requests are served
        "window_left",
        "window_right",
    ]
)
def paged_attention_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    out_ptr,
    part_ptr,
    lse_ptr,
    cu_seqlens_q_ptr,
    kv_lens_ptr,
    block_table_ptr,
    num_rows,
    num_seqs,
    num_splits,
    whole_tiles_most,
    q_stride_t,
    q_stride_h,
    table_stride_s,
    table_stride_w,
    window_left,
    window_right,
    score_scale,
    cap_scale,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    CACHE_BLOCK: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    QUERIES: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASK_ALL: tl.constexpr,
    WAIT: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: BLOCK_Q queries of one sequence, the heads of one group, one share of the keys.

    QUERIES says which sequences the launch serves: "any"; "guess one", any, but most likely each
    has one query; "one", those that have one, of which no block is searched; "many", the others.
    Without a split it writes the output; with one, float32 parts and their log-sums in base 2, of
    `num_rows` rows: a token's heads, or ("one") a sequence's. Of a block of queries that sees at
    most `whole_tiles_most` tiles of keys the first part takes all, and writes the output and a mark
    in place of log-sums (`whole_mark`).
    Programs that start together read the same keys of other heads, neighbours in a cache's rows.
    """
    kv_head = tl.program_id(0) % NUM_KV_HEADS
    share = tl.program_id(0) // NUM_KV_HEADS
    split = share % num_splits
    if QUERIES == "guess one":
        seq, q_start, num_queries, first_query, num_keys = guess_query(
            cu_seqlens_q_ptr, kv_lens_ptr, share // num_splits, num_seqs, HAS_RIGHT, BLOCK_Q
        )
    elif QUERIES == "one":
        seq = share // num_splits
        q_start = tl.load(cu_seqlens_q_ptr + seq)
        num_queries = tl.load(cu_seqlens_q_ptr + seq + 1) - q_start
        num_keys = tl.load(kv_lens_ptr + seq)
        first_query = 0
        num_queries = tl.where(num_queries == 1, 1, 0)
    else:
        seq, q_start, num_queries, first_query = find_queries(
            cu_seqlens_q_ptr, share // num_splits, num_seqs, HAS_RIGHT, BLOCK_Q
        )
        num_keys = tl.load(kv_lens_ptr + seq)
        if QUERIES == "many":
            num_queries = tl.where(num_queries == 1, 0, num_queries)
    if PDL:
        wait_for_predecessor()
    if first_query >= num_queries:
        return

    row_M = tl.arange(0, BLOCK_M)
    query_M = first_query + row_M // GROUP
    head_M = kv_head * GROUP + row_M % GROUP
    dim_D = tl.arange(0, BLOCK_D)
    # Row numbers times strides pass 2**31 in a large cache, so they are taken in 64 bits.
    token_M = (q_start + query_M).to(tl.int64)
    in_tile_M = (row_M < BLOCK_Q * GROUP) & (query_M < num_queries)
    in_tile_MD = in_tile_M[:, None] & (dim_D < HEAD_DIM)[None, :]
    # The tile's first row in 64 bits, the others from there in 32: with 64 for each, the two places
    # to which a split may write took 168 registers where these take 108 (group 4, sm_90).
    row_in_tile_M = row_M // GROUP * (NUM_KV_HEADS * GROUP) + head_M
    out_row = (q_start + first_query).to(tl.int64) * (NUM_KV_HEADS * GROUP)
    part_row = out_row
    if IS_SPLIT:
        if QUERIES == "one":
            part_row = seq.to(tl.int64) * (NUM_KV_HEADS * GROUP)
        part_row += split.to(tl.int64) * num_rows

    position_M = query_M + (num_keys - num_queries)
    first = first_query + (num_keys - num_queries)
    last = tl.minimum(first + BLOCK_Q, num_keys) - 1
    low, high = key_range(
        first, last, num_keys, window_left, window_right, HAS_LEFT, HAS_RIGHT, BLOCK_N
    )
    if IS_SPLIT:
        num_tiles = tl.cdiv(tl.maximum(high - low, 0), BLOCK_N)
        is_whole = num_tiles <= whole_tiles_most
        keys_a_share = tl.cdiv(num_tiles, tl.where(is_whole, 1, num_splits)) * BLOCK_N
        low += split * keys_a_share
        high = tl.minimum(low + keys_a_share, high)
        if low >= high:  # nothing left for this program: the merge skips its part
            tl.store(
                lse_ptr + part_row + row_in_tile_M,
                tl.full([BLOCK_M], float("-inf"), tl.float32),
                mask=in_tile_M,
            )
            return
    whole_low, whole_high = whole_tiles(
        first, last, low, high, num_keys, window_left, window_right, HAS_LEFT, HAS_RIGHT, BLOCK_N
    )

    q_offset_MD = (token_M * q_stride_t + head_M.to(tl.int64) * q_stride_h)[:, None] + dim_D[
        None, :
    ]
    q_MD = tl.load(q_ptr + q_offset_MD, mask=in_tile_MD, other=0.0)
    acc_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    max_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    tile_N = tl.arange(0, BLOCK_N)
    table_row_ptr = block_table_ptr + tl.cast(seq, tl.int64) * table_stride_s
    k_cache_ptr += kv_head * HEAD_DIM
    v_cache_ptr += kv_head * HEAD_DIM
    for start in range(low, high, BLOCK_N):
        row_N = cache_rows(table_row_ptr, table_stride_w, start, num_keys, CACHE_BLOCK, BLOCK_N)
        offset_ND = (row_N * (NUM_KV_HEADS * HEAD_DIM))[:, None] + dim_D[None, :]
        key_N = start + tile_N
        k_ND = load_keys(k_cache_ptr + offset_ND, key_N, num_keys, dim_D, HEAD_DIM, BLOCK_D)
        v_ND = load_keys(v_cache_ptr + offset_ND, key_N, num_keys, dim_D, HEAD_DIM, BLOCK_D)
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
    if IS_SPLIT:
        lse_bits_M = lse_M.to(tl.int32, bitcast=True)
        if is_whole:
            lse_bits_M = tl.full([BLOCK_M], whole_mark(), tl.int32)
            store_rows(out_ptr, out_row, row_in_tile_M, out_MD, dim_D, in_tile_MD, HEAD_DIM)
        else:
            store_rows(part_ptr, part_row, row_in_tile_M, out_MD, dim_D, in_tile_MD, HEAD_DIM)
        tl.store(as_bits(lse_ptr) + part_row + row_in_tile_M, lse_bits_M, mask=in_tile_M)
    else:
        store_rows(out_ptr, out_row, row_in_tile_M, out_MD, dim_D, in_tile_MD, HEAD_DIM)


@triton.jit
def store_rows(ptr, first_row, row_M, x_MD, dim_D, mask_MD, HEAD_DIM: tl.constexpr):
    offset_MD = (row_M * HEAD_DIM)[:, None] + dim_D[None, :]
    tl.store(ptr + first_row * HEAD_DIM + offset_MD, x_MD.to(ptr.dtype.element_ty), mask=mask_MD)


@triton.jit
def whole_mark():
    """Bits in the first part's place for a log-sum where the row's output is written already.

    As a float32 a signalling NaN. Arithmetic makes and passes on quiet ones alone (IEEE 754-2019,
    section 6.2), so that no log-sum has these bits, whatever the scores are. They are stored and
    read as a number: a move as a float could make them quiet.
    """
    return 0x7FA5A5A5


@triton.jit
def as_bits(float32_ptr):
    return float32_ptr.to(tl.pointer_type(tl.int32), bitcast=True)


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def merge_splits_kernel(
    part_ptr,
    lse_ptr,
    out_ptr,
    cu_seqlens_q_ptr,
    num_rows,
    num_splits,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: weighs the parts of one token's query head by their sums of exponents.

    A row that the first part's program has written whole (`whole_mark`) is left as it is.
    Of a token whose sequence another launch serves it writes what that launch overwrites ("many",
    which does not know the sequence), or nothing ("one").
    """
    row = tl.program_id(0).to(tl.int64)
    out_row = row
    if PDL:
        wait_for_predecessor()
    if QUERIES == "one":
        q_start = tl.load(cu_seqlens_q_ptr + row // NUM_HEADS)
        if tl.load(cu_seqlens_q_ptr + row // NUM_HEADS + 1) != q_start + 1:
            return
        out_row = q_start.to(tl.int64) * NUM_HEADS + row % NUM_HEADS
    part_P = tl.arange(0, BLOCK_P)
    row_P = part_P.to(tl.int64) * num_rows + row
    dim_D = tl.arange(0, BLOCK_D)
    # Asked for before the branch, so that both are on their way at once.
    lse_P = tl.load(lse_ptr + row_P, mask=part_P < num_splits, other=float("-inf"))
    if tl.load(as_bits(lse_ptr) + row) == whole_mark():
        return
    # A part without keys was never written, and reading it could bring a NaN.
    filled_P = lse_P != float("-inf")
    part_PD = tl.load(
        part_ptr + (row_P * HEAD_DIM)[:, None] + dim_D[None, :],
        mask=filled_P[:, None] & (dim_D < HEAD_DIM)[None, :],
        other=0.0,
    )
    most = tl.max(lse_P, 0)
    weight_P = tl.exp2(lse_P - tl.where(most == float("-inf"), 0.0, most))
    total = tl.sum(weight_P, 0)
    out_D = tl.sum(part_PD * weight_P[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(
        out_ptr + out_row * HEAD_DIM + dim_D,
        out_D.to(out_ptr.dtype.element_ty),
        mask=dim_D < HEAD_DIM,
    )
