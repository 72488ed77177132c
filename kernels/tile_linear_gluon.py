"""The kernel of `tile_linear` for Hopper, in Gluon: weights are on their way before the rows are
ready.

A decode step of some rows is a chain of short kernels. One of these, launched early
(`dependent_launch`), asks the copy engine for its weights at once, for as much as its shared memory
holds; when the kernel before has ended, only the rows are left to come. cuBLAS's kernels begin when
the one before has ended, and end 3 to 5 us after the memory could have brought all they read.

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
from minigen.kernels.tiles import fits_descriptor, on_device_of
from minigen.kernels.triton_import import triton
from minigen.kernels.varlen_attention_gluon import runs_gluon


class GluonLinearTile(NamedTuple):
    """Rows and outputs of a program, inputs of a chunk, the most chunks of rows and of weights that
    it holds at once: two of each at least."""

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
    def num_warps(self) -> int:
        return self.block_t // 16

    @property
    def x_bytes(self) -> int:
        return self.block_t * self.block_e * 2

    @property
    def weight_bytes(self) -> int:
        return self.block_f * self.block_e * 2

    @property
    def shared_bytes(self) -> int:
        weights = self.weight_stages * self.weight_bytes * (2 if self.activation else 1)
        return weights + self.x_stages * self.x_bytes

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


def choose_rows_tile(num_rows: int, is_gated: bool, parts: int) -> GluonLinearTile:
    """The best, or within 5 % of it, of the 13 to 18 tiles that were timed for each of Qwen3-0.6B's
    four layers at 16, 32, 64, 96, 128, 192 and 256 rows (H200).

    A tile of 128 rows reads the weights half as often as two of 64, but has half of the programs,
    and more than what one multiprocessor can read of the L2 is what holds most tiles back.
    """
    if is_gated:
        if num_rows <= 64:
            return GluonLinearTile(64, 32, 128, 6, 8)
        if num_rows <= 128:
            return GluonLinearTile(64, 64, 128, 4, 4)
        return GluonLinearTile(64, 128, 64, 6, 5)
    if parts > 0:
        return GluonLinearTile(64, 64, 128, 6, 6)
    if num_rows <= 64:
        return GluonLinearTile(64, 64, 128, 6, 8)
    if num_rows <= 192:
        return GluonLinearTile(64, 128, 64, 6, 8)
    return GluonLinearTile(128, 64, 128, 3, 4)


def choose_parts(num_rows: int, num_inputs: int, num_outputs: int) -> int:
    """Parts of the inputs for about 64 programs, and two at least.

    Of 2, 4 and 8 parts those that give 64 programs, or 128 at 256 rows, were the quickest (H200);
    what adds them up takes 1.1 us for two and 1.4 for eight.
    """
    tile = choose_rows_tile(num_rows, False, 1)
    blocks = triton.cdiv(num_rows, tile.block_t) * triton.cdiv(num_outputs, tile.block_f)
    chunks = triton.cdiv(num_inputs, tile.block_e)
    # The least number of parts that have as many chunks each: none is empty.
    return triton.cdiv(chunks, triton.cdiv(chunks, min(max(64 // blocks, 2), chunks)))


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

    def rows_of(weight_FE: Tensor) -> Any:
        box = [tile.block_f, tile.block_e]
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
    gate_tiles, up_tiles = tiles
    bar = full.index(place)
    at = chunk * sizes.block_e
    if sizes.activation != "":
        hopper.mbarrier.expect(bar, 2 * sizes.weight_bytes)
        hopper.tma.async_copy_global_to_shared(up_desc, [first, at], bar, up_tiles.index(place))
    else:
        hopper.mbarrier.expect(bar, sizes.weight_bytes)
    hopper.tma.async_copy_global_to_shared(gate_desc, [first, at], bar, gate_tiles.index(place))


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
    x_tiles = gl.allocate_shared_memory(
        DTYPE, [SIZES.x_stages, SIZES.block_t, SIZES.block_e], shared
    )
    weight_shape: constexpr = [SIZES.weight_stages, SIZES.block_f, SIZES.block_e]
    gate_tiles = gl.allocate_shared_memory(DTYPE, weight_shape, shared)
    up_tiles = gate_tiles
    if GATED:
        up_tiles = gl.allocate_shared_memory(DTYPE, weight_shape, shared)
    x_full = arrivals(X_STAGES)
    weight_full = arrivals(WEIGHT_STAGES)
    hopper.fence_async_shared()
    program_barrier()

    # Programs of the same outputs follow each other, so that the second reads the L2.
    NUM_BLOCKS: constexpr = (SIZES.num_outputs + SIZES.block_f - 1) // SIZES.block_f
    block_t = gl.program_id(0) // (NUM_BLOCKS * parts)
    rest = gl.program_id(0) % (NUM_BLOCKS * parts)
    first_f = rest % NUM_BLOCKS * SIZES.block_f
    part = rest // NUM_BLOCKS
    first_t = block_t * SIZES.block_t
    begin = part * SIZES.chunks
    descs = (gate_desc, up_desc)
    tiles = (gate_tiles, up_tiles)
    for i in gl.static_range(WEIGHT_STAGES):
        ask_for_weights(i, begin + i, first_f, descs, tiles, weight_full, SIZES)
    if PDL:
        wait_for_predecessor()
    for i in gl.static_range(X_STAGES):
        ask_for_rows(i, begin + i, first_t, x_desc, x_tiles, x_full, SIZES)

    layout: constexpr = gl.NVMMADistributedLayout(
        [3, 0], [SIZES.num_warps, 1], [16, SIZES.block_f, 16]
    )
    acc_TF = gl.full([SIZES.block_t, SIZES.block_f], 0.0, gl.float32, layout)
    up_TF = acc_TF
    if GATED:
        up_TF = gl.full([SIZES.block_t, SIZES.block_f], 0.0, gl.float32, layout)
    for i in range(SIZES.chunks):
        x_place = i % SIZES.x_stages
        place = i % SIZES.weight_stages
        hopper.mbarrier.wait(weight_full.index(place), (i // SIZES.weight_stages) & 1)
        hopper.mbarrier.wait(x_full.index(x_place), (i // SIZES.x_stages) & 1)
        x_TE = x_tiles.index(x_place)
        acc = hopper.warpgroup_mma(
            x_TE, gate_tiles.index(place).permute((1, 0)), acc_TF, is_async=True
        )
        if GATED:
            up = hopper.warpgroup_mma(
                x_TE, up_tiles.index(place).permute((1, 0)), up_TF, is_async=True
            )
            acc_TF, up_TF = hopper.warpgroup_mma_wait(2, deps=[acc, up])
        else:
            acc_TF = hopper.warpgroup_mma_wait(1, deps=[acc])
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
                        before % SIZES.weight_stages, begin + next, first_f, descs, tiles,
                        weight_full, SIZES,
                    )  # fmt: skip
    if GATED:
        acc_TF, up_TF = hopper.warpgroup_mma_wait(0, deps=[acc_TF, up_TF])
    else:
        acc_TF = hopper.warpgroup_mma_wait(0, deps=[acc_TF])

    column_F = first_f + gl.arange(0, SIZES.block_f, gl.SliceLayout(0, layout))
    if SIZES.has_bias:
        # Once, in the first part.
        inside_F = (column_F < SIZES.num_outputs) & (part == 0)
        acc_TF += gl.load(bias_ptr + column_F, mask=inside_F, other=0.0).to(gl.float32)[None, :]
        if GATED:
            up_bias_F = gl.load(bias_ptr + SIZES.num_outputs + column_F, mask=inside_F, other=0.0)
            up_TF += up_bias_F.to(gl.float32)[None, :]
    if GATED:
        acc_TF = gated(acc_TF, up_TF, ACTIVATION)
    # 16 bytes a thread, whole rows by neighbours.
    PACK: constexpr = 4 if SIZES.is_split else 8
    store_layout: constexpr = gl.BlockedLayout(
        [1, PACK], [32 * PACK // SIZES.block_f, SIZES.block_f // PACK], [SIZES.num_warps, 1], [1, 0]
    )
    out_TF = gl.convert_layout(acc_TF.to(out_ptr.dtype.element_ty), store_layout)
    row_T = first_t + gl.arange(0, SIZES.block_t, gl.SliceLayout(1, store_layout))
    out_F = first_f + gl.arange(0, SIZES.block_f, gl.SliceLayout(0, store_layout))
    offset_T = (part * num_rows + row_T).to(gl.int64) * SIZES.num_outputs
    gl.store(
        out_ptr + offset_T[:, None] + out_F[None, :],
        out_TF,
        mask=(row_T < num_rows)[:, None] & (out_F < SIZES.num_outputs)[None, :],
    )
