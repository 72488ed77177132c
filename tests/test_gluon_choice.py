"""When attention over prompts runs in Gluon: by sizes, devices and layouts, without a GPU."""

import importlib
import runpy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from minigen.few_rows import TILED_ROWS, TILED_WIDTH
from minigen.kernels.checks import Window
from minigen.kernels.gluon_import import KNOWN_GLUON
from minigen.kernels.tile_linear_gluon import (
    MULTIPROCESSORS,
    GluonLinearTile,
    choose_parts,
    choose_rows_tile,
    sizes_of,
)
from minigen.kernels.tiles import HOPPER_SHARED_BYTES
from minigen.kernels.varlen_attention_gluon import (
    DEFAULT_TILE,
    SHORT_TILE,
    TILE_OF_64,
    choose_gluon_tile,
    fits_gluon,
    prefers_gluon,
    runs_gluon,
)
from tests.command_line import ROOT

gluon_module = importlib.import_module("minigen.kernels.varlen_attention_gluon")
paged_module = importlib.import_module("minigen.kernels.paged_attention")
varlen_module = importlib.import_module("minigen.kernels.varlen_attention")


def test_short_sequences_take_small_tiles() -> None:
    assert [choose_gluon_tile(n, 128) for n in (64, 298, 512, 1024)] == [SHORT_TILE] * 4
    assert [choose_gluon_tile(n, 128) for n in (1025, 4096, 16384)] == [DEFAULT_TILE] * 3
    assert choose_gluon_tile(512, 128, most_keys=512) == SHORT_TILE
    assert choose_gluon_tile(512, 128, most_keys=16384) == DEFAULT_TILE  # behind many keys
    assert choose_gluon_tile(1024, 64) == choose_gluon_tile(16384, 64) == TILE_OF_64


def test_few_queries_stay() -> None:
    assert [prefers_gluon(n, 128) for n in (1, 63, 64, 5000)] == [False, False, True, True]
    assert [prefers_gluon(n, 64) for n in (64, 1023, 1024, 5000)] == [False, False, True, True]


layers = st.tuples(*[st.integers(1, 4096).map(lambda n: 8 * n)] * 2)  # inputs and outputs


@pytest.mark.parametrize("num_rows", [1, 8, 9, 32, 64, 65, 128, 129, TILED_ROWS[1]])
@pytest.mark.parametrize("what", ["whole", "gated", "parts"])
@settings(max_examples=10)
@given(layers)
@example((TILED_WIDTH, TILED_WIDTH))
@example((14336, 4096))
@example((8, 8))
def test_linear_tiles_fit_and_their_parts_hold_all_inputs(
    num_rows: int, what: str, layer: tuple[int, int]
) -> None:
    """Of layers that `serves_tiles` lets through, and of wider ones."""
    num_inputs, num_outputs = layer
    parts = choose_parts(num_rows, *layer) if what == "parts" else 0
    tile = choose_rows_tile(num_rows, *layer, what == "gated", parts)
    activation = "silu" if what == "gated" else ""
    sizes = sizes_of(tile, *layer, parts or 1, True, parts > 0, activation)
    # Besides the tiles: a barrier of 8 bytes for each place.
    shared_bytes = sizes.shared_bytes + 8 * (sizes.x_stages + sizes.weight_stages)
    assert shared_bytes <= HOPPER_SHARED_BYTES
    assert (parts or 1) * sizes.chunks * sizes.block_e >= num_inputs
    assert max(parts - 1, 0) * sizes.chunks * sizes.block_e < num_inputs  # and none is empty
    # What a tensor core takes: 64 rows of weights at a time, and a multiple of 8 rows of x.
    assert sizes.block_g % 64 == 0
    assert tile.block_t % 8 == 0
    blocks = -(-num_rows // tile.block_t) * -(-num_outputs // tile.block_f)
    if num_rows <= 32 and blocks * max(parts, 1) > MULTIPROCESSORS:
        # Two programs share the 228 KB of a multiprocessor, 1 KB of which each takes besides.
        assert 2 * (shared_bytes + 1024) <= 228 * 1024


@pytest.mark.parametrize(
    ("num_rows", "layer", "parts"),
    [
        (1, (4096, 6144), 2),  # 96 blocks of outputs, of which 264 programs hold two
        (8, (4096, 4096), 4),  # 64
        (16, (14336, 4096), 4),
        (8, (3072, 1024), 6),  # four chunks each
        (64, (2048, 1024), 4),
        (65, (3072, 1024), 2),
        (256, (14336, 4096), 2),
        (1, (640, 64), 1),
        (128, (64, 64), 1),
    ],
)
def test_parts_are_for_two_programs_a_multiprocessor(
    num_rows: int, layer: tuple[int, int], parts: int
) -> None:
    assert choose_parts(num_rows, *layer) == parts


def test_linear_tiles_hold_what_there_is_room_for() -> None:
    """The layers of Llama-3.1-8B and of Qwen3-0.6B, for which they were timed."""
    # 448 programs, of which two share a multiprocessor, and 96 that have one each.
    assert choose_rows_tile(8, 4096, 14336, True, 0) == GluonLinearTile(8, 32, 128, 4, 6)
    assert choose_rows_tile(32, 4096, 14336, True, 0) == GluonLinearTile(32, 32, 128, 4, 4)
    assert choose_rows_tile(8, 1024, 3072, True, 0) == GluonLinearTile(8, 32, 128, 4, 8)
    assert choose_rows_tile(64, 1024, 3072, True, 0) == GluonLinearTile(64, 32, 128, 4, 8)
    assert choose_rows_tile(128, 1024, 4096, False, 0) == GluonLinearTile(128, 64, 128, 3, 7)
    assert choose_rows_tile(65, 2048, 1024, False, 2) == GluonLinearTile(64, 64, 128, 6, 6)
    assert choose_rows_tile(129, 1024, 3072, True, 0) == GluonLinearTile(128, 64, 64, 6, 7)


@pytest.mark.parametrize(("x_stages", "weight_stages"), [(1, 4), (4, 1)])
def test_a_linear_tile_holds_two_chunks(x_stages: int, weight_stages: int) -> None:
    tile = GluonLinearTile(64, 64, 128, x_stages, weight_stages)
    with pytest.raises(ValueError, match="two chunks"):
        sizes_of(tile, 1024, 64, 1, False, False, "")


@pytest.mark.parametrize("version", ["3.5.1", "3.60.0", "3.8.0", "4.0"])
def test_another_triton_has_no_known_gluon(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", version)
    assert not runpy.run_path(str(ROOT / "kernels" / "gluon_import.py"))["KNOWN_GLUON"]


@pytest.mark.skipif(not KNOWN_GLUON, reason="this Triton's Gluon was never tried")
@pytest.mark.parametrize(
    ("capability", "hip", "shared_kib", "runs"),
    [
        ((9, 0), None, 227, True),
        ((9, 0), "6.3", 64, False),
        ((9, 0), "6.3", 227, False),
        ((9, 0), None, 99, False),
        ((8, 0), None, 227, False),
        ((10, 0), None, 227, False),
        ((12, 0), None, 227, False),
    ],
)
def test_only_hopper_runs_gluon(
    capability: tuple[int, int],
    hip: str | None,
    shared_kib: int,
    runs: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    properties = SimpleNamespace(shared_memory_per_block_optin=shared_kib * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(gluon_module.triton.knobs.runtime, "interpret", False)
    asks: Any = runs_gluon
    assert asks.__wrapped__(torch.device("cuda", 0)) == runs  # not what it remembers
    assert not asks.__wrapped__(torch.device("cpu"))
    monkeypatch.setattr(gluon_module, "KNOWN_GLUON", False)
    assert not asks.__wrapped__(torch.device("cuda", 0))


def rows(
    heads: int, dim: int = 128, tokens: int = 5, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    return torch.zeros(tokens, heads, dim, dtype=dtype)


@pytest.mark.parametrize(
    ("q_THD", "k_TKD", "softcap", "fits"),
    [
        (rows(8), rows(2), 0.0, True),
        (rows(8, 64), rows(1, 64), 0.0, True),
        (rows(2, dtype=torch.float16), rows(2, dtype=torch.float16), 0.0, True),
        # Parts of one product, as the model makes them.
        (rows(12)[:, :8], rows(12)[:, 8:10], 0.0, True),
        (rows(8), rows(2), 30.0, False),
        (rows(8, 96), rows(2, 96), 0.0, False),
        (rows(6), rows(2), 0.0, False),  # a group that no tile's rows divide among
        (rows(16), rows(1), 0.0, False),  # a group that was not tried
        (rows(8, dtype=torch.float32), rows(2, dtype=torch.float32), 0.0, False),
        (rows(8), rows(2, tokens=0), 0.0, False),
        (rows(8), rows(4)[:, ::2], 0.0, False),  # keys of all heads are no row
        (rows(8), rows(2, 256)[..., ::2], 0.0, False),
        (rows(8), rows(1, 136)[..., 4:132], 0.0, False),  # begins at 8 bytes
        (rows(8, 132)[..., :128], rows(2), 0.0, False),
        (rows(8), rows(2, tokens=1).expand(5, 2, 128), 0.0, False),
    ],
)
def test_layouts_that_descriptors_do_not_take(
    q_THD: Tensor, k_TKD: Tensor, softcap: float, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not fits_gluon(q_THD, k_TKD, k_TKD, softcap)  # no GPU
    monkeypatch.setattr(gluon_module, "runs_gluon", lambda _: True)
    assert fits_gluon(q_THD, k_TKD, k_TKD, softcap) == fits


class Launches:
    """Stands for `paged_attention_kernel` and for `launch_gluon`: writes down what is launched."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*_: Any, QUERIES: str, IS_SPLIT: bool, **__: Any) -> None:
            self.seen.append("split" if IS_SPLIT and QUERIES == "many" else QUERIES)

        return launch

    def gluon(self, *_: Any, tile: Any, skips_one: bool, **__: Any) -> None:
        self.seen.append((tile, skips_one))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """As on a Hopper GPU with 264 places for programs."""
    launches = Launches()
    monkeypatch.setattr(gluon_module, "runs_gluon", lambda _: True)
    monkeypatch.setattr(paged_module, "resident_programs", lambda *_: 264)
    monkeypatch.setattr(paged_module, "launch_gluon", launches.gluon)
    monkeypatch.setattr(paged_module, "paged_attention_kernel", launches)
    monkeypatch.setattr(paged_module, "merge_splits_kernel", mock.MagicMock())
    return launches


@pytest.mark.parametrize(
    ("queries", "seqs", "width", "block_size", "expected"),
    [
        (8192, 16, 32, 16, [(SHORT_TILE, True), "one"]),
        (16384, 1, 1024, 16, [(DEFAULT_TILE, True)]),
        (8192, 2, 1024, 16, [(DEFAULT_TILE, True), "one"]),
        (2048, 32, 128, 16, [(SHORT_TILE, True), "one"]),
        (2016, 32, 128, 16, ["many", "one"]),  # 63 queries each
        (64, 64, 128, 16, ["guess one"]),
        (8192, 16, 16, 32, ["many", "one"]),  # blocks of 32 rows
        (128, 1, 1024, 16, ["split"]),
    ],
)
def test_the_launch_for_prompts_runs_in_gluon(
    queries: int, seqs: int, width: int, block_size: int, expected: list[Any], launches: Launches
) -> None:
    cache = torch.zeros(1, block_size, 8, 128, dtype=torch.bfloat16)
    step = torch.zeros(seqs + 1).int(), torch.zeros(seqs).int(), torch.zeros(seqs, width).int()
    tensors = rows(32, tokens=queries), cache, cache, *step
    options: Any = {"window": Window(None, 0), "scale": 1.0, "softcap": 0.0}
    paged_module.paged_attention_triton(*tensors, **options)
    assert launches.seen == expected
    launches.seen.clear()
    # A soft cap, or a split that is asked for, is the plain kernel's.
    paged_module.paged_attention_triton(*tensors, **options | {"softcap": 5.0})
    paged_module.paged_attention_triton(*tensors, **options, num_splits=1)
    assert not any(isinstance(what, tuple) for what in launches.seen)


def test_packed_prompts_run_in_gluon(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles: list[Any] = []

    def launch(*_: Any, tile: Any, tensor_descriptors: bool, **__: Any) -> None:
        tiles.append((tile, tensor_descriptors))

    monkeypatch.setattr(varlen_module, "varlen_attention_triton", launch)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(gluon_module, "runs_gluon", lambda _: True)
    monkeypatch.setattr(torch.version, "hip", None)

    def run(tokens: int, seqs: int, dim: int = 128) -> Any:
        q_THD, k_TKD = rows(8, dim, tokens), rows(2, dim, tokens)
        offsets = torch.zeros(seqs + 1).int()
        varlen_module._cuda(q_THD, k_TKD, k_TKD, offsets, offsets, True, None, (-1, -1), 0.0, False)
        return tiles.pop()

    assert run(2048, 4) == (SHORT_TILE, False)
    assert run(2048, 1) == (DEFAULT_TILE, False)
    assert run(2048, 33) == (None, False)
    assert run(5000, 1, dim=64) == (TILE_OF_64, False)
    assert run(5000, 8, dim=64)[0] is None
    monkeypatch.setattr(gluon_module, "runs_gluon", lambda _: False)
    assert run(2048, 4) == (None, True)


@pytest.mark.parametrize(("num_seqs", "num_stages"), [(32, 5), (64, 7), (128, 7), (256, 5)])
def test_decoding_has_a_third_tile_in_flight_where_that_gains(
    num_seqs: int, num_stages: int, monkeypatch
) -> None:
    launched = []
    monkeypatch.setattr(paged_module, "_launch", lambda *inputs: launched.append(inputs[-3]))
    monkeypatch.setattr(paged_module, "shared_bytes_of", lambda device: HOPPER_SHARED_BYTES)
    slots = {5: 396, 7: 264}
    monkeypatch.setattr(paged_module, "resident_programs", lambda tile, *_: slots[tile.num_stages])
    q_THD = torch.empty(num_seqs, 32, 128, dtype=torch.bfloat16)
    cache_NBKD = torch.empty(1, 16, 8, 128, dtype=torch.bfloat16)
    kv_lens_S = torch.zeros(num_seqs, dtype=torch.int32)
    table_SW = torch.zeros(num_seqs, 128, dtype=torch.int32)
    paged_module.paged_attention_triton(
        q_THD, cache_NBKD, cache_NBKD, torch.arange(num_seqs + 1).int(), kv_lens_S, table_SW,
        window=Window(None, 0), scale=0.1, softcap=0.0,
    )  # fmt: skip
    (tile,) = launched
    assert tile.num_stages == num_stages
