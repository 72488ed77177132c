"""The public sets, read and cleaned.

Their names are those of the files, `NAME.jsonl.xz`: conversations as {"messages"}, stories as
{"text"}. The model card names source and licence of each.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minigen.data import read_jsonl
from tools.chat_recipe.clean import clean, is_foul, paragraphs

TALK = (
    "self_dialogue",
    "sgd",
    "topical_chat_valid_test",
    "ms_personality_chat_english",
    "human_chat",
    "taskmaster4",
    "fairytaleqa_qa",
)
STORIES = ("tinystories_sample", "stories_asp_pratham_en", "fairytaleqa_stories")


def talk(directory: Path, name: str) -> Iterator[dict[str, Any]]:
    """The set's conversations that hold no foul word, each once; other fields are kept."""
    seen: set[tuple[str, ...]] = set()
    for _, item in read_jsonl(directory / f"{name}.jsonl.xz"):
        messages = [{**m, "content": clean(m["content"])} for m in item["messages"]]
        key = tuple(m["content"] for m in messages)
        if all(key) and key not in seen and not is_foul("\n".join(key)):
            seen.add(key)
            yield {**item, "messages": messages}


def stories(directory: Path, name: str) -> Iterator[dict[str, Any]]:
    """The set's stories, each once."""
    seen: set[str] = set()
    for _, item in read_jsonl(directory / f"{name}.jsonl.xz"):
        text = paragraphs(item["text"])
        if text and text not in seen and not is_foul(text):
            seen.add(text)
            yield {**item, "text": text}
