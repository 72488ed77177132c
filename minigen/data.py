"""Training data: JSONL files of texts and conversations, read, split and turned into token ids.

Shape suffixes: N samples, N1 = N + 1, T tokens of all samples of a file, end to end.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import lzma
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minigen import pool
from minigen.tokenizing import Settings, Tokens, parse_line, tokenize_lines
from minigen.weights.tokenizer import Tokenizer

OVERLONG = ("split", "drop")
# Part of every cache file's name: to be raised when the same input would give other tokens.
_VERSION = 1
# What a process gets at a time: 0.1 to 0.2 s of work, which Ctrl-C and the bar wait for.
CHUNK_BYTES = 128 << 10
# Fewer of them, 4 MB of lines and 4 s of work, are tokenized here: other processes begin 0.24 s
# later, with a tokenizer of 11 MB 1.4 s, and three times that on a busy machine.
SMALL_CHUNKS = 32
# 36 MB each, and more with a large tokenizer; one process hands out and collects.
MOST_PROCESSES = 16


@dataclass(frozen=True)
class Source:
    """A file of `--data`: an epoch takes each of its samples `weight` times."""

    path: Path
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Source:
        """`path` or `path:weight`. Raises ValueError for a weight that is not above 0."""
        head, colon, tail = text.rpartition(":")
        if not colon or Path(text).exists():
            return cls(Path(text))
        try:
            weight = float(tail)
        except ValueError:
            return cls(Path(text))
        if not 0 < weight < 1e6:
            raise ValueError(f"--data {text}: the weight must be a number above 0, not {tail}")
        return cls(Path(head), weight)


@dataclass(frozen=True)
class Samples:
    """The samples of one file: sample i is `tokens_T[starts_N1[i] : starts_N1[i + 1]]`.

    targets_T marks the tokens that the loss counts; never the first of a sample, which nothing
    stands before. `counts` says what became of the lines: `items`, `dropped`, `split`, `unlike`.
    """

    tokens_T: Tensor  # int32
    targets_T: Tensor  # bool
    starts_N1: Tensor  # int64
    held_out_N: Tensor  # bool
    counts: dict[str, int]

    def __len__(self) -> int:
        return len(self.held_out_N)

    def lengths_N(self) -> Tensor:
        return self.starts_N1.diff()

    def num_targets_N(self) -> Tensor:
        total_T1 = torch.cat([torch.zeros(1, dtype=torch.int64), self.targets_T.cumsum(0)])
        return total_T1[self.starts_N1].diff()


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line that is not empty; `.xz` files are unpacked.

    Raises ValueError naming file and line, OSError if the file cannot be read.
    """
    for number, line in enumerate(read_lines(path), start=1):
        if line.strip():
            yield number, parse_line(path, number, line)


def read_lines(path: Path, read: Callable[[int], object] = lambda _: None) -> Iterator[bytes]:
    """Each line of a file, unpacked if it is `.xz`.

    `read` hears of the file's bytes as they are taken: how many since the last time.

    Raises ValueError for a torn `.xz` file, OSError if the file cannot be read.
    """
    with path.open("rb") as file, lzma.open(file) if path.suffix == ".xz" else file as stream:
        lines, taken = iter(stream), 0
        while True:
            try:
                line = next(lines)
            except StopIteration:
                return
            except (lzma.LZMAError, EOFError) as error:
                raise ValueError(f"{path} is not a whole xz file: {error}") from None
            if (at := file.tell()) > taken:
                read(at - taken)
                taken = at
            yield line


class _Chunk(NamedTuple):
    """Lines of a file, the number of the first, the file's bytes taken for them, what came then."""

    first: int
    lines: list[bytes]
    taken: int
    failure: Exception | None = None


def _read_chunks(path: Path) -> Iterator[_Chunk]:
    first, lines, size, taken, failure = 1, [], 0, 0, None

    def count(new: int) -> None:
        nonlocal taken
        taken += new

    try:
        for line in read_lines(path, count):
            lines.append(line)
            size += len(line)
            if size >= CHUNK_BYTES:
                yield _Chunk(first, lines, taken)
                first, lines, size, taken = first + len(lines), [], 0, 0
    except (ValueError, OSError) as error:
        failure = error  # the lines before it come first, as one of them may be no sample
    yield _Chunk(first, lines, taken, failure)


def read_samples(
    path: Path,
    tokenizer: Tokenizer,
    settings: Settings,
    read: Callable[[int], object] = lambda _: None,
    processes: int | None = None,
) -> Samples:
    """Reads, tokenizes and cuts the samples of one file; `read` as for `read_lines`.

    `processes` tokenize: by default one for each core if the file is large, else this one alone.
    More than one read the tokenizer's files, too.

    Raises ValueError, naming file and line, for a line that is no sample, a conversation that the
    chat template refuses, and a file that gives no target tokens at all; OSError; RuntimeError if
    a process is killed.
    """
    chunks = _read_chunks(path)
    begin = list(itertools.islice(chunks, SMALL_CHUNKS + 1))
    if processes is None:
        divides = len(begin) > SMALL_CHUNKS and tokenizer.directory is not None
        processes = min(pool.cores(), MOST_PROCESSES) if divides else 1
    sent: deque[_Chunk] = deque()

    def calls() -> Iterator[tuple[int, list[bytes]]]:
        for chunk in itertools.chain(begin, chunks):
            sent.append(chunk)
            yield chunk.first, chunk.lines

    found = Tokens()
    work = functools.partial(tokenize_lines, path, tokenizer, settings)
    with contextlib.closing(pool.in_order(work, calls(), processes)) as parts:
        for part in parts:
            chunk = sent.popleft()
            if chunk.failure is not None:
                raise chunk.failure
            read(chunk.taken)
            found.extend(part)
    if not found.lengths:
        raise ValueError(_why_nothing(path, found.counts, settings))
    ends_N = torch.frombuffer(found.lengths, dtype=torch.int64).cumsum(0)
    return Samples(
        torch.frombuffer(found.ids, dtype=torch.int32),
        torch.frombuffer(found.targets, dtype=torch.bool),
        torch.cat([torch.zeros(1, dtype=torch.int64), ends_N]),
        torch.frombuffer(found.held_out, dtype=torch.bool),
        dict(found.counts),
    )


def _why_nothing(path: Path, counts: Counter[str], settings: Settings) -> str:
    if not counts["items"]:
        return f"{path} holds no samples: give a file with one JSON object a line"
    reason = "no assistant's turn and no text of two tokens or more"
    if counts["unlike"]:
        reason = (
            f"{counts['unlike']} assistant turns that the chat template renders otherwise in a "
            "conversation than after its generation prompt"
        )
    elif settings.overlong == "drop":
        reason += f", or only such above {settings.max_length} tokens"
    return f"{path} gives no target tokens: its {counts['items']} samples have {reason}"


# --- kept on disk --------------------------------------------------------------------------------


def fingerprint(sources: Sequence[Source], tokenizer_dir: Path, settings: Settings) -> list[str]:
    """For each file a digest of all that its samples depend on. Raises OSError."""
    shared = hashlib.sha256(f"{_VERSION} {settings}".encode())
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shared.update(_bytes(tokenizer_dir / name))
    for file in sorted(tokenizer_dir.glob("**/*.jinja")):
        shared.update(_bytes(file))
    digests = []
    for source in sources:
        digest = shared.copy()
        with source.path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
        digests.append(digest.hexdigest()[:16])
    return digests


def _bytes(file: Path) -> bytes:
    content = file.read_bytes() if file.exists() else b""
    return f"{file.name} {len(content)} ".encode() + content


def save_samples(samples: Samples, file: Path) -> None:
    """Writes a file of `load_samples` as a whole. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.partial")
    tensors = {
        "tokens": samples.tokens_T,
        "targets": samples.targets_T,
        "starts": samples.starts_N1,
        "held_out": samples.held_out_N,
    }
    counts = {name: str(count) for name, count in samples.counts.items()}
    try:
        save_file(tensors, temporary, counts)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def load_samples(file: Path) -> Samples | None:
    """What `save_samples` wrote there; None if it is absent or damaged."""
    try:
        with safe_open(file, "pt") as stored:
            return Samples(
                stored.get_tensor("tokens"),
                stored.get_tensor("targets"),
                stored.get_tensor("starts"),
                stored.get_tensor("held_out"),
                {name: int(count) for name, count in stored.metadata().items()},
            )
    except (OSError, SafetensorError):
        return None
