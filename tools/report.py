"""`python -m tools.report --output DIR`: every check and benchmark of this machine, one by one.

Each step is a command of its own, whose output goes to DIR/NAME.log and whose last line of JSON, if
it ends with one, to DIR/report.json, which is rewritten after every step. A step that outlasts its
limit, nine minutes at most, is ended, one that fails is reported, and the others go on. With
--budget no step is begun for which no time is left: --only runs those later. The steps that compare
torch.compile's modes share DIR/modes.json, so that the last of them shows all modes in one table.

The lengths `trace` of the batching steps and the step `trace` need a recorded trace of requests:
--trace FILE, or azure_llm_conv.csv(.xz) found in `traces` of the directory that MINIGEN_SHARED
names (else ../shared). Without one they are left out, and the report says so. The last line is one
JSON document.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minigen import cli
from tools import common

# Less than this is no time to begin anything in.
LEAST_SECONDS = 15.0
# A step ends before a command that may take ten minutes does.
MOST_SECONDS = 540.0
ROOT = Path(__file__).resolve().parent.parent
NO_TRACE = (
    "left out, as there is no trace: the step trace and the lengths of a trace; give --trace FILE, "
    "a CSV as azure_llm_conv"
)


@dataclass(frozen=True)
class Step:
    """A command as `python -m` takes it, and the seconds after which it is ended."""

    name: str
    command: tuple[str, ...]
    limit: float


def find_trace() -> Path | None:
    """The recorded trace among the shared material, if it is there."""
    shared = Path(os.environ.get("MINIGEN_SHARED", ROOT.parent / "shared"))
    files = [shared / "traces" / f"azure_llm_conv.csv{end}" for end in ("", ".xz")]
    return next((file for file in files if file.is_file()), None)


def steps(gpu: bool, shape: str, output: Path, trace: Path | None = None) -> list[Step]:
    """What there is to run, the checks first."""
    bench = ("minigen", "bench")
    on = ("--shape", shape)

    def plot(name: str) -> tuple[str, str]:
        return "--plot", str(output / f"{name}.png")

    # Ten cold and warm starts of every mode together would outlast what a step may take: all steps
    # add to one file, and the last one's table and plot have all modes.
    modes = ("tools.compare_compile_modes", *on, "--results", str(output / "modes.json"))
    modes_steps = [
        Step(name, (*modes, *plot("modes"), "--modes", *some), MOST_SECONDS)
        for name, some in (
            ("modes", ("eager", "default", "minigen")),
            ("reduce-overhead", ("reduce-overhead",)),
            ("max-autotune", ("max-autotune",)),
        )
    ]
    traced = () if trace is None else ("--trace", str(trace))
    ways = ("tools.compare_batching", *on, *traced)
    # As many tokens as a training step has, in micro-batches that padding leaves room for.
    rows = ("--tokens", "32768", "--max-rows", "32768") if gpu else ()
    batching = [
        Step("batching", (*ways, "--phases", "prefill", "decode", *plot("batching")), MOST_SECONDS),
        Step(
            "batching-forward",
            (*ways, "--phases", "train-forward", *rows, *plot("batching-forward")),
            MOST_SECONDS,
        ),
    ]

    def replay(num_requests: str, rate: str) -> list[Step]:
        """The trace's first requests, arriving `rate` times faster than recorded."""
        if trace is None:
            return []
        command = (*bench, "trace", *on, "--dataset-path", str(trace))
        return [Step("trace", (*command, "--num-prompts", num_requests, "--rate", rate), 300)]

    if not gpu:
        return [
            Step("fixed", (*bench, "fixed", *on, "--batch-size", "1", "16"), 300),
            Step("start", (*bench, "start", *on), 300),
            Step("decode", ("tools.bench_decode", *on), 300),
            *replay("24", "0.2"),  # 24 requests in 72 s
            *modes_steps,
            *batching,
            Step("logprobs", ("tools.compare_logprobs", "--shape", "tiny"), 300),
            Step("scale", ("tools.scale", *on, *plot("scale")), MOST_SECONDS),
        ]
    attention = ("tools.bench_attention", "--what", "all", "--seconds", "60")
    train_step = ("tools.compare_batching", "--shape", "llama-3.2-1b", "--phases", "train-step")
    train_step += ("--tokens", "32768", "--max-rows", "32768", "--lengths", "lognormal", "one-long")
    train_step += ("trace", *traced) if traced else ()
    processes = str(max(2, min(14, (os.cpu_count() or 8) - 2)))
    # Every test by its name, as it ends: a run that is cut off says how far it came.
    tests = ("pytest", "-m", "gpu", "-vv", "-rs", "--durations", "15", *pytest_plugins(processes))
    large = ("--shape", "llama-3.1-8b")
    # Its context holds 131,072 tokens, which most shapes' do not.
    long = ("--shape", "llama-3.2-1b")
    return [
        Step("tests", tests, 420),
        Step(
            "attention",
            (*attention, "--processes", processes, "--out", str(output / "attention.json")),
            400,
        ),
        Step("fixed", (*bench, "fixed", *on), 300),
        Step("nano", (*bench, "nano", *on), 240),
        *replay("2000", "10"),  # 47 requests a second for 42 s
        Step("start", (*bench, "start", *on), 300),
        Step("fixed-8b", (*bench, "fixed", *large, "--output-len", "96"), 300),
        Step("nano-8b", (*bench, "nano", *large), 240),
        *batching,
        Step("logprobs", ("tools.compare_logprobs", *on), 180),
        Step("train-step", (*train_step, *plot("train-step")), 420),
        Step("scale", ("tools.scale", *long, *plot("scale")), MOST_SECONDS),
        *modes_steps,
    ]


def pytest_plugins(processes: str) -> list[str]:
    """What makes the tests quick, and ends one that hangs, by the plugins that are installed.

    The tests wait for compilers, mostly: several processes share the GPU well. A test that waits
    for the GPU hears no signal, so the process ends, which pytest-xdist replaces.
    """
    options = []
    if importlib.util.find_spec("xdist"):
        # File by file, one process had 200 s of one file's tests to run when all others were done.
        options += ["-n", processes, "--dist", "worksteal"]
        if importlib.util.find_spec("pytest_timeout"):
            options += ["--timeout", "240", "--timeout-method", "thread"]
    return options


def run_step(step: Step, log: Path, limit: float) -> dict[str, Any]:
    """Runs a step with its output in `log`: {"name", "result", "seconds", "json"}.

    The result is "ok", "failed (exit code N)" or "ended after N s". A step's own processes end
    with it.
    """
    begin = time.monotonic()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", *step.command],
            stdout=stream,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
            result = "ok" if code == 0 else f"failed (exit code {code})"
        except subprocess.TimeoutExpired:
            result = f"ended after {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return {
        "name": step.name,
        "command": " ".join(("python -m", *step.command)),
        "result": result,
        "seconds": round(time.monotonic() - begin, 1),
        "json": last_json(log),
    }


@contextlib.contextmanager
def ended_by_exception() -> Iterator[None]:
    """Has SIGTERM, and a terminal that closes, raise SystemExit, so that the running step ends with
    the report, not later. What nohup has ignored stays ignored."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def last_json(log: Path) -> Any:
    """The JSON object that the last line is; None if it is none."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    try:
        value = json.loads(lines[-1]) if lines else None
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def run_all(planned: Sequence[Step], output: Path, budget: float) -> list[dict[str, Any]]:
    """Runs the steps within `budget` seconds, and keeps `report.json` up to date."""
    end, done = time.monotonic() + budget, []
    for step in planned:
        left = end - time.monotonic()
        if left < LEAST_SECONDS:
            done.append({"name": step.name, "result": "not begun", "seconds": 0.0, "json": None})
        else:
            print(f"{step.name}: python -m {' '.join(step.command)}", flush=True)
            done.append(run_step(step, output / f"{step.name}.log", min(step.limit, left)))
        print(f"{step.name}: {done[-1]['result']}, {done[-1]['seconds']} s", flush=True)
        (output / "report.json").write_text(json.dumps(done, indent=1) + "\n")
    return done


def parser() -> argparse.ArgumentParser:
    made = cli.Parser(
        prog="python -m tools.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--output", type=Path, required=True, metavar="DIR", help="logs and results")
    made.add_argument("--only", nargs="+", metavar="NAME", help="these steps; default: all")
    made.add_argument(
        "--shape",
        help="default: qwen3-0.6b on a GPU, else smollm2-135m; steps that need another have it",
    )
    made.add_argument(
        "--trace", type=Path, metavar="FILE", help="of requests, a CSV as azure_llm_conv or its .xz"
    )
    made.add_argument(
        "--budget", type=float, default=float("inf"), metavar="SECONDS", help="of all steps"
    )
    return made


def main(args: argparse.Namespace) -> None:
    gpu = torch.cuda.is_available()
    shape = args.shape or ("qwen3-0.6b" if gpu else "smollm2-135m")
    if args.trace is not None and not args.trace.is_file():
        raise ValueError(f"--trace {args.trace}: there is no such file")
    trace = args.trace or find_trace()
    planned = steps(gpu, shape, args.output, trace)
    names = [step.name for step in planned]
    if trace is None and "trace" in (args.only or ()):
        raise ValueError("--only trace: there is no trace, give --trace FILE")
    if unknown := set(args.only or ()) - set(names):
        raise ValueError(f"--only {min(unknown)}: the steps here are {', '.join(names)}")
    args.output.mkdir(parents=True, exist_ok=True)
    chosen = [step for step in planned if args.only is None or step.name in args.only]
    if trace is None:
        print(NO_TRACE, flush=True)
    with ended_by_exception():
        done = run_all(chosen, args.output, args.budget)
    device = torch.cuda.get_device_name() if gpu else "cpu"
    short = [{key: step[key] for key in ("name", "result", "seconds")} for step in done]
    used = None if trace is None else str(trace)
    document = {"device": device, "torch": torch.__version__, "trace": used, "steps": short}
    print(json.dumps(document))
    if any(step["result"].startswith(("failed", "ended")) for step in done):
        raise SystemExit(1)


if __name__ == "__main__":
    common.run(parser(), main)
