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

        def _jit(function=None, **options):
            return function if function is not None else lambda function: function

        triton = SimpleNamespace(jit=_jit)
        tl = SimpleNamespace(constexpr=None)

__all__ = ["tl", "triton"]
