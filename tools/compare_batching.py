"""`python -m tools.compare_batching`: four ways to run requests of different lengths, side by side.

padded    one rectangle, every row as long as the longest
grouped   rectangles of similar lengths (between two powers of two), one after the other
unpadded  one rectangle, but every layer takes the real rows out for its attention and puts them
          back, as transformers does with a flash kernel
flat      minigen's: no padding anywhere

All have the same weights and, checked in float32 before anything is timed, the same logits at every
real token. Timed are the prefill, decode steps, and the forward of a training step (loss over all
tokens, with what the backward will need kept). Padding is the share of computed token rows that
nobody asked for; in decoding, the share of the cache's rows that hold no token at its end. The last
line is one JSON document.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from minigen.bench import bar, environment, model_dtype
from minigen.cli import positive
from minigen.kernels import varlen_attention
from minigen.llm import device_of
from minigen.measure import (
    current_memory,
    peak_memory,
    percentile,
    reset_peak_memory,
    seconds_of,
    synchronize,
)
from minigen.model import Decoder, DecoderConfig, PagedKV
from minigen.report import print_document, table
from minigen.workloads import read_trace
from tools import padded
from tools.common import Plot, bars, model_config, parser, run, tokens_of
from tools.padded import Cache, PaddedBatch

LENGTHS = ("uniform", "lognormal", "one-long", "trace")
PHASES = ("prefill", "decode", "train")
BLOCK_SIZE = 16
SHORT = 16  # of "one-long": all but one
CHECKED_ROWS = 512  # logits held at once in the check
Compile = Callable[[Callable[..., Tensor]], Callable[..., Tensor]]


# --- lengths -------------------------------------------------------------------------------------


def lengths_of(
    kind: str, num_seqs: int, max_len: int, seed: int, trace: Sequence[int] = ()
) -> list[int]:
    """Lengths of one kind, from 1 to max_len; a trace's are cut to that."""
    rng = random.Random(seed)
    if kind == "uniform":
        return [rng.randint(1, max_len) for _ in range(num_seqs)]
    if kind == "lognormal":
        # Median 181 (less where max_len is short): many short ones and some long ones among them.
        middle = min(5.2, math.log(max_len / 4))
        drawn = [int(rng.lognormvariate(middle, 1.1)) for _ in range(num_seqs)]
        return [min(max(length, min(16, max_len)), max_len) for length in drawn]
    if kind == "one-long":
        return [max_len, *[min(SHORT, max_len)] * (num_seqs - 1)]
    return [min(length, max_len) for length in trace[:num_seqs]]


def groups_of(lengths: Sequence[int]) -> list[list[int]]:
    """Indices by length, those between two powers of two together, shortest first."""
    groups: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        groups.setdefault((length - 1).bit_length(), []).append(i)
    return [groups[key] for key in sorted(groups)]


def padding_share(lengths: Sequence[int], groups: Sequence[Sequence[int]]) -> float:
    """Share of the rows that are padding where each group is as long as its longest."""
    rows = sum(len(group) * max(lengths[i] for i in group) for group in groups)
    return 1 - sum(lengths) / rows


# --- the ways ------------------------------------------------------------------------------------


class Way(ABC):
    """Requests laid out in one way. Logits and hidden states come in the requests' order.

    Args:
        prompts: at least two, of token ids.
        num_steps: decode steps that the cache has room for.
        wrap: what compiles a function; the training step is wrapped only by `wrap_train`.
    """

    name: str

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[list[int]],
        num_steps: int,
        wrap: Compile,
        wrap_train: Compile,
    ) -> None:
        self.decoder, self.prompts, self.num_steps = decoder, prompts, num_steps
        self.device = decoder.embed.weight.device
        self.lengths = [len(prompt) for prompt in prompts]
        self._lay_out(wrap, wrap_train)

    @abstractmethod
    def _lay_out(self, wrap: Compile, wrap_train: Compile) -> None:
        """Puts the prompts on the device."""

    @abstractmethod
    def make_cache(self) -> None:
        """Memory for prompts and `num_steps` tokens."""

    @abstractmethod
    def drop_cache(self) -> None:
        """Gives that memory back."""

    @abstractmethod
    def cache_bytes(self) -> int: ...

    @abstractmethod
    def prefill(self) -> Tensor:
        """fp32 logits [S, V] after the prompts, whose keys are then in the cache."""

    @abstractmethod
    def decode(self, tokens_S: Tensor, step: int) -> Tensor:
        """fp32 logits [S, V] after one token more; `step` counts from 0."""

    @abstractmethod
    def hidden_of_real(self) -> Tensor:
        """Hidden states [T, E] of all real tokens, prompt by prompt, without a cache."""

    @abstractmethod
    def loss(self) -> Tensor:
        """Mean cross-entropy of every token that has one before it."""

    @abstractmethod
    def padding(self, phase: str) -> float:
        """Share of rows that are padding (decode: of the cache, at its end)."""


def _summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum")


class Padded(Way):
    """One rectangle, or one a group."""

    name = "padded"

    def groups(self) -> list[list[int]]:
        return [list(range(len(self.prompts)))]

    def _lay_out(self, wrap: Compile, wrap_train: Compile) -> None:
        self._groups = self.groups()
        self._order = torch.tensor(
            [i for group in self._groups for i in group], device=self.device
        ).argsort()
        self._batches = [
            PaddedBatch.of([self.prompts[i] for i in group], self.device) for group in self._groups
        ]
        self._targets = []
        for batch in self._batches:
            # What follows each token; the last one's and padding's are ignored.
            after_BL = batch.tokens_BL.roll(-1, 1)
            real_BL = batch.positions_BL < batch.lengths_B[:, None] - 1
            self._targets.append(after_BL.masked_fill(~real_BL, -100))
        self._caches: list[Cache] = []
        self._prefill, self._decode = wrap(self._prefill_rows), wrap(self._decode_rows)
        self._loss = wrap_train(self._loss_sum)

    def make_cache(self) -> None:
        self._caches = [
            padded.new_cache(self.decoder, len(group), batch.tokens_BL.shape[1] + self.num_steps)
            for group, batch in zip(self._groups, self._batches, strict=True)
        ]

    def drop_cache(self) -> None:
        self._caches = []

    def cache_bytes(self) -> int:
        return sum(t.nbytes for cache in self._caches for pair in cache for t in pair)

    def hidden(self, batch: PaddedBatch, cache: Cache | None) -> Tensor:
        return padded.sdpa_prefill(self.decoder, batch, cache)

    def _prefill_rows(self, batch: PaddedBatch, cache: Cache) -> Tensor:
        hidden_BLE = self.hidden(batch, cache)
        row_B = torch.arange(len(batch.lengths_B), device=self.device)
        return self.decoder.logits(hidden_BLE[row_B, batch.lengths_B - 1])

    def _decode_rows(self, tokens_B: Tensor, kv_lens_B: Tensor, cache: Cache) -> Tensor:
        return self.decoder.logits(padded.sdpa_decode(self.decoder, tokens_B, kv_lens_B, cache))

    def _loss_sum(self, batch: PaddedBatch, targets_BL: Tensor) -> Tensor:
        return _summed_loss(self.decoder.logits(self.hidden(batch, None)), targets_BL)

    def prefill(self) -> Tensor:
        parts = zip(self._batches, self._caches, strict=True)
        return torch.cat([self._prefill(*part) for part in parts])[self._order]

    def decode(self, tokens_S: Tensor, step: int) -> Tensor:
        logits = []
        for group, batch, cache in zip(self._groups, self._batches, self._caches, strict=True):
            tokens_B = tokens_S if len(self._groups) == 1 else tokens_S[group]
            logits.append(self._decode(tokens_B, batch.lengths_B + step, cache))
        return logits[0] if len(logits) == 1 else torch.cat(logits)[self._order]

    def hidden_of_real(self) -> Tensor:
        rows: dict[int, Tensor] = {}
        for group, batch in zip(self._groups, self._batches, strict=True):
            hidden_BLE = self.hidden(batch, None)
            rows |= {i: hidden_BLE[b, : self.lengths[i]] for b, i in enumerate(group)}
        return torch.cat([rows[i] for i in range(len(self.prompts))])

    def loss(self) -> Tensor:
        parts = zip(self._batches, self._targets, strict=True)
        total = sum(self._loss(*part) for part in parts)
        return torch.as_tensor(total) / sum(length - 1 for length in self.lengths)

    def padding(self, phase: str) -> float:
        extra = self.num_steps if phase == "decode" else 0
        return padding_share([length + extra for length in self.lengths], self._groups)


class Grouped(Padded):
    name = "grouped"

    def groups(self) -> list[list[int]]:
        return groups_of(self.lengths)


class Unpadded(Padded):
    """Padded activations and cache, attention over real rows only."""

    name = "unpadded"

    def hidden(self, batch: PaddedBatch, cache: Cache | None) -> Tensor:
        return padded.unpadded_prefill(self.decoder, batch, cache)

    def make_cache(self) -> None:
        super().make_cache()
        # Where the real keys of each step lie: known from the lengths, once for all layers.
        self._real_keys = []
        for step in range(self.num_steps):
            kv_lens = torch.tensor([length + step + 1 for length in self.lengths])
            row_T = torch.arange(len(kv_lens)).repeat_interleave(kv_lens)
            ends = torch.cat((torch.zeros(1, dtype=torch.int64), kv_lens.cumsum(0)))
            at_T = torch.arange(len(row_T)) - ends[row_T]
            keys = (row_T, at_T, ends.int())
            self._real_keys.append(tuple(tensor.to(self.device) for tensor in keys))

    def _decode_rows(
        self, tokens_B: Tensor, kv_lens_B: Tensor, cache: Cache, *keys: Tensor
    ) -> Tensor:
        hidden = padded.unpadded_decode(self.decoder, tokens_B, kv_lens_B, cache, *keys)
        return self.decoder.logits(hidden)

    def decode(self, tokens_S: Tensor, step: int) -> Tensor:
        kv_lens_B = self._batches[0].lengths_B + step
        return self._decode(tokens_S, kv_lens_B, self._caches[0], *self._real_keys[step])


class Flat(Way):
    """minigen's: packed tokens, the paged cache."""

    name = "flat"

    def _lay_out(self, wrap: Compile, wrap_train: Compile) -> None:
        flat = [token for prompt in self.prompts for token in prompt]
        at = [i for prompt in self.prompts for i in range(len(prompt))]
        ends = torch.tensor([0, *self.lengths]).cumsum(0)
        self._tokens_T = torch.tensor(flat).to(self.device)
        self._positions_T = torch.tensor(at).to(self.device)
        self._cu_seqlens_S1 = ends.int().to(self.device)
        self._last_S = (ends[1:] - 1).to(self.device)
        self._lengths_S = torch.tensor(self.lengths).to(self.device)
        targets_T = self._tokens_T.roll(-1)
        targets_T[self._last_S] = -100
        self._targets_T = targets_T
        self._cu_decode_S1 = torch.arange(len(self.prompts) + 1, device=self.device).int()
        self._prefill, self._decode = wrap(self._paged_rows), wrap(self._decode_rows)
        self._loss = wrap_train(self._loss_sum)

    def make_cache(self) -> None:
        config, weight = self.decoder.config, self.decoder.embed.weight
        counts = [-(-(length + self.num_steps) // BLOCK_SIZE) for length in self.lengths]
        table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
        begin = 0
        for row, count in zip(table, counts, strict=True):
            row[:count] = torch.arange(begin, begin + count)
            begin += count
        self._num_blocks = begin
        shape = (begin, BLOCK_SIZE, config.num_kv_heads, config.head_dim)

        def zeros() -> Tensor:
            return torch.empty(shape, dtype=weight.dtype, device=self.device).fill_(0)

        self._caches = [(zeros(), zeros()) for _ in range(config.num_layers)]
        self._table_SW = table.to(self.device)
        row_T = torch.arange(len(counts)).repeat_interleave(torch.tensor(self.lengths))
        at_T = self._positions_T.cpu()
        slots_T = table[row_T, at_T // BLOCK_SIZE].long() * BLOCK_SIZE + at_T % BLOCK_SIZE
        self._slots_T = slots_T.to(self.device)

    def drop_cache(self) -> None:
        self._caches = []

    def cache_bytes(self) -> int:
        return sum(t.nbytes for pair in self._caches for t in pair)

    def _paged_rows(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        slots_T: Tensor,
        cu_seqlens_S1: Tensor,
        kv_lens_S: Tensor,
        table_SW: Tensor,
        last_S: Tensor,
    ) -> Tensor:
        kv = PagedKV(self._caches, slots_T, kv_lens_S, table_SW)
        hidden_TE = self.decoder.hidden_states(tokens_T, positions_T, cu_seqlens_S1, kv)
        return self.decoder.logits(hidden_TE[last_S])

    def _decode_rows(
        self, tokens_S: Tensor, kv_lens_S: Tensor, table_SW: Tensor, cu_seqlens_S1: Tensor
    ) -> Tensor:
        block_S1 = (kv_lens_S // BLOCK_SIZE)[:, None]
        block_S = table_SW.gather(1, block_S1)[:, 0].long()
        slots_S = block_S * BLOCK_SIZE + kv_lens_S % BLOCK_SIZE
        kv = PagedKV(self._caches, slots_S, (kv_lens_S + 1).int(), table_SW)
        return self.decoder.logits(
            self.decoder.hidden_states(tokens_S, kv_lens_S, cu_seqlens_S1, kv)
        )

    def _loss_sum(
        self, tokens_T: Tensor, positions_T: Tensor, cu_seqlens_S1: Tensor, targets_T: Tensor
    ) -> Tensor:
        hidden_TE = self.decoder.hidden_states(tokens_T, positions_T, cu_seqlens_S1)
        return _summed_loss(self.decoder.logits(hidden_TE), targets_T)

    def prefill(self) -> Tensor:
        return self._prefill(
            self._tokens_T, self._positions_T, self._slots_T, self._cu_seqlens_S1,
            self._lengths_S.int(), self._table_SW, self._last_S,
        )  # fmt: skip

    def decode(self, tokens_S: Tensor, step: int) -> Tensor:
        return self._decode(tokens_S, self._lengths_S + step, self._table_SW, self._cu_decode_S1)

    def hidden_of_real(self) -> Tensor:
        return self.decoder.hidden_states(self._tokens_T, self._positions_T, self._cu_seqlens_S1)

    def loss(self) -> Tensor:
        total = self._loss(self._tokens_T, self._positions_T, self._cu_seqlens_S1, self._targets_T)
        return total / sum(length - 1 for length in self.lengths)

    def padding(self, phase: str) -> float:
        if phase != "decode":
            return 0.0
        held = sum(length + self.num_steps for length in self.lengths)
        return 1 - held / (self._num_blocks * BLOCK_SIZE)


WAYS: tuple[type[Way], ...] = (Padded, Grouped, Unpadded, Flat)


def as_it_is(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return function


def compiler(mode: str) -> Compile:
    """Wraps a function by torch.compile, sizes dynamic; "eager" leaves it as it is."""
    if mode == "eager":
        return as_it_is
    return lambda function: torch.compile(function, dynamic=True)


def has_backward(device: torch.device) -> bool:
    """Whether attention over packed sequences has a backward: a compiler traces it ahead."""
    q_THD = torch.ones(1, 1, 16, device=device, requires_grad=True)
    ends = torch.tensor([0, 1], dtype=torch.int32, device=device)
    try:
        varlen_attention(q_THD, q_THD, q_THD, ends, ends)[0].sum().backward()
    except (RuntimeError, NotImplementedError):
        return False
    return True


# --- check and measure ---------------------------------------------------------------------------


@torch.no_grad()
def check_agreement(
    decoder: Decoder, prompts: Sequence[list[int]], steps_NS: Tensor
) -> dict[str, float]:
    """{way: largest difference of its logits from flat's, over the largest logit}.

    Compared are all real tokens' logits, those after the prefill and those of each decode step.

    Raises ValueError where a way differs by more than 1,000 roundings of the decoder's dtype.
    """
    found: dict[str, float] = {}
    reference: list[Tensor] = []
    for kind in reversed(WAYS):
        way = kind(decoder, prompts, len(steps_NS), as_it_is, as_it_is)
        way.make_cache()
        hidden_TE, logits = way.hidden_of_real(), [way.prefill()]
        logits += [way.decode(tokens_S, step) for step, tokens_S in enumerate(steps_NS)]
        if not reference:
            reference = [hidden_TE, *logits]
            continue
        pairs = list(zip(logits, reference[1:], strict=True))
        for at in range(0, len(hidden_TE), CHECKED_ROWS):
            rows = slice(at, at + CHECKED_ROWS)
            pairs.append((decoder.logits(hidden_TE[rows]), decoder.logits(reference[0][rows])))
        found[way.name] = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
        bound = 1000 * torch.finfo(decoder.embed.weight.dtype).eps
        if not found[way.name] <= bound:
            raise ValueError(
                f"{way.name} and flat disagree: logits differ by {found[way.name]:.2g} of the "
                f"largest, more than {bound:.2g}"
            )
    return found


def _extra_memory(function: Callable[[], Any], device: torch.device) -> int:
    """The most that a call takes beyond what is there before it."""
    reset_peak_memory(device)
    before = current_memory(device)
    kept = function()
    synchronize(device)
    del kept
    return max(0, peak_memory(device) - before)


def measure(
    kind: type[Way],
    decoder: Decoder,
    prompts: Sequence[list[int]],
    steps_NS: Tensor,
    repeats: int,
    wrap: Compile,
    wrap_train: Compile,
) -> list[dict[str, Any]]:
    """One row a phase: milliseconds, tokens/s, padding, and the memory of cache and activations."""
    device = decoder.embed.weight.device
    way = kind(decoder, prompts, len(steps_NS), wrap, wrap_train)
    real = sum(way.lengths)

    def prefill() -> dict[str, Any]:
        way.make_cache()
        seconds = seconds_of(way.prefill, device, repeats)
        peak = way.cache_bytes() + _extra_memory(way.prefill, device)
        return {"ms": seconds * 1e3, "tokens_s": real / seconds, "peak_bytes": peak}

    def decode() -> dict[str, Any]:
        spans: list[float] = []
        for _ in range(repeats + 1):
            way.prefill()
            synchronize(device)
            spans = []  # of the last round only: the others warm up
            for step, tokens_S in enumerate(steps_NS):
                start = time.perf_counter()
                way.decode(tokens_S, step)
                synchronize(device)
                spans.append(time.perf_counter() - start)
        last = len(steps_NS) - 1
        peak = way.cache_bytes() + _extra_memory(lambda: way.decode(steps_NS[last], last), device)
        seconds = percentile(spans, 50)
        return {
            "ms": seconds * 1e3,
            "p99_ms": percentile(spans, 99) * 1e3,
            "tokens_s": len(prompts) / seconds,
            "peak_bytes": peak,
        }

    def train() -> dict[str, Any]:
        way.drop_cache()
        decoder.requires_grad_(True)
        try:
            seconds = seconds_of(way.loss, device, repeats)
            peak = _extra_memory(way.loss, device)
        finally:
            decoder.requires_grad_(False)
        return {"ms": seconds * 1e3, "tokens_s": real / seconds, "peak_bytes": peak}

    rows = []
    for phase, function in zip(PHASES, (prefill, decode, train), strict=True):
        if phase == "train" and max(way.lengths) == 1:
            continue  # single tokens predict nothing
        try:
            with torch.set_grad_enabled(phase == "train"):
                found = function()
        except torch.OutOfMemoryError:
            # Where padding does not fit, that is the result.
            found = {"ms": None, "tokens_s": None, "peak_bytes": None, "error": "out of memory"}
        rows.append({"way": way.name, "phase": phase, "padding": way.padding(phase), **found})
    return rows


def main(args: argparse.Namespace) -> None:
    config = model_config(args, "tiny")
    device = device_of(args.device)
    cuda = device.type == "cuda"
    max_len = args.max_len or (4096 if cuda else 512)
    num_seqs = args.num_seqs or (64 if cuda else 16)
    if num_seqs < 2:
        raise ValueError("--num-seqs is 1: a batch to compare has at least 2")
    trace: list[int] = []
    kinds = args.lengths or LENGTHS[: 4 if args.trace else 3]
    if "trace" in kinds:
        if args.trace is None:
            raise ValueError("--lengths trace needs --trace FILE, a CSV as azure_llm_conv")
        trace = [row.prompt_tokens for row in read_trace(args.trace)]
        if len(trace) < num_seqs:
            raise ValueError(f"{args.trace} has {len(trace)} requests, --num-seqs is {num_seqs}")
    plot = Plot(args, len(PHASES))
    decoder = _decoder(args, config, device, max_len + args.decode_steps)
    padded.check_supported(decoder)
    vocab_size = decoder.config.vocab_size
    rng = random.Random(args.seed)
    steps = [[rng.randrange(vocab_size) for _ in range(num_seqs)] for _ in range(args.decode_steps)]
    steps_NS = torch.tensor(steps, device=device)
    lengths = {kind: lengths_of(kind, num_seqs, max_len, args.seed, trace) for kind in kinds}
    wrap = compiler(args.compile)
    wrap_train = wrap if has_backward(device) else as_it_is

    dtype = decoder.embed.weight.dtype
    agreement: dict[str, dict[str, float]] = {}
    rows: list[dict[str, Any]] = []
    with bar(len(kinds) * (1 + len(WAYS)), "Ways", "run") as shown:
        decoder.float()
        for kind in kinds:
            prompts = tokens_of(lengths[kind], vocab_size, args.seed)
            agreement[kind] = check_agreement(decoder, prompts, steps_NS)
            shown.update()
        decoder.to(dtype)
        for kind in kinds:
            prompts = tokens_of(lengths[kind], vocab_size, args.seed)
            for way in WAYS:
                # What one run has compiled for its sizes must not burden the next.
                torch.compiler.reset()
                found = measure(way, decoder, prompts, steps_NS, args.repeats, wrap, wrap_train)
                rows += [{"lengths": kind, **row} for row in found]
                shown.update()
    _print(rows, lengths, agreement)
    _draw(plot, rows, list(kinds), f"{_model_name(args)}, {_name(dtype)}, {device}")
    print_document(
        {
            "command": "compare_batching",
            "model": _model_name(args),
            **environment(device),
            "dtype": _name(dtype),
            "compile": args.compile,
            "compile_train": args.compile if wrap_train is wrap else "eager",
            "lengths": lengths,
            "decode_steps": args.decode_steps,
            "agreement": agreement,
            "plot": plot.path,
            "rows": rows,
        }
    )


def _decoder(
    args: argparse.Namespace, config: dict[str, Any] | None, device: torch.device, longest: int
) -> Decoder:
    dtype = model_dtype(args, config)
    if config is None:
        from minigen.weights.hub import resolve_model

        decoder = Decoder.from_pretrained(resolve_model(args.model), dtype=dtype, device=device)
    else:
        read = DecoderConfig.from_hf(config)
        decoder = Decoder.from_config(read, dtype=dtype, device=device, seed=args.seed)
    if longest > decoder.max_length:
        raise ValueError(
            f"--max-len and --decode-steps make {longest} tokens, the model's context has "
            f"{decoder.max_length}"
        )
    return decoder


def _model_name(args: argparse.Namespace) -> str:
    return args.shape or args.config or args.model


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _print(
    rows: list[dict[str, Any]],
    lengths: dict[str, list[int]],
    agreement: dict[str, dict[str, float]],
) -> None:
    for kind, values in lengths.items():
        worst = max(agreement[kind].values())
        print(
            f"{kind}: {len(values)} sequences, {sum(values):,} tokens, {min(values)} to "
            f"{max(values)} long; the ways agree within {worst:.1g} of the largest logit"
        )
    flat = {(r["lengths"], r["phase"]): r["ms"] for r in rows if r["way"] == Flat.name}

    def line(r: dict[str, Any]) -> list[Any]:
        beside = flat[r["lengths"], r["phase"]]
        ratio = r["ms"] / beside if r["ms"] and beside else r.get("error")
        memory = None if r["peak_bytes"] is None else r["peak_bytes"] / 1e6
        share = f"{r['padding']:.1%}"
        where = f"{r['lengths']}, {r['phase']}"
        return [where, r["way"], r["ms"], ratio, r["tokens_s"], share, memory]

    print()
    header = ["lengths, phase", "way", "ms", "× flat", "tokens/s", "padding", "memory MB"]
    ordered = [r for phase in PHASES for r in rows if r["phase"] == phase]
    print(table(header, [line(r) for r in ordered]))


def _draw(plot: Plot, rows: list[dict[str, Any]], kinds: list[str], title: str) -> None:
    if not plot.axes:
        return
    for axis, phase in zip(plot.axes, PHASES, strict=True):
        found = {(r["lengths"], r["way"]): r["ms"] for r in rows if r["phase"] == phase}
        series = {way.name: [found.get((k, way.name)) or 0.0 for k in kinds] for way in WAYS}
        bars(axis, kinds, series, f"{phase}, ms")
    plot.save(title)


def options() -> argparse.ArgumentParser:
    made = parser("tools.compare_batching", __doc__, "compare_batching.png")
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument(
        "--compile", default="default", choices=["eager", "default"],
        help="of all four ways; a training step only where attention has a backward",
    )  # fmt: skip
    made.add_argument("--lengths", nargs="+", choices=LENGTHS, metavar="KIND", help="default: all")
    made.add_argument("--trace", metavar="FILE", help="CSV as azure_llm_conv, plain or .xz")
    made.add_argument(
        "--num-seqs", type=positive, metavar="N", help="16 on a CPU, 64 on a GPU by default"
    )
    made.add_argument(
        "--max-len", type=positive, metavar="N", help="512 on a CPU, 4096 on a GPU by default"
    )
    made.add_argument("--decode-steps", type=positive, default=16, metavar="N")
    made.add_argument("--repeats", type=positive, default=5, metavar="N")
    return made


if __name__ == "__main__":
    run(options(), main)
