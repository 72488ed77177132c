"""`python -m tools.report --output DIR`: every check and benchmark of this machine, one by one.

Each step is a command of its own, whose output goes to DIR/NAME.log and whose last line of JSON, if
it ends with one, to DIR/report.json, which is rewritten after every step. A step that outlasts its
limit is ended, one that fails is reported, and the others go on. With --budget no step is begun for
which no time is left: --only runs those later. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minigen import cli
from tools import common

# Less than this is no time to begin anything in.
LEAST_SECONDS = 15.0


@dataclass(frozen=True)
class Step:
    """A command as `python -m` takes it, and the seconds after which it is ended."""

    name: str
    command: tuple[str, ...]
    limit: float


def steps(gpu: bool, shape: str, output: Path) -> list[Step]:
    """What there is to run, the checks first."""
    bench = ("minigen", "bench")
    on = ("--shape", shape)
    plots = ("modes", "torchs-graphs", "batching", "scale")
    plot = {name: ("--plot", str(output / f"{name}.png")) for name in plots}
    if not gpu:
        return [
            Step("fixed", (*bench, "fixed", *on, "--batch-size", "1", "16"), 300),
            Step("start", (*bench, "start", *on), 300),
            Step("decode", ("tools.bench_decode", *on), 300),
            Step("modes", ("tools.compare_compile_modes", *on, *plot["modes"]), 1200),
            Step("batching", ("tools.compare_batching", *on, *plot["batching"]), 600),
            Step("logprobs", ("tools.compare_logprobs", "--shape", "tiny"), 300),
            Step("scale", ("tools.scale", *on, *plot["scale"]), 900),
        ]
    attention = ("tools.bench_attention", "--what", "all", "--seconds", "60")
    train_step = ("tools.compare_batching", "--shape", "llama-3.2-1b", "--phases", "train-step")
    train_step += ("--tokens", "32768", "--max-rows", "32768", "--lengths", "lognormal", "one-long")
    processes = str(max(2, min(14, (os.cpu_count() or 8) - 2)))
    # Every test by its name, as it ends: a run that is cut off says how far it came.
    tests = ("pytest", "-m", "gpu", "-vv", "-rs", "--durations", "15", *pytest_plugins(processes))
    modes, large = ("tools.compare_compile_modes", *on), ("--shape", "llama-3.1-8b")
    return [
        Step("tests", tests, 420),
        Step(
            "attention",
            (*attention, "--processes", processes, "--out", str(output / "attention.json")),
            400,
        ),
        Step("fixed", (*bench, "fixed", *on), 300),
        Step("nano", (*bench, "nano", *on), 240),
        Step("start", (*bench, "start", *on), 300),
        Step("fixed-8b", (*bench, "fixed", *large, "--output-len", "96"), 300),
        Step("nano-8b", (*bench, "nano", *large), 240),
        Step("batching", ("tools.compare_batching", *on, *plot["batching"]), 300),
        Step("logprobs", ("tools.compare_logprobs", *on), 180),
        Step("train-step", (*train_step, "--plot", str(output / "train-step.png")), 300),
        Step("scale", ("tools.scale", *on, *plot["scale"]), 420),
        # Ten cold and warm starts of every mode together would outlast what a step may take.
        Step("modes", (*modes, "--modes", "eager", "default", "minigen", *plot["modes"]), 540),
        Step(
            "torchs-graphs",
            (*modes, "--modes", "reduce-overhead", "max-autotune", *plot["torchs-graphs"]),
            540,
        ),
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
    made.add_argument("--shape", help="default: qwen3-0.6b on a GPU, else smollm2-135m")
    made.add_argument(
        "--budget", type=float, default=float("inf"), metavar="SECONDS", help="of all steps"
    )
    return made


def main(args: argparse.Namespace) -> None:
    gpu = torch.cuda.is_available()
    shape = args.shape or ("qwen3-0.6b" if gpu else "smollm2-135m")
    planned = steps(gpu, shape, args.output)
    names = [step.name for step in planned]
    if unknown := set(args.only or ()) - set(names):
        raise ValueError(f"--only {min(unknown)}: the steps here are {', '.join(names)}")
    args.output.mkdir(parents=True, exist_ok=True)
    chosen = [step for step in planned if args.only is None or step.name in args.only]
    done = run_all(chosen, args.output, args.budget)
    device = torch.cuda.get_device_name() if gpu else "cpu"
    short = [{key: step[key] for key in ("name", "result", "seconds")} for step in done]
    print(json.dumps({"device": device, "torch": torch.__version__, "steps": short}))
    if any(step["result"].startswith(("failed", "ended")) for step in done):
        raise SystemExit(1)


if __name__ == "__main__":
    common.run(parser(), main)
