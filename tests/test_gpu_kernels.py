"""The Triton kernels against the float64 reference: on a GPU, or in Triton's interpreter.

With TRITON_INTERPRET=1 the same properties run on CPU tensors, of the sizes in `interpreted.py`.
"""

import contextlib
import dataclasses
import importlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from minigen.kernels import kv_cache_write, paged_attention, varlen_attention
from minigen.kernels.checks import resolve_window
from minigen.kernels.kv_cache_write import kv_cache_write_triton
from minigen.kernels.paged_attention import (
    choose_num_splits,
    choose_whole_tiles,
    gains_by_depth,
    paged_attention_triton,
    reckon_steps,
    whole_mark,
)
from minigen.kernels.tiles import Tile, choose_tile, find_queries, power_of_two
from minigen.kernels.triton_import import tl, triton
from minigen.kernels.varlen_attention import MAX_TOKEN_STRIDE, varlen_attention_triton
from minigen.kernels.varlen_attention_gluon import (
    DEFAULT_TILE,
    GROUPS,
    SHORT_TILE,
    TILE_OF_64,
    GluonTile,
    fits_gluon,
    launch_gluon,
)
from minigen.kernels.varlen_attention_tma import fits_tensor_descriptors
from tests.attention_cases import (
    Case,
    assert_within,
    cases,
    cu_seqlens,
    make_paged,
    make_qkv,
    reference,
)
from tests.command_line import ROOT
from tests.interpreted import DEVICE, DTYPES, INTERPRETED, smaller
from tools import bench_attention

HALF_DTYPES = tuple(dtype for dtype in DTYPES if dtype.itemsize == 2)
MAX_LEN = 70 if INTERPRETED else 700

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(), reason="needs a CUDA GPU"
    ),
]


def has_descriptors() -> bool:
    return INTERPRETED or (
        torch.cuda.is_available() and torch.cuda.get_device_capability()[0] in (9, 10)
    )


needs_descriptors = pytest.mark.skipif(
    not has_descriptors(), reason="needs a GPU with tensor descriptors (sm_90, sm_100)"
)


def options(case: Case) -> dict[str, Any]:
    return {
        "window": resolve_window(case.causal, case.window_size),
        "scale": case.scale,
        "softcap": case.softcap,
    }


def run_paged(
    case: Case,
    qkv: tuple[Tensor, Tensor, Tensor],
    num_splits: int | None = None,
    tile: Tile | GluonTile | None = None,
    whole_tiles_most: int | None = None,
) -> Tensor:
    """Given parts divide every sequence, however short, unless said otherwise."""
    if num_splits is not None and whole_tiles_most is None:
        whole_tiles_most = 0
    paged = make_paged(case, DEVICE)
    # In the interpreter by torch: Triton's takes a program a key, most of such a run's time.
    kv_cache_write(*qkv[1:], paged.k_cache_NBKD, paged.v_cache_NBKD, paged.slots_T)
    return paged_attention_triton(
        qkv[0],
        paged.k_cache_NBKD,
        paged.v_cache_NBKD,
        cu_seqlens(case.q_lens, DEVICE),
        paged.kv_lens_S,
        paged.block_table_SW,
        num_splits=num_splits,
        whole_tiles_most=whole_tiles_most,
        tile=tile,
        **options(case),
    )


def run_varlen(
    case: Case,
    qkv: tuple[Tensor, Tensor, Tensor],
    tile: Tile | GluonTile | None = None,
    tensor_descriptors: bool = False,
) -> tuple[Tensor, Tensor]:
    return varlen_attention_triton(
        *qkv,
        cu_seqlens(case.q_lens, DEVICE),
        cu_seqlens(case.kv_lens, DEVICE),
        tile=tile,
        tensor_descriptors=tensor_descriptors,
        **options(case),
    )


@st.composite
def small_tiles(draw: st.DrawFn, case: Case, packed: bool | None = None) -> Tile:
    """Tiles of few keys, so that short sequences have whole tiles and edges on every side."""
    group = case.num_heads // case.num_kv_heads
    if packed is None:
        packed = draw(st.booleans())
    block_m = draw(st.sampled_from([16, 32]))
    return Tile(
        block_m,
        block_m // group if packed else block_m,
        draw(st.sampled_from([16, 32])),
        max(16, power_of_two(case.head_dim)),
        num_warps=4,
        num_stages=draw(st.sampled_from([1, 3])),
        mask_all=draw(st.booleans()),
        max_registers=draw(st.sampled_from([None, 128])),
    )


@given(cases(DTYPES, MAX_LEN))
def test_varlen_equals_definition(case: Case) -> None:
    qkv = make_qkv(case, DEVICE)
    expected = reference(case, *qkv)
    lengths = cu_seqlens(case.q_lens, DEVICE), cu_seqlens(case.kv_lens, DEVICE)
    out_THD, lse_HT = varlen_attention_triton(*qkv, *lengths, **options(case))
    assert out_THD.dtype == case.dtype
    assert_within(out_THD, expected.out_THD, expected.out_error_THD)
    assert_within(lse_HT, expected.lse_HT, expected.lse_error_HT)


# Parts, and the most tiles that are left whole: None where parts are given divides all.
parts = st.tuples(st.sampled_from([None, 1, 2, 8]), st.sampled_from([None, 1, 2]))


@given(cases(DTYPES, MAX_LEN).map(smaller(3, 2)), parts)
def test_paged_equals_definition(case: Case, parts: tuple[int | None, int | None]) -> None:
    """Any mix of prefill, chunk and decode, with the keys divided among programs or not."""
    num_splits, most = parts
    qkv = make_qkv(case, DEVICE)
    expected = reference(case, *qkv)
    out_THD = run_paged(case, qkv, num_splits, whole_tiles_most=most)
    assert_within(out_THD, expected.out_THD, expected.out_error_THD)


@given(cases(DTYPES, MAX_LEN), parts)
def test_decode_equals_definition(case: Case, parts: tuple[int | None, int | None]) -> None:
    num_splits, most = parts
    case = dataclasses.replace(case, q_lens=(1,) * len(case.kv_lens))
    qkv = make_qkv(case, DEVICE)
    expected = reference(case, *qkv)
    out_THD = run_paged(case, qkv, num_splits, whole_tiles_most=most)
    assert_within(out_THD, expected.out_THD, expected.out_error_THD)


@given(
    cases(DTYPES, MAX_LEN),
    st.lists(st.integers(0, 8), min_size=1, max_size=9),
    st.sampled_from([None, 1, 2]),
)
def test_as_many_queries_as_sequences_need_not_be_one_each(
    case: Case, places: list[int], num_splits: int | None
) -> None:
    """Each query goes to some sequence: mostly none, one or two, and rarely one for all."""
    num_seqs = len(places)
    q_lens = tuple(sum(place % num_seqs == seq for place in places) for seq in range(num_seqs))
    kv_lens = tuple(length + case.kv_lens[0] * (seq % 2) for seq, length in enumerate(q_lens))
    case = dataclasses.replace(case, q_lens=q_lens, kv_lens=kv_lens)
    qkv = make_qkv(case, DEVICE)
    expected = reference(case, *qkv)
    assert_within(run_paged(case, qkv, num_splits), expected.out_THD, expected.out_error_THD)


@given(st.data(), cases(DTYPES, MAX_LEN).map(smaller(2, 1)))
def test_varlen_with_any_tile_equals_definition(data: st.DataObject, case: Case) -> None:
    """Whole tiles and edges in their own loops or in one, heads packed into a tile or not."""
    qkv = make_qkv(case, DEVICE)
    expected = reference(case, *qkv)
    out_THD, lse_HT = run_varlen(case, qkv, data.draw(small_tiles(case)), tensor_descriptors=False)
    assert_within(out_THD, expected.out_THD, expected.out_error_THD)
    assert_within(lse_HT, expected.lse_HT, expected.lse_error_HT)


@needs_descriptors
@given(st.data(), cases(HALF_DTYPES, MAX_LEN).map(smaller(2, 1)))
def test_varlen_with_descriptors_equals_definition(data: st.DataObject, case: Case) -> None:
    qkv = make_qkv(case, DEVICE)
    assert fits_tensor_descriptors(*qkv)
    expected = reference(case, *qkv)
    out_THD, lse_HT = run_varlen(case, qkv, data.draw(small_tiles(case)), tensor_descriptors=True)
    assert_within(out_THD, expected.out_THD, expected.out_error_THD)
    assert_within(lse_HT, expected.lse_HT, expected.lse_error_HT)


@needs_descriptors
@given(cases(HALF_DTYPES, MAX_LEN).map(smaller(2, 1)), st.sampled_from([32, 64]))
def test_varlen_with_specialised_warps_equals_definition(case: Case, block_n: int) -> None:
    """The tile that `launch_with_descriptors` specialises; head dims whose tiles fit."""
    case = dataclasses.replace(case, head_dim=min(case.head_dim, 128))
    qkv = make_qkv(case, DEVICE)
    expected = reference(case, *qkv)
    block_d = max(16, power_of_two(case.head_dim))
    out_THD, lse_HT = run_varlen(case, qkv, Tile(128, 128, block_n, block_d, 4, 2), True)
    assert_within(out_THD, expected.out_THD, expected.out_error_THD)
    assert_within(lse_HT, expected.lse_HT, expected.lse_error_HT)


def has_gluon() -> bool:
    if INTERPRETED or not torch.cuda.is_available():
        return False
    one_THD = torch.zeros(1, 1, 128, dtype=torch.bfloat16, device=DEVICE)
    return fits_gluon(one_THD, one_THD, one_THD, 0.0)


needs_gluon = pytest.mark.skipif(
    not has_gluon(), reason="needs a Hopper GPU, and a Triton whose Gluon was tried"
)


# Few of them: each is compiled for every kind of window.
in_gluon_kinds = pytest.mark.parametrize(
    ("dtype", "group", "head_dim", "tile"),
    [
        (torch.bfloat16, 4, 128, DEFAULT_TILE),
        (torch.float16, 2, 64, GluonTile(block_n=64, stages=3, query_stages=1)),
        (torch.bfloat16, 4, 64, TILE_OF_64),
        (torch.float16, 8, 128, SHORT_TILE),
    ],
)


def for_gluon(case: Case, dtype: torch.dtype, group: int, head_dim: int) -> Case:
    heads = {"num_heads": case.num_kv_heads * group, "head_dim": head_dim}
    return dataclasses.replace(case, **heads, dtype=dtype, softcap=0.0, block_size=16)


@needs_gluon
@in_gluon_kinds
@given(case=cases(HALF_DTYPES, MAX_LEN))
def test_varlen_in_gluon_equals_definition(
    dtype: torch.dtype, group: int, head_dim: int, tile: GluonTile, case: Case
) -> None:
    case = for_gluon(case, dtype, group, head_dim)
    qkv = make_qkv(case, DEVICE)
    expected = reference(case, *qkv)
    if qkv[1].numel() > 0:  # else a descriptor would have no row
        out_THD, lse_HT = run_varlen(case, qkv, tile)
        assert_within(out_THD, expected.out_THD, expected.out_error_THD)
        assert_within(lse_HT, expected.lse_HT, expected.lse_error_HT)


@needs_gluon
@in_gluon_kinds
@given(case=cases(HALF_DTYPES, MAX_LEN))
def test_paged_in_gluon_equals_definition(
    dtype: torch.dtype, group: int, head_dim: int, tile: GluonTile, case: Case
) -> None:
    case = for_gluon(case, dtype, group, head_dim)
    qkv = make_qkv(case, DEVICE)
    expected = reference(case, *qkv)
    out_THD = run_paged(case, qkv, tile=tile)
    assert_within(out_THD, expected.out_THD, expected.out_error_THD)


@contextlib.contextmanager
def sees_gluon(operation: str, preferred: bool = False) -> Iterator[mock.Mock]:
    """What the operation launches in Gluon; keys are not split, however few the sequences are.
    `preferred`: also for fewer queries than it is chosen for."""
    module = importlib.import_module(f"minigen.kernels.{operation}")
    with contextlib.ExitStack() as stack:
        if preferred:
            stack.enter_context(mock.patch.object(module, "prefers_gluon", return_value=True))
        if operation == "paged_attention":
            stack.enter_context(mock.patch.object(module, "choose_num_splits", return_value=1))
        patch = mock.patch.object(module, "launch_gluon", wraps=launch_gluon)
        yield stack.enter_context(patch)


@st.composite
def steps(draw: st.DrawFn, group: int, head_dim: int) -> Case:
    """A step of prompts, chunks, decoding sequences and null sequences: 64 queries each on average,
    as many as Gluon is chosen for."""
    lengths = st.sampled_from((2, 63, 64, 65, 127, 128, 129)) | st.integers(1, MAX_LEN)
    cached = st.sampled_from((0, 0, 1, 63, 64, 65, 300)) | st.integers(0, MAX_LEN)
    pairs = [(n, n + draw(cached)) for n in draw(st.lists(lengths, min_size=1, max_size=5))]
    pairs += [(1, 1 + draw(cached)) for _ in range(draw(st.integers(0, 4)))]
    # A null sequence has no keys, and one query where a step decodes, else none.
    pairs += [(draw(st.integers(0, 1)), 0) for _ in range(draw(st.integers(0, 3)))]
    missing = 64 * (len(pairs) + 1) - sum(n for n, _ in pairs)
    longest = max(missing, 2) + draw(st.integers(0, 64))
    pairs.append((longest, longest + draw(cached)))
    q_lens, kv_lens = zip(*draw(st.permutations(pairs)), strict=True)
    num_kv_heads = draw(st.sampled_from([1, 2]))
    window = draw(st.sampled_from([None, None, 1, 64, 100, 300]))
    return Case(
        q_lens=q_lens,
        kv_lens=kv_lens,
        num_heads=num_kv_heads * group,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=torch.float16 if group == 2 else torch.bfloat16,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        softcap=0.0,
        scale=head_dim**-0.5,
        block_size=16,
        seed=draw(st.integers(0, 2**31)),
    )


def paged_step(case: Case, qkv: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """The arguments of `paged_attention`."""
    paged = make_paged(case, DEVICE)
    kv_cache_write(*qkv[1:], paged.k_cache_NBKD, paged.v_cache_NBKD, paged.slots_T)
    lengths = cu_seqlens(case.q_lens, DEVICE), paged.kv_lens_S, paged.block_table_SW
    return qkv[0], paged.k_cache_NBKD, paged.v_cache_NBKD, *lengths


@needs_gluon
@pytest.mark.parametrize(("group", "head_dim"), [*((n, 128) for n in GROUPS), (4, 64)])
@settings(max_examples=15)
@given(data=st.data())
def test_a_step_in_gluon_equals_definition(group: int, head_dim: int, data: st.DataObject) -> None:
    """As the model calls it: decoding sequences have a launch of their own beside Gluon's."""
    case = data.draw(steps(group, head_dim))
    qkv = make_qkv(case, DEVICE)
    expected = reference(case, *qkv)
    with sees_gluon("paged_attention", preferred=head_dim == 64) as launched:
        out_THD = paged_attention(*paged_step(case, qkv), window_size=case.window_size, pdl=True)
    assert launched.call_count == 1
    assert_within(out_THD, expected.out_THD, expected.out_error_THD)


@needs_gluon
@pytest.mark.parametrize(("group", "head_dim"), [*((n, 128) for n in GROUPS), (4, 64)])
@settings(max_examples=15)
@given(data=st.data())
def test_packed_prompts_in_gluon_equal_definition(
    group: int, head_dim: int, data: st.DataObject
) -> None:
    case = data.draw(steps(group, head_dim))
    case = dataclasses.replace(case, kv_lens=case.q_lens)
    qkv = make_qkv(case, DEVICE)
    expected = reference(case, *qkv)
    offsets = cu_seqlens(case.q_lens, DEVICE)
    with sees_gluon("varlen_attention", preferred=head_dim == 64) as launched:
        out_THD, lse_HT = varlen_attention(*qkv, offsets, offsets, window_size=case.window_size)
    assert launched.call_count == 1
    assert_within(out_THD, expected.out_THD, expected.out_error_THD)
    assert_within(lse_HT, expected.lse_HT, expected.lse_error_HT)


LONG_CASE = Case(
    q_lens=(1, 1900, 1300),
    kv_lens=(700, 1900, 1500),
    num_heads=8,
    num_kv_heads=2,
    head_dim=128,
    dtype=torch.bfloat16,
    causal=True,
    window_size=(-1, -1),
    softcap=0.0,
    scale=128**-0.5,
    block_size=16,
    seed=0,
)


@needs_gluon
def test_long_prompts_take_large_tiles_in_gluon() -> None:
    qkv = make_qkv(LONG_CASE, DEVICE)
    expected = reference(LONG_CASE, *qkv)
    with sees_gluon("paged_attention") as launched:
        paged_THD = paged_attention(*paged_step(LONG_CASE, qkv))
    with sees_gluon("varlen_attention") as launched_packed:
        offsets = cu_seqlens(LONG_CASE.q_lens, DEVICE), cu_seqlens(LONG_CASE.kv_lens, DEVICE)
        out_THD, _ = varlen_attention(*qkv, *offsets)
    tiles = [seen.call_args.kwargs["tile"] for seen in (launched, launched_packed)]
    assert tiles == [DEFAULT_TILE, DEFAULT_TILE]
    assert_within(paged_THD, expected.out_THD, expected.out_error_THD)
    assert_within(out_THD, expected.out_THD, expected.out_error_THD)


@needs_gluon
@pytest.mark.parametrize("skips_one", [False, True])
def test_gluon_leaves_sequences_of_one_query_to_another_launch(skips_one: bool) -> None:
    case = dataclasses.replace(LONG_CASE, q_lens=(1, 2, 0, 1, 70), kv_lens=(200, 2, 0, 1, 70))
    qkv = make_qkv(case, DEVICE)
    expected = reference(case, *qkv)
    q_THD, k_cache, v_cache, *lengths = paged_step(case, qkv)
    out_THD = torch.full_like(q_THD, 7.0)
    rows = k_cache.flatten(0, 1), v_cache.flatten(0, 1)
    window = resolve_window(case.causal, case.window_size)
    launch_gluon(
        q_THD, *rows, out_THD, None, *lengths, window=window, scale=case.scale, skips_one=skips_one
    )
    left_T = torch.tensor([n == 1 for n in case.q_lens for _ in range(n)]) & skips_one
    assert (out_THD.cpu()[left_T] == 7.0).all()
    expected.out_THD[left_T] = 7.0
    assert_within(out_THD, expected.out_THD, expected.out_error_THD)


@needs_gluon
def test_a_graph_replays_gluon_on_other_lengths() -> None:
    """Captured with null sequences behind, replayed on what its buffers hold then, and twice: each
    replay counts its tiles from 0."""
    first = dataclasses.replace(LONG_CASE, q_lens=(300, 1, 211, 0, 0), kv_lens=(300, 90, 400, 0, 0))
    other = dataclasses.replace(
        LONG_CASE, q_lens=(1, 130, 0, 380, 1), kv_lens=(33, 250, 0, 380, 0), seed=1
    )
    steps_and_expected = []
    for case in (first, other):
        qkv = make_qkv(case, DEVICE)
        steps_and_expected.append((paged_step(case, qkv), reference(case, *qkv)))
    shapes = [
        [max(sizes) for sizes in zip(*(x.shape for x in same), strict=True)]
        for same in zip(*(step for step, _ in steps_and_expected), strict=True)
    ]
    buffers = [
        torch.zeros(shape, dtype=x.dtype, device=DEVICE)
        for shape, x in zip(shapes, steps_and_expected[0][0], strict=True)
    ]

    def fill(step: tuple[Tensor, ...]) -> None:
        for buffer, x in zip(buffers, step, strict=True):
            buffer.zero_()[tuple(slice(0, length) for length in x.shape)] = x

    fill(steps_and_expected[0][0])
    with sees_gluon("paged_attention") as launched:
        paged_attention(*buffers, pdl=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out_THD = paged_attention(*buffers, pdl=True)
    assert launched.call_count == 2
    for step, expected in [*steps_and_expected, *steps_and_expected]:
        fill(step)
        graph.replay()
        assert_within(out_THD, expected.out_THD, expected.out_error_THD)


@needs_gluon
def test_a_program_takes_many_tiles_in_gluon() -> None:
    """More than two for each, of every length, so that all barriers go round several times."""
    case = dataclasses.replace(
        LEAK_CASE,
        q_lens=(1, 1900, 130, 700, 0, 2, 1300, 64),
        kv_lens=(900, 1900, 130, 1500, 3, 2, 1300, 65),
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        causal=True,
        block_size=16,
    )
    qkv = make_qkv(case, DEVICE)
    expected = reference(case, *qkv)
    for tile in (DEFAULT_TILE, SHORT_TILE):
        out_THD, lse_HT = run_varlen(case, qkv, tile)
        assert_within(out_THD, expected.out_THD, expected.out_error_THD)
        assert_within(lse_HT, expected.lse_HT, expected.lse_error_HT)
        assert_within(run_paged(case, qkv, tile=tile), expected.out_THD, expected.out_error_THD)


WHERE_NOTHING_LIES_BEFORE = """
import torch
from minigen.kernels.checks import Window
from minigen.kernels.varlen_attention_gluon import DEFAULT_TILE, SHORT_TILE, launch_gluon

# Of eight neighbours in memory, each of its own, three are given back.
pieces = [torch.zeros(32 << 20, dtype=torch.uint8, device="cuda") for _ in range(8)]
pieces.sort(key=lambda piece: piece.data_ptr())
memory, pieces[1:4] = pieces[4], []
torch.cuda.empty_cache()
v_TKD = memory[: 2048 * 2 * 128 * 2].view(torch.bfloat16).view(2048, 2, 128)
v_TKD[:] = 1
v_TKD[0] = torch.nan  # no key of these sequences
k_TKD = torch.randn_like(v_TKD)
q_THD = torch.randn(130, 8, 128, device="cuda").bfloat16()
table_SW = torch.arange(1, 10, device="cuda").int()[None].contiguous()

def ints(*numbers):
    return torch.tensor(numbers, device="cuda").int()

for tile in (DEFAULT_TILE, SHORT_TILE):
    for num_keys in (0, 1, 16, 17, 40, 64, 130, 144):
        for lengths, table in ((ints(7, 7 + num_keys), None), (ints(num_keys), table_SW)):
            out_THD = torch.full_like(q_THD, 7)
            launch_gluon(
                q_THD, k_TKD, v_TKD, out_THD, None, ints(0, 130), lengths, table,
                window=Window(None, None), scale=0.1, tile=tile,
            )
            torch.cuda.synchronize()
            expected = torch.full_like(out_THD, 1 if num_keys else 0)
            torch.testing.assert_close(out_THD, expected, rtol=0.01, atol=0)
"""


@needs_gluon
def test_values_may_begin_where_nothing_lies_before_in_gluon() -> None:
    """In a process of its own: the access that this is about would end all that follow."""
    run = subprocess.run(
        [sys.executable, "-c", WHERE_NOTHING_LIES_BEFORE], capture_output=True, text=True, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr[-2000:]


@needs_gluon
def test_neighbours_cannot_leak_in_gluon() -> None:
    """Boxes of keys and values run over the end of a sequence; what lies there may be NaN."""
    lengths = (100, 7, 30, 300)
    case = dataclasses.replace(
        LEAK_CASE, q_lens=lengths, kv_lens=lengths, num_heads=4, head_dim=128
    )
    mine = make_qkv(case, DEVICE)
    expected_THD, _ = run_varlen(case, mine, DEFAULT_TILE)
    for x_THD in mine:
        x_THD[107:] = torch.nan
    out_THD, _ = run_varlen(case, mine, DEFAULT_TILE)
    assert torch.equal(out_THD[:107], expected_THD[:107])


@given(
    st.data(),
    cases(DTYPES, 50 if INTERPRETED else MAX_LEN).map(smaller(2, 1)),
    st.sampled_from([1, 8, 16, 24, 32, 64]),
    st.sampled_from([None, 1, 2, 3, 7] if not INTERPRETED else [1, 3]),
    st.sampled_from([0, 1, 2]),
)
def test_paged_with_any_tile_equals_definition(
    data: st.DataObject, case: Case, block_size: int, num_splits: int | None, most: int
) -> None:
    """Cache blocks that divide a tile, that a tile divides, and neither."""
    case = dataclasses.replace(case, block_size=block_size)
    qkv = make_qkv(case, DEVICE)
    expected = reference(case, *qkv)
    out_THD = run_paged(case, qkv, num_splits, data.draw(small_tiles(case, packed=True)), most)
    assert_within(out_THD, expected.out_THD, expected.out_error_THD)


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize(("block_size", "block_n"), [(4, 32), (24, 16), (64, 16)])
def test_whole_tiles_between_two_edges(num_splits: int, block_size: int, block_n: int) -> None:
    """A window so wide that whole tiles lie within it, and so narrow that keys lie before it."""
    case = dataclasses.replace(
        LEAK_CASE,
        q_lens=(1, 20),
        kv_lens=(150, 131),
        num_heads=2,
        num_kv_heads=1,
        window_size=(100, 0),
        causal=True,
        block_size=block_size,
    )
    qkv = make_qkv(case, DEVICE)
    expected = reference(case, *qkv)
    tile = Tile(16, 8, block_n, 64, num_warps=4, num_stages=3)
    out_THD = run_paged(case, qkv, num_splits, tile)
    assert_within(out_THD, expected.out_THD, expected.out_error_THD)
    assert_within(run_varlen(case, qkv, tile)[0], expected.out_THD, expected.out_error_THD)


def fill_new_memory(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    """New float32 memory holds these bits, as it may where an earlier launch left them."""
    empty = torch.empty

    def filled(*args: Any, **kwargs: Any) -> Tensor:
        made = empty(*args, **kwargs)
        if made.dtype == torch.float32:
            made.view(torch.int32).fill_(bits)
        return made

    monkeypatch.setattr(torch, "empty", filled)


WHOLE_CASE = Case(
    q_lens=(),
    kv_lens=(),
    num_heads=4,
    num_kv_heads=2,
    head_dim=40,
    dtype=torch.float32,  # whose tiles are of 16 keys
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    scale=0.2,
    block_size=4,
    seed=3,
)
WHOLE_TILE = Tile(16, 8, 16, 64, num_warps=4, num_stages=3)


@pytest.mark.parametrize("num_splits", [2, 5])
@pytest.mark.parametrize("tile", [None, WHOLE_TILE])
@pytest.mark.parametrize(
    ("q_lens", "kv_lens", "window_left"),
    [
        pytest.param((1, 1, 1, 1, 1), (49, 48, 0, 97, 16), -1, id="one each"),
        pytest.param((3, 0, 0, 1, 1), (49, 48, 0, 97, 40), -1, id="not one each"),
        pytest.param((1, 20, 1, 2, 0, 1), (48, 48, 49, 65, 7, 0), -1, id="one and many"),
        pytest.param((10,), (48,), -1, id="many, whole"),
        pytest.param((10,), (49,), -1, id="many, divided"),
        # With a window tiles count from the first that is seen: 3 from key 48 on, 4 from 32 on.
        pytest.param((1, 1, 1), (96, 91, 48), 40, id="window"),
    ],
)
def test_sequences_of_few_tiles_are_whole_beside_divided_ones(
    q_lens: tuple[int, ...],
    kv_lens: tuple[int, ...],
    window_left: int,
    tile: Tile | None,
    num_splits: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the bit what a launch gives in which all are whole, or all divided."""
    fill_new_memory(monkeypatch, whole_mark.fn())
    window = (window_left, -1)
    case = dataclasses.replace(WHOLE_CASE, q_lens=q_lens, kv_lens=kv_lens, window_size=window)
    case = smaller(6, 1)(case)
    qkv = make_qkv(case, DEVICE)
    expected = reference(case, *qkv)
    outs = [run_paged(case, qkv, num_splits, tile, most) for most in (0, 3, 1000)]
    for out_THD in outs:
        assert_within(out_THD, expected.out_THD, expected.out_error_THD)
    rows = (out_THD.split(q_lens) for out_THD in outs)
    for kv_len, divided_QHD, mine_QHD, whole_QHD in zip(kv_lens, *rows, strict=True):
        first = 0 if window_left < 0 else max(kv_len - 1 - window_left, 0) // 16
        num_tiles = -(-kv_len // 16) - first
        assert torch.equal(mine_QHD, whole_QHD if num_tiles <= 3 else divided_QHD)
        if num_tiles > 1 and len(mine_QHD):
            assert not torch.equal(divided_QHD, whole_QHD)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("q_lens", [(1, 1, 1), (1, 2, 1)])
def test_scores_that_are_no_numbers_give_nan_whole_or_divided(
    q_lens: tuple[int, ...], softcap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also NaN of the very bits that mark a whole row."""
    fill_new_memory(monkeypatch, 0)  # what is not written is no NaN
    case = dataclasses.replace(WHOLE_CASE, q_lens=q_lens, kv_lens=(40, 70, 30), softcap=softcap)
    q_THD, k_TKD, v_TKD = make_qkv(case, DEVICE)
    expected_THD = run_paged(case, (q_THD, k_TKD, v_TKD), 1)
    mark = torch.tensor(whole_mark.fn(), dtype=torch.int32, device=DEVICE)
    q_THD[0, 1].view(torch.int32).copy_(mark.expand(40))
    v_TKD[40:, 0].view(torch.int32)[3].copy_(mark.expand(40))
    q_THD[-1, 2] = torch.inf
    is_nan_TH = torch.zeros(len(q_THD), 4, dtype=torch.bool, device=DEVICE)
    is_nan_TH[0, 1] = is_nan_TH[-1, 2] = True
    is_nan_TH[1:-1, :2] = True  # the heads of the first key/value head
    if softcap:
        is_nan_TH[-1, 2] = run_paged(case, (q_THD, k_TKD, v_TKD), 1)[-1, 2].isnan().any()
    for most in (0, 3, 1000):
        out_THD = run_paged(case, (q_THD, k_TKD, v_TKD), 3, whole_tiles_most=most)
        assert torch.equal(out_THD.isnan(), is_nan_TH.unsqueeze(-1).expand(-1, -1, 40))
        torch.testing.assert_close(out_THD[~is_nan_TH], expected_THD[~is_nan_TH])


def assert_nan_where_scores_are_no_numbers(
    head_dim: int, left: int, tile: Tile | GluonTile | None
) -> None:
    """A NaN query, an infinite one, and a NaN key, which is NaN only for those that see it."""
    key = 20 if left >= 0 else 140
    case = dataclasses.replace(
        WHOLE_CASE, q_lens=(150,), kv_lens=(150,), num_kv_heads=1, head_dim=head_dim,
        dtype=torch.float16, window_size=(left, 0), block_size=16,
    )  # fmt: skip
    q_THD, k_TKD, v_TKD = make_qkv(case, DEVICE)
    expected = [run_varlen(case, (q_THD, k_TKD, v_TKD), tile)[0]]
    expected.append(run_paged(case, (q_THD, k_TKD, v_TKD), 1 if tile is None else None, tile))
    q_THD[3, 1], q_THD[130, 2] = torch.nan, torch.inf
    k_TKD[key] = torch.nan
    is_nan_TH = torch.zeros(150, 4, dtype=torch.bool, device=DEVICE)
    is_nan_TH[3, 1] = is_nan_TH[130, 2] = True
    is_nan_TH[key : key + left + 1 if left >= 0 else None] = True
    found = [run_varlen(case, (q_THD, k_TKD, v_TKD), tile)[0]]
    found.append(run_paged(case, (q_THD, k_TKD, v_TKD), 1 if tile is None else None, tile))
    for out_THD, expected_THD in zip(found, expected, strict=True):
        assert torch.equal(out_THD.isnan(), is_nan_TH.unsqueeze(-1).expand(-1, -1, head_dim))
        torch.testing.assert_close(out_THD[~is_nan_TH], expected_THD[~is_nan_TH])


@pytest.mark.parametrize("left", [-1, 100])
def test_prompts_whose_scores_are_no_numbers_give_nan(left: int) -> None:
    assert_nan_where_scores_are_no_numbers(64, left, None)


@needs_gluon
@pytest.mark.parametrize("left", [-1, 100])
@pytest.mark.parametrize(
    ("head_dim", "tile"), [(128, DEFAULT_TILE), (128, SHORT_TILE), (64, TILE_OF_64)]
)
def test_prompts_in_gluon_whose_scores_are_no_numbers_give_nan(
    head_dim: int, tile: GluonTile, left: int
) -> None:
    assert_nan_where_scores_are_no_numbers(head_dim, left, tile)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_a_scale_need_not_be_positive(scale: float, softcap: float) -> None:
    """The kernels take a maximum before the scale, which a negative one would turn round."""
    case = dataclasses.replace(LEAK_CASE, scale=scale, softcap=softcap, causal=True)
    qkv = make_qkv(case, DEVICE)
    expected = reference(dataclasses.replace(case, scale=abs(scale)), -qkv[0], *qkv[1:])
    if scale == 0:
        expected = reference(dataclasses.replace(case, scale=1.0), qkv[0] * 0, *qkv[1:])
    out_THD, lse_HT = run_varlen(case, qkv)
    assert_within(out_THD, expected.out_THD, expected.out_error_THD)
    assert_within(lse_HT, expected.lse_HT, expected.lse_error_HT)
    assert_within(run_paged(case, qkv), expected.out_THD, expected.out_error_THD)


@triton.jit(do_not_specialize=["num_seqs"])
def blocks_kernel(
    cu_seqlens_ptr, seq_ptr, query_ptr, num_seqs, LATEST_FIRST: tl.constexpr, BLOCK_Q: tl.constexpr
):
    block = tl.program_id(0)
    seq, _, num_queries, first_query = find_queries(
        cu_seqlens_ptr, block, num_seqs, LATEST_FIRST, BLOCK_Q
    )
    tl.store(seq_ptr + block, seq)
    tl.store(query_ptr + block, tl.where(first_query < num_queries, first_query, -1))


@pytest.mark.parametrize("latest_first", [False, True])
@given(st.lists(st.integers(0, 40), min_size=1, max_size=9))
def test_blocks_cover_every_sequence_in_their_order(latest_first: bool, lengths: list[int]) -> None:
    # Five blocks too many, as where a captured batch has rows behind its last sequence; what
    # lies behind the offsets is no sequence.
    num_blocks = sum(lengths) // 8 + len(lengths) + 5
    seqs, queries = torch.zeros(2, num_blocks, dtype=torch.int32, device=DEVICE)
    offsets = cu_seqlens((*lengths, 1000), DEVICE)
    blocks_kernel[(num_blocks,)](
        offsets, seqs, queries, len(lengths), LATEST_FIRST=latest_first, BLOCK_Q=8
    )
    found = [(s, q) for s, q in zip(seqs.tolist(), queries.tolist(), strict=True) if q != -1]
    expected = []
    for seq, length in enumerate(lengths):
        firsts = list(range(0, length, 8))
        expected += [(seq, first) for first in (firsts[::-1] if latest_first else firsts)]
    assert found == expected


@given(st.integers(1, 5000), st.integers(0, 3000), st.integers(1, 600))
def test_splits_are_within_bounds(num_programs: int, num_tiles: int, num_slots: int) -> None:
    splits = choose_num_splits(num_programs, num_tiles, num_slots)
    assert 1 <= splits <= max(1, min(num_tiles, 64))
    if num_programs >= num_slots * 16:
        assert splits == 1  # so many waves that the last, half empty, costs little


def test_splits_fill_the_gpu_where_there_are_few_sequences() -> None:
    """8 key/value heads, tiles of 64 keys, two programs on each of 132 multiprocessors."""
    chosen = {
        (batch, context): choose_num_splits(batch * 8, context // 64, 264)
        for batch, context in [(1, 4096), (1, 32768), (8, 8192), (32, 1024), (256, 4096)]
    }
    assert chosen[1, 4096] in range(16, 34)
    assert chosen[1, 32768] in range(24, 34)
    assert chosen[8, 8192] in (4, 8)
    assert chosen[32, 1024] == chosen[256, 4096] == 1


@given(st.integers(1, 600), st.integers(1, 64), st.integers(0, 300), st.integers(1, 600))
def test_the_most_whole_tiles_are_the_last_before_parts_are_quicker(
    num_programs: int, num_splits: int, num_tiles: int, num_slots: int
) -> None:
    def takes(splits: int, tiles: int) -> float:
        return reckon_steps(num_programs, splits, tiles, num_slots)

    most = choose_whole_tiles(num_splits, num_programs, num_tiles, num_slots)
    assert 0 <= most <= num_tiles
    assert all(0.9 * takes(1, tiles) <= takes(num_splits, tiles) for tiles in range(1, most + 1))
    assert most == num_tiles or 0.9 * takes(1, most + 1) > takes(num_splits, most + 1)
    chosen = choose_num_splits(num_programs, num_tiles, num_slots)
    if chosen > 1:  # or the choice would serve no sequence
        assert 1 <= choose_whole_tiles(chosen, num_programs, num_tiles, num_slots) < num_tiles


def test_a_third_tile_is_in_flight_where_that_fills_the_last_wave() -> None:
    """8 key/value heads, three programs on each of 132 multiprocessors or two, 2,048 keys."""
    deep = [
        batch for batch in (1, 32, 49, 64, 96, 128, 256) if gains_by_depth(8 * batch, 32, 396, 264)
    ]
    assert deep == [64, 128]
    assert not any(
        gains_by_depth(n, 32, 396, 396) for n in range(1, 4000)
    )  # it costs room or nothing


@given(st.sampled_from([16, 64, 80, 128, 256]), st.sampled_from([1, 2, 4, 8]), st.booleans())
def test_a_third_tile_fits_or_is_not_asked_for(head_dim: int, group: int, narrow: bool) -> None:
    shared_bytes = (64 if narrow else 99) * 1024
    for itemsize in (2, 4):
        tile = choose_tile(1, group, head_dim, itemsize, shared_bytes, paged=True)
        deep = choose_tile(1, group, head_dim, itemsize, shared_bytes, paged=True, deep=True)
        keys = 3 * 2 * tile.block_n * tile.block_d * itemsize
        fits = keys + tile.block_m * tile.block_d * itemsize + 8 * 1024 <= shared_bytes
        assert deep == tile._replace(num_stages=7 if fits and not narrow else tile.num_stages)


def test_a_short_sequence_is_whole_where_the_table_is_wide() -> None:
    """32 sequences, 8 key/value heads, a table of 64 tiles, three programs on each of 132."""
    assert choose_num_splits(256, 64, 396) == 3
    assert reckon_steps(256, 1, 6, 396) == 8 < reckon_steps(256, 3, 6, 396)
    assert choose_whole_tiles(3, 256, 64, 396) == 20


def test_a_token_stride_beyond_32_bit_offsets_is_copied() -> None:
    case = dataclasses.replace(LEAK_CASE, q_lens=(2, 1), kv_lens=(2, 1))
    q_THD, k_TKD, v_TKD = make_qkv(case, DEVICE)
    try:
        wide = torch.empty(3, MAX_TOKEN_STRIDE + 8, dtype=case.dtype, device=DEVICE)
    except RuntimeError:
        pytest.skip("this machine has no 50 MB to spare")
    wide_k = wide[:, :80].view(3, 2, 40).copy_(k_TKD)
    assert wide_k.stride(0) > MAX_TOKEN_STRIDE
    expected_THD, _ = run_varlen(case, (q_THD, k_TKD, v_TKD))
    assert torch.equal(run_varlen(case, (q_THD, wide_k, v_TKD))[0], expected_THD)


@pytest.mark.parametrize("section", ["varlen", "decode"])
def test_the_benchmark_tells_right_from_wrong(
    section: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = bench_attention.Kind(DEVICE, torch.float16)
    heads = bench_attention.Heads(2, 1, 64)
    candidate = bench_attention.CANDIDATES[section](heads)[0]
    bench_attention.check_candidate(section, heads, candidate, kind)

    name = "run_varlen" if section == "varlen" else "run_paged"
    right = getattr(bench_attention, name)
    monkeypatch.setattr(bench_attention, name, lambda *args: right(*args) * 1.1)
    with pytest.raises(ValueError, match=r"wrong by .* beyond rounding"):
        bench_attention.check_candidate(section, heads, candidate, kind)


@given(cases(DTYPES, 40))
def test_cache_write_changes_its_slots_only(case: Case) -> None:
    _, k_TKD, v_TKD = make_qkv(case, DEVICE)
    paged = make_paged(case, DEVICE)
    slots_T = paged.slots_T.clone()
    slots_T[::3] = -1
    kv_cache_write_triton(k_TKD, v_TKD, paged.k_cache_NBKD, paged.v_cache_NBKD, slots_T)
    for cache_NBKD, x_TKD in ((paged.k_cache_NBKD, k_TKD), (paged.v_cache_NBKD, v_TKD)):
        expected_NBKD = torch.full_like(cache_NBKD, torch.nan)
        kept_T = slots_T >= 0
        expected_NBKD.flatten(0, 1)[slots_T[kept_T]] = x_TKD[kept_T]
        torch.testing.assert_close(cache_NBKD, expected_NBKD, rtol=0, atol=0, equal_nan=True)


LEAK_CASE = Case(
    q_lens=(7, 30, 3),
    kv_lens=(7, 30, 3),
    num_heads=6,
    num_kv_heads=2,
    head_dim=40,
    dtype=torch.float16,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    scale=0.2,
    block_size=4,
    seed=0,
)


@pytest.mark.parametrize("num_splits", [None, 1, 3])
def test_prompts_beside_decoding_sequences(num_splits: int | None) -> None:
    """Two launches, each of which leaves the other's rows alone; null sequences between them."""
    case = dataclasses.replace(
        LEAK_CASE,
        q_lens=(5, 1, 0, 1, 34, 1, 0),
        kv_lens=(9, 40, 0, 1, 34, 77, 3),
        num_heads=2,
        num_kv_heads=1,
        causal=True,
    )
    qkv = make_qkv(case, DEVICE)
    expected = reference(case, *qkv)
    assert_within(run_paged(case, qkv, num_splits), expected.out_THD, expected.out_error_THD)


def first_rows(
    lengths: tuple[int, ...], qkv: Sequence[Tensor], descriptors: bool = False
) -> Tensor:
    q_THD, k_TKD, v_TKD = qkv
    offsets = cu_seqlens(lengths, DEVICE)
    out_THD, _ = varlen_attention_triton(
        q_THD, k_TKD, v_TKD, offsets, offsets, tensor_descriptors=descriptors, **options(LEAK_CASE)
    )
    return out_THD[:7]


by_descriptors = pytest.mark.parametrize(
    "descriptors", [False, pytest.param(True, marks=needs_descriptors)]
)


@by_descriptors
def test_neighbours_cannot_leak_and_a_leak_would_be_noticed(descriptors: bool) -> None:
    mine = make_qkv(LEAK_CASE, DEVICE)
    others = make_qkv(dataclasses.replace(LEAK_CASE, seed=1), DEVICE)
    disturbed = tuple(torch.cat([a[:7], b[7:]]) for a, b in zip(mine, others, strict=True))
    poisoned = tuple(torch.cat([a[:7], torch.full_like(a[7:], torch.nan)]) for a in mine)
    right, wrong = (7, 30, 3), (8, 29, 3)
    rows = first_rows(right, mine, descriptors)
    assert torch.equal(rows, first_rows(right, disturbed, descriptors))
    assert torch.equal(rows, first_rows(right, poisoned, descriptors))
    assert not torch.equal(
        first_rows(wrong, mine, descriptors), first_rows(wrong, disturbed, descriptors)
    )


@pytest.mark.parametrize("num_splits", [1, 4])
def test_null_rows_give_zero(num_splits: int) -> None:
    case = dataclasses.replace(LEAK_CASE, q_lens=(1, 2, 4), kv_lens=(0, 1, 4), causal=True)
    out_THD = run_paged(case, make_qkv(case, DEVICE), num_splits)
    assert not out_THD[:2].any()  # a sequence without keys, and a query before its first key
    assert (out_THD[2:] != 0).all()


def test_empty_batches() -> None:
    case = dataclasses.replace(LEAK_CASE, q_lens=(0, 0), kv_lens=(0, 3))
    qkv = make_qkv(case, DEVICE)
    assert run_paged(case, qkv).shape == (0, 6, 40)
    lengths = cu_seqlens(case.q_lens, DEVICE), cu_seqlens(case.kv_lens, DEVICE)
    assert varlen_attention_triton(*qkv, *lengths, **options(case))[1].shape == (6, 0)


@by_descriptors
def test_strided_inputs_equal_contiguous_ones(descriptors: bool) -> None:
    qkv = make_qkv(LEAK_CASE, DEVICE)
    fused = torch.cat([x.flatten(1) for x in qkv], 1)
    slices = fused.split([6 * 40, 2 * 40, 2 * 40], 1)
    q, k, v = (x.unflatten(1, (-1, 40)) for x in slices)
    strided = (q, k, v)
    assert torch.equal(
        first_rows(LEAK_CASE.q_lens, strided, descriptors),
        first_rows(LEAK_CASE.q_lens, qkv, descriptors),
    )
    assert torch.equal(run_paged(LEAK_CASE, strided), run_paged(LEAK_CASE, qkv))


def test_cache_beyond_32_bit_indexes() -> None:
    """2**31 elements and more; on the CPU the pages that nobody writes cost no memory."""
    shape = (2**31 // (16 * 8 * 256) + 2, 16, 8, 256)
    try:
        k_cache, v_cache = (torch.empty(shape, dtype=torch.float16, device=DEVICE) for _ in "kv")
    except RuntimeError:
        pytest.skip("this machine has no 9 GB for the two caches")
    k_TKD, v_TKD, q_THD = torch.randn(3, 3, 8, 256).to(DEVICE, torch.float16)
    last = (shape[0] - 1) * 16
    slots_T = torch.arange(last, last + 3, device=DEVICE)
    kv_cache_write_triton(k_TKD, v_TKD, k_cache, v_cache, slots_T)
    lengths = cu_seqlens((3,), DEVICE)
    table = torch.tensor([[shape[0] - 1]], dtype=torch.int32, device=DEVICE)
    common: dict[str, Any] = {
        "window": resolve_window(True, (-1, -1)),
        "scale": 0.1,
        "softcap": 0.0,
    }
    out_THD = paged_attention_triton(q_THD, k_cache, v_cache, lengths, lengths[1:], table, **common)
    expected_THD, _ = varlen_attention_triton(q_THD, k_TKD, v_TKD, lengths, lengths, **common)
    torch.testing.assert_close(out_THD, expected_THD, rtol=2**-10, atol=2**-10)


# What only a GPU shows: the operations as registered, without a sync, captured in a graph. The run
# in the interpreter leaves these out by name.


def registered_arguments(case: Case) -> tuple[Any, Any]:
    """Arguments of kv_cache_write and of paged_attention, over caches without NaN."""
    q_THD, k_TKD, v_TKD = make_qkv(case, DEVICE)
    paged = make_paged(case, DEVICE)
    caches = paged.k_cache_NBKD.zero_(), paged.v_cache_NBKD.zero_()
    return (k_TKD, v_TKD, *caches, paged.slots_T), (
        q_THD,
        *caches,
        cu_seqlens(case.q_lens, DEVICE),
        paged.kv_lens_S,
        paged.block_table_SW,
    )


REGISTERED_CASE = dataclasses.replace(LEAK_CASE, q_lens=(1, 1, 5), kv_lens=(40, 9, 5), causal=True)


def test_registered_operations_pass_opcheck() -> None:
    write, attend = registered_arguments(REGISTERED_CASE)
    kv_cache_write(*write)
    offsets = attend[3]
    torch.library.opcheck(torch.ops.minigen.kv_cache_write.default, write)
    torch.library.opcheck(
        torch.ops.minigen.paged_attention.default,
        (*attend, None, [3, -1], 5.0, True, False, True),
    )
    torch.library.opcheck(
        torch.ops.minigen.varlen_attention.default,
        (attend[0], attend[0], attend[0], offsets, offsets, True, None, [3, -1], 5.0, False),
    )


def test_registered_operations_never_wait_for_the_gpu() -> None:
    write, attend = registered_arguments(REGISTERED_CASE)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        kv_cache_write(*write)
        paged_attention(*attend)
        varlen_attention(attend[0], attend[0], attend[0], attend[3], attend[3])
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_registered_operations_replay_in_a_graph_with_new_lengths() -> None:
    """Lengths live on the device: a captured step must follow them, not those of its capture."""
    write, attend = registered_arguments(REGISTERED_CASE)
    kv_cache_write(*write)
    paged_attention(*attend)  # compiles outside the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured_THD = paged_attention(*attend)
    for kv_lens in ((40, 9, 5), (17, 0, 5), (1, 8, 3)):
        attend[4].copy_(torch.tensor(kv_lens))
        graph.replay()
        assert torch.equal(captured_THD, paged_attention(*attend))


def test_registered_operations_validate_values_when_asked() -> None:
    _, (q_THD, k_cache, v_cache, offsets, kv_lens_S, table_SW) = registered_arguments(
        REGISTERED_CASE
    )
    caches = k_cache, v_cache
    wrong = cu_seqlens((1, 1, 6), DEVICE)
    with pytest.raises(ValueError, match="cu_seqlens_q must start at 0"):
        varlen_attention(q_THD, q_THD, q_THD, wrong, wrong, validate=True)
    with pytest.raises(ValueError, match="cu_seqlens_q must start at 0"):
        paged_attention(q_THD, *caches, wrong, kv_lens_S, table_SW, validate=True)
    with pytest.raises(ValueError, match=r"kv_lens\[0\] must be from 0"):
        paged_attention(q_THD, *caches, offsets, kv_lens_S + 2**20, table_SW, validate=True)
