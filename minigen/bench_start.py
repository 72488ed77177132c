"""`python -m minigen bench` in processes of its own: starts without and with the compile caches.

The process that waits for them loads no torch.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minigen import cli
from minigen.report import bar, print_document, table

# The smallest run of another bench process: it starts, computes a prompt and decodes.
SHORTEST = ("fixed", "--batch-size", "1", "--input-len", "8", "--output-len", "4")


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


def run_start(args: argparse.Namespace) -> int:
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
