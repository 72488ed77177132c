"""Triton where its wheel exists. Elsewhere the modules still import, and the CPU kernels work."""

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import triton.language as tl

    triton: Any  # Triton's own types refuse plain numbers for its constexpr parameters
else:
    try:
        import triton
        import triton.language as tl
    except ImportError:  # no wheel for this platform; nothing can launch a kernel here either
        triton = SimpleNamespace(jit=lambda function: function)
        tl = SimpleNamespace(constexpr=None)

__all__ = ["tl", "triton"]
