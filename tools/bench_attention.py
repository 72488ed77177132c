"""`python -m tools.bench_attention --what varlen|decode|prefill|backward`: the kernels alone.

For each tile in CANDIDATES, in a process of its own: compile, and check on fresh random inputs
against float64. A candidate that is wrong, crashes or hangs is reported and left out. Then every
row is timed with all of them, with what the operation chooses by itself, and with rivals on the
same numbers: torch's FlashAttention 2 over packed sequences, and cuDNN where lengths are equal.

    varlen         forward of varlen_attention, causal: replay of a CUDA graph, medians of do_bench
    decode         paged_attention, one query a sequence: replay of a CUDA graph over caches that
                   together are several times the L2
    prefill        paged_attention on prompts of which nothing is cached yet: as varlen
    backward       dQ, dK and dV of varlen_attention, causal, after a forward that is not timed,
                   the delta of each row counted: medians of do_bench
    backward-less  all of these but the backward
    all            all of these, the default

TFLOP/s count useful work, 4 H D times the pairs of query and key that the mask leaves, reckoned as
half of L^2, and 2.5 times as much in the backward. GB/s count the keys and values of the cache,
read once. The floor of a row is what the same run's copy or matmul rate leaves of its time; `of
limit` is the floor's share of the measured time. `target` is what minigen sets itself. The last
line is one JSON document; with --out it is also written to a file, after every row.

`--list` needs no GPU: registers, stack (spills) and shared memory of every candidate, for sm_90.
"""

import argparse
import json
import math
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minigen import cli
from minigen.kernels import paged_attention, varlen_attention
from minigen.kernels.checks import Window
from minigen.kernels.dependent_launch import launch_options
from minigen.kernels.gluon_import import KNOWN_GLUON
from minigen.kernels.paged_attention import paged_attention_kernel, paged_attention_triton
from minigen.kernels.tiles import Tile, score_arguments, tile_arguments, window_arguments
from minigen.kernels.varlen_attention import varlen_attention_kernel, varlen_attention_triton
from minigen.kernels.varlen_attention_gluon import DEFAULT_TILE, SHORT_TILE, GluonTile, Sizes
from minigen.kernels.varlen_attention_tma import varlen_attention_tma_kernel
from minigen.train_options import number
from tools.attention_backward import (
    BackwardCandidate,
    backward_candidates,
    backward_inputs,
    backward_kernels,
    check_gradients,
    cudnn_backward,
    flash_backward,
    run_backward,
)
from tools.common import run

NO_GPU = "python -m tools.bench_attention times GPU kernels, and torch {} finds no CUDA GPU here."
SECTIONS = ("varlen", "decode", "prefill", "backward")
# What --what takes besides a section.
SETS = {"backward-less": SECTIONS[:3], "all": SECTIONS}
CAUSAL = Window(None, 0)
CACHE_BLOCK = 16


class Kind(NamedTuple):
    """Where and of what dtype inputs are made: tests have no GPU."""

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16


GPU = Kind()


class Heads(NamedTuple):
    query: int
    key: int
    dim: int

    def __str__(self) -> str:
        return f"{self.query}/{self.key}x{self.dim}"


class Candidate(NamedTuple):
    """One way to compile an attention kernel."""

    tile: Tile | GluonTile
    descriptors: bool = False
    num_splits: int | None = None

    def __str__(self) -> str:
        if isinstance(self.tile, GluonTile):
            return f"gluon 128x{self.tile.block_n} s{self.tile.stages}"
        m, q, n, _, warps, stages, mask_all, registers = self.tile
        words = [f"{m}x{n}", f"w{warps}", f"s{stages}"]
        words += ["packed"] if q < m else []
        words += [f"r{registers}"] if registers else []
        words += ["masks"] if mask_all else []
        words += ["tma"] if self.descriptors else []
        words += ["specialised"] if self.specialised else []
        words += [f"splits{self.num_splits}"] if self.num_splits else []
        return " ".join(words)

    @property
    def specialised(self) -> bool:
        tile = self.tile
        if isinstance(tile, GluonTile) or not self.descriptors:
            return False
        return tile.num_warps == 4 and tile.block_q >= 128


RIVALS = ("FA2", "cuDNN")
CHOSEN = "chosen"  # by the operation itself


AnyCandidate = Candidate | BackwardCandidate


def name_of(candidate: AnyCandidate | None) -> str:
    return CHOSEN if candidate is None else str(candidate)


def gluon_candidates(heads: Heads) -> list[Candidate]:
    """Large tiles and small ones; of heads of 64 as many in flight as of small ones."""
    large = DEFAULT_TILE if heads.dim == 128 else DEFAULT_TILE._replace(stages=4)
    return [Candidate(tile) for tile in (large, SHORT_TILE) if KNOWN_GLUON]


def varlen_candidates(heads: Heads) -> list[Candidate]:
    """Chosen by registers and shared memory (`--list`): where registers are given, the plain kernel
    keeps 4 to 30 of its values on the stack, else none does."""
    group, dim = heads.query // heads.key, heads.dim

    def tile(
        m: int, n: int, warps: int, stages: int, registers: int | None = None, packed: bool = True
    ) -> Tile:
        block_q = m // group if packed else m
        return Tile(m, block_q, n, dim, warps, stages, max_registers=registers)

    found = [Candidate(tile(64, 64, 4, 2)), Candidate(tile(64, 64, 4, 2), True)]
    if dim == 64:
        found += [
            Candidate(tile(128, 64, 4, 3)),
            Candidate(tile(128, 64, 4, 3), True),
            Candidate(tile(128, 64, 4, 2, 168), True),  # three programs a multiprocessor
            Candidate(tile(128, 64, 8, 3), True),
            Candidate(tile(128, 128, 8, 2), True),
        ]
    else:
        # With 128 registers two programs of 8 warps share a multiprocessor.
        found += [
            Candidate(tile(64, 64, 4, 3)),
            Candidate(tile(128, 64, 8, 3)),
            Candidate(tile(128, 64, 8, 2, 128)),
            Candidate(tile(128, 64, 8, 3), True),
            Candidate(tile(128, 64, 8, 2, 128), True),
            Candidate(tile(128, 64, 8, 2, 128, packed=False), True),
            Candidate(tile(128, 32, 8, 4), True),
        ]
    found += gluon_candidates(heads)
    # Specialised warps.
    stages = [(128, 2), (128, 3), (64, 3)] if dim == 64 else [(128, 2), (64, 3), (64, 4)]
    return found + [Candidate(tile(128, n, 4, count, packed=False), True) for n, count in stages]


def decode_candidates(heads: Heads) -> list[Candidate]:
    group = heads.query // heads.key

    def tile(n: int, warps: int, stages: int, mask_all: bool = True) -> Tile:
        return Tile(16, 16 // group, n, heads.dim, warps, stages, mask_all)

    return [
        Candidate(tile(64, 4, 5)),
        Candidate(tile(64, 4, 5, False)),
        Candidate(tile(64, 4, 7)),
        Candidate(tile(64, 2, 5)),
        Candidate(tile(64, 2, 7)),
        *(Candidate(tile(32, 2, stages)) for stages in (5, 7, 9)),
        *(Candidate(tile(32, 4, stages)) for stages in (5, 7, 9)),
        Candidate(tile(128, 4, 5)),
        Candidate(tile(128, 8, 5)),
        *(Candidate(tile(64, 4, 5), num_splits=splits) for splits in (1, 2, 4, 8, 16, 32, 64)),
    ]


def prefill_candidates(heads: Heads) -> list[Candidate]:
    group, dim = heads.query // heads.key, heads.dim

    def tile(m: int, n: int, warps: int, stages: int, registers: int | None = None) -> Tile:
        return Tile(m, m // group, n, dim, warps, stages, max_registers=registers)

    return [
        Candidate(tile(64, 64, 4, 3)),
        Candidate(tile(64, 64, 4, 5)),
        Candidate(tile(128, 64, 8, 5)),
        Candidate(tile(128, 64, 8, 7)),
        Candidate(tile(128, 64, 8, 3, 128)),
        Candidate(tile(128, 32, 8, 5, 128)),
        Candidate(tile(128, 32, 8, 7, 128)),
        *gluon_candidates(heads),
    ]


CANDIDATES: dict[str, Callable[[Heads], Any]] = {
    "varlen": varlen_candidates,
    "decode": decode_candidates,
    "prefill": prefill_candidates,
    "backward": lambda heads: backward_candidates(heads.query // heads.key, heads.dim),
}


class Row(NamedTuple):
    """A batch to time, and what minigen is to reach: TFLOP/s, GB/s or (batch 1) microseconds."""

    section: str
    heads: Heads
    name: str
    lengths: list[int]
    target: float
    unit: str


def skewed_lengths() -> list[int]:
    """64 sequences, 16 to 2,423 long, 19,060 tokens in all."""
    generator = torch.Generator().manual_seed(1)
    drawn = (torch.randn(64, generator=generator) * 1.1 + 5.2).exp().clamp(16, 8192)
    return [int(length) for length in drawn]


def rows_of(section: str) -> Iterator[Row]:
    lengths = {f"{n} x {length}": [length] * n for n, length in PREFILL_SHAPES}
    lengths["skew64"] = skewed_lengths()
    if section in ("varlen", "backward"):
        of_section = VARLEN_TARGETS if section == "varlen" else BACKWARD_TARGETS
        for heads, targets in of_section.items():
            for name, target in targets.items():
                yield Row(section, heads, name, lengths[name], target, "TFLOP/s")
    elif section == "prefill":
        heads = Heads(32, 8, 128)
        for name, target in VARLEN_TARGETS[heads].items():
            yield Row(section, heads, name, lengths[name], target, "TFLOP/s")
    else:
        for batch, context, target, unit in DECODE_TARGETS:
            name = f"{batch} at {context}"
            yield Row(section, Heads(32, 8, 128), name, [context] * batch, target, unit)


PREFILL_SHAPES = [(16, 512), (16, 1024), (4, 4096), (1, 16384)]
VARLEN_TARGETS = {
    Heads(32, 8, 128): {
        "16 x 512": 300,
        "16 x 1024": 400,
        "4 x 4096": 520,
        "1 x 16384": 560,
        "skew64": 300,
    },
    Heads(16, 8, 128): {"16 x 1024": 380, "4 x 4096": 500, "1 x 16384": 540, "skew64": 270},
    Heads(32, 8, 64): {"16 x 1024": 300, "4 x 4096": 380, "1 x 16384": 420, "skew64": 200},
}
_BACKWARD = {"16 x 1024": 230, "4 x 4096": 310, "1 x 16384": 340, "skew64": 180}
# The same work with fewer keys and values to read and write; no target of its own.
BACKWARD_TARGETS = {Heads(32, 32, 128): _BACKWARD, Heads(32, 8, 128): _BACKWARD}
DECODE_TARGETS = [
    (1, 4096, 20, "us"),
    (1, 32768, 2900, "GB/s"),
    (8, 8192, 3500, "GB/s"),
    (32, 1024, 3300, "GB/s"),
    (64, 2048, 3900, "GB/s"),
    (256, 1024, 4200, "GB/s"),
    (256, 4096, 4350, "GB/s"),
]


# Arithmetic: what a row must read and multiply.


def flop_of(row: Row) -> float:
    products = 2.5 if row.section == "backward" else 1
    return products * 4 * row.heads.query * row.heads.dim * sum(n * n for n in row.lengths) / 2


def cache_bytes_of(row: Row) -> int:
    return 2 * sum(row.lengths) * row.heads.key * row.heads.dim * 2


def floor_us_of(row: Row, limits: dict[str, float]) -> float:
    if row.section == "decode":
        return cache_bytes_of(row) / limits["copy_gbs"] / 1e3
    return flop_of(row) / limits["matmul_tflops"] / 1e6


def figure_of(row: Row, us: float) -> float:
    """The time of a row in the unit of its target."""
    if row.unit == "us":
        return us
    return cache_bytes_of(row) / us / 1e3 if row.unit == "GB/s" else flop_of(row) / us / 1e6


def reached(row: Row, figure: float) -> float:
    return row.target / figure if row.unit == "us" else figure / row.target


# Inputs and calls.


class Packed(NamedTuple):
    q_THD: Tensor
    k_TKD: Tensor
    v_TKD: Tensor
    cu_seqlens: Tensor


def packed_inputs(heads: Heads, lengths: list[int], seed: int, kind: Kind = GPU) -> Packed:
    generator = torch.Generator(kind.device).manual_seed(seed)

    def normal(num_heads: int) -> Tensor:
        shape = (sum(lengths), num_heads, heads.dim)
        return torch.randn(shape, generator=generator, device=kind.device).to(kind.dtype)

    offsets = torch.tensor([0, *lengths]).cumsum(0).int().to(kind.device)
    return Packed(normal(heads.query), normal(heads.key), normal(heads.key), offsets)


class Paged(NamedTuple):
    """Queries and a cache whose blocks are shuffled; the arguments of `paged_attention`."""

    q_THD: Tensor
    k_cache: Tensor
    v_cache: Tensor
    cu_seqlens_q: Tensor
    kv_lens_S: Tensor
    block_table_SW: Tensor


def paged_inputs(
    heads: Heads, q_lens: list[int], kv_lens: list[int], seed: int, kind: Kind = GPU
) -> Paged:
    generator = torch.Generator(kind.device).manual_seed(seed)
    counts = [-(-kv_len // CACHE_BLOCK) for kv_len in kv_lens]
    blocks = torch.randperm(sum(counts), generator=generator, device=kind.device).int()
    table_SW = torch.zeros(len(kv_lens), max(counts), dtype=torch.int32, device=kind.device)
    for seq, part in enumerate(blocks.split(counts)):
        table_SW[seq, : len(part)] = part
    shape = (sum(counts), CACHE_BLOCK, heads.key, heads.dim)

    def cache() -> Tensor:
        made = torch.empty(shape, dtype=kind.dtype, device=kind.device)
        return made.normal_(generator=generator)

    q_shape = (sum(q_lens), heads.query, heads.dim)
    return Paged(
        torch.randn(q_shape, generator=generator, device=kind.device).to(kind.dtype),
        cache(),
        cache(),
        torch.tensor([0, *q_lens]).cumsum(0).int().to(kind.device),
        torch.tensor(kv_lens, dtype=torch.int32, device=kind.device),
        table_SW,
    )


def gathered(cache_NBKD: Tensor, paged: Paged) -> list[Tensor]:
    """Each sequence's rows `[L, K, D]`."""
    return [
        cache_NBKD[row[: -(-kv_len // CACHE_BLOCK)].long()].flatten(0, 1)[:kv_len]
        for row, kv_len in zip(paged.block_table_SW, paged.kv_lens_S.tolist(), strict=True)
    ]


def run_varlen(x: Packed, heads: Heads, candidate: Candidate | None) -> Tensor:
    if candidate is None:
        return varlen_attention(*x, x.cu_seqlens)[0]
    return varlen_attention_triton(
        *x, x.cu_seqlens, window=CAUSAL, scale=heads.dim**-0.5, softcap=0.0,
        tile=candidate.tile, tensor_descriptors=candidate.descriptors,
    )[0]  # fmt: skip


def run_paged(x: Paged, heads: Heads, candidate: Candidate | None) -> Tensor:
    if candidate is None:
        return paged_attention(*x)
    return paged_attention_triton(
        *x, window=CAUSAL, scale=heads.dim**-0.5, softcap=0.0,
        tile=candidate.tile, num_splits=candidate.num_splits,
        whole_tiles_most=None if candidate.num_splits is None else 0,
    )  # fmt: skip


# Correctness, in a process a candidate.


def check_sequence(out_QHD: Tensor, q_QHD: Tensor, k_LKD: Tensor, v_LKD: Tensor) -> None:
    """One sequence against float64; ValueError beyond two roundings of the dtype."""
    group = q_QHD.shape[1] // k_LKD.shape[1]
    q_HQD, k_HLD, v_HLD = (
        x.double().repeat_interleave(n, 1).transpose(0, 1)
        for x, n in ((q_QHD, 1), (k_LKD, group), (v_LKD, group))
    )
    num_queries, num_keys = q_HQD.shape[1], k_HLD.shape[1]
    score_HQL = q_HQD @ k_HLD.transpose(1, 2) * q_QHD.shape[2] ** -0.5
    hidden_QL = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q_QHD.device)
    hidden_QL = hidden_QL.triu(num_keys - num_queries + 1)
    weight_HQL = score_HQL.masked_fill(hidden_QL, -math.inf).softmax(-1)
    expected_QHD = (weight_HQL @ v_HLD).transpose(0, 1)
    allowed_QHD = 2 * torch.finfo(out_QHD.dtype).eps * (weight_HQL @ v_HLD.abs()).transpose(0, 1)
    excess = ((out_QHD.double() - expected_QHD).abs() - allowed_QHD).max().item()
    if not excess <= 1e-4:
        raise ValueError(
            f"wrong by {excess:.2g} beyond rounding, {num_queries} queries on {num_keys} keys"
        )


def check_candidate(section: str, heads: Heads, candidate: Any, kind: Kind = GPU) -> None:
    """One call on new random inputs, against float64; ValueError where it is wrong."""
    seed = time.time_ns() % 2**31
    lengths = [517, 1, 128, 129, 63, 300, 64]
    if section == "backward":
        backward = backward_inputs(*packed_inputs(heads, lengths, seed, kind), seed + 1)
        gradients = run_backward(backward, torch.zeros_like(backward.lse_HT), candidate)
        parts = (t.split(lengths) for t in (*gradients, *backward[:4]))
        for dq_LHD, dk_LKD, dv_LKD, *sequence in zip(*parts, strict=True):
            check_gradients((dq_LHD, dk_LKD, dv_LKD), *sequence)
        return
    if section == "varlen":
        x = packed_inputs(heads, lengths, seed, kind)
        out_THD = run_varlen(x, heads, candidate)
        parts = zip(*(t.split(lengths) for t in (out_THD, *x[:3])), strict=True)
    else:
        q_lens = [1] * len(lengths) if section == "decode" else lengths
        paged = paged_inputs(heads, q_lens, [n + 700 for n in lengths], seed, kind)
        out_THD = run_paged(paged, heads, candidate)
        parts = zip(
            out_THD.split(q_lens),
            paged.q_THD.split(q_lens),
            gathered(paged.k_cache, paged),
            gathered(paged.v_cache, paged),
            strict=True,
        )
    for out_QHD, q_QHD, k_LKD, v_LKD in parts:
        check_sequence(out_QHD, q_QHD, k_LKD, v_LKD)


def sentence_of(error: Exception) -> str:
    """The error's kind and its first line; some of Triton's have no text."""
    lines = str(error).strip().splitlines() or ["no text"]
    return f"{type(error).__name__}: {lines[0][:200]}"


Job = tuple[str, Heads, AnyCandidate | None]


def _check_in_child(jobs: list[Job], connection: Any) -> None:
    """Sends None for each job that passed, else what went wrong."""
    for job in jobs:
        try:
            check_candidate(*job)
            torch.cuda.synchronize()
            connection.send(None)
        except Exception as error:
            traceback.print_exc()
            connection.send(sentence_of(error))


def check_all(
    jobs: dict[str, list[Job]],
    processes: int,
    seconds: float,
    start: str = "spawn",
) -> dict[tuple[str, Heads, str], str]:
    """Failures by section, heads and candidate. Each list has a process, `processes` at a time.

    A child compiles into Triton's cache on disk, so that this process only reads. One that says
    nothing for `seconds` is ended. `start` is multiprocessing's; a GPU allows "spawn" only.
    """
    context: Any = multiprocessing.get_context(start)
    waiting, running, failures = list(jobs.values()), [], {}
    while waiting or running:
        while waiting and len(running) < processes:
            todo = waiting.pop(0)
            receiving, sending = context.Pipe(duplex=False)
            child = context.Process(target=_check_in_child, args=(todo, sending), daemon=True)
            child.start()
            sending.close()
            running.append((child, receiving, list(todo), time.monotonic()))
        for entry in list(running):
            child, receiving, todo, since = entry
            trouble = None
            try:
                if receiving.poll(0.05):
                    trouble = receiving.recv()
                    done = [todo.pop(0)]
                    running[running.index(entry)] = (child, receiving, todo, time.monotonic())
                elif time.monotonic() - since > seconds:
                    child.kill()
                    trouble, done = f"no answer in {seconds:.0f} s", list(todo)
                    todo.clear()
                else:
                    continue
            except EOFError:
                child.join()
                trouble, done = f"its process ended with {child.exitcode}", list(todo)
                todo.clear()
            if trouble is not None:
                for section, heads, candidate in done:
                    failures[section, heads, name_of(candidate)] = trouble
            if not todo:
                running = [other for other in running if other[0] is not child]
                child.join(5)
    return failures


# Timing.


def bench_us(call: Callable[[], object]) -> float:
    from triton.testing import do_bench

    milliseconds: Any = do_bench(call, warmup=15, rep=60, return_mode="median")
    return milliseconds * 1e3


def graph_us(calls: list[Callable[[], object]], replays: int = 12) -> float:
    """Microseconds a call, of calls captured one after the other and replayed."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    spans = []
    for _ in range(replays):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in "12")
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        spans.append(start.elapsed_time(stop) * 1e3 / len(calls))
    return median(spans)


def replay_us(call: Callable[[], object]) -> float:
    """Microseconds of one call, captured: of short ones the host takes longer than the GPU."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return bench_us(graph.replay)


def measure_limits() -> dict[str, float]:
    """What this GPU does: copy in GB/s, read and write counted, and a bf16 product of 8192^3."""
    pair = torch.empty(2, 2**31, dtype=torch.uint8, device="cuda").random_()
    copy_us = bench_us(lambda: pair[1].copy_(pair[0]))
    a, b = torch.randn(2, 8192, 8192, device="cuda").bfloat16()
    matmul_us = bench_us(lambda: a @ b)
    return {"copy_gbs": 2**32 / copy_us / 1e3, "matmul_tflops": 2 * 8192**3 / matmul_us / 1e6}


def flash_varlen(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, *lengths: Any, causal: bool) -> Any:
    """FlashAttention 2 as torch builds it in, what `torch.nn.attention.varlen` calls."""
    return torch.ops.aten._flash_attention_forward(
        q_THD, k_TKD, v_TKD, *lengths, 0.0, causal, False
    )


def cudnn(q_SHQD: Tensor, k_SKLD: Tensor, v_SKLD: Tensor, causal: bool) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return torch.nn.functional.scaled_dot_product_attention(
            q_SHQD, k_SKLD, v_SKLD, is_causal=causal, enable_gqa=True
        )


Timers = dict[str, Callable[[], float]]


def packed_timers(row: Row, candidates: list[Candidate]) -> Timers:
    x = packed_inputs(row.heads, row.lengths, seed=0)
    longest, num_seqs = max(row.lengths), len(row.lengths)
    timers: Timers = {}
    if row.section == "varlen":
        for c in [None, *candidates]:
            timers[name_of(c)] = lambda c=c: replay_us(lambda: run_varlen(x, row.heads, c))
    else:
        paged = paged_inputs(row.heads, row.lengths, row.lengths, seed=0)
        for c in [None, *candidates]:
            timers[name_of(c)] = lambda c=c: replay_us(lambda: run_paged(paged, row.heads, c))
    offsets = x.cu_seqlens, x.cu_seqlens, longest, longest
    timers["FA2"] = lambda: replay_us(lambda: flash_varlen(*x[:3], *offsets, causal=True))
    if len(set(row.lengths)) == 1:
        dense = [t.unflatten(0, (num_seqs, longest)).transpose(1, 2) for t in x[:3]]
        timers["cuDNN"] = lambda: replay_us(lambda: cudnn(*dense, causal=True))
    return timers


def backward_timers(row: Row, candidates: list[BackwardCandidate]) -> Timers:
    x = backward_inputs(*packed_inputs(row.heads, row.lengths, seed=0), seed=1)
    dlse_HT = torch.zeros_like(x.lse_HT)
    timers: Timers = {
        name_of(c): lambda c=c: bench_us(lambda: run_backward(x, dlse_HT, c))
        for c in [None, *candidates]
    }
    timers["FA2"] = lambda: bench_us(flash_backward(x, max(row.lengths)))
    if len(set(row.lengths)) == 1:
        timers["cuDNN"] = lambda: bench_us(cudnn_backward(x, len(row.lengths)))
    return timers


def decode_timers(row: Row, candidates: list[Candidate]) -> Timers:
    batch, context, heads = len(row.lengths), row.lengths[0], row.heads
    # Together four times the 60 MB of an H200's L2, and two at least.
    copies = max(2, min(32, math.ceil(240e6 / cache_bytes_of(row))))
    caches = [paged_inputs(heads, [1] * batch, row.lengths, seed) for seed in range(copies)]
    # A graph long enough that its launch does not count.
    repeats = max(1, 32 // copies) if cache_bytes_of(row) < 1e9 else 1

    def timer(run: Callable[[Paged], object]) -> Callable[[], float]:
        return lambda: graph_us([lambda x=x: run(x) for x in caches] * repeats)

    timers: Timers = {
        name_of(c): timer(lambda x, c=c: run_paged(x, heads, c)) for c in [None, *candidates]
    }
    key_offsets = torch.arange(batch + 1, device="cuda", dtype=torch.int32) * context

    def flash(x: Paged) -> Any:
        keys = x.k_cache.flatten(0, 1), x.v_cache.flatten(0, 1)
        return flash_varlen(x.q_THD, *keys, x.cu_seqlens_q, key_offsets, 1, context, causal=False)

    def dense(x: Paged) -> Tensor:
        shape = (batch, context, heads.key, heads.dim)
        keys = (t.view(shape).transpose(1, 2) for t in (x.k_cache, x.v_cache))
        return cudnn(x.q_THD.unsqueeze(2), *keys, causal=False)

    timers["FA2"], timers["cuDNN"] = timer(flash), timer(dense)
    return timers


def time_row(row: Row, candidates: list[Any]) -> dict[str, float | str]:
    """Microseconds by name; a sentence in place of a time where one could not run."""
    timers_of = {"decode": decode_timers, "backward": backward_timers}
    timers = timers_of.get(row.section, packed_timers)(row, candidates)
    times: dict[str, float | str] = {}
    # What is chosen comes first, when the GPU has idled while the inputs were made and its clock
    # may be down, and once more as the last: the better time counts.
    again = [(name, timer) for name, timer in timers.items() if name == CHOSEN]
    for name, timer in [*timers.items(), *again]:
        try:
            us = round(timer(), 2)
            before = times.get(name)
            times[name] = us if before is None or isinstance(before, str) else min(us, before)
        except Exception as error:  # a rival that lacks the shape must not end the run
            torch.cuda.synchronize()  # raises where the whole context is lost
            times[name] = sentence_of(error)
    return times


# Output.


def summarise(row: Row, times: dict[str, float | str], limits: dict[str, float]) -> dict[str, Any]:
    ours = {
        name: us for name, us in times.items() if name not in RIVALS and not isinstance(us, str)
    }
    best = min(ours, key=ours.__getitem__, default=None)
    figures = {
        name: round(figure_of(row, us), 1) for name, us in times.items() if not isinstance(us, str)
    }
    document: dict[str, Any] = {
        "section": row.section,
        "heads": str(row.heads),
        "row": row.name,
        "unit": row.unit,
        "target": row.target,
        "gflop": round(flop_of(row) / 1e9, 1) if row.section != "decode" else None,
        "cache_mb": round(cache_bytes_of(row) / 1e6, 1),
        "floor_us": round(floor_us_of(row, limits), 1),
        "us": times,
        "figures": figures,
        "best": best,
    }
    if best is not None:
        document["reached"] = round(reached(row, figures[best]), 3)
        document["of_limit"] = round(document["floor_us"] / ours[best], 3)
    return document


def print_table(documents: list[dict[str, Any]]) -> None:
    print(
        f"{'':8}{'heads':12}{'row':14}{'unit':9}{'target':>7}{'best':>8}{'ratio':>7}{'of limit':>9}"
        f"{'chosen':>8}{'FA2':>8}{'cuDNN':>8}  best candidate"
    )
    for d in documents:
        figures = d["figures"]
        cells = [figures.get(name, "-") for name in (CHOSEN, *RIVALS)]
        print(
            f"{d['section']:8}{d['heads']:12}{d['row']:14}{d['unit']:9}{d['target']:>7}"
            f"{figures.get(d['best'], '-'):>8}{d.get('reached', '-'):>7}{d.get('of_limit', '-'):>9}"
            + "".join(f"{cell:>8}" for cell in cells)
            + f"  {d['best']}"
        )


def heads_of(section: str) -> list[Heads]:
    return list(dict.fromkeys(row.heads for row in rows_of(section)))


def list_candidates(sections: list[str]) -> None:
    from tools.compile_ahead import compile_ahead, compile_gluon_ahead

    documents = []
    header = f"{'section':9}{'heads':11}{'candidate':48}{'registers':>10}{'stack':>7}{'shared':>9}"
    print(header + "  warps")
    for section in sections:
        for heads in heads_of(section):
            for candidate in CANDIDATES[section](heads):
                if section != "backward" and candidate.num_splits:  # one kernel for any number
                    continue
                for part, (kernel, constants) in kernels_of(section, heads, candidate).items():
                    if isinstance(kernel, Sizes):
                        made = compile_gluon_ahead(kernel, "bf16")
                    else:
                        strides = [name for name in kernel.arg_names if name.endswith(("_t", "_h"))]
                        made = compile_ahead(kernel, constants, "bf16", aligned=strides)
                    name = f"{candidate}{part and ': '}{part}"
                    serialised = made.serialised
                    print(
                        f"{section:9}{heads!s:11}{name:48}{made.registers or '-':>10}"
                        f"{'-' if made.stack_bytes is None else made.stack_bytes:>7}"
                        f"{made.shared_bytes:>9}  {made.num_warps}"
                        + (" specialised" if made.warp_specialized else "")
                        + (" serialised" if serialised else ""),
                        flush=True,
                    )
                    documents.append(
                        {"section": section, "heads": str(heads), "candidate": name}
                        | {k: v for k, v in made._asdict().items() if k not in ("ttgir", "ptx")}
                        | {"serialised": serialised}
                    )
    print(json.dumps({"target": "sm_90", "candidates": documents}))


def kernels_of(section: str, heads: Heads, candidate: Any) -> dict[str, tuple[Any, dict[str, Any]]]:
    """A candidate's kernels and their constants, by what they write; "" is all there is.

    The kernel in Gluon is compiled with its `Sizes`, which stand for it.
    """
    group = heads.query // heads.key
    if section == "backward":
        return backward_kernels(candidate, group, heads.dim)
    if isinstance(candidate.tile, GluonTile):
        has_left, has_right, paged = False, True, section != "varlen"
        return {"": (Sizes(heads.dim, group, *candidate.tile, has_left, has_right, paged), {})}
    return {"": kernel_of(section, heads, candidate.tile, candidate.descriptors)}


def kernel_of(
    section: str, heads: Heads, tile: Tile, descriptors: bool
) -> tuple[Any, dict[str, Any]]:
    """The kernel of a candidate and its constants."""
    group = heads.query // heads.key
    packed = group if tile.block_q < tile.block_m else 1
    constants = {
        **tile_arguments(tile, packed, heads.dim),
        **window_arguments(CAUSAL),
        **score_arguments(heads.dim**-0.5, 0.0),
    }
    for name in ("window_left", "window_right", "score_scale", "cap_scale"):
        del constants[name]
    if section != "varlen":
        cache = {"NUM_KV_HEADS": heads.key, "CACHE_BLOCK": CACHE_BLOCK}
        decodes = section == "decode"
        cache |= {
            "IS_SPLIT": decodes,
            "QUERIES": "guess one" if decodes else "any",
            **launch_options(False),
        }
        return paged_attention_kernel, constants | cache
    constants["SLOTS_A_KEY_HEAD"] = group // packed
    if not descriptors:
        return varlen_attention_kernel, constants
    return varlen_attention_tma_kernel, constants | {
        "WARP_SPECIALIZE": Candidate(tile, True).specialised
    }


def options() -> argparse.ArgumentParser:
    made = cli.Parser(
        prog="python -m tools.bench_attention",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--what", choices=[*SECTIONS, *SETS], default="all")
    made.add_argument("--out", type=Path, metavar="FILE", help="the JSON document, as it grows")
    made.add_argument("--list", action="store_true", help="compile ahead, time nothing")
    made.add_argument(
        "--seconds", type=number(0), default=200.0, metavar="X", help="of timing a section; 200"
    )
    made.add_argument(
        "--processes", type=cli.positive, default=8, metavar="N", help="checks that run at a time"
    )
    return made


def main(args: argparse.Namespace) -> None:
    sections = list(SETS.get(args.what, (args.what,)))
    if args.list:
        try:
            list_candidates(sections)
        except ImportError:
            print("python -m tools.bench_attention --list needs Triton, which is not installed")
        return
    if not torch.cuda.is_available():
        print(NO_GPU.format(torch.__version__))
        return
    import triton

    limits = {name: round(value, 1) for name, value in measure_limits().items()}
    document: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "limits": limits,
        "failures": [],
        "left_out": [],
        "rows": [],
    }
    print(f"{document['device']}: {limits}", flush=True)
    for section in sections:
        start = time.monotonic()
        jobs: dict[str, list[Job]] = {}
        for heads in heads_of(section):
            for candidate in [None, *CANDIDATES[section](heads)]:
                jobs.setdefault(name_of(candidate), []).append((section, heads, candidate))
        # A process says nothing until it has imported torch beside all the others.
        failures = check_all(jobs, args.processes, seconds=100)
        for (_, heads, name), trouble in failures.items():
            print(f"{section} {heads} {name}: {trouble}", flush=True)
            document["failures"].append([section, str(heads), name, trouble])
        checked = time.monotonic() - start
        print(f"{section}: candidates compiled and checked in {checked:.0f} s", flush=True)
        start = time.monotonic()  # compiling takes what it takes: rows are timed in any case
        for row in rows_of(section):
            if time.monotonic() - start > args.seconds:
                document["left_out"].append([section, str(row.heads), row.name])
                continue
            good = [
                candidate
                for candidate in CANDIDATES[section](row.heads)
                if (section, row.heads, str(candidate)) not in failures
            ]
            try:
                times = time_row(row, good)
            except torch.AcceleratorError as error:  # the context is lost: nothing more can run
                print_table(document["rows"])
                raise SystemExit(f"{section} {row.heads} {row.name}: {error}") from None
            document["rows"].append(summarise(row, times, limits))
            torch.cuda.empty_cache()
            print(f"{section} {row.heads} {row.name} timed", file=sys.stderr, flush=True)
            if args.out:
                args.out.write_text(json.dumps(document, indent=1), encoding="utf-8")
    for section, heads, name in document["left_out"]:
        print(f"not timed, the section's {args.seconds:.0f} s were over: {section} {heads} {name}")
    print_table(document["rows"])
    print(json.dumps(document))


if __name__ == "__main__":
    run(options(), main)
