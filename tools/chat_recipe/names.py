"""`python -m tools.chat_recipe.names --model DIR`: how many of 30 names a model repeats.

Told a name, it should give it back at once, still know it two turns later, and know what the user's
dog is called. A reply counts if the name is a word of it, in capitals or not. Some of the names are
among those that `dialogues.txt` teaches, some are rare and some made up. All chats run at once, at
temperature 0. The last line is one JSON document.
"""

import argparse
import json
import re

from minigen import LLM, SamplingParams, cli
from tools import common
from tools.chat_recipe.samples import chats

NAMES = (
    "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Hannah", "Ivan", "Julia", "Kevin",
    "Lena", "Maria", "Noah", "Olivia", "Peter", "Rosa", "Samir", "Tessa", "Yusuf", "Bello", "Rufus",
    "Luna", "Balto", "Wotan", "Mirabel", "Zorin", "Quilla", "Drubo", "Fanelix",
)  # fmt: skip
# What the user says, and which of the replies (from 0) should hold the name.
QUESTIONS = {
    "at once": (("Hello!", "My name is {}."), 1),
    "two turns later": (("Hello!", "My name is {}.", "I like the sea.", "What is my name?"), 3),
    "a dog's": (("I have a dog.", "His name is {}.", "What is my dog called?"), 2),
}


def count_repeated(llm: LLM, max_tokens: int) -> dict[str, list[str]]:
    """Which of NAMES are repeated, for each of QUESTIONS."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    found = {}
    for kind, (script, reply) in QUESTIONS.items():
        talks = chats(llm, [[turn.format(name) for turn in script] for name in NAMES], params)
        replies = [talk[2 * reply + 1]["content"] for talk in talks]
        found[kind] = [
            name
            for name, said in zip(NAMES, replies, strict=True)
            if re.search(rf"\b{name}\b", said, re.IGNORECASE)
        ]
    return found


def parser() -> argparse.ArgumentParser:
    made = cli.Parser(prog="python -m tools.chat_recipe.names", description=__doc__)
    made.add_argument("--model", required=True, metavar="DIR", help="the checkpoint")
    made.add_argument("--max-tokens", type=cli.positive, default=60, metavar="N", help="of a reply")
    return made


def main(args: argparse.Namespace) -> None:
    llm = LLM(args.model, compile="eager", progress=False)
    repeated = count_repeated(llm, args.max_tokens)
    for kind, names in repeated.items():
        missed = [name for name in NAMES if name not in names]
        without = f", not {', '.join(missed)}" if missed else ""
        print(f"{kind}: {len(names)} of {len(NAMES)}{without}")
    counts = {kind: len(names) for kind, names in repeated.items()}
    print(json.dumps({"model": args.model, "names": len(NAMES), "repeated": counts}))


if __name__ == "__main__":
    common.run(parser(), main)
