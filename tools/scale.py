"""`python -m tools.scale`: what a token costs as batch and context grow, and what stays constant.

Measured through the engine on random weights: decode steps of batches of equal prompts, then of
single sequences with long contexts, beside the time that the machine's bandwidth allows for the
weights and the cache that a step reads. Checked: the cache's memory is what its number of blocks
says, requests hold the blocks that their lengths need and give all back, and a queue of waiting
requests does not slow a step. The last line is one JSON document.
"""

import argparse
import gc
import time
from collections.abc import Sequence
from typing import Any

from minigen import LLM
from minigen.bench_options import model_dtype
from minigen.cli import load_llm, positive
from minigen.llm import device_of
from minigen.measure import (
    Cost,
    Limits,
    Step,
    StepMeter,
    current_memory,
    environment,
    measure_limits,
    percentiles,
    step_report,
)
from minigen.outputs import RequestOutput
from minigen.report import bar, print_document, table
from minigen.sampling_params import SamplingParams
from minigen.start import free_engines, pause_collection
from tools.common import Plot, model_config, parser, run, tokens_of

CPU_BATCHES, GPU_BATCHES = (1, 2, 4, 8, 16, 32), (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
CPU_CONTEXTS = (256, 512, 1024, 2048, 4096)
GPU_CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
RUNNING = 8  # beside the queue


def room_for(llm: LLM, prompts: Sequence[list[int]], num_steps: int) -> int:
    """Tokens that follow each prompt until `num_steps` steps have run with all of them decoding.

    Raises ValueError where context or cache have no room for them.
    """
    pool, budget = llm.engine.scheduler.pool, llm.engine.scheduler.budget
    # The first ones decode while the others' prompts are computed, and take of the budget.
    spare = max(1, budget - len(prompts) + 1)
    more = -(-sum(map(len, prompts[1:])) // spare) + 2 + num_steps
    longest = max(map(len, prompts)) + more
    if longest > llm.max_model_len:
        raise ValueError(
            f"a prompt and what follows it make {longest} tokens, the context holds "
            f"{llm.max_model_len}: give less of --input-len or --num-steps"
        )
    blocks = sum(pool.blocks_for(len(prompt) + more) for prompt in prompts)
    if blocks > pool.num_blocks:
        raise ValueError(
            f"{len(prompts)} sequences of {longest} tokens need {blocks} cache blocks, there are "
            f"{pool.num_blocks}: give smaller sizes or more --num-cache-blocks"
        )
    return more


def decode_steps(
    llm: LLM, prompts: Sequence[list[int]], num_steps: int
) -> tuple[list[Step], list[int]]:
    """Steps in which all prompts decode -> (steps, keys that the first of them reads of each)."""
    engine = llm.engine
    more = room_for(llm, prompts, num_steps)
    for i, prompt in enumerate(prompts):
        params = SamplingParams(temperature=0.0, max_tokens=more, ignore_eos=True)
        engine.add_request(f"r{i}", prompt, params)
    meter = StepMeter(engine)
    outputs: dict[str, RequestOutput] = {}
    while len(outputs) < len(prompts):
        outputs |= {output.request_id: output for output in meter.step()}
    begin = len(meter.steps)
    keys = [len(o.prompt_token_ids) + len(o.outputs[0].token_ids) for o in outputs.values()]
    for _ in range(num_steps):
        meter.step()
    for i in range(len(prompts)):
        engine.abort(f"r{i}")
    engine.step()  # takes in what may still be under way
    return meter.steps[begin:], keys


def measure(
    llm: LLM,
    prompts: Sequence[list[int]],
    context: int,
    num_steps: int,
    cost: Cost,
    limits: Limits,
) -> dict[str, Any]:
    """A row: microseconds a token, and the least that the bandwidth allows."""
    decode_steps(llm, [prompt[:32] for prompt in prompts], 2)
    steps, keys = decode_steps(llm, prompts, num_steps)
    cache = sum(cost.decode_bytes(first, first + len(steps)) for first in keys)
    report = step_report(steps, cost, limits, cache)
    bytes_read = cost.weight_bytes + cache / len(steps)
    return {
        "batch": len(prompts),
        "context": context,
        "us_per_token": report["step_ms"]["p50"] * 1e3 / len(prompts),
        "limit_us_per_token": bytes_read / limits.bytes_s * 1e6 / len(prompts),
        **report,
    }


def check_cache_memory(llm: LLM, cost: Cost, before: int, after: int) -> dict[str, Any]:
    """The cache's bytes as its blocks say and as its tensors are; on a GPU, as was allocated.

    Raises ValueError where they differ.
    """
    runner = llm.engine.runner
    expected = runner.num_blocks * cost.block_bytes(runner.block_size)
    found = sum(t.untyped_storage().nbytes() for pair in runner.caches for t in pair)
    result = {"blocks": runner.num_blocks, "expected_bytes": expected, "bytes": found}
    if found != expected:
        raise ValueError(f"the cache takes {found} bytes, its blocks say {expected}")
    if llm.device.type == "cuda":
        weights = sum(p.nbytes for p in runner.model.parameters())
        result["allocated_besides_weights"] = after - before - weights
    return result


def check_blocks(llm: LLM, prompts: Sequence[list[int]]) -> dict[str, int]:
    """Blocks held in each step against what the running sequences' lengths need; none at the end.

    Raises ValueError where they differ.
    """
    engine, pool = llm.engine, llm.engine.scheduler.pool
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    for i, prompt in enumerate(prompts):
        engine.add_request(f"b{i}", prompt, params)
    steps, most_held = 0, 0
    while engine.has_unfinished():
        engine.step()
        steps += 1
        running = engine.scheduler.running
        needed = sum(pool.blocks_for(sequence.num_computed) for sequence in running)
        # A prompt's blocks are taken with its first chunk.
        most = sum(pool.blocks_for(sequence.length) for sequence in running)
        if not needed <= pool.num_used <= most:
            raise ValueError(
                f"the sequences of step {steps} need {needed} to {most} blocks and hold "
                f"{pool.num_used}"
            )
        most_held = max(most_held, pool.num_used)
    if pool.num_used:
        raise ValueError(f"{pool.num_used} blocks are held when every request has ended")
    return {"steps": steps, "most_held": most_held, "left_at_end": pool.num_used}


class Collections:
    """The longest pause of Python's garbage collector while active: it may hit any step."""

    def __init__(self) -> None:
        self.longest_s = 0.0

    def __enter__(self) -> "Collections":
        gc.callbacks.append(self._see)
        return self

    def __exit__(self, *exc: object) -> None:
        gc.callbacks.remove(self._see)

    def _see(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._start = time.perf_counter()
        else:
            self.longest_s = max(self.longest_s, time.perf_counter() - self._start)


def measure_queue(llm: LLM, waiting: int, num_steps: int, seed: int) -> dict[str, Any]:
    """Host time of decode steps with `waiting` requests in the queue, and of adding those."""
    engine = llm.engine
    prompts = tokens_of([16] * RUNNING, llm.config.vocab_size, seed)
    params = SamplingParams(temperature=0.0, max_tokens=num_steps + 8, ignore_eos=True)
    for i, prompt in enumerate(prompts):
        engine.add_request(f"q{i}", prompt, params)
    started: set[str] = set()
    while len(started) < RUNNING:
        started |= {output.request_id for output in engine.step()}
    with Collections() as collections:
        start = time.perf_counter()
        for i in range(waiting):
            engine.add_request(f"w{i}", prompts[0], params)
        added = time.perf_counter() - start
        meter = StepMeter(engine)
        for _ in range(num_steps):
            meter.step()
    assert engine.stats.num_running == RUNNING, "the queue was to wait"
    for i in range(RUNNING, 0, -1):
        engine.abort(f"q{i - 1}")
    start = time.perf_counter()
    for i in range(waiting):
        engine.abort(f"w{i}")
    aborted = time.perf_counter() - start
    return {
        "waiting": waiting,
        "host_ms": percentiles([step.host_seconds for step in meter.steps], 1e3),
        "step_ms": percentiles([step.seconds for step in meter.steps], 1e3),
        "add_us": added / waiting * 1e6 if waiting else 0.0,
        "longest_gc_ms": collections.longest_s * 1e3,
        "abort_us": aborted / waiting * 1e6 if waiting else 0.0,
    }


def main(args: argparse.Namespace) -> None:
    config = model_config(args, "tiny")
    device = device_of(args.device)
    cuda = device.type == "cuda"
    batches = args.batch_size or (GPU_BATCHES if cuda else CPU_BATCHES)
    contexts = args.context or (GPU_CONTEXTS if cuda else CPU_CONTEXTS)
    plot = Plot(args, 2)
    limits = measure_limits(device, model_dtype(args, config))
    before = current_memory(device)
    llm = _load(args, config, max_num_seqs=max(*batches, 8))
    cost = Cost.of(llm.engine.runner.model)
    memory = check_cache_memory(llm, cost, before, current_memory(device))
    vocab_size = llm.config.vocab_size
    fitting = [c for c in contexts if c <= llm.max_model_len]
    left_out = [c for c in contexts if c > llm.max_model_len]
    shortest = args.num_steps + 3
    if fitting and min(fitting) <= shortest:
        raise ValueError(f"--context {min(fitting)} is too short to time {args.num_steps} steps")
    # A context is what it has grown to at the last step.
    sizes = [(b, args.input_len, args.input_len + shortest) for b in batches]
    sizes += [(1, context - shortest, context) for context in fitting]
    rows = []
    with bar(len(sizes) + 2, "Sizes", "run") as shown:
        blocks = check_blocks(llm, tokens_of([1, 15, 16, 17, 33], vocab_size, args.seed))
        for batch, length, context in sizes:
            prompts = tokens_of([length] * batch, vocab_size, args.seed)
            rows.append(measure(llm, prompts, context, args.num_steps, cost, limits))
            shown.update()
            print(
                f"batch {batch}, context {context}: {rows[-1]['us_per_token']:.1f} µs a token",
                flush=True,
            )
        del llm
        free_engines(device)
        small = _load(args, config, max_num_seqs=RUNNING, num_cache_blocks=256)
        measure_queue(small, 0, 8, args.seed)
        queues = []
        for waiting in (0, args.waiting):
            queues.append(measure_queue(small, waiting, 4 * args.num_steps, args.seed))
            shown.update()
    by_batch, by_context = rows[: len(batches)], rows[len(batches) :]
    _print(by_batch, by_context, left_out, memory, blocks, queues)
    title = f"{args.shape or args.config or args.model}, {environment(device)['device']}"
    _draw(plot, by_batch, by_context, title)
    print_document(
        {
            "command": "scale",
            "model": args.shape or args.config or args.model,
            **environment(device),
            "dtype": str(small.dtype).removeprefix("torch."),
            "compile": args.compile,
            "compile_status": small.compile_status,
            "limits": limits.as_dict(),
            "cache": memory,
            "blocks": blocks,
            "by_batch": by_batch,
            "by_context": by_context,
            "contexts_left_out": left_out,
            "queue": queues,
            "plot": plot.path,
        }
    )


def _load(args: argparse.Namespace, config: dict[str, Any] | None, **options: Any) -> LLM:
    options = {"num_cache_blocks": args.num_cache_blocks} | options
    seqs = options["max_num_seqs"]
    pause_collection()  # until it is loaded, as in the commands that serve
    return load_llm(
        args,
        config=config,
        max_num_batched_tokens=max(2048, 4 * seqs),  # so that prompts come in beside the decodes
        enable_prefix_caching=False,
        seed=args.seed,
        **options,
    )


def _print(
    by_batch: list[dict[str, Any]],
    by_context: list[dict[str, Any]],
    left_out: list[int],
    memory: dict[str, Any],
    blocks: dict[str, int],
    queues: list[dict[str, Any]],
) -> None:
    header = ["batch", "context", "µs a token", "limit", "step ms p50", "p99", "host ms", "GB/s"]
    print(
        table(
            header,
            [
                [
                    str(r["batch"]), r["context"], r["us_per_token"], r["limit_us_per_token"],
                    r["step_ms"]["p50"], r["step_ms"]["p99"], r["host_ms"]["p50"], r["gb_s"],
                ]
                for r in by_batch + by_context
            ],
        )
    )  # fmt: skip
    if left_out:
        print(f"left out, longer than the model's context: {', '.join(map(str, left_out))}")
    print(f"\ncache: {memory['blocks']:,} blocks, {memory['bytes']:,} bytes, exactly as they say")
    print(
        f"blocks: in {blocks['steps']} steps of five short sequences never more or less than their "
        f"lengths need, at most {blocks['most_held']}\n"
    )
    header = [
        "waiting", "host ms p50", "p99", "step ms p50", "p99", "µs to add", "µs to abort",
        "longest gc ms",
    ]  # fmt: skip
    print(
        table(
            header,
            [
                [
                    f"{q['waiting']:,}", q["host_ms"]["p50"], q["host_ms"]["p99"],
                    q["step_ms"]["p50"], q["step_ms"]["p99"], q["add_us"], q["abort_us"],
                    q["longest_gc_ms"],
                ]
                for q in queues
            ],
        )
    )  # fmt: skip


def _draw(
    plot: Plot, by_batch: list[dict[str, Any]], by_context: list[dict[str, Any]], title: str
) -> None:
    if not plot.axes:
        return
    for axis, name, rows in zip(
        plot.axes, ("batch", "context"), (by_batch, by_context), strict=True
    ):
        at = [row[name] for row in rows]
        axis.plot(at, [row["us_per_token"] for row in rows], "o-", label="measured")
        limit = [row["limit_us_per_token"] for row in rows]
        axis.plot(at, limit, "--", label="weights and cache at full bandwidth")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel(name + (", sequences" if name == "batch" else ", tokens"))
        axis.set_ylabel("µs a token")
        axis.legend()
    plot.save(title)


def options() -> argparse.ArgumentParser:
    made = parser("tools.scale", __doc__, "scale.png")
    made.add_argument(
        "--compile",
        default="default",
        choices=["eager", "default", "reduce-overhead", "max-autotune"],
    )
    made.add_argument("--max-model-len", type=positive, metavar="N")
    made.add_argument("--num-cache-blocks", type=positive, metavar="N")
    made.add_argument(
        "--batch-size", type=positive, nargs="+", metavar="N",
        help="1 to 32 on a CPU, 1 to 512 on a GPU by default",
    )  # fmt: skip
    made.add_argument("--input-len", type=positive, default=128, metavar="N", help="of a batch")
    made.add_argument(
        "--context", type=positive, nargs="+", metavar="N",
        help="256 to 4,096 on a CPU, 1,024 to 131,072 on a GPU by default",
    )  # fmt: skip
    made.add_argument("--num-steps", type=positive, default=32, metavar="N", help="timed; 32")
    made.add_argument("--waiting", type=positive, default=10_000, metavar="N", help="10,000")
    return made


if __name__ == "__main__":
    run(options(), main)
