"""What a run tells: its speed, lines of progress, tables of losses, and their plot."""

from __future__ import annotations

import contextlib
import csv
import importlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from minigen import cli
from minigen.flops import peak_flops_of

LOG, EVALUATION, PLOT = "log.csv", "evaluation.csv", "loss.png"
LOG_FIELDS = (
    "step", "epoch", "tokens", "targets", "loss", "lr", "grad_norm", "tokens_per_s", "mfu",
    "seconds",
)  # fmt: skip
EVALUATION_FIELDS = ("step", "file", "loss", "targets")
NO_MATPLOTLIB = (
    "--plot needs matplotlib, which is not installed: pip install 'minigen[plot]', or leave --plot "
    "out (log.csv holds the same figures)"
)


class Table:
    """A CSV file with one row more for each call of `add`.

    Rows above `last_step`, and a torn last row, are removed: the run that goes on writes them anew.
    Raises OSError.
    """

    def __init__(self, file: Path, fields: tuple[str, ...], last_step: int) -> None:
        self._file, self._fields = file, fields
        kept = [row for row in read_table(file) if int(row["step"]) <= last_step]
        lines = [",".join(fields), *(",".join(_quoted(row[f]) for f in fields) for row in kept)]
        cli.write_atomically(file, "\n".join(lines) + "\n")

    def add(self, row: dict[str, Any]) -> None:
        cells = [row[field] for field in self._fields]
        texts = ["" if c is None else f"{c:.8g}" if isinstance(c, float) else str(c) for c in cells]
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(",".join(map(_quoted, texts)) + "\n")


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"' if set(text) & set(',"\n') else text


def read_table(file: Path) -> list[dict[str, str]]:
    """The whole rows of a table; none if there is no such file."""
    if not file.exists():
        return []
    text = file.read_text(encoding="utf-8")
    rows = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
    return [row for row in rows if None not in row.values() and row["step"].isdecimal()]


class Progress:
    """A bar on standard error where that is a terminal, a line for each report elsewhere."""

    def __init__(self, total: int, done: int) -> None:
        from tqdm import tqdm

        self._total = total
        self._bar = tqdm(
            total=total,
            initial=done,
            unit="step",
            dynamic_ncols=True,
            disable=not cli.is_terminal(sys.stderr),
        )

    def step(self) -> None:
        self._bar.update(1)

    def report(self, row: dict[str, Any]) -> None:
        mfu = "" if row["mfu"] is None else f", MFU {100 * row['mfu']:.1f} %"
        text = (
            f"loss {row['loss']:.4f}, lr {row['lr']:.2e}, {row['tokens_per_s']:,.0f} tokens/s{mfu}"
        )
        if self._bar.disable:
            self.say(f"step {row['step']}/{self._total}: {text}")
        else:
            self._bar.set_postfix_str(text)

    def say(self, text: str) -> None:
        self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()


class Report:
    """The files and lines of the first process."""

    def __init__(self, output: Path, total: int, done: int) -> None:
        self._log = Table(output / LOG, LOG_FIELDS, done)
        self._evaluation = Table(output / EVALUATION, EVALUATION_FIELDS, done)
        self.progress = Progress(total, done)

    def log(self, row: dict[str, Any]) -> None:
        self._log.add(row)
        self.progress.report(row)

    def evaluated(self, step: int, file: str, loss: float, targets: int) -> None:
        self._evaluation.add({"step": step, "file": file, "loss": loss, "targets": targets})
        self.progress.say(f"step {step}, held out of {file}: loss {loss:.4f}")


class Clock:
    """Tokens and arithmetic of all processes over the time of their steps."""

    def __init__(self, device: torch.device, peak: float | None, world: int) -> None:
        if peak is None and device.type == "cuda":
            peak = peak_flops_of(torch.cuda.get_device_name(device))
        self._peak = None if peak is None else peak * world
        self._restart()

    def _restart(self) -> None:
        self._begin, self._tokens, self._flops = time.perf_counter(), 0, 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is no step's."""
        begin = time.perf_counter()
        yield
        self._begin += time.perf_counter() - begin

    def count(self, tokens: int, flops: float) -> None:
        self._tokens += tokens
        self._flops += flops

    def read(self) -> tuple[float, float | None, float]:
        """(tokens a second, MFU, seconds) since the last reading, which begins a new one."""
        seconds = max(time.perf_counter() - self._begin, 1e-9)
        mfu = None if self._peak is None else round(self._flops / seconds / self._peak, 4)
        rate = self._tokens / seconds
        self._restart()
        return rate, mfu, seconds


def check_matplotlib() -> None:
    """Raises ValueError where there is no matplotlib."""
    try:
        importlib.import_module("matplotlib")
    except ImportError:
        raise ValueError(NO_MATPLOTLIB) from None


def plot(output: Path) -> None:
    """Draws the losses of both tables into `loss.png`. Raises ValueError without matplotlib."""
    check_matplotlib()
    backend = importlib.import_module("matplotlib.backends.backend_agg")
    figure = importlib.import_module("matplotlib.figure").Figure(
        figsize=(8, 5), layout="constrained"
    )
    axes = figure.add_subplot()
    rows = read_table(output / LOG)
    axes.plot(*_curve(rows), label="training", linewidth=1)
    evaluated = read_table(output / EVALUATION)
    for file in dict.fromkeys(row["file"] for row in evaluated):
        curve = _curve([row for row in evaluated if row["file"] == file])
        axes.plot(*curve, marker="o", markersize=3, label=f"held out: {Path(file).name}")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    axes.legend()
    axes.grid(alpha=0.3)
    temporary = output / f".{PLOT}.partial"
    with temporary.open("wb") as stream:
        backend.FigureCanvasAgg(figure).print_png(stream)
    temporary.replace(output / PLOT)


def _curve(rows: list[dict[str, str]]) -> tuple[list[int], list[float]]:
    return [int(row["step"]) for row in rows], [float(row["loss"]) for row in rows]
