"""What the commands share: options, the values of sampling parameters, Ctrl-C.

Nothing here imports torch, so that `--help` answers at once.
"""

import argparse
import json
import logging
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from minigen import start

if TYPE_CHECKING:
    from minigen.llm import LLM

EXIT_OK, EXIT_RUNTIME, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


# --- sampling parameters -------------------------------------------------------------------------


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_int(value) or isinstance(value, float)


def _is_list_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _is_bias(value: Any) -> bool:
    return isinstance(value, dict) and all(
        str(k).isdecimal() and _is_number(v) for k, v in value.items()
    )


_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "int": (_is_int, "a whole number"),
    "number": (_is_number, "a number"),
    "bool": (lambda value: isinstance(value, bool), "true or false"),
    "texts": (
        lambda value: isinstance(value, str) or _is_list_of(lambda v: isinstance(v, str))(value),
        "a text or a list of texts",
    ),
    "ints": (_is_list_of(_is_int), "a list of token ids"),
    "bias": (_is_bias, 'an object from token ids to numbers, {"42": -1.5}'),
}
# The type of each sampling parameter; '?' also takes None. Ranges are SamplingParams' own matter.
PARAMETERS = {
    "n": "int",
    "temperature": "number",
    "top_k": "int",
    "top_p": "number",
    "min_p": "number",
    "repetition_penalty": "number",
    "presence_penalty": "number",
    "frequency_penalty": "number",
    "logit_bias": "bias?",
    "seed": "int?",
    "max_tokens": "int?",
    "min_tokens": "int",
    "stop": "texts?",
    "stop_token_ids": "ints?",
    "ignore_eos": "bool",
    "logprobs": "int?",
    "prompt_logprobs": "int?",
    "include_stop_str_in_output": "bool",
    "skip_special_tokens": "bool",
}


def check_parameter(name: str, value: Any) -> Any:
    """A sampling parameter given as JSON, as SamplingParams takes it.

    Raises ValueError for a name that does not exist and for a value of another type.
    """
    if name not in PARAMETERS:
        raise ValueError(
            f"there is no sampling parameter {name!r}: the parameters are {', '.join(PARAMETERS)}"
        )
    kind = PARAMETERS[name]
    check, wanted = _KINDS[kind.rstrip("?")]
    if value is None and kind.endswith("?"):
        return None
    if not check(value):
        or_none = " or none" if kind.endswith("?") else ""
        raise ValueError(f"{name} must be {wanted}{or_none}, not {json.dumps(value)}")
    return {int(k): v for k, v in value.items()} if kind == "bias?" and value else value


def read_parameter(name: str, text: str) -> Any:
    """A sampling parameter as a person types it: `0.7`, `none`, `true`, `["\\n"]` or plain text.

    Raises ValueError as `check_parameter`.
    """
    name = name.replace("-", "_")
    if text.lower() == "none":
        return check_parameter(name, None)
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    if PARAMETERS.get(name) == "texts?" and not isinstance(value, (str, list)):
        value = text  # a stop string like 42
    return check_parameter(name, value)


def sampling_overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling parameters that were given on the command line, checked for their types."""
    return {
        name: check_parameter(name, getattr(args, name))
        for name in PARAMETERS
        if getattr(args, name, None) is not None
    }


# --- options -------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse with minigen's way of saying what is wrong."""

    def error(self, message: str) -> NoReturn:
        print(f"minigen: {message} (see `{self.prog} --help`)", file=sys.stderr)
        raise SystemExit(EXIT_USAGE)


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, not {text!r}")
    return int(text)


def _bias(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f'must be JSON such as {{"42": -1.5}}, not {text!r}'
        ) from None


def add_engine_options(parser: argparse.ArgumentParser, default_model: str | None = None) -> None:
    """The options of the model and how it runs; the help names `default_model`, if there is one."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="PATH_OR_HUB_ID",
        help="a directory in Hugging Face layout, or a hub name such as "
        "HuggingFaceTB/SmolLM2-135M-Instruct"
        + (f"; by default {default_model}, which comes with minigen" if default_model else ""),
    )
    group.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "float16", "bfloat16"],
        help="auto: the checkpoint's own",
    )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    group.add_argument(
        "--compile",
        default="default",
        choices=["eager", "default", "reduce-overhead", "max-autotune"],
        help="torch.compile's mode; eager compiles nothing",
    )
    group.add_argument(
        "--decode-graphs",
        action=argparse.BooleanOptionalAction,
        help="replay decode steps from CUDA graphs; by default on a GPU with --compile default",
    )
    group.add_argument(
        "--max-model-len",
        type=positive,
        metavar="N",
        help="tokens of prompt and reply together; by default what the model was made for",
    )


def add_sampling_options(
    parser: argparse.ArgumentParser, max_tokens: str, many: bool = False
) -> None:
    """Options named as vLLM's; with `many` those too that make no sense for a single reply."""
    group = parser.add_argument_group(
        "sampling", "what is not given comes from the model's generation_config.json"
    )
    add = group.add_argument
    add("--temperature", type=float, metavar="X", help="0: always the likeliest token")
    add("--top-k", type=int, metavar="K", help="only the K likeliest tokens; 0: all")
    add("--top-p", type=float, metavar="P", help="only the likeliest tokens that make up P")
    add("--min-p", type=float, metavar="P", help="only tokens above P times the likeliest")
    add("--repetition-penalty", type=float, metavar="X", help="above 1: repeat less")
    add("--presence-penalty", type=float, metavar="X", help="above 0: repeat less")
    add("--frequency-penalty", type=float, metavar="X", help="above 0: repeat often less")
    add("--logit-bias", type=_bias, metavar="JSON", help='added to logits, {"TOKEN_ID": X}')
    add("--seed", type=int, metavar="N", help="the same seed gives the same text")
    add("--max-tokens", type=int, metavar="N", help=f"longest reply; default: {max_tokens}")
    add("--min-tokens", type=int, metavar="N", help="no end before that many tokens")
    add("--stop", action="append", metavar="TEXT", help="end before this text; repeatable")
    add("--stop-token-ids", action="append", type=int, metavar="ID", help="repeatable")
    add("--ignore-eos", action="store_true", default=None, help="go on after the end token")
    if not many:
        return
    add("--include-stop-str-in-output", action="store_true", default=None)
    add("--no-skip-special-tokens", dest="skip_special_tokens", action="store_false", default=None)
    add("--n", type=int, metavar="N", help="samples for each prompt")
    add("--logprobs", type=int, metavar="K", help="log-probabilities of the K likeliest tokens")
    add("--prompt-logprobs", type=int, metavar="K", help="the same for the prompt's tokens")


def load_llm(
    args: argparse.Namespace, config: dict[str, Any] | None = None, **options: Any
) -> "LLM":
    """The LLM that the options describe, with random weights where a `config` is given.

    Raises ValueError (as CheckpointError) or OSError.
    """
    from minigen.weights.hub import resolve_model

    # Before the seconds that torch takes.
    path = resolve_model(args.model) if config is None else None
    from minigen.llm import LLM

    # torch 2.13 warns its own jagged tensors about a rename; a user can do nothing about it.
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    warnings.showwarning = _show_warning
    make = partial(LLM, path) if config is None else partial(LLM.from_config, config)
    llm = make(
        dtype=args.dtype,
        device=args.device,
        compile=args.compile,
        decode_graphs=args.decode_graphs,
        max_model_len=args.max_model_len,
        progress=sys.stderr is not None and sys.stderr.isatty(),
        **options,
    )
    start.resume_collection()
    return llm


def _show_warning(message: Warning | str, *where: Any, **options: Any) -> None:
    """A warning is for the user, who has no use for a file of the program and a line of it."""
    print(f"minigen: {' '.join(str(message).split())}", file=sys.stderr)


# --- Ctrl-C, files, terminals --------------------------------------------------------------------


class Interrupt:
    """While active, the first Ctrl-C only sets `requested`; the second raises KeyboardInterrupt.

    A step of the engine is thus never torn apart: who runs it looks at `requested` between steps.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "Interrupt":
        self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


def write_atomically(path: Path, text: str) -> None:
    """Replace a file as a whole: a reader, or a crash, sees the old or the new one.

    Raises OSError with the file's name, not that of the temporary one.
    """
    try:
        _write_and_rename(path, text)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _write_and_rename(path: Path, text: str) -> None:
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes a private file; a replaced one keeps its mode, a new one gets the usual.
        try:
            mode = path.stat().st_mode & 0o777
        except FileNotFoundError:
            umask = os.umask(0)
            os.umask(umask)
            mode = 0o666 & ~umask
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and not stream.closed and stream.isatty()


def one_line(error: BaseException) -> str:
    """The message of an error as one sentence; an OSError's names its file."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    text = " ".join(str(error).split())
    if isinstance(error, (ValueError, RuntimeError)) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
