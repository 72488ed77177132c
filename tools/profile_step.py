"""`python -m tools.profile_step`: what the time of a step goes to, on the device and on the host.

For each batch size: the device's kernels of a decode step by name (torch.profiler), the share of
the step in which the device does nothing, and the host's functions (cProfile). Then the same for a
step of prompts, which no graph replays, and for the start. Tables in full go to --output; the last
line is one JSON document. Profiling slows the host down: times of a step are taken without it.
"""

import argparse
import cProfile
import io
import json
import pstats
import re
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from minigen import LLM, SamplingParams, cli
from minigen.measure import device_name, synchronize
from minigen.report import bar, number, table
from tools.common import model_config, parser, run, tokens_of

STEPS = 20  # that are profiled; as many are timed
NAME_LENGTH = 60  # of a kernel, in the tables that are printed


def kernels_of(steps: Callable[[], None], count: int) -> list[dict[str, Any]]:
    """Device time a step by kernel, the longest first: {"name", "count", "us"}; no GPU, no rows."""
    if not torch.cuda.is_available():
        steps()
        return []
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        steps()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for event in profiled.events() or ():
        if event.device_type.name == "CUDA":
            found[event.name][0] += 1
            found[event.name][1] += event.time_range.elapsed_us()
    rows = [
        {"name": name, "count": round(times / count, 2), "us": round(us / count, 2)}
        for name, (times, us) in found.items()
    ]
    return sorted(rows, key=lambda row: -row["us"])


def functions_of(steps: Callable[[], None], count: int) -> list[dict[str, Any]]:
    """The host's time by function, the longest first: {"name", "count", "us", "with_calls_us"}."""
    profiler = cProfile.Profile()
    profiler.runcall(steps)
    stats = pstats.Stats(profiler, stream=io.StringIO()).stats  # pyright: ignore[reportAttributeAccessIssue]
    rows = []
    for (file, line, name), (_, calls, own, whole, _) in stats.items():
        where = name if file == "~" else f"{'/'.join(Path(file).parts[-2:])}:{line} {name}"
        rows.append(
            {
                "name": where,
                "count": round(calls / count, 2),
                "us": round(1e6 * own / count, 1),
                "with_calls_us": round(1e6 * whole / count, 1),
            }
        )
    return sorted(rows, key=lambda row: -row["us"])


def short(name: str) -> str:
    """A kernel's name without what C++ wraps around it."""
    name = re.sub(r"^(void |at::native::|cutlass::|\(anonymous namespace\)::)+", "", name)
    return name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 1] + "…"


def profile_steps(
    llm: LLM,
    prompts: list[list[int]],
    temperature: float,
    max_tokens: int,
    skip: int,
    ran: Callable[[int], object],
) -> dict[str, Any]:
    """Profiles `STEPS` steps of the engine, after `skip` steps of the same requests.

    `ran` hears, outside of what is timed or profiled, of 3 * (skip + STEPS) steps in all.
    """
    device = llm.device

    def begin() -> None:
        params = SamplingParams(
            temperature=temperature, max_tokens=max_tokens, ignore_eos=True, seed=0
        )
        for i, prompt in enumerate(prompts):
            llm.engine.add_request(f"profile-{i}", prompt, params)
        for _ in range(skip):
            llm.engine.step()
            ran(1)
        synchronize(device)

    def steps() -> None:
        for _ in range(STEPS):
            llm.engine.step()

    def end() -> None:
        for i in range(len(prompts)):
            try:
                llm.engine.abort(f"profile-{i}")
            except ValueError:
                continue  # it had finished
        while llm.engine.has_unfinished():
            llm.engine.step()
        synchronize(device)

    begin()
    spans, launched = [], []
    for _ in range(STEPS):
        start, before = time.perf_counter(), llm.engine.stats.launch_seconds
        llm.engine.step()
        spans.append(time.perf_counter() - start)
        launched.append(llm.engine.stats.launch_seconds - before)
    synchronize(device)
    ran(STEPS)
    end()
    begin()
    kernels = kernels_of(steps, STEPS)
    ran(STEPS)
    end()
    begin()
    functions = functions_of(steps, STEPS)
    ran(STEPS)
    end()
    return {
        "step_us": round(1e6 * median(spans), 1),
        "launch_us": round(1e6 * median(launched), 1),
        "device_us": round(sum(row["us"] for row in kernels), 1),
        "num_kernels": round(sum(row["count"] for row in kernels)),
        "kernels": kernels,
        "functions": functions,
    }


def report(title: str, found: dict[str, Any], rows: int) -> str:
    """The first rows of both tables, under what they add up to."""
    lines = [
        f"{title}: step {number(found['step_us'])} µs, of it calls of the step's functions "
        f"{number(found['launch_us'])} µs; device busy {number(found['device_us'])} µs in "
        f"{found['num_kernels']} kernels"
    ]
    if found["kernels"]:
        kernels = [[short(r["name"]), r["count"], number(r["us"])] for r in found["kernels"][:rows]]
        lines.append(table(["kernel", "times", "µs a step"], kernels))
    functions = [
        [short(r["name"]), r["count"], number(r["us"]), number(r["with_calls_us"])]
        for r in found["functions"][:rows]
    ]
    lines.append(table(["function", "times", "µs a step", "with its calls"], functions))
    return "\n".join(lines) + "\n"


def main(args: argparse.Namespace) -> None:
    config = model_config(args, "qwen3-0.6b")
    most = max(args.batch_size)
    found: dict[str, Any] = {}
    made: list[LLM] = []

    def load() -> None:
        made.append(
            cli.load_llm(
                args,
                config=config,
                max_num_seqs=max(most, 2),
                max_num_batched_tokens=max(args.prompt_tokens, most, 64),
                num_cache_blocks=args.num_cache_blocks,
                enable_prefix_caching=False,
                **({} if config is None else {"weights_seed": args.seed}),
            )
        )

    start = time.perf_counter()
    functions = functions_of(load, 1)
    llm = made[0]
    took = time.perf_counter() - start
    print(f"start, profiled: {took:.1f} s; compile {llm.compile_status}", flush=True)
    found["start"] = {"functions": sorted(functions, key=lambda row: -row["with_calls_us"])}
    own = [r for r in found["start"]["functions"] if r["name"].startswith(("minigen/", "kernels/"))]
    rows = [
        [short(r["name"]), r["count"], number(r["with_calls_us"] / 1e6)] for r in own[: args.rows]
    ]
    print(table(["function", "times", "s with its calls"], rows), end="\n\n", flush=True)

    def take(name: str, title: str, lengths: list[int], max_tokens: int, skip: int) -> None:
        prompts = tokens_of(lengths, llm.config.vocab_size, args.seed)
        # Its thread could be profiled with the rest: Python 3.12 does so.
        with bar(3 * (skip + STEPS), title, "step", ticks=False) as shown:
            found[name] = profile_steps(
                llm, prompts, args.temperature, max_tokens, skip, shown.update
            )
        print(report(title, found[name], args.rows), flush=True)

    for batch in args.batch_size:
        prefills = -(-args.input_len * batch // max(args.prompt_tokens, most, 64))
        lengths, skip = [args.input_len] * batch, prefills + 5
        take(f"decode {batch}", f"decode, batch {batch}", lengths, skip + STEPS + 15, skip)
    # Each step takes one whole prompt that fills the budget, beside those that decode already.
    lengths = [args.prompt_tokens] * (STEPS + 1)
    take("prompts", f"prompts, {args.prompt_tokens} tokens", lengths, 1, 1)
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "profile.json").write_text(json.dumps(found, indent=1) + "\n")
    keys = ("step_us", "launch_us", "device_us", "num_kernels")
    print(
        json.dumps(
            {
                "device": device_name(llm.device),
                "torch": torch.__version__,
                "shape": args.shape or args.config or args.model,
                "compile_status": llm.compile_status,
                **{k: {key: v[key] for key in keys} for k, v in found.items() if k != "start"},
            }
        )
    )


def options() -> argparse.ArgumentParser:
    made = parser("tools.profile_step", __doc__)
    made.add_argument(
        "--batch-size", type=cli.positive, nargs="+", default=[1, 32, 256], metavar="N"
    )
    made.add_argument(
        "--input-len", type=cli.positive, default=128, metavar="N", help="of decode's prompts"
    )
    made.add_argument(
        "--prompt-tokens", type=cli.positive, default=2048, metavar="N", help="prompts' step"
    )
    made.add_argument("--temperature", type=float, default=0.0, metavar="T")
    made.add_argument("--num-cache-blocks", type=cli.positive, metavar="N")
    made.add_argument("--max-model-len", type=cli.positive, metavar="N")
    made.add_argument("--compile", default="default", metavar="MODE")
    made.add_argument(
        "--rows", type=cli.positive, default=15, metavar="N", help="of each table printed"
    )
    made.add_argument("--output", type=Path, metavar="DIR", help="for profile.json, all rows")
    return made


if __name__ == "__main__":
    run(options(), main)
