"""The step loop: whoever shares the batch, a request's output is the one it has alone."""

import functools
import json
import random
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from minigen import LLM, SamplingParams
from minigen.cache import BlockPool
from minigen.engine import Engine
from minigen.model import Decoder, DecoderConfig
from minigen.runner import Runner
from minigen.scheduler import Scheduler

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
) -> Engine:
    model = decoder(long_rope)
    runner = Runner(
        model,
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        compile="eager",
    )
    pool = BlockPool(num_blocks, block_size, caching)
    scheduler = Scheduler(pool, max_num_seqs, budget, model.config.rope_switch)
    return Engine(runner, scheduler, None, [0], LIMIT)


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


class StepLoop(RuleBasedStateMachine):
    """Requests come, run, share prefixes and leave, in a cache too small for all."""

    @initialize(
        block_size=st.sampled_from([1, 4]),
        budget=st.sampled_from([3, 8, 64]),
        caching=st.booleans(),
    )
    def start(self, block_size: int, budget: int, caching: bool) -> None:
        self.num_blocks = LIMIT // block_size + 3
        self.engine = engine(self.num_blocks, block_size, 3, budget, caching)
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
    )
    def add(
        self,
        prefix: int,
        tail: list[int],
        max_tokens: int,
        temperature: float,
        seed: int,
        ignore_eos: bool,
    ) -> None:
        shared = random.Random(prefix).choices(range(VOCAB), k=11 * prefix)
        params = SamplingParams(
            temperature=temperature,
            seed=seed,
            max_tokens=max_tokens,
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
            assert self.finished[name] == run(engine(), [prompt], [params])[0]


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
        ([1], {"logit_bias": {VOCAB: 1.0}}, "vocabulary|logit_bias"),
    ],
)
def test_bad_requests_are_refused_and_harm_nobody(prompt: object, params: dict, says: str) -> None:
    made = engine()
    with pytest.raises(ValueError, match=says):
        made.add_request("a", prompt, SamplingParams(**params))  # pyright: ignore[reportArgumentType]
    assert not made.has_unfinished()
    made.add_request("a", [1], SamplingParams())
    with pytest.raises(ValueError, match="in use"):
        made.add_request("a", [1], SamplingParams())


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
    stop = text[40:52]
    stopping = SamplingParams(temperature=0, max_tokens=200, stop=[stop])
    stopped = llm.generate([golden[:1]], stopping, progress=False)[0].outputs[0]
    assert stopped.text == text[: text.index(stop)]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
    assert "".join(llm.stream(golden[:1], stopping)) == stopped.text


@pytest.mark.slow
def test_one_compilation_serves_every_mix_of_lengths(monkeypatch) -> None:
    import torch._dynamo.utils as dynamo

    model = decoder()
    runner = Runner(model, num_blocks=211, block_size=4, max_num_seqs=8, max_num_batched_tokens=64)
    runner.start_compiling(background=False)
    assert runner.compile_status == "ready"
    scheduler = Scheduler(BlockPool(211, 4), 8, 64)
    made = Engine(runner, scheduler, None, [0], LIMIT)
    before = dynamo.counters["stats"]["unique_graphs"]
    rng = random.Random(1)
    lengths = [1, 2, 3, 1, 17, 30, 2, 29, 5, 31, 1]
    many = [[rng.randrange(VOCAB) for _ in range(n)] for n in lengths]
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    for group in (many[:1], many[1:2], many[2:4], many):
        assert run(made, group, [params] * len(group)) == [[greedy(model, p, 6)] for p in group]
        drawn = [SamplingParams(seed=i, max_tokens=6, ignore_eos=True) for i in range(len(group))]
        assert run(made, group, drawn) == run(engine(), group, drawn)
    assert dynamo.counters["stats"]["unique_graphs"] == before


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
def test_the_compiled_step_copies_no_cache(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv(
        "TORCHINDUCTOR_CACHE_DIR", str(tmp_path)
    )  # code must be generated to be read
    from torch._inductor.utils import run_and_get_code

    runner = Runner(
        decoder(), num_blocks=211, block_size=4, max_num_seqs=8, max_num_batched_tokens=64
    )
    step = runner._null_step(num_tokens=11, num_seqs=5, width=7, num_rows=3)
    runner._mark(step)
    torch._dynamo.reset()
    with torch.inference_mode():
        compiled = torch.compile(runner._hidden_step, fullgraph=True)
        _, sources = run_and_get_code(compiled, *runner._hidden_inputs(step))
    code = "\n".join(sources)
    assert "kv_cache_write" in code
    allocations = [line for line in code.splitlines() if "empty_strided" in line and "211" in line]
    assert not allocations
    # Copies are flat: a loop or a buffer over a whole cache, or several, bears its size.
    size = runner.caches[0][0].numel()
    sizes = {int(number) for number in re.findall(r"\d+", code)}
    assert not [number for number in sizes if number and number % size == 0]
