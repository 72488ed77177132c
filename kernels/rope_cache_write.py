"""minigen::rope_cache_write: from the packed projection to rotated queries and a written cache.

What lies between the projection and attention of a layer, in one launch: norm of queries and keys,
rotary embedding with the rows of its tables looked up here, and keys and values into the paged
cache. As separate operations it takes six kernels of Inductor's and `kv_cache_write`, 238 us of the
1,393 us of a captured decode step of one sequence (Qwen3-0.6B, 28 layers, H200).

Shapes: T packed tokens, H query heads, K key/value heads, X = H + 2K heads of the projection, D
head dim, R rotated part of D, P rows of the rope tables, N cache blocks, B tokens a block, S parts
that a linear layer was divided in.
"""

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from minigen.kernels import native
from minigen.kernels.checks import check_rope_cache_write, read_positions, read_slots
from minigen.kernels.cpu import rms_norm
from minigen.kernels.dependent_launch import (
    has_dependent_launch,
    launch_options,
    wait_for_predecessor,
)
from minigen.kernels.tiles import on_device_of, power_of_two
from minigen.kernels.triton_import import tl, triton

# Elements a program takes: two warps then load 16 bytes a thread and half, and one token of 32
# heads of 128 is four programs, 2,048 tokens are two waves of a Hopper GPU.
PROGRAM_ELEMENTS = 1024


def fuses_rope(qkv_TXD: Tensor, has_norm: bool) -> bool:
    """Whether one kernel is quicker than the separate operations: on a GPU, or the native one.

    `has_norm`: queries and keys are normed, which the native kernel does not do.
    """
    return qkv_TXD.is_cuda or (not has_norm and native.serves(qkv_TXD))


def rope_cache_write(
    qkv_TXD: Tensor,
    q_weight_D: Tensor | None,
    k_weight_D: Tensor | None,
    eps: float,
    cos_PR: Tensor,
    sin_PR: Tensor,
    positions_T: Tensor | None,
    k_cache_NBKD: Tensor,
    v_cache_NBKD: Tensor,
    slots_T: Tensor,
    rotates: bool = True,
    pdl: bool = False,
) -> Tensor:
    """Norms and rotates queries and keys, writes keys and values into the cache.

    Computed in float32 and rounded as the separate operations are: to the dtype after the norm and
    again after the rotation. Another order of a float32 sum, or a multiply-add where the others
    round twice, may move an entry to the neighbouring number of the dtype.

    Args:
        qkv_TXD: queries, keys and values of each token, heads in this order; float16, bfloat16 or
            float32 (on the CPU also float64). A view into wider rows will do. Or contiguous
            float32 parts [S, T, X, D] that add up to it, as `tile_linear` leaves them: their sum is
            not rounded before the norm or, without one, before the rotation.
        q_weight_D, k_weight_D: weights of the RMS norms over a head (arXiv 1910.07467), both or
            neither; `eps` is theirs.
        cos_PR, sin_PR: contiguous float32 tables [P, R / 2] (RoPE, arXiv 2104.09864; entry i of a
            head is paired with i + R / 2). R < D leaves the rest of a head as it is.
        positions_T: int64 rows of the tables; None: token t's is row t.
        k_cache_NBKD, v_cache_NBKD: contiguous caches of the dtype of qkv (beside parts, of any of
            these dtypes), changed in place; they say how many heads are keys.
        slots_T: int64, block * B + row; -1 skips the token, no other value may occur twice.
        rotates: False leaves out the rotation (layers without rope).
        pdl: start while the kernel before still runs, where the GPU can (sm_90
            and later). It may write qkv, but not positions, slots, weights or tables: see
            `dependent_launch`.

    Returns:
        q_THD, contiguous, dtype of the caches.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; on the CPU also a slot outside the
            cache or a position outside the tables. A GPU leaves such a slot out, and gives NaN for
            such a position, for reading them would wait for it.
    """
    is_plain = q_weight_D is None and k_weight_D is None and positions_T is None
    if is_plain and qkv_TXD.dim() == 3 and native.serves(qkv_TXD):
        caches = k_cache_NBKD, v_cache_NBKD, slots_T
        if not torch.compiler.is_dynamo_compiling():  # traced, the operator's fake checks
            check_rope_cache_write(qkv_TXD, None, None, cos_PR, sin_PR, None, *caches)
        return torch.ops.minigen.native_rope_cache_write(qkv_TXD, cos_PR, sin_PR, *caches, rotates)
    return torch.ops.minigen.rope_cache_write(
        qkv_TXD,
        q_weight_D,
        k_weight_D,
        eps,
        cos_PR,
        sin_PR,
        positions_T,
        k_cache_NBKD,
        v_cache_NBKD,
        slots_T,
        rotates,
        pdl,
    )


@torch.library.custom_op(
    "minigen::rope_cache_write", mutates_args=("k_cache_NBKD", "v_cache_NBKD"), device_types="cpu"
)
def _cpu(
    qkv_TXD: Tensor,
    q_weight_D: Tensor | None,
    k_weight_D: Tensor | None,
    eps: float,
    cos_PR: Tensor,
    sin_PR: Tensor,
    positions_T: Tensor | None,
    k_cache_NBKD: Tensor,
    v_cache_NBKD: Tensor,
    slots_T: Tensor,
    rotates: bool,
    pdl: bool,
) -> Tensor:
    tables = cos_PR, sin_PR, positions_T
    caches = k_cache_NBKD, v_cache_NBKD, slots_T
    check_rope_cache_write(qkv_TXD, q_weight_D, k_weight_D, *tables, *caches)
    if qkv_TXD.dim() == 4:
        qkv_TXD = qkv_TXD.sum(0)
    num_kv_heads = k_cache_NBKD.shape[2]
    slots = read_slots(slots_T, k_cache_NBKD.shape[0] * k_cache_NBKD.shape[1])
    heads = qkv_TXD.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads
    q_THD, k_TKD, v_TKD = qkv_TXD.split(heads, 1)
    if q_weight_D is not None and k_weight_D is not None:
        # To the dtype, as the GPU's kernel rounds a sum of parts after its norm.
        q_THD = rms_norm(q_THD, q_weight_D, eps).to(k_cache_NBKD.dtype)
        k_TKD = rms_norm(k_TKD, k_weight_D, eps).to(k_cache_NBKD.dtype)
    if rotates:
        if positions_T is not None:
            read_positions(positions_T, cos_PR.shape[0])
            cos_PR, sin_PR = cos_PR[positions_T], sin_PR[positions_T]
        q_THD, k_TKD = _rotated(q_THD, cos_PR, sin_PR), _rotated(k_TKD, cos_PR, sin_PR)
    q_THD, k_TKD, v_TKD = (x.to(k_cache_NBKD.dtype) for x in (q_THD, k_TKD, v_TKD))
    if -1 in slots:
        kept_T = slots_T >= 0
        k_TKD, v_TKD, slots_T = k_TKD[kept_T], v_TKD[kept_T], slots_T[kept_T]
    k_cache_NBKD.flatten(0, 1).index_copy_(0, slots_T, k_TKD)
    v_cache_NBKD.flatten(0, 1).index_copy_(0, slots_T, v_TKD)
    return q_THD.clone(memory_format=torch.contiguous_format)


def _rotated(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    half = cos_TR.shape[-1]
    cos, sin = cos_TR[:, None], sin_TR[:, None]
    a, b = x_THD[..., :half].float(), x_THD[..., half : 2 * half].float()
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x_THD.dtype)
    return torch.cat([turned, x_THD[..., 2 * half :]], -1)


@_cpu.register_fake
def _fake(
    qkv_TXD: Tensor,
    q_weight_D: Tensor | None,
    k_weight_D: Tensor | None,
    eps: float,
    cos_PR: Tensor,
    sin_PR: Tensor,
    positions_T: Tensor | None,
    k_cache_NBKD: Tensor,
    v_cache_NBKD: Tensor,
    slots_T: Tensor,
    rotates: bool,
    pdl: bool,
) -> Tensor:
    tables = cos_PR, sin_PR, positions_T
    caches = k_cache_NBKD, v_cache_NBKD, slots_T
    check_rope_cache_write(qkv_TXD, q_weight_D, k_weight_D, *tables, *caches)
    return _empty_queries(qkv_TXD, k_cache_NBKD)


def _empty_queries(qkv_TXD: Tensor, k_cache_NBKD: Tensor) -> Tensor:
    num_tokens, num_heads, head_dim = qkv_TXD.shape[-3:]
    return k_cache_NBKD.new_empty(num_tokens, num_heads - 2 * k_cache_NBKD.shape[2], head_dim)


@_cpu.register_kernel("cuda")
def _cuda(
    qkv_TXD: Tensor,
    q_weight_D: Tensor | None,
    k_weight_D: Tensor | None,
    eps: float,
    cos_PR: Tensor,
    sin_PR: Tensor,
    positions_T: Tensor | None,
    k_cache_NBKD: Tensor,
    v_cache_NBKD: Tensor,
    slots_T: Tensor,
    rotates: bool,
    pdl: bool,
) -> Tensor:
    tables = cos_PR, sin_PR, positions_T
    caches = k_cache_NBKD, v_cache_NBKD, slots_T
    check_rope_cache_write(qkv_TXD, q_weight_D, k_weight_D, *tables, *caches)
    pdl = pdl and has_dependent_launch(qkv_TXD.device)
    return rope_cache_write_triton(
        qkv_TXD, q_weight_D, k_weight_D, eps, *tables, *caches, rotates, pdl
    )


def rope_cache_write_triton(
    qkv_TXD: Tensor,
    q_weight_D: Tensor | None,
    k_weight_D: Tensor | None,
    eps: float,
    cos_PR: Tensor,
    sin_PR: Tensor,
    positions_T: Tensor | None,
    k_cache_NBKD: Tensor,
    v_cache_NBKD: Tensor,
    slots_T: Tensor,
    rotates: bool = True,
    pdl: bool = False,
) -> Tensor:
    """Launches the kernel on checked arguments: on a GPU, or on the CPU in Triton's interpreter.

    `pdl` needs a GPU of sm_90 or later.
    """
    num_blocks, block_size, num_kv_heads, head_dim = k_cache_NBKD.shape
    if qkv_TXD.stride(-1) != 1 or qkv_TXD.stride(-2) != head_dim:
        qkv_TXD = qkv_TXD.contiguous()
    q_THD = _empty_queries(qkv_TXD, k_cache_NBKD)
    num_tokens, num_q_heads, _ = q_THD.shape
    if num_tokens == 0:
        return q_THD
    constants = rope_constants(num_q_heads, num_kv_heads, head_dim, cos_PR.shape[1], rotates)
    groups = constants["NUM_Q_GROUPS"] + 2 * constants["NUM_KV_GROUPS"]
    with on_device_of(qkv_TXD):
        rope_cache_write_kernel[(num_tokens * groups,)](
            qkv_TXD,
            q_weight_D,
            k_weight_D,
            cos_PR,
            sin_PR,
            positions_T,
            slots_T,
            q_THD,
            k_cache_NBKD,
            v_cache_NBKD,
            cos_PR.shape[0],
            num_tokens,
            num_blocks * block_size,
            qkv_TXD.stride(-3),
            0 if positions_T is None else positions_T.stride(0),
            slots_T.stride(0),
            eps,
            **constants,
            PARTS=qkv_TXD.shape[0] if qkv_TXD.dim() == 4 else 0,
            HAS_NORM=q_weight_D is not None,
            HAS_POSITIONS=positions_T is not None,
            **launch_options(pdl),
        )
    return q_THD


@functools.cache  # every layer of every step asks for the same
def rope_constants(
    num_q_heads: int, num_kv_heads: int, head_dim: int, half: int, rotates: bool
) -> Mapping[str, int]:
    """What the kernel is compiled with: a head in parts a, b (the pairs) and the rest behind them.

    Without a rotation the whole head is "the rest".
    """
    half = half if rotates else 0
    rest = head_dim - 2 * half
    block_half, block_rest = (power_of_two(part) if part else 0 for part in (half, rest))
    heads = max(PROGRAM_ELEMENTS // (2 * block_half + block_rest), 1)
    block_heads = min(1 << (heads.bit_length() - 1), power_of_two(num_kv_heads))
    return {
        "NUM_Q_HEADS": num_q_heads,
        "NUM_KV_HEADS": num_kv_heads,
        "HEAD_DIM": head_dim,
        "HALF": half,
        "BLOCK_HALF": block_half,
        "BLOCK_REST": block_rest,
        "BLOCK_HEADS": block_heads,
        "BLOCK_DIM": power_of_two(head_dim),
        "NUM_Q_GROUPS": -(-num_q_heads // block_heads),
        "NUM_KV_GROUPS": -(-num_kv_heads // block_heads),
        "num_warps": 2,
    }


@triton.jit
def load_entries(row_ptr, part_stride, head_H, NUM_HEADS, HEAD_DIM: tl.constexpr,
                 START: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
                 PARTS: tl.constexpr):  # fmt: skip
    """Entries START to START + SIZE of some heads, and which of the tile these are."""
    dim_D = tl.arange(0, BLOCK)
    inside_HD = (head_H < NUM_HEADS)[:, None] & (dim_D < SIZE)[None, :]
    offset_HD = head_H[:, None] * HEAD_DIM + (START + dim_D)[None, :]
    x_HD = tl.load(row_ptr + offset_HD, mask=inside_HD, other=0.0)
    for part in tl.static_range(1, PARTS):  # pyright: ignore[reportGeneralTypeIssues]
        x_HD += tl.load(row_ptr + part * part_stride + offset_HD, mask=inside_HD, other=0.0)
    return x_HD, offset_HD, inside_HD


@triton.jit
def norm_and_rotate(
    in_ptr,
    part_stride,
    out_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    position,
    num_positions,
    head_H,
    NUM_HEADS: tl.constexpr,
    eps,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    HAS_NORM: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Some heads of one token, from their row of the projection to their row of the output."""
    dtype = out_ptr.dtype.element_ty
    REST: tl.constexpr = HEAD_DIM - 2 * HALF
    if HALF > 0:
        dim_R = tl.arange(0, BLOCK_HALF)
        in_half_R = dim_R < HALF
        a_HR, offset_a_HR, inside_HR = load_entries(
            in_ptr, part_stride, head_H, NUM_HEADS, HEAD_DIM, 0, HALF, BLOCK_HALF, PARTS
        )
        b_HR, offset_b_HR, _ = load_entries(
            in_ptr, part_stride, head_H, NUM_HEADS, HEAD_DIM, HALF, HALF, BLOCK_HALF, PARTS
        )
        a_HR, b_HR = a_HR.to(tl.float32), b_HR.to(tl.float32)
        in_table_R = in_half_R & (position >= 0) & (position < num_positions)
        cos_R = tl.load(cos_ptr + position * HALF + dim_R, mask=in_table_R, other=float("nan"))
        sin_R = tl.load(sin_ptr + position * HALF + dim_R, mask=in_table_R, other=float("nan"))
    if REST > 0:
        dim_Z = tl.arange(0, BLOCK_REST)
        rest_HZ, offset_rest_HZ, inside_HZ = load_entries(
            in_ptr, part_stride, head_H, NUM_HEADS, HEAD_DIM, 2 * HALF, REST, BLOCK_REST, PARTS
        )
    if HAS_NORM:
        square_H = tl.zeros_like(head_H).to(tl.float32)
        if HALF > 0:
            square_H += tl.sum(a_HR * a_HR + b_HR * b_HR, 1)
        if REST > 0:
            wide_HZ = rest_HZ.to(tl.float32)
            square_H += tl.sum(wide_HZ * wide_HZ, 1)
        scale_H1 = tl.rsqrt(square_H * (1.0 / HEAD_DIM) + eps)[:, None]
        if HALF > 0:
            weight_a_R = tl.load(weight_ptr + dim_R, mask=in_half_R, other=0.0).to(tl.float32)
            weight_b_R = tl.load(weight_ptr + HALF + dim_R, mask=in_half_R, other=0.0)
            # Rounded as the norm's output is where it is an operation of its own.
            a_HR = (a_HR * scale_H1 * weight_a_R[None, :]).to(dtype).to(tl.float32)
            b_HR = (b_HR * scale_H1 * weight_b_R.to(tl.float32)[None, :]).to(dtype).to(tl.float32)
        if REST > 0:
            weight_Z = tl.load(weight_ptr + 2 * HALF + dim_Z, mask=dim_Z < REST, other=0.0)
            rest_HZ = (wide_HZ * scale_H1 * weight_Z.to(tl.float32)[None, :]).to(dtype)
    if HALF > 0:
        turned_a_HR = a_HR * cos_R[None, :] - b_HR * sin_R[None, :]
        turned_b_HR = b_HR * cos_R[None, :] + a_HR * sin_R[None, :]
        tl.store(out_ptr + offset_a_HR, turned_a_HR.to(dtype), mask=inside_HR)
        tl.store(out_ptr + offset_b_HR, turned_b_HR.to(dtype), mask=inside_HR)
    if REST > 0:
        tl.store(out_ptr + offset_rest_HZ, rest_HZ.to(dtype), mask=inside_HZ)


@triton.jit(do_not_specialize=["num_positions", "num_tokens", "num_slots"])
def rope_cache_write_kernel(
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    slots_ptr,
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    num_positions,
    num_tokens,
    num_slots,
    qkv_stride_t,
    positions_stride,
    slots_stride,
    eps,
    NUM_Q_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    NUM_Q_GROUPS: tl.constexpr,
    NUM_KV_GROUPS: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: up to BLOCK_HEADS heads of one token, all of them queries, keys or values."""
    NUM_GROUPS: tl.constexpr = NUM_Q_GROUPS + 2 * NUM_KV_GROUPS
    token = (tl.program_id(0) // NUM_GROUPS).to(tl.int64)
    group = tl.program_id(0) % NUM_GROUPS
    position = token
    if HAS_POSITIONS:
        position = tl.load(positions_ptr + token * positions_stride)
    slot = tl.load(slots_ptr + token * slots_stride)
    if PDL:
        wait_for_predecessor()
    row_ptr = qkv_ptr + token * qkv_stride_t
    # In 64 bits, too, and of the shape: of one row the stride may be anything.
    NUM_HEADS: tl.constexpr = NUM_Q_HEADS + 2 * NUM_KV_HEADS
    part_stride = num_tokens.to(tl.int64) * (NUM_HEADS * HEAD_DIM)
    head_H = tl.arange(0, BLOCK_HEADS)
    if group < NUM_Q_GROUPS:
        norm_and_rotate(
            row_ptr,
            part_stride,
            q_ptr + token * (NUM_Q_HEADS * HEAD_DIM),
            q_weight_ptr,
            cos_ptr,
            sin_ptr,
            position,
            num_positions,
            group * BLOCK_HEADS + head_H,
            NUM_Q_HEADS,
            eps,
            HEAD_DIM,
            HALF,
            BLOCK_HALF,
            BLOCK_REST,
            HAS_NORM,
            PARTS,
        )
    elif (slot >= 0) & (slot < num_slots):
        # In 64 bits: a cache may hold more than 2**31 elements.
        cache_row = slot.to(tl.int64) * (NUM_KV_HEADS * HEAD_DIM)
        if group < NUM_Q_GROUPS + NUM_KV_GROUPS:
            norm_and_rotate(
                row_ptr + NUM_Q_HEADS * HEAD_DIM,
                part_stride,
                k_cache_ptr + cache_row,
                k_weight_ptr,
                cos_ptr,
                sin_ptr,
                position,
                num_positions,
                (group - NUM_Q_GROUPS) * BLOCK_HEADS + head_H,
                NUM_KV_HEADS,
                eps,
                HEAD_DIM,
                HALF,
                BLOCK_HALF,
                BLOCK_REST,
                HAS_NORM,
                PARTS,
            )
        else:
            v_HD, offset_HD, inside_HD = load_entries(
                row_ptr + (NUM_Q_HEADS + NUM_KV_HEADS) * HEAD_DIM,
                part_stride,
                (group - NUM_Q_GROUPS - NUM_KV_GROUPS) * BLOCK_HEADS + head_H,
                NUM_KV_HEADS,
                HEAD_DIM,
                0,
                HEAD_DIM,
                BLOCK_DIM,
                PARTS,
            )
            v_HD = v_HD.to(v_cache_ptr.dtype.element_ty)
            tl.store(v_cache_ptr + cache_row + offset_HD, v_HD, mask=inside_HD)
