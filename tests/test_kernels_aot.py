"""The Triton kernels compiled ahead for GPUs that this machine need not have.

Compiling finds what the interpreter cannot: types, layouts, and tiles that exceed shared memory.
"""

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from minigen.kernels.checks import Window
from minigen.kernels.kv_cache_write import kv_cache_write_kernel
from minigen.kernels.paged_attention import merge_splits_kernel, paged_attention_kernel
from minigen.kernels.tiles import (
    Tile,
    choose_tile,
    power_of_two,
    score_arguments,
    tile_arguments,
    window_arguments,
)
from minigen.kernels.varlen_attention import varlen_attention_kernel
from minigen.kernels.varlen_attention_backward import (
    backward_tile_arguments,
    choose_backward_tiles,
    key_gradients_kernel,
    query_gradient_kernel,
)

KIB = 1024
# Target, and the shared memory it grants one program.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * KIB),
    "sm_86": (GPUTarget("cuda", 86, 32), 99 * KIB),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * KIB),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * KIB),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * KIB),
}
TRITON_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

by_target = pytest.mark.parametrize("target_name", TARGETS)
by_shape = pytest.mark.parametrize(
    ("head_dim", "dtype", "group", "queries"),
    [
        (128, torch.bfloat16, 4, 1000),
        (128, torch.bfloat16, 4, 1),
        (64, torch.float16, 1, 1000),
        (80, torch.bfloat16, 3, 1000),
        (64, torch.bfloat16, 3, 1),
        (256, torch.bfloat16, 2, 1000),
        (256, torch.float32, 2, 1000),
    ],
)


def compile_ahead(kernel: Any, target_name: str, constants: dict[str, Any], floats: str) -> None:
    """Compiles with every argument that is no constant as pointer, number or float by its name."""
    target, shared_bytes = TARGETS[target_name]
    options = {
        name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants
    }
    constants = {name: constants[name] for name in kernel.arg_names if name in constants}

    def type_of(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in ("slots_ptr",):
            return "*i64"
        if name.startswith(("cu_seqlens", "kv_lens", "block_table")):
            return "*i32"
        if name in ("lse_ptr", "dlse_ptr", "shift_ptr", "delta_ptr", "part_ptr"):
            return "*fp32"
        if name.endswith("_ptr"):
            return f"*{floats}"
        return "fp32" if name in ("score_scale", "cap_scale", "scale") else "i32"

    source = ASTSource(
        fn=kernel,
        signature={name: type_of(name) for name in kernel.arg_names},
        constexprs=constants,
        # As at a launch: pointers from torch are aligned to 16 bytes.
        attrs={
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(kernel.arg_names)
            if name.endswith("_ptr")
        },
    )
    compiled = compile(source, target=target, options=options)
    assert compiled.asm["cubin" if target.backend == "cuda" else "hsaco"]
    assert compiled.metadata.shared <= shared_bytes


def constants_for(
    tile: Tile, group: int, head_dim: int, window: Window, softcap: float
) -> dict[str, Any]:
    everything = {
        **tile_arguments(tile, group, head_dim),
        **window_arguments(window),
        **score_arguments(0.1, softcap),
    }
    runtime = ("window_left", "window_right", "score_scale", "cap_scale")
    return {name: value for name, value in everything.items() if name not in runtime}


@by_target
@by_shape
def test_varlen_attention(
    target_name: str, head_dim: int, dtype: torch.dtype, group: int, queries: int
) -> None:
    tile = choose_tile(queries, group, head_dim, dtype.itemsize, TARGETS[target_name][1])
    constants = constants_for(tile, group, head_dim, Window(None, 0), 0.0)
    compile_ahead(varlen_attention_kernel, target_name, constants, TRITON_TYPES[dtype])


@pytest.mark.parametrize(
    ("target_name", "head_dim", "dtype", "group", "queries"),
    [
        *((target_name, 128, torch.bfloat16, 4, 1000) for target_name in TARGETS),
        ("sm_90", 80, torch.bfloat16, 3, 20),
        ("sm_86", 256, torch.bfloat16, 2, 1000),
    ],
)
def test_varlen_attention_backward(
    target_name: str, head_dim: int, dtype: torch.dtype, group: int, queries: int
) -> None:
    shared_bytes = TARGETS[target_name][1]
    tiles = choose_backward_tiles(queries * group, queries, head_dim, dtype.itemsize, shared_bytes)
    short = queries < 100  # the odd shape gets what the others lack
    window, softcap = (Window(100, 0), 50.0) if short else (Window(None, 0), 0.0)
    for kernel, tile in (
        (query_gradient_kernel, tiles.queries),
        (key_gradients_kernel, tiles.keys),
    ):
        constants = {
            **window_arguments(window),
            **score_arguments(0.1, softcap),
            **backward_tile_arguments(tile),
            "GROUP": group,
            "HEAD_DIM": head_dim,
            "BLOCK_D": power_of_two(head_dim),
        }
        for name in ("window_left", "window_right", "score_scale", "cap_scale"):
            del constants[name]
        compile_ahead(kernel, target_name, constants, TRITON_TYPES[dtype])


@by_target
@by_shape
def test_paged_attention(
    target_name: str, head_dim: int, dtype: torch.dtype, group: int, queries: int
) -> None:
    tile = choose_tile(queries, group, head_dim, dtype.itemsize, TARGETS[target_name][1])
    constants = constants_for(tile, group, head_dim, Window(100, 0), 0.0)
    constants |= {"CACHE_BLOCK": 16, "IS_SPLIT": queries == 1}
    compile_ahead(paged_attention_kernel, target_name, constants, TRITON_TYPES[dtype])


@by_target
def test_paged_attention_with_softcap(target_name: str) -> None:
    tile = choose_tile(200, 2, 256, 2, TARGETS[target_name][1])
    constants = constants_for(tile, 2, 256, Window(4095, 0), 50.0)
    constants |= {"CACHE_BLOCK": 16, "IS_SPLIT": False}
    compile_ahead(paged_attention_kernel, target_name, constants, "bf16")


@by_target
def test_merge_and_cache_write(target_name: str) -> None:
    compile_ahead(
        merge_splits_kernel,
        target_name,
        {"NUM_SPLITS": 64, "HEAD_DIM": 80, "BLOCK_D": 128},
        "bf16",
    )
    compile_ahead(
        kv_cache_write_kernel,
        target_name,
        {"NUM_KV_HEADS": 3, "HEAD_DIM": 80, "BLOCK": 256},
        "bf16",
    )
