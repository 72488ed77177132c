"""The C++ kernels of `native.cpp`: built with torch's own compiler driver, kept in its cache.

They serve where torch's kernels lose: linear layers of few rows, paged attention of many short
sequences, and what lies between the two, where calls take longer than the work. Everything works
without them, slower: no compiler, no headers or a dtype that they do not know leave the operations
to torch.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minigen.kernels.checks import check_cache_write, check_paged, check_rope_cache_write

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SOURCE = Path(__file__).with_name("native.cpp")


class _State:
    """Of the whole process, as torch's registry of operators is."""

    registered = False
    serving = False


def load() -> None:
    """Builds the kernels, or takes them from torch's compile cache, and lets them serve.

    Raises whatever torch's compiler driver does where there is no compiler.
    """
    if not _State.registered:
        # Inductor's driver knows the compiler, its flags, this processor's vectors and the cache.
        from torch._inductor.codecache import CppCodeCache

        CppCodeCache.load(SOURCE.read_text())
        torch.library.register_fake("minigen::native_linear", _fake_linear)
        torch.library.register_fake("minigen::native_kv_cache_write", _fake_kv_cache_write)
        torch.library.register_fake("minigen::native_rope_cache_write", _fake_rope_cache_write)
        torch.library.register_fake("minigen::native_paged_attention", _fake_paged_attention)
        torch.library.register_fake("minigen::native_decoder_layers", _fake_decoder_layers)
        _State.registered = True
    _State.serving = True


def load_if_possible() -> None:
    """`load`, or a warning that says why torch's kernels serve instead."""
    try:
        load()
    # Without a compiler what is compiled next fails, too, and says so; all else is only slower.
    except Exception as error:
        reason = str(error).strip().splitlines()
        warnings.warn(
            f"minigen's CPU kernels could not be built, torch's serve in their place: "
            f"{type(error).__name__}: {reason[0] if reason else 'no reason'}",
            stacklevel=2,
        )


def unload() -> None:
    """Leaves the operations to torch's kernels again."""
    _State.serving = False


def serves(*tensors: Tensor) -> bool:
    """Whether the native kernels can take these tensors now. They have no gradients."""
    if not _State.serving:
        return False
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    first = tensors[0]
    return first.device.type == "cpu" and first.dtype in DTYPES and not needs_grad


def _fake_linear(x_TE: Tensor, weight_FE: Tensor, bias_F: Tensor | None) -> Tensor:
    return x_TE.new_empty(x_TE.shape[0], weight_FE.shape[0])


def _fake_kv_cache_write(
    k_TKD: Tensor, v_TKD: Tensor, k_cache_NBKD: Tensor, v_cache_NBKD: Tensor, slots_T: Tensor
) -> None:
    check_cache_write(k_TKD, v_TKD, k_cache_NBKD, v_cache_NBKD, slots_T)


def _fake_rope_cache_write(
    qkv_TXD: Tensor,
    cos_TR: Tensor,
    sin_TR: Tensor,
    k_cache_NBKD: Tensor,
    v_cache_NBKD: Tensor,
    slots_T: Tensor,
    rotates: bool,
) -> Tensor:
    caches = k_cache_NBKD, v_cache_NBKD, slots_T
    check_rope_cache_write(qkv_TXD, None, None, cos_TR, sin_TR, None, *caches)
    num_tokens, num_heads, head_dim = qkv_TXD.shape
    return qkv_TXD.new_empty(num_tokens, num_heads - 2 * k_cache_NBKD.shape[2], head_dim)


def _fake_paged_attention(
    q_THD: Tensor,
    k_cache_NBKD: Tensor,
    v_cache_NBKD: Tensor,
    cu_seqlens_q: Tensor,
    kv_lens_S: Tensor,
    block_table_SW: Tensor,
    scale: float,
    left: int,
    right: int,
    softcap: float,
) -> Tensor:
    check_paged(q_THD, k_cache_NBKD, v_cache_NBKD, cu_seqlens_q, kv_lens_S, block_table_SW, softcap)
    return torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)


def _fake_decoder_layers(x_TE: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x_TE, memory_format=torch.contiguous_format)
