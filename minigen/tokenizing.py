"""Lines of JSONL to token ids: what a line may be, which tokens count, what is held out.

Nothing here imports torch or numpy: processes that only tokenize start in a quarter of a second.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minigen.weights.tokenizer import Tokenizer


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


@dataclass
class Tokens:
    """Samples end to end, as arrays that grow; `counts` as in `minigen.data.Samples`."""

    ids: array[int] = field(default_factory=lambda: array("i"))  # 32 bits
    targets: bytearray = field(default_factory=bytearray)  # 0 or 1 for each of ids
    lengths: array[int] = field(default_factory=lambda: array("q"))  # of each sample, 64 bits
    held_out: bytearray = field(default_factory=bytearray)  # 0 or 1 for each sample
    counts: Counter[str] = field(
        default_factory=lambda: Counter(items=0, dropped=0, split=0, unlike=0)
    )

    def extend(self, other: Tokens) -> None:
        self.ids += other.ids
        self.targets += other.targets
        self.lengths += other.lengths
        self.held_out += other.held_out
        self.counts.update(other.counts)


def parse_line(path: Path, number: int, line: bytes) -> dict[str, Any]:
    """The object of one line. Raises ValueError naming file and line."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}:{number}: the line is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}:{number}: the line must be a JSON object")
    return value


def is_held_out(item: dict[str, Any], share: float) -> bool:
    """Whether a line belongs to the held-out split: the same text always does, in every file."""
    content = item["messages"] if "messages" in item else item["text"]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def tokenize_lines(
    path: Path, tokenizer: Tokenizer, settings: Settings, first: int, lines: Sequence[bytes]
) -> Tokens:
    """The samples of some lines of a file, which begin with line number `first`.

    Raises ValueError, naming file and line, for the first line that is no sample and for a
    conversation that the chat template refuses. Empty lines are passed over.
    """
    found = Tokens()
    for number, line in enumerate(lines, first):
        if not line.strip():
            continue
        item = parse_line(path, number, line)
        try:
            ids, mask, unlike = _tokenize(item, tokenizer, settings)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        pieces = _pieces(ids, mask, settings)
        found.counts["items"] += 1
        found.counts["unlike"] += unlike
        found.counts["split"] += len(pieces) > 1
        pieces = [piece for piece in pieces if any(piece[1])]
        if not pieces:
            found.counts["dropped"] += 1
            continue
        held_out = is_held_out(item, settings.holdout)
        for piece_ids, piece_mask in pieces:
            found.ids.extend(piece_ids)
            found.targets.extend(piece_mask)
            found.lengths.append(len(piece_ids))
            found.held_out.append(held_out)
    return found


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
