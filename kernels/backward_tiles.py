"""What the kernels of attention's backward share: their tiles, and where rows and keys lie.

Shapes as in `varlen_attention_backward.py`: M rows and N keys of a tile; a row is a query and one
of the G heads that share a key/value head: row = query * G + head.
"""

from typing import Any, NamedTuple

from minigen.kernels.tiles import power_of_two
from minigen.kernels.triton_import import tl, triton


class BackwardTile(NamedTuple):
    """The sizes with which one of the two kernels is compiled: rows, keys, and how it runs.

    max_registers: of a thread; None leaves it to the compiler.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


class BackwardTiles(NamedTuple):
    queries: BackwardTile  # of the kernel that owns rows and writes dQ
    keys: BackwardTile  # of the kernel that owns keys and writes dK and dV


def backward_tile_arguments(tile: BackwardTile) -> dict[str, Any]:
    arguments = {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    return arguments | ({"maxnreg": tile.max_registers} if tile.max_registers else {})


# Tiles by the GPU's shared memory and by head dim. All of the 16-bit ones compile for their GPUs
# without spilling registers inside a loop (Triton 3.7); larger ones spill, at D = 128 on sm_90
# 64 x 128 with a third stage or four warps.
_HOPPER = {
    64: BackwardTiles(BackwardTile(128, 64, 8, 3), BackwardTile(64, 128, 8, 3)),
    128: BackwardTiles(BackwardTile(128, 64, 8, 3), BackwardTile(64, 128, 8, 2)),
    256: BackwardTiles(BackwardTile(64, 32, 8, 2), BackwardTile(64, 32, 8, 2)),
}
_AMPERE = {
    64: BackwardTiles(BackwardTile(128, 64, 8, 2), BackwardTile(64, 128, 8, 2)),
    128: BackwardTiles(BackwardTile(128, 32, 8, 2), BackwardTile(64, 64, 8, 2)),
    256: BackwardTiles(BackwardTile(64, 16, 8, 2), BackwardTile(16, 64, 8, 2)),
}
_CDNA = {
    64: BackwardTiles(BackwardTile(64, 64, 4, 2), BackwardTile(32, 64, 4, 1)),
    128: BackwardTiles(BackwardTile(64, 64, 4, 1), BackwardTile(32, 64, 4, 1)),
    256: BackwardTiles(BackwardTile(32, 32, 4, 1), BackwardTile(16, 32, 4, 1)),
}
# Exact float32 products run on no tensor core, and keep their factors in registers.
_FLOAT32 = {
    64: BackwardTiles(BackwardTile(32, 16, 4, 1), BackwardTile(16, 32, 4, 1)),
    128: BackwardTiles(BackwardTile(32, 16, 8, 1), BackwardTile(16, 32, 8, 1)),
    256: BackwardTiles(BackwardTile(16, 16, 8, 1), BackwardTile(16, 16, 8, 1)),
}


def choose_backward_tiles(
    rows: int, keys: int, head_dim: int, itemsize: int, shared_bytes: int
) -> BackwardTiles:
    """Tiles for sequences of about `rows` rows (queries times G) and `keys` keys each."""
    if itemsize == 4:
        family = _FLOAT32
    elif shared_bytes >= 200 * 1024:  # sm_90, sm_100: 227 KiB
        family = _HOPPER
    elif shared_bytes >= 96 * 1024:  # sm_80: 163 KiB; sm_86, sm_89, sm_120: 99 KiB
        family = _AMPERE
    else:  # gfx942: 64 KiB
        family = _CDNA
    tiles = family[max(64, power_of_two(head_dim))]
    # What a program owns follows short sequences: rows that are not there cost as much as others.
    block_m = min(tiles.queries.block_m, max(16, power_of_two(rows)))
    block_n = min(tiles.keys.block_n, max(16, power_of_two(keys)))
    return BackwardTiles(
        tiles.queries._replace(block_m=block_m, num_warps=_warps(tiles.queries, block_m)),
        tiles.keys._replace(block_n=block_n, num_warps=_warps(tiles.keys, block_n)),
    )


def _warps(tile: BackwardTile, own: int) -> int:
    return 4 if own < min(tile.block_m, tile.block_n) else tile.num_warps


@triton.jit
def find_block(cu_seqlens_ptr, block, num_seqs, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """The sequence of a block of rows (GROUP a token): s begins at block cu_seqlens[s] * GROUP //
    BLOCK + s, as in `find_sequence`. Returns its number, its first token, its tokens, and the
    block's first row in it, which lies past its last where the bound on blocks gave one too many.
    """
    left = 0
    right = num_seqs
    while left < right:
        middle = (left + right) // 2
        if tl.load(cu_seqlens_ptr + middle) * GROUP // BLOCK + middle <= block:
            left = middle + 1
        else:
            right = middle
    seq = left - 1
    start = tl.load(cu_seqlens_ptr + seq)
    length = tl.load(cu_seqlens_ptr + seq + 1) - start
    return seq, start, length, (block - (start * GROUP // BLOCK + seq)) * BLOCK


@triton.jit
def load_tile(ptr, offset_R, in_sequence_R, dim_D, HEAD_DIM: tl.constexpr, CHECK: tl.constexpr):
    """Rows of HEAD_DIM elements at `offset_R`; 0 beyond the head dim, and (CHECK) the sequence."""
    ptr_RD = ptr + (offset_R[:, None] + dim_D[None, :])
    if CHECK:
        x_RD = tl.load(ptr_RD, mask=in_sequence_R[:, None] & (dim_D < HEAD_DIM)[None, :], other=0.0)
    elif dim_D.shape[0] != HEAD_DIM:
        x_RD = tl.load(ptr_RD, mask=(dim_D < HEAD_DIM)[None, :], other=0.0)
    else:
        x_RD = tl.load(ptr_RD)
    return x_RD


@triton.jit
def row_offsets(first_row, row_M, stride_t, stride_h, GROUP: tl.constexpr):
    """Where rows lie: the first one's token in 64 bits, the rest from there on in 32."""
    first_query = first_row // GROUP
    offset_M = (row_M // GROUP - first_query) * stride_t + (row_M % GROUP) * stride_h
    return tl.cast(first_query, tl.int64) * stride_t, offset_M


@triton.jit
def load_rows(
    q_ptr,
    dout_ptr,
    out_ptr,
    lse_ptr,
    dlse_ptr,
    q_start,
    num_queries,
    first_row,
    kv_head,
    num_tokens,
    q_stride_t,
    q_stride_h,
    dout_stride_t,
    dout_stride_h,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """A tile's rows of a sequence: their numbers, whether they lie in it, their queries and dO,
    where they begin in a packed tensor (first one, and from there on), shift and delta.

    shift is the lse in base 2. For a row that saw no key (lse -inf) it is +inf, so that all its
    weights come out as 0.
    """
    row_M = first_row + tl.arange(0, BLOCK_M)
    in_sequence_M = row_M < num_queries * GROUP
    dim_D = tl.arange(0, BLOCK_D)
    num_heads = tl.num_programs(1) * GROUP
    # Tokens times strides pass 2**31 in long batches: those products are taken in 64 bits.
    q_ptr += q_start.to(tl.int64) * q_stride_t + kv_head * GROUP * q_stride_h
    dout_ptr += q_start.to(tl.int64) * dout_stride_t + kv_head * GROUP * dout_stride_h
    packed = (q_start.to(tl.int64) * num_heads + kv_head * GROUP) * HEAD_DIM
    base, offset_M = row_offsets(first_row, row_M, q_stride_t, q_stride_h, GROUP)
    q_MD = load_tile(q_ptr + base, offset_M, in_sequence_M, dim_D, HEAD_DIM, True)
    base, offset_M = row_offsets(first_row, row_M, dout_stride_t, dout_stride_h, GROUP)
    dout_MD = load_tile(dout_ptr + base, offset_M, in_sequence_M, dim_D, HEAD_DIM, True)
    base, packed_M = row_offsets(first_row, row_M, num_heads * HEAD_DIM, HEAD_DIM, GROUP)
    packed += base
    out_MD = load_tile(out_ptr + packed, packed_M, in_sequence_M, dim_D, HEAD_DIM, True)

    head_M = kv_head * GROUP + row_M % GROUP
    lse_offset_M = head_M * num_tokens + q_start + row_M // GROUP
    lse_M = tl.load(lse_ptr + lse_offset_M, mask=in_sequence_M, other=float("-inf"))
    dlse_M = tl.load(dlse_ptr + lse_offset_M, mask=in_sequence_M, other=0.0)
    delta_M = tl.sum(dout_MD.to(tl.float32) * out_MD.to(tl.float32), 1) - dlse_M
    blind_M = lse_M == float("-inf")
    shift_M = tl.where(blind_M, float("inf"), lse_M * 1.4426950408889634)  # log2 e
    delta_M = tl.where(blind_M, 0.0, delta_M)
    return row_M, in_sequence_M, q_MD, dout_MD, packed, packed_M, shift_M, delta_M


@triton.jit
def in_window(distance, window_left, window_right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """True where a key at this distance from a query (positive: later) is seen by it."""
    visible = distance == distance
    if HAS_LEFT:
        visible &= distance >= -window_left
    if HAS_RIGHT:
        visible &= distance <= window_right
    return visible
