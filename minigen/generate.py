"""`python -m minigen generate`: many prompts at once, from a file to a file that can be resumed.

The input is never held in memory but read anew: to check all of it, to check parameters of lines
against the loaded model, to run it. The output is append-only, one whole line a result, so that a
run can be stopped anywhere.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from minigen import cli
from minigen.weights.fingerprint import fingerprint

if TYPE_CHECKING:
    from minigen.llm import LLM
    from minigen.outputs import CompletionOutput, Logprob, RequestOutput
    from minigen.sampling_params import SamplingParams

DEFAULT_MAX_TOKENS = 256
# Requests handed to the engine at once: enough that a finished one is replaced within the step,
# few enough that an input of any size takes no memory.
MAX_QUEUED = 512
PROMPT_FIELDS = ("prompt", "prompt_token_ids", "messages")
LINE_START = b'{"id": '  # of every result
SETTINGS_SUFFIX = ".settings.json"
RequestId = str | int
Digests = dict[RequestId, str]


def run(args: argparse.Namespace) -> int:
    """Do what the options say. Returns the exit code; raises ValueError or OSError."""
    if args.prompt and args.input:
        raise ValueError("--prompt and --input both say what to generate: give one of them")
    if not args.prompt and not (args.input and args.output):
        raise ValueError(
            "there is nothing to generate: give --prompt TEXT, or --input FILE with --output FILE"
        )
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(args, name) is not None and not args.output:
            raise ValueError(
                f"--{name.replace('_', '-')} has no place in texts that are printed: give --output "
                "FILE, too"
            )
    from minigen.sampling_params import SamplingParams

    overrides = {"max_tokens": DEFAULT_MAX_TOKENS, **cli.sampling_overrides(args)}
    SamplingParams(**overrides)  # refused before a model is loaded
    return _run_file(args, overrides) if args.output else _print_texts(args, overrides)


def _print_texts(args: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from minigen.weights.hub import resolve_model

    if sys.stdout is None or sys.stdout.closed:
        raise ValueError("standard output is closed: --prompt prints texts to it")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    args.model = str(resolve_model(args.model))
    llm = cli.load_llm(args)
    if llm.tokenizer is None:
        raise ValueError(
            "this model has no tokenizer.json: give token ids with --input instead of --prompt"
        )
    params = llm.default_params(**overrides)
    _check_for_model(llm, params)
    requests = _given_requests(args.prompt)
    results: dict[RequestId, dict[str, Any]] = {}
    with cli.Interrupt() as interrupt, _progress(len(requests), 0) as progress:
        for result in _results(llm, params, iter(requests), interrupt, progress):
            results[result["id"]] = result
    # In the order given, as far as they came.
    for request in requests:
        result = results.get(request.id, {})
        for output in result.get("outputs", [result]):
            if "text" in output:
                print(output["text"])
    sys.stdout.flush()
    errors = [result["error"] for result in results.values() if "error" in result]
    for error in errors:
        print(f"minigen: {error}", file=sys.stderr)
    if interrupt.requested:
        return cli.EXIT_INTERRUPTED
    return cli.EXIT_USAGE if errors else cli.EXIT_OK


def _run_file(args: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from minigen.weights.hub import resolve_model

    source, target = Path(args.input) if args.input else None, Path(args.output)
    if source is not None and source.exists() and not source.is_file():
        raise ValueError(f"{source} is no regular file: the input is read more than once")
    if target.exists() and not target.is_file():
        raise ValueError(f"{target} is no regular file: results are appended to one")
    if source is not None and target.exists() and target.samefile(source):
        raise ValueError(f"{source} is both --input and --output")
    given = _given_requests(args.prompt or [])
    if source is None:
        digests = {request.id: request.sha256 for request in given}
        first_line_of = {"prompt": 1}
    else:
        digests, first_line_of = check_input(source, overrides)
    where = "--prompt" if source is None else str(source)
    args.model = str(resolve_model(args.model))

    with _Results(target) as results:
        done = results.done(where, digests)
        llm = cli.load_llm(args)
        _check_tokenizer(llm, where, first_line_of)
        params = llm.default_params(**overrides)
        _check_for_model(llm, params)
        if source is not None and "params" in first_line_of:
            _check_lines_for_model(llm, params, source)
        results.claim(_settings(llm, args, params))
        # Engine errors in one line are results; what breaks here, breaks the run.
        requests = iter(given) if source is None else read_requests(source)
        todo = (request for request in requests if request.id not in done)
        with (
            cli.Interrupt() as interrupt,
            _progress(len(digests), len(done)) as progress,
        ):
            for result in _results(llm, params, todo, interrupt, progress):
                results.append(result)
                done.add(result["id"])
    so_far = f"{len(done)} of {len(digests)} results are in {target}"
    if interrupt.requested:
        print(f"minigen: stopped: {so_far}; the same command continues from there", file=sys.stderr)
        return cli.EXIT_INTERRUPTED
    if results.num_errors:
        so_far += f", {results.num_errors} of them with an error"
    print(f"minigen: {so_far} ({progress.rate:.1f} tokens/s)", file=sys.stderr)
    return cli.EXIT_USAGE if results.num_errors else cli.EXIT_OK


# --- input ---------------------------------------------------------------------------------------


@dataclasses.dataclass
class Request:
    """A line of the input: `fields` as they stand there, `sha256` of the line's bytes."""

    id: RequestId
    fields: dict[str, Any]
    sha256: str

    @property
    def kind(self) -> str:
        return next(name for name in PROMPT_FIELDS if name in self.fields)


def check_input(file: Path, overrides: Mapping[str, Any]) -> tuple[Digests, dict[str, int]]:
    """Read the whole input and raise ValueError, naming file and line, for the first bad line.

    Returns {id: digest of its line} and, for each field, the first line that has it.
    """
    digests: Digests = {}
    lines: dict[RequestId, int] = {}
    first_line_of: dict[str, int] = {}
    for number, request in _numbered_requests(file):
        if request.id in lines:
            raise ValueError(
                f"{file}:{number}: the id {json.dumps(request.id)} is taken by line "
                f"{lines[request.id]}: give every line its own (without one it is the line number)"
            )
        try:
            _check_params(request.fields.get("params", {}), overrides)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file}:{number}: {error}") from None
        lines[request.id] = number
        digests[request.id] = request.sha256
        for field in request.fields:
            first_line_of.setdefault(field, number)
    if not digests:
        raise ValueError(f"{file} holds no request")
    return digests, first_line_of


def read_requests(file: Path) -> Iterator[Request]:
    """The requests of an input that was checked. ValueError if it no longer is what it was."""
    return (request for _, request in _numbered_requests(file))


def _given_requests(prompts: Sequence[str]) -> list[Request]:
    """The requests that as many lines with nothing but a prompt would make."""
    lines = (json.dumps({"prompt": prompt}).encode() for prompt in prompts)
    return [_parse_request(number, line) for number, line in enumerate(lines, start=1)]


def _numbered_requests(file: Path) -> Iterator[tuple[int, Request]]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                try:
                    yield number, _parse_request(number, line)
                except ValueError as error:
                    raise ValueError(f"{file}:{number}: {error}") from None


def _parse_request(number: int, line: bytes) -> Request:
    try:
        fields = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"the line is not UTF-8 (byte {error.start + 1})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"the line is not JSON (column {error.colno}: {error.msg})") from None
    except RecursionError:
        raise ValueError("the line is nested too deeply") from None
    if not isinstance(fields, dict):
        raise ValueError('the line must be an object such as {"prompt": "Once upon a time"}')
    if unknown := fields.keys() - {"id", "params", *PROMPT_FIELDS}:
        raise ValueError(
            f"unknown field {sorted(unknown)[0]!r}: a line has id, params and one of "
            f"{', '.join(PROMPT_FIELDS)}"
        )
    given = [name for name in PROMPT_FIELDS if name in fields]
    if len(given) != 1:
        raise ValueError(
            f"a line has exactly one of {', '.join(PROMPT_FIELDS)}, this one has "
            f"{' and '.join(given) or 'none'}"
        )
    request_id = fields.get("id", number)
    if isinstance(request_id, bool) or not isinstance(request_id, (str, int)):
        raise ValueError(f"id must be a text or a whole number, not {json.dumps(request_id)}")
    if not isinstance(fields.get("params", {}), dict):
        raise ValueError('params must be an object such as {"temperature": 0}')
    _check_prompt(given[0], fields[given[0]])
    return Request(request_id, fields, hashlib.sha256(line.strip()).hexdigest()[:16])


def _check_prompt(kind: str, value: Any) -> None:
    if kind == "prompt" and not isinstance(value, str):
        raise ValueError(f"prompt must be a text, not {type(value).__name__}")
    if kind == "prompt_token_ids" and not (
        isinstance(value, list)
        and value
        and all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value)
    ):
        raise ValueError("prompt_token_ids must be a list of one or more token ids")
    if kind == "messages" and not (
        isinstance(value, list)
        and value
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value)
    ):
        raise ValueError('messages must be a list of objects such as {"role": …, "content": …}')


def _check_params(params: Mapping[str, Any], overrides: Mapping[str, Any]) -> None:
    from minigen.sampling_params import SamplingParams

    SamplingParams(**{**overrides, **_parameters(params)})


def _parameters(params: Mapping[str, Any]) -> dict[str, Any]:
    return {name: cli.check_parameter(name, value) for name, value in params.items()}


def _check_for_model(llm: "LLM", params: "SamplingParams") -> None:
    """Raise ValueError for parameters that this model can serve for no prompt at all."""
    params.check_vocabulary(llm.config.vocab_size)
    if params.stop and llm.tokenizer is None:
        raise ValueError("stop strings need a tokenizer, and this model has no tokenizer.json")


def _check_lines_for_model(llm: "LLM", params: "SamplingParams", file: Path) -> None:
    """The same for the parameters of each line, over the model's own defaults."""
    for number, request in _numbered_requests(file):
        try:
            _check_for_model(llm, _params_of(request, params))
        except ValueError as error:
            raise ValueError(f"{file}:{number}: {error}") from None


def _params_of(request: Request, params: "SamplingParams") -> "SamplingParams":
    return dataclasses.replace(params, **_parameters(request.fields.get("params", {})))


def _check_tokenizer(llm: "LLM", where: str, first_line_of: Mapping[str, int]) -> None:
    """A model that cannot take a kind of prompt at all is refused, not written into every line."""
    tokenizer = llm.tokenizer
    if tokenizer is None:
        for kind in ("prompt", "messages"):
            if kind in first_line_of:
                raise ValueError(
                    f"{where}:{first_line_of[kind]}: this model has no tokenizer.json, so it takes "
                    f"prompt_token_ids only, not {kind}"
                )
    elif "messages" in first_line_of and not tokenizer.has_chat_template:
        raise ValueError(
            f"{where}:{first_line_of['messages']}: this model has no chat template, so it takes no "
            "messages"
        )


# --- running -------------------------------------------------------------------------------------


def _results(
    llm: "LLM",
    params: "SamplingParams",
    requests: Iterator[Request],
    interrupt: cli.Interrupt,
    progress: "_Progress",
) -> Iterator[dict[str, Any]]:
    """The results of requests as they finish, until all are done or Ctrl-C."""
    engine = llm.engine
    running: dict[str, Request] = {}
    num_added, exhausted = 0, False
    try:
        while not interrupt.requested:
            while not exhausted and len(running) < MAX_QUEUED and not interrupt.requested:
                request = next(requests, None)
                if request is None:
                    exhausted = True
                    break
                # Ids of the input may be texts and numbers; the engine's are texts of their own.
                engine_id, num_added = f"generate-{num_added}", num_added + 1
                try:
                    prompt, own = _prompt(llm, request), _params_of(request, params)
                    if own.seed is None:
                        own = dataclasses.replace(own, seed=_seed(request.id))
                    engine.add_request(engine_id, prompt, own)
                except ValueError as error:
                    progress.finished()
                    yield _result(request, error=cli.one_line(error))
                else:
                    running[engine_id] = request
            if not running:
                return
            # To be told of the others, too, is to decode every token by itself: 11 us each.
            outputs = engine.step(only_finished=True)
            progress.tokens(engine.stats.num_output_tokens)
            for output in outputs:
                request = running.pop(output.request_id, None)
                if request is not None:
                    progress.finished()
                    yield _result(request, output)
    finally:
        for engine_id in running:
            engine.abort(engine_id)


def _seed(request_id: RequestId) -> int:
    """A seed of its own for each id: the engine would begin its order of seeds anew when a run is
    continued, and later lines would draw as the first ones did."""
    digest = hashlib.sha256(json.dumps(request_id).encode()).digest()
    return int.from_bytes(digest[:8]) >> 1  # 63 bits: not negative


def _prompt(llm: "LLM", request: Request) -> str | list[int]:
    value = request.fields[request.kind]
    if request.kind == "messages":
        assert llm.tokenizer is not None  # _check_tokenizer refused the input otherwise
        return llm.tokenizer.chat_tokens(value)
    return value


# --- results -------------------------------------------------------------------------------------


def _result(
    request: Request, output: "RequestOutput | None" = None, error: str | None = None
) -> dict[str, Any]:
    """A line of the output, as `generate --help` describes it."""
    result: dict[str, Any] = {"id": request.id, "input_sha256": request.sha256}
    if output is None:
        return {**result, "error": error}
    samples = [_sample(sample) for sample in output.outputs]
    result.update(samples[0])
    if len(samples) > 1:
        result["outputs"] = samples
    if output.prompt_logprobs is not None:
        result["prompt_logprobs"] = _logprobs(output.prompt_logprobs)
    metrics = output.metrics
    result["num_prompt_tokens"] = len(output.prompt_token_ids)
    result["num_cached_tokens"] = metrics.num_cached_tokens
    result["timings"] = {
        "first_token_s": _seconds(metrics.arrival_time, metrics.first_token_time),
        "total_s": _seconds(metrics.arrival_time, metrics.finished_time),
    }
    return result


def _sample(sample: "CompletionOutput") -> dict[str, Any]:
    return {
        "text": sample.text,
        "token_ids": list(sample.token_ids),
        "finish_reason": sample.finish_reason,
        "stop_reason": sample.stop_reason,
        "cumulative_logprob": _finite(sample.cumulative_logprob),
        "logprobs": None if sample.logprobs is None else _logprobs(sample.logprobs),
    }


def _logprobs(positions: "list[Any]") -> list[dict[str, dict[str, Any]] | None]:
    def entry(logprob: "Logprob") -> dict[str, Any]:
        return {
            "logprob": _finite(logprob.logprob),
            "rank": logprob.rank,
            "decoded_token": logprob.decoded_token,
        }

    return [
        None if position is None else {str(i): entry(logprob) for i, logprob in position.items()}
        for position in positions
    ]


def _finite(value: float | None) -> float | None:
    # JSON has no infinity; a token that a filter removed has the log-probability -inf.
    return value if value is not None and math.isfinite(value) else None


def _seconds(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else round(end - start, 6)


class _Results:
    """The output file: open for appending, locked against a second run, whole lines only."""

    def __init__(self, file: Path):
        self._file = file
        self._settings_file = file.with_name(file.name + SETTINGS_SUFFIX)
        self._wrote_settings = False
        self.num_errors = 0

    def __enter__(self) -> "_Results":
        existed = self._file.exists()
        self._stream: BinaryIO = self._file.open("a+b")
        self._remove_if_empty = not existed
        try:
            _lock(self._stream, self._file)
        except BaseException:
            self._stream.close()
            raise
        return self

    def __exit__(self, *exc: object) -> Literal[False]:
        empty = self._stream.seek(0, os.SEEK_END) == 0
        if not empty:
            os.fsync(self._stream.fileno())
        elif self._remove_if_empty and exc[0] is not None:
            # What was refused leaves no trace.
            self._file.unlink(missing_ok=True)
            if self._wrote_settings:
                self._settings_file.unlink(missing_ok=True)
        self._stream.close()
        return False

    def done(self, source: str, digests: Digests) -> set[RequestId]:
        """Ids of the results that are there already, after a torn last line was dropped.

        Raises ValueError if they are not results of this input.
        """
        done: set[RequestId] = set()
        if self._stream.seek(0, os.SEEK_END) and not self._settings_file.exists():
            raise ValueError(
                f"{self._file} is not empty, and no {self._settings_file.name} beside it says how "
                "it was made: give another --output"
            )
        self._stream.seek(0)
        end = 0
        for number, line in enumerate(self._stream, start=1):
            if not line.endswith(b"\n") and line.startswith(LINE_START[: len(line)]):
                self._stream.truncate(end)
                break
            end += len(line)
            where = f"{self._file}:{number}"
            try:
                result = json.loads(line)
                request_id, digest = result["id"], result["input_sha256"]
                known = request_id in digests
                is_error = "error" in result
            except (ValueError, TypeError, KeyError):
                raise ValueError(
                    f"{where}: the line is no result of generate: give another --output"
                ) from None
            if request_id in done:
                raise ValueError(f"{where}: a second result for {json.dumps(request_id)}")
            if not known or digests[request_id] != digest:
                what = "is not in" if not known else "is another request in"
                raise ValueError(
                    f"{where}: {json.dumps(request_id)} {what} {source} now: to continue give the "
                    "input as it was (lines may be added), to begin anew give another --output"
                )
            done.add(request_id)
            self.num_errors += is_error
        return done

    def claim(self, settings: dict[str, Any]) -> None:
        """Keep the settings beside the output; ValueError if those kept there are others."""
        if self._stream.seek(0, os.SEEK_END) == 0:
            text = json.dumps(settings, ensure_ascii=False, indent=2, sort_keys=True)
            cli.write_atomically(self._settings_file, text + "\n")
            self._wrote_settings = True
            return
        try:
            kept = json.loads(self._settings_file.read_text(encoding="utf-8"))
        except ValueError:
            kept = None
        if not isinstance(kept, dict):
            raise ValueError(f"{self._settings_file} is damaged: give another --output")
        kept, settings = _flat(kept), _flat(json.loads(json.dumps(settings)))
        for name in sorted(kept.keys() | settings.keys()):
            if kept.get(name) != settings.get(name):
                raise ValueError(
                    f"{self._file} was begun with {name} = {json.dumps(kept.get(name))}, now it is "
                    f"{json.dumps(settings.get(name))}: continue with the former, or give another "
                    "--output"
                )

    def append(self, result: dict[str, Any]) -> None:
        try:
            data = json.dumps(result, ensure_ascii=False, allow_nan=False).encode("utf-8")
        except UnicodeEncodeError:  # a lone surrogate is no UTF-8, but JSON has an escape for it
            data = json.dumps(result, allow_nan=False).encode("ascii")
        self._stream.write(data + b"\n")
        self._stream.flush()
        self.num_errors += "error" in result


def _lock(stream: BinaryIO, file: Path) -> None:
    """Two runs on one output would each write what the other has: the second is refused."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{file} is being written by another run") from None


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def _settings(llm: "LLM", args: argparse.Namespace, params: "SamplingParams") -> dict[str, Any]:
    """What decides the results, the input's lines aside (each result has the digest of its own)."""
    return {
        "model": fingerprint(Path(args.model)),
        "dtype": args.dtype,
        "max_model_len": llm.max_model_len,
        "sampling": dataclasses.asdict(params),
    }


# --- progress ------------------------------------------------------------------------------------


class _Progress:
    """A bar on standard error, where that is a terminal, with the tokens of each second."""

    def __init__(self, total: int, initial: int):
        from tqdm import tqdm

        self._bar = tqdm(
            total=total,
            initial=initial,
            unit="prompt",
            dynamic_ncols=True,
            disable=not cli.is_terminal(sys.stderr),
        )
        self._num_tokens = 0
        self._start: float | None = None

    @property
    def rate(self) -> float:
        if self._start is None:
            return 0.0
        return self._num_tokens / max(time.perf_counter() - self._start, 1e-9)

    def tokens(self, num_tokens: int) -> None:
        """Takes how many have been drawn so far."""
        if num_tokens:
            self._start = self._start or time.perf_counter()
        self._num_tokens = num_tokens
        self._bar.set_postfix_str(f"{self.rate:.0f} tokens/s", refresh=False)
        self._bar.update(0)

    def finished(self) -> None:
        self._bar.update(1)

    def close(self) -> None:
        self._bar.close()


@contextlib.contextmanager
def _progress(total: int, initial: int) -> Iterator[_Progress]:
    progress = _Progress(total, initial)
    try:
        yield progress
    finally:
        progress.close()
