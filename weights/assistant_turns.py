"""Which characters of a rendered conversation the assistant writes."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

_NO_SPAN = (sys.maxsize, sys.maxsize)


class Turn(NamedTuple):
    """Characters [begin, end) of an assistant's turn; without `exact`, it may end before `end`."""

    begin: int
    end: int
    exact: bool


def assistant_turns(
    text: str,
    messages: Sequence[Mapping[str, Any]],
    render: Callable[[Sequence[Mapping[str, Any]], bool], str],
) -> tuple[list[Turn], int]:
    """The assistant's turns in `text`, which is `render(messages, False)`.

    A turn begins where the messages before it end when they are rendered with a generation prompt
    (the second argument), and ends where those up to it end without one. The number of turns for
    which the former is not how `text` begins comes second: serving would show the model another
    text before them.
    """
    turns: list[Turn] = []
    unlike = 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        # Some templates do without a first message to answer, others refuse.
        before = _rendered(render, messages[:i], True)
        if before is None or not text.startswith(before):
            unlike += 1
            continue
        if turns and not turns[-1].exact:
            turns[-1] = turns[-1]._replace(end=len(before))
        # All messages, rendered anew, would give the text once more.
        whole = i + 1 == len(messages)
        through = text if whole else _rendered(render, messages[: i + 1], False) or ""
        # A template may close the text (`<|endoftext|>`) where the conversation would go on.
        common = len(through)
        if not text.startswith(through):
            pairs = zip(text, through, strict=False)
            common = next((i for i, (a, b) in enumerate(pairs) if a != b), common)
        exact = common > len(before)
        turns.append(Turn(len(before), common if exact else len(text), exact))
    return turns, unlike


def _rendered(
    render: Callable[[Sequence[Mapping[str, Any]], bool], str],
    messages: Sequence[Mapping[str, Any]],
    prompt: bool,
) -> str | None:
    try:
        return render(messages, prompt)
    except ValueError:
        return None


def mask_of_spans(
    offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]
) -> list[bool]:
    """For each token whether its characters lie in one of the spans; both are in order."""
    mask = [False] * len(offsets)
    remaining = iter(spans)
    first, last = next(remaining, _NO_SPAN)
    for i, (begin, end) in enumerate(offsets):
        while begin >= last:
            first, last = next(remaining, _NO_SPAN)
        if first <= begin and end <= last:
            mask[i] = True
    return mask
