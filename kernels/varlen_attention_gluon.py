"""Prefill attention for Hopper in Gluon: warps that load and warps that multiply, over prompts of
`varlen_attention` or over the cache of `paged_attention`.

The structure is that of FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608, sections 3.1, 3.2).
A program is 12 warps: one warp asks the copy engine for tiles, two groups of four multiply, and
pass each other by barriers in shared memory. Within a group the scores of the next tile are begun
before the weights of the present one meet its values, so that both products run beside the softmax.
Plain Triton waits for both products before each softmax. Its kernels run everywhere, these only
where `fits_gluon` says so.

Shapes: T packed tokens, S sequences, H query heads, K key/value heads, G = H / K query heads that
share a key/value head, D head dim, N cache blocks, B tokens a block, W width of the block table;
M = 64 rows of one group of warps, N keys of a tile.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minigen.kernels.checks import Window
from minigen.kernels.gluon_import import (
    KNOWN_GLUON,
    TensorDescriptor,
    constexpr,
    gl,
    gluon,
    hopper,
)
from minigen.kernels.tiles import (
    HOPPER_SHARED_BYTES,
    LOG2_E,
    fits_descriptor,
    key_range,
    on_device_of,
    positive_scale,
    queries_of_block,
    search_sequence,
    shared_bytes_of,
    whole_tiles,
    window_arguments,
)
from minigen.kernels.triton_import import triton

ROWS = 64  # what one group of four warps multiplies at once
GROUPS = (1, 2, 4, 8)  # query heads a key/value head that were tried
SHORT_QUERIES, SHORT_KEYS = 1024, 4096  # up to which `SHORT_TILE` is chosen
CACHE_BOX = 16  # rows of the cache that come in one copy


class GluonTile(NamedTuple):
    """Keys of a tile, tiles of keys and of values in flight, and tiles of queries in flight."""

    block_n: int = 128
    stages: int = 2
    query_stages: int = 2


DEFAULT_TILE = GluonTile()
SHORT_TILE = GluonTile(block_n=64, stages=4)
TILE_OF_64 = GluonTile(stages=4)  # for heads of 64, whose tiles take half of the memory


@dataclass(frozen=True)
class Sizes:
    """What the kernel is compiled with: all heads of a `group` share the rows of a tile."""

    head_dim: int
    group: int
    block_n: int
    stages: int
    query_stages: int
    has_left: bool
    has_right: bool
    paged: bool
    skips_one: bool = False  # leaves sequences of one query to another launch

    rows: int = ROWS
    groups: int = 2

    @property
    def group_queries(self) -> int:
        return self.rows // self.group

    @property
    def block_q(self) -> int:
        return self.groups * self.group_queries

    @property
    def query_bytes(self) -> int:
        return self.rows * self.head_dim * 2

    @property
    def tile_bytes(self) -> int:
        return self.block_n * self.head_dim * 2


@functools.cache
def runs_gluon(device: torch.device) -> bool:
    """Whether these kernels run there: a Hopper GPU, and a Triton whose Gluon they were tried with.

    AMD's GPUs of capability 9 are told by `torch.version.hip`.
    """
    return (
        KNOWN_GLUON
        and device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) == (9, 0)
        and shared_bytes_of(device) >= HOPPER_SHARED_BYTES
        and not triton.knobs.runtime.interpret
    )


def fits_gluon(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, softcap: float) -> bool:
    """Whether these kernels can run on these tensors, all of which they were tried with.

    Keys and values of all heads must be one row, as a descriptor of two dimensions wants them.
    """
    head_dim = q_THD.shape[2]
    return (
        runs_gluon(q_THD.device)
        and q_THD.dtype in (torch.float16, torch.bfloat16)
        and head_dim in (64, 128)
        and q_THD.shape[1] // k_TKD.shape[1] in GROUPS
        and softcap == 0
        and all(fits_descriptor(x) for x in (q_THD, k_TKD, v_TKD))
        and all(x.stride(1) == head_dim or x.shape[1] == 1 for x in (k_TKD, v_TKD))
    )


def prefers_gluon(queries: int, head_dim: int) -> bool:
    """Whether, where they fit, these kernels are the faster ones for about `queries` a sequence.

    H200, causal, bfloat16, TFLOP/s of what was chosen before and of these kernels, for heads of 128
    as they were at first, for heads of 64 as they are:

                               16 x 512   64 of mean 298   16 x 1024   4 x 4096   1 x 16384
        heads of 128, 32/8     246, 285         326, 378    364, 447   526, 627    524, 672
        16/8                   208, 234         288, 305    335, 411   503, 605    550, 668
        paged, 32/8            240, 254         307, 319    348, 383   471, 566    470, 569
        paged, 16/8            201, 216         279, 295    313, 359   455, 559    504, 602
        heads of 64, 32/8      210, 198         280, 282    305, 326   414, 429    456, 454
        16/8                   177, 164         250, 249    277, 299   406, 435    460, 460
        paged, 32/8            189, 189         259, 259    278, 307   369, 422    396, 442

    With the tile of `choose_gluon_tile` they gave 330, 412, 458, 628 and 607 (16/8: 276, 360, 416,
    625, 681) later, and over the cache 304, 384, 438, 560 and 550 (248, 339, 395, 561, 545). The
    host takes 160 us for a call, 140 before; over the cache 180, 330 before. Not timed: fewer than
    64 queries, where a tile is partly empty and a decoding sequence beside prompts takes a program
    1 us to pass over; and windows.
    """
    return queries >= (64 if head_dim == 128 else 1024)


def choose_gluon_tile(queries: int, head_dim: int, most_keys: int = 0) -> GluonTile:
    """Tile for sequences of about `queries` queries and, where a bound is known, `most_keys` keys.

    The diagonal wastes half of a tile, so that short sequences want small ones; of large ones there
    are half as many, with what each takes beside its products. H200 as in `prefers_gluon`, TFLOP/s
    of 128 keys with two tiles in flight and of 64 with four:

                       16 x 512   64 of mean 298   16 x 1024   4 x 4096   1 x 16384
        32/8 heads     285, 327         378, 380    447, 458   627, 563    672, 532
        16/8 heads     234, 260         305, 343    411, 408   605, 546    668, 542

    A chunk of a prompt behind many keys was not timed; by these figures it wants large tiles. Tried
    and dropped, 32/8 heads: two groups of warps that take turns at the tensor cores (281, 345, 443,
    620, 613), and three groups with tiles of 64 keys (263, 347, 422, 572, 581).

    Heads of 64, 32/8, where this is chosen at all (16 x 1024, 4 x 4096, 1 x 16384): 128 keys with
    four tiles in flight 326, 429, 454, with two 302, 431, 473, 64 keys 310, 381, 402. Dropped:
    three groups (263, 444, 512), and one or two of eight exponentials as polynomials (319, 428, 457
    and 307, 423, 452).
    """
    if head_dim == 64:
        return TILE_OF_64
    is_short = queries <= SHORT_QUERIES and most_keys <= SHORT_KEYS
    return SHORT_TILE if is_short else DEFAULT_TILE


class RowsBefore:
    """Where a tensor would begin with so many rows more in front, for a descriptor to start at.

    Nothing need be there as long as no box lies outside its descriptor altogether: of such a box
    the copy engine reads, for zeros, where the descriptor begins (an illegal access on an H200
    where no memory was). See `load_keys_and_values`.
    """

    def __init__(self, tensor: Tensor, rows: int) -> None:
        self.dtype = tensor.dtype
        self.address = tensor.data_ptr() - rows * tensor.stride(0) * tensor.element_size()

    def data_ptr(self) -> int:
        return self.address


def launch_gluon(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    out_THD: Tensor,
    lse_HT: Tensor | None,
    cu_seqlens_q: Tensor,
    key_lengths: Tensor,
    block_table_SW: Tensor | None = None,
    *,
    window: Window,
    scale: float,
    tile: GluonTile = DEFAULT_TILE,
    skips_one: bool = False,
) -> None:
    """Fills `out_THD`, and `lse_HT` if there is one; wants `fits_gluon`.

    Without a block table `key_lengths` is `cu_seqlens_k`. With one it is `kv_lens_S`, and keys and
    values are the rows of the cache, `[N * B, K, D]` with B = 16. With `skips_one` the rows of
    sequences of one query stay as they are. A CUDA graph may capture it: nothing waits for the GPU,
    and descriptors hold addresses, which a replay keeps.
    """
    num_tokens, num_heads, head_dim = q_THD.shape
    num_rows, num_kv_heads, _ = k_TKD.shape
    group = num_heads // num_kv_heads
    num_seqs = cu_seqlens_q.shape[0] - 1
    q_THD, scale = positive_scale(q_THD, scale)
    paged = block_table_SW is not None
    bounds = window_arguments(window)
    sides = bounds.pop("HAS_LEFT"), bounds.pop("HAS_RIGHT")
    sizes = Sizes(head_dim, group, *tile, *sides, paged, skips_one)
    width = num_kv_heads * head_dim
    rows, columns = (CACHE_BOX, 64) if paged else (tile.block_n, head_dim)
    flat, boxes = (gl.NVMMASharedLayout(128, 16, rank) for rank in (2, 3))
    q_desc = TensorDescriptor(
        q_THD,
        list(q_THD.shape),
        list(q_THD.stride()),
        [sizes.group_queries, group, head_dim],
        boxes,
    )
    k_desc = TensorDescriptor(k_TKD, [num_rows, width], [k_TKD.stride(0), 1], [rows, columns], flat)
    v_desc = TensorDescriptor(
        RowsBefore(v_TKD, rows),
        [num_rows + rows, rows, width],
        [v_TKD.stride(0), v_TKD.stride(0), 1],
        [1, rows, columns],
        boxes,
    )
    num_tiles = (num_tokens // sizes.block_q + num_seqs) * num_kv_heads
    properties = torch.cuda.get_device_properties(q_THD.device)
    with on_device_of(q_THD):
        attention_gluon_kernel[(min(num_tiles, properties.multi_processor_count),)](
            q_desc,
            k_desc,
            v_desc,
            out_THD,
            lse_HT,
            cu_seqlens_q,
            key_lengths,
            key_lengths if block_table_SW is None else block_table_SW,
            torch.zeros(1, dtype=torch.int32, device=q_THD.device),
            num_seqs,
            num_tokens,
            num_kv_heads,
            num_tiles,
            0 if block_table_SW is None else block_table_SW.stride(0),
            bounds["window_left"],
            bounds["window_right"],
            scale * LOG2_E,
            SIZES=sizes,
            num_warps=4,
        )


class Barriers(NamedTuple):
    """`full`: what was asked for has arrived. `empty`: all its readers have read it."""

    q_full: Any
    q_empty: Any
    k_full: Any
    k_empty: Any
    v_full: Any
    v_empty: Any
    tile_full: Any
    tile_empty: Any


@gluon.jit
def read_number(numbers, index):
    layout: constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.max(numbers.index(index).load(layout), 0)


@gluon.jit
def write_number(numbers, index, number):
    layout: constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    numbers.index(index).store(gl.full([1], 0, gl.int32, layout) + number)


@gluon.jit
def send_tile(numbers, bars, turn, slot, q_start, num_queries, first_query, num_keys):
    """Tells the multiplying warps what the tile is, so that they need not search it; slot -1: all
    is done. Two tiles' numbers have room."""
    place = turn % 2
    hopper.mbarrier.wait(bars.tile_empty.index(place), ((turn // 2) & 1) ^ 1)
    write_number(numbers, place * 8, slot)
    write_number(numbers, place * 8 + 1, q_start)
    write_number(numbers, place * 8 + 2, num_queries)
    write_number(numbers, place * 8 + 3, first_query)
    write_number(numbers, place * 8 + 4, num_keys)
    hopper.mbarrier.arrive(bars.tile_full.index(place), count=1)


@gluon.jit
def receive_tile(numbers, bars, turn):
    place = turn % 2
    hopper.mbarrier.wait(bars.tile_full.index(place), (turn // 2) & 1)
    slot = read_number(numbers, place * 8)
    q_start = read_number(numbers, place * 8 + 1)
    num_queries = read_number(numbers, place * 8 + 2)
    first_query = read_number(numbers, place * 8 + 3)
    num_keys = read_number(numbers, place * 8 + 4)
    hopper.mbarrier.arrive(bars.tile_empty.index(place), count=1)
    return slot, q_start, num_queries, first_query, num_keys


@gluon.jit
def range_of_keys(num_queries, first_query, num_keys, window_left, window_right, sizes: constexpr):
    """Positions of a tile's first and last query, the keys that they see, and how many tiles those
    are: one at least, of which a query may see nothing."""
    first = first_query + (num_keys - num_queries)
    last = gl.minimum(first + sizes.block_q, num_keys) - 1
    low, high = key_range(
        first,
        last,
        num_keys,
        window_left,
        window_right,
        sizes.has_left,
        sizes.has_right,
        sizes.block_n,
    )
    return first, last, low, high, gl.maximum(gl.cdiv(high - low, sizes.block_n), 1)


@gluon.jit
def find_tile(tile, cu_seqlens_q_ptr, key_lengths_ptr, num_seqs, num_slots, sizes: constexpr):
    slot = tile % num_slots
    block = tile // num_slots
    seq = search_sequence(cu_seqlens_q_ptr, block, num_seqs, sizes.block_q)
    q_start, num_queries, first_query = queries_of_block(
        cu_seqlens_q_ptr, block, seq, sizes.has_right, sizes.block_q
    )
    if sizes.skips_one:
        num_queries = gl.where(num_queries == 1, 0, num_queries)
    if sizes.paged:
        k_start = seq  # whose row of the block table says where its keys are
        num_keys = gl.load(key_lengths_ptr + seq)
    else:
        k_start = gl.load(key_lengths_ptr + seq)
        num_keys = gl.load(key_lengths_ptr + seq + 1) - k_start
    return slot, q_start, num_queries, first_query, k_start, num_keys


@gluon.jit
def load_keys_and_values(
    index,
    start,
    slot,
    k_start,
    num_keys,
    k_desc,
    v_desc,
    k_tiles,
    v_tiles,
    bars,
    block_table_ptr,
    table_stride,
    sizes: constexpr,
):
    """Asks for the tile of keys and values that begins at key `start`, the program's `index`-th.

    Values behind the sequence must come as zeros, since 0 * NaN is NaN: their descriptor has the
    same rows in two dimensions, (i, j) is row i + j - R with R rows a box and j < R. A box from
    (row + n, R - n) has the n rows from `row` on and zeros behind them. Scores of such keys are
    masked. n must not be 0 (`RowsBefore` says why): a box wholly behind the sequence brings the
    last one that is not, values that the tile's scores meet anyway; and for a sequence without keys
    some row comes, whose products `multiplying_warps` drops.
    """
    stage = index % sizes.stages
    phase = (index // sizes.stages) & 1
    column = slot * sizes.head_dim
    k_full = bars.k_full.index(stage)
    v_full = bars.v_full.index(stage)
    if sizes.paged:
        # Boxes of 16 rows and 64 columns, one behind the other, are the layout of a whole tile.
        BOXES: constexpr = sizes.block_n // 16
        PANELS: constexpr = sizes.head_dim // 64
        entry_ptr = block_table_ptr + k_start.to(gl.int64) * table_stride + start // 16
        k_boxes = k_tiles.index(stage)._reinterpret(
            k_desc.dtype, [PANELS * BOXES, 16, 64], k_desc.layout
        )
        v_boxes = v_tiles.index(stage)._reinterpret(
            v_desc.dtype, [PANELS * BOXES, 1, 16, 64], v_desc.layout
        )
        last_box = gl.maximum(num_keys - 1 - start, 0) // 16
        hopper.mbarrier.wait(bars.k_empty.index(stage), phase ^ 1)
        hopper.mbarrier.expect(k_full, sizes.tile_bytes)
        for box in range(BOXES):
            # Entries behind the sequence need not name a block.
            source = gl.minimum(box, last_box)
            row = 16 * gl.load(entry_ptr + source, mask=num_keys > 0, other=0)
            for panel in gl.static_range(PANELS):
                hopper.tma.async_copy_global_to_shared(
                    k_desc,
                    [row, column + panel * 64],
                    k_full,
                    k_boxes.index(panel * BOXES + box),
                )
        hopper.mbarrier.wait(bars.v_empty.index(stage), phase ^ 1)
        hopper.mbarrier.expect(v_full, sizes.tile_bytes)
        for box in range(BOXES):
            source = gl.minimum(box, last_box)
            row = 16 * gl.load(entry_ptr + source, mask=num_keys > 0, other=0)
            rows = gl.maximum(gl.minimum(num_keys - start - source * 16, 16), 1)
            for panel in gl.static_range(PANELS):
                hopper.tma.async_copy_global_to_shared(
                    v_desc,
                    [row + rows, 16 - rows, column + panel * 64],
                    v_full,
                    v_boxes.index(panel * BOXES + box),
                )
    else:
        hopper.mbarrier.wait(bars.k_empty.index(stage), phase ^ 1)
        hopper.mbarrier.expect(k_full, sizes.tile_bytes)
        hopper.tma.async_copy_global_to_shared(
            k_desc, [k_start + start, column], k_full, k_tiles.index(stage)
        )
        rows = gl.maximum(gl.minimum(num_keys - start, sizes.block_n), 1)
        # A sequence without keys may begin at the tensor's end.
        row = gl.where(num_keys > 0, k_start + start, 0)
        hopper.mbarrier.wait(bars.v_empty.index(stage), phase ^ 1)
        hopper.mbarrier.expect(v_full, sizes.tile_bytes)
        hopper.tma.async_copy_global_to_shared(
            v_desc,
            [row + rows, sizes.block_n - rows, column],
            v_full,
            v_tiles.index(stage)._reinterpret(
                v_desc.dtype, [1, sizes.block_n, sizes.head_dim], v_desc.layout
            ),
        )


@gluon.jit
def loading_warp(descs, buffers, bars, pointers, numbers, sizes: constexpr):
    """One warp: looks up tiles of queries, in the order in which programs get to them, and asks for
    their queries, keys and values, from the last key to the first."""
    q_desc, k_desc, v_desc = descs
    q_tiles, k_tiles, v_tiles, tile_numbers = buffers
    cu_seqlens_q_ptr, key_lengths_ptr, block_table_ptr, next_tile_ptr = pointers
    num_seqs, num_slots, num_tiles, table_stride, window_left, window_right = numbers
    GROUPS: constexpr = sizes.groups

    tile = gl.program_id(0)
    turn = tile * 0
    index = tile * 0
    slot, q_start, num_queries, first_query, k_start, num_keys = find_tile(
        tile, cu_seqlens_q_ptr, key_lengths_ptr, num_seqs, num_slots, sizes
    )
    while tile < num_tiles:
        _first, _last, low, _high, count = range_of_keys(
            num_queries, first_query, num_keys, window_left, window_right, sizes
        )
        last_start = low + (count - 1) * sizes.block_n
        is_real = first_query < num_queries
        source = (
            slot, k_start, num_keys, k_desc, v_desc, k_tiles, v_tiles, bars,
            block_table_ptr, table_stride,
        )  # fmt: skip
        if is_real:
            send_tile(tile_numbers, bars, turn, slot, q_start, num_queries, first_query, num_keys)
            phase = (turn // sizes.query_stages) & 1
            for which in gl.static_range(GROUPS):
                place = turn % sizes.query_stages * GROUPS + which
                hopper.mbarrier.wait(bars.q_empty.index(place), phase ^ 1)
                hopper.mbarrier.expect(bars.q_full.index(place), sizes.query_bytes)
                hopper.tma.async_copy_global_to_shared(
                    q_desc,
                    [q_start + first_query + which * sizes.group_queries, slot * sizes.group, 0],
                    bars.q_full.index(place),
                    q_tiles.index(place)._reinterpret(
                        q_desc.dtype,
                        [sizes.group_queries, sizes.group, sizes.head_dim],
                        q_desc.layout,
                    ),
                )
            load_keys_and_values(index, last_start, *source, sizes)
        # The next tile is looked up while the first keys of this one are on their way.
        tile = gl.atomic_add(next_tile_ptr, 1) + gl.num_programs(0)
        after = find_tile(
            gl.minimum(tile, num_tiles - 1),
            cu_seqlens_q_ptr,
            key_lengths_ptr,
            num_seqs,
            num_slots,
            sizes,
        )
        if is_real:
            for i in range(1, count):
                load_keys_and_values(index + i, last_start - i * sizes.block_n, *source, sizes)
            index += count
            turn += 1
        slot, q_start, num_queries, first_query, k_start, num_keys = after
    send_tile(tile_numbers, bars, turn, -1, 0, 0, 0, 0)


@gluon.jit
def masked(score_MN, position_M, start, num_keys, window_left, window_right, sizes: constexpr):
    """Both bounds on the right are one number a row. A comparison and its choice are one piece of
    assembly: ptxas compared all scores first, and packed and unpacked what came of it."""
    key_N = start + gl.arange(0, sizes.block_n, gl.SliceLayout(0, score_MN.type.layout))
    end_M = position_M * 0 + num_keys
    if sizes.has_right:
        end_M = gl.minimum(position_M + window_right + 1, end_M)
    score_MN = gl.inline_asm_elementwise(
        "{.reg .pred p; setp.lt.s32 p, $2, $3; selp.f32 $0, $1, 0fFF800000, p;}",
        "=r,r,r,r",
        [score_MN, key_N[None, :], end_M[:, None]],
        gl.float32,
        True,
        1,
    )
    if sizes.has_left:
        begin_M = position_M - window_left
        score_MN = gl.where(key_N[None, :] >= begin_M[:, None], score_MN, float("-inf"))
    return score_MN


@gluon.jit
def rounded(weight_MN, dtype: constexpr):
    """In pairs: of single ones, carried round a loop, ptxas swaps the halves, and swaps them back
    (64 of the loop's 489 instructions, heads of 64, 128 keys)."""
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [weight_MN], gl.bfloat16, True, 2
        )
    else:
        return gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [weight_MN], gl.float16, True, 2
        )


@gluon.jit
def weights_of(score_MN, max_M, sum_M, score_scale):
    """The softmax of `softmax_step`, without the product: also what earlier sums shrink by."""
    new_max_M = gl.maximum(max_M, gl.max(score_MN, 1))
    # A row that has seen no key yet has maximum -inf, and -inf - -inf is NaN.
    base_M = gl.where(new_max_M == float("-inf"), 0.0, new_max_M * score_scale)
    weight_MN = gl.exp2(score_MN * score_scale - base_M[:, None])
    shrink_M = gl.exp2(max_M * score_scale - base_M)
    return weight_MN, new_max_M, sum_M * shrink_M + gl.sum(weight_MN, 1), shrink_M


@gluon.jit
def begin_scores(q_MD, k_ND, sizes: constexpr):
    layout: constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, sizes.block_n, 16])
    nothing_MN = gl.full([sizes.rows, sizes.block_n], 0.0, gl.float32, layout)
    return hopper.warpgroup_mma(
        q_MD, k_ND.permute((1, 0)), nothing_MN, use_acc=False, is_async=True
    )


@gluon.jit
def attend_tiles(
    begin,
    end,
    index,
    last_start,
    q_MD,
    k_tiles,
    v_tiles,
    bars,
    state,
    position_M,
    num_keys,
    window_left,
    window_right,
    score_scale,
    MASKED: constexpr,
    sizes: constexpr,
):
    """The tiles of keys `begin` to `end`, counted from the last one, the first of which is done."""
    weight_MN, acc_MD, max_M, sum_M = state
    out_rows: constexpr = gl.SliceLayout(1, acc_MD.type.layout)
    weight_layout: constexpr = weight_MN.type.layout
    for i in range(begin, end):
        stage = (index + i) % sizes.stages
        before = index + i - 1
        v_stage = before % sizes.stages
        v_phase = (before // sizes.stages) & 1
        hopper.mbarrier.wait(bars.k_full.index(stage), ((index + i) // sizes.stages) & 1)
        score = begin_scores(q_MD, k_tiles.index(stage), sizes)
        hopper.mbarrier.wait(bars.v_full.index(v_stage), v_phase)
        acc = hopper.warpgroup_mma(weight_MN, v_tiles.index(v_stage), acc_MD, is_async=True)
        score_MN = hopper.warpgroup_mma_wait(1, deps=[score])
        hopper.mbarrier.arrive(bars.k_empty.index(stage), count=1)
        if MASKED:
            start = last_start - i * sizes.block_n
            score_MN = masked(
                score_MN, position_M, start, num_keys, window_left, window_right, sizes
            )
        next_weight_MN, max_M, sum_M, shrink_M = weights_of(score_MN, max_M, sum_M, score_scale)
        # Passes at once, for it has passed above. It is a branch, over which ptxas does not move
        # the exponentials: without it they came after the next line, beside no product.
        hopper.mbarrier.wait(bars.v_full.index(v_stage), v_phase)
        acc_MD, weight_MN = hopper.warpgroup_mma_wait(0, deps=[acc, weight_MN])
        hopper.mbarrier.arrive(bars.v_empty.index(v_stage), count=1)
        acc_MD = acc_MD * gl.convert_layout(shrink_M, out_rows)[:, None]
        # Only now, into the registers of the weights that were read: no copies.
        weight_MN = gl.convert_layout(rounded(next_weight_MN, q_MD.dtype), weight_layout)
    return weight_MN, acc_MD, max_M, sum_M


@gluon.jit
def multiplying_warps(buffers, bars, outputs, numbers, which: constexpr, sizes: constexpr):
    """Four warps: 64 rows of each tile, `which` of the two halves."""
    q_tiles, k_tiles, v_tiles, tile_numbers = buffers
    out_ptr, lse_ptr = outputs
    num_tokens, num_slots, window_left, window_right, score_scale = numbers
    HEAD_DIM: constexpr = sizes.head_dim
    score_layout: constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, sizes.block_n, 16])
    out_layout: constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    weight_layout: constexpr = gl.DotOperandLayout(0, out_layout, 2)
    row_layout: constexpr = gl.SliceLayout(1, score_layout)
    # 16 bytes a thread, whole rows by neighbours.
    store_layout: constexpr = gl.BlockedLayout(
        [1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0]
    )

    turn = gl.program_id(0) * 0
    index = turn
    slot, q_start, num_queries, first_query, num_keys = receive_tile(tile_numbers, bars, turn)
    while slot >= 0:
        first, last, low, high, count = range_of_keys(
            num_queries, first_query, num_keys, window_left, window_right, sizes
        )
        whole_low, whole_high = whole_tiles(
            first,
            last,
            low,
            high,
            num_keys,
            window_left,
            window_right,
            sizes.has_left,
            sizes.has_right,
            sizes.block_n,
        )
        whole_begin = count - (whole_high - low) // sizes.block_n
        whole_begin = gl.minimum(gl.maximum(whole_begin, 1), count)
        whole_end = count - (whole_low - low) // sizes.block_n
        whole_end = gl.minimum(gl.maximum(whole_end, whole_begin), count)
        last_start = low + (count - 1) * sizes.block_n

        place = turn % sizes.query_stages * sizes.groups + which
        q_MD = q_tiles.index(place)
        row_M = gl.arange(0, sizes.rows, row_layout)
        query_M = first_query + which * sizes.group_queries + row_M // sizes.group
        position_M = query_M + (num_keys - num_queries)
        max_M = gl.full([sizes.rows], float("-inf"), gl.float32, row_layout)
        sum_M = gl.full([sizes.rows], 0.0, gl.float32, row_layout)

        hopper.mbarrier.wait(bars.q_full.index(place), (turn // sizes.query_stages) & 1)
        stage = index % sizes.stages
        hopper.mbarrier.wait(bars.k_full.index(stage), (index // sizes.stages) & 1)
        score = begin_scores(q_MD, k_tiles.index(stage), sizes)
        score_MN = hopper.warpgroup_mma_wait(0, deps=[score])
        hopper.mbarrier.arrive(bars.k_empty.index(stage), count=1)
        score_MN = masked(
            score_MN, position_M, last_start, num_keys, window_left, window_right, sizes
        )
        weight_MN, max_M, sum_M, _shrink_M = weights_of(score_MN, max_M, sum_M, score_scale)
        weight_MN = gl.convert_layout(weight_MN.to(q_MD.dtype), weight_layout)
        acc_MD = gl.full([sizes.rows, HEAD_DIM], 0.0, gl.float32, out_layout)

        state = (weight_MN, acc_MD, max_M, sum_M)
        where = (last_start, q_MD, k_tiles, v_tiles, bars)
        keys = (position_M, num_keys, window_left, window_right, score_scale)
        state = attend_tiles(1, whole_begin, index, *where, state, *keys, True, sizes)
        state = attend_tiles(whole_begin, whole_end, index, *where, state, *keys, False, sizes)
        if sizes.has_left:
            state = attend_tiles(whole_end, count, index, *where, state, *keys, True, sizes)
        weight_MN, acc_MD, max_M, sum_M = state

        final = index + count - 1
        stage = final % sizes.stages
        hopper.mbarrier.wait(bars.v_full.index(stage), (final // sizes.stages) & 1)
        acc = hopper.warpgroup_mma(weight_MN, v_tiles.index(stage), acc_MD, is_async=True)
        acc_MD, weight_MN = hopper.warpgroup_mma_wait(0, deps=[acc, weight_MN])
        hopper.mbarrier.arrive(bars.v_empty.index(stage), count=1)
        index += count
        turn += 1

        empty_M = sum_M == 0.0
        divisor_M = gl.where(empty_M, 1.0, sum_M)
        if lse_ptr is not None:
            lse_M = gl.where(empty_M, float("-inf"), max_M * score_scale + gl.log2(divisor_M))
            head_M = slot * sizes.group + row_M % sizes.group
            # 0.693... = ln 2: from base 2 to the natural log that callers expect.
            gl.store(
                lse_ptr + head_M.to(gl.int64) * num_tokens + q_start + query_M,
                lse_M * 0.6931471805599453,
                mask=query_M < num_queries,
            )
        inverse_M = gl.convert_layout(1.0 / divisor_M, gl.SliceLayout(1, out_layout))
        if num_keys <= 0:
            acc_MD = gl.full([sizes.rows, HEAD_DIM], 0.0, gl.float32, out_layout)
        # The queries have been read: their place takes the output, from which whole rows go out.
        q_MD.store((acc_MD * inverse_M[:, None]).to(q_MD.dtype))
        out_MD = q_MD.load(store_layout)
        hopper.fence_async_shared()
        hopper.mbarrier.arrive(bars.q_empty.index(place), count=1)
        row_M = gl.arange(0, sizes.rows, gl.SliceLayout(1, store_layout))
        dim_D = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, store_layout))
        query_M = first_query + which * sizes.group_queries + row_M // sizes.group
        head_M = slot * sizes.group + row_M % sizes.group
        out_row_M = (q_start + query_M).to(gl.int64) * (num_slots * sizes.group) + head_M
        gl.store(
            out_ptr + (out_row_M * HEAD_DIM)[:, None] + dim_D[None, :],
            out_MD,
            mask=(query_M < num_queries)[:, None] & (dim_D < HEAD_DIM)[None, :],
        )
        slot, q_start, num_queries, first_query, num_keys = receive_tile(tile_numbers, bars, turn)


@gluon.jit
def new_barriers(length: constexpr, count: constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [length, 1], hopper.mbarrier.MBarrierLayout())
    for i in gl.static_range(length):
        hopper.mbarrier.init(barriers.index(i), count=count)
    return barriers


@gluon.jit(
    do_not_specialize=[
        "num_seqs",
        "num_tokens",
        "num_slots",
        "num_tiles",
        "table_stride",
        "window_left",
        "window_right",
    ]
)
def attention_gluon_kernel(
    q_desc,
    k_desc,
    v_desc,
    out_ptr,
    lse_ptr,
    cu_seqlens_q_ptr,
    key_lengths_ptr,
    block_table_ptr,
    next_tile_ptr,
    num_seqs,
    num_tokens,
    num_slots,
    num_tiles,
    table_stride,
    window_left,
    window_right,
    score_scale,
    SIZES: constexpr,
):
    """A program a multiprocessor, which takes a tile of queries after the other.

    A tile is `SIZES.block_q` queries of one sequence and the heads of one slot: those that share a
    key/value head. Tiles that follow each other have the same queries and other slots. `next_tile`
    counts, from 0, what programs have taken besides their first: so a program that had short tiles
    takes more of them.
    """
    DTYPE: constexpr = q_desc.dtype
    layout: constexpr = gl.NVMMASharedLayout(128, 16, 2)
    QUERY_TILES: constexpr = SIZES.query_stages * SIZES.groups
    tile_shape: constexpr = [SIZES.stages, SIZES.block_n, SIZES.head_dim]
    buffers = (
        gl.allocate_shared_memory(DTYPE, [QUERY_TILES, SIZES.rows, SIZES.head_dim], layout),
        gl.allocate_shared_memory(DTYPE, tile_shape, layout),
        gl.allocate_shared_memory(DTYPE, tile_shape, layout),
        gl.allocate_shared_memory(gl.int32, [16, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])),
    )
    bars = Barriers(
        q_full=new_barriers(QUERY_TILES, 1),
        q_empty=new_barriers(QUERY_TILES, 1),
        k_full=new_barriers(SIZES.stages, 1),
        k_empty=new_barriers(SIZES.stages, SIZES.groups),
        v_full=new_barriers(SIZES.stages, 1),
        v_empty=new_barriers(SIZES.stages, SIZES.groups),
        tile_full=new_barriers(2, 1),
        tile_empty=new_barriers(2, SIZES.groups),
    )
    hopper.fence_async_shared()
    outputs = (out_ptr, lse_ptr)
    sizes_of_batch = (num_tokens, num_slots, window_left, window_right, score_scale)
    descs = (q_desc, k_desc, v_desc)
    pointers = (cu_seqlens_q_ptr, key_lengths_ptr, block_table_ptr, next_tile_ptr)
    numbers = (num_seqs, num_slots, num_tiles, table_stride, window_left, window_right)
    # 65,536 registers: 232 a thread that multiplies, 40 of four warps, of which one loads.
    gl.warp_specialize(
        [
            (multiplying_warps, (buffers, bars, outputs, sizes_of_batch, gl.constexpr(0), SIZES)),
            (multiplying_warps, (buffers, bars, outputs, sizes_of_batch, gl.constexpr(1), SIZES)),
            (loading_warp, (descs, buffers, bars, pointers, numbers, SIZES)),
        ],
        [4, 1],
        [232, 40],
    )
