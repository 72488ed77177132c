"""`python -m tools.compare_batching`: four ways to run requests of different lengths, side by side.

padded    one rectangle, every row as long as the longest
grouped   rectangles of similar lengths (between two powers of two), one after the other
unpadded  one rectangle, but every layer takes the real rows out for its attention and puts them
          back, as transformers does with a flash kernel
flat      minigen's: no padding anywhere

All have the same weights and, checked before they are timed, the same results. For the prefill and
decode steps these are the logits after the prefill and after four decode steps, in float32 and
uncompiled, of at most 16 of the sequences, cut to 512 tokens. For the forward of a training step
(with what its backward will need kept) and for a whole training step as `minigen train` takes it
(forward, chunked cross-entropy, backward, clipping, AdamW) these are losses and gradients of all
samples, in the dtype and compiled as they are timed. Each way compiles its layer once for all
layers and lengths, with dynamic sizes. On a GPU prefills and decode steps are replayed from CUDA
graphs, so that no way waits for the host; on a CPU all ways have the engine's native kernels, where
they are compiled. Where the real rows and keys lie, known from the lengths, is found before the
clock starts.

Padding is the share of computed token rows that nobody asked for; in decoding, the share of the
cache's rows that hold no token after the last step. Tokens a second count real tokens only. MFU is
the share of the device's peak that the samples' arithmetic makes (6 FLOP a weight and token, and
causal attention; neither padding nor what is recomputed counts). What does not fit into memory is
reported as such; a training step that does not compile runs uncompiled, and the table says so. What
is found is printed at once on standard error, and as a table at the end. The last line is one JSON
document.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from minigen.bench_options import model_dtype
from minigen.cli import positive
from minigen.flops import peak_flops_of
from minigen.kernels import native
from minigen.llm import device_of
from minigen.measure import environment, percentile, seconds_of, spans_of
from minigen.model import Decoder, DecoderConfig
from minigen.report import bar, print_document, table
from minigen.runner import MOST_COMPILATIONS
from minigen.start import share_triton_cache
from minigen.train_options import number
from minigen.workloads import read_trace
from tools import padded
from tools.batching_ways import WAYS, Compile, Flat, Way, without_coalescing
from tools.common import Plot, bars, model_config, parser, run, tokens_of
from tools.memory import OUT_OF_MEMORY, extra_memory, is_out_of_memory, release
from tools.training_ways import TRAINING_WAYS, WORDS, StepComparison, StepModels, StepOptions

LENGTHS = ("uniform", "lognormal", "one-long", "trace")
PHASES = ("prefill", "decode", "train-forward", "train-step")
SERVING, TRAINING = PHASES[:2], PHASES[2:]
SHORT = 16  # of "one-long": all but one
# What the check in float32 takes of the prompts: attention there may hold all scores.
CHECKED_SEQS, CHECKED_LEN, CHECKED_STEPS = 16, 512, 4
LEFT_OUT = "left out: the lengths of a recorded trace, for which there is no --trace FILE"


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


def step_lengths(
    kind: str, tokens: int, num_seqs: int, max_len: int, seed: int, trace: Sequence[int] = ()
) -> list[int]:
    """Lengths of `tokens` tokens in all: one draw of `num_seqs` after the other, the last one cut.

    Raises ValueError where a trace ends before.
    """
    lengths: list[int] = []
    missing, draw = tokens, 0
    while missing:
        rest = trace[draw * num_seqs :]
        if kind == "trace" and not rest:
            raise ValueError(f"the trace has {tokens - missing:,} tokens, --tokens is {tokens:,}")
        for length in lengths_of(kind, num_seqs, max_len, seed + draw, rest):
            if missing:
                lengths.append(min(length, missing))
                missing -= lengths[-1]
        draw += 1
    return lengths


# --- compilation ---------------------------------------------------------------------------------


def as_it_is(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return function


def compiler(mode: str) -> Compile:
    """Wraps a function by torch.compile, sizes dynamic; "eager" leaves it as it is."""
    if mode == "eager":
        return as_it_is
    options: dict[str, Any] = {**without_coalescing()}
    return lambda function: torch.compile(function, dynamic=True, options=options or None)


# --- check and measure ---------------------------------------------------------------------------


@torch.no_grad()
def check_agreement(
    decoder: Decoder,
    prompts: Sequence[list[int]],
    steps_NS: Tensor,
    phases: Sequence[str] = SERVING,
) -> dict[str, float]:
    """{way: largest difference of its logits from flat's, over the largest logit}.

    Compared are the logits after the prefill and, where `phases` has "decode", after each step.
    Raises ValueError where a way differs by more than 1,000 roundings of the decoder's dtype.
    """
    found: dict[str, float] = {}
    expected: list[Tensor] = []
    for kind in reversed(WAYS):
        release(decoder.embed.weight.device)
        way = kind(decoder, prompts, len(steps_NS), as_it_is)
        way.make_cache()
        results = [way.prefill()]
        if "decode" in phases:
            results += [way.decode(tokens_S, step) for step, tokens_S in enumerate(steps_NS)]
        if kind is Flat:
            expected = results
            continue
        pairs = zip(results, expected, strict=True)
        # torch's maximum is NaN where one of them is, Python's only if it is the first.
        difference = float(
            torch.stack([(a - b).abs().max() / b.abs().max() for a, b in pairs]).max()
        )
        bound = 1000 * torch.finfo(decoder.embed.weight.dtype).eps
        if not difference <= bound:
            raise ValueError(
                f"{kind.name} and flat disagree: logits differ by {difference:.2g} of the "
                f"largest, more than {bound:.2g}"
            )
        found[kind.name] = difference
    return found


def replayed(function: Callable[[], Tensor], device: torch.device) -> Callable[[], object]:
    """On a GPU the call as a CUDA graph, which it has to be warm for; elsewhere itself."""
    if device.type != "cuda":
        return function
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


@torch.no_grad()
def measure(
    kind: type[Way],
    decoder: Decoder,
    prompts: Sequence[list[int]],
    steps_NS: Tensor,
    repeats: int,
    wrap: Compile,
    phases: Sequence[str] = SERVING,
) -> list[dict[str, Any]]:
    """One row a phase: milliseconds, tokens/s, padding, memory of cache and activations."""
    device = decoder.embed.weight.device
    way = kind(decoder, prompts, len(steps_NS), wrap)
    real, last = sum(way.lengths), len(steps_NS) - 1

    def prefill() -> dict[str, Any]:
        way.prefill()  # which compiles
        peak = way.cache_bytes() + extra_memory(way.prefill, device)
        release(device)  # a graph has memory of its own
        seconds = seconds_of(replayed(way.prefill, device), device, repeats)
        return {"ms": seconds * 1e3, "tokens_s": real / seconds, "peak_bytes": peak}

    def decode() -> dict[str, Any]:
        # Not compiled: only the steps are timed.
        way.fill_cache()
        for step, tokens_S in enumerate(steps_NS):
            way.decode(tokens_S, step)

        def last_step() -> Tensor:
            return way.decode(steps_NS[last], last)

        peak = way.cache_bytes() + extra_memory(last_step, device)
        # The last step again and again writes the same keys into the same places.
        spans = spans_of(replayed(last_step, device), device, repeats * len(steps_NS))
        seconds = percentile(spans, 50)
        return {
            "ms": seconds * 1e3,
            "p99_ms": percentile(spans, 99) * 1e3,
            "tokens_s": len(prompts) / seconds,
            "peak_bytes": peak,
        }

    functions = {"prefill": prefill, "decode": decode}
    rows = []
    for phase in phases:
        way.drop_cache()
        release(device)
        try:
            way.make_cache()
            found = functions[phase]()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            # Where padding does not fit, that is the result.
            found = {"ms": None, "tokens_s": None, "peak_bytes": None, "error": OUT_OF_MEMORY}
        rows.append({"way": way.name, "phase": phase, "padding": way.padding(phase), **found})
    return rows


# --- the runs ------------------------------------------------------------------------------------


def main(args: argparse.Namespace) -> None:
    config = model_config(args, "tiny")
    device = device_of(args.device)
    cuda = device.type == "cuda"
    phases = [phase for phase in PHASES if phase in (args.phases or PHASES)]
    max_len = args.max_len or (4096 if cuda else 512)
    num_seqs = args.num_seqs or (64 if cuda else 16)
    if num_seqs < 2:
        raise ValueError("--num-seqs is 1: a batch to compare has at least 2")
    serving = [phase for phase in phases if phase in SERVING]
    training = [phase for phase in phases if phase in TRAINING]
    for option in ("tokens", "max_rows", "recompute", "peak_flops"):
        if getattr(args, option) and not training:
            name = option.replace("_", "-")
            raise ValueError(f"--{name} is for the training phases, which --phases leaves out")
    if args.max_rows is not None and args.max_rows < max_len:
        raise ValueError(
            f"--max-rows is {args.max_rows}, but must hold a sequence of --max-len {max_len}"
        )
    trace: list[int] = []
    left_out: list[str] = []
    kinds = args.lengths
    if kinds is None:
        left_out = [] if args.trace else ["trace"]
        kinds = [kind for kind in LENGTHS if kind not in left_out]
    elif args.trace and "trace" not in kinds:
        raise ValueError("--trace is for the lengths of a trace, which --lengths leaves out")
    if "trace" in kinds:
        if args.trace is None:
            raise ValueError("--lengths trace needs --trace FILE, a CSV as azure_llm_conv")
        trace = [row.prompt_tokens for row in read_trace(args.trace)]
        if len(trace) < num_seqs:
            raise ValueError(f"{args.trace} has {len(trace)} requests, --num-seqs is {num_seqs}")
    lengths = {kind: lengths_of(kind, num_seqs, max_len, args.seed, trace) for kind in kinds}
    trained = lengths
    if args.tokens:
        drawn = (num_seqs, max_len, args.seed, trace)
        trained = {kind: step_lengths(kind, args.tokens, *drawn) for kind in kinds}
    plot = Plot(args, len(phases))
    longest = max_len + args.decode_steps if serving else max_len
    decoder = _decoder(args, config, device, longest)
    padded.check_supported(decoder)
    dtype = decoder.embed.weight.dtype
    if args.compile != "eager":
        share_triton_cache(device)
    if left_out:
        print(LEFT_OUT, file=sys.stderr, flush=True)

    agreement: dict[str, Any] = {}
    step_agreement: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    runs = len(kinds) * (1 + len(WAYS)) * (bool(serving) + bool(training))
    with bar(runs, "Ways", "run") as shown:
        if serving:
            agreement, rows = _serve(args, decoder, lengths, serving, shown)
        if training:
            peak = args.peak_flops
            if peak is None and cuda:
                peak = peak_flops_of(torch.cuda.get_device_name(device))
            options = StepOptions(
                dtype, args.compile, args.recompute, args.max_rows, args.repeats, peak
            )
            step_agreement, found = _train(args, decoder.float(), trained, training, options, shown)
            rows += found
    _print(rows, lengths, trained, agreement, step_agreement)
    if left_out:
        print(LEFT_OUT)
    _draw(plot, phases, rows, list(kinds), f"{_model_name(args)}, {_name(dtype)}, {device}")
    print_document(
        {
            "command": "compare_batching",
            "model": _model_name(args),
            **environment(device),
            "dtype": _name(dtype),
            "compile": args.compile,
            "lengths": lengths,
            "lengths_left_out": left_out,
            "decode_steps": args.decode_steps,
            "agreement": agreement,
            "train_step": {
                "lengths": trained,
                "recompute": args.recompute,
                "max_rows": args.max_rows,
                "agreement": step_agreement,
            },
            "plot": plot.path,
            "rows": rows,
        }
    )


def _serve(
    args: argparse.Namespace,
    decoder: Decoder,
    lengths: dict[str, list[int]],
    phases: Sequence[str],
    shown: tqdm,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(agreement by lengths, rows) of prefill and decode."""
    config, device, dtype = decoder.config, decoder.embed.weight.device, decoder.embed.weight.dtype
    rng = random.Random(args.seed)
    num_seqs = len(next(iter(lengths.values())))
    steps = [
        [rng.randrange(config.vocab_size) for _ in range(num_seqs)]
        for _ in range(args.decode_steps)
    ]
    steps_NS = torch.tensor(steps, device=device)
    wrap = compiler(args.compile)
    if device.type == "cpu" and args.compile != "eager":
        native.load_if_possible()  # as the engine does
    agreement: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    # Sizes are dynamic: all lengths run what the first ones have compiled. Nothing may run
    # uncompiled because rectangles of one row, or of another way, are compiled too.
    torch.compiler.reset()
    with torch._dynamo.config.patch(  # pyright: ignore[reportAttributeAccessIssue]
        recompile_limit=MOST_COMPILATIONS, accumulated_recompile_limit=MOST_COMPILATIONS
    ):
        for kind, values in lengths.items():
            prompts = tokens_of(values, config.vocab_size, args.seed)
            checked = [prompt[:CHECKED_LEN] for prompt in prompts[:CHECKED_SEQS]]
            # To float32 and back leaves the weights as they were.
            agreement[kind] = check_agreement(
                decoder.float(), checked, steps_NS[:CHECKED_STEPS, :CHECKED_SEQS], phases
            )
            decoder.to(dtype)
            shown.update()
            for way in WAYS:
                for row in measure(way, decoder, prompts, steps_NS, args.repeats, wrap, phases):
                    rows.append({"lengths": kind, **row})
                    _say(rows[-1], shown)
                shown.update()
    return agreement, rows


def _say(row: dict[str, Any], shown: tqdm) -> None:
    """One line at once: a run that is cut off has said what it found."""
    found = row.get("error")
    if row["ms"] is not None:
        found = f"{row['ms']:,.2f} ms, {row['tokens_s']:,.0f} tokens/s"
    shown.write(f"{row['lengths']}, {row['phase']}, {row['way']}: {found}", file=sys.stderr)


def _train(
    args: argparse.Namespace,
    decoder: Decoder,
    lengths: dict[str, list[int]],
    phases: Sequence[str],
    options: StepOptions,
    shown: tqdm,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(agreement by lengths, rows) of the training step and of its forward."""
    agreement: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    native.unload()  # `minigen train` runs on torch's kernels
    # What the serving phases have compiled must not burden a step. Sizes are dynamic: all lengths
    # run what the first ones have compiled.
    torch.compiler.reset()
    models = StepModels(decoder, options)
    for kind, values in lengths.items():
        if max(values) == 1:
            continue  # single tokens predict nothing
        samples = tokens_of(values, decoder.config.vocab_size, args.seed)
        comparison = StepComparison(decoder, samples, options, models)
        agreement[kind] = comparison.check()
        shown.update()
        for way in TRAINING_WAYS:
            for phase in phases:
                rows.append({"lengths": kind, **comparison.measure(way, phase)})
                _say(rows[-1], shown)
            shown.update()
    return agreement, rows


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
    trained: dict[str, list[int]],
    agreement: dict[str, Any],
    step_agreement: dict[str, Any],
) -> None:
    def says(kind: str, values: list[int], how: str) -> None:
        print(
            f"{kind}: {len(values)} sequences, {sum(values):,} tokens, {min(values)} to "
            f"{max(values)} long; {how}"
        )

    for kind, found in agreement.items():
        worst = max(found.values(), default=0.0)
        says(kind, lengths[kind], f"the ways agree within {worst:.1g} of the largest logit")
    for kind, found in step_agreement.items():
        worst = {
            name: max((value[name] for value in found.values() if value), default=0.0)
            for name in WORDS
        }
        how = ", ".join(f"{WORDS[name]} {value:.1g}" for name, value in worst.items())
        says(kind, trained[kind], f"training steps agree within ({how}) of the value")
    flat = {(r["lengths"], r["phase"]): r["ms"] for r in rows if r["way"] == Flat.name}

    def line(r: dict[str, Any]) -> list[Any]:
        beside = flat[r["lengths"], r["phase"]]
        ratio = r["ms"] / beside if r["ms"] and beside else r.get("error")
        memory = None if r["peak_bytes"] is None else r["peak_bytes"] / 1e6
        share = None if r["padding"] is None else f"{r['padding']:.1%}"
        where = f"{r['lengths']}, {r['phase']}"
        return [where, r["way"], r["ms"], ratio, r["tokens_s"], share, memory]

    def step_line(r: dict[str, Any]) -> list[Any]:
        mfu = None if r["mfu"] is None else f"{r['mfu']:.1%}"
        name = f"{r['way']}, uncompiled" if r["uncompiled"] else r["way"]
        cells = line(r)
        return [cells[0], name, *cells[2:], r["micro_batches"], r["tflop_s"], mfu]

    header = ["lengths, phase", "way", "ms", "× flat", "tokens/s", "padding", "memory MB"]
    ordered = [r for phase in SERVING for r in rows if r["phase"] == phase]
    steps = [r for phase in TRAINING for r in rows if r["phase"] == phase]
    if ordered:
        print()
        print(table(header, [line(r) for r in ordered]))
    if steps:
        print()
        print(table([*header, "micro-batches", "TFLOP/s", "MFU"], [step_line(r) for r in steps]))
    for way, reason in {r["way"]: r["uncompiled"] for r in steps if r["uncompiled"]}.items():
        print(f"{way} {reason}: it ran uncompiled")


def _draw(
    plot: Plot, phases: list[str], rows: list[dict[str, Any]], kinds: list[str], title: str
) -> None:
    if not plot.axes:
        return
    for axis, phase in zip(plot.axes, phases, strict=True):
        # Of a whole step what counts is what it gets through.
        what, label = ("tokens_s", "tokens/s") if phase == "train-step" else ("ms", "ms")
        found = {(r["lengths"], r["way"]): r[what] for r in rows if r["phase"] == phase}
        series = {way.name: [found.get((k, way.name)) or 0.0 for k in kinds] for way in WAYS}
        bars(axis, kinds, series, f"{phase}, {label}")
    plot.save(title)


def options() -> argparse.ArgumentParser:
    made = parser("tools.compare_batching", __doc__, "compare_batching.png")
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument(
        "--compile", default="default", choices=["eager", "default"],
        help="of all four ways",
    )  # fmt: skip
    made.add_argument("--phases", nargs="+", choices=PHASES, metavar="PHASE", help="default: all")
    made.add_argument(
        "--lengths", nargs="+", choices=LENGTHS, metavar="KIND",
        help=f"of {', '.join(LENGTHS)}; default: all, the last only with --trace",
    )  # fmt: skip
    made.add_argument(
        "--trace", metavar="FILE", help="CSV as azure_llm_conv, plain or .xz: adds its lengths"
    )
    made.add_argument(
        "--num-seqs", type=positive, metavar="N", help="16 on a CPU, 64 on a GPU by default"
    )
    made.add_argument(
        "--max-len", type=positive, metavar="N", help="512 on a CPU, 4096 on a GPU by default"
    )
    made.add_argument("--decode-steps", type=positive, default=16, metavar="N")
    made.add_argument("--repeats", type=positive, default=5, metavar="N")
    step = made.add_argument_group("train-forward and train-step")
    step.add_argument(
        "--tokens", type=positive, metavar="N",
        help="of the step: as many draws of --num-seqs lengths as make N, the last length cut; "
        "default: the sequences of the other phases",
    )  # fmt: skip
    step.add_argument(
        "--max-rows", type=positive, metavar="N",
        help="most rows of a micro-batch, padding included: what is larger is split in the order "
        "of the samples, and its gradients are accumulated; default: no limit",
    )  # fmt: skip
    step.add_argument(
        "--recompute", action="store_true", help="keep only each layer's input for the backward"
    )
    step.add_argument(
        "--peak-flops", type=number(0, open_low=True), metavar="X",
        help="of the device, for the MFU; known for common GPUs",
    )  # fmt: skip
    return made


if __name__ == "__main__":
    run(options(), main)
