"""The kernel of `tile_linear` for Hopper, in Gluon: weights are on their way before the rows are
ready.

A decode step of some rows is a chain of short kernels. One of these, launched early
(`dependent_launch`), asks the copy engine for its weights at once, for as much as its shared memory
holds; when the kernel before has ended, only the rows are left to come. cuBLAS's kernels begin when
the one before has ended, and end 3 to 5 us after the memory could have brought all they read.

Weights are the first factor of a tensor core's product, which takes 64 rows of it at a time, and
rows of x the second, which takes any multiple of 8: eight rows take 2 KB a chunk beside 16 KB of
weights, so that two programs share a multiprocessor, and one keeps the memory busy while the other
begins or ends. (With rows of x first, padded to 64, a layer of Llama-3.1-8B but for rope and
attention took 170 us at 8 rows and 147 at 32 in place of 115 and 119, one of Qwen3-0.6B 18.2 in
place of 15.5 at 8 and as long at 64; H200.)

Shapes: T rows, E inputs, F outputs, P parts of the inputs, G rows of the weight (F, or 2F: gates
first, then what they are multiplied by).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minigen.kernels.dependent_launch import launch_options, wait_for_predecessor
from minigen.kernels.few_rows_dot import gated
from minigen.kernels.gluon_import import (
    TensorDescriptor,
    constexpr,
    gl,
    gluon,
    hopper,
    program_barrier,
)
from minigen.kernels.tiles import fits_descriptor, on_device_of, power_of_two
from minigen.kernels.triton_import import triton
from minigen.kernels.varlen_attention_gluon import runs_gluon

MULTIPROCESSORS = 132  # of the GPUs that were timed; others get tiles that are right, too
# Of shared memory for a program alone on a multiprocessor, and for one of two.
ALL_BYTES, HALF_BYTES = 213 * 1024, 108 * 1024
MOST_CHUNKS = 12


class GluonLinearTile(NamedTuple):
    """Rows and outputs of a program, inputs of a chunk, the most chunks of rows and of weights that
    it holds at once: two of each at least.

    A tensor core takes 64 rows of weights at a time, so that `block_f` is a multiple of that, or of
    32 where gates and what they are multiplied by lie one below the other.
    """

    block_t: int
    block_f: int
    block_e: int = 128
    x_stages: int = 8
    weight_stages: int = 16


@dataclass(frozen=True)
class LinearSizes:
    """What the kernel is compiled with."""

    block_t: int
    block_f: int
    block_e: int
    x_stages: int
    weight_stages: int
    chunks: int
    num_outputs: int
    has_bias: bool
    is_split: bool
    activation: str

    @property
    def block_g(self) -> int:
        """Rows of weights in a tile."""
        return self.block_f * (2 if self.activation else 1)

    @property
    def num_warps(self) -> int:
        return self.block_g // 16

    @property
    def x_bytes(self) -> int:
        return self.block_t * self.block_e * 2

    @property
    def weight_bytes(self) -> int:
        return self.block_g * self.block_e * 2

    @property
    def shared_bytes(self) -> int:
        return self.weight_stages * self.weight_bytes + self.x_stages * self.x_bytes

    @property
    def resident(self) -> bool:
        """Whether no place is used twice."""
        return self.x_stages == self.weight_stages == self.chunks


def fits_tiles(x_TE: Tensor, weight_GE: Tensor) -> bool:
    """Whether the kernel can run on these."""
    return (
        runs_gluon(x_TE.device)
        and x_TE.dtype in (torch.float16, torch.bfloat16)
        and fits_descriptor(x_TE)
        and fits_descriptor(weight_GE)
    )


def choose_rows_tile(
    num_rows: int, num_inputs: int, num_outputs: int, is_gated: bool, parts: int
) -> GluonLinearTile:
    """64 rows of weights by up to 128 of x, in chunks of 128 inputs, as many of them at once as let
    two programs share a multiprocessor; where there is one for each at most, or x has more than 32
    rows, as many as fit it. `parts`: 0 for an output that is not divided.

    Of what was timed for the four layers of Qwen3-0.6B and of Llama-3.1-8B (H200). The 448 programs
    of the larger model's gate and up take 60.7 us at 32 rows where two share a multiprocessor, and
    77.2 where one fills it; where three share it, a layer of 2 rows takes 129 us in place of 124.
    """
    if num_rows > 128 and is_gated:
        # Tiles of 128 rows of weights, since by then each multiprocessor's reads of the L2 count.
        return GluonLinearTile(128, 64, 64, 6, 7)
    if num_rows > 64 and parts > 0:
        return GluonLinearTile(64, 64, 128, 6, 6)
    block_t = min(max(power_of_two(num_rows), 8), 128)
    block_f = 32 if is_gated else 64
    programs = triton.cdiv(num_rows, block_t) * triton.cdiv(num_outputs, block_f) * max(parts, 1)
    room = ALL_BYTES if programs <= MULTIPROCESSORS or block_t >= 64 else HALF_BYTES
    x_stages = 3 if block_t == 128 else 4
    row_bytes = 128 * 2
    fitting = (room - x_stages * block_t * row_bytes) // (64 * row_bytes)
    chunks = triton.cdiv(triton.cdiv(num_inputs, 128), max(parts, 1))
    weight_stages = min(fitting, max(chunks, 2), MOST_CHUNKS)
    return GluonLinearTile(block_t, block_f, 128, x_stages, weight_stages)


def choose_parts(num_rows: int, num_inputs: int, num_outputs: int) -> int:
    """Parts of the inputs for two programs a multiprocessor, of four chunks each at least; of more
    than 64 rows, whose parts take time to write and to add, two.

    Whole decode layers, us, with parts for two programs and for one, and with parts of two and of
    eight chunks at least (H200):

                               two      one    two chunks    eight
        Qwen3-0.6B, 16 rows   28.4     28.3          30.3     30.8
        64                    50.9     50.8          54.2     50.9
        Llama-3.1-8B, 2      124.2    124.9         123.9    124.9
        16                   131.2    135.1         130.7    130.9

    Qwen3-0.6B at 128 and 256 rows: 81.9 and 138.3 for two programs, 79.5 and 134.3 for one; in
    another run 78.8 and 133.2 for one, 78.1 and 130.5 in two parts.
    """
    tile = choose_rows_tile(num_rows, num_inputs, num_outputs, False, 1)
    chunks = triton.cdiv(num_inputs, tile.block_e)
    if num_rows > 64:
        parts = 2
    else:
        blocks = triton.cdiv(num_rows, tile.block_t) * triton.cdiv(num_outputs, tile.block_f)
        parts = max(min(2 * MULTIPROCESSORS // blocks, chunks // 4), 1)
    # The least number of parts that have as many chunks each: none is empty.
    return triton.cdiv(chunks, triton.cdiv(chunks, parts))


def sizes_of(
    tile: GluonLinearTile,
    num_inputs: int,
    num_outputs: int,
    parts: int,
    has_bias: bool,
    is_split: bool,
    activation: str,
) -> LinearSizes:
    chunks = triton.cdiv(triton.cdiv(num_inputs, tile.block_e), parts)
    if min(tile.x_stages, tile.weight_stages) < 2:
        # The chunk after next is asked for while the next is multiplied: the kernel would wait for
        # one that nobody asks for.
        raise ValueError(f"a tile must hold two chunks of rows and of weights, got {tile}")
    return LinearSizes(
        tile.block_t,
        tile.block_f,
        tile.block_e,
        min(tile.x_stages, chunks),
        min(tile.weight_stages, chunks),
        chunks,
        num_outputs,
        has_bias,
        is_split,
        activation,
    )


def launch_tile_linear(
    x_TE: Tensor,
    weight_GE: Tensor,
    bias_G: Tensor | None,
    out: Tensor,
    activation: str,
    pdl: bool,
    tile: GluonLinearTile,
) -> None:
    """Fills `out`: [T, F] in the dtype of x, or float32 parts [P, T, F], of which one has the bias.

    Wants `fits_tiles`.
    """
    num_rows, num_inputs = x_TE.shape
    is_split = out.dim() == 3
    parts = out.shape[0] if is_split else 1
    num_outputs = out.shape[-1]
    sizes = sizes_of(tile, num_inputs, num_outputs, parts, bias_G is not None, is_split, activation)
    layout = gl.NVMMASharedLayout(128, 16, 2)
    x_desc = TensorDescriptor(
        x_TE, list(x_TE.shape), list(x_TE.stride()), [tile.block_t, tile.block_e], layout
    )

    # Of gates and what they are multiplied by, boxes of 64 columns make up a tile.
    box = [tile.block_f, 64 if activation else tile.block_e]

    def rows_of(weight_FE: Tensor) -> Any:
        return TensorDescriptor(
            weight_FE, [num_outputs, num_inputs], list(weight_FE.stride()), box, layout
        )

    gate_desc = rows_of(weight_GE)
    up_desc = rows_of(weight_GE[num_outputs:]) if activation else gate_desc
    blocks = triton.cdiv(num_rows, tile.block_t) * triton.cdiv(num_outputs, tile.block_f)
    with on_device_of(x_TE):
        tile_linear_kernel[(blocks * parts,)](
            x_desc,
            gate_desc,
            up_desc,
            bias_G,
            out,
            num_rows,
            parts,
            SIZES=sizes,
            num_warps=sizes.num_warps,
            **launch_options(pdl),
        )


@gluon.jit
def ask_for_weights(place, chunk, first, descs, tiles, full, sizes: constexpr):
    gate_desc, up_desc = descs
    bar = full.index(place)
    tile = tiles.index(place)
    at = chunk * sizes.block_e
    hopper.mbarrier.expect(bar, sizes.weight_bytes)
    if sizes.activation != "":
        # Gates and ups of 64 columns, one below the other, are the layout of a whole tile.
        PANELS: constexpr = sizes.block_e // 64
        boxes = tile._reinterpret(
            gate_desc.dtype, [2 * PANELS, sizes.block_f, 64], gate_desc.layout
        )
        for panel in gl.static_range(PANELS):
            start = [first, at + panel * 64]
            hopper.tma.async_copy_global_to_shared(gate_desc, start, bar, boxes.index(2 * panel))
            hopper.tma.async_copy_global_to_shared(up_desc, start, bar, boxes.index(2 * panel + 1))
    else:
        hopper.tma.async_copy_global_to_shared(gate_desc, [first, at], bar, tile)


@gluon.jit
def ask_for_rows(place, chunk, first, x_desc, x_tiles, full, sizes: constexpr):
    bar = full.index(place)
    hopper.mbarrier.expect(bar, sizes.x_bytes)
    hopper.tma.async_copy_global_to_shared(
        x_desc, [first, chunk * sizes.block_e], bar, x_tiles.index(place)
    )


@gluon.jit
def arrivals(length: constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [length, 1], hopper.mbarrier.MBarrierLayout())
    for i in gl.static_range(length):
        hopper.mbarrier.init(barriers.index(i), count=1)
    return barriers


@gluon.jit(do_not_specialize=["num_rows", "parts"])
def tile_linear_kernel(
    x_desc,
    gate_desc,
    up_desc,
    bias_ptr,
    out_ptr,
    num_rows,
    parts,
    SIZES: constexpr,
    PDL: constexpr,
):
    """One program: a tile of outputs over its part of the inputs."""
    DTYPE: constexpr = x_desc.dtype
    shared: constexpr = gl.NVMMASharedLayout(128, 16, 2)
    ACTIVATION: constexpr = SIZES.activation
    GATED: constexpr = ACTIVATION != ""
    X_STAGES: constexpr = SIZES.x_stages
    WEIGHT_STAGES: constexpr = SIZES.weight_stages
    BLOCK_T: constexpr = SIZES.block_t
    BLOCK_F: constexpr = SIZES.block_f
    WARPS: constexpr = SIZES.num_warps
    x_tiles = gl.allocate_shared_memory(DTYPE, [X_STAGES, BLOCK_T, SIZES.block_e], shared)
    weight_tiles = gl.allocate_shared_memory(
        DTYPE, [WEIGHT_STAGES, SIZES.block_g, SIZES.block_e], shared
    )
    x_full = arrivals(X_STAGES)
    weight_full = arrivals(WEIGHT_STAGES)
    hopper.fence_async_shared()
    program_barrier()

    # Programs of the same outputs follow each other, so that the second reads the L2.
    NUM_BLOCKS: constexpr = (SIZES.num_outputs + BLOCK_F - 1) // BLOCK_F
    block_t = gl.program_id(0) // (NUM_BLOCKS * parts)
    rest = gl.program_id(0) % (NUM_BLOCKS * parts)
    first_f = rest % NUM_BLOCKS * BLOCK_F
    part = rest // NUM_BLOCKS
    first_t = block_t * BLOCK_T
    begin = part * SIZES.chunks
    descs = (gate_desc, up_desc)
    for i in gl.static_range(WEIGHT_STAGES):
        ask_for_weights(i, begin + i, first_f, descs, weight_tiles, weight_full, SIZES)
    if PDL:
        wait_for_predecessor()
    for i in gl.static_range(X_STAGES):
        ask_for_rows(i, begin + i, first_t, x_desc, x_tiles, x_full, SIZES)

    # Weights are the first factor: of rows a tensor core takes any multiple of 8.
    layout: constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_T, 16])
    acc_GT = gl.full([SIZES.block_g, BLOCK_T], 0.0, gl.float32, layout)
    for i in range(SIZES.chunks):
        x_place = i % SIZES.x_stages
        place = i % SIZES.weight_stages
        hopper.mbarrier.wait(weight_full.index(place), (i // SIZES.weight_stages) & 1)
        hopper.mbarrier.wait(x_full.index(x_place), (i // SIZES.x_stages) & 1)
        x_ET = x_tiles.index(x_place).permute((1, 0))
        acc = hopper.warpgroup_mma(weight_tiles.index(place), x_ET, acc_GT, is_async=True)
        acc_GT = hopper.warpgroup_mma_wait(1, deps=[acc])
        if not SIZES.resident:
            # The products of the chunk before are done, and its places free once all warps say so.
            before = i - 1
            x_next = before + SIZES.x_stages
            next = before + SIZES.weight_stages
            if (before >= 0) & ((x_next < SIZES.chunks) | (next < SIZES.chunks)):
                program_barrier()
                if x_next < SIZES.chunks:
                    ask_for_rows(
                        before % SIZES.x_stages, begin + x_next, first_t, x_desc, x_tiles, x_full,
                        SIZES,
                    )  # fmt: skip
                if next < SIZES.chunks:
                    ask_for_weights(
                        before % SIZES.weight_stages, begin + next, first_f, descs, weight_tiles,
                        weight_full, SIZES,
                    )  # fmt: skip
    acc_GT = hopper.warpgroup_mma_wait(0, deps=[acc_GT])

    # 16 bytes a thread, whole rows of the output by neighbours.
    PACK: constexpr = 4 if SIZES.is_split else 8
    LANES: constexpr = min(BLOCK_F // PACK, 32)
    store_layout: constexpr = gl.BlockedLayout([PACK, 1], [LANES, 32 // LANES], [1, WARPS], [0, 1])
    out_F = first_f + gl.arange(0, BLOCK_F, gl.SliceLayout(1, store_layout))
    row_T = first_t + gl.arange(0, BLOCK_T, gl.SliceLayout(0, store_layout))
    # A bias counts once, in the first part.
    inside_F = (out_F < SIZES.num_outputs) & (part == 0)
    if GATED:
        pair_layout: constexpr = gl.BlockedLayout([1, 1, 2], [32, 1, 1], [1, WARPS, 1], [2, 0, 1])
        pair_FT2 = acc_GT.reshape([2, BLOCK_F, BLOCK_T]).permute((1, 2, 0))
        gate_FT, up_FT = gl.convert_layout(pair_FT2, pair_layout).split()
        out_FT = gl.convert_layout(gate_FT, store_layout)
        up_FT = gl.convert_layout(up_FT, store_layout)
        if SIZES.has_bias:
            up_F = gl.load(bias_ptr + SIZES.num_outputs + out_F, mask=inside_F, other=0.0)
            up_FT += up_F.to(gl.float32)[:, None]
    else:
        out_FT = gl.convert_layout(acc_GT, store_layout)
    if SIZES.has_bias:
        out_FT += gl.load(bias_ptr + out_F, mask=inside_F, other=0.0).to(gl.float32)[:, None]
    if GATED:
        out_FT = gated(out_FT, up_FT, ACTIVATION)
    offset_T = (part * num_rows + row_T).to(gl.int64) * SIZES.num_outputs
    gl.store(
        out_ptr + offset_T[None, :] + out_F[:, None],
        out_FT.to(out_ptr.dtype.element_ty),
        mask=(row_T < num_rows)[None, :] & (out_F < SIZES.num_outputs)[:, None],
    )
