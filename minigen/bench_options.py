"""The options of `python -m minigen bench`, and what they say of the model that is measured.

Nothing here loads torch before a model's dtype is asked for: `--help` need not wait for it. The
tools take their model by the same options.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigen import cli
from minigen.shapes import SHAPES

if TYPE_CHECKING:
    import torch

    from minigen.model import DecoderConfig

WORKLOADS = ("nano", "fixed", "trace", "start")
SLO_NAMES = ("ttft", "tpot", "e2el")
DEFAULT_GOODPUT = ("ttft:1000", "tpot:100")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `bench`, vLLM's names where it has one."""
    parser.add_argument("workload", choices=WORKLOADS)
    cli.add_engine_options(parser)
    shape = parser.add_argument_group("random weights, instead of --model")
    shape.add_argument("--config", metavar="FILE", help="of any config.json's shape")
    shape.add_argument("--shape", metavar="NAME", help=f"of a known shape: {', '.join(SHAPES)}")
    shape.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and prompts")

    engine = parser.add_argument_group("engine")
    add, count = engine.add_argument, cli.positive
    add("--max-num-seqs", type=count, metavar="N", help="most sequences at once; default 256")
    add("--max-num-batched-tokens", type=count, default=2048, metavar="N", help="of a step; 2048")
    add("--num-cache-blocks", type=count, metavar="N", help="default: what memory allows")
    add("--gpu-memory-utilization", type=float, default=0.9, metavar="X", help="0.9")
    add("--enable-prefix-caching", action="store_true", help="off here, unlike elsewhere")

    work = parser.add_argument_group("work")
    add = work.add_argument
    add(
        "--num-prompts", "--num-requests", type=count, metavar="N",
        help="nano: the first N of its 256; trace: the first N of the file",
    )  # fmt: skip
    add(
        "--batch-size", type=count, nargs="+", default=[1, 8, 32, 128, 256], metavar="N",
        help="fixed: requests at once, several runs; 1 8 32 128 256",
    )  # fmt: skip
    add("--input-len", type=count, default=128, metavar="N", help="fixed: tokens of a prompt; 128")
    add("--output-len", type=count, default=512, metavar="N", help="fixed: new tokens; 512")
    add("--dataset-path", metavar="FILE", help="trace: CSV as azure_llm_conv, plain or .xz")
    add("--rate", type=_rate, default=1.0, metavar="X", help="trace: X times faster; inf: at once")
    add(
        "--goodput", nargs="+", default=list(DEFAULT_GOODPUT), metavar="NAME:MS",
        help="trace: the times that a good request keeps, of ttft, tpot and e2el; "
        + " ".join(DEFAULT_GOODPUT),
    )  # fmt: skip
    add(
        "--rival", choices=["transformers"],
        help="nano, fixed: the same requests through it, padded on the left, in this run",
    )  # fmt: skip
    add(
        "--rival-batch-size", type=count, default=64, metavar="N",
        help="nano: requests that the rival is given at once; 64",
    )  # fmt: skip


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not rate > 0:
        raise argparse.ArgumentTypeError(f"must be a number above 0 or inf, not {text!r}")
    return rate


def read_goodput(entries: Sequence[str]) -> dict[str, float]:
    """`ttft:1000` -> {"ttft": 1000.0}, milliseconds.

    Raises ValueError for a name that is none of `SLO_NAMES` and for what is no number above 0.
    """
    limits: dict[str, float] = {}
    for entry in entries:
        name, _, text = entry.partition(":")
        try:
            limits[name] = float(text)
        except ValueError:
            limits[name] = 0.0
        if name not in SLO_NAMES or not limits[name] > 0:
            raise ValueError(
                f"--goodput {entry!r}: NAME:MILLISECONDS is needed, NAME one of "
                + ", ".join(SLO_NAMES)
            )
    return limits


def model_config(args: argparse.Namespace) -> dict[str, Any] | None:
    """The config.json that --shape or --config name; None for --model.

    Raises ValueError unless exactly one of the three is given.
    """
    given = [name for name in ("model", "config", "shape") if getattr(args, name) is not None]
    if len(given) != 1:
        found = " and ".join(f"--{name}" for name in given)
        raise ValueError(
            (f"{found} name two models" if given else "there is no model to measure")
            + f": give one of --shape ({', '.join(SHAPES)}), --config FILE and --model DIR"
        )
    if args.shape is not None:
        if args.shape not in SHAPES:
            raise ValueError(f"--shape {args.shape!r} is unknown: use one of {', '.join(SHAPES)}")
        return dict(SHAPES[args.shape])
    if args.config is not None:
        from minigen.weights.json_file import read_json

        return read_json(Path(args.config))
    return None


def model_dtype(args: argparse.Namespace, config: dict[str, Any] | None) -> "torch.dtype":
    """The dtype that the options and the model's config lead to."""
    from minigen.model import DTYPES

    return decoder_config(args, config).dtype if args.dtype == "auto" else DTYPES[args.dtype]


def decoder_config(args: argparse.Namespace, config: dict[str, Any] | None) -> "DecoderConfig":
    """The model's config, the checkpoint's where `config` is None. Raises ValueError."""
    from minigen.model import DecoderConfig
    from minigen.weights.checkpoint import read_config
    from minigen.weights.hub import resolve_model

    return DecoderConfig.from_hf(
        read_config(resolve_model(args.model)) if config is None else config
    )
