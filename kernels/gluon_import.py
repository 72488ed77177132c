"""Gluon, Triton's lower language, where there is one that the kernels were tried with.

It is experimental: names and arguments change between versions without notice. Elsewhere the
modules still import, and `KNOWN_GLUON` is False.
"""

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeAlias

from minigen.kernels.triton_import import triton

VERSIONS = ("3.6.", "3.7.")

if TYPE_CHECKING:
    # Gluon's own types refuse plain numbers for its tensors, and objects for its constexprs.
    constexpr: TypeAlias = Any
    gluon: Any
    gl: Any
    hopper: Any
    TensorDescriptor: Any
    program_barrier: Any
    KNOWN_GLUON: bool
else:
    try:
        if not triton.__version__.startswith(VERSIONS):
            raise ImportError
        from triton.experimental import gluon
        from triton.experimental.gluon import language as gl
        from triton.experimental.gluon.language.nvidia import hopper
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
        from triton.language import constexpr

        # Triton 3.7 has another name for it.
        program_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
        KNOWN_GLUON = True
    except (AttributeError, ImportError):

        def _jit(function=None, **options):
            return function if function is not None else lambda function: function

        gluon = SimpleNamespace(jit=_jit)
        gl = hopper = TensorDescriptor = constexpr = program_barrier = None
        KNOWN_GLUON = False

__all__ = [
    "KNOWN_GLUON",
    "TensorDescriptor",
    "constexpr",
    "gl",
    "gluon",
    "hopper",
    "program_barrier",
]
