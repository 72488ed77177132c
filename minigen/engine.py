"""The step loop: requests come in, steps run, outputs come out.

With `overlap` the host reads a step's tokens after it has launched the next one, so a request that
stops has at most one surplus token computed, which is thrown away.
"""

import operator
import random
import time
from collections.abc import Collection, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

from minigen.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from minigen.runner import ChosenLogprobs, Launched, Runner
from minigen.sampling_params import SamplingParams
from minigen.sampling_rows import Row, TokenCounts
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


@dataclass(eq=False)
class _Sample:
    """One of a request's n continuations."""

    request: "_Request"
    sequence: Sequence
    text: TextStream
    output: CompletionOutput
    row: Row  # its next draw: position and counts are brought up to date for each


@dataclass(eq=False)
class _Request:
    request_id: str
    prompt: str | None
    prompt_ids: list[int]
    params: SamplingParams
    seed: int
    stop_ids: frozenset[int]
    metrics: RequestMetrics
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    samples: list[_Sample] = field(default_factory=list)
    outputs: list[CompletionOutput] = field(default_factory=list)  # those of the samples
    num_unfinished: int = 0  # of its samples

    @property
    def finished(self) -> bool:
        return self.num_unfinished == 0

    def snapshot(self) -> RequestOutput:
        return RequestOutput(
            self.request_id, self.prompt, self.prompt_ids, self.prompt_logprobs,
            list(self.outputs), self.num_unfinished == 0, self.metrics,
        )  # fmt: skip


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
        self._sample_of: dict[Sequence, _Sample] = {}
        self._penalised: set[Sequence] = set()  # those of requests with penalties
        self._in_flight: Launched | None = None
        # Not told yet: kept over a step that fails, or who finished in it would never be heard of.
        self._touched: dict[str, _Request] = {}
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
        eos = frozenset() if params.ignore_eos else self.eos_token_ids
        unscored: list[dict[int, Logprob] | None] = [None] * len(ids)
        request = _Request(
            request_id=request_id,
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_ids=ids,
            params=params,
            seed=self._seeds.getrandbits(63) if params.seed is None else params.seed,
            stop_ids=eos | frozenset(params.stop_token_ids or ()),
            metrics=RequestMetrics(time.perf_counter()),
            prompt_logprobs=None if params.prompt_logprobs is None else unscored,
        )
        for index in range(params.n):
            scored = params.prompt_logprobs is not None and index == 0
            sequence = Sequence(
                list(ids), max_length if samples else len(ids), samples, use_prefix_cache=not scored
            )
            text = TextStream(
                self.tokenizer,
                list(params.stop or ()),
                params.include_stop_str_in_output,
                params.skip_special_tokens,
                ids,
            )
            output = CompletionOutput(index, logprobs=None if params.logprobs is None else [])
            if params.logprobs is not None:
                output.cumulative_logprob = 0.0
            # vLLM rules the end out below min_tokens even where it would be ignored.
            ends = request.stop_ids | self.eos_token_ids
            row = Row(params, request.seed, index, len(ids), ids, output.token_ids, ends)
            sample = _Sample(request, sequence, text, output, row)
            request.samples.append(sample)
            request.outputs.append(output)
            self._sample_of[sequence] = sample
            if params.has_penalties:
                self._penalised.add(sequence)
        request.num_unfinished = params.n
        self._requests[request_id] = request
        for sample in request.samples:
            self.scheduler.add(sample.sequence)

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
        self._touched.pop(request_id, None)
        for sample in request.samples:
            if not sample.sequence.finished:
                self._end(sample, "abort", None)
            self._forget(sample)

    def _forget(self, sample: _Sample) -> None:
        self._sample_of.pop(sample.sequence, None)
        self._penalised.discard(sample.sequence)

    def step(
        self, only: Collection[str] | None = None, only_finished: bool = False
    ) -> list[RequestOutput]:
        """Runs one step -> the state of every request that got a token since it was last told.

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
        told = [
            request
            for request_id, request in self._touched.items()
            if (only is None or request_id in only)
            and not (only_finished and request.num_unfinished)
        ]
        for request in told:
            del self._touched[request.request_id]
            if request.finished and self._requests.pop(request.request_id, None):
                for sample in request.samples:
                    self._forget(sample)
        return [request.snapshot() for request in told]

    def _host_decides(self) -> bool:
        """Whether the next draw needs output tokens that the host has not read yet."""
        return not self._penalised.isdisjoint(self.scheduler.running)

    def _launch(self) -> Launched | None:
        chunks = self.scheduler.schedule()
        if not chunks:
            return None
        rows, most, scored, num_prompt_tokens = [], None, {}, 0
        for i, (sequence, start, length, samples) in enumerate(chunks):
            sample = self._sample_of[sequence]
            params = sample.request.params
            if samples:
                row = sample.row
                row.position = start + length
                row.num_pending = sequence.num_pending - 1  # without the token drawn here
                rows.append(row)
                if params.logprobs is not None:
                    most = params.logprobs if most is None else _most(most, params.logprobs)
            if start < sequence.num_prompt:
                num_prompt_tokens += min(length, sequence.num_prompt - start)
                wanted = params.prompt_logprobs
                if wanted is not None and self._is_unscored(sample, chunks[i]):
                    scored[i] = wanted
        if self._penalised:
            self._count_tokens(rows)
        launched = self.runner.launch(chunks, rows, most, scored)
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
        scores, last = sample.request.prompt_logprobs, chunk.sequence.num_prompt - 1
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
            sample = self._sample_of.get(chunk.sequence)
            if sample is not None:
                self._take_scores(sample.request, chunk, scores)
        for sequence, start, length, samples in launched.chunks:
            if samples or sequence.samples or sequence.finished:
                continue
            if start + length == sequence.num_prompt:
                sample = self._sample_of[sequence]
                self._touched[sample.request.request_id] = sample.request
                self._end(sample, "length", None)
        for i, (chunk, token) in enumerate(zip(launched.sampled, tokens, strict=True)):
            sequence = chunk.sequence
            if sequence.finished:
                continue
            sample = self._sample_of[sequence]
            request = sample.request
            self._touched[request.request_id] = request
            metrics = request.metrics
            if metrics.first_token_time is None:
                metrics.first_token_time = now
                metrics.num_cached_tokens = sequence.num_cached
                self._stats.num_cached_tokens += sequence.num_cached or 0
            self._stats.num_output_tokens += 1
            self._take_token(sample, token)
            if logprobs is not None and sample.output.logprobs is not None:
                self._take_logprobs(sample, token, logprobs, i)

    def _take_token(self, sample: _Sample, token: int) -> None:
        request, sequence, output = sample.request, sample.sequence, sample.output
        sequence.num_pending -= 1
        sequence.tokens.append(token)
        output.token_ids.append(token)
        params, num_tokens = request.params, len(output.token_ids)
        if token in request.stop_ids and num_tokens >= params.min_tokens:
            eos = token in self.eos_token_ids and not params.ignore_eos
            asked = token in (params.stop_token_ids or ())
            if params.include_stop_str_in_output:
                sample.text.push(token, may_stop=False)
            self._end(sample, "stop", token if asked and not eos else None)
            return
        stop = None
        if self.tokenizer is not None:
            stop = sample.text.push(token, may_stop=num_tokens > params.min_tokens)
            output.text = sample.text.text
        if stop is not None:
            self._end(sample, "stop", stop)
        elif len(sequence.tokens) >= sequence.max_length:
            self._end(sample, "length", None)

    def _end(self, sample: _Sample, reason: str, stop_reason: int | str | None) -> None:
        if not isinstance(stop_reason, str):
            # Half a character at the end is shown as what it is; it may complete a stop string.
            late_enough = len(sample.output.token_ids) > sample.request.params.min_tokens
            stop = sample.text.flush(may_stop=late_enough and reason != "abort")
            if stop is not None and reason == "length":
                reason, stop_reason = "stop", stop
        output, sample.row.counts = sample.output, None
        output.text = sample.text.text
        output.finish_reason, output.stop_reason = reason, stop_reason
        self.scheduler.finish(sample.sequence)
        sample.request.num_unfinished -= 1
        if sample.request.finished:
            sample.request.metrics.finished_time = time.perf_counter()

    def _take_logprobs(self, sample: _Sample, token: int, found: ChosenLogprobs, i: int) -> None:
        params, output = sample.request.params, sample.output
        assert output.logprobs is not None
        assert output.cumulative_logprob is not None
        output.logprobs.append(self._logprobs(token, found, i, params.logprobs or 0))
        output.cumulative_logprob += found.values_R[i]

    def _take_scores(self, request: _Request, chunk: Chunk, scores: ChosenLogprobs) -> None:
        assert request.prompt_logprobs is not None
        top = request.params.prompt_logprobs or 0
        for i in range(len(scores.values_R)):
            at = chunk.start + 1 + i
            request.prompt_logprobs[at] = self._logprobs(request.prompt_ids[at], scores, i, top)

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


def _most(a: int, b: int) -> int:
    return -1 if -1 in (a, b) else max(a, b)
