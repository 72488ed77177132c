"""The options of `train` and `train-tokenizer`. Nothing here imports torch."""

import argparse
from collections.abc import Callable

TRAIN_EPILOG = """\
examples:
  python -m minigen train --model ./SmolLM2-135M --data chats.jsonl --holdout 0.02 --output run
  python -m minigen train --config config.json --tokenizer tok --data stories.jsonl.xz \\
      --data chats.jsonl:2 --epochs 4 --lr 1e-3 --output run

A line of the data is {"text": "…"} or {"messages": [{"role": "user", "content": "…"}, …]}; of
conversations only the assistant's turns count, unless --no-assistant-only-loss. Files may be .xz;
PATH:2 takes each sample of a file twice an epoch, PATH:0.5 every other one.

The same command again goes on where the last checkpoint was written, with the same losses as if
nothing had happened, and refuses if a setting that decides them has changed. OUTPUT holds
step-N/ (checkpoints in Hugging Face layout, with what going on needs), final/ (the model, for
`python -m minigen chat --model OUTPUT/final`), log.csv, evaluation.csv and, with --plot, loss.png.

With --nproc-per-node 2, or under torchrun, each process takes its share of every update; Ctrl-C
then ends without a checkpoint of its own."""

TOKENIZER_EPILOG = """\
example:
  python -m minigen train-tokenizer --data stories.jsonl --data chats.jsonl --vocab-size 8192 \\
      --chat-template chat_template.jinja --output tok

--bos-token stands before every text, --eos-token after it; name the token that ends a turn in the
chat template as --eos-token, or the model will not stop there."""


def whole(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(
                f"must be a whole number from {least} on, not {text!r}"
            )
        return int(text)

    return read


def number(
    low: float, high: float = float("inf"), open_low: bool = False
) -> Callable[[str], float]:
    """A number from low to high; with `open_low` above low."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high or (open_low and value == low) or value == float("inf"):
            above = "above" if open_low else "from"
            to = "" if high == float("inf") else f" to {high:g}"
            raise argparse.ArgumentTypeError(f"must be a number {above} {low:g}{to}, not {text!r}")
        return value

    return read


def add_train_options(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model").add_argument
    model("--model", metavar="PATH_OR_HUB_ID", help="the checkpoint to begin with")
    model("--config", metavar="FILE", help="a config.json, to begin with random weights")
    model("--tokenizer", metavar="DIR", help="its tokenizer.json; by default the checkpoint's")

    data = parser.add_argument_group("data").add_argument
    data(
        "--data",
        action="append",
        required=True,
        metavar="PATH[:WEIGHT]",
        help="JSONL, repeatable; an epoch takes each sample WEIGHT times",
    )
    data(
        "--max-length",
        type=whole(2),
        metavar="N",
        help="tokens of a sample; default: what the model was made for, at most --tokens",
    )
    data(
        "--overlong",
        choices=["split", "drop"],
        default="split",
        help="what becomes of longer samples (default: %(default)s)",
    )
    data(
        "--holdout",
        type=number(0, 0.9),
        default=0.0,
        metavar="SHARE",
        help="share of each file that is only evaluated on, chosen by a hash of the sample",
    )
    data(
        "--assistant-only-loss",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="of conversations only the assistant's turns count; without, every token does",
    )

    run = parser.add_argument_group("run").add_argument
    run("--output", required=True, metavar="DIR", help="checkpoints, the trained model, the log")
    run("--epochs", type=number(0, open_low=True), metavar="X", help="default: 1")
    run("--steps", type=whole(1), metavar="N", help="instead of --epochs: that many updates")
    run(
        "--tokens",
        type=whole(2),
        default=32768,
        metavar="N",
        help="most tokens of a micro-step on each device (default: %(default)s)",
    )
    run(
        "--accumulate",
        type=whole(1),
        default=1,
        metavar="N",
        help="micro-steps of an update (default: %(default)s)",
    )
    run(
        "--nproc-per-node",
        type=whole(1),
        metavar="N",
        help="train in N processes, one a GPU, as under torchrun --nproc-per-node N",
    )
    run("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    run(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16"],
        help="to compute in, the weights stay fp32; auto: bfloat16 on a GPU, float32 on a CPU",
    )
    run(
        "--compile",
        default="default",
        choices=["eager", "default", "max-autotune-no-cudagraphs"],
        help="torch.compile's mode; eager compiles nothing (default: %(default)s)",
    )
    run(
        "--recompute",
        action="store_true",
        help="activation checkpointing: keep a layer's input only, compute the rest again",
    )
    run("--seed", type=whole(0), default=0, metavar="N", help="default: %(default)s")

    update = parser.add_argument_group("update").add_argument
    update(
        "--lr",
        type=number(0, open_low=True),
        default=3e-4,
        metavar="X",
        help="default: %(default)s",
    )
    update(
        "--schedule",
        default="cosine",
        choices=["cosine", "linear", "wsd", "constant"],
        help="wsd stays up and decays at the end (default: %(default)s)",
    )
    update("--warmup", type=whole(0), metavar="STEPS", help="default: 2 %% of the steps")
    update(
        "--min-lr-ratio",
        type=number(0, 1),
        default=0.1,
        metavar="X",
        help="the last rate, as a share of --lr (default: %(default)s)",
    )
    update(
        "--decay-ratio",
        type=number(0, 1, open_low=True),
        default=0.2,
        metavar="X",
        help="share of the steps in which wsd decays (default: %(default)s)",
    )
    update("--weight-decay", type=number(0), default=0.1, metavar="X", help="default: %(default)s")
    update("--beta1", type=number(0, 0.9999), default=0.9, metavar="X", help="default: %(default)s")
    update(
        "--beta2", type=number(0, 0.99999), default=0.95, metavar="X", help="default: %(default)s"
    )
    update(
        "--clip",
        type=number(0),
        default=1.0,
        metavar="X",
        help="largest norm of the gradients, 0: any (default: %(default)s)",
    )
    update(
        "--dropout",
        type=number(0, 0.9),
        default=0.0,
        metavar="X",
        help="of what attention and MLP add (default: %(default)s)",
    )

    saving = parser.add_argument_group("checkpoints").add_argument
    saving(
        "--save-every",
        type=whole(1),
        default=500,
        metavar="STEPS",
        help="default: %(default)s; the last step is saved, too",
    )
    saving(
        "--keep", type=whole(1), default=2, metavar="N", help="checkpoints (default: %(default)s)"
    )
    saving(
        "--save-dtype",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="of the weights in them; auto: the dtype computed in",
    )
    saving(
        "--max-file-bytes",
        type=whole(1),
        default=5_000_000_000,
        metavar="N",
        help="of one file of weights, unless a single tensor is larger (default: %(default)s)",
    )

    report = parser.add_argument_group("report").add_argument
    report("--log-every", type=whole(1), default=10, metavar="STEPS", help="default: %(default)s")
    report(
        "--eval-every",
        type=whole(1),
        default=500,
        metavar="STEPS",
        help="evaluate and sample (default: %(default)s, and at the end)",
    )
    report(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="print a greedy continuation at each evaluation; repeatable",
    )
    report(
        "--chat-prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="the same for a reply to a user's message; repeatable",
    )
    report("--plot", action="store_true", help="draw loss.png (needs matplotlib)")
    report(
        "--peak-flops",
        type=number(0, open_low=True),
        metavar="X",
        help="of one device, for the MFU; known for common GPUs",
    )


def add_tokenizer_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--data",
        action="append",
        required=True,
        metavar="PATH[:WEIGHT]",
        help="JSONL with text or messages, repeatable; weights are passed over",
    )
    add("--output", required=True, metavar="DIR", help="where tokenizer.json is written")
    add("--vocab-size", type=whole(257), default=8192, metavar="N", help="default: %(default)s")
    add(
        "--bos-token",
        default="<|bos|>",
        metavar="TEXT",
        help="stands before every text; empty: none (default: %(default)s)",
    )
    add(
        "--eos-token",
        default="<|eos|>",
        metavar="TEXT",
        help="ends a text or a turn (default: %(default)s)",
    )
    add(
        "--special-token",
        action="append",
        default=[],
        metavar="TEXT",
        help="one more token that no text is cut into; repeatable",
    )
    add("--chat-template", metavar="FILE", help="a jinja2 template of conversations")
