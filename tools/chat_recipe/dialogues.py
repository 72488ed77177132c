"""Conversations drawn from `dialogues.txt`, whose head says how it is written."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tools.chat_recipe.clean import is_foul

ROLES = {"u": "user", "a": "assistant"}
_SLOT = re.compile(r"\{(\w+)\}")
_SYSTEM = ("You are a helpful assistant.", "You are a friendly little model.", "Be kind and brief.")


@dataclass(frozen=True)
class Group:
    """Slots that are drawn together, and the values they may have."""

    names: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    invented: bool = False

    def draw(self, rng: random.Random) -> tuple[str, ...]:
        """A row; of a group of names that may be invented, an invented one half of the time."""
        if self.invented and rng.random() < 0.5:
            return tuple(invented_name(rng) for _ in self.names)
        return rng.choice(self.rows)


@dataclass(frozen=True)
class Block:
    """Turns as (role, its parts, each of alternatives); `recall`: the slot said before it."""

    turns: tuple[tuple[str, tuple[tuple[str, ...], ...]], ...]
    weight: int
    recall: str | None


@dataclass(frozen=True)
class Dialogues:
    """What a file of conversations says; draws from it."""

    groups: tuple[Group, ...]
    blocks: tuple[Block, ...]

    @classmethod
    def parse(cls, text: str) -> Dialogues:
        """Raises ValueError naming the line that cannot be used."""
        groups: list[Group] = []
        blocks: list[Block] = []
        turns: list[tuple[str, tuple[tuple[str, ...], ...]]] = []
        weight, recall = 1, None
        known = {"self"}
        for number, line in enumerate([*text.splitlines(), ""], start=1):
            line = line.strip()
            head, _, rest = line.partition(" ")
            if not line:
                if turns and turns[-1][0] == "user":
                    raise ValueError(f"line {number - 1}: a block must end with what a: says")
                if turns:
                    blocks.append(Block(tuple(turns), weight, recall))
                turns, weight, recall = [], 1, None
            elif head == "#":
                continue
            elif head == "=":
                group = _group(rest, number)
                known.update(group.names)
                groups.append(group)
            elif head == "weight" and rest.isdecimal() and int(rest) and not turns:
                weight = int(rest)
            elif head == "recall" and rest in known and not turns:
                recall = rest
            elif head in ("u:", "a:", "+:") and rest:
                part = tuple(text.strip() for text in rest.split(" | "))
                role, parts = (
                    turns.pop() if head == "+:" and turns else (ROLES.get(head[0], ""), ())
                )
                if role != ("user", "assistant")[len(turns) % 2]:
                    raise ValueError(f"line {number}: u: and a: must alternate, u: first")
                turns.append((role, (*parts, part)))
                if unknown := set(_SLOT.findall(rest)) - known:
                    raise ValueError(
                        f"line {number}: no line gives the slot {min(unknown)} a value"
                    )
            else:
                raise ValueError(
                    f"line {number} is none of '#', '=', 'weight', 'recall', 'u:', 'a:', '+:'"
                )
        return cls(tuple(groups), tuple(blocks))

    def draw(self, rng: random.Random, name: str) -> dict[str, Any]:
        """A conversation as {"messages"}, of one block or several; `name` is the model's."""
        values = {"self": name}
        for group in self.groups:
            values.update(zip(group.names, group.draw(rng), strict=True))
        openers = [block for block in self.blocks if block.recall is None]
        count = rng.choice((1, 1, 1, 2, 2, 3))
        chosen = rng.choices(openers, [block.weight for block in openers], k=count)
        messages: list[dict[str, str]] = []
        said: set[str] = set()
        for block in dict.fromkeys(chosen):
            messages += self._turns(block, rng, values, said)
        recalls = [block for block in self.blocks if block.recall in said]
        if recalls and rng.random() < 0.4:
            messages += self._turns(rng.choice(recalls), rng, values, said)
        if rng.random() < 0.08:
            messages.insert(0, {"role": "system", "content": rng.choice(_SYSTEM)})
        return {"messages": messages}

    @staticmethod
    def _turns(
        block: Block, rng: random.Random, values: dict[str, str], said: set[str]
    ) -> Iterator[dict[str, str]]:
        # Some conversations are left early, after an answer.
        pairs = len(block.turns) // 2
        stop = 2 * pairs if rng.random() < 0.6 else 2 * rng.randint(1, pairs)
        for role, parts in block.turns[:stop]:
            text = " ".join(rng.choice(alternatives) for alternatives in parts)
            if role == "user":
                said.update(_SLOT.findall(text))
                content = _typed(fill(text, values), rng)
            else:
                heard = {k: your(v) if k in said else v for k, v in values.items()}
                content = fill(text, heard)
            yield {"role": role, "content": content}


def fill(text: str, values: dict[str, str]) -> str:
    """The text with its slots filled, sentences begun with capitals, and "an" before vowels."""
    text = _SLOT.sub(lambda match: values[match[1]], text)
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    return re.sub(r"(^|[.!?] )([a-z])", lambda m: m[1] + m[2].upper(), text)


def invented_name(rng: random.Random) -> str:
    """A name nobody has, so that the model learns to repeat names and not to guess them."""
    starts = (
        "b",
        "br",
        "d",
        "f",
        "g",
        "h",
        "j",
        "k",
        "l",
        "m",
        "n",
        "p",
        "r",
        "s",
        "t",
        "v",
        "z",
        "",
    )
    parts = [rng.choice(starts) + rng.choice("aeiou") for _ in range(rng.choice((2, 2, 3)))]
    name = ("".join(parts) + rng.choice(("", "", "n", "r", "s", "l", "x"))).capitalize()
    return invented_name(rng) if is_foul(name) else name


def your(text: str) -> str:
    """What the user says of themselves, as said back to them."""
    words = {"my": "your", "I": "you", "me": "you"}
    return re.sub(r"\b(my|I|me)\b", lambda match: words[match[1]], text)


def _typed(text: str, rng: random.Random) -> str:
    """As people type: some without capitals, some without a full stop."""
    if rng.random() < 0.25:
        text = text.lower()
    if rng.random() < 0.25:
        text = text.rstrip(".!")
    return text or "..."


def _group(text: str, number: int) -> Group:
    head, colon, rest = text.partition(":")
    names = tuple(name.strip().removeprefix("~") for name in head.split(","))
    # The last of a row may hold commas.
    rows = tuple(
        tuple(cell.strip() for cell in row.split(",", len(names) - 1)) for row in rest.split(" | ")
    )
    if not colon or any(len(row) != len(names) or not all(row) for row in rows):
        raise ValueError(f"line {number}: each alternative must give all of {head.strip()} a value")
    return Group(names, rows, head.lstrip().startswith("~"))
