"""minigen::kv_cache_write: puts the step's keys and values into the paged cache, in place.

Shapes: T packed tokens, K key/value heads, D head dim, N cache blocks, B tokens a block.
"""

import torch
from torch import Tensor

from minigen.kernels import native
from minigen.kernels.checks import check_cache_write, read_slots
from minigen.kernels.tiles import on_device_of, power_of_two
from minigen.kernels.triton_import import tl, triton


def kv_cache_write(
    k_TKD: Tensor, v_TKD: Tensor, k_cache_NBKD: Tensor, v_cache_NBKD: Tensor, slots_T: Tensor
) -> None:
    """Writes row t of k and v into row `slots[t] % B` of cache block `slots[t] // B`.

    Args:
        k_TKD, v_TKD: float16, bfloat16 or float32 (on the CPU also float64).
        k_cache_NBKD, v_cache_NBKD: contiguous caches of the same dtype, changed in place. Give each
            its own allocation: views of one tensor are copied by torch.compile at every step.
        slots_T: int64; -1 skips the token, and no other value may occur twice.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; on the CPU also a slot outside the
            cache (a GPU leaves such a token out, for reading the slots would wait for it).
    """
    if native.serves(k_TKD, v_TKD):
        if not torch.compiler.is_dynamo_compiling():  # traced, the operator's fake checks
            check_cache_write(k_TKD, v_TKD, k_cache_NBKD, v_cache_NBKD, slots_T)
        operator = torch.ops.minigen.native_kv_cache_write
    else:
        operator = torch.ops.minigen.kv_cache_write
    operator(k_TKD, v_TKD, k_cache_NBKD, v_cache_NBKD, slots_T)


@torch.library.custom_op(
    "minigen::kv_cache_write", mutates_args=("k_cache_NBKD", "v_cache_NBKD"), device_types="cpu"
)
def _cpu(
    k_TKD: Tensor, v_TKD: Tensor, k_cache_NBKD: Tensor, v_cache_NBKD: Tensor, slots_T: Tensor
) -> None:
    check_cache_write(k_TKD, v_TKD, k_cache_NBKD, v_cache_NBKD, slots_T)
    slots = read_slots(slots_T, k_cache_NBKD.shape[0] * k_cache_NBKD.shape[1])
    if -1 in slots:
        kept_T = slots_T >= 0
        k_TKD, v_TKD, slots_T = k_TKD[kept_T], v_TKD[kept_T], slots_T[kept_T]
    k_cache_NBKD.flatten(0, 1).index_copy_(0, slots_T, k_TKD)
    v_cache_NBKD.flatten(0, 1).index_copy_(0, slots_T, v_TKD)


@_cpu.register_fake
def _fake(
    k_TKD: Tensor, v_TKD: Tensor, k_cache_NBKD: Tensor, v_cache_NBKD: Tensor, slots_T: Tensor
) -> None:
    check_cache_write(k_TKD, v_TKD, k_cache_NBKD, v_cache_NBKD, slots_T)


@_cpu.register_kernel("cuda")
def _cuda(
    k_TKD: Tensor, v_TKD: Tensor, k_cache_NBKD: Tensor, v_cache_NBKD: Tensor, slots_T: Tensor
) -> None:
    check_cache_write(k_TKD, v_TKD, k_cache_NBKD, v_cache_NBKD, slots_T)
    kv_cache_write_triton(k_TKD, v_TKD, k_cache_NBKD, v_cache_NBKD, slots_T)


def kv_cache_write_triton(
    k_TKD: Tensor, v_TKD: Tensor, k_cache_NBKD: Tensor, v_cache_NBKD: Tensor, slots_T: Tensor
) -> None:
    """Launches the kernel on checked arguments: on a GPU, or on the CPU in Triton's interpreter."""
    num_tokens, num_kv_heads, head_dim = k_TKD.shape
    if num_tokens == 0:
        return
    with on_device_of(k_TKD):
        kv_cache_write_kernel[(num_tokens,)](
            k_TKD,
            v_TKD,
            k_cache_NBKD,
            v_cache_NBKD,
            slots_T,
            k_cache_NBKD.shape[0] * k_cache_NBKD.shape[1],
            slots_T.stride(0),
            *k_TKD.stride(),
            *v_TKD.stride(),
            NUM_KV_HEADS=num_kv_heads,
            HEAD_DIM=head_dim,
            BLOCK=power_of_two(num_kv_heads * head_dim),
        )


@triton.jit
def kv_cache_write_kernel(
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slots_ptr,
    num_slots,
    slots_stride,
    k_stride_t,
    k_stride_h,
    k_stride_d,
    v_stride_t,
    v_stride_h,
    v_stride_d,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: the keys and values of one token."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token * slots_stride)
    if (slot < 0) | (slot >= num_slots):
        return
    element = tl.arange(0, BLOCK)
    head, dim = element // HEAD_DIM, element % HEAD_DIM
    inside = element < NUM_KV_HEADS * HEAD_DIM
    k = tl.load(
        k_ptr + token * k_stride_t + head.to(tl.int64) * k_stride_h + dim * k_stride_d, mask=inside
    )
    v = tl.load(
        v_ptr + token * v_stride_t + head.to(tl.int64) * v_stride_h + dim * v_stride_d, mask=inside
    )
    # In 64 bits: a cache may hold more than 2**31 elements.
    row = slot.to(tl.int64) * (NUM_KV_HEADS * HEAD_DIM)
    tl.store(k_cache_ptr + row + element, k, mask=inside)
    tl.store(v_cache_ptr + row + element, v, mask=inside)
