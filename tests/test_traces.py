"""Buckets, padding rows and a cache that grows never change an output."""

import functools
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import event, example, given
from hypothesis import strategies as st

from minigen.cache import BlockPool
from minigen.engine import Engine
from minigen.graphs import USUAL_WIDTH, WIDTH_STEP
from minigen.model import Decoder, DecoderConfig
from minigen.runner import Runner
from minigen.scheduler import Scheduler
from tests.test_engine import TINY, VOCAB
from tests.traces import (
    BUDGET,
    COUNTS,
    LENGTHS,
    MAX_NUM_SEQS,
    Request,
    check_agreement,
    hold,
    play,
    random_trace,
    trace_of_every_size,
    watch,
    without_aborts,
)

# In blocks of one token, a sequence of one more needs the next width of the block table.
EDGE = USUAL_WIDTH
LIMIT = EDGE + 32
WIDTHS = (USUAL_WIDTH, WIDTH_STEP * USUAL_WIDTH)
ENOUGH = MAX_NUM_SEQS * LIMIT


@functools.cache
def decoder(dtype: torch.dtype = torch.float32) -> Decoder:
    config = DecoderConfig.from_hf({**TINY, "max_position_embeddings": LIMIT})
    model = Decoder.from_config(config, dtype=dtype, seed=3)
    # Wide enough that the next tokens depend on what stands before.
    for name, parameter in model.named_parameters():
        if not name.endswith("norm.weight"):
            parameter.mul_(10)
    return model


def engine_of(
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype = torch.float32,
    caching: bool = False,
    overlap: bool = False,
    decode_graphs: bool = False,
) -> Engine:
    runner = Runner(
        decoder(dtype), num_blocks=num_blocks, block_size=block_size, max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=BUDGET, compile="eager", decode_graphs=decode_graphs,
    )  # fmt: skip
    pool = BlockPool(num_blocks, block_size, caching)
    scheduler = Scheduler(pool, MAX_NUM_SEQS, BUDGET)
    return Engine(runner, scheduler, None, [], LIMIT, overlap=overlap)


def fixed_sizes(num_blocks: int = ENOUGH, **options: bool | torch.dtype) -> Engine:
    """Steps of fixed sizes, which the CPU calls in the buffers that a GPU's graphs read."""
    return engine_of(num_blocks, 1, decode_graphs=True, **options)  # pyright: ignore[reportArgumentType]


def eager_loop(dtype: torch.dtype = torch.float32) -> Engine:
    """The oracle: steps as large as they are, no prefix shared, a cache that holds all."""
    return engine_of(ENOUGH // 16 + MAX_NUM_SEQS, 16, dtype)


def check_tokens(fixed: Engine, trace: list[Request]) -> None:
    found, expected = play(fixed, trace), play(eager_loop(), without_aborts(trace))
    for request, one, other in zip(trace, found, expected, strict=True):
        assert len(other.token_ids) == request.params.max_tokens
        count = len(other.token_ids) if request.abort is None else len(one.token_ids)
        assert one.token_ids == other.token_ids[:count]


@given(
    st.lists(st.sampled_from(COUNTS), min_size=1, max_size=2),
    st.randoms(use_true_random=False),
    st.sampled_from([LIMIT + 60, ENOUGH]),  # the smaller cache: requests are preempted
    st.booleans(),
    st.booleans(),
    st.sampled_from([(None,), (None, None, None, 0)]),  # some ask for logits, which have a head
)
@example([17, 5], random.Random(1), LIMIT + 60, True, True, (None,))
@example([9, 16], random.Random(2), ENOUGH, False, True, (None,))
def test_fixed_sizes_change_no_token(
    bursts: list[int],
    rng: random.Random,
    num_blocks: int,
    caching: bool,
    overlap: bool,
    logprobs: tuple[int | None, ...],
) -> None:
    fixed = fixed_sizes(num_blocks, caching=caching, overlap=overlap)
    with watch(fixed) as reached:
        check_tokens(fixed, random_trace(rng, bursts, VOCAB, EDGE, logprobs))
    for count, width, head in reached.decoding:
        event(f"{count:2} sequences decode")
        event(f"table of {width}, {head}")


@pytest.mark.parametrize(
    ("temperature", "logprobs", "heads"),
    [(0.0, None, {"greedy"}), (1.0, None, {"greedy", "plain"}), (1.0, 0, {"logits"})],
)
def test_every_size_and_one_beside_it(
    temperature: float, logprobs: int | None, heads: set[str]
) -> None:
    # A step in flight: what a null row wrote into a request's row would be its next token.
    fixed = fixed_sizes(overlap=True)
    with watch(fixed) as reached:
        check_tokens(fixed, trace_of_every_size(VOCAB, EDGE, temperature, logprobs))
    sizes = {(count, width) for count, width, _ in reached.decoding}
    assert sizes >= {(count, width) for count in COUNTS for width in WIDTHS}
    assert {head for _, _, head in reached.decoding} == heads
    assert {tokens for tokens, _, _ in reached.prompts} >= {*LENGTHS} - {101}
    assert {seqs for _, seqs, _ in reached.prompts} >= {1, 6, 7, 8, MAX_NUM_SEQS}
    assert fixed.runner._graphs is not None
    assert {2, 4, 8, 16, MAX_NUM_SEQS} == {*fixed.runner._graphs.sizes}
    assert {64, 96, BUDGET} == {*fixed.runner._graphs.prompt_sizes}


@pytest.mark.parametrize(
    ("dtype", "logprobs"), [(torch.float32, 0), (torch.bfloat16, 0), (torch.bfloat16, None)]
)
def test_log_probabilities_at_fixed_sizes_agree(dtype: torch.dtype, logprobs: int | None) -> None:
    """As the GPU tests see it: behind the same tokens, up to the roundings of the dtype."""
    trace = random_trace(random.Random(3), (9, 5), VOCAB, EDGE, (logprobs,))
    found = play(fixed_sizes(dtype=dtype), trace)
    held = hold(eager_loop(dtype), trace, found)
    check_agreement(found, held)
    assert len(held.gaps) == sum(len(output.token_ids) for output in found) > 50
    if dtype == torch.float32:
        assert max(held.gaps.values()) == 0


def test_other_tokens_and_other_prompts_do_not_agree() -> None:
    """With the wide bound of bfloat16."""
    trace = random_trace(random.Random(1), (4,), VOCAB, 24, (0,))
    engine = eager_loop(torch.bfloat16)
    found = play(engine, trace)
    check_agreement(found, hold(engine, trace, found))
    assert {request.params.temperature for request in trace} == {0, 1}
    for i, request in enumerate(trace):
        tokens = found[i].token_ids
        kept, tokens[0] = tokens[0], (tokens[0] + 1) % VOCAB
        with pytest.raises(AssertionError, match="no near ties"):
            check_agreement(found, hold(engine, trace, found))
        tokens[0] = kept
        other = list(trace)
        other[i] = replace(request, prompt=[*request.prompt[:-1], request.prompt[-1] ^ 1])
        with pytest.raises(AssertionError, match=r"no near ties|request"):
            check_agreement(found, hold(engine, other, found))
