"""Traces: requests that come, run and leave while others do, and what an engine makes of them.

The fixed sizes of `minigen/graphs.py` must not be seen in an output. In float32 that means the same
tokens. In 16 bits, where tiles follow the shape of a batch, log-probabilities behind the same ones
agree within a bound, and a token may differ at a near tie alone: see `hold`.

Shape suffixes: R rows to sample, V vocabulary.
"""

import contextlib
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from unittest import mock

from torch import Tensor

from minigen import SamplingParams
from minigen.engine import Engine
from minigen.graphs import HIDDEN
from minigen.outputs import CompletionOutput
from minigen.sampling import _exponential
from tools.compare_logprobs import bound_of

MAX_NUM_SEQS, BUDGET = 17, 100
# Where a captured size ends: of sequences that decode (2, 4, 8, 16, 17), of tokens with prompts
# (64, 96, 100), which may belong to 7 sequences or to all.
COUNTS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17)
LENGTHS = (63, 64, 65, 95, 96, 97, 99, 100, 101)  # the last one comes in two chunks


@dataclass(frozen=True)
class Request:
    """One sample; `params.seed` is its place in the trace, from 1."""

    arrival: int  # the step before which it is added
    prompt: list[int]
    params: SamplingParams
    abort: int | None = None  # the step before which it is aborted, if it still runs


def words(story: int, count: int, vocab_size: int) -> list[int]:
    """The first tokens of a story."""
    return random.Random(story).choices(range(vocab_size), k=count)


def random_trace(
    rng: random.Random,
    bursts: Sequence[int],
    vocab_size: int,
    edge: int,
    logprobs: Sequence[int | None] = (None,),
) -> list[Request]:
    """Requests that come close together, so many a burst, and share what they begin with or not.

    A sequence of more than `edge` tokens needs a wider block table.
    """
    trace: list[Request] = []
    arrival = 0
    for count in bursts:
        for _ in range(count):
            kind = rng.randint(0, 9)
            length = rng.randint(1, 12)
            if kind == 0:
                length = rng.choice(LENGTHS)
            elif kind == 1:
                length = edge - rng.randint(0, 6)
            seed = len(trace) + 1
            story = rng.choice((0, seed))
            params = SamplingParams(
                temperature=rng.choice((0.0, 1.0)),
                seed=seed,
                max_tokens=rng.randint(1, 12),
                ignore_eos=True,
                logprobs=rng.choice(logprobs),
            )
            abort = arrival + rng.randint(1, 9) if rng.randint(0, 7) == 0 else None
            trace.append(Request(arrival, words(story, length, vocab_size), params, abort))
            arrival += rng.choice((0, 0, 0, 1, 2))
        arrival += rng.randint(0, 6)
    return trace


def trace_of_every_size(
    vocab_size: int,
    edge: int,
    temperature: float = 0.0,
    logprobs: int | None = None,
    beyond: int = 20,
) -> list[Request]:
    """Steps of 17 sequences down to 1, before `edge` and up to `beyond` tokens behind it, and
    prompts of `LENGTHS`."""
    # (arrival, tokens of the prompt, tokens to draw). The first one of all has the first block and
    # the first row, where padding would write if it wrote, and stays until the last.
    short = [(0, 1 + i % 5, 18 - i) for i in range(MAX_NUM_SEQS)]
    # The long one lives longest, and its prompt is computed in chunks while the others wait.
    long = [(30, edge - 2, 2 + beyond), *((30, 2, 4 + i) for i in range(MAX_NUM_SEQS - 1))]
    alone = [(120 + 3 * i, length, 1) for i, length in enumerate(LENGTHS)]
    together = [(150 + 3 * i, 3, 1) for i in (6, 7, 8) for _ in range(i)]
    sizes = short + long + alone + together
    return [
        Request(
            arrival,
            words(i, length, vocab_size),
            SamplingParams(
                temperature=temperature * (i % 2),
                seed=i,
                max_tokens=count,
                ignore_eos=True,
                logprobs=logprobs,
            ),
        )
        for i, (arrival, length, count) in enumerate(sizes, 1)
    ]


def play(engine: Engine, trace: Sequence[Request]) -> list[CompletionOutput]:
    """Runs all requests; an aborted one has the tokens that were told before."""
    found = [CompletionOutput(0) for _ in trace]
    running: set[int] = set()
    last = max(request.arrival for request in trace)
    for step in range(last + 5000):
        for i, request in enumerate(trace):
            if request.arrival == step:
                engine.add_request(str(i), request.prompt, request.params)
                running.add(i)
            if request.abort == step and i in running:
                engine.abort(str(i))
                running.remove(i)
        for told in engine.step():
            i = int(told.request_id)
            found[i] = told.outputs[0]
            if told.finished:
                running.remove(i)
        if step >= last and not running:
            return found
    raise AssertionError("the loop does not end")


def without_aborts(trace: Sequence[Request]) -> list[Request]:
    return [replace(request, abort=None) for request in trace]


@dataclass
class Reached:
    """The steps that ran at a fixed size."""

    decoding: set[tuple[int, int, str]] = field(default_factory=set)  # sequences, width, head
    prompts: set[tuple[int, int, int]] = field(default_factory=set)  # tokens, sequences, width


@contextlib.contextmanager
def watch(engine: Engine) -> Iterator[Reached]:
    """Notes the sizes of the steps that run meanwhile, before they are rounded up."""
    reached, runner = Reached(), engine.runner
    replay = runner._replay

    def noted(size, chunks, batch, head):
        if head == HIDDEN:
            tokens = sum(chunk.length for chunk in chunks)
            reached.prompts.add((tokens, len(chunks), size.width))
        else:
            reached.decoding.add((len(chunks), size.width, head))
        return replay(size, chunks, batch, head)

    with mock.patch.object(runner, "_replay", noted):
        yield reached


# --- where tokens may differ ---------------------------------------------------------------------


@dataclass
class Held:
    """What an engine says of tokens that it is held to, by (request, place in its output).

    `gaps`: by how much its own draw was likelier, noise included; 0 where it draws that token.
    """

    bound: float = 0.0  # how far right log-probabilities may be apart
    logprobs: dict[tuple[int, int], float] = field(default_factory=dict)
    gaps: dict[tuple[int, int], float] = field(default_factory=dict)
    scale: float = 0.0  # root mean square of the rows' largest logits


def hold(engine: Engine, trace: Sequence[Request], found: Sequence[CompletionOutput]) -> Held:
    """Plays a trace with a draw that gives the tokens of `found`. Temperatures are 0 and 1."""
    held, squares = Held(), 0.0

    def draw(logits_RV: Tensor, *sampling: Tensor, mode: str) -> Tensor:
        nonlocal squares
        temperature_R, _, _, _, *key = sampling  # seed, sample, position
        logprobs_RV = logits_RV.double().log_softmax(-1)
        noise_RV = -_exponential(logits_RV.shape[1], *key).log()
        race_RV = logprobs_RV + noise_RV * (temperature_R > 0)[:, None]
        best_R, own_R = race_RV.max(-1)
        places, tokens = [], own_R.tolist()
        for row, (seed, _, position) in enumerate(zip(*(x.tolist() for x in key), strict=True)):
            at = position - len(trace[seed - 1].prompt)
            # Seed 0 is a null row's. Behind an aborted request's tokens it goes on as it likes.
            if seed > 0 and at < len(found[seed - 1].token_ids):
                places.append((row, (seed - 1, at)))
                tokens[row] = found[seed - 1].token_ids[at]
        held_R = own_R.new_tensor(tokens)
        logprobs = _at(logprobs_RV, held_R).tolist()
        gaps = (best_R - _at(race_RV, held_R)).tolist()
        peaks = logits_RV.abs().amax(-1).tolist()
        for row, place in places:
            held.logprobs[place], held.gaps[place] = logprobs[row], gaps[row]
            squares += peaks[row] ** 2
        return held_R

    with mock.patch("minigen.runner.draw", draw):
        play(engine, without_aborts(trace))
    model, count = engine.runner.model, len(held.gaps)
    held.scale = math.sqrt(squares / count)
    held.bound = bound_of(model.embed.weight.dtype, model.config, held.scale, count)
    return held


def _at(values_RV: Tensor, ids_R: Tensor) -> Tensor:
    return values_RV.gather(1, ids_R[:, None])[:, 0]


def check_agreement(found: Sequence[CompletionOutput], held: Held) -> None:
    """Each token's log-probability is the other engine's, and each draw its draw or nearly so."""
    drawn = {(i, at) for i, one in enumerate(found) for at in range(len(one.token_ids))}
    assert set(held.gaps) == drawn
    # Of two tokens each may be off by the bound. Not `>`: a NaN is no agreement.
    far = {place: gap for place, gap in held.gaps.items() if not gap <= 2 * held.bound}
    assert not far, f"draws that are no near ties, bound {held.bound:.3g}"
    for i, output in enumerate(found):
        for at, (token, entry) in enumerate(
            zip(output.token_ids, output.logprobs or [], strict=output.logprobs is not None)
        ):
            apart = abs(entry[token].logprob - held.logprobs[i, at])
            assert apart <= held.bound, f"request {i}, token {at}: {apart} > {held.bound}"
