"""The step loop: whoever shares the batch, a request's output is the one it has alone."""

import contextlib
import functools
import gc
import json
import random
import re
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models
from torch.utils._python_dispatch import TorchDispatchMode

from minigen import LLM, SamplingParams
from minigen import runner as runner_module
from minigen.cache import BlockPool
from minigen.engine import Engine
from minigen.few_rows import (
    MAX_ROWS,
    TILED_ROWS,
    TILED_WIDTH,
    WIDE_ROWS,
    serves_few_rows,
    serves_tiles,
)
from minigen.graphs import HIDDEN, CaptureError, StepGraphs, bucket_sizes
from minigen.kernels import native
from minigen.kernels.few_rows_linear import PLAIN_ROWS
from minigen.kernels.paged_attention import choose_num_splits
from minigen.kernels.tiles import choose_tile
from minigen.kernels.varlen_attention_gluon import (
    DEFAULT_TILE,
    SHORT_TILE,
    choose_gluon_tile,
    prefers_gluon,
)
from minigen.model import Block, Decoder, DecoderConfig
from minigen.runner import COMPILE_MODES, Runner, guards_beside_model, kinds_of_layers
from minigen.sampling_rows import SamplingTensors
from minigen.scheduler import Scheduler
from minigen.step import StepSize
from minigen.weights.chat_template import ChatTemplates
from minigen.weights.tokenizer import Tokenizer
from tests.reference_models import BY_NAME

VOCAB = 61
LIMIT = 48
TINY = {
    "model_type": "qwen3",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": LIMIT,
}
LONG_ROPE = {
    **TINY,
    "model_type": "phi3",
    "hidden_size": 64,
    "original_max_position_embeddings": 20,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [2.0 + 0.5 * i for i in range(8)],
    },
}


@functools.cache
def decoder(long_rope: bool = False) -> Decoder:
    hf = LONG_ROPE if long_rope else TINY
    model = Decoder.from_config(DecoderConfig.from_hf(hf), dtype=torch.float32, seed=3)
    # Wide enough that the next tokens depend on what stands before.
    for name, parameter in model.named_parameters():
        if not name.endswith("norm.weight"):
            parameter.mul_(10)
    return model


def engine(
    num_blocks: int = 64,
    block_size: int = 4,
    max_num_seqs: int = 8,
    budget: int = 64,
    caching: bool = True,
    long_rope: bool = False,
    overlap: bool = False,
    decode_graphs: bool = False,
    tokenizer: Tokenizer | None = None,
) -> Engine:
    model = decoder(long_rope)
    runner = Runner(
        model,
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        compile="eager",
        decode_graphs=decode_graphs,
    )
    pool = BlockPool(num_blocks, block_size, caching)
    scheduler = Scheduler(pool, max_num_seqs, budget, model.config.rope_switch)
    return Engine(runner, scheduler, tokenizer, [0], LIMIT, overlap=overlap)


@functools.cache
def letters(last: str = "}") -> Tokenizer:
    """A letter for each token, with a space before every second one, which no text begins with."""
    vocab = {("" if i % 2 else "▁") + chr(ord("A") + i): i for i in range(VOCAB - 1)}
    vocab[last] = VOCAB - 1
    backend = Backend(models.BPE(vocab, []))
    backend.decoder = decoders.Metaspace()
    return Tokenizer(backend, {}, ChatTemplates({}, {}, Path()))


def run(
    made: Engine, prompts: list[list[int]], params: list[SamplingParams]
) -> list[list[list[int]]]:
    for i, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
        made.add_request(str(i), prompt, one)
    done: dict[str, list[list[int]]] = {}
    while made.has_unfinished():
        for output in made.step():
            if output.finished:
                done[output.request_id] = [o.token_ids for o in output.outputs]
    return [done[str(i)] for i in range(len(prompts))]


def greedy(model: Decoder, prompt: list[int], count: int) -> list[int]:
    """The oracle: the whole text through the decoder for every token."""
    ids = list(prompt)
    for _ in range(count):
        offsets = torch.tensor([0, len(ids)])
        jagged = torch.nested.nested_tensor_from_jagged(torch.tensor(ids), offsets)
        ids.append(int(model(jagged).values()[-1].argmax()))
    return ids[len(prompt) :]


prompts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30)


@given(
    st.lists(prompts, min_size=1, max_size=5),
    st.sampled_from([3, 4, 7, 64]),
    st.sampled_from([1, 3, 4]),
    st.booleans(),
    st.booleans(),
)
def test_greedy_equals_recomputing_everything(
    many: list[list[int]], budget: int, block_size: int, caching: bool, long_rope: bool
) -> None:
    made = engine(-(-LIMIT // block_size) + 2, block_size, 3, budget, caching, long_rope)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    expected = [[greedy(decoder(long_rope), prompt, 12)] for prompt in many]
    assert run(made, many, [params] * len(many)) == expected


@given(prompts, st.integers(0, 2**32), st.data())
def test_seeded_draws_do_not_depend_on_neighbours(
    mine: list[int], seed: int, data: st.DataObject
) -> None:
    params = SamplingParams(seed=seed, n=2, max_tokens=8, ignore_eos=True, top_k=20)
    others = data.draw(st.lists(prompts, max_size=4))
    place = data.draw(st.integers(0, len(others)))
    alone = run(engine(), [mine], [params])[0]
    filler = [SamplingParams(max_tokens=5, top_p=0.9)] * len(others)
    many = [*others[:place], mine, *others[place:]]
    beside = run(engine(), many, [*filler[:place], params, *filler[place:]])[place]
    assert beside == alone
    assert alone[0] != alone[1] or len(set(alone[0])) == 1


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 9, 16, 17])
def test_steps_of_fixed_sizes_draw_the_same(count: int) -> None:
    """Batches at the captured sizes and one beside them, greedy rows and others together."""
    many = [[1 + i, 2, 3][: 1 + i % 3] for i in range(count)]
    params = [
        SamplingParams(temperature=float(i % 2), seed=i, max_tokens=3 + i % 5, ignore_eos=True)
        for i in range(count)
    ]
    # A step in flight: what a null row wrote into my row would be my next token.
    fixed = engine(num_blocks=128, max_num_seqs=17, overlap=True, decode_graphs=True)
    replayed = []
    graphs = fixed.runner._graphs
    assert graphs is not None
    run_graph = graphs.run

    def watched(size, sampling, head):
        if head != HIDDEN:
            replayed.append(size.num_rows)
        return run_graph(size, sampling, head)

    fixed.runner.serve_by(replay=watched)
    found = run(fixed, many, params)
    assert found == run(engine(num_blocks=128, max_num_seqs=17), many, params)
    assert replayed
    assert set(replayed) <= {2, 4, 8, 16, 17}
    assert max(replayed) == next(size for size in (2, 4, 8, 16, 17) if size >= count)


def test_a_step_that_cannot_be_captured_is_launched() -> None:
    made, params = engine(decode_graphs=True), SamplingParams(temperature=0, max_tokens=5)
    graphs = made.runner._graphs
    assert graphs is not None

    def buffers(size, head) -> NoReturn:
        raise CaptureError("no memory\nand more about it")

    graphs.buffers = buffers
    with pytest.warns(UserWarning, match="one kernel after the other: no memory$"):
        found = run(made, [[1, 2, 3]], [params])
    assert found == run(engine(), [[1, 2, 3]], [params])


def test_a_captured_step_keeps_its_own_draw(monkeypatch) -> None:
    """The row of the next token is written once, by the step itself or by the draw behind it."""
    made = engine(decode_graphs=True, overlap=True)
    call, row_data = made.runner._captured_call, made.runner.last_tokens_M.data_ptr()
    written: list[object] = []

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.index_put_.default and args[0].data_ptr() == row_data:
                written.append(func)
            return func(*args, **(kwargs or {}))

    steps: list[str] = []
    assert made.runner._graphs is not None

    def counted(step, sampling, head):
        if head != HIDDEN:
            steps.append(head)
        return call(step, sampling, head)

    monkeypatch.setattr(made.runner._graphs, "_call", counted)
    for params in (
        SamplingParams(temperature=0, max_tokens=6),
        SamplingParams(seed=1, top_k=3, max_tokens=6),  # drawn uncompiled, behind the graph
    ):
        written.clear()
        steps.clear()
        with Watched():
            found = run(made, [[1, 2, 3]], [params])
        assert found == run(engine(), [[1, 2, 3]], [params])
        assert steps
        assert len(written) == 1 + len(steps)  # and the prompt's, which is no decode step


@pytest.mark.parametrize("long_rope", [False, True])
def test_the_fused_operator_changes_nothing(long_rope: bool, monkeypatch) -> None:
    """Norms, rope and cache write in one operator, as on a GPU."""
    many = [list(range(1, 1 + n)) for n in (1, 9, 17, 23)]
    params = [SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)] * len(many)
    expected = run(engine(long_rope=long_rope), many, params)
    asked = []
    monkeypatch.setattr(
        "minigen.model.fuses_rope", lambda qkv_TXD, _: asked.append(qkv_TXD) or True
    )
    assert run(engine(long_rope=long_rope), many, params) == expected
    assert asked


def test_heads_take_no_other_numbers_of_rows_than_captured_steps_have(monkeypatch) -> None:
    """A matrix product of another number of rows may want a kernel that is not loaded."""
    options = {"max_num_seqs": 13, "caching": False}
    made = engine(**options, decode_graphs=True)
    runner = made.runner
    assert runner._graphs is not None
    head, launch = runner._head, runner.launch
    taken, sampled = [], []

    def take(hidden_TE, last_R, *rest):
        taken.append(len(last_R))
        return head(hidden_TE, last_R, *rest)

    def start(chunks, *rest):
        sampled.append(sum(chunk.samples for chunk in chunks))
        return launch(chunks, *rest)

    runner.serve_by(head=take)
    monkeypatch.setattr(runner, "launch", start)
    many = [list(range(1, 1 + n)) for n in range(3, 16)]  # 117 tokens, of which a step takes 64
    params = [SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)] * len(many)
    assert run(made, many, params) == run(engine(**options), many, params)
    sizes = set(runner._graphs.sizes)
    assert set(taken) <= sizes
    assert not set(sampled) <= sizes


@pytest.mark.parametrize("long_rope", [False, True])
def test_few_rows_give_what_the_layer_gives(long_rope: bool, monkeypatch) -> None:
    many = [list(range(1, 1 + n)) for n in (1, 9, 17, 23)]
    params = [SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)] * len(many)
    expected = run(engine(long_rope=long_rope), many, params)
    served = []

    def serves(config, num_rows, device, dtype) -> bool:
        few = serves_few_rows(config, num_rows, torch.device("cuda"), dtype)
        served.append(few)
        return few

    monkeypatch.setattr("minigen.runner.serves_few_rows", serves)
    made = engine(long_rope=long_rope, decode_graphs=True)
    made.runner.serve_by(hidden=made.runner._hidden_by_layer)
    assert run(made, many, params) == expected
    assert {True, False} == set(served)


@pytest.mark.parametrize("tiled", [False, True])
def test_one_sequence_is_computed_without_a_null_token(tiled: bool, monkeypatch) -> None:
    many = [[1, 2, 3], list(range(1, 18))]
    params = [SamplingParams(temperature=t, max_tokens=n) for t, n in ((0, 20), (1, 6))]
    expected = run(engine(), many, params)
    rows: list[int] = []

    def watch(name: str) -> None:
        layer = getattr(runner_module, name)

        def watched(block, x_TE, *inputs):
            rows.append(len(x_TE))
            return layer(block, x_TE, *inputs)

        monkeypatch.setattr(runner_module, name, watched)

    watch("tiled_layer" if tiled else "few_rows_layer")
    monkeypatch.setattr("minigen.few_rows.choose_parts", lambda *sizes: 2)
    name = "serves_tiles" if tiled else "serves_few_rows"
    monkeypatch.setattr(runner_module, name, lambda config, num_rows, *_: num_rows <= 2)
    monkeypatch.setattr(Runner, "_computes_one_row", True)
    made = engine(decode_graphs=True)
    made.runner.serve_by(hidden=made.runner._hidden_by_layer)
    assert run(made, many, params) == expected
    assert set(rows) == {1, 2}
    assert rows[-1] == 1  # the longer reply's last steps


@pytest.mark.parametrize("long_rope", [False, True])
def test_tiled_rows_give_what_the_layer_gives(long_rope: bool, monkeypatch) -> None:
    """And what the compiled layer gives, which here serves the steps at both ends."""
    many = [list(range(1, 1 + n)) for n in range(1, 20)]
    counts = [12, *(4 + n % 5 for n in range(18))]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in counts]
    expected = run(engine(long_rope=long_rope, max_num_seqs=19), many, params)
    served = []

    def serves(config, num_rows, device, dtype) -> bool:
        tiled = serves_tiles(config, num_rows, torch.device("cuda"), torch.bfloat16)
        served.append(tiled)
        return tiled

    divided: dict[tuple[int, ...], set[int]] = {}

    def choose(num_rows: int, num_inputs: int, num_outputs: int) -> int:
        divided.setdefault((num_inputs, num_outputs), set()).add(num_rows)
        return 3

    monkeypatch.setattr("minigen.few_rows.runs_gluon", lambda device: True)
    monkeypatch.setattr("minigen.few_rows.TILED_ROWS", (3, 16))
    monkeypatch.setattr("minigen.few_rows.QKV_PARTS_ROWS", 8)
    monkeypatch.setattr("minigen.few_rows.choose_parts", choose)
    monkeypatch.setattr("minigen.runner.serves_tiles", serves)
    made = engine(long_rope=long_rope, max_num_seqs=19, decode_graphs=True)
    made.runner.serve_by(hidden=made.runner._hidden_by_layer)
    assert run(made, many, params) == expected
    assert {True, False} == set(served)
    block = made.runner.model.blocks[0]
    assert isinstance(block, Block)
    qkv, out, down = (
        tuple(reversed(linear.weight.shape))
        for linear in (block.attention.qkv_proj, block.attention.o_proj, block.mlp.down_proj)
    )
    assert set(divided) == {qkv, out, down}
    assert max(divided[qkv]) <= 8 < max(divided[out])
    assert divided[out] == divided[down]


def test_tiles_are_for_models_whose_layer_it_is(monkeypatch) -> None:
    cuda, config = torch.device("cuda"), decoder().config
    half = torch.bfloat16
    monkeypatch.setattr("minigen.few_rows.runs_gluon", lambda device: False)
    assert not serves_tiles(config, 32, cuda, half)
    monkeypatch.setattr("minigen.few_rows.runs_gluon", lambda device: True)
    wide = replace(config, intermediate_size=TILED_WIDTH + 8)
    widest = replace(config, intermediate_size=TILED_WIDTH)
    for shape, (least, most) in ((config, TILED_ROWS), (widest, TILED_ROWS), (wide, WIDE_ROWS)):
        for num_rows in (least - 1, least, most, most + 1):
            serves = least <= num_rows <= most
            assert serves_tiles(shape, num_rows, cuda, half) is serves
    assert not serves_tiles(config, 32, torch.device("cpu"), half)
    assert not serves_tiles(config, 32, cuda, torch.float32)
    for change in ({"activation": "gelu"}, {"post_norms": True}):
        assert not serves_tiles(replace(config, **change), 32, cuda, half)
    assert not serves_tiles(replace(config, hidden_size=44), 32, cuda, half)


def test_few_rows_are_for_models_whose_layer_it_is() -> None:
    cuda, config = torch.device("cuda"), decoder().config
    for dtype, most in ((torch.float32, PLAIN_ROWS), (torch.bfloat16, MAX_ROWS)):
        assert serves_few_rows(config, most, cuda, dtype)
        assert not serves_few_rows(config, most + 1, cuda, dtype)
        assert not serves_few_rows(config, 1, torch.device("cpu"), dtype)
    assert not serves_few_rows(replace(config, intermediate_size=5000), 8, cuda, torch.bfloat16)
    for change in ({"activation": "gelu"}, {"post_norms": True}, {"intermediate_size": 20000}):
        assert not serves_few_rows(replace(config, **change), 1, cuda, torch.bfloat16)


class FakeStream:
    def __init__(self, device: object = None) -> None:
        self.waited: list[object] = []

    def wait_stream(self, other: object) -> None:
        self.waited.append(other)


class FakeCuda:
    """In place of torch's CUDA graphs; `fails` ends a capture as torch ends one that went wrong,
    which the call in it may have noticed before."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, fails: bool = False, fails_early: bool = False
    ) -> None:
        self.captures: list[tuple[object, object]] = []  # pool and stream of each
        self.calls: list[bool] = []  # whether a capture was under way
        self.streams_set: list[object] = []  # those that are current now
        self.capturing, self.fails, self.fails_early = False, fails, fails_early
        self.main = FakeStream()
        for name, fake in {
            "Stream": FakeStream,
            "CUDAGraph": lambda: self,
            "graph_pool_handle": object,
            "current_stream": lambda device: self.main,
            "stream": self.stream,
        }.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        zeros = torch.zeros
        monkeypatch.setattr(torch, "zeros", lambda n, dtype, **options: zeros(n, dtype=dtype))

    @contextlib.contextmanager
    def stream(self, stream) -> Iterator[None]:
        self.streams_set.append(stream)
        try:
            yield
        finally:
            self.streams_set.pop()

    def capture_begin(self, pool, capture_error_mode) -> None:
        self.captures.append((pool, self.streams_set[-1]))
        self.capturing = True

    def capture_end(self) -> None:
        assert self.capturing
        self.capturing = False
        if self.fails:
            raise RuntimeError("the end")

    def graphs(self) -> StepGraphs:
        def call(step, sampling, head) -> torch.Tensor:
            assert self.capturing
            self.calls.append(self.capturing)
            if self.fails_early:
                raise RuntimeError("the call")
            return step.rows_R

        def warm_up(step, sampling, head) -> torch.Tensor:
            assert not self.capturing
            self.calls.append(self.capturing)
            return step.rows_R

        return StepGraphs(
            call,
            warm_up,
            lambda num_rows, head, into: SamplingTensors.from_rows([], 5, "cpu"),
            lambda into, size: None,
            max_num_seqs=9,
            max_num_tokens=70,
            max_num_blocks=2560,
            device=torch.device("cuda"),
        )


def test_graphs_are_captured_on_one_stream_after_a_warm_up(monkeypatch) -> None:
    """Else they would not share the memory of their pool."""
    cuda = FakeCuda(monkeypatch)
    graphs = cuda.graphs()
    sizes = list(graphs.capture_all(("greedy", "plain")))
    prompts = [(tokens, seqs, seqs, 256) for tokens in (70, 64) for seqs in (10, 8)]
    decodes = [(rows, rows, rows, 256) for rows in (9, 8, 4, 2) for _ in ("greedy", "plain")]
    assert sizes == [StepSize(*size) for size in prompts + decodes]
    assert len(cuda.captures) == len(sizes) == graphs.num_usual(2)
    assert len(set(cuda.captures)) == 1
    assert cuda.calls == [False, True] * len(sizes)
    assert not cuda.streams_set


@pytest.mark.parametrize("early", [False, True])
def test_a_failed_capture_ends_and_says_why(early: bool, monkeypatch) -> None:
    cuda = FakeCuda(monkeypatch, fails=True, fails_early=early)
    graphs = cuda.graphs()
    with pytest.raises(CaptureError, match="the call" if early else "the end"):
        graphs.buffers(graphs.size_for(1, 1), "greedy")
    assert not cuda.capturing
    assert not cuda.streams_set
    # What the warm-up reads is given to nobody before it has ended.
    assert cuda.main.waited == [graphs._stream]


def test_a_warm_up_launches_what_the_step_does(monkeypatch) -> None:
    """Each layer whose window or rope differs, and a layer behind another."""
    hf = {**TINY, "num_hidden_layers": 6, "use_sliding_window": True, "sliding_window": 8,
          "max_window_layers": 3}  # fmt: skip
    model = Decoder.from_config(DecoderConfig.from_hf(hf), seed=3)
    made = Runner(model, num_blocks=31, block_size=4, max_num_seqs=4, max_num_batched_tokens=64,
                  decode_graphs=True)  # fmt: skip
    made.serve_by(hidden=made._hidden_by_layer)
    step = made._null_step(StepSize(num_tokens=4, num_seqs=4, num_rows=4, width=4))
    sampling = made._null_sampling(4, "greedy", None)
    layer, head, ran, heads = made._layer, made._head, [], []
    monkeypatch.setattr(
        made, "_layer", lambda block, *inputs: ran.append(block) or layer(block, *inputs)
    )
    made.serve_by(head=lambda *inputs: heads.append(inputs[2]) or head(*inputs))
    for call, layers in ((made._captured_call, range(6)), (made._warm_up_call, (0, 3, 5))):
        ran.clear()
        call(step, sampling, "greedy")
        assert ran == [model.blocks[i] for i in layers]
    assert heads == ["greedy"] * 2


def test_layers_of_one_kind_are_known_by_windows_and_rope() -> None:
    config = decoder().config

    def kinds(windows: tuple[int, ...], rope: tuple[bool, ...]) -> list[int]:
        return kinds_of_layers(replace(config, layer_windows=windows, layer_rope=rope))

    assert kinds((0,), (True,)) == [0]
    assert kinds((0,) * 5, (True,) * 5) == [0, 4]
    assert kinds((8, 0, 8, 0), (True,) * 4) == [0, 1, 3]
    assert kinds((0,) * 6, (True, True, False) * 2) == [0, 2, 5]


@given(st.integers(1, 5000), st.integers(1, 5000), st.data())
def test_no_captured_table_is_wider_than_what_is_compiled(
    num_blocks: int, max_length: int, data: st.DataObject
) -> None:
    model = SimpleNamespace(max_length=max_length)
    longest = min(num_blocks, -(-max_length // 16))
    none: Any = None
    graphs = StepGraphs(none, none, none, none, 8, 64, longest, torch.device("cpu"))
    has = data.draw(st.integers(1, longest))
    width = graphs.size_for(1, has).width
    assert has <= width == graphs.prompt_size_for(9, 1, has).width
    runner: Any = SimpleNamespace(num_blocks=num_blocks, model=model)
    assert width <= Runner._most_blocks.fget(runner)  # pyright: ignore[reportOptionalCall]


@pytest.mark.parametrize("group", [1, 2, 4, 8])
def test_every_tile_of_attention_is_loaded_before_requests_come(group: int) -> None:
    """By the choices of `paged_attention` for 8 key/value heads of 128 on 132 multiprocessors."""
    runner = engine().runner
    runner.num_blocks, runner.max_tokens = 4096, 8192
    chosen = set()
    in_gluon = set()

    def hidden(tokens_T, rows_T, positions_T, slots_T, cu_seqlens_S1, kv_lens_S, table_SW) -> None:
        assert not kv_lens_S.any()
        assert (slots_T == -1).all()
        tokens, (seqs, width) = len(tokens_T), table_SW.shape
        assert tokens <= runner.max_tokens
        tile = choose_tile(-(-tokens // seqs), group, 128, 2, 227 * 1024, paged=True)
        programs = max(tokens // tile.block_q, seqs) * 8
        splits = choose_num_splits(programs, -(-width * 16 // tile.block_n), 264)
        chosen.add((tile.block_m, splits > 1))
        if prefers_gluon(-(-tokens // seqs), 128) and splits == 1:
            in_gluon.add(choose_gluon_tile(-(-tokens // seqs), 128, width * 16))

    runner._load_kernels(hidden)  # pyright: ignore[reportArgumentType]
    assert chosen == {(m, split) for m in (16, 32, 64, 128) for split in (False, True)}
    assert in_gluon == {SHORT_TILE, DEFAULT_TILE}
    chosen.clear()
    runner.max_tokens = 256
    runner._load_kernels(hidden)  # pyright: ignore[reportArgumentType]
    assert chosen


@pytest.mark.parametrize("max_tokens", [2048, 2050, 8192])
def test_the_tile_for_heads_of_64_is_loaded_where_a_step_may_want_it(max_tokens: int) -> None:
    runner = engine().runner
    runner.num_blocks, runner.max_tokens = 4096, max_tokens
    loaded = set()

    def hidden(tokens_T, *inputs) -> None:
        assert len(tokens_T) <= max_tokens
        loaded.add(prefers_gluon(len(tokens_T) // 2, 64))

    runner._load_kernels(hidden)  # pyright: ignore[reportArgumentType]
    assert True in loaded


@pytest.mark.parametrize("mode", COMPILE_MODES)
def test_the_head_gets_no_memory_of_torchs_graphs(mode: str) -> None:
    """Where torch captures graphs, one's outputs are gone when the next compiled call begins."""
    made = engine()
    made.runner.compile = mode
    hidden, head, given = made.runner._hidden, made.runner._head, []

    def watched_hidden(*inputs):
        given.append(hidden(*inputs))
        return given[-1]

    def watched_head(hidden_TE, *inputs):
        same = hidden_TE.data_ptr() == given[-1].data_ptr()
        assert same == (mode not in ("reduce-overhead", "max-autotune"))
        return head(hidden_TE, *inputs)

    made.runner.serve_by(watched_hidden, watched_head)
    params = SamplingParams(temperature=0, max_tokens=4)
    assert run(made, [[1, 2, 3]], [params]) == run(engine(), [[1, 2, 3]], [params])
    assert given


@given(st.integers(1, 2100), st.sampled_from([1, 2]))
def test_every_batch_has_a_size(max_num_seqs: int, least: int) -> None:
    sizes = bucket_sizes(max_num_seqs, least)
    assert sizes == sorted(set(sizes))
    assert sizes[0] == least
    assert sizes[-1] == max(least, max_num_seqs)


class StepLoop(RuleBasedStateMachine):
    """Requests come, run, share prefixes and leave, in a cache too small for all.

    With `overlap` a step is in flight whenever anything happens, as on a GPU.
    """

    @initialize(
        block_size=st.sampled_from([1, 4]),
        budget=st.sampled_from([3, 8, 64]),
        caching=st.booleans(),
        long_rope=st.booleans(),
        overlap=st.booleans(),
        decode_graphs=st.booleans(),
    )
    def start(
        self,
        block_size: int,
        budget: int,
        caching: bool,
        long_rope: bool,
        overlap: bool,
        decode_graphs: bool,
    ) -> None:
        self.num_blocks = LIMIT // block_size + 3
        self.long_rope = long_rope
        self.engine = engine(
            self.num_blocks, block_size, 3, budget, caching, long_rope, overlap, decode_graphs
        )
        self.wanted: dict[str, tuple[list[int], SamplingParams]] = {}
        self.finished: dict[str, list[list[int]]] = {}
        self.count = 0

    @rule(
        prefix=st.integers(0, 2),
        tail=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=8),
        max_tokens=st.integers(1, 14),
        temperature=st.sampled_from([0.0, 1.0]),
        seed=st.integers(0, 99),
        ignore_eos=st.booleans(),
        penalty=st.sampled_from([1.0, 1.3]),
        min_tokens=st.sampled_from([0, 1, 5]),
    )
    def add(
        self,
        prefix: int,
        tail: list[int],
        max_tokens: int,
        temperature: float,
        seed: int,
        ignore_eos: bool,
        penalty: float,
        min_tokens: int,
    ) -> None:
        shared = random.Random(prefix).choices(range(VOCAB), k=11 * prefix)
        params = SamplingParams(
            temperature=temperature,
            seed=seed,
            max_tokens=max_tokens,
            min_tokens=min(min_tokens, max_tokens),
            repetition_penalty=penalty,
            stop_token_ids=list(range(1, 12)),  # with eos, a fifth of the vocabulary
            ignore_eos=ignore_eos,
            n=1 if temperature == 0 else 2,
        )
        name, self.count = f"r{self.count}", self.count + 1
        self.engine.add_request(name, [*shared, *tail], params)
        self.wanted[name] = ([*shared, *tail], params)

    @rule(times=st.integers(1, 4))
    def step(self, times: int) -> None:
        for _ in range(times):
            for output in self.engine.step():
                if output.finished:
                    assert output.request_id not in self.finished, "a request ended twice"
                    assert output.request_id in self.wanted, "an aborted request went on"
                    self.finished[output.request_id] = [o.token_ids for o in output.outputs]

    @rule()
    def step_that_fails(self) -> None:
        launch = self.engine.runner.launch

        def broken(*_: object) -> None:
            raise MemoryError

        self.engine.runner.launch = broken  # pyright: ignore[reportAttributeAccessIssue]
        try:
            self.step(1)
        except MemoryError:
            pass
        finally:
            self.engine.runner.launch = launch

    @precondition(lambda self: self.wanted.keys() - self.finished.keys())
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.wanted.keys() - self.finished.keys())))
        self.engine.abort(name)
        del self.wanted[name]
        with pytest.raises(ValueError, match=name):
            self.engine.abort(name)

    @invariant()
    def blocks_add_up(self) -> None:
        if not hasattr(self, "engine"):
            return
        scheduler = self.engine.scheduler
        held: dict[int, int] = {}
        for sequence in scheduler.running:
            for block in sequence.blocks:
                held[block] = held.get(block, 0) + 1
            # What is still written to belongs to one sequence.
            for block in sequence.blocks[sequence.num_computed // scheduler.pool.block_size :]:
                assert sum(block in other.blocks for other in scheduler.running) == 1
        pool = scheduler.pool
        assert len(held) == pool.num_used
        assert pool.num_used + pool.num_available == self.num_blocks
        assert all(not sequence.blocks for sequence in scheduler.waiting)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(4000):
            if not self.engine.has_unfinished():
                break
            self.step(1)
        assert not self.engine.has_unfinished(), "the loop does not end"
        assert self.finished.keys() == self.wanted.keys()
        assert self.engine.scheduler.pool.num_used == 0
        for name, (prompt, params) in self.wanted.items():
            alone = engine(long_rope=self.long_rope)
            assert self.finished[name] == run(alone, [prompt], [params])[0]


TestStepLoop = StepLoop.TestCase


@pytest.mark.parametrize("steps_before", [0, 1, 3])
def test_a_failed_step_loses_no_request(steps_before: int) -> None:
    prompt = list(range(1, 20))
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    made = engine()
    made.add_request("a", prompt, params)
    for _ in range(steps_before):
        made.step()
    launch, made.runner.launch = made.runner.launch, None  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError):
        made.step()
    made.runner.launch = launch
    while made.has_unfinished():
        outputs = made.step()
    assert outputs[0].outputs[0].token_ids == greedy(decoder(), prompt, 8)


@pytest.mark.parametrize("abort", [False, True])
def test_a_step_that_fails_late_still_reports_who_finished(monkeypatch, abort: bool) -> None:
    made = engine()
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    made.add_request("first", [1, 2, 3], params)
    made.add_request("second", [4, 5, 6], params)
    take, calls = Engine._take_token, []

    def fail_once(self, sample, token):
        calls.append(token)
        if len(calls) == 2:
            raise MemoryError
        take(self, sample, token)

    monkeypatch.setattr(Engine, "_take_token", fail_once)
    with pytest.raises(MemoryError):
        made.step()
    if abort:
        made.abort("first")
    found = {}
    for _ in range(10):
        found.update({o.request_id: o.outputs[0].token_ids for o in made.step() if o.finished})
    assert not made.has_unfinished()
    expected = {} if abort else {"first": greedy(decoder(), [1, 2, 3], 1)}
    assert found == {**expected, "second": greedy(decoder(), [4, 5, 6], 1)}


def test_steps_run_while_another_thread_traces(monkeypatch) -> None:
    # torch keeps this flag for the whole process; chat answers uncompiled while a thread compiles.
    flag = "torch.fx._symbolic_trace._is_fx_tracing_flag"
    monkeypatch.setattr(flag, True, raising=False)
    monkeypatch.setattr("torch.compiler._is_compiling_flag", True, raising=False)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    tokens = run(engine(), [[5, 6, 7]], [params])
    monkeypatch.undo()
    assert tokens == [[greedy(decoder(), [5, 6, 7], 4)]]


def test_prefixes_are_reused_and_counted() -> None:
    made, prompt = engine(), list(range(1, 24))
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    first = run(made, [prompt], [params])
    made.add_request("again", [*prompt, *first[0][0], 5], params)
    outputs = []
    while made.has_unfinished():
        outputs = made.step()
    assert outputs[0].metrics.num_cached_tokens == 24
    assert outputs[0].outputs[0].token_ids == greedy(decoder(), [*prompt, *first[0][0], 5], 4)


def test_prompt_log_probabilities_equal_the_decoders() -> None:
    made, prompt = engine(budget=8), list(range(1, 30))
    made.add_request("a", prompt, SamplingParams(max_tokens=1, prompt_logprobs=3))
    made.add_scoring("b", prompt)
    found = {}
    while made.has_unfinished():
        found.update({o.request_id: o for o in made.step() if o.finished})
    jagged = torch.nested.nested_tensor_from_jagged(torch.tensor(prompt), torch.tensor([0, 29]))
    expected = decoder()(jagged).values().log_softmax(-1)
    for output in found.values():
        assert output.prompt_logprobs[0] is None
        for at in range(1, len(prompt)):
            entry = output.prompt_logprobs[at][prompt[at]]
            assert entry.logprob == pytest.approx(float(expected[at - 1, prompt[at]]), abs=1e-4)
            assert entry.rank == 1 + int((expected[at - 1] > expected[at - 1, prompt[at]]).sum())
    assert len(found["a"].prompt_logprobs[5]) in (3, 4)
    assert found["b"].outputs[0].token_ids == []


@pytest.mark.parametrize(
    ("prompt", "params", "says"),
    [
        ([], {}, "empty"),
        ([1, VOCAB], {}, "vocabulary"),
        ([1, -1], {}, "vocabulary"),
        ([1, "a"], {}, "integer"),
        ([1] * LIMIT, {}, "at most 47"),
        ("text", {}, "no tokenizer"),
        ([1], {"stop": "x"}, "tokenizer"),
        ([1, True], {}, "integer"),
        ([1, 2.0], {}, "integer"),
        (torch.tensor([1.0]), {}, "integer"),
        (np.array([True]), {}, "integer"),
        ([torch.tensor(True)], {}, "integer"),
        ({"prompt": "x"}, {}, "a text or token ids, not dict"),
        (b"ab", {}, "a text or token ids, not bytes"),
        (3, {}, "a text or token ids, not int"),
        ([1], {"logit_bias": {VOCAB: 1.0}}, "vocabulary|logit_bias"),
    ],
)
def test_bad_requests_are_refused_and_harm_nobody(prompt: object, params: dict, says: str) -> None:
    made = engine()
    with pytest.raises(ValueError, match=says):
        made.add_request("a", prompt, SamplingParams(**params))  # pyright: ignore[reportArgumentType]
    assert not made.has_unfinished()
    with pytest.raises(ValueError, match="params must be SamplingParams, not dict"):
        made.add_request("a", [1], {"temperature": 0})  # pyright: ignore[reportArgumentType]
    made.add_request("a", [1], SamplingParams())
    with pytest.raises(ValueError, match="in use"):
        made.add_request("a", [1], SamplingParams())


def logits_after(ids: list[int]) -> torch.Tensor:
    """The oracle's logits for the token that follows."""
    offsets = torch.tensor([0, len(ids)])
    jagged = torch.nested.nested_tensor_from_jagged(torch.tensor(ids), offsets)
    return decoder()(jagged).values()[-1]


def edited_greedy(prompt: list[int], params: SamplingParams) -> list[int]:
    """The oracle of what changes logits: one sequence, one token at a time, in vLLM's order."""
    outputs: list[int] = []
    assert params.max_tokens is not None
    while len(outputs) < params.max_tokens:
        logits = logits_after(prompt + outputs)
        if len(outputs) < params.min_tokens:
            logits[[0, *(params.stop_token_ids or ())]] = -torch.inf
        for token, bias in (params.logit_bias or {}).items():
            logits[token] += bias
        for token in {*prompt, *outputs}:
            factor = params.repetition_penalty
            logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
        for token in set(outputs):
            logits[token] -= params.frequency_penalty * outputs.count(token)
            logits[token] -= params.presence_penalty
        outputs.append(int(logits.argmax()))
        ends = {*(params.stop_token_ids or ())} | (set() if params.ignore_eos else {0})
        if outputs[-1] in ends and len(outputs) >= params.min_tokens:
            break
    return outputs


edits = st.builds(
    SamplingParams,
    temperature=st.just(0),
    max_tokens=st.just(12),
    repetition_penalty=st.sampled_from([1.0, 1.7]),
    frequency_penalty=st.sampled_from([0.0, 1.5]),
    presence_penalty=st.sampled_from([0.0, 2.0, -2.0]),
    logit_bias=st.sampled_from([None, {5: 4.0}, {0: 100.0}]),
    min_tokens=st.sampled_from([0, 4, 12]),
    stop_token_ids=st.sampled_from([None, list(range(1, 25))]),
    ignore_eos=st.booleans(),
)


# Only min_tokens: no penalty makes the host wait for a step's tokens.
LATE_STOP = SamplingParams(temperature=0, max_tokens=9, min_tokens=4, logit_bias={0: 100.0})


@given(st.lists(st.tuples(prompts, edits), min_size=1, max_size=4), st.booleans(), st.booleans())
@example([([3, 4], LATE_STOP), ([5], LATE_STOP)], True, True)
def test_what_edits_logits_reaches_each_request(
    many: list[tuple[list[int], SamplingParams]], overlap: bool, decode_graphs: bool
) -> None:
    made = engine(
        num_blocks=LIMIT // 4 + 6,
        max_num_seqs=3,
        budget=16,
        overlap=overlap,
        decode_graphs=decode_graphs,
    )
    found = run(made, [prompt for prompt, _ in many], [params for _, params in many])
    assert found == [[edited_greedy(prompt, params)] for prompt, params in many]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("wanted", [(None, 0, 3), (None, 2, -1)])
def test_log_probabilities_are_those_of_the_own_row(overlap: bool, wanted) -> None:
    made, many = engine(overlap=overlap), [[1, 2, 3], [9, 8, 7, 6], [5]]
    for i, prompt in enumerate(many):
        params = SamplingParams(seed=i, max_tokens=6, ignore_eos=True, logprobs=wanted[i])
        made.add_request(str(i), prompt, params)
    found = {}
    while made.has_unfinished():
        found.update({int(o.request_id): o.outputs[0] for o in made.step() if o.finished})
    assert found[0].logprobs is None
    for i in (1, 2):
        top = VOCAB if wanted[i] == -1 else wanted[i]
        total = 0.0
        assert len(found[i].logprobs) == 6
        for at, entries in enumerate(found[i].logprobs):
            token = found[i].token_ids[at]
            logits = logits_after(many[i] + found[i].token_ids[:at])
            expected = logits.log_softmax(-1)
            likeliest = logits.topk(top).indices.tolist()
            assert next(iter(entries)) == token
            assert set(entries) == {token, *likeliest}
            for other, entry in entries.items():
                assert entry.logprob == pytest.approx(float(expected[other]), abs=1e-4)
                assert entry.rank == 1 + int((logits > logits[other]).sum())
            total += entries[token].logprob
        assert found[i].cumulative_logprob == pytest.approx(total)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({"stop_token_ids": [7]}, ("stop", 7)),
        ({"stop_token_ids": [0]}, ("stop", None)),  # the end of text, as vLLM reports it
        ({"stop_token_ids": [0], "ignore_eos": True}, ("stop", 0)),
        ({"ignore_eos": True}, ("length", None)),
        ({}, ("stop", None)),
    ],
)
def test_why_a_sample_ended(params: dict, reason: tuple, overlap: bool) -> None:
    made = engine(overlap=overlap)
    bias = {7 if params.get("stop_token_ids") == [7] else 0: 100.0}
    made.add_request(
        "a", [3, 4], SamplingParams(temperature=0, max_tokens=5, logit_bias=bias, **params)
    )
    outputs = []
    while made.has_unfinished():
        outputs = made.step() or outputs
    output = outputs[0].outputs[0]
    assert (output.finish_reason, output.stop_reason) == reason
    assert len(output.token_ids) == (5 if reason[0] == "length" else 1)


def text_of(prompt: list[int], tokenizer: Tokenizer | None = None, **params: Any) -> Any:
    made = engine(tokenizer=tokenizer or letters())
    made.add_request("a", prompt, SamplingParams(**{"ignore_eos": True, "seed": 1, **params}))
    outputs = []
    while made.has_unfinished():
        outputs = made.step() or outputs
    return outputs[0].outputs[0]


@given(prompts)
def test_the_text_continues_the_prompts(prompt: list[int]) -> None:
    output = text_of(prompt, max_tokens=4)
    whole = letters().decode(prompt + output.token_ids)
    assert letters().decode(prompt) + output.text == whole


@given(st.data(), st.integers(0, 9), st.booleans())
def test_stop_strings_are_looked_for_behind_min_tokens(
    data: st.DataObject, min_tokens: int, include: bool
) -> None:
    prompt = data.draw(prompts.filter(lambda ids: len(ids) < 20))
    free = text_of(prompt, max_tokens=9, min_tokens=min_tokens)
    at = data.draw(st.integers(0, len(free.text) - 1))
    stop = free.text[at : at + data.draw(st.integers(1, 3))]
    ended = text_of(
        prompt, max_tokens=9, min_tokens=min_tokens, stop=stop, include_stop_str_in_output=include
    )
    # vLLM's rule: with the first token beyond min_tokens that completes the string.
    before = letters().decode(prompt)
    count, text = 9, free.text
    for n in range(min_tokens + 1, 10):
        had, has = (
            letters().decode(prompt + free.token_ids[:k])[len(before) :] for k in (n - 1, n)
        )
        found = has.find(stop, max(0, len(had) - len(stop) + 1))
        if found >= 0:
            count, text = n, has[: found + include * len(stop)]
            break
    assert (len(ended.token_ids), ended.text) == (count, text)
    assert ended.token_ids == free.token_ids[:count]


@pytest.mark.parametrize(("min_tokens", "reason"), [(1, "stop"), (2, "length")])
def test_what_was_held_back_stops_behind_min_tokens(min_tokens: int, reason: str) -> None:
    unfinished = "\ufffd"  # held back until another token or the end follows
    output = text_of(
        [1], letters(unfinished), logit_bias={VOCAB - 1: 100}, temperature=0,
        max_tokens=2, min_tokens=min_tokens, stop=unfinished,
    )  # fmt: skip
    assert (output.finish_reason, output.text) == (reason, unfinished * 2 * (reason == "length"))


def test_a_request_scored_before_long_rope_is_not_scored_again() -> None:
    made, prompt = engine(long_rope=True), list(range(1, 16))
    made.add_request(
        "a",
        prompt,
        SamplingParams(temperature=0, max_tokens=12, prompt_logprobs=0, ignore_eos=True),
    )
    told = []
    while made.has_unfinished():
        for output in made.step():
            found = zip(prompt, output.prompt_logprobs or [], strict=True)
            told.append([entry[token].logprob for token, entry in found if entry])
    assert len(told) == 12  # the switch is at 20
    assert len(told[0]) == len(prompt) - 1
    assert all(scores == told[0] for scores in told)


def test_what_was_told_before_has_not_finished() -> None:
    made, told = engine(), []
    made.add_request("a", [1, 2, 3], SamplingParams(max_tokens=3, ignore_eos=True))
    while made.has_unfinished():
        told += made.step()
    assert [output.finished for output in told] == [False, False, True]
    assert all(output.outputs[0] is told[-1].outputs[0] for output in told)


@given(st.integers(0, 999), st.booleans(), st.sampled_from([None, ["D", "FG"]]))
def test_text_does_not_depend_on_when_it_is_told(seed: int, overlap: bool, stop) -> None:
    params = SamplingParams(seed=seed, max_tokens=12, stop=stop, ignore_eos=True)
    texts: list[dict[int, str]] = []  # by number of tokens
    for untold in (0, 5, None):
        made, found = engine(tokenizer=letters(), overlap=overlap), {}
        made.add_request("a", [1, 2, 3], params)
        for _ in range(untold or 0):
            made.step(only=[])
        while made.has_unfinished():
            for output in made.step(only_finished=untold is None):
                found[len(output.outputs[0].token_ids)] = output.outputs[0].text
        texts.append(found)
    every, late, last = texts
    if stop is None:  # nothing is held back
        prompt, ids = [1, 2, 3], output.outputs[0].token_ids
        whole = {n: letters().decode([*prompt, *ids[:n]]) for n in range(1, 13)}
        assert every == {n: text[len(letters().decode(prompt)) :] for n, text in whole.items()}
    assert late == {num: every[num] for num in late}
    assert last == {num: every[num] for num in [max(every)]}


def test_a_request_leaves_nothing_to_be_collected() -> None:
    made = engine()
    gc.collect()
    gc.disable()
    try:
        made.add_request("aborted", [1, 2, 3])
        aborted = weakref.ref(made._requests["aborted"].output)
        made.add_request("a", [1, 2, 3], SamplingParams(max_tokens=3))
        finished = weakref.ref(made._requests["a"].output.outputs[0])
        made.abort("aborted")
        while made.has_unfinished():
            made.step()
        made.step()  # until then it is what the last step has sampled
        assert (aborted(), finished()) == (None, None)
    finally:
        gc.enable()


def test_penalties_take_memory_only_while_a_request_runs() -> None:
    made = engine(max_num_seqs=2)
    params = SamplingParams(repetition_penalty=1.2, max_tokens=3, ignore_eos=True)
    for i in range(9):
        made.add_request(str(i), [1, 2, 3], params)
    while made.has_unfinished():
        made.step()
        samples = [s for request in made._requests.values() for s in request.samples]
        counted = [s for s in samples if s.draw.counts is not None]
        assert len(counted) <= 2


@pytest.fixture(scope="module")
def small_llm(tmp_path_factory) -> LLM:
    path = tmp_path_factory.mktemp("small")
    case = BY_NAME["qwen3"]
    case.save(case.build(), path)
    return LLM(path, compile="eager", num_cache_blocks=64, progress=False)


def test_blocks_follow_from_free_memory_in_coarse_steps(monkeypatch) -> None:
    """The number is part of the compiled graph, and two starts never find the same memory free."""

    def num_blocks(free: int) -> int:
        monkeypatch.setattr("minigen.llm._free_memory", lambda *_: free)
        llm = LLM.from_config(TINY, compile="eager", max_num_seqs=500, progress=False)
        return llm._runner.num_blocks

    block_bytes = 2 * 2 * 16 * 2 * 16 * 4
    for free in (3_300_000, 17_000_000):
        found = num_blocks(free)
        assert 0.96 * free / 2 <= found * block_bytes <= free  # up to half is left for a step
        assert num_blocks(free + free // 200) == found
    assert num_blocks(10**12) == 500 * LIMIT // 16  # enough for all is not rounded


def path_of(llm: LLM) -> Path:
    assert llm.path is not None
    return llm.path


def test_scores_are_the_decoders(small_llm: LLM) -> None:
    model = small_llm._runner.model
    many = [[5, 6, 7, 8], [1], list(range(2, 40))]
    for prompt, scores in zip(many, small_llm.score(many, progress=False), strict=True):
        offsets = torch.tensor([0, len(prompt)])
        jagged = torch.nested.nested_tensor_from_jagged(torch.tensor(prompt), offsets)
        expected = model(jagged).values().log_softmax(-1)
        assert scores[0] is None
        assert scores[1:] == pytest.approx(
            [float(expected[i, token]) for i, token in enumerate(prompt[1:])], abs=1e-4
        )


def test_streams_and_calls_may_alternate(small_llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    streams = [small_llm.stream([3, i], params) for i in range(2)]
    assert len(small_llm.generate([[4, 4], [5]], params, progress=False)) == 2
    small_llm.engine.add_request("mine", [6], params)
    assert [list(stream) for stream in streams] == [[], []]  # no tokenizer: no text
    told = []
    while small_llm.engine.has_unfinished():
        told += small_llm.engine.step()
    assert [(o.request_id, len(o.outputs[0].token_ids)) for o in told[-1:]] == [("mine", 5)]


def test_a_stream_that_is_dropped_ends_its_request(small_llm: LLM) -> None:
    stream = small_llm.stream([1, 2], SamplingParams(max_tokens=9))
    assert small_llm.engine.has_unfinished()
    del stream
    assert not small_llm.engine.has_unfinished()


def edited(path: Path, source: Path, file: str, **changes: Any) -> Path:
    """A copy of a checkpoint with changes in one of its JSON files."""
    path.mkdir()
    for each in source.iterdir():
        (path / each.name).symlink_to(each)
    content = json.loads((path / file).read_text()) if (path / file).exists() else {}
    (path / file).unlink(missing_ok=True)
    (path / file).write_text(json.dumps({**content, **changes}))
    return path


def test_token_ids_may_be_numpys_or_torchs(small_llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)

    def found(prompt: Any) -> list[list[int]]:
        outputs = small_llm.generate(prompt, params, progress=False)
        return [output.outputs[0].token_ids for output in outputs]

    expected = found([[3, 4], [5, 6]])
    for array in (np.array, torch.tensor):
        assert found(array([[3, 4], [5, 6]])) == expected
        assert found([array([3, 4]), array([5, 6])]) == expected
        assert found(array([3, 4])) == expected[:1]
        assert found([array(3), array(4)]) == expected[:1]
    assert found([np.int64(3), 4]) == expected[:1]
    arrays: Any = np.array([3, 4])
    output = small_llm.generate(arrays, params, progress=False)[0]
    assert [type(token) for token in output.prompt_token_ids] == [int, int]


def test_inputs_of_another_form_are_refused(small_llm: LLM) -> None:
    generate: Any = small_llm.generate
    for prompt in ({"prompt": "x"}, b"x", None, 7):
        with pytest.raises(ValueError, match="prompts must be a text, token ids or a list of them"):
            generate(prompt)
    with pytest.raises(ValueError, match="prompt 0: the prompt must be a text or token ids"):
        generate([{"prompt": "x"}])
    for params in ({"temperature": 0}, [{"temperature": 0}], "greedy", 0):
        with pytest.raises(ValueError, match="params must be SamplingParams or a list of them"):
            generate([1], params)
        with pytest.raises(ValueError, match="params must be SamplingParams or a list of them"):
            small_llm.stream([1], params)  # pyright: ignore[reportArgumentType]
    assert not small_llm.engine.has_unfinished()
    wrong: Any = ({"max_model_len": 64.5}, {"max_num_seqs": "8"}, {"block_size": True})
    for options in wrong:
        with pytest.raises(ValueError, match="a positive integer is needed"):
            LLM(path_of(small_llm), **options)


def test_a_context_beyond_the_models_is_refused(small_llm: LLM, tmp_path: Path) -> None:
    options: Any = {"compile": "eager", "progress": False}
    assert LLM(path_of(small_llm), max_model_len=256, **options).max_model_len == 256
    with pytest.raises(ValueError, match="max_model_len 257 is more than the 256 tokens"):
        LLM(path_of(small_llm), max_model_len=257, **options)
    # The length before scaling: 64 tokens, which the rope stretches to 160.
    for kind in ("yarn", "linear"):
        rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.5}
        changes: Any = {"max_position_embeddings": 64, "rope_parameters": rope}
        scaled = edited(tmp_path / kind, path_of(small_llm), "config.json", **changes)
        assert LLM(scaled, **options).max_model_len == 64
        assert LLM(scaled, max_model_len=160, **options).max_model_len == 160
        with pytest.raises(ValueError, match="max_model_len 161 is more than the 160 tokens"):
            LLM(scaled, max_model_len=161, **options)


def test_the_tokenizers_end_token_ends_a_text_too(
    small_llm: LLM, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    path = edited(
        tmp_path / "chat", path_of(small_llm), "generation_config.json", eos_token_id=[3, 999]
    )
    letters()._backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text('{"eos_token": "H"}')
    llm = LLM(path, compile="eager", progress=False)
    said = [str(warning.message) for warning in recwarn if "999" in str(warning.message)]
    assert len(said) == 1
    for end, ends in ((3, True), (7, True), (8, False)):
        params = SamplingParams(temperature=0, max_tokens=4, logit_bias={end: 100})
        output = llm.generate([5], params, progress=False)[0].outputs[0]
        assert (output.finish_reason == "stop") == ends


def test_a_wrong_default_names_its_file(small_llm: LLM, tmp_path: Path) -> None:
    path = edited(tmp_path / "odd", path_of(small_llm), "generation_config.json", top_p=1.5)
    llm = LLM(path, compile="eager", progress=False)
    with pytest.raises(ValueError, match=r"odd/generation_config\.json: top_p must be"):
        llm.default_params()
    assert llm.default_params(top_p=0.5).top_p == 0.5
    with pytest.raises(ValueError, match=r"^min_p must be"):
        llm.default_params(top_p=0.5, min_p=2.0)


def test_the_real_checkpoint_tells_its_story(shared_dir) -> None:
    path = shared_dir / "models" / "stories260K"
    golden = json.loads((path / "golden_greedy.json").read_text())["ids"]
    llm = LLM(path, compile="eager", progress=False)
    params = SamplingParams(temperature=0, max_tokens=len(golden) - 1, ignore_eos=True)
    alone = llm.generate([golden[:1]], params, progress=False)[0]
    assert alone.outputs[0].token_ids == golden[1:]
    rng = random.Random(0)
    others = [[1, *(rng.randrange(3, 500) for _ in range(rng.randrange(200)))] for _ in range(15)]
    many = [*others[:7], golden[:1], *others[7:]]
    assert llm.generate(many, params, progress=False)[7].outputs[0].token_ids == golden[1:]
    text = alone.outputs[0].text
    start = llm.tokenizer.decode(golden[:5])  # pyright: ignore[reportOptionalMemberAccess]
    assert text.startswith(start)  # no space before the first word of all
    params.max_tokens = 20
    rest = llm.generate(start, params, progress=False)[0].outputs[0].text
    assert text.startswith(start + rest)
    assert "".join(llm.stream(start, params)) == rest
    stop = text[40:52]
    stopping = SamplingParams(temperature=0, max_tokens=200, stop=[stop])
    stopped = llm.generate([golden[:1]], stopping, progress=False)[0].outputs[0]
    assert stopped.text == text[: text.index(stop)]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
    assert "".join(llm.stream(golden[:1], stopping)) == stopped.text


def test_compiled_steps_look_at_what_may_change_alone() -> None:
    names = ["tokens_T", "self.caches[0][1]", "L['self'].last_tokens_M", "", "head"]
    fixed = ["self.model._modules['norm'].eps", "L['self'].model._modules['embed']"]
    kept = guards_beside_model([SimpleNamespace(name=name) for name in names + fixed])
    assert kept == [True] * len(names) + [False] * len(fixed)


def test_engines_of_like_caches_run_their_own_models(monkeypatch) -> None:
    """What is left of a compiled step's guards is the same for all of these."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch.compiler.reset()
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)

    def start(compile: str, **change: Any) -> Engine:
        config = DecoderConfig.from_hf({**TINY, **change})
        model = Decoder.from_config(config, dtype=torch.float32, seed=3)
        for name, parameter in model.named_parameters():
            if not name.endswith("norm.weight"):
                parameter.mul_(10)
        runner = Runner(model, num_blocks=31, block_size=4, max_num_seqs=8,
                        max_num_batched_tokens=64, compile=compile)  # fmt: skip
        runner.start_compiling(background=False)
        assert runner.compile_status == ("ready" if compile == "default" else compile)
        return Engine(runner, Scheduler(BlockPool(31, 4), 8, 64), None, [0], LIMIT)

    changes: list[dict[str, Any]] = [{}, {"rms_norm_eps": 1.0}, {"intermediate_size": 56}]
    expected = [run(start("eager", **change), [[5, 7, 9]], [params]) for change in changes]
    assert len({str(tokens) for tokens in expected}) == 3
    assert [
        run(made, [[5, 7, 9]], [params]) for made in [start("default", **one) for one in changes]
    ] == expected


def test_heads_are_compiled_where_that_fuses_something() -> None:
    def compiles(device: str, compile: str, softcap: float) -> bool:
        model = SimpleNamespace(config=replace(decoder().config, logit_softcap=softcap))
        runner: Any = SimpleNamespace(model=model, device=torch.device(device), compile=compile)
        return Runner._compiles_heads.fget(runner)  # pyright: ignore[reportOptionalCall]

    assert not compiles("cuda", "default", 0.0)
    assert compiles("cuda", "default", 30.0)
    assert compiles("cuda", "max-autotune", 0.0)
    assert compiles("cpu", "default", 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("by_layer", [False, True])
def test_one_compilation_serves_every_mix_of_lengths(by_layer: bool) -> None:
    import torch._dynamo.utils as dynamo

    torch._dynamo.reset()  # another runner's layer would serve this one, too
    model = decoder()
    runner = Runner(
        model,
        num_blocks=211,
        block_size=4,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        decode_graphs=by_layer,
    )
    before = dynamo.counters["stats"]["unique_graphs"]
    runner.start_compiling(background=False)
    assert runner.compile_status == "ready"
    # Three heads, and the decoder: as one graph, or its beginning, one layer for all, and its norm.
    assert dynamo.counters["stats"]["unique_graphs"] - before == 3 + (3 if by_layer else 1)
    scheduler = Scheduler(BlockPool(211, 4), 8, 64)
    made = Engine(runner, scheduler, None, [0], LIMIT)
    before = dynamo.counters["stats"]["unique_graphs"]
    rng = random.Random(1)
    lengths = [1, 2, 3, 1, 17, 30, 2, 29, 5, 31, 1]
    many = [[rng.randrange(VOCAB) for _ in range(n)] for n in lengths]
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    others: list[dict[str, Any]] = [
        {"top_p": 0.9}, {"top_k": 3}, {"presence_penalty": 1.0}, {"logprobs": 2}
    ]  # fmt: skip
    for group in (many[:1], many[1:2], many[2:4], many):
        assert run(made, group, [params] * len(group)) == [[greedy(model, p, 6)] for p in group]
        drawn = [SamplingParams(seed=i, max_tokens=6, ignore_eos=True) for i in range(len(group))]
        assert run(made, group, drawn) == run(engine(), group, drawn)
        # Draws that no compiled head makes: they take its logits.
        for more in others:
            drawn = [
                SamplingParams(seed=i, max_tokens=4, ignore_eos=True, **more)
                for i in range(len(group))
            ]
            assert run(made, group, drawn) == run(engine(), group, drawn)
    assert dynamo.counters["stats"]["unique_graphs"] == before


def test_engines_do_not_use_up_each_others_compilations(monkeypatch) -> None:
    """Where they share the functions' code objects, on which dynamo counts: on the CPU if the
    mode is none of ours."""
    import torch._dynamo as dynamo

    real = torch.compile
    # What dynamo counts does not depend on what compiles its graphs: the quickest backend.
    monkeypatch.setattr(
        torch, "compile", lambda f, fullgraph, **_: real(f, fullgraph=fullgraph, backend="eager")
    )
    torch.compiler.reset()
    counters, limit = dynamo.utils.counters["stats"], dynamo.config.recompile_limit
    before = counters["unique_graphs"]
    for dtype, width in ((torch.float32, 32), (torch.bfloat16, 32), (torch.float32, 48)):
        hf = {**TINY, "hidden_size": width, "num_hidden_layers": 1}
        model = Decoder.from_config(DecoderConfig.from_hf(hf), dtype=dtype, seed=3)
        runner = Runner(model, num_blocks=31, block_size=4, max_num_seqs=8,
                        max_num_batched_tokens=64, compile="max-autotune")  # fmt: skip
        runner.start_compiling(background=width == 48)
        while runner.compile_status == "compiling":
            time.sleep(0.01)
        assert runner.compile_status == "ready"
    # Four graphs an engine, of which three are heads: more heads than one code object may have.
    compiled = counters["unique_graphs"]
    assert compiled - before == 12
    assert limit < 9
    assert dynamo.config.recompile_limit == limit
    made = Engine(runner, Scheduler(BlockPool(31, 4), 8, 64), None, [0], LIMIT)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    assert run(made, [[5, 7, 9]], [params]) == [[greedy(model, [5, 7, 9], 6)]]
    assert counters["unique_graphs"] == compiled


@pytest.mark.slow
@pytest.mark.parametrize(("max_num_seqs", "budget"), [(1, 1), (2, 64), (2100, 9000), (300, 3000)])
def test_every_setting_compiles(max_num_seqs: int, budget: int) -> None:
    # One after the other: torch's compile cache must not hand a bound on to the next setting.
    runner = Runner(
        decoder(),
        num_blocks=16,
        block_size=4,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
    )
    runner.start_compiling(background=False)
    assert runner.compile_status == "ready"
    made = Engine(runner, Scheduler(BlockPool(16, 4), max_num_seqs, budget), None, [0], LIMIT)
    many = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    assert run(made, many, [params] * 3) == [[greedy(decoder(), prompt, 5)] for prompt in many]


@pytest.mark.slow
@pytest.mark.usefixtures("cold_compiler")  # code must be generated to be read
@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_the_compiled_step_copies_no_cache(kernels: str) -> None:
    if kernels == "native":
        native.load()
    from torch._inductor.utils import run_and_get_code

    runner = Runner(
        decoder(), num_blocks=211, block_size=4, max_num_seqs=8, max_num_batched_tokens=64
    )
    step = runner._null_step(StepSize(num_tokens=11, num_seqs=5, num_rows=3, width=7))
    runner._mark(step)
    with torch.inference_mode():
        compiled = torch.compile(runner._hidden_step, fullgraph=True)
        _, sources = run_and_get_code(compiled, *runner._hidden_inputs(step))
    code = "\n".join(sources)
    assert {"torch": "minigen.kv_cache_write", "native": "minigen.native_decoder_layers"}[
        kernels
    ] in code
    allocations = [line for line in code.splitlines() if "empty_strided" in line and "211" in line]
    assert not allocations
    # Copies are flat: a loop or a buffer over a whole cache, or several, bears its size.
    size = runner.caches[0][0].numel()
    sizes = {int(number) for number in re.findall(r"\d+", code)}
    assert not [number for number in sizes if number and number % size == 0]
