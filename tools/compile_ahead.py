"""A Triton kernel compiled for a GPU that need not be there, and what it will take of it."""

import re
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

HOPPER = GPUTarget("cuda", 90, 32)
FLOAT_ARGUMENTS = ("score_scale", "cap_scale", "scale", "eps", "norm_offset")
INT64_POINTERS = ("slots", "positions", "seed", "sample", "position", "tokens")
FLOAT32_POINTERS = (
    "lse", "dlse", "shift", "delta", "rows", "part", "cos", "sin",
    "peaks", "bounds", "temperature", "min_p",
)  # fmt: skip


class Compiled(NamedTuple):
    """Registers a thread, bytes of stack a thread (spills) and of shared memory a program.

    Registers and stack are None where Triton brings no `cuobjdump` for the target.
    """

    registers: int | None
    stack_bytes: int | None
    shared_bytes: int
    num_warps: int
    warp_specialized: bool
    ttgir: str
    ptx: str

    @property
    def serialised(self) -> bool:
        """Whether ptxas lets no Hopper product run beside another instruction (C7510, C7515 and
        others). Triton keeps that to itself: ptxas runs a second time, only where one asks."""
        return _is_serialised(self.ptx)


def compile_ahead(
    kernel: Any,
    constants: dict[str, Any],
    floats: str,
    target: GPUTarget = HOPPER,
    aligned: Iterable[str] = (),
) -> Compiled:
    """Compiles with every argument that is no constant as pointer, number or float by its name.

    `constants` may hold num_warps, num_stages, maxnreg and launch_pdl, and names that the kernel
    does not have. Pointers count as multiples of 16 bytes, as torch's are, and so do the numbers
    named in `aligned`.
    """
    names = ("num_warps", "num_stages", "maxnreg", "launch_pdl")
    options = {name: constants[name] for name in names if name in constants}
    constants = {name: constants[name] for name in kernel.arg_names if name in constants}

    def type_of(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name.removesuffix("_ptr") in INT64_POINTERS:
            return "*i64"
        if name.startswith(("cu_seqlens", "kv_lens", "block_table")):
            return "*i32"
        if name.removesuffix("_ptr") in FLOAT32_POINTERS:
            return "*fp32"
        if name.endswith("_ptr"):
            return f"*{floats}"
        return "fp32" if name in FLOAT_ARGUMENTS else "i32"

    aligned = set(aligned)
    source = ASTSource(
        fn=kernel,
        signature={name: type_of(name) for name in kernel.arg_names},
        constexprs=constants,
        attrs={
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(kernel.arg_names)
            if name not in constants and (name.endswith("_ptr") or name in aligned)
        },
    )
    return _compiled(source, target, options)


def compile_gluon_ahead(sizes: Any, floats: str) -> Compiled:
    """`attention_gluon_kernel` for Hopper, with the descriptors that `launch_gluon` makes it."""
    from minigen.kernels.gluon_import import gl
    from minigen.kernels.varlen_attention_gluon import CACHE_BOX, attention_gluon_kernel

    flat, boxes = (gl.NVMMASharedLayout(128, 16, rank) for rank in (2, 3))
    box = [CACHE_BOX, 64] if sizes.paged else [sizes.block_n, sizes.head_dim]
    queries = [sizes.group_queries, sizes.group, sizes.head_dim]
    constants = {"SIZES": sizes} | ({"lse_ptr": None} if sizes.paged else {})
    known = {
        "q_desc": f"tensordesc<{floats}{queries},{boxes}>",
        "k_desc": f"tensordesc<{floats}{box},{flat}>",
        "v_desc": f"tensordesc<{floats}{[1, *box]},{boxes}>",
        "out_ptr": f"*{floats}",
        "lse_ptr": "*fp32",
        "score_scale": "fp32",
    }
    source = _gluon_source(attention_gluon_kernel, known, constants)
    return _compiled(source, HOPPER, {"num_warps": 4})


def compile_linear_ahead(sizes: Any, floats: str, pdl: bool = True) -> Compiled:
    """`tile_linear_kernel` for Hopper, with the descriptors that `launch_tile_linear` makes it."""
    from minigen.kernels.gluon_import import gl
    from minigen.kernels.tile_linear_gluon import tile_linear_kernel

    layout = gl.NVMMASharedLayout(128, 16, 2)
    box = [sizes.block_f, 64 if sizes.activation else sizes.block_e]
    weight = f"tensordesc<{floats}{box},{layout}>"
    constants = {"SIZES": sizes, "PDL": pdl} | ({} if sizes.has_bias else {"bias_ptr": None})
    known = {
        "x_desc": f"tensordesc<{floats}{[sizes.block_t, sizes.block_e]},{layout}>",
        "gate_desc": weight,
        "up_desc": weight,
        "bias_ptr": f"*{floats}",
        "out_ptr": "*fp32" if sizes.is_split else f"*{floats}",
    }
    options = {"num_warps": sizes.num_warps, "launch_pdl": pdl}
    return _compiled(_gluon_source(tile_linear_kernel, known, constants), HOPPER, options)


def _gluon_source(kernel: Any, known: dict[str, str], constants: dict[str, Any]) -> Any:
    """Of types that are known by name; other pointers are to int32, other numbers int32."""
    from triton.experimental.gluon._runtime import GluonASTSource

    names = kernel.arg_names
    types = {name: "*i32" if name.endswith("_ptr") else "i32" for name in names}
    return GluonASTSource(
        kernel,
        types | known | dict.fromkeys(constants, "constexpr"),
        constants,
        {
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(names)
            if name.endswith("_ptr") and name not in constants
        },
    )


def _compiled(source: ASTSource, target: GPUTarget, options: dict[str, Any]) -> Compiled:
    compiled = compile(source, target=target, options=options)
    binary = compiled.asm["cubin" if target.backend == "cuda" else "hsaco"]
    registers, stack_bytes = _resources(binary) if target.backend == "cuda" else (None, None)
    return Compiled(
        registers,
        stack_bytes,
        compiled.metadata.shared,
        compiled.metadata.num_warps,
        "ttg.warp_specialize" in compiled.asm["ttgir"],
        compiled.asm["ttgir"],
        compiled.asm.get("ptx", ""),
    )


def _is_serialised(ptx: str) -> bool:
    if "wgmma.mma_async" not in ptx:
        return False
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [ptxas, "-v", "-arch=sm_90a", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    return "serialized" in said


def _resources(cubin: bytes) -> tuple[int | None, int | None]:
    """Registers and stack bytes a thread, as the `cuobjdump` in Triton's package reads them."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not cuobjdump.exists():
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        printed = subprocess.run(
            [cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=False
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", printed)
    return (int(found[1]), int(found[2])) if found else (None, None)
