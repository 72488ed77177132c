"""Turns a step's chunks into one flat call of the decoder and one draw a sequence.

Shape suffixes as in `model.py`, and R rows to sample, M rows of device state.

Two functions are compiled, each once for every mix of lengths: the decoder up to the hidden states
of all T tokens, and the head with the draw for the R rows that need a token. Where graphs replay
the steps, the decoder is compiled as one layer that is called for each: that takes a tenth of the
time, and what the calls cost the host is paid at the capture alone. On a GPU the head is called as
it is where compiling would fuse nothing of it. Sampled tokens stay on the device (`last_tokens_M`),
so that the next step can be launched before the host has read them.
"""

from __future__ import annotations

import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minigen.few_rows import few_rows_layer, serves_few_rows, serves_tiles, tiled_layer
from minigen.graphs import (
    FIRST_WIDTH,
    HIDDEN,
    USUAL_WIDTH,
    WIDTH_STEP,
    CaptureError,
    StepGraphs,
)
from minigen.kernels import native, sum_norm
from minigen.kernels.varlen_attention_gluon import SHORT_QUERIES
from minigen.model import (
    Block,
    Decoder,
    DecoderConfig,
    PagedKV,
    closing_norm,
    open_layer,
)
from minigen.sampling import draw, edit_logits, top_logprobs
from minigen.sampling_params import SamplingParams
from minigen.sampling_rows import Row, RowBatch, SamplingTensors
from minigen.scheduler import Chunk, Chunks
from minigen.start import share_triton_cache
from minigen.step import StepSize, StepTensors, StepWriter

COMPILE_MODES = ("eager", "default", "reduce-overhead", "max-autotune")
TORCHS_GRAPHS = ("reduce-overhead", "max-autotune")  # modes in which torch captures graphs itself
COMPILE_THREAD = "minigen-compile"
COMPILED_DRAWS = ("greedy", "plain")
# The head that gives logits, for all other draws, edits and log-probabilities.
LOGITS = "logits"
# The compiler's bounds for usual settings, so that all of these share what the compile cache holds.
# Low enough that no tensor of a step has more than 2^31 elements.
MOST_TOKENS, MOST_ROWS = 8192, 2048
# How often torch may compile a function anew before it refuses (by default 8 times). It counts the
# engines of a process together where they share two functions, and each that differs in dtype,
# mode or model adds three heads. Raised only while an engine compiles: one that serves has nothing
# to compile.
MOST_COMPILATIONS = 1 << 16
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

    chunks: Chunks
    tokens_R: Tensor | None
    logprobs: tuple[Tensor, ...] | None
    scores: list[tuple[Chunk, list[tuple[Tensor, ...]]]]  # in parts of SCORE_ROWS
    event: torch.cuda.Event | None

    def wait(
        self,
    ) -> tuple[list[int], ChosenLogprobs | None, list[tuple[Chunk, ChosenLogprobs]]]:
        """A token each of `chunks.sampled`, log-probabilities where asked for, and scores."""
        if self.event is not None:
            self.event.synchronize()
        num = len(self.chunks.sampled)
        tokens = self.tokens_R[:num].tolist() if self.tokens_R is not None else []
        logprobs = _lists([self.logprobs], num) if self.logprobs else None
        return tokens, logprobs, [(chunk, _lists(parts)) for chunk, parts in self.scores]


def kinds_of_layers(config: DecoderConfig) -> list[int]:
    """The first layer of each kind, and the last of all, which takes another's output."""
    kinds = list(zip(config.layer_windows, config.layer_rope, strict=True))
    return sorted({*(kinds.index(kind) for kind in kinds), len(kinds) - 1})


def guards_beside_model(guards: Sequence[Any]) -> list[bool]:
    """Which of Dynamo's guards a step function keeps: those on anything but `Runner.model`.

    Modules, hooks and weights do not change once an engine serves, and to look at those of 30
    layers took 0.9 ms of each step of 8 (SmolLM2-135M, one request, two CPU cores). For methods
    `with_own_code`: nothing else tells two engines' models apart.
    """
    return [
        not guard.name.replace("L['self']", "self").startswith("self.model") for guard in guards
    ]


def with_own_code(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same method with a code object of its own, by which Dynamo keeps what it compiled."""
    assert isinstance(method, MethodType)
    function = method.__func__
    copy = FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__,
        function.__defaults__, function.__closure__,
    )  # fmt: skip
    return MethodType(copy, method.__self__)


def _lists(parts: list[tuple[Tensor, ...]], num: int | None = None) -> ChosenLogprobs:
    """Tensors on the host, cut off after `num` rows each, as one."""
    found = ChosenLogprobs([], [], [], [])
    for values_R, ranks_R, top_values_Rk, top_ids_Rk in parts:
        found.values_R += values_R[:num].tolist()
        found.ranks_R += ranks_R[:num].tolist()
        found.top_values_Rk += top_values_Rk[:num].tolist()
        found.top_ids_Rk += top_ids_Rk[:num].tolist()
    return found


class Runner:
    """Owns the decoder, the cache's memory and the compiled functions.

    Args:
        model: the decoder, weights loaded.
        num_blocks, block_size: the cache is a (k, v) pair a layer, [num_blocks, block_size, K, D].
        max_num_seqs: M; max_num_batched_tokens: the most tokens a step has.
        compile: one of `COMPILE_MODES`.
        decode_graphs: replay steps from CUDA graphs (elsewhere: from the same buffers).
            None: on a GPU where `compile` is "default"; two of the other words are torch's graphs.
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
        decode_graphs: bool | None = None,
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
        most_blocks = min(num_blocks, -(-model.max_length // block_size))
        self._writer = StepWriter(
            max_num_seqs, most_blocks, block_size, spare_row=max_num_seqs,
            long_rope_row=model.max_length,
        )  # fmt: skip
        # The row past the end belongs to padding.
        self.last_tokens_M = torch.zeros(max_num_seqs + 1, dtype=torch.int64, device=self.device)
        self.compile = compile
        self._status = "eager" if compile == "eager" else "compiling"
        self._hidden: Callable[..., Tensor] = self._hidden_step
        self._head: Callable[..., Tensor] = self._head_step
        self._begin: Callable[..., tuple[Tensor, ...]] = self._begin_step
        self._layer: Callable[..., tuple[Tensor, Tensor]] = open_layer
        self._norm: Callable[..., Tensor] = closing_norm
        self._kinds = kinds_of_layers(config)
        self._graphs: StepGraphs | None = None
        if decode_graphs or (
            decode_graphs is None and self.device.type == "cuda" and compile == "default"
        ):
            self._graphs = StepGraphs(
                self._captured_call,
                self._warm_up_call,
                self._null_sampling,
                self._write_null_step,
                max_num_seqs,
                max_num_batched_tokens,
                most_blocks,
                self.device,
                least_rows=1 if self._computes_one_row else 2,
            )
        self.launch_seconds = 0.0  # spent in the steps' functions and graphs, all calls together

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

    def _hidden_by_layer(
        self,
        tokens_T: Tensor,
        token_rows_T: Tensor,
        positions_T: Tensor,
        slots_T: Tensor,
        cu_seqlens_S1: Tensor,
        kv_lens_S: Tensor,
        block_table_SW: Tensor,
        layers: Sequence[int] | None = None,
        first_only: bool = False,
    ) -> Tensor:
        """The same as `_hidden_step`, in functions that are compiled one by one.

        `layers`: the indices of those to run, where not all. `first_only`: the layers compute the
        first token alone, the one query of its sequence (`_computes_one_row`): [1, E].
        """
        x_TE, cos_TR, sin_TR = self._begin(tokens_T, token_rows_T, positions_T)
        if first_only:
            x_TE, cos_TR, sin_TR, slots_T = x_TE[:1], cos_TR[:1], sin_TR[:1], slots_T[:1]
            cu_seqlens_S1 = cu_seqlens_S1[:2]
            kv_lens_S, block_table_SW = kv_lens_S[:1], block_table_SW[:1]
        size = self.model.config, len(x_TE), self.device, x_TE.dtype
        kv = PagedKV(self.caches, slots_T, kv_lens_S, block_table_SW)
        blocks: list[tuple[Block, tuple[Any, ...]]] = []
        for i in range(len(self.model.blocks)) if layers is None else layers:
            block = self.model.blocks[i]
            assert isinstance(block, Block)
            blocks.append((block, (cos_TR, sin_TR, cu_seqlens_S1, kv.layer(i))))
        norm = self.model.norm
        tiled, few = serves_tiles(*size), serves_few_rows(*size)
        if tiled or few:
            part_PTE = x_TE.new_empty(0, *x_TE.shape, dtype=torch.float32)
            for block, step in blocks:
                if tiled:
                    x_TE, part_PTE = tiled_layer(block, x_TE, part_PTE, *step)
                else:
                    x_TE = few_rows_layer(block, x_TE, *step)
            return sum_norm(x_TE, part_PTE, norm.weight, norm.eps, norm.offset, True)[1]
        out_TE = torch.zeros_like(x_TE)
        for block, step in blocks:
            x_TE, out_TE = self._layer(block, x_TE, out_TE, *step)
        return self._norm(norm, x_TE, out_TE)

    def _launch_each_kernel(self, *inputs: Tensor, first_only: bool = False) -> Tensor:
        """A step without the layers that launch what others have launched; its result is none."""
        return self._hidden_by_layer(*inputs, layers=self._kinds, first_only=first_only)

    def _begin_step(
        self, tokens_T: Tensor, token_rows_T: Tensor, positions_T: Tensor
    ) -> tuple[Tensor, ...]:
        tokens_T = torch.where(tokens_T < 0, self.last_tokens_M[token_rows_T], tokens_T)
        return self.model.begin(tokens_T, positions_T)

    def _head_step(self, hidden_TE: Tensor, last_R: Tensor, head: Any, *sampling: Tensor) -> Tensor:
        """What one of `COMPILED_DRAWS` draws [R], or the logits [R, V] that `LOGITS` asks for.

        Not both: a draw that gives no logits need not write them to memory as fp32.
        """
        logits_RV = self.model.logits(hidden_TE[last_R], wide=head == LOGITS)
        return logits_RV if head == LOGITS else draw(logits_RV, *sampling, mode=head)

    def serve_by(
        self,
        hidden: Callable[..., Tensor] | None = None,
        head: Callable[..., Tensor] | None = None,
        replay: Callable[..., Tensor] | None = None,
    ) -> None:
        """Has steps call other functions: to watch what they are given, or to time the host alone.

        hidden: in place of the decoder, the seven tensors of `_hidden_step` -> hidden_TE.
        head: in place of the head, as `_head_step`.
        replay: in place of a graph, as `StepGraphs.run`; without graphs it is never called.
        What is None stays. For an engine that does not compile: compiling sets the first two anew.
        """
        self._hidden, self._head = hidden or self._hidden, head or self._head
        if replay is not None and self._graphs is not None:
            self._graphs.run = replay

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
        if self.device.type == "cpu":
            native.load_if_possible()
        share_triton_cache(self.device)
        try:
            # The compile cache takes no notice of bounds, and what it kept for others is refused.
            bounds = self._most_tokens, self._most_rows, self._most_blocks
            tag = f"minigen: T, S, W <= {bounds}"
            with (
                torch.compiler.config.patch(cache_key_tag=tag),  # pyright: ignore[reportAttributeAccessIssue]
                torch._dynamo.config.patch(  # pyright: ignore[reportAttributeAccessIssue]
                    recompile_limit=MOST_COMPILATIONS,
                    accumulated_recompile_limit=MOST_COMPILATIONS,
                ),
                torch.inference_mode(),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore")
                for tensor in (*(t for pair in self.caches for t in pair), self.last_tokens_M):
                    torch._dynamo.mark_static_address(tensor)
                head_step: Callable[..., Tensor] = self._head_step
                if self._compiles_heads:
                    head_step = self._compiled(head_step)
                # Sizes all differ: equal ones would be taken for one and the same.
                step = self._null_step(StepSize(num_tokens=11, num_seqs=5, num_rows=3, width=7))
                self._mark(step)
                if self._by_layer:
                    hidden_TE = self._compile_layer(step)
                    hidden: Callable[..., Tensor] = self._hidden_by_layer
                else:
                    hidden = self._compiled(self._hidden_step)
                    hidden_TE = hidden(*self._hidden_inputs(step))
                hidden_TE = hidden_TE.clone()
                torch._dynamo.mark_dynamic(hidden_TE, 0, min=2, max=self._most_tokens)
                for head in (*COMPILED_DRAWS, LOGITS):
                    sampling = self._null_sampling(3, head, None)
                    for tensor in (step.last_R, *sampling.tensors()):
                        torch._dynamo.mark_dynamic(tensor, 0, min=2, max=self._most_rows)
                    head_step(hidden_TE, step.last_R, head, *sampling.tensors())
                if self.device.type == "cuda" and self.compile not in TORCHS_GRAPHS:
                    self._load_kernels(self._launch_each_kernel if self._by_layer else hidden)
        # No compiler, no headers, a bug of the compiler: the uncompiled step serves on.
        except Exception as error:
            reason = str(error).strip().splitlines()
            self._status = f"failed: {type(error).__name__}: {reason[0] if reason else 'no reason'}"
            return
        self._hidden, self._head = hidden, head_step
        self._status = "ready"

    def _compiled(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        mode = None if self.compile == "default" else self.compile
        if mode is not None or self.device.type != "cpu":  # a GPU's steps are seldom called
            return torch.compile(function, fullgraph=True, mode=mode)
        # A dict for each: `torch.compile` takes the filter out of it.
        options: dict[str, Any] = {"guard_filter_fn": guards_beside_model, "size_asserts": False}
        return torch.compile(with_own_code(function), fullgraph=True, options=options)

    @property
    def _compiles_heads(self) -> bool:
        """Whether that gains anything.

        On a GPU a head is a lookup, a matrix product and the kernels of `draw_tokens`, or a cast:
        with one kernel more or less they are what the compiler would launch, and three heads are a
        tenth of a warm start's compiling.
        """
        fuses = self.model.config.logit_softcap != 0.0 or self.device.type != "cuda"
        return fuses or self.compile in TORCHS_GRAPHS

    @property
    def _by_layer(self) -> bool:
        return self._graphs is not None and self.compile not in TORCHS_GRAPHS

    @property
    def _computes_one_row(self) -> bool:
        """Whether a captured step of one sequence leaves out the null token beside it.

        A layer of Qwen3-0.6B takes 19.7 us for one row and 22.4 for two (H200). Not where the head
        is compiled, which would be once more for a size of one.
        """
        size = self.model.config, 1, self.device, self.model.embed.weight.dtype
        serves = serves_few_rows(*size) or serves_tiles(*size)
        return serves and not self._compiles_heads

    def _compile_layer(self, step: StepTensors) -> Tensor:
        """Compiles what `_hidden_by_layer` calls, and runs it on a null step."""
        begin = torch.compile(self._begin_step, fullgraph=True)
        layer = torch.compile(open_layer, fullgraph=True)
        norm = torch.compile(closing_norm, fullgraph=True)

        def mark(*tensors: Tensor) -> None:
            for tensor in tensors:
                torch._dynamo.mark_dynamic(tensor, 0, min=2, max=self._most_tokens)

        x_TE, cos_TR, sin_TR = begin(step.tokens_T, step.token_rows_T, step.positions_T)
        mark(cos_TR, sin_TR)
        kv = PagedKV(self.caches, step.slots_T, step.kv_lens_S, step.block_table_SW)
        out_TE = torch.zeros_like(x_TE)
        for i, block in enumerate(self.model.blocks):
            assert isinstance(block, Block)
            mark(x_TE, out_TE)
            x_TE, out_TE = layer(
                block, x_TE, out_TE, cos_TR, sin_TR, step.cu_seqlens_S1, kv.layer(i)
            )
        mark(x_TE, out_TE)
        hidden_TE = norm(self.model.norm, x_TE, out_TE)
        self._begin, self._layer, self._norm = begin, layer, norm
        return hidden_TE

    def _load_kernels(self, hidden: Callable[..., Tensor]) -> None:
        """Runs null steps that lead attention to each of its tiles, keys divided and in one piece.

        Triton compiles a kernel at the first call that wants it, which takes a second or so.
        """
        sizes = (1, 2, 4, 8, 16, 32, 64, 128)
        most = self.max_tokens // 2
        if most >= SHORT_QUERIES:  # from which heads of 64 have a kernel of their own, too
            sizes += (min(most, SHORT_QUERIES + 1),)
        for width in (2, min(USUAL_WIDTH, self._most_blocks)):
            for queries in sizes:
                size = StepSize(num_tokens=2 * queries, num_seqs=2, num_rows=0, width=width)
                hidden(*self._hidden_inputs(self._null_step(size)))

    @property
    def _most_tokens(self) -> int:
        """Bound of T that the compiler may rely on."""
        return max(self.max_tokens + 2, MOST_TOKENS)

    @property
    def _most_rows(self) -> int:
        """The same for S and R."""
        return max(self.max_num_seqs + 1, MOST_ROWS)

    @property
    def _most_blocks(self) -> int:
        """The same for W, which a captured step rounds up most."""
        return max(FIRST_WIDTH, WIDTH_STEP * self.num_blocks)

    def _mark(self, step: StepTensors) -> None:
        most, seqs = self._most_tokens, self._most_rows
        mark = torch._dynamo.mark_dynamic
        for tensor in (step.tokens_T, step.token_rows_T, step.positions_T, step.slots_T):
            mark(tensor, 0, min=2, max=most)
        mark(step.cu_seqlens_S1, 0, min=3, max=seqs + 1)
        mark(step.kv_lens_S, 0, min=2, max=seqs)
        mark(step.block_table_SW, 0, min=2, max=seqs)
        mark(step.block_table_SW, 1, min=2, max=self._most_blocks)

    def _null_step(self, size: StepSize) -> StepTensors:
        """A step that touches no cache block and no row that anybody owns."""
        return size.views(self._upload(Chunks(), size)[0])

    def _write_null_step(self, step_bytes: Tensor, size: StepSize) -> None:
        self._upload(Chunks(), size, step_bytes)

    def _null_sampling(self, num_rows: int, head: str, into: Tensor | None) -> SamplingTensors:
        params = SamplingParams(temperature=1.0 if head == "plain" else 0.0)
        rows = [Row(params, 0, 0, 0, (), ())] * num_rows
        return SamplingTensors.from_rows(rows, self.model.config.vocab_size, self.device, into)

    @staticmethod
    def _hidden_inputs(step: StepTensors) -> tuple[Tensor, ...]:
        return (
            step.tokens_T, step.token_rows_T, step.positions_T, step.slots_T,
            step.cu_seqlens_S1, step.kv_lens_S, step.block_table_SW,
        )  # fmt: skip

    # --- a step ----------------------------------------------------------------------------------

    @torch.inference_mode()
    def launch(self, chunks: Chunks, batch: RowBatch, scored: dict[int, int]) -> Launched:
        """Runs a step.

        Args:
            chunks: what the scheduler chose; each step of it is to be launched, or undone.
            batch: one row for each of `chunks.sampled`, in order.
            scored: {index in `chunks.prompts`: number of top log-probabilities} of those whose
                prompt is scored.
        """
        num_sampled, num_logprobs = len(chunks.sampled), batch.num_logprobs
        needs_edits = batch.needs_edits
        compiled = num_logprobs is None and not needs_edits and batch.mode in COMPILED_DRAWS
        # The draws that filter run uncompiled on the logits.
        head = batch.mode if compiled else LOGITS
        scores = []
        captured = self._replay_decode(chunks, scored, head)
        if captured is not None:
            step, sampling, result = self._replay(captured, chunks, batch, head)
        else:
            step, sampling, hidden_TE = self._hidden_states(chunks, batch)
            for i, top in scored.items():
                scores.append((chunks.prompts[i], self._score(hidden_TE, chunks, i, top)))
            if num_sampled:
                inputs = (hidden_TE, step.last_R, head, *sampling.tensors())
                result = self._timed(self._head, *inputs)
        tokens_R = logprobs = event = None
        if num_sampled:
            drawn_R = result
            if head == LOGITS:
                edited_RV = edit_logits(result, batch.rows) if needs_edits else result
                drawn_R = draw(edited_RV, *sampling.tensors(), mode=sampling.mode)
            if captured is None or head == LOGITS:  # a captured draw is kept by the graph
                self.last_tokens_M[step.rows_R] = drawn_R
            if num_logprobs is not None:
                # The rows behind them are null ones.
                drawn = result[:num_sampled], drawn_R[:num_sampled]
                logprobs = top_logprobs(*drawn, num_logprobs)
            tokens_R = self._download(drawn_R)
            if logprobs is not None:
                logprobs = tuple(self._download(t) for t in logprobs)
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            # The current device need not be this one.
            event.record(torch.cuda.current_stream(self.device))
        return Launched(chunks, tokens_R, logprobs, scores, event)

    def _hidden_states(
        self, chunks: Chunks, batch: RowBatch
    ) -> tuple[StepTensors, SamplingTensors, Tensor]:
        """Runs the decoder on a step with prompts: replayed where its size has been captured.

        What it returns of step and sampling has the rows that the head shall take.
        """
        num_rows = max(2, len(chunks.sampled))
        size = self._replay_prompts(chunks)
        if size is not None and self._graphs is not None:
            step, sampling, hidden_TE = self._replay(size, chunks, batch, HIDDEN)
            # There is room for more rows. Of as many as a captured decode step has, so that the
            # matrix product runs a kernel that is loaded: for other numbers cuBLAS has others, and
            # to load one while serving is what steps of 10 ms more are put down to.
            num_rows = self._graphs.rows_for(num_rows)
            step = replace(step, last_R=step.last_R[:num_rows], rows_R=step.rows_R[:num_rows])
            return step, sampling.first(num_rows), hidden_TE
        size = StepSize.of(chunks)
        step_bytes, positions_R = self._upload(chunks, size)
        step = size.views(step_bytes)
        sampling = SamplingTensors.from_batch(batch, positions_R, num_rows, self.device)
        hidden_TE = self._timed(self._hidden, *self._hidden_inputs(step))
        if self.compile in TORCHS_GRAPHS:
            # What one graph of torch's returned is gone when the next one, the head's, begins.
            hidden_TE = hidden_TE.clone()
        return step, sampling, hidden_TE

    def _timed(self, function: Callable[..., Any], *inputs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*inputs)
        finally:
            self.launch_seconds += time.perf_counter() - start

    def _score(
        self, hidden_TE: Tensor, chunks: Chunks, i: int, top: int
    ) -> list[tuple[Tensor, ...]]:
        """Log-probabilities of the prompt tokens that follow each token of a chunk, in parts."""
        chunk = chunks.prompts[i]
        begin = len(chunks.decodes) + sum(other.length for other in chunks.prompts[:i])
        following = chunk.sequence.tokens[chunk.start + 1 : chunk.start + chunk.length + 1]
        following = following[: max(0, chunk.sequence.num_prompt - chunk.start - 1)]
        parts = []
        for at in range(0, len(following), SCORE_ROWS):
            tokens_R = self._to_device(torch.tensor(following[at : at + SCORE_ROWS]))
            logits_RV = self.model.logits(hidden_TE[begin + at : begin + at + len(tokens_R)])
            parts.append(tuple(self._download(t) for t in top_logprobs(logits_RV, tokens_R, top)))
        return parts

    # --- steps of fixed sizes --------------------------------------------------------------------

    def capture_steps(self) -> Iterator[StepSize]:
        """Captures the usual steps at once, so that none is captured while requests wait."""
        if self._graphs is not None and self._status in ("eager", "ready"):
            try:
                with torch.inference_mode():
                    yield from self._graphs.capture_all(COMPILED_DRAWS)
            except CaptureError as error:
                self._give_graphs_up(error)

    @property
    def num_captures(self) -> int:
        """How many steps `capture_steps` captures."""
        if self._graphs is None or self.device.type != "cuda":
            return 0
        return self._graphs.num_usual(len(COMPILED_DRAWS))

    def _captured_call(
        self, step: StepTensors, sampling: SamplingTensors | None, head: str
    ) -> Tensor:
        return self._with_head(self._states(self._hidden, step), step, sampling, head)

    def _warm_up_call(
        self, step: StepTensors, sampling: SamplingTensors | None, head: str
    ) -> Tensor:
        by_layer = self._hidden == self._hidden_by_layer
        hidden = self._launch_each_kernel if by_layer else self._hidden
        return self._with_head(self._states(hidden, step), step, sampling, head)

    def _states(self, hidden: Callable[..., Tensor], step: StepTensors) -> Tensor:
        """Hidden states [T, E] of a step of fixed size, or [1, E] of one that draws one token."""
        inputs = self._hidden_inputs(step)
        if len(step.last_R) == 1 and hidden in (self._hidden_by_layer, self._launch_each_kernel):
            return hidden(*inputs, first_only=True)
        return hidden(*inputs)

    def _with_head(
        self, hidden_TE: Tensor, step: StepTensors, sampling: SamplingTensors | None, head: str
    ) -> Tensor:
        if head == HIDDEN or sampling is None:
            return hidden_TE
        result = self._head(hidden_TE, step.last_R, head, *sampling.tensors())
        if head != LOGITS:
            self.last_tokens_M[step.rows_R] = result
        return result

    def _give_graphs_up(self, error: CaptureError) -> None:
        self._graphs = None
        warnings.warn(
            f"steps cannot be captured in a CUDA graph and are launched one kernel after "
            f"the other: {str(error).strip().splitlines()[0]}",
            stacklevel=2,
        )

    def _replay_decode(self, chunks: Chunks, scored: dict[int, int], head: str) -> StepSize | None:
        """The captured size that serves this step; None for one that does not only decode, or
        while what would be captured is not compiled."""
        decodes = not scored and len(chunks.sampled) == len(chunks) == chunks.num_tokens
        if self._graphs is None or not decodes:
            return None
        return self._captured(self._graphs.size_for(len(chunks), chunks.num_blocks), head)

    def _replay_prompts(self, chunks: Chunks) -> StepSize | None:
        """The same for any step's hidden states."""
        if self._graphs is None:
            return None
        sizes = chunks.num_tokens, len(chunks), chunks.num_blocks
        return self._captured(self._graphs.prompt_size_for(*sizes), HIDDEN)

    def _captured(self, size: StepSize, head: str) -> StepSize | None:
        if self._graphs is None or self._status not in ("eager", "ready"):
            return None
        try:
            self._graphs.buffers(size, head)
        except CaptureError as error:
            self._give_graphs_up(error)
            return None
        return size

    def _replay(
        self, size: StepSize, chunks: Chunks, batch: RowBatch, head: str
    ) -> tuple[StepTensors, SamplingTensors, Tensor]:
        """Runs a step from the buffers of its size."""
        assert self._graphs is not None
        buffers = self._graphs.buffers(size, head)
        buffers.write(chunks, batch, self._writer)
        sampling = SamplingTensors.of(buffers.sampling, batch)
        result = self._timed(self._graphs.run, size, sampling, head)
        return buffers.step, sampling, result

    # --- to the device and back ------------------------------------------------------------------

    def _upload(
        self, chunks: Chunks, size: StepSize, into: Tensor | None = None
    ) -> tuple[Tensor, np.ndarray]:
        """A step's bytes on the device, in one copy that the host does not wait for, and the
        positions of the tokens that are drawn."""
        pinned = self.device.type == "cuda"
        host = torch.empty(size.num_bytes, dtype=torch.uint8, pin_memory=pinned)
        positions_R = self._writer.write(size.arrays(host), chunks, size)
        if into is not None:
            return into.copy_(host, non_blocking=True), positions_R
        return host.to(self.device, non_blocking=True), positions_R

    def _to_device(self, host: Tensor) -> Tensor:
        """Copied from pinned memory: the host does not wait."""
        if self.device.type == "cuda":
            return host.pin_memory().to(self.device, non_blocking=True)
        return host

    def _download(self, tensor: Tensor) -> Tensor:
        """A copy in (pinned) host memory that is complete when the step's event is."""
        return tensor.to("cpu", non_blocking=True)
