"""`python -m minigen bench`: how fast a model's shape runs on this machine, and how near its limit.

Weights are random unless a checkpoint is given: speed does not depend on them.
"""

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigen import cli, workloads
from minigen.report import print_document, table
from minigen.shapes import SHAPES
from minigen.workloads import Request

if TYPE_CHECKING:
    import torch

    from minigen.llm import LLM
    from minigen.measure import Cost, Limits, StepMeter
    from minigen.outputs import RequestOutput
    from minigen.sampling import SamplingParams

WORKLOADS = ("nano", "fixed", "trace", "start")
NANO_TEMPERATURE = 0.6
SLO_NAMES = ("ttft", "tpot", "e2el")
DEFAULT_GOODPUT = ("ttft:1000", "tpot:100")
# The smallest run of another bench process: it starts, computes a prompt and decodes.
SHORTEST = ("fixed", "--batch-size", "1", "--input-len", "8", "--output-len", "4")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `bench`, vLLM's names where it has one."""
    parser.add_argument("workload", choices=WORKLOADS)
    cli.add_engine_options(parser)
    shape = parser.add_argument_group("random weights, instead of --model")
    shape.add_argument("--config", metavar="FILE", help="of any config.json's shape")
    shape.add_argument("--shape", metavar="NAME", help=f"of a known shape: {', '.join(SHAPES)}")
    shape.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and prompts")

    engine = parser.add_argument_group("engine")
    add, count = engine.add_argument, cli.positive
    add("--max-num-seqs", type=count, metavar="N", help="most sequences at once; default 256")
    add("--max-num-batched-tokens", type=count, default=2048, metavar="N", help="of a step; 2048")
    add("--num-cache-blocks", type=count, metavar="N", help="default: what memory allows")
    add("--gpu-memory-utilization", type=float, default=0.9, metavar="X", help="0.9")
    add("--enable-prefix-caching", action="store_true", help="off here, unlike elsewhere")

    work = parser.add_argument_group("work")
    add = work.add_argument
    add(
        "--num-prompts", "--num-requests", type=count, metavar="N",
        help="nano: the first N of its 256; trace: the first N of the file",
    )  # fmt: skip
    add(
        "--batch-size", type=count, nargs="+", default=[1, 8, 32, 128, 256], metavar="N",
        help="fixed: requests at once, several runs; 1 8 32 128 256",
    )  # fmt: skip
    add("--input-len", type=count, default=128, metavar="N", help="fixed: tokens of a prompt; 128")
    add("--output-len", type=count, default=512, metavar="N", help="fixed: new tokens; 512")
    add("--dataset-path", metavar="FILE", help="trace: CSV as azure_llm_conv, plain or .xz")
    add("--rate", type=_rate, default=1.0, metavar="X", help="trace: X times faster; inf: at once")
    add(
        "--goodput", nargs="+", default=list(DEFAULT_GOODPUT), metavar="NAME:MS",
        help="trace: the times that a good request keeps, of ttft, tpot and e2el; "
        + " ".join(DEFAULT_GOODPUT),
    )  # fmt: skip
    add(
        "--rival", choices=["transformers"],
        help="nano, fixed: the same requests through it, padded on the left, in this run",
    )  # fmt: skip
    add(
        "--rival-batch-size", type=count, default=64, metavar="N",
        help="nano: requests that the rival is given at once; 64",
    )  # fmt: skip


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not rate > 0:
        raise argparse.ArgumentTypeError(f"must be a number above 0 or inf, not {text!r}")
    return rate


def read_goodput(entries: Sequence[str]) -> dict[str, float]:
    """`ttft:1000` -> {"ttft": 1000.0}, milliseconds.

    Raises ValueError for a name that is none of `SLO_NAMES` and for what is no number above 0.
    """
    limits: dict[str, float] = {}
    for entry in entries:
        name, _, text = entry.partition(":")
        try:
            limits[name] = float(text)
        except ValueError:
            limits[name] = 0.0
        if name not in SLO_NAMES or not limits[name] > 0:
            raise ValueError(
                f"--goodput {entry!r}: NAME:MILLISECONDS is needed, NAME one of "
                + ", ".join(SLO_NAMES)
            )
    return limits


def model_config(args: argparse.Namespace) -> dict[str, Any] | None:
    """The config.json that --shape or --config name; None for --model.

    Raises ValueError unless exactly one of the three is given.
    """
    given = [name for name in ("model", "config", "shape") if getattr(args, name) is not None]
    if len(given) != 1:
        found = " and ".join(f"--{name}" for name in given)
        raise ValueError(
            (f"{found} name two models" if given else "there is no model to measure")
            + f": give one of --shape ({', '.join(SHAPES)}), --config FILE and --model DIR"
        )
    if args.shape is not None:
        if args.shape not in SHAPES:
            raise ValueError(f"--shape {args.shape!r} is unknown: use one of {', '.join(SHAPES)}")
        return dict(SHAPES[args.shape])
    if args.config is not None:
        from minigen.weights.checkpoint import read_json

        return read_json(Path(args.config))
    return None


def run(args: argparse.Namespace) -> int:
    """Measure what the options say and print it. Returns the exit code; raises ValueError."""
    config = model_config(args)
    goodput = read_goodput(args.goodput)
    rows = _trace_rows(args)
    if args.rival and args.workload not in ("nano", "fixed"):
        raise ValueError(f"--rival runs nano and fixed, not {args.workload}")
    if args.workload == "nano":
        workloads.check_nano(args.num_prompts or workloads.NANO_REQUESTS)
    if args.workload == "start":
        return _run_start(args)

    start = time.perf_counter()
    import torch

    from minigen.llm import device_of
    from minigen.measure import (
        Compilations,
        Cost,
        measure_limits,
        peak_memory,
        reset_peak_memory,
    )

    device = device_of(args.device)
    torch.zeros(1, device=device)  # a GPU's context belongs to the start
    imported = time.perf_counter() - start
    dtype = model_dtype(args, config)
    limits = measure_limits(device, dtype)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    reset_peak_memory(device)  # the measurement's own tensors are no part of it

    start = time.perf_counter()
    llm = load(args, config)
    _serve(llm, [Request([1] * 8, 2)], 0.0)
    start_s = imported + time.perf_counter() - start
    parts = {"import": imported, **llm.start_seconds}
    parts["first step"] = start_s - sum(parts.values())
    started = Compilations.so_far()

    runner = llm.engine.runner
    cost = Cost.of(runner.model)
    bench = _Bench(args, llm, cost, limits)
    if args.workload == "nano":
        report = bench.nano()
    elif args.workload == "fixed":
        report = bench.fixed()
    else:
        assert rows is not None
        report = bench.trace(rows, goodput)
    document = {
        "command": "bench",
        "workload": args.workload,
        "model": args.shape or args.config or args.model,
        "parameters": sum(p.numel() for p in runner.model.parameters()),
        **environment(device),
        "dtype": str(llm.dtype).removeprefix("torch."),
        "compile": args.compile,
        "compile_status": llm.compile_status,
        "start_s": start_s,
        "start_parts_s": parts,
        "start": started.start,
        "compiled_graphs": started.graphs,
        "recompilations": Compilations.so_far().graphs - started.graphs,
        "limits": limits.as_dict(),
        "memory": {
            "peak_bytes": peak_memory(device),
            "weight_bytes": sum(p.nbytes for p in runner.model.parameters()),
            "cache_bytes": runner.num_blocks * cost.block_bytes(runner.block_size),
        },
        **report,
    }
    if args.rival:
        del llm, runner, bench
        document["rival"] = _rival(args, config, device, dtype)
    _print_summary(document)
    print_document(document)
    return cli.EXIT_OK


def _trace_rows(args: argparse.Namespace) -> list[workloads.TraceRow] | None:
    if args.workload != "trace":
        return None
    if args.dataset_path is None:
        raise ValueError(
            "trace needs --dataset-path FILE, a CSV with the columns "
            + ", ".join(workloads.TRACE_COLUMNS)
        )
    return workloads.read_trace(args.dataset_path)


def model_dtype(args: argparse.Namespace, config: dict[str, Any] | None) -> "torch.dtype":
    """The dtype that the options and the model's config lead to."""
    from minigen.model import DTYPES, DecoderConfig
    from minigen.weights.checkpoint import read_config
    from minigen.weights.hub import resolve_model

    if args.dtype != "auto":
        return DTYPES[args.dtype]
    return DecoderConfig.from_hf(config or read_config(resolve_model(args.model))).dtype


def load(args: argparse.Namespace, config: dict[str, Any] | None) -> "LLM":
    """The LLM that the options describe."""
    most = max(args.batch_size) if args.workload == "fixed" else 256
    seqs = args.max_num_seqs or max(most, 256)
    return cli.load_llm(
        args,
        config=config,
        max_num_seqs=seqs,
        max_num_batched_tokens=max(args.max_num_batched_tokens, seqs),
        num_cache_blocks=args.num_cache_blocks,
        enable_prefix_caching=args.enable_prefix_caching,
        gpu_memory_utilization=args.gpu_memory_utilization,
        seed=args.seed,
        **({} if config is None else {"weights_seed": args.seed}),
    )


def environment(device: "torch.device") -> dict[str, Any]:
    """What a figure depends on beside the code."""
    import torch

    from minigen.measure import device_name

    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }


@contextlib.contextmanager
def bar(total: int, what: str, unit: str = "token") -> Iterator[Any]:
    """A progress bar on standard error, where that is a terminal and it takes over two seconds."""
    from tqdm import tqdm

    hidden = not cli.is_terminal(sys.stderr)
    with tqdm(total=total, desc=what, unit=unit, delay=2, disable=hidden, leave=False) as shown:
        yield shown


# --- the runs ------------------------------------------------------------------------------------


class _Progress:
    """Requests on their way through the engine, by their latest output."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = requests
        self.outputs: dict[int, RequestOutput] = {}
        self.num_finished = 0

    def take(self, outputs: Sequence["RequestOutput"]) -> None:
        for output in outputs:
            self.outputs[int(output.request_id)] = output
            self.num_finished += output.finished

    def lengths(self) -> list[int]:
        """Output tokens of each request so far."""
        return [
            len(self.outputs[i].outputs[0].token_ids) if i in self.outputs else 0
            for i in range(len(self.requests))
        ]


def _params(request: Request, temperature: float, seed: int) -> "SamplingParams":
    from minigen.sampling import SamplingParams

    return SamplingParams(
        temperature=temperature, max_tokens=request.max_tokens, ignore_eos=True, seed=seed
    )


def _serve(
    llm: "LLM",
    requests: Sequence[Request],
    temperature: float,
    watch: Callable[["StepMeter", _Progress], None] | None = None,
    what: str = "Warm-up",
) -> tuple["StepMeter", _Progress]:
    """All requests at once, to their end; `watch` sees every step."""
    from minigen.measure import StepMeter

    for i, request in enumerate(requests):
        llm.engine.add_request(str(i), request.prompt, _params(request, temperature, i))
    meter, progress = StepMeter(llm.engine), _Progress(requests)
    with bar(sum(r.max_tokens for r in requests), what) as shown:
        while llm.engine.has_unfinished():
            progress.take(meter.step())
            shown.update(meter.steps[-1].output_tokens)
            if watch is not None:
                watch(meter, progress)
    return meter, progress


class _Bench:
    """The workloads over one LLM; each returns what the JSON document holds of it."""

    def __init__(
        self, args: argparse.Namespace, llm: "LLM", cost: "Cost", limits: "Limits"
    ) -> None:
        self.args, self.llm, self.cost, self.limits = args, llm, cost, limits
        self.vocab_size = llm.config.vocab_size

    def _report(
        self, steps: Sequence[Any], cache_bytes: int, prompts: Sequence[Request] = ()
    ) -> dict[str, Any]:
        from minigen.measure import step_report

        flop = sum(self.cost.prompt_flop(len(request.prompt)) for request in prompts)
        return step_report(steps, self.cost, self.limits, cache_bytes, flop)

    def nano(self) -> dict[str, Any]:
        requests = workloads.nano(self.args.num_prompts or workloads.NANO_REQUESTS, self.vocab_size)
        self._check_fits(requests)
        # On a GPU with all prompts: what a kind of step needs at its first time takes long to load.
        warm = requests if self.llm.device.type == "cuda" else requests[:2]
        _serve(self.llm, [Request(r.prompt, 4) for r in warm], NANO_TEMPERATURE)
        before = self.llm.engine.stats.num_preemptions
        start = time.perf_counter()
        meter, _ = _serve(self.llm, requests, NANO_TEMPERATURE, what="nano")
        seconds = time.perf_counter() - start
        cache = sum(self._decode_bytes(r, 1, r.max_tokens) for r in requests)
        prompt_tokens = sum(len(r.prompt) for r in requests)
        output_tokens = sum(r.max_tokens for r in requests)
        row = {
            "requests": len(requests),
            "seconds": seconds,
            "prompt_tokens": prompt_tokens,
            "output_tokens": output_tokens,
            "output_tokens_s": output_tokens / seconds,
            "total_tokens_s": (prompt_tokens + output_tokens) / seconds,
            "preemptions": self.llm.engine.stats.num_preemptions - before,
            **self._report(meter.steps, cache, requests),
        }
        return {"rows": [row]}

    def fixed(self) -> dict[str, Any]:
        most = self.llm.engine.runner.max_num_seqs
        if max(self.args.batch_size) > most:
            raise ValueError(
                f"--batch-size {max(self.args.batch_size)} is more than --max-num-seqs {most}"
            )
        return {"rows": [self._fixed(batch) for batch in self.args.batch_size]}

    def _fixed(self, batch: int) -> dict[str, Any]:
        args, llm = self.args, self.llm
        requests = workloads.fixed(
            batch, args.input_len, args.output_len, self.vocab_size, args.seed
        )
        self._check_fits(requests)
        prompts = [Request(r.prompt, 1) for r in requests]
        _serve(llm, [Request(r.prompt, min(4, r.max_tokens)) for r in requests], 0.0)
        start = time.perf_counter()
        prefill, _ = _serve(llm, prompts, 0.0, what=f"batch {batch}, prefill")
        prefill_seconds = time.perf_counter() - start

        # Decoding is timed from the step that gave the last first token to the first request's end.
        window: list[tuple[int, list[int]]] = []

        def watch(meter: "StepMeter", progress: _Progress) -> None:
            all_began = len(progress.outputs) == len(requests)
            begins = not window and all_began and not progress.num_finished
            if begins or (len(window) == 1 and progress.num_finished):
                window.append((len(meter.steps), progress.lengths()))

        before = llm.engine.stats.num_preemptions
        decode, _ = _serve(llm, requests, 0.0, watch, f"batch {batch}, decode")
        if len(window) < 2:
            raise ValueError(
                f"--output-len {args.output_len} is too short at batch {batch}: the first request "
                "ends before the last one's prompt is computed; give more"
            )
        (first, had), (last, have) = window
        steps = decode.steps[first:last]
        cache = sum(
            self._decode_bytes(r, a, b) for r, a, b in zip(requests, had, have, strict=True)
        )
        return {
            "batch": batch,
            "prompt_tokens": sum(len(r.prompt) for r in requests),
            "output_tokens": sum(have) - sum(had),
            "prefill_tokens_s": sum(len(r.prompt) for r in requests) / prefill_seconds,
            "prefill_share_of_limit": self._report(prefill.steps, 0, requests)["share_of_limit"],
            "decode_tokens_s": (sum(have) - sum(had)) / sum(step.seconds for step in steps),
            "preemptions": llm.engine.stats.num_preemptions - before,
            **self._report(steps, cache),
        }

    def trace(
        self, rows: Sequence[workloads.TraceRow], goodput: dict[str, float]
    ) -> dict[str, Any]:
        from minigen.measure import StepMeter, percentiles

        args, llm = self.args, self.llm
        requests, left_out = workloads.replayed(
            rows, num_requests=args.num_prompts, rate=args.rate, vocab_size=self.vocab_size,
            max_model_len=llm.max_model_len, seed=args.seed,
        )  # fmt: skip
        if not requests:
            raise ValueError(
                f"no request of {args.dataset_path} fits into the context of {llm.max_model_len} "
                "tokens: give a larger --max-model-len"
            )
        _serve(llm, [Request(requests[0].prompt, min(4, requests[0].max_tokens))], 0.0)
        meter = StepMeter(llm.engine)
        # When each request's tokens came. A request counts from its time in the trace: one that
        # waits because a step is running has waited.
        times: list[list[float]] = [[] for _ in requests]
        added = 0
        start = time.perf_counter()
        with bar(sum(r.max_tokens for r in requests), "trace") as shown:
            while added < len(requests) or llm.engine.has_unfinished():
                now = time.perf_counter() - start
                while added < len(requests) and requests[added].arrival_s <= now:
                    request = requests[added]
                    llm.engine.add_request(str(added), request.prompt, _params(request, 0.0, added))
                    added += 1
                if not llm.engine.has_unfinished():
                    meter.idle()
                    time.sleep(max(0.0, requests[added].arrival_s - now))
                    continue
                outputs = meter.step()
                now = time.perf_counter() - start
                for output in outputs:
                    came = times[int(output.request_id)]
                    came += [now] * (len(output.outputs[0].token_ids) - len(came))
                shown.update(meter.steps[-1].output_tokens)
        seconds = time.perf_counter() - start

        ttft = [came[0] - r.arrival_s for came, r in zip(times, requests, strict=True)]
        e2el = [came[-1] - r.arrival_s for came, r in zip(times, requests, strict=True)]
        tpot = [(came[-1] - came[0]) / max(1, len(came) - 1) for came in times]
        between = [b - a for came in times for a, b in itertools.pairwise(came)]
        kept = {"ttft": ttft, "tpot": tpot, "e2el": e2el}
        good = sum(
            all(kept[name][i] * 1e3 <= limit for name, limit in goodput.items())
            for i in range(len(requests))
        )
        cache = sum(self._decode_bytes(r, 1, r.max_tokens) for r in requests)
        output_tokens = sum(r.max_tokens for r in requests)
        row = {
            "requests": len(requests),
            "left_out": left_out,
            "rate": args.rate if args.rate < float("inf") else "inf",
            "seconds": seconds,
            "prompt_tokens": sum(len(r.prompt) for r in requests),
            "output_tokens": output_tokens,
            "output_tokens_s": output_tokens / seconds,
            "requests_s": len(requests) / seconds,
            "goodput_requests_s": good / seconds,
            "good_requests": good,
            "goodput": goodput,
            "ttft_ms": percentiles(ttft, 1e3),
            "itl_ms": percentiles(between, 1e3),
            "tpot_ms": percentiles(
                [t for t, came in zip(tpot, times, strict=True) if came[1:]], 1e3
            ),
            "e2el_ms": percentiles(e2el, 1e3),
            # Of one request, its waiting included; p99 is the speed that 99 % of them exceed.
            "request_tokens_s": _slow_side([len(c) / e for c, e in zip(times, e2el, strict=True)]),
            **self._report(meter.steps, cache, requests),
        }
        return {"rows": [row]}

    def _decode_bytes(self, request: Request, had: int, have: int) -> int:
        """Cache that the steps read which took a request from `had` output tokens to `have`."""
        context = len(request.prompt)
        return self.cost.decode_bytes(context + had, context + have)

    def _check_fits(self, requests: Sequence[Request]) -> None:
        longest = max(len(r.prompt) + r.max_tokens for r in requests)
        if longest > self.llm.max_model_len:
            raise ValueError(
                f"a request has {longest} tokens with its output, the context holds "
                f"{self.llm.max_model_len}: give shorter ones or a larger --max-model-len"
            )


def _slow_side(speeds: Sequence[float]) -> dict[str, float]:
    from minigen.measure import PERCENTILES, percentile

    return {f"p{q}": percentile(speeds, 100 - q) for q in PERCENTILES}


# --- start ---------------------------------------------------------------------------------------


def run_process(arguments: Sequence[str], cache: Path) -> dict[str, Any]:
    """`python -m minigen bench ARGUMENTS` with its compile caches in `cache` -> its document.

    Raises ValueError with the process's own sentence where it refuses, RuntimeError where it fails.
    """
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
    }
    done = subprocess.run(
        [sys.executable, "-m", "minigen", "bench", *arguments],
        env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        what = lines[-1].removeprefix("minigen: ")
        kind = ValueError if done.returncode == cli.EXIT_USAGE else RuntimeError
        raise kind(f"`minigen bench {' '.join(arguments)}` failed: {what}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def model_arguments(args: argparse.Namespace) -> list[str]:
    """The options of the model and engine, for another process."""
    names = (
        "model", "config", "shape", "seed", "dtype", "device", "compile", "max_model_len",
        "max_num_seqs", "max_num_batched_tokens", "num_cache_blocks", "gpu_memory_utilization",
    )  # fmt: skip
    arguments = []
    for name in names:
        value = getattr(args, name, None)
        if value is not None:
            arguments += ["--" + name.replace("_", "-"), str(value)]
    return arguments + ["--enable-prefix-caching"] * getattr(args, "enable_prefix_caching", False)


def _run_start(args: argparse.Namespace) -> int:
    """A first process with empty compile caches, and a second one with what the first has left."""
    found = {}
    with tempfile.TemporaryDirectory() as folder, bar(2, "Starts", "process") as shown:
        for name in ("cold", "warm"):
            found[name] = run_process([*SHORTEST, *model_arguments(args)], Path(folder))
            shown.update()
    parts = list(found["warm"]["start_parts_s"])
    rows = [
        [name, run["start_s"], *run["start_parts_s"].values(), run["start"]]
        for name, run in found.items()
    ]
    print(table(["start", "seconds to the first token", *parts, "compile cache"], rows))
    shared = ("model", "parameters", "device", "torch", "python", "dtype", "compile")
    document = {
        "command": "bench",
        "workload": "start",
        **{key: found["warm"][key] for key in shared},
        "compile_status": found["warm"]["compile_status"],
        "cold_s": found["cold"]["start_s"],
        "warm_s": found["warm"]["start_s"],
        "warm_start": found["warm"]["start"],
        "cold_parts_s": found["cold"]["start_parts_s"],
        "warm_parts_s": found["warm"]["start_parts_s"],
    }
    print_document(document)
    return cli.EXIT_OK


# --- the rival -----------------------------------------------------------------------------------


def _rival(
    args: argparse.Namespace,
    config: dict[str, Any] | None,
    device: "torch.device",
    dtype: "torch.dtype",
) -> dict[str, Any]:
    """The same requests through transformers' generate, padded on the left to the longest."""
    try:
        import transformers
    except ImportError:
        raise ValueError(
            "--rival transformers is not installed: pip install transformers"
        ) from None
    import gc

    import torch

    torch.compiler.reset()  # what is compiled holds on to minigen's weights and cache
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    transformers.logging.set_verbosity_error()
    if config is None:
        from minigen.weights.hub import resolve_model

        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            resolve_model(args.model), dtype=dtype
        )
    else:
        shape = {k: v for k, v in config.items() if k not in ("model_type", "dtype", "torch_dtype")}
        made = transformers.AutoConfig.for_model(config["model_type"], **shape)
        model = transformers.AutoModelForCausalLM.from_config(made, dtype=dtype)
    generate = _Padded(model.eval().to(device), device)
    vocab_size = model.config.vocab_size
    rows = []
    if args.workload == "nano":
        requests = workloads.nano(args.num_prompts or workloads.NANO_REQUESTS, vocab_size)
        generate([Request(r.prompt, 2) for r in requests[:2]], NANO_TEMPERATURE)
        start = time.perf_counter()
        with bar(len(requests), "transformers, nano", "request") as shown:
            for at in range(0, len(requests), args.rival_batch_size):
                batch = requests[at : at + args.rival_batch_size]
                generate(batch, NANO_TEMPERATURE)
                shown.update(len(batch))
        seconds = time.perf_counter() - start
        tokens = sum(r.max_tokens for r in requests)
        rows.append(
            {"requests": len(requests), "seconds": seconds, "output_tokens_s": tokens / seconds}
        )
    else:
        with bar(len(args.batch_size), "transformers, fixed", "batch") as shown:
            for batch in args.batch_size:
                requests = workloads.fixed(
                    batch, args.input_len, args.output_len, vocab_size, args.seed
                )
                rows.append({"batch": batch, **_rival_decode(generate, requests)})
                shown.update()
    return {"name": "transformers", "version": transformers.__version__, "rows": rows}


class _Padded:
    """`model.generate` for requests, every row as long as the longest and for as many tokens."""

    def __init__(self, model: Any, device: "torch.device") -> None:
        self.model, self.device = model, device

    def __call__(self, requests: Sequence[Request], temperature: float) -> float:
        """Runs them -> seconds, the device waited for."""
        import torch

        from minigen.measure import synchronize

        longest = max(len(r.prompt) for r in requests)
        count = max(r.max_tokens for r in requests)
        gaps = [longest - len(r.prompt) for r in requests]
        ids = [[0] * gap + r.prompt for gap, r in zip(gaps, requests, strict=True)]
        mask = [[0] * gap + [1] * (longest - gap) for gap in gaps]
        draw = {"do_sample": True, "temperature": temperature} if temperature else {}
        start = time.perf_counter()
        with torch.inference_mode():
            self.model.generate(
                torch.tensor(ids, device=self.device),
                attention_mask=torch.tensor(mask, device=self.device),
                max_new_tokens=count, min_new_tokens=count, pad_token_id=0,
                **({"do_sample": False} | draw),
            )  # fmt: skip
        synchronize(self.device)
        return time.perf_counter() - start


def _rival_decode(generate: _Padded, requests: Sequence[Request]) -> dict[str, float]:
    """The time of one new token is taken off the time of all: what is left is decoding."""
    generate([Request(r.prompt, 2) for r in requests], 0.0)
    first = generate([Request(r.prompt, 1) for r in requests], 0.0)
    whole = generate(requests, 0.0)
    tokens = sum(r.max_tokens - 1 for r in requests)
    return {
        "prefill_tokens_s": sum(len(r.prompt) for r in requests) / first,
        "decode_tokens_s": tokens / max(whole - first, 1e-9),
    }


# --- what a person reads -------------------------------------------------------------------------


def _print_summary(document: dict[str, Any]) -> None:
    gb = 1 / 1e9
    memory, limits = document["memory"], document["limits"]
    print(
        f"{document['model']}, {document['parameters']:,} parameters, {document['dtype']}, on "
        f"{document['device']}; torch {document['torch']}, compile {document['compile']} "
        f"({document['compile_status']})"
    )
    print(
        f"start {document['start_s']:.1f} s ({document['start']}), {document['compiled_graphs']} "
        f"graphs, {document['recompilations']} more while running; "
        + ", ".join(f"{part} {s:.1f} s" for part, s in document["start_parts_s"].items())
    )
    print(
        f"memory: weights {memory['weight_bytes'] * gb:.3g} GB, cache "
        f"{memory['cache_bytes'] * gb:.3g} GB, peak {memory['peak_bytes'] * gb:.3g} GB; measured "
        f"limits: copy {limits['copy_gb_s']:g} GB/s, read {limits['read_gb_s']:g} GB/s, matrix "
        f"product {limits['matmul_tflop_s']:g} TFLOP/s"
    )
    print()
    if document["workload"] == "fixed":
        print(_fixed_table(document))
    else:
        print(_requests_table(document))
    print()


def _fixed_table(document: dict[str, Any]) -> str:
    header = [
        "batch", "prefill tokens/s", "decode tokens/s", "step ms p50", "p99", "host ms p50", "p99",
        "wait ms p50", "GB/s", "share of limit",
    ]  # fmt: skip
    rows: list[list[Any]] = []
    for row in document["rows"]:
        rows.append(
            [
                str(row["batch"]), row["prefill_tokens_s"], row["decode_tokens_s"],
                row["step_ms"]["p50"], row["step_ms"]["p99"],
                row["host_ms"]["p50"], row["host_ms"]["p99"], row["wait_ms"]["p50"],
                row["gb_s"], f"{row['share_of_limit']:.1%}",
            ]
        )  # fmt: skip
    for row in document.get("rival", {}).get("rows", []):
        name = f"{row['batch']}, {document['rival']['name']}"
        rows.append([name, row["prefill_tokens_s"], row["decode_tokens_s"], *[None] * 7])
    return table(header, rows)


def _requests_table(document: dict[str, Any]) -> str:
    [row] = document["rows"]
    lines: list[list[Any]] = [
        ["requests", row["requests"]],
        ["seconds", row["seconds"]],
        ["prompt tokens", row["prompt_tokens"]],
        ["output tokens", row["output_tokens"]],
        ["output tokens/s", row["output_tokens_s"]],
        ["share of limit", f"{row['share_of_limit']:.1%}"],
    ]
    if document["workload"] == "trace":
        kept = ", ".join(f"{name} {limit:g} ms" for name, limit in row["goodput"].items())
        lines += [
            ["left out, longer than the context", row["left_out"]],
            ["requests/s", row["requests_s"]],
            [f"goodput, requests/s within {kept}", row["goodput_requests_s"]],
        ]
    if "rival" in document:
        [rival] = document["rival"]["rows"]
        lines.append([f"output tokens/s, {document['rival']['name']}", rival["output_tokens_s"]])
    names = {
        "step_ms": "step, ms",
        "prompt_step_ms": "a step with prompts, ms",
        "decode_step_ms": "a step without, ms",
        "host_ms": "host work a step, ms",
        "launch_ms": "calls of the step's functions, ms",
        "wait_ms": "waiting for the device, ms",
        "ttft_ms": "time to first token, ms",
        "itl_ms": "inter-token latency, ms",
        "tpot_ms": "time per output token, ms",
        "e2el_ms": "request, ms",
        "request_tokens_s": "output tokens/s of a request",
    }
    spread = [
        [name, *(row[key].get(f"p{q}") for q in (50, 90, 99))]
        for key, name in names.items()
        if key in row
    ]
    return table([], lines) + "\n\n" + table(["", "p50", "p90", "p99"], spread)
