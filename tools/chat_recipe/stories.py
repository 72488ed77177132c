"""Stories told when asked for: requests of our own, answered by the sets' short stories."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

from tools.chat_recipe.clean import is_kind

# Who or what a child might ask a story about; those that a story names often enough are its heroes.
HEROES = re.findall(
    r"\w+",
    """
    ant apple baby ball balloon bear bee bird boat bunny butterfly cake car castle cat chicken
    cloud cow crab crocodile dog doll donkey dragon duck eagle elephant fairy farmer fish flower
    fox frog garden ghost giant giraffe goat grandma grandpa hen hippo horse hyena jackal king
    kitten lion lizard monkey monster moon mountain mouse owl parrot pig prince princess puppy
    queen rabbit rain rat river robot rooster sheep snail snake spider squirrel star sun teacher
    teddy tiger toy train tree truck turtle wizard wolf worm zebra
    """,
)
_NAMED = re.compile(
    r"\b(girl|boy) (?:named|called) ([A-Z][a-z]+)|[Hh](?:er|is) name was ([A-Z]\w+)"
)
_BEGINS = re.compile(
    r"\b(once|one (?:day|morning|night|sunny|rainy|fine)|long (?:time )?ago"
    r"|there (?:was|were|lived))\b"
)
PLAIN = (
    "Tell me a story.", "Can you tell me a story?", "Tell me a short story.", "a story please",
    "I want to hear a story.", "Please tell me a bedtime story.", "Do you know a story?",
    "Tell me a story!", "tell me a story", "Could you tell me a little story?", "Read me a story.",
)  # fmt: skip
ABOUT = (
    "Tell me a story about {}.", "Can you tell me a story about {}?", "I want a story about {}.",
    "tell me a story about {}", "Please tell me a story about {}.", "Do you know a story about {}?",
    "Make up a story about {}.", "A story about {}, please.", "Write a short story about {}.",
)  # fmt: skip
AGAIN = ("Another one, please.", "Another story!", "One more!", "Tell me another one.", "more")
AFTER = (
    ("Thank you!", "You're welcome! I'm glad you liked it."),
    ("That was nice.", "Thank you! Would you like another one?"),
    ("I liked it.", "I'm glad! Shall I tell you another one?"),
    ("That was a good story!", "Thank you! I like telling stories."),
    ("Good night!", "Good night! Sleep well."),
    ("That was a strange story.", "I'm a small model, and my stories can be strange. Sorry!"),
    ("Did you make that up?", "Yes, I made it up, word by word."),
)


def is_tellable(text: str) -> bool:
    """Whether this is short enough to tell, kind, and begins as stories do."""
    return (
        200 < len(text) < 1500 and is_kind(text) and _BEGINS.search(text[:120].lower()) is not None
    )


def heroes(text: str) -> list[str]:
    """What the story may be asked for by, as "a bear" or "a girl named Lily"."""
    found = []
    if (match := _NAMED.search(text)) is not None:
        kind, name, other = match.groups()
        found += [f"a {kind} named {name}", name] if name else [other]
    words = re.findall(r"[a-z]+", text.lower())
    for hero in HEROES:
        if words.count(hero) + words.count(hero + "s") >= 3:
            found.append(f"{'an' if hero[0] in 'aeiou' else 'a'} {hero}")
    return found


def request(text: str, rng: random.Random) -> str:
    """What a user may have said to be told this story."""
    about = heroes(text)
    if about and rng.random() < 0.75:
        return rng.choice(ABOUT).format(rng.choice(about))
    return rng.choice(PLAIN)


def told(texts: Sequence[str], rng: random.Random) -> dict[str, Any]:
    """A conversation in which one of the stories is told, or two."""
    turns: list[str] = []
    for i, text in enumerate(rng.sample(texts, min(rng.choice((1, 1, 2)), len(texts)))):
        ask = rng.choice(AGAIN) if i and rng.random() < 0.5 else request(text, rng)
        turns += [ask, text]
    if rng.random() < 0.4:
        turns += rng.choice(AFTER)
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": t} for i, t in enumerate(turns)]}
