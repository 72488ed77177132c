"""The Triton kernels compiled ahead for GPUs that this machine need not have.

Compiling finds what the interpreter cannot: types, layouts, and tiles that exceed shared memory.

Each compilation takes a second or more: by the profile `ci` some pairs of target and shape are left
out, see `pairs`; `deep` compiles all.
"""

import itertools
import re
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget

from minigen.kernels.backward_tiles import backward_tile_arguments, choose_backward_tiles
from minigen.kernels.checks import Window
from minigen.kernels.dependent_launch import launch_options
from minigen.kernels.draw_tokens import choose_kernel, choose_launch, run_bounds_kernel
from minigen.kernels.few_rows_dot import (
    MAX_DOT_ROWS,
    choose_dot_tile,
    few_rows_dot_kernel,
)
from minigen.kernels.few_rows_linear import choose_linear_tile, few_rows_linear_kernel
from minigen.kernels.gluon_import import KNOWN_GLUON
from minigen.kernels.kv_cache_write import kv_cache_write_kernel
from minigen.kernels.paged_attention import (
    merge_splits_kernel,
    paged_attention_kernel,
)
from minigen.kernels.rope_cache_write import rope_cache_write_kernel, rope_constants
from minigen.kernels.sum_norm import norm_rows_kernel
from minigen.kernels.tile_linear_gluon import choose_parts, choose_rows_tile, sizes_of
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
    key_gradients_kernel,
    query_gradient_kernel,
)
from minigen.kernels.varlen_attention_backward_tma import (
    choose_backward_descriptor_tiles,
    key_gradients_tma_kernel,
    query_gradient_tma_kernel,
)
from minigen.kernels.varlen_attention_gluon import (
    DEFAULT_TILE,
    SHORT_TILE,
    TILE_OF_64,
    GluonTile,
    Sizes,
)
from minigen.kernels.varlen_attention_tma import (
    choose_descriptor_tile,
    prefers_descriptors,
    varlen_attention_tma_kernel,
)
from tests.command_line import PROFILE
from tools.compile_ahead import (
    Compiled,
    compile_ahead,
    compile_gluon_ahead,
    compile_linear_ahead,
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

# By the profile `ci`, rows of `on_targets` are compiled for these, in turn.
TURNS = [("sm_90", "sm_80", "sm_86"), ("sm_90", "sm_100", "gfx942")]


def pairs(values: Iterable, rows: list[tuple], turns: list[tuple]) -> list[tuple]:
    """Each value before each row; in `ci` only the values of `turns[0]` before row 0, those of
    `turns[1]` before row 1, and so on, from the first again when all have had their turn."""
    assert len(rows) >= len(turns)  # else some value would be left out altogether
    in_turn = zip(rows, itertools.cycle(turns), strict=False)
    return [
        (value, *row) for row, turn in in_turn for value in (turn if PROFILE == "ci" else values)
    ]


def on_targets(names: tuple[str, ...], rows: list[tuple]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("target_name", *names), pairs(TARGETS, rows, TURNS))


by_target = pytest.mark.parametrize("target_name", TARGETS)
# In `ci`, too, each target has shapes of many queries and of one.
by_target_and_shape = on_targets(
    ("head_dim", "dtype", "group", "queries"),
    [
        (128, torch.bfloat16, 4, 1000),
        (128, torch.bfloat16, 4, 1),
        (80, torch.bfloat16, 3, 1000),
        (64, torch.float16, 1, 1000),
        (64, torch.bfloat16, 3, 1),
        (256, torch.float32, 2, 1000),
        (256, torch.bfloat16, 2, 1000),
    ],
)


def check(
    kernel: Any, target_name: str, constants: dict[str, Any], floats: str, aligned: bool = False
) -> Compiled:
    """`aligned`: strides are multiples of 16, as they are unless a head dim is odd."""
    target, shared_bytes = TARGETS[target_name]
    strides = [name for name in kernel.arg_names if aligned and name.endswith(("_t", "_h"))]
    with pytest.MonkeyPatch.context() as environment:
        # A fifth of LLVM's and ptxas's time. Registers may differ by it (few_rows_linear's do), and
        # are counted on sm_90 only.
        if target_name != "sm_90":
            environment.setenv("TRITON_DISABLE_LINE_INFO", "1")
        compiled = compile_ahead(kernel, constants, floats, target, strides)
    assert compiled.shared_bytes <= shared_bytes
    return compiled


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


def varlen_constants(tile: Tile, group: int, head_dim: int, softcap: float = 0.0) -> dict[str, Any]:
    packed = group if tile.block_q < tile.block_m else 1
    constants = constants_for(tile, packed, head_dim, Window(None, 0), softcap)
    return constants | {"SLOTS_A_KEY_HEAD": group // packed}


@by_target_and_shape
def test_varlen_attention(
    target_name: str, head_dim: int, dtype: torch.dtype, group: int, queries: int
) -> None:
    tile = choose_tile(queries, group, head_dim, dtype.itemsize, TARGETS[target_name][1])
    constants = varlen_constants(tile, group, head_dim)
    check(varlen_attention_kernel, target_name, constants, TRITON_TYPES[dtype])


@pytest.mark.parametrize(
    ("target_name", "head_dim", "group", "softcap"),
    [
        ("sm_90", 64, 4, 0.0),
        ("sm_90", 80, 3, 0.0),
        ("sm_90", 128, 4, 0.0),
        ("sm_90", 256, 2, 30.0),
        ("sm_100", 128, 4, 0.0),
    ],
)
def test_varlen_attention_with_descriptors(
    target_name: str, head_dim: int, group: int, softcap: float
) -> None:
    tile = choose_descriptor_tile(1000, group, head_dim, 2, TARGETS[target_name][1])
    constants = varlen_constants(tile, group, head_dim, softcap) | {"WARP_SPECIALIZE": False}
    compiled = check(varlen_attention_tma_kernel, target_name, constants, "bf16", True)
    assert "async_tma_copy_global_to_local" in compiled.ttgir
    if target_name == "sm_90":  # a padded head dim's masks do not fit 128 registers with the rest
        assert (compiled.stack_bytes or 0) <= (96 if head_dim == 80 else 0)


def test_descriptors_are_taken_where_they_were_faster() -> None:
    """Measured on an H200; nothing is known of other GPUs."""
    assert all(prefers_descriptors(queries, 128, (9, 0)) for queries in (298, 512, 16384))
    assert not prefers_descriptors(100, 128, (9, 0))
    assert prefers_descriptors(4096, 64, (9, 0))
    assert not prefers_descriptors(1024, 64, (9, 0))
    assert not any(prefers_descriptors(4096, other, (9, 0)) for other in (32, 256))
    assert not any(prefers_descriptors(4096, 128, other) for other in [(8, 0), (10, 0), (12, 0)])


def test_descriptors_are_left_to_nvidia(monkeypatch: pytest.MonkeyPatch) -> None:
    """An MI300 says that its capability is (9, 4)."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not prefers_descriptors(4096, 128, (9, 4))


@pytest.mark.parametrize("group", [1, 2, 4])
def test_the_fastest_tiles_are_chosen(group: int) -> None:
    """Measured on an H200, see `choose_tile` and `choose_descriptor_tile`."""
    for queries in (298, 512, 1024, 4096, 16384):
        descriptors = choose_descriptor_tile(queries, group, 128, 2, 227 * KIB)
        assert descriptors == Tile(128, 128 // group, 64, 128, 8, 2, max_registers=128)
        paged = choose_tile(queries, group, 128, 2, 227 * KIB, paged=True)
        assert paged == Tile(128, 128 // group, 64, 128, 8, 3, max_registers=128)
        heads_of_64 = choose_tile(queries, group, 64, 2, 227 * KIB)
        assert heads_of_64 == Tile(128, 128 // group, 64, 64, 4, 3)


@example(queries=32, group=2, head_dim=128, itemsize=2, shared_kib=227, paged=True)
@example(queries=33, group=2, head_dim=128, itemsize=2, shared_kib=227, paged=True)
@example(queries=33, group=2, head_dim=128, itemsize=2, shared_kib=160, paged=True)
@given(
    queries=st.integers(1, 20000),
    group=st.sampled_from([1, 2, 3, 4, 8, 16]),
    head_dim=st.sampled_from([16, 64, 80, 128, 256]),
    itemsize=st.sampled_from([2, 4]),
    shared_kib=st.sampled_from([64, 99, 160, 163, 227]),
    paged=st.booleans(),
)
def test_registers_are_limited_where_two_programs_gain_by_it(
    queries: int, group: int, head_dim: int, itemsize: int, shared_kib: int, paged: bool
) -> None:
    """AMD's compiler (64 and 160 KiB) knows no such limit; elsewhere it would only cost."""
    tile = choose_tile(queries, group, head_dim, itemsize, shared_kib * KIB, paged)
    of_128 = tile.block_d == 128 and itemsize == 2 and tile.block_m == 128
    assert (tile.max_registers == 128) == (paged and of_128 and shared_kib == 227)
    if itemsize == 2:
        descriptors = choose_descriptor_tile(queries, group, head_dim, 2, shared_kib * KIB)
        few = descriptors.block_d == 128 and shared_kib == 227
        assert (descriptors.max_registers == 128) == few


@pytest.mark.parametrize(("head_dim", "block_n"), [(8, 32), (64, 128), (96, 64), (128, 128)])
def test_warps_are_specialised_on_hopper(head_dim: int, block_n: int) -> None:
    """Triton drops what it cannot specialise without a word: a `while` in the kernel is enough."""
    tile = Tile(128, 128, block_n, max(16, power_of_two(head_dim)), 4, 2)
    constants = varlen_constants(tile, 4, head_dim) | {"WARP_SPECIALIZE": True}
    compiled = check(varlen_attention_tma_kernel, "sm_90", constants, "bf16", True)
    assert compiled.warp_specialized
    assert compiled.num_warps == 12  # two groups that multiply, one that loads
    assert compiled.stack_bytes == 0
    # The second group's rows are a range from 64. A number added there and not in the first group
    # would be the offset of its rows, for a second time.
    first, second = re.split(r"\n\s*partition\d+\(", compiled.ttgir)[1:]
    assert "end = 128 : i32, start = 64 : i32" in second
    additions = [len(re.findall(r"arith\.addi .*: i32\b", group)) for group in (first, second)]
    assert additions[0] == additions[1]


@pytest.mark.skipif(not KNOWN_GLUON, reason="this Triton's Gluon was never tried")
@pytest.mark.parametrize(
    ("paged", "head_dim", "group", "has_left", "floats", "tile"),
    pairs(
        (False, True),
        [
            (128, 4, False, "bf16", DEFAULT_TILE),
            (128, 1, True, "bf16", DEFAULT_TILE),
            (64, 8, True, "fp16", DEFAULT_TILE),
            (128, 4, False, "bf16", SHORT_TILE),
            (128, 2, True, "fp16", SHORT_TILE),
            (64, 4, False, "bf16", TILE_OF_64),
            (64, 2, True, "fp16", TILE_OF_64),
        ],
        # Each tile, and each kind of mask, stays with pages and without.
        turns=[(True,), (False,)],
    ),
)
def test_gluon_attention(
    paged: bool, head_dim: int, group: int, has_left: bool, floats: str, tile: GluonTile
) -> None:
    sizes = Sizes(head_dim, group, *tile, has_left, True, paged, skips_one=paged)
    compiled = compile_gluon_ahead(sizes, floats)
    assert compiled.num_warps == 12  # two groups that multiply, and one of which a warp loads
    assert compiled.warp_specialized
    assert compiled.shared_bytes <= TARGETS["sm_90"][1]
    assert (compiled.registers or 0) <= 168
    assert (compiled.stack_bytes or 0) == 0
    assert not compiled.serialised
    # In a loop over tiles of keys the scores are awaited alone, the second product in flight.
    loops = re.findall(r"warp_group_dot_wait .*\{pendings = (\d) : i32\}", compiled.ttgir)
    assert loops.count("1") == 2 * (3 if has_left else 2)


@pytest.mark.skipif(not KNOWN_GLUON, reason="this Triton's Gluon was never tried")
@pytest.mark.parametrize("num_rows", [2, 32, 128, 256])
@pytest.mark.parametrize(
    ("num_inputs", "num_outputs", "activation", "is_split", "has_bias"),
    [
        (1024, 4096, "", False, False),
        (2048, 1024, "", True, True),
        (1024, 3072, "silu", False, False),
        (3072, 1024, "", True, False),
        (200, 100, "gelu_tanh", False, True),
    ],
)
def test_tile_linear(
    num_rows: int,
    num_inputs: int,
    num_outputs: int,
    activation: str,
    is_split: bool,
    has_bias: bool,
) -> None:
    parts = choose_parts(num_rows, num_inputs, num_outputs) if is_split else 1
    shape = num_rows, num_inputs, num_outputs
    tile = choose_rows_tile(*shape, activation != "", parts if is_split else 0)
    sizes = sizes_of(tile, num_inputs, num_outputs, parts, has_bias, is_split, activation)
    compiled = compile_linear_ahead(sizes, "bf16")
    assert compiled.shared_bytes <= TARGETS["sm_90"][1]
    assert (compiled.stack_bytes or 0) == 0
    assert not compiled.serialised
    # All weights that there is room for are asked for before the kernel before has ended.
    before, _, after = compiled.ptx.partition("griddepcontrol.wait")
    # Gates and ups come in boxes of 64 columns, other weights whole.
    copies = sizes.weight_stages * (2 * sizes.block_e // 64 if activation else 1)
    assert before.count("cp.async.bulk.tensor") == copies
    assert "cp.async.bulk.tensor" in after


def programs_at_once(compiled: Compiled) -> int:
    """How many a Hopper multiprocessor holds: 65,536 registers, 228 KiB, 1 KiB of it a program's
    overhead. Where no `cuobjdump` counts registers, by shared memory."""
    registers = -(-(compiled.registers or 1) // 8) * 8 * 32 * compiled.num_warps
    return min(65536 // registers, 228 * KIB // (compiled.shared_bytes + KIB))


@pytest.mark.parametrize("group", [1, 2, 4])
def test_no_tile_spills_on_hopper(group: int) -> None:
    """What a model with heads of 128 runs, prefill and decode."""
    # ptxas keeps one value on the stack in a decode tile of 96 or 128 registers.
    few_bytes = 8
    for queries in (1, 1000, 4000):
        shared_bytes = TARGETS["sm_90"][1]
        tile = choose_tile(queries, group, 128, 2, shared_bytes)
        compiled = check(
            varlen_attention_kernel, "sm_90", varlen_constants(tile, group, 128), "bf16", True
        )
        assert (compiled.stack_bytes or 0) <= few_bytes
        assert queries == 4000 or programs_at_once(compiled) >= 2
        tile = choose_tile(queries, group, 128, 2, shared_bytes, paged=True)
        constants = constants_for(tile, group, 128, Window(None, 0), 0.0)
        constants |= {"CACHE_BLOCK": 16, "IS_SPLIT": queries == 1, "NUM_KV_HEADS": 8}
        constants |= {
            "QUERIES": "guess one" if queries == 1 else "many",
            **launch_options(queries == 1),
        }
        compiled = check(paged_attention_kernel, "sm_90", constants, "bf16", True)
        # With 128 registers it keeps 20, and the tile was the fastest all the same.
        assert (compiled.stack_bytes or 0) <= (80 if tile.max_registers else few_bytes)
        assert programs_at_once(compiled) >= (3 if queries == 1 else 2)
        deep = choose_tile(queries, group, 128, 2, shared_bytes, paged=True, deep=True)
        if queries == 1 and deep != tile:
            constants |= {"num_stages": deep.num_stages}
            compiled = check(paged_attention_kernel, "sm_90", constants, "bf16", True)
            assert programs_at_once(compiled) == 2
            assert compiled.shared_bytes >= 3 * 2 * tile.block_n * 128 * 2
        # Two tiles of keys in flight at least: with one, loads wait for the arithmetic.
        assert compiled.shared_bytes >= 2 * 2 * tile.block_n * 128 * 2


@pytest.mark.parametrize("descriptors", [False, True])
def test_fewer_registers_let_two_programs_of_128_rows_share_a_multiprocessor(
    descriptors: bool,
) -> None:
    tile = Tile(128, 32, 64, 128, 8, 2, max_registers=128)
    constants = varlen_constants(tile, 4, 128)
    kernel = varlen_attention_kernel
    if descriptors:
        kernel, constants = varlen_attention_tma_kernel, constants | {"WARP_SPECIALIZE": False}
    compiled = check(kernel, "sm_90", constants, "bf16", True)
    assert programs_at_once(compiled) == 2
    assert (compiled.stack_bytes or 0) <= (0 if descriptors else 160)
    # The second product is awaited within the loop, before the next tile's copy begins: in flight
    # it would take registers that ptxas lacks, and all products would be serialised.
    _, loop = compiled.ttgir.rsplit("scf.for", 1)
    copy = "async_tma_copy_global_to_local" if descriptors else "async_copy_global_to_local"
    assert loop.rindex("warp_group_dot_wait") < loop.index(copy)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_exact_products_fit_registers_on_hopper(head_dim: int) -> None:
    """Not thousands of bytes on the stack, as larger tiles do (a few values are, by Triton 3.7)."""
    for queries in (1, 1000):
        shared_bytes = TARGETS["sm_90"][1]
        tile = choose_tile(queries, 2, head_dim, 4, shared_bytes)
        constants = varlen_constants(tile, 2, head_dim)
        compiled = check(varlen_attention_kernel, "sm_90", constants, "fp32", True)
        assert (compiled.stack_bytes or 0) <= 64
        tile = choose_tile(queries, 2, head_dim, 4, shared_bytes, paged=True)
        constants = constants_for(tile, 2, head_dim, Window(None, 0), 0.0)
        constants |= {"CACHE_BLOCK": 16, "IS_SPLIT": queries == 1, "NUM_KV_HEADS": 8}
        constants |= {
            "QUERIES": "guess one" if queries == 1 else "many",
            **launch_options(queries == 1),
        }
        compiled = check(paged_attention_kernel, "sm_90", constants, "fp32", True)
        assert (compiled.stack_bytes or 0) <= 64


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
        check(kernel, target_name, constants, TRITON_TYPES[dtype])


@pytest.mark.parametrize(
    ("target_name", "head_dim", "group", "softcap", "keys"),
    [
        ("sm_90", 64, 4, 0.0, 300),
        ("sm_90", 80, 3, 0.0, 300),
        ("sm_90", 128, 1, 0.0, 2048),
        ("sm_90", 128, 1, 0.0, 4096),
        ("sm_90", 128, 4, 50.0, 300),
        ("sm_90", 128, 4, 50.0, 4096),
        ("sm_100", 128, 1, 0.0, 4096),
    ],
)
def test_varlen_attention_backward_with_descriptors(
    target_name: str, head_dim: int, group: int, softcap: float, keys: int
) -> None:
    for kernel, tile in zip(
        (query_gradient_tma_kernel, key_gradients_tma_kernel),
        choose_backward_descriptor_tiles(head_dim, keys),
        strict=True,
    ):
        constants = {
            **window_arguments(Window(None, 0)),
            **score_arguments(0.1, softcap),
            **backward_tile_arguments(tile),
            "GROUP": group,
            "HEAD_DIM": head_dim,
            "BLOCK_D": power_of_two(head_dim),
            "WAIT": True,
        }
        for name in ("window_left", "window_right", "score_scale", "cap_scale"):
            del constants[name]
        compiled = check(kernel, target_name, constants, "bf16", True)
        assert "async_tma_copy_global_to_local" in compiled.ttgir
        # Shift and delta come by bulk copies, too: as loads they were more than all others.
        assert "async_copy_global_to_local" not in compiled.ttgir.replace("async_tma_copy", "")
        if target_name == "sm_90" and not softcap:
            assert not compiled.stack_bytes
            assert not compiled.serialised


def test_short_sequences_of_heads_of_128_read_fewer_keys_at_once() -> None:
    def keys_of(head_dim: int, keys: int) -> int:
        return choose_backward_descriptor_tiles(head_dim, keys).queries.block_n

    assert (keys_of(128, 1), keys_of(128, 2048), keys_of(128, 2049)) == (32, 32, 64)
    assert keys_of(80, 300) == keys_of(64, 300) == 64


@by_target_and_shape
def test_paged_attention(
    target_name: str, head_dim: int, dtype: torch.dtype, group: int, queries: int
) -> None:
    shared_bytes = TARGETS[target_name][1]
    tile = choose_tile(queries, group, head_dim, dtype.itemsize, shared_bytes, paged=True)
    constants = constants_for(tile, group, head_dim, Window(100, 0), 0.0)
    constants |= {"CACHE_BLOCK": 16, "IS_SPLIT": queries == 1, "NUM_KV_HEADS": 8}
    constants |= {"QUERIES": "one" if queries == 1 else "any"}
    constants |= launch_options(target_name in ("sm_90", "sm_100"))
    check(paged_attention_kernel, target_name, constants, TRITON_TYPES[dtype])


@by_target
def test_paged_attention_with_softcap(target_name: str) -> None:
    tile = choose_tile(200, 2, 256, 2, TARGETS[target_name][1], paged=True)
    constants = constants_for(tile, 2, 256, Window(4095, 0), 50.0)
    constants |= {"CACHE_BLOCK": 16, "IS_SPLIT": False, "NUM_KV_HEADS": 8}
    constants |= {"QUERIES": "many", **launch_options(False)}
    check(paged_attention_kernel, target_name, constants, "bf16")


@by_target
def test_merge_and_cache_write(target_name: str) -> None:
    check(
        merge_splits_kernel,
        target_name,
        {
            "NUM_HEADS": 6,
            "BLOCK_P": 64,
            "HEAD_DIM": 80,
            "BLOCK_D": 128,
            "QUERIES": "one",
            **launch_options(False),
        },
        "bf16",
    )
    check(
        kv_cache_write_kernel,
        target_name,
        {"NUM_KV_HEADS": 3, "HEAD_DIM": 80, "BLOCK": 256},
        "bf16",
    )


@on_targets(
    ("num_kv_heads", "head_dim", "half", "rotates"),
    [(8, 128, 64, True), (3, 80, 24, True), (3, 64, 32, False)],
)
def test_rope_cache_write(
    target_name: str, num_kv_heads: int, head_dim: int, half: int, rotates: bool
) -> None:
    for pdl in {False, target_name in ("sm_90", "sm_100")}:
        constants = {
            "PARTS": 0,
            **rope_constants(2 * num_kv_heads, num_kv_heads, head_dim, half, rotates),
            **launch_options(pdl),
            "HAS_NORM": head_dim != 64,
            "HAS_POSITIONS": head_dim == 64,
        }
        compiled = check(rope_cache_write_kernel, target_name, constants, "bf16", aligned=True)
        if target_name == "sm_90":
            # So that 20 programs of two warps and more fit a multiprocessor.
            assert (compiled.registers or 0) <= 48
            assert (compiled.stack_bytes or 0) == 0


@on_targets(
    ("num_outputs", "num_inputs", "activation"),
    [(4096, 1024, ""), (1024, 3072, ""), (3072, 1024, "silu"), (4096, 14336, ""), (100, 80, "")],
)
def test_few_rows_linear(
    target_name: str, num_outputs: int, num_inputs: int, activation: str
) -> None:
    tile = choose_linear_tile(num_outputs, num_inputs, activation != "")
    for num_rows in (2, 8):
        constants = {
            "NUM_ROWS": num_rows,
            "NUM_INPUTS": num_inputs,
            "NUM_OUTPUTS": num_outputs,
            "BLOCK_F": tile.block_f,
            "BLOCK_E": power_of_two(num_inputs),
            "HAS_BIAS": num_inputs == 80,
            "HAS_RESIDUAL": num_outputs < 4096,
            "HAS_NORM": num_inputs == 1024,
            "ACTIVATION": activation,
            "num_warps": tile.num_warps,
            **launch_options(target_name in ("sm_90", "sm_100")),
        }
        compiled = check(few_rows_linear_kernel, target_name, constants, "bf16", aligned=True)
        if target_name == "sm_90":
            assert (compiled.stack_bytes or 0) == 0
            # A warp of more would leave fewer than eight on a multiprocessor.
            assert (compiled.registers or 0) <= 224


@on_targets(
    ("num_outputs", "num_inputs", "activation"),
    [(4096, 1024, ""), (1024, 3072, ""), (3072, 1024, "silu"), (100, 80, "")],
)
def test_few_rows_dot(target_name: str, num_outputs: int, num_inputs: int, activation: str) -> None:
    tile = choose_dot_tile(num_inputs)
    constants = {
        "BLOCK_T": MAX_DOT_ROWS,
        "NUM_INPUTS": num_inputs,
        "NUM_OUTPUTS": num_outputs,
        "BLOCK_F": tile.block_f,
        "BLOCK_E": tile.block_e,
        "NUM_WARPS": tile.num_warps,
        "HAS_BIAS": num_inputs == 80,
        "HAS_RESIDUAL": num_outputs < 3072,
        "ACTIVATION": activation,
        "num_warps": tile.num_warps,
        **launch_options(target_name in ("sm_90", "sm_100")),
    }
    compiled = check(few_rows_dot_kernel, target_name, constants, "bf16", aligned=True)
    if target_name == "sm_90":
        assert (compiled.stack_bytes or 0) == 0
        # Each warp multiplies its part of the inputs by all outputs of the program.
        assert f"warpsPerCTA = [{tile.num_warps}, 1, 1], instrShape" in compiled.ttgir


@by_target
@pytest.mark.parametrize("parts", [0, 4])
def test_norm_rows(target_name: str, parts: int) -> None:
    constants: dict[str, Any] = {
        "NUM_INPUTS": 3000,
        "BLOCK_E": 4096,
        "num_warps": 8,
        "PARTS": parts,
    }
    if parts == 0:
        constants |= {"part_ptr": None, "sum_ptr": None}
    constants |= launch_options(target_name in ("sm_90", "sm_100"))
    check(norm_rows_kernel, target_name, constants, "bf16")


@on_targets(("greedy", "num_rows"), [(False, 1), (False, 256), (True, 256), (True, 1)])
def test_draw_tokens(target_name: str, greedy: bool, num_rows: int) -> None:
    launch = choose_launch(num_rows, 151_936)
    constants = {
        "RUN": launch.run, "RUNS": launch.runs_a_program, "BLOCK_C": 256, "GREEDY": greedy,
    }  # fmt: skip
    for kernel, num_warps in (
        (run_bounds_kernel, launch.bounds_warps),
        (choose_kernel, launch.choose_warps),
    ):
        compiled = check(kernel, target_name, constants | {"num_warps": num_warps}, "bf16")
        if target_name == "sm_90":
            assert (compiled.stack_bytes or 0) == 0, kernel
            if kernel is run_bounds_kernel:  # of `choose_kernel` there is one a row
                # Sixteen warps a multiprocessor: while one waits for its words, others compute.
                assert (compiled.registers or 0) <= 128
