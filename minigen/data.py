"""Training data: JSONL files of texts and conversations, read, split and turned into token ids.

Shape suffixes: N samples, N1 = N + 1, T tokens of all samples of a file, end to end.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minigen.weights.tokenizer import Tokenizer

OVERLONG = ("split", "drop")
# Part of every cache file's name: to be raised when the same input would give other tokens.
_VERSION = 1


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
class Settings:
    """What decides the samples that a file gives.

    max_length: most tokens of a sample. overlong: "split" cuts a longer one into pieces, "drop"
    leaves it out. holdout: share of the samples that is held out, chosen by a hash of each.
    stop_ids: tokens at which a reply ends. assistant_only: of a conversation only what the
    assistant writes counts, else all of it.
    """

    max_length: int
    overlong: str = "split"
    holdout: float = 0.0
    stop_ids: tuple[int, ...] = ()
    assistant_only: bool = True


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


def read_jsonl(
    path: Path, read: Callable[[int], object] = lambda _: None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line that is not empty; `.xz` files are unpacked.

    `read` hears of the file's bytes as they are taken: how many since the last time.

    Raises ValueError naming file and line, OSError if the file cannot be read.
    """
    with path.open("rb") as file, lzma.open(file) if path.suffix == ".xz" else file as stream:
        lines, taken = enumerate(stream, start=1), 0
        while True:
            try:
                number, line = next(lines)
            except StopIteration:
                return
            except (lzma.LZMAError, EOFError) as error:
                raise ValueError(f"{path} is not a whole xz file: {error}") from None
            if (at := file.tell()) > taken:
                read(at - taken)
                taken = at
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}:{number}: the line is not valid JSON: {error}") from None
            if not isinstance(value, dict):
                raise ValueError(f"{path}:{number}: the line must be a JSON object")
            yield number, value


def is_held_out(item: dict[str, Any], share: float) -> bool:
    """Whether a line belongs to the held-out split: the same text always does, in every file."""
    content = item["messages"] if "messages" in item else item["text"]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def read_samples(
    path: Path,
    tokenizer: Tokenizer,
    settings: Settings,
    read: Callable[[int], object] = lambda _: None,
) -> Samples:
    """Reads, tokenizes and cuts the samples of one file; `read` as for `read_jsonl`.

    Raises ValueError, naming file and line, for a line that is no sample, a conversation that the
    chat template refuses, and a file that gives no target tokens at all; OSError.
    """
    tokens: list[Tensor] = []
    targets: list[Tensor] = []
    held_out: list[bool] = []
    counts = Counter(items=0, dropped=0, split=0, unlike=0)
    for number, item in read_jsonl(path, read):
        try:
            ids, mask, unlike = _tokenize(item, tokenizer, settings)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        counts["items"] += 1
        counts["unlike"] += unlike
        pieces = _pieces(ids, mask, settings)
        counts["split"] += len(pieces) > 1
        pieces = [piece for piece in pieces if any(piece[1])]
        counts["dropped"] += not pieces
        for piece_ids, piece_mask in pieces:
            tokens.append(torch.tensor(piece_ids, dtype=torch.int32))
            targets.append(torch.tensor(piece_mask))
            held_out.append(is_held_out(item, settings.holdout))
    if not tokens:
        raise ValueError(_why_nothing(path, counts, settings))
    lengths_N = torch.tensor([len(ids) for ids in tokens])
    return Samples(
        torch.cat(tokens),
        torch.cat(targets),
        torch.cat([torch.zeros(1, dtype=torch.int64), lengths_N.cumsum(0)]),
        torch.tensor(held_out),
        dict(counts),
    )


def _tokenize(
    item: dict[str, Any], tokenizer: Tokenizer, settings: Settings
) -> tuple[list[int], list[bool], int]:
    """(ids, which of them count, assistant turns that cannot)."""
    if ("text" in item) == ("messages" in item):
        raise ValueError('the line must have either "text" or "messages"')
    if "messages" in item:
        messages = item["messages"]
        if not isinstance(messages, list) or not messages:
            raise ValueError('"messages" must be a list of objects with "role" and "content"')
        ids, mask, unlike = tokenizer.chat_tokens_and_targets(
            messages, settings.stop_ids, item.get("tools")
        )
        return (ids, mask, unlike) if settings.assistant_only else (ids, [True] * len(ids), 0)
    if not isinstance(item["text"], str):
        raise ValueError(f'"text" must be a text, not {type(item["text"]).__name__}')
    ids = tokenizer.encode(item["text"])
    eos = tokenizer.eos_token_id
    if eos is not None and ids and ids[-1] != eos:
        ids = [*ids, eos]
    return ids, [True] * len(ids), 0


def _pieces(
    ids: list[int], mask: list[bool], settings: Settings
) -> list[tuple[list[int], list[bool]]]:
    """The sample cut to at most max_length; nothing stands before a piece's first token."""
    longest = settings.max_length
    if len(ids) > longest and settings.overlong == "drop":
        return []
    # A piece begins with the last token of the one before, so that every token is predicted once.
    starts = range(0, max(len(ids) - 1, 1), longest - 1)
    return [(ids[s : s + longest], [False, *mask[s + 1 : s + longest]]) for s in starts]


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
