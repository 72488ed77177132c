"""The step loop: requests come in, steps run, outputs come out.

With `overlap` the host reads a step's tokens after it has launched the next one, so a request that
stops has at most one surplus token computed, which is thrown away.
"""

import operator
import random
import time
from collections.abc import Collection, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import Any, cast

from minigen.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from minigen.runner import ChosenLogprobs, Launched, Runner
from minigen.sampling_params import SamplingParams
from minigen.sampling_rows import Row, RowBatch, TokenCounts
from minigen.scheduler import Chunk, Scheduler, Sequence
from minigen.text import TextStream
from minigen.weights.tokenizer import Tokenizer


@dataclass
class EngineStats:
    """Counts since the engine was made."""

    num_steps: int = 0
    num_prompt_tokens: int = 0  # computed, cached ones not counted
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    num_waiting: int = 0
    num_running: int = 0
    num_free_blocks: int = 0
    wait_seconds: float = 0.0  # the host waited for results
    launch_seconds: float = 0.0  # inside the step's functions: on a CPU that is the computation


@dataclass(eq=False, slots=True, kw_only=True)
class _Sample(Sequence):
    """One of a request's n continuations."""

    request: "_Request"
    text: TextStream
    output: CompletionOutput
    token_ids: list[int]  # the output's
    draw: Row  # the same for each token: what differs follows from the sequence
    stop_ids: frozenset[int]


@dataclass(eq=False, slots=True)
class _Request:
    params: SamplingParams
    output: RequestOutput  # what is told of it: the same as long as it has not finished
    samples: list[_Sample] = field(default_factory=list)
    num_unfinished: int = 0  # of its samples


class Engine:
    """Requests by id over one runner.

    Args:
        runner, scheduler: made for the same cache.
        tokenizer: None: prompts are token ids, text is empty.
        eos_token_ids: ids that end a sample unless `ignore_eos`.
        max_model_len: most tokens of a prompt with its output.
        seed: the draws of requests without a seed follow from it and their order.
        overlap: launch a step before the last one's tokens are read; None: where the runner's
            device works beside the host.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        tokenizer: Tokenizer | None,
        eos_token_ids: Seq[int],
        max_model_len: int,
        seed: int = 0,
        overlap: bool | None = None,
    ) -> None:
        self.overlap = runner.device.type == "cuda" if overlap is None else overlap
        self.runner, self.scheduler, self.tokenizer = runner, scheduler, tokenizer
        self.eos_token_ids = frozenset(eos_token_ids)
        self.max_model_len = max_model_len
        self._seeds = random.Random(seed)
        self._requests: dict[str, _Request] = {}
        self._penalised: set[Sequence] = set()  # those of requests with penalties
        self._in_flight: Launched | None = None
        # The rows of the last step's draws, most often those of the next, too.
        self._sampled: list[Sequence] = []
        self._batch = RowBatch([], runner.model.config.vocab_size)
        # Not told yet: kept over a step that fails, or who finished in it would never be heard of.
        self._touched: dict[_Request, None] = {}
        self._ended: dict[_Request, None] = {}  # those of them that have finished
        self._stats = EngineStats()

    @property
    def stats(self) -> EngineStats:
        stats, scheduler = self._stats, self.scheduler
        stats.num_preemptions = scheduler.num_preemptions
        stats.num_waiting, stats.num_running = len(scheduler.waiting), len(scheduler.running)
        stats.num_free_blocks = scheduler.pool.num_available
        stats.launch_seconds = self.runner.launch_seconds
        return stats

    def has_unfinished(self) -> bool:
        return bool(self._requests)

    def add_request(
        self, request_id: str, prompt: str | Seq[int], params: SamplingParams | None = None
    ) -> None:
        """Queues a request.

        Raises:
            ValueError: the id is in use; the prompt is empty, too long or has unknown token ids;
                a parameter names a token outside the vocabulary. The engine is left as it was.
        """
        params = params or SamplingParams()
        self._add(request_id, prompt, params, samples=True)

    def add_scoring(self, request_id: str, prompt: str | Seq[int]) -> None:
        """Queues a prompt whose log-probabilities are wanted and nothing else."""
        self._add(request_id, prompt, SamplingParams(prompt_logprobs=0), samples=False)

    def _add(
        self, request_id: str, prompt: str | Seq[int], params: SamplingParams, samples: bool
    ) -> None:
        if request_id in self._requests:
            raise ValueError(f"request id {request_id!r} is in use: give another one")
        if not isinstance(params, SamplingParams):
            raise ValueError(f"params must be SamplingParams, not {type(params).__name__}")
        vocab_size = self.runner.model.config.vocab_size
        params.check_vocabulary(vocab_size)
        ids = self._prompt_ids(prompt, vocab_size)
        limit = self.max_model_len - samples
        if len(ids) > limit:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, the context holds {self.max_model_len}"
                + (" with at least one of the reply" if samples else "")
                + f": give at most {limit}"
            )
        if params.stop and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer, and this model has none")
        max_length = self.max_model_len
        if params.max_tokens is not None:
            max_length = min(max_length, len(ids) + params.max_tokens)
        unscored: list[dict[int, Logprob] | None] = [None] * len(ids)
        request = _Request(
            params,
            RequestOutput(
                request_id,
                prompt=prompt if isinstance(prompt, str) else None,
                prompt_token_ids=ids,
                prompt_logprobs=None if params.prompt_logprobs is None else unscored,
                outputs=[],
                finished=False,
                metrics=RequestMetrics(time.perf_counter()),
            ),
        )
        seed = self._seeds.getrandbits(63) if params.seed is None else params.seed
        eos = frozenset() if params.ignore_eos else self.eos_token_ids
        stop_ids = eos | frozenset(params.stop_token_ids or ())
        for index in range(params.n):
            output = CompletionOutput(index, logprobs=None if params.logprobs is None else [])
            if params.logprobs is not None:
                output.cumulative_logprob = 0.0
            # vLLM rules the end out below min_tokens even where it would be ignored.
            ends = stop_ids | self.eos_token_ids
            sample = _Sample(
                list(ids),
                max_length if samples else len(ids),
                samples,
                use_prefix_cache=params.prompt_logprobs is None or index > 0,
                request=request,
                text=TextStream(
                    self.tokenizer,
                    list(params.stop or ()),
                    params.include_stop_str_in_output,
                    params.skip_special_tokens,
                    ids,
                ),
                output=output,
                token_ids=output.token_ids,
                draw=Row(params, seed, index, len(ids), ids, output.token_ids, ends),
                stop_ids=stop_ids,
            )
            request.samples.append(sample)
            request.output.outputs.append(output)
            if params.has_penalties:
                self._penalised.add(sample)
        request.num_unfinished = params.n
        self._requests[request_id] = request
        for sample in request.samples:
            self.scheduler.add(sample)

    def _prompt_ids(self, prompt: str | Seq[int], vocab_size: int) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("this model has no tokenizer: give the prompt as token ids")
            ids = self.tokenizer.encode(prompt)
        else:
            ids = items_of(prompt, "the prompt must be a text or token ids")
        for at, token in enumerate(ids):
            if not is_integer(token):
                raise ValueError(f"prompt token {at} is {token!r}: an integer is needed")
            if not 0 <= token < vocab_size:
                raise ValueError(
                    f"prompt token {at} is {token}, the vocabulary has ids 0 to {vocab_size - 1}"
                )
        if not ids:
            raise ValueError("the prompt is empty: give at least one token")
        return [operator.index(token) for token in ids]

    def abort(self, request_id: str) -> None:
        """Ends a request at once. Raises ValueError for an id that is not running."""
        request = self._requests.pop(request_id, None)
        if request is None:
            raise ValueError(f"request id {request_id!r} is unknown or has finished")
        for sample in request.samples:
            if not sample.finished:
                self._end(sample, "abort", None)
        self._forget(request)

    def _forget(self, request: _Request) -> None:
        self._touched.pop(request, None)
        self._ended.pop(request, None)
        self._penalised.difference_update(request.samples)
        # They hold the request, too: so its memory is free at once, and no garbage to be collected.
        request.samples.clear()

    def step(
        self, only: Collection[str] | None = None, only_finished: bool = False
    ) -> list[RequestOutput]:
        """Runs one step -> the state of every request that got a token since it was last told.

        Each time it is the same object, whose outputs have grown, until the request has finished.
        `only`: the ids that the caller wants to hear of; the others are told at a later step.
        `only_finished`: the same of requests that go on.
        """
        previous, self._in_flight = self._in_flight, None
        try:
            if previous is not None and self._host_decides():
                self._collect(previous)
                previous = None
            launched = self._launch()
            if previous is not None:
                self._collect(previous)
            if launched is not None:
                if self.overlap:
                    self._in_flight = launched
                else:
                    self._collect(launched)
        except BaseException:
            # Whatever ran is computed again, with the same draws: no request is lost.
            self._in_flight = None
            self.scheduler.reset()
            raise
        return self._tell(only, only_finished)

    def _tell(self, only: Collection[str] | None, only_finished: bool) -> list[RequestOutput]:
        told = [
            request
            for request in (self._ended if only_finished else self._touched)
            if only is None or request.output.request_id in only
        ]
        if len(told) == len(self._touched):
            self._touched.clear()
        else:
            for request in told:
                del self._touched[request]
        if self.tokenizer is not None:
            for request in told:
                for sample in request.samples:
                    sample.output.text = sample.text.read()
        for request in [request for request in told if not request.num_unfinished]:
            del self._requests[request.output.request_id]
            self._forget(request)
            # Another one: those that were told before have not finished.
            outputs = list(request.output.outputs)
            request.output = replace(request.output, outputs=outputs, finished=True)
        return [request.output for request in told]

    def _host_decides(self) -> bool:
        """Whether the next draw needs output tokens that the host has not read yet."""
        return not self._penalised.isdisjoint(self.scheduler.running)

    def _launch(self) -> Launched | None:
        chunks = self.scheduler.schedule()
        # Whether they are the same takes 2 us for 512, a batch made anew 100.
        if chunks.sampled != self._sampled:
            rows = [sample.draw for sample in _samples(chunks.sampled)]
            self._sampled = chunks.sampled
            self._batch = RowBatch(rows, self.runner.model.config.vocab_size)
        if not chunks:
            return None
        scored, num_prompt_tokens = {}, 0
        for i, chunk in enumerate(chunks.prompts):
            sample = cast(_Sample, chunk.sequence)
            num_prompt_tokens += max(0, min(chunk.length, sample.num_prompt - chunk.start))
            wanted = sample.request.params.prompt_logprobs
            if wanted is not None and self._is_unscored(sample, chunk):
                scored[i] = wanted
        if self._batch.may_mask:
            for sample in _samples(chunks.sampled):
                sample.draw.num_pending = sample.num_pending - 1  # without the token drawn here
        if self._penalised:
            self._count_tokens(self._batch.rows)
        launched = self.runner.launch(chunks, self._batch, scored)
        self._stats.num_steps += 1
        self._stats.num_prompt_tokens += num_prompt_tokens
        return launched

    def _count_tokens(self, rows: Seq[Row]) -> None:
        """Gives the rows with penalties their counts.

        5 bytes a vocabulary entry on the device, so only while they run.
        """
        for row in rows:
            if row.counts is None and row.params.has_penalties:
                row.counts = TokenCounts(
                    row.prompt_token_ids,
                    self.runner.model.config.vocab_size,
                    self.runner.device,
                    row.output_token_ids,
                )

    @staticmethod
    def _is_unscored(sample: _Sample, chunk: Chunk) -> bool:
        """Whether the chunk has prompt tokens to score that were not before a preemption."""
        scores, last = sample.request.output.prompt_logprobs, sample.num_prompt - 1
        if scores is None or chunk.start >= last or sample.output.index != 0:
            return False
        return scores[min(chunk.start + chunk.length, last)] is None

    def _collect(self, launched: Launched) -> None:
        """Reads a step's results into its requests."""
        start = time.perf_counter()
        tokens, logprobs, all_scores = launched.wait()
        now = time.perf_counter()
        self._stats.wait_seconds += now - start
        for chunk, scores in all_scores:
            if not chunk.sequence.finished:
                self._take_scores(cast(_Sample, chunk.sequence).request, chunk, scores)
        for sequence, start, length, samples in launched.chunks.prompts:
            sample = cast(_Sample, sequence)
            if sample.finished:
                continue
            if samples:
                self._take_first(sample, now)
            elif not sample.samples and start + length == sample.num_prompt:
                self._touched[sample.request] = None
                self._end(sample, "length", None)
        touched, num_tokens = self._touched, 0
        for i, (sample, token) in enumerate(
            zip(_samples(launched.chunks.sampled), tokens, strict=True)
        ):
            if sample.finished:
                continue
            touched[sample.request] = None
            num_tokens += 1
            self._take_token(sample, token)
            if logprobs is not None and sample.output.logprobs is not None:
                self._take_logprobs(sample, token, logprobs, i)
        self._stats.num_output_tokens += num_tokens

    def _take_first(self, sample: _Sample, now: float) -> None:
        """What is known with the first token of a request."""
        metrics = sample.request.output.metrics
        if metrics.first_token_time is None:
            metrics.first_token_time = now
            metrics.num_cached_tokens = sample.num_cached
            self._stats.num_cached_tokens += sample.num_cached or 0

    def _take_token(self, sample: _Sample, token: int) -> None:
        sample.num_pending -= 1
        sample.tokens.append(token)
        sample.token_ids.append(token)
        params, stop = sample.request.params, None
        if token in sample.stop_ids and len(sample.token_ids) >= params.min_tokens:
            eos = token in self.eos_token_ids and not params.ignore_eos
            asked = token in (params.stop_token_ids or ())
            if params.include_stop_str_in_output:
                sample.text.push(token, may_stop=False)
            self._end(sample, "stop", token if asked and not eos else None)
            return
        if self.tokenizer is not None:
            stop = sample.text.push(token, may_stop=len(sample.token_ids) > params.min_tokens)
        if stop is not None:
            self._end(sample, "stop", stop)
        elif len(sample.tokens) >= sample.max_length:
            self._end(sample, "length", None)

    def _end(self, sample: _Sample, reason: str, stop_reason: int | str | None) -> None:
        if not isinstance(stop_reason, str):
            # Half a character at the end is shown as what it is; it may complete a stop string.
            late_enough = len(sample.output.token_ids) > sample.request.params.min_tokens
            stop = sample.text.flush(may_stop=late_enough and reason != "abort")
            if stop is not None and reason == "length":
                reason, stop_reason = "stop", stop
        output, sample.draw.counts = sample.output, None
        output.text = sample.text.read()
        output.finish_reason, output.stop_reason = reason, stop_reason
        self.scheduler.finish(sample)
        request = sample.request
        request.num_unfinished -= 1
        if not request.num_unfinished:
            request.output.metrics.finished_time = time.perf_counter()
            self._ended[request] = None

    def _take_logprobs(self, sample: _Sample, token: int, found: ChosenLogprobs, i: int) -> None:
        params, output = sample.request.params, sample.output
        assert output.logprobs is not None
        assert output.cumulative_logprob is not None
        output.logprobs.append(self._logprobs(token, found, i, params.logprobs or 0))
        output.cumulative_logprob += found.values_R[i]

    def _take_scores(self, request: _Request, chunk: Chunk, scores: ChosenLogprobs) -> None:
        found, ids = request.output.prompt_logprobs, request.output.prompt_token_ids
        assert found is not None
        top = request.params.prompt_logprobs or 0
        for i in range(len(scores.values_R)):
            at = chunk.start + 1 + i
            found[at] = self._logprobs(ids[at], scores, i, top)

    def _logprobs(self, token: int, found: ChosenLogprobs, i: int, top: int) -> dict[int, Logprob]:
        """The chosen token first, then the `top` most likely ones (-1 = all)."""
        entries = {token: Logprob(found.values_R[i], found.ranks_R[i], self._word(token))}
        ids, values = found.top_ids_Rk[i], found.top_values_Rk[i]
        count = len(ids) if top == -1 else top
        for rank, (other, value) in enumerate(zip(ids[:count], values, strict=False), 1):
            entries.setdefault(other, Logprob(value, rank, self._word(other)))
        return entries

    def _word(self, token: int) -> str | None:
        return self.tokenizer.token_text(token) if self.tokenizer else None


def _samples(sequences: list[Sequence]) -> list[_Sample]:
    """What the scheduler calls sequences; all that it has are an engine's samples."""
    return cast(list[_Sample], sequences)


def items_of(value: Any, needed: str) -> list[Any]:
    """The items of a sequence; arrays and numbers of numpy and torch become Python's own.

    Raises ValueError, which begins with `needed`, for what is no sequence.
    """
    value = _plain(value)
    if not isinstance(value, Iterable) or isinstance(value, (Mapping, bytes, bytearray)):
        raise ValueError(f"{needed}, not {type(value).__name__}")
    return [_plain(item) for item in value]


def is_integer(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value
