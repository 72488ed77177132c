"""`python -m tools.compare_compile_modes`: torch.compile's modes on the same model and requests.

Each mode runs in processes of its own, with compile caches of its own: the first finds them empty
(cold start) and does nothing else, the second finds what the first has left (warm start) and runs
`python -m minigen bench fixed`. The last line is one JSON document.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from minigen.bench_start import SHORTEST, model_arguments, run_process
from minigen.cli import positive
from minigen.report import bar, print_document, table
from tools.common import Plot, bars, model_config, parser, run

# The last one is what minigen does by itself: compiled, and on a GPU decode steps are replayed.
MODES = {
    "eager": ("--compile", "eager"),
    "default": ("--compile", "default", "--no-decode-graphs"),
    "reduce-overhead": ("--compile", "reduce-overhead"),
    "max-autotune": ("--compile", "max-autotune"),
    "minigen": ("--compile", "default"),
}
SHARED = ("model", "parameters", "device", "torch", "python", "dtype")


def measure(mode: str, arguments: list[str], workload: list[str]) -> dict[str, Any]:
    """Both starts of a mode, and its speeds; only "mode" and "error" where it does not run."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            cold = run_process([*SHORTEST, *arguments, *MODES[mode]], Path(folder))
            print(f"{mode}: cold start {cold['start_s']:.1f} s", flush=True)
            warm = run_process([*workload, *arguments, *MODES[mode]], Path(folder))
        except RuntimeError as error:
            return {"mode": mode, "error": str(error)}
    for row in warm["rows"]:
        print(
            f"{mode}: warm start {warm['start_s']:.1f} s, batch {row['batch']}, "
            f"{row['decode_tokens_s']:.0f} tokens/s",
            flush=True,
        )
    return {
        "mode": mode,
        "compile_status": warm["compile_status"],
        "cold_s": cold["start_s"],
        "warm_s": warm["start_s"],
        "warm_start": warm["start"],
        "compiled_graphs": warm["compiled_graphs"],
        "recompilations": warm["recompilations"],
        "peak_bytes": warm["memory"]["peak_bytes"],
        "limits": warm["limits"],
        "rows": warm["rows"],
        **{key: warm[key] for key in SHARED},
    }


def main(args: argparse.Namespace) -> None:
    model_config(args, "smollm2-135m")
    plot = Plot(args, 3)
    workload = [
        "fixed", "--batch-size", *map(str, args.batch_size),
        "--input-len", str(args.input_len), "--output-len", str(args.output_len),
    ]  # fmt: skip
    found = []
    with bar(len(args.modes), "Modes", "mode") as shown:
        for mode in args.modes:
            try:
                found.append(measure(mode, model_arguments(args), workload))
            except ValueError as error:
                if not found:  # the first mode would not take the options: nor will the others
                    raise
                found.append({"mode": mode, "error": str(error)})
            shown.update()
    good = [one for one in found if "error" not in one]
    if not good:
        raise ValueError(found[0]["error"])
    rows = []
    for one in found:
        if "error" in one:
            print(f"{one['mode']}: {one['error']}")
            continue
        for row in one["rows"]:
            rows.append(
                [
                    one["mode"], str(row["batch"]), one["cold_s"], one["warm_s"],
                    one["recompilations"], row["prefill_tokens_s"], row["decode_tokens_s"],
                    row["step_ms"]["p50"], row["step_ms"]["p99"], one["peak_bytes"] / 1e9,
                    row["gb_s"], f"{row['share_of_limit']:.1%}",
                ]
            )  # fmt: skip
        if one["compile_status"] not in ("ready", "eager"):
            print(f"{one['mode']}: not compiled, {one['compile_status']}")
    header = [
        "mode", "batch", "cold s", "warm s", "recompiled", "prefill tokens/s", "decode tokens/s",
        "step ms p50", "p99", "peak GB", "GB/s", "share of limit",
    ]  # fmt: skip
    print(table(header, rows))
    _draw(plot, good)
    shared = {key: good[0][key] for key in SHARED}
    modes = [{k: v for k, v in one.items() if k not in SHARED} for one in found]
    print_document(
        {"command": "compare_compile_modes", **shared, "plot": plot.path, "modes": modes}
    )


def _draw(plot: Plot, found: list[dict[str, Any]]) -> None:
    if not plot.axes:
        return
    names = [one["mode"] for one in found]
    starts = {kind: [one[f"{kind}_s"] for one in found] for kind in ("cold", "warm")}
    bars(plot.axes[0], names, starts, "start, s")
    rates: dict[str, list[float]] = {}
    steps: dict[str, list[float]] = {}
    for i, row in enumerate(found[0]["rows"]):
        batch = f"batch {row['batch']}"
        rates[batch] = [one["rows"][i]["decode_tokens_s"] for one in found]
        for q in ("p50", "p99"):
            steps[f"{batch}, {q}"] = [one["rows"][i]["step_ms"][q] for one in found]
    bars(plot.axes[1], names, rates, "decode, tokens/s")
    bars(plot.axes[2], names, steps, "step, ms")
    plot.axes[1].set_yscale("log")
    plot.axes[2].set_yscale("log")
    plot.save(f"{found[0]['model']}, {found[0]['dtype']}, {found[0]['device']}")


def options() -> argparse.ArgumentParser:
    made = parser("tools.compare_compile_modes", __doc__, "compare_compile_modes.png")
    made.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), metavar="MODE")
    made.add_argument("--batch-size", type=positive, nargs="+", default=[1, 16], metavar="N")
    made.add_argument("--input-len", type=positive, default=128, metavar="N")
    made.add_argument("--output-len", type=positive, default=64, metavar="N")
    made.add_argument("--num-cache-blocks", type=positive, metavar="N")
    return made


if __name__ == "__main__":
    run(options(), main)
