"""`python -m minigen bench`: how fast a model's shape runs on this machine, and how near its limit.

Weights are random unless a checkpoint is given: speed does not depend on them. This file owns the
run and what it prints, a summary for people and the JSON document.
"""

import argparse
import time
from typing import TYPE_CHECKING, Any

from minigen import cli, workloads
from minigen.bench_options import decoder_config, model_config, model_dtype, read_goodput
from minigen.bench_start import run_start
from minigen.report import print_document, table
from minigen.weights.hub import resolve_model
from minigen.workloads import Request

if TYPE_CHECKING:
    from minigen.llm import LLM


def run(args: argparse.Namespace) -> int:
    """Measure what the options say and print it. Returns the exit code; raises ValueError."""
    config = model_config(args)
    goodput = read_goodput(args.goodput)
    rows = _trace_rows(args)
    if args.rival and args.workload not in ("nano", "fixed"):
        raise ValueError(f"--rival runs nano and fixed, not {args.workload}")
    if args.workload == "start":
        return run_start(args)
    if args.workload == "fixed" and args.max_num_seqs is not None:
        most = max(args.batch_size)
        if most > args.max_num_seqs:
            raise ValueError(f"--batch-size {most} is more than --max-num-seqs {args.max_num_seqs}")
    least = _least_context(args, rows)
    start = time.perf_counter()
    # Refused before the seconds that torch takes.
    if args.max_model_len is not None:
        _check_context(args, least, args.max_model_len)
    if args.model is not None:
        resolve_model(args.model)
    import torch

    from minigen.bench_workloads import Bench, serve
    from minigen.llm import device_of
    from minigen.measure import (
        Compilations,
        Cost,
        environment,
        measure_limits,
        peak_memory,
        reset_peak_memory,
    )

    device = device_of(args.device)
    torch.zeros(1, device=device)  # a GPU's context belongs to the start
    imported = time.perf_counter() - start
    dtype = model_dtype(args, config)
    made_for = decoder_config(args, config).max_position_embeddings
    _check_context(args, least, args.max_model_len or made_for)
    limits = measure_limits(device, dtype)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    reset_peak_memory(device)  # the measurement's own tensors are no part of it

    start = time.perf_counter()
    llm = load(args, config)
    _check_context(args, least, llm.max_model_len)  # the cache may hold less
    serve(llm, [Request([1] * 8, 2)], 0.0)
    start_s = imported + time.perf_counter() - start
    parts = {"import": imported, **llm.start_seconds}
    parts["first step"] = start_s - sum(parts.values())
    started = Compilations.so_far()

    runner = llm.engine.runner
    cost = Cost.of(runner.model)
    bench = Bench(args, llm, cost, limits)
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
        from minigen.bench_rival import run_rival

        del llm, runner, bench
        document["rival"] = run_rival(args, config, device, dtype)
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


def _least_context(args: argparse.Namespace, rows: list[workloads.TraceRow] | None) -> int:
    """Tokens that the context must hold: the longest request with its output, of a trace, which
    leaves out what does not fit, the shortest."""
    if rows is not None:
        return min(row.prompt_tokens + row.output_tokens for row in rows[: args.num_prompts])
    if args.workload == "fixed":
        return args.input_len + args.output_len
    requests = workloads.nano(args.num_prompts or workloads.NANO_REQUESTS, vocab_size=1)
    return max(len(request.prompt) + request.max_tokens for request in requests)


def _check_context(args: argparse.Namespace, least: int, context: int) -> None:
    """Raises ValueError for a context of fewer tokens than `least`."""
    if least <= context:
        return
    if args.workload == "trace":
        raise ValueError(
            f"no request of {args.dataset_path} fits into the context of {context} tokens: give a "
            "larger --max-model-len"
        )
    raise ValueError(
        f"a request has {least} tokens with its output, the context holds {context}: give shorter "
        "ones or a larger --max-model-len"
    )


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
