"""`python -m minigen`: chat with a checkpoint, generate from many prompts, measure or train."""

import argparse
import contextlib
import os
import sys
import threading
import traceback
from collections.abc import Sequence

from minigen import bench_options, cli, start, train_options
from minigen.weights import bundled

EPILOG = """\
examples:
  python -m minigen chat
  python -m minigen chat --model ./SmolLM2-135M-Instruct
  python -m minigen generate --model ./SmolLM2-135M --prompt "Once upon a time"
  python -m minigen bench fixed --shape smollm2-135m --batch-size 1 16
  python -m minigen train --model ./SmolLM2-135M --data chats.jsonl --output run

`python -m minigen COMMAND --help` explains a command."""

CHAT_EPILOG = """\
examples:
  python -m minigen chat
  python -m minigen chat --model ./SmolLM2-135M-Instruct
  python -m minigen chat --model ./SmolLM2-135M-Instruct --temperature 0.7 --system "Be brief."
  echo "What is a llama?" | python -m minigen chat --model ./SmolLM2-135M-Instruct --compile eager

Enter sends, Alt-Enter begins a new line, Ctrl-C stops a reply, Ctrl-D leaves, /help lists the
commands. Where standard input or output is no terminal, each line is a message, only replies go to
standard output, and everything else goes to standard error. A model without chat template
continues each line as plain text; an empty line lets it begin by itself."""

GENERATE_EPILOG = """\
examples:
  python -m minigen generate --prompt "Once upon a time"
  python -m minigen generate --model ./SmolLM2-135M --prompt "Once upon a time" --max-tokens 100
  python -m minigen generate --model ./SmolLM2-135M --input prompts.jsonl --output out.jsonl

Texts are printed where --prompt stands without --output. With it they become lines as those of an
input would, with ids from 1 on.

A line of the input:
  {"id": "a1", "prompt": "Once upon", "params": {"temperature": 0, "max_tokens": 20}}
with one of "prompt" (text), "prompt_token_ids" (used as they are) or "messages" (through the chat
template). "id" (a text or a whole number) is the line's number where absent; "params" are sampling
parameters for this line, over those of the command line. A line without a seed draws by its id.

A line of the output, one for each line of the input, in the order they finish:
  {"id": "a1", "input_sha256": "…", "text": "…", "token_ids": […], "finish_reason": "length",
   "stop_reason": null, "cumulative_logprob": null, "logprobs": null, "num_prompt_tokens": 3,
   "num_cached_tokens": 0, "timings": {"first_token_s": 0.02, "total_s": 0.4}}
"logprobs" is one object a token, {"TOKEN_ID": {"logprob": …, "rank": …, "decoded_token": …}};
"prompt_logprobs" is there if asked for. With n above 1 the first sample stands there, and
"outputs" has all n with the same fields. A request that cannot run has {"id", "input_sha256",
"error"} and harms no other; the exit code is then 2, as for a run that was refused.

A run that was interrupted goes on when the same command is given again: ids that are in the output
are skipped, a torn last line is done anew. OUT.settings.json beside the output holds the model and
the sampling parameters; a run with other ones is refused."""

BENCH_EPILOG = """\
workloads:
  nano   256 random prompts of 100 to 1,024 tokens with as many to follow, all at once
  fixed  batches of equal prompts; prefill and decode are timed apart
  trace  the requests of a recorded trace at their times of arrival
  start  seconds to the first token in a new process, without and with torch's compile caches

examples:
  python -m minigen bench fixed --shape smollm2-135m --batch-size 1 16 --output-len 64
  python -m minigen bench nano --shape qwen3-0.6b --rival transformers
  python -m minigen bench trace --config ./config.json --dataset-path azure_llm_conv.csv --rate 2
  python -m minigen bench start --shape tiny

A step's time is split: host work (scheduling, laying out inputs, reading results), calls of the
compiled functions (on a CPU their computation), and waiting for the device. The limit is what the
weights and the cache that a step reads take at the bandwidth, and its products at the speed, that
are measured in the same run. The last line of standard output is one JSON document."""


SERVING = ("chat", "generate", "bench")  # commands that load a model to serve


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 1 (failed), 2 (the user's error), 130 (Ctrl-C)."""
    if sys.stderr is None:  # closed by `2>&-`: messages would go to standard output
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    argv = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(argv)
    args.argv = list(argv)
    # `bench start` has other processes start.
    if args.command in SERVING and getattr(args, "workload", None) != "start":
        start.open_gpu(args.device)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        return cli.EXIT_INTERRUPTED
    except BrokenPipeError:  # whoever read our output has gone
        _drop_output()
        return cli.EXIT_RUNTIME
    except Exception as error:
        if args.traceback:
            traceback.print_exc()
        print(f"minigen: {cli.one_line(error)}", file=sys.stderr)
        _drop_output()
        return cli.EXIT_USAGE if isinstance(error, (ValueError, OSError)) else cli.EXIT_RUNTIME


def _drop_output() -> None:
    """Drop what standard output does not take: Python would complain of it again when it ends."""
    try:
        if sys.stdout is not None and not sys.stdout.closed:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _run_chat(args: argparse.Namespace) -> int:
    from minigen import chat

    return chat.run(args)


def _run_generate(args: argparse.Namespace) -> int:
    from minigen import generate

    return generate.run(args)


def _run_bench(args: argparse.Namespace) -> int:
    from minigen import bench

    return bench.run(args)


def _run_train(args: argparse.Namespace) -> int:
    from minigen import train

    return train.run(args)


def _run_train_tokenizer(args: argparse.Namespace) -> int:
    from minigen import train_tokenizer

    return train_tokenizer.run(args)


def _parser() -> cli.Parser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = cli.Parser(
        prog="python -m minigen", description=__doc__, epilog=EPILOG, formatter_class=raw
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    chat = commands.add_parser(
        "chat",
        help="talk with a model",
        description="Talk with a model.",
        epilog=CHAT_EPILOG,
        formatter_class=raw,
    )
    cli.add_engine_options(chat, default_model=bundled.NAME)
    chat.add_argument("--system", metavar="TEXT", help="the system message")
    cli.add_sampling_options(chat, max_tokens="what the context has room for")
    chat.set_defaults(run=_run_chat)

    generate = commands.add_parser(
        "generate",
        help="continue many prompts at once",
        description="Continue many prompts at once, in one flat batch.",
        epilog=GENERATE_EPILOG,
        formatter_class=raw,
    )
    work = generate.add_argument_group("work")
    work.add_argument(
        "--prompt", action="append", metavar="TEXT", help="repeatable; printed without --output"
    )
    work.add_argument("--input", metavar="FILE", help="requests, one JSON object a line")
    work.add_argument("--output", metavar="FILE", help="results, one JSON object a line")
    cli.add_engine_options(generate, default_model=bundled.NAME)
    cli.add_sampling_options(generate, max_tokens="256", many=True)
    generate.set_defaults(run=_run_generate)

    bench = commands.add_parser(
        "bench",
        help="measure speed",
        description="Measure how fast a model's shape runs here, and how near the limit.",
        epilog=BENCH_EPILOG,
        formatter_class=raw,
    )
    bench_options.add_options(bench)
    bench.set_defaults(run=_run_bench)

    train = commands.add_parser(
        "train",
        help="train a model, from scratch or from a checkpoint",
        description="Train a model on texts and conversations, packed without padding.",
        epilog=train_options.TRAIN_EPILOG,
        formatter_class=raw,
    )
    train_options.add_train_options(train)
    train.set_defaults(run=_run_train)

    tokenizer = commands.add_parser(
        "train-tokenizer",
        help="make a tokenizer for a model from scratch",
        description="Make a byte-level BPE tokenizer from texts and conversations.",
        epilog=train_options.TOKENIZER_EPILOG,
        formatter_class=raw,
    )
    train_options.add_tokenizer_options(tokenizer)
    tokenizer.set_defaults(run=_run_train_tokenizer)

    for command in (chat, generate, bench, train, tokenizer):
        command.add_argument(
            "--traceback", action="store_true", help="show where in the program an error arose"
        )
    return parser


def _leave(code: int) -> None:
    """Ends the process; a thread that still compiles, imports or opens a GPU could abort an
    ordinary end."""
    # Not imported here: `--help` need not wait for torch. Who has not loaded it has no thread.
    runner = sys.modules.get("minigen.runner")
    names = {start.THREAD, runner.COMPILE_THREAD} if runner else {start.THREAD}
    if any(thread.name in names for thread in threading.enumerate()):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(code)
    raise SystemExit(code)


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in SERVING:
        start.pause_collection()  # until the model is loaded
    _leave(main())
