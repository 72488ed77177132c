"""`python -m tools.compare_compile_modes`: torch.compile's modes on the same model and requests.

Each mode runs in processes of its own, with compile caches of its own: the first finds them empty
(cold start) and does nothing else, the second finds what the first has left (warm start) and runs
`python -m minigen bench fixed`. The last line is one JSON document.

With --results FILE the modes may be measured by several commands: what FILE holds of the same
model, machine and settings is shown with what is measured now, and FILE is written after each mode.
A mode that is measured again replaces what was found before.
"""

import argparse
import json
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from minigen.bench_start import SHORTEST, model_arguments, run_process
from minigen.cli import positive, write_atomically
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


# --- results of several commands -----------------------------------------------------------------


def _environment(device: str) -> dict[str, Any]:
    from minigen.llm import device_of
    from minigen.measure import environment

    return environment(device_of(device))


def machine(device: str) -> dict[str, Any]:
    """The device's name, torch's version and Python's. Raises ValueError for no such device."""
    # In a process of its own: this one waits, and is to take no memory of the device.
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_environment, device).result()


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """All that figures of one table must have in common. Raises ValueError for no such device."""
    names = ("seed", "dtype", "batch_size", "input_len", "output_len", "num_cache_blocks")
    return {
        "model": args.shape or args.config or args.model,
        **{name: getattr(args, name) for name in names},
        **machine(args.device),
    }


def read_results(path: Path, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{mode: its row} of the file; none where there is no file yet.

    Raises ValueError where it holds something else, or was measured with other settings; OSError
    where it cannot be read.
    """
    if not path.parent.is_dir():
        raise ValueError(f"--results {path}: there is no directory {path.parent}")
    if not path.exists():
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        before = {name: document["settings"][name] for name in settings}
        found = {row["mode"]: row for row in document["modes"]}
        whole = all(mode in MODES for mode in found) and all(
            "error" in row or {*SHARED, "rows"} <= set(row) for row in found.values()
        )
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise ValueError(f"--results {path}: this is no file of results of compare_compile_modes")
    for name, value in settings.items():
        if before[name] != value:
            raise ValueError(
                f"--results {path}: its modes were measured with {name} {before[name]!r}, not "
                f"{value!r}: give another file"
            )
    return found


def refuse_others(path: Path, row: dict[str, Any], before: Iterable[dict[str, Any]]) -> None:
    """Raises ValueError where a row's model is another than the file's, by the same name."""
    for other in before:
        for name in SHARED if "error" not in row and "error" not in other else ():
            if row[name] != other[name]:
                raise ValueError(
                    f"--results {path}: its modes were measured with {name} {other[name]!r}, this "
                    f"one with {row[name]!r}: give another file"
                )


def write_results(path: Path, settings: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    document = {"command": "compare_compile_modes", "settings": settings, "modes": rows}
    write_atomically(path, json.dumps(document, indent=1) + "\n")


# --- the run -------------------------------------------------------------------------------------


def measure_all(
    args: argparse.Namespace, settings: dict[str, Any], before: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """The rows of `before` and those of --modes, in the order of MODES, also in --results."""
    workload = [
        "fixed", "--batch-size", *map(str, args.batch_size),
        "--input-len", str(args.input_len), "--output-len", str(args.output_len),
    ]  # fmt: skip
    found = dict(before)
    with bar(len(args.modes), "Modes", "mode") as shown:
        for i, mode in enumerate(args.modes):
            try:
                found[mode] = measure(mode, model_arguments(args), workload)
            except ValueError as error:
                if i == 0:  # the first mode would not take the options: nor will the others
                    raise
                found[mode] = {"mode": mode, "error": str(error)}
            if args.results is not None:
                refuse_others(args.results, found[mode], before.values())
                write_results(args.results, settings, [found[m] for m in MODES if m in found])
            shown.update()
    return [found[mode] for mode in MODES if mode in found]


def main(args: argparse.Namespace) -> None:
    model_config(args, "smollm2-135m")
    settings, before = {}, {}
    if args.results is not None:
        settings = settings_of(args)
        before = read_results(args.results, settings)
    plot = Plot(args, 3)
    found = measure_all(args, settings, before)
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
        {
            "command": "compare_compile_modes",
            **shared,
            "plot": plot.path,
            "results": None if args.results is None else str(args.results),
            "modes": modes,
        }
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
    made.add_argument(
        "--results", type=Path, metavar="FILE",
        help="JSON: what earlier commands have measured is read from it, what this one measures is "
        "added; refused if the model, machine or settings differ",
    )  # fmt: skip
    return made


if __name__ == "__main__":
    run(options(), main)
