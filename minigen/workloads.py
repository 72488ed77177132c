"""The requests of benchmarks. Plain data, no tensor."""

import csv
import lzma
import math
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

NANO_REQUESTS = 256
TRACE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True)
class Request:
    """Token ids, how many follow, and when it comes (seconds after the first)."""

    prompt: list[int]
    max_tokens: int
    arrival_s: float = 0.0


@dataclass(frozen=True)
class TraceRow:
    """One request of a trace; `arrival_s` is seconds after the first."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int


def check_nano(num_requests: int) -> None:
    """Raises ValueError for a number of requests that `nano` has not."""
    if not 1 <= num_requests <= NANO_REQUESTS:
        raise ValueError(f"nano has 1 to {NANO_REQUESTS} requests, not {num_requests}")


def nano(num_requests: int, vocab_size: int) -> list[Request]:
    """nano-vllm's benchmark: 256 random prompts of 100 to 1,024 tokens, as many tokens to follow.

    Fewer requests are the first ones of these. A vocabulary below 10,001 words wraps the ids round.

    Raises ValueError for a number of requests that is not 1 to 256.
    """
    check_nano(num_requests)
    rng = random.Random(0)
    prompts = [
        [rng.randint(0, 10000) for _ in range(rng.randint(100, 1024))] for _ in range(NANO_REQUESTS)
    ]
    lengths = [rng.randint(100, 1024) for _ in range(NANO_REQUESTS)]
    chosen = zip(prompts[:num_requests], lengths, strict=False)
    return [Request([token % vocab_size for token in prompt], count) for prompt, count in chosen]


def fixed(
    batch: int, input_len: int, output_len: int, vocab_size: int, seed: int = 0
) -> list[Request]:
    """`batch` random prompts of one length."""
    return from_lengths([input_len] * batch, output_len, vocab_size, seed)


def from_lengths(
    lengths: Sequence[int], output_len: int, vocab_size: int, seed: int = 0
) -> list[Request]:
    """Random prompts of these lengths."""
    rng = random.Random(seed)
    return [Request(_tokens(rng, length, vocab_size), output_len) for length in lengths]


def _tokens(rng: random.Random, length: int, vocab_size: int) -> list[int]:
    return [rng.randrange(vocab_size) for _ in range(length)]


def read_trace(path: str | Path) -> list[TraceRow]:
    """A CSV with the columns of the Azure LLM inference trace, `.xz` or plain, by arrival.

    TIMESTAMP is a date with time or a number of seconds (https://github.com/Azure/AzurePublicDataset).

    Raises:
        ValueError: no such columns, no row, or a row that is wrong, with its line.
        OSError: the file cannot be read.
    """
    path = Path(path)
    rows: list[TraceRow] = []
    try:
        with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            absent = [name for name in TRACE_COLUMNS if name not in (reader.fieldnames or ())]
            if absent:
                raise ValueError(
                    f"{path} has no column {absent[0]}: a trace has {', '.join(TRACE_COLUMNS)}"
                )
            for row in reader:
                where = f"{path}:{reader.line_num}"
                time, prompt, output = (row[name] or "" for name in TRACE_COLUMNS)
                rows.append(
                    TraceRow(
                        _time(time, where),
                        _count(prompt, TRACE_COLUMNS[1], where),
                        _count(output, TRACE_COLUMNS[2], where),
                    )
                )
    except (UnicodeDecodeError, csv.Error, lzma.LZMAError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is no readable CSV: {error}") from None
    if not rows:
        raise ValueError(f"{path} holds no request")
    rows.sort(key=lambda row: row.arrival_s)
    start = rows[0].arrival_s
    return [TraceRow(r.arrival_s - start, r.prompt_tokens, r.output_tokens) for r in rows]


def _time(text: str, where: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = datetime.fromisoformat(text).timestamp()
        except ValueError:
            seconds = math.nan
    if not math.isfinite(seconds):
        raise ValueError(
            f"{where}: TIMESTAMP is {text!r}: a date with time or a number of seconds is needed"
        )
    return seconds


def _count(text: str, column: str, where: str) -> int:
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise ValueError(f"{where}: {column} is {text!r}: a whole number above 0 is needed")
    return int(text)


def replayed(
    rows: Sequence[TraceRow],
    *,
    num_requests: int | None,
    rate: float,
    vocab_size: int,
    max_model_len: int,
    seed: int = 0,
) -> tuple[list[Request], int]:
    """A trace's first requests with random tokens -> (requests, how many the context cannot hold).

    rate: how many times faster than recorded they come; infinite: all at once.
    """
    rng = random.Random(seed)
    requests, left_out = [], 0
    for row in rows[:num_requests]:
        if row.prompt_tokens + row.output_tokens > max_model_len:
            left_out += 1
            continue
        prompt = _tokens(rng, row.prompt_tokens, vocab_size)
        requests.append(Request(prompt, row.output_tokens, row.arrival_s / rate))
    return requests, left_out
