"""Turns a step's chunks into one flat call of the decoder and one draw a sequence.

Shape suffixes as in `model.py`, and R rows to sample, M rows of device state.

Two functions are compiled, each once for every mix of lengths: the decoder up to the hidden states
of all T tokens, and the head with the draw for the R rows that need a token. Sampled tokens stay on
the device (`last_tokens_M`), so that the next step can be launched before the host has read them.
"""

from __future__ import annotations

import signal
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minigen.model import Decoder, PagedKV
from minigen.sampling import Row, SamplingParams, SamplingTensors, draw, edit_logits, top_logprobs
from minigen.scheduler import Chunk

COMPILE_MODES = ("eager", "default", "reduce-overhead", "max-autotune")
COMPILE_THREAD = "minigen-compile"
COMPILED_DRAWS = ("greedy", "plain")
# The compiler's bounds for usual settings, so that all of these share what the compile cache holds.
# Low enough that no tensor of a step has more than 2^31 elements.
MOST_TOKENS, MOST_ROWS = 8192, 2048
# Rows of prompt log-probabilities whose logits are held at once: 512 x 152k x 4 bytes = 0.3 GB.
SCORE_ROWS = 512


def check_compile_mode(compile: str) -> None:
    """Raises ValueError for a word that is none of `COMPILE_MODES`."""
    if compile not in COMPILE_MODES:
        raise ValueError(f"compile {compile!r} is unknown: use one of {', '.join(COMPILE_MODES)}")


@dataclass
class ChosenLogprobs:
    """Log-probabilities of R tokens, on the host: chosen token and its rank, and the top k."""

    values_R: list[float]
    ranks_R: list[int]
    top_values_Rk: list[list[float]]
    top_ids_Rk: list[list[int]]


@dataclass
class Launched:
    """A step that runs on the device; `wait` gives its results."""

    chunks: list[Chunk]
    sampled: list[Chunk]
    tokens_R: Tensor | None
    logprobs: tuple[Tensor, ...] | None
    scores: list[tuple[Chunk, ChosenLogprobs]]
    event: torch.cuda.Event | None

    def wait(self) -> tuple[list[int], ChosenLogprobs | None]:
        """One token a chunk of `sampled`, and their log-probabilities where asked for."""
        if self.event is not None:
            self.event.synchronize()
        num = len(self.sampled)
        tokens = self.tokens_R[:num].tolist() if self.tokens_R is not None else []
        return tokens, _to_host(self.logprobs, num) if self.logprobs else None


def _to_host(tensors: tuple[Tensor, ...], num: int) -> ChosenLogprobs:
    return ChosenLogprobs(*(tensor[:num].tolist() for tensor in tensors))


@dataclass
class StepTensors:
    """A step on the device. T and S are at least 2: a compiled size of 1 would be a constant."""

    tokens_T: Tensor  # -1: the token that row `token_rows_T` sampled last
    token_rows_T: Tensor
    positions_T: Tensor
    slots_T: Tensor
    cu_seqlens_S1: Tensor
    kv_lens_S: Tensor
    block_table_SW: Tensor
    last_R: Tensor  # where the rows to sample lie in T
    rows_R: Tensor


class Runner:
    """Owns the decoder, the cache's memory and the compiled functions.

    Args:
        model: the decoder, weights loaded.
        num_blocks, block_size: the cache is a (k, v) pair a layer, [num_blocks, block_size, K, D].
        max_num_seqs: M; max_num_batched_tokens: the most tokens a step has.
        compile: one of `COMPILE_MODES`.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        compile: str = "default",
    ) -> None:
        check_compile_mode(compile)
        config = model.config
        parameter = model.embed.weight
        self.model, self.device = model, parameter.device
        self.block_size, self.num_blocks = block_size, num_blocks
        self.max_num_seqs, self.max_tokens = max_num_seqs, max_num_batched_tokens
        shape = (num_blocks, block_size, config.num_kv_heads, config.head_dim)
        # One allocation a layer and kind: views of one tensor would make a compiled step copy it.
        self.caches = [
            (
                torch.zeros(shape, dtype=parameter.dtype, device=self.device),
                torch.zeros(shape, dtype=parameter.dtype, device=self.device),
            )
            for _ in range(config.num_layers)
        ]
        # The row past the end belongs to padding.
        self.last_tokens_M = torch.zeros(max_num_seqs + 1, dtype=torch.int64, device=self.device)
        self.compile = compile
        self._status = "eager" if compile == "eager" else "compiling"
        self._hidden: Callable[..., Tensor] = self._hidden_step
        self._head: Callable[..., tuple[Tensor, Tensor]] = self._head_step
        self.launch_seconds = 0.0  # spent in these two, all calls together

    @property
    def compile_status(self) -> str:
        """ "eager", "compiling", "ready" or "failed: why"."""
        return self._status

    # --- the two functions -----------------------------------------------------------------------

    def _hidden_step(
        self,
        tokens_T: Tensor,
        token_rows_T: Tensor,
        positions_T: Tensor,
        slots_T: Tensor,
        cu_seqlens_S1: Tensor,
        kv_lens_S: Tensor,
        block_table_SW: Tensor,
    ) -> Tensor:
        tokens_T = torch.where(tokens_T < 0, self.last_tokens_M[token_rows_T], tokens_T)
        kv = PagedKV(self.caches, slots_T, kv_lens_S, block_table_SW)
        return self.model.hidden_states(tokens_T, positions_T, cu_seqlens_S1, kv)

    def _head_step(
        self, hidden_TE: Tensor, last_R: Tensor, mode: Any, *sampling: Tensor
    ) -> tuple[Tensor, Tensor]:
        logits_RV = self.model.logits(hidden_TE[last_R])
        return draw(logits_RV, *sampling, mode=mode), logits_RV

    def start_compiling(self, background: bool) -> None:
        """Compiles both functions, at once or in a thread while the uncompiled ones serve."""
        if self.compile == "eager":
            return
        if not background:
            self._compile(torch.get_num_threads())
            return
        # Ctrl-C must reach the main thread only; the thread inherits the mask it starts with.
        old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            args = (torch.get_num_threads(),)
            threading.Thread(
                target=self._compile, args=args, daemon=True, name=COMPILE_THREAD
            ).start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, old)

    def _compile(self, num_threads: int) -> None:
        torch.set_num_threads(num_threads)  # a new thread starts with its own number
        mode = None if self.compile == "default" else self.compile
        try:
            # The compile cache takes no notice of bounds, and what it kept for others is refused.
            tag = f"minigen: T <= {self._most_tokens}, S <= {self._most_rows}"
            with (
                torch.compiler.config.patch(cache_key_tag=tag),  # pyright: ignore[reportAttributeAccessIssue]
                torch.inference_mode(),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore")
                for tensor in (*(t for pair in self.caches for t in pair), self.last_tokens_M):
                    torch._dynamo.mark_static_address(tensor)
                hidden = torch.compile(self._hidden_step, fullgraph=True, mode=mode)
                head = torch.compile(self._head_step, fullgraph=True, mode=mode)
                # Sizes all differ: equal ones would be taken for one and the same.
                step = self._null_step(num_tokens=11, num_seqs=5, width=7, num_rows=3)
                self._mark(step)
                hidden_TE = hidden(*self._hidden_inputs(step))
                hidden_TE = hidden_TE.clone()
                torch._dynamo.mark_dynamic(hidden_TE, 0, min=2, max=self._most_tokens)
                for params in (SamplingParams(temperature=0.0), SamplingParams()):
                    rows = [self._null_row(params)] * 3
                    sampling = self._sampling(rows)
                    for tensor in (step.last_R, *sampling.tensors()):
                        torch._dynamo.mark_dynamic(tensor, 0, min=2, max=self._most_rows)
                    head(hidden_TE, step.last_R, sampling.mode, *sampling.tensors())
        # No compiler, no headers, a bug of the compiler: the uncompiled step serves on.
        except Exception as error:
            reason = str(error).strip().splitlines()
            self._status = f"failed: {type(error).__name__}: {reason[0] if reason else 'no reason'}"
            return
        self._hidden, self._head = hidden, head
        self._status = "ready"

    @property
    def _most_tokens(self) -> int:
        """Bound of T that the compiler may rely on."""
        return max(self.max_tokens + 2, MOST_TOKENS)

    @property
    def _most_rows(self) -> int:
        """The same for S and R."""
        return max(self.max_num_seqs + 1, MOST_ROWS)

    def _mark(self, step: StepTensors) -> None:
        most, seqs = self._most_tokens, self._most_rows
        mark = torch._dynamo.mark_dynamic
        for tensor in (step.tokens_T, step.token_rows_T, step.positions_T, step.slots_T):
            mark(tensor, 0, min=2, max=most)
        mark(step.cu_seqlens_S1, 0, min=3, max=seqs + 1)
        mark(step.kv_lens_S, 0, min=2, max=seqs)
        mark(step.block_table_SW, 0, min=2, max=seqs)
        mark(step.block_table_SW, 1, min=2, max=max(64, 2 * self.num_blocks))

    def _null_step(self, num_tokens: int, num_seqs: int, width: int, num_rows: int) -> StepTensors:
        """A step that touches no cache block and no row that anybody owns."""
        ends = np.minimum(np.arange(num_seqs + 1) * 2, num_tokens)
        ends[-1] = num_tokens
        return self._upload(
            tokens=np.zeros(num_tokens, np.int64),
            token_rows=np.full(num_tokens, self.max_num_seqs),
            positions=np.zeros(num_tokens, np.int64),
            slots=np.full(num_tokens, -1),
            ends=ends,
            kv_lens=np.zeros(num_seqs, np.int64),
            table=np.zeros((num_seqs, width), np.int32),
            last=np.zeros(num_rows, np.int64),
            rows=np.full(num_rows, self.max_num_seqs),
        )

    @staticmethod
    def _null_row(params: SamplingParams) -> Row:
        return Row(params, 0, 0, 0, (), ())

    def _sampling(self, rows: list[Row]) -> SamplingTensors:
        return SamplingTensors.from_rows(rows, self.model.config.vocab_size, self.device)

    @staticmethod
    def _hidden_inputs(step: StepTensors) -> tuple[Tensor, ...]:
        return (
            step.tokens_T, step.token_rows_T, step.positions_T, step.slots_T,
            step.cu_seqlens_S1, step.kv_lens_S, step.block_table_SW,
        )  # fmt: skip

    # --- a step ----------------------------------------------------------------------------------

    @torch.inference_mode()
    def launch(
        self,
        chunks: list[Chunk],
        sampling_rows: Sequence[Row],
        num_logprobs: int | None,
        scored: dict[int, int],
    ) -> Launched:
        """Runs a step.

        Args:
            chunks: what the scheduler chose.
            sampling_rows: one a chunk that samples, in order.
            num_logprobs: the most top log-probabilities a row wants (-1 = all); None = no row any.
            scored: {index of a chunk: number of top log-probabilities} whose prompt is scored.
        """
        sampled = [chunk for chunk in chunks if chunk.samples]
        step = self._prepare(chunks)
        hidden_TE = self._timed(self._hidden, *self._hidden_inputs(step))
        scores = [(chunks[i], self._score(hidden_TE, chunks, i, top)) for i, top in scored.items()]
        tokens_R = logprobs = event = None
        if sampled:
            rows = list(sampling_rows)
            if len(rows) == 1:
                # Of the same mode as the row it keeps company.
                plain = SamplingParams(temperature=0.0 if rows[0].params.is_greedy else 1.0)
                rows.append(self._null_row(plain))
            sampling = self._sampling(rows)
            # Two modes are compiled; the draws that filter run uncompiled on the same logits.
            mode = sampling.mode if sampling.mode in COMPILED_DRAWS else "greedy"
            inputs = (hidden_TE, step.last_R, mode, *sampling.tensors())
            drawn_R, logits_RV = self._timed(self._head, *inputs)
            if sampling.needs_edits or mode != sampling.mode:
                edited_RV = edit_logits(logits_RV, rows) if sampling.needs_edits else logits_RV
                drawn_R = draw(edited_RV, *sampling.tensors(), mode=sampling.mode)
            self.last_tokens_M[step.rows_R] = drawn_R
            if num_logprobs is not None:
                logprobs = top_logprobs(logits_RV, drawn_R, num_logprobs)
            if self.device.type == "cuda":
                tokens_R = drawn_R.to("cpu", non_blocking=True)
                if logprobs is not None:
                    logprobs = tuple(t.to("cpu", non_blocking=True) for t in logprobs)
                event = torch.cuda.Event()
                event.record()
            else:
                tokens_R = drawn_R
        return Launched(chunks, sampled, tokens_R, logprobs, scores, event)

    def _timed(self, function: Callable[..., Any], *inputs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*inputs)
        finally:
            self.launch_seconds += time.perf_counter() - start

    def _score(self, hidden_TE: Tensor, chunks: list[Chunk], i: int, top: int) -> ChosenLogprobs:
        """Log-probabilities of the prompt tokens that follow each token of chunk i."""
        chunk = chunks[i]
        begin = sum(other.length for other in chunks[:i])
        following = chunk.sequence.tokens[chunk.start + 1 : chunk.start + chunk.length + 1]
        following = following[: max(0, chunk.sequence.num_prompt - chunk.start - 1)]
        parts = ChosenLogprobs([], [], [], [])
        for at in range(0, len(following), SCORE_ROWS):
            tokens_R = torch.tensor(following[at : at + SCORE_ROWS], device=self.device)
            logits_RV = self.model.logits(hidden_TE[begin + at : begin + at + len(tokens_R)])
            part = _to_host(top_logprobs(logits_RV, tokens_R, top), len(tokens_R))
            parts.values_R += part.values_R
            parts.ranks_R += part.ranks_R
            parts.top_values_Rk += part.top_values_Rk
            parts.top_ids_Rk += part.top_ids_Rk
        return parts

    def _prepare(self, chunks: list[Chunk]) -> StepTensors:
        size, spare = self.block_size, self.max_num_seqs
        sequences = [chunk.sequence for chunk in chunks]
        lengths = np.array([chunk.length for chunk in chunks])
        starts = np.array([chunk.start for chunk in chunks])
        ends = np.concatenate(([0], np.cumsum(lengths)))
        tokens = np.empty(ends[-1], np.int64)
        for chunk, begin, end in zip(chunks, ends, ends[1:], strict=False):
            known = chunk.sequence.tokens[chunk.start : chunk.start + chunk.length]
            tokens[begin : begin + len(known)] = known
            tokens[begin + len(known) : end] = -1  # pending: it is still on the device
        # Rounded up to a power of two, so that the kernels see few different widths.
        width = max(2, 1 << (max(len(s.blocks) for s in sequences) - 1).bit_length())
        table = np.zeros((len(chunks), width), np.int32)
        for row, sequence in zip(table, sequences, strict=True):
            row[: len(sequence.blocks)] = sequence.blocks
        which = np.repeat(np.arange(len(chunks)), lengths)
        positions = np.arange(len(tokens)) + (starts - ends[:-1])[which]
        slots = table[which, positions // size].astype(np.int64) * size + positions % size
        long = np.array([self.model.max_length if s.long_rope else 0 for s in sequences])
        rows = np.array([s.row for s in sequences])
        kv_lens = starts + lengths
        token_rows = rows[which]
        positions = positions + long[which]
        samples = np.array([chunk.samples for chunk in chunks])
        last, sample_rows = (ends[1:] - 1)[samples], rows[samples]
        if len(tokens) == 1:
            tokens, positions = np.append(tokens, 0), np.append(positions, 0)
            slots, token_rows = np.append(slots, -1), np.append(token_rows, spare)
        if len(chunks) == 1:
            ends, kv_lens = np.append(ends, len(tokens)), np.append(kv_lens, 0)
            table = np.concatenate((table, np.zeros((1, width), np.int32)))
        if len(last) == 1:
            last, sample_rows = np.append(last, 0), np.append(sample_rows, spare)
        return self._upload(
            tokens=tokens, token_rows=token_rows, positions=positions, slots=slots, ends=ends,
            kv_lens=kv_lens, table=table, last=last, rows=sample_rows,
        )  # fmt: skip

    def _upload(self, **arrays: np.ndarray) -> StepTensors:
        int32 = {"ends", "kv_lens", "table"}
        tensors = []
        for name, array in arrays.items():
            host = torch.from_numpy(array.astype(np.int32 if name in int32 else np.int64))
            if self.device.type == "cuda":
                host = host.pin_memory().to(self.device, non_blocking=True)
            tensors.append(host)
        return StepTensors(*tensors)
