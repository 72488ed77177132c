"""What the tools share: their options, one-line errors, plots."""

import argparse
import importlib
import random
import sys
from collections.abc import Callable
from typing import Any

from minigen import bench_options, cli
from minigen.shapes import SHAPES

NO_MATPLOTLIB = "matplotlib is not installed: pip install 'minigen[plot]'"


def parser(prog: str, description: str | None, plot: str | None = None) -> argparse.ArgumentParser:
    """A parser with the options of the model and, for a tool that draws one, of the plot.

    `plot` is the plot's file by default.
    """
    made = cli.Parser(prog=f"python -m {prog}", description=description)
    group = made.add_argument_group("model, random weights unless --model is given")
    group.add_argument("--shape", metavar="NAME", help=f"one of {', '.join(SHAPES)}")
    group.add_argument("--config", metavar="FILE", help="any config.json")
    group.add_argument("--model", metavar="DIR", help="a checkpoint")
    group.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "float16", "bfloat16"]
    )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    group.add_argument("--seed", type=int, default=0, metavar="N")
    if plot is not None:
        made.add_argument(
            "--plot",
            metavar="FILE",
            help=f"a .png; {plot} by default, if matplotlib is installed; none: no plot",
        )
    made.set_defaults(default_plot=plot, decode_graphs=None)
    return made


def run(made: argparse.ArgumentParser, main: Callable[[argparse.Namespace], None]) -> None:
    """Parses, runs, and ends the process: bad input is one line, no traceback."""
    args = made.parse_args()
    try:
        main(args)
    except KeyboardInterrupt:
        raise SystemExit(cli.EXIT_INTERRUPTED) from None
    except (ValueError, OSError) as error:
        print(f"{made.prog}: {cli.one_line(error)}", file=sys.stderr)
        raise SystemExit(cli.EXIT_USAGE) from None


def model_config(args: argparse.Namespace, default: str) -> dict[str, Any] | None:
    """As bench's; where no model is named it is the shape `default`."""
    if args.shape is None and args.config is None and args.model is None:
        args.shape = default
    return bench_options.model_config(args)


def tokens_of(lengths: list[int], vocab_size: int, seed: int) -> list[list[int]]:
    """Random prompts of these lengths."""
    rng = random.Random(seed)
    return [[rng.randrange(vocab_size) for _ in range(length)] for length in lengths]


class Plot:
    """A figure of several panels in a file, or nothing where no plot is wanted or possible.

    Made before anything is measured: a plot that was asked for and cannot be is refused then.
    """

    def __init__(self, args: argparse.Namespace, panels: int) -> None:
        """Raises ValueError if --plot was given and matplotlib is missing."""
        self.path: str | None = None if args.plot == "none" else args.plot or args.default_plot
        self.axes: list[Any] = []
        if self.path is None:
            return
        try:
            matplotlib = importlib.import_module("matplotlib")
            matplotlib.use("agg")  # files only, no window
            pyplot = importlib.import_module("matplotlib.pyplot")
        except ImportError:
            if args.plot is not None:
                raise ValueError(f"--plot {args.plot}: {NO_MATPLOTLIB}") from None
            print(f"no plot: {NO_MATPLOTLIB}", file=sys.stderr)
            self.path = None
            return
        self._figure, axes = pyplot.subplots(
            1, panels, figsize=(5.5 * panels, 4.5), squeeze=False, layout="constrained"
        )
        self.axes = list(axes[0])

    def save(self, title: str) -> None:
        if self.path is None:
            return
        self._figure.suptitle(title)
        self._figure.savefig(self.path, dpi=120)
        print(f"plot: {self.path}")


def bars(axis: Any, groups: list[str], series: dict[str, list[float]], ylabel: str) -> None:
    """Bars side by side in each group, one colour a series."""
    width = 0.8 / max(1, len(series))
    for i, (name, values) in enumerate(series.items()):
        at = [group + (i - (len(series) - 1) / 2) * width for group in range(len(groups))]
        axis.bar(at, values, width, label=name)
    axis.set_xticks(range(len(groups)), groups, rotation=15)
    axis.set_ylabel(ylabel)
    # Above, where it covers no bar.
    axis.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False, fontsize="small"
    )
