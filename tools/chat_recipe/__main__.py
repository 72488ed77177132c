"""`python -m tools.chat_recipe`: writes what the bundled model is trained on."""

import argparse
import json
import random
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from minigen import cli
from minigen.tokenizing import is_held_out
from tools import common
from tools.chat_recipe.clean import is_kind
from tools.chat_recipe.dialogues import Dialogues
from tools.chat_recipe.sets import STORIES, TALK, stories, talk
from tools.chat_recipe.stories import is_tellable, told

NAME = "Mini"
# Of the set's five voices these fit; of their answers, what would contradict who the model is.
PERSONAS = ("friendly", "caring")
_OTHER_SELF = re.compile(r"\b(name|bots?|code|coders?|programm\w+|made me|people|team|company)\b")
# Sets whose talk is worth imitating; bookings of tables and taxis are not.
FOLLOWED = ("human_chat", "topical_chat_valid_test", "self_dialogue")


def write(file: Path, items: Iterable[dict[str, Any]]) -> None:
    """Writes JSONL and says how much."""
    file.parent.mkdir(parents=True, exist_ok=True)
    count = size = 0
    with file.open("w", encoding="utf-8") as stream:
        for item in items:
            line = json.dumps(item, ensure_ascii=False) + "\n"
            stream.write(line)
            count, size = count + 1, size + len(line.encode())
    print(f"{file}: {count:,} lines, {size:,} bytes")


def small_talk(items: Iterable[dict[str, Any]], rng: random.Random) -> Iterator[dict[str, Any]]:
    """Conversations of one to four questions to one persona, and its answers."""
    pairs: dict[str, list[list[dict[str, str]]]] = {name: [] for name in PERSONAS}
    for item in items:
        answer = item["messages"][-1]["content"]
        if item["persona"] in pairs and is_kind(answer) and not _OTHER_SELF.search(answer.lower()):
            pairs[item["persona"]].append(item["messages"])
    for turns in pairs.values():
        rng.shuffle(turns)
        rest = iter(turns)
        while chosen := list(islice(rest, rng.choice((1, 1, 2, 3, 4)))):
            yield {"messages": [message for pair in chosen for message in pair]}


def friendly(item: dict[str, Any]) -> bool:
    """Whether what the assistant says in a conversation is fit to be imitated."""
    said = [m["content"] for m in item["messages"] if m["role"] == "assistant"]
    return len(said) > 1 and all(is_kind(text) and len(text) < 300 for text in said)


def parser() -> argparse.ArgumentParser:
    made = cli.Parser(prog="python -m tools.chat_recipe", description=__doc__)
    made.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="where the sets' *.jsonl.xz are"
    )
    made.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="gets pretrain/ and finetune/"
    )
    made.add_argument(
        "--holdout", type=float, default=0.02, metavar="SHARE", help="the one given to train"
    )
    made.add_argument(
        "--dialogues", type=int, default=30_000, metavar="N", help="of our own (%(default)s)"
    )
    made.add_argument(
        "--tellings", type=int, default=3_000, metavar="N", help="of the stories (%(default)s)"
    )
    made.add_argument("--seed", type=int, default=0, metavar="N")
    return made


def main(args: argparse.Namespace) -> None:
    pretrain, finetune = args.output / "pretrain", args.output / "finetune"
    rng = random.Random(args.seed)
    kept: dict[str, list[dict[str, Any]]] = {}
    for read, names, field in ((talk, TALK, "messages"), (stories, STORIES, "text")):
        for name in names:
            items = list(read(args.data, name))
            write(pretrain / f"{name}.jsonl", ({field: item[field]} for item in items))
            # What is held out of the first stage is not shown in the second.
            kept[name] = [item for item in items if not is_held_out(item, args.holdout)]
    own = Dialogues.parse(Path(__file__).with_name("dialogues.txt").read_text(encoding="utf-8"))
    write(finetune / "dialogues.jsonl", (own.draw(rng, NAME) for _ in range(args.dialogues)))
    texts = [item["text"] for name in STORIES for item in kept[name] if is_tellable(item["text"])]
    write(
        finetune / "stories.jsonl", (told(texts, rng) for _ in range(args.tellings if texts else 0))
    )
    rows = small_talk(kept["ms_personality_chat_english"], rng)
    write(finetune / "small_talk.jsonl", rows)
    rows = ({"messages": i["messages"]} for name in FOLLOWED for i in kept[name] if friendly(i))
    write(finetune / "talk.jsonl", rows)


if __name__ == "__main__":
    common.run(parser(), main)
