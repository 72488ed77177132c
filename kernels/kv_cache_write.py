"""minigen::kv_cache_write: puts the step's keys and values into the paged cache, in place.

Shapes: T packed tokens, K key/value heads, D head dim, N cache blocks, B tokens a block.
"""

import torch
from torch import Tensor

from minigen.kernels.checks import check_cache_write, read_slots


def kv_cache_write(
    k_TKD: Tensor, v_TKD: Tensor, k_cache_NBKD: Tensor, v_cache_NBKD: Tensor, slots_T: Tensor
) -> None:
    """Writes row t of k and v into row `slots[t] % B` of cache block `slots[t] // B`.

    Args:
        k_TKD, v_TKD: float16, bfloat16 or float32 (on the CPU also float64).
        k_cache_NBKD, v_cache_NBKD: contiguous caches of the same dtype, changed in place.
        slots_T: int64; -1 skips the token, and no other value may occur twice.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; on the CPU also a slot outside the
            cache (a GPU leaves such a token out, for reading the slots would wait for it).
    """
    torch.ops.minigen.kv_cache_write(k_TKD, v_TKD, k_cache_NBKD, v_cache_NBKD, slots_T)


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
