"""Triton where its wheel exists. Elsewhere the modules still import, and the CPU kernels work."""

from types import SimpleNamespace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import triton
    import triton.language as tl
else:
    try:
        import triton
        import triton.language as tl
    except ImportError:  # no wheel for this platform; nothing can launch a kernel here either
        triton = SimpleNamespace(jit=lambda function: function)
        tl = SimpleNamespace(constexpr=None)

__all__ = ["tl", "triton"]
