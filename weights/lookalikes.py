"""Text in a conversation that looks like a control token must stay text.

A tokenizer cannot tell a template's `<|im_end|>` from one that a user typed. So the conversation is
rendered with stand-ins, private-use characters, in place of those characters of its messages that
begin or end a control token: `<`, `>`, `[`, `]`. Every control token then found in the rendered
text was written by the template, whatever the template cut, trimmed or joined. The text between
control tokens gets its characters back and is encoded by a copy of the tokenizer that has no
control tokens.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from tokenizers import Encoding
from tokenizers import Tokenizer as Backend

_PRIVATE_USE = range(0xE000, 0xF900)
# A reply's own markup: templates look for it (`'</think>' in content`), and the model wrote it.
_REPLY_MARKUP = re.compile(r"</?[a-z_]+>")
# Not text that a user wrote: templates compare them.
_STRUCTURAL_KEYS = ("role", "type")
# Characters that a guard remembers as edges or none: conversations share theirs.
_REMEMBERED = 1 << 14


class Veil:
    """Stand-ins for the characters of one conversation that begin or end a control token."""

    def __init__(self, is_edge: Callable[[str], bool], taken: str):
        self._is_edge = is_edge
        self._free = (
            chr(code)
            for code in _PRIVATE_USE
            if chr(code) not in taken and _escaped(chr(code)) not in taken
        )
        self._stand_ins: dict[int, str] = {}  # by the code point that each stands for

    def __bool__(self) -> bool:
        return bool(self._stand_ins)

    def cover(self, text: str) -> str:
        for character in dict.fromkeys(text):
            if ord(character) not in self._stand_ins and self._is_edge(character):
                self._stand_ins[ord(character)] = next(self._free)
        return text.translate(self._stand_ins)

    def lift(self, text: str) -> str:
        """The text with the characters back, also where JSON has escaped their stand-ins."""
        for code, stand_in in self._stand_ins.items():
            text = text.replace(_escaped(stand_in), chr(code)).replace(stand_in, chr(code))
        return text


class Encoded(NamedTuple):
    """A conversation as ids, and the characters [begin, end) of each in the rendered text.

    The text, and the messages that it was rendered from, may hold stand-ins.
    """

    ids: list[int]
    offsets: list[tuple[int, int]]
    text: str
    messages: Sequence[Mapping[str, Any]]


class LookalikeGuard:
    """Encodes rendered conversations so that only the template writes control tokens.

    Control tokens are the added tokens marked special, and those that look like markup (`<think>`)
    without being marked. Added tokens of plain text, such as runs of spaces, are not.
    """

    def __init__(self, backend: Backend):
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._special = {t.content for t in added.values() if t.special and t.content.strip()}
        self._control_ids = {
            token_id
            for token_id, token in added.items()
            if token.content in self._special or is_markup(token.content)
        }
        self._control = {added[token_id].content for token_id in self._control_ids}
        edges = {text.strip()[side] for text in self._control for side in (0, -1)}
        self._edges = edges | {edge.swapcase() for edge in edges}
        self._is_edge = lru_cache(_REMEMBERED)(self._has_edge_form)
        # Longest first, as the tokenizer matches.
        alternatives = "|".join(re.escape(t) for t in sorted(self._control, key=len, reverse=True))
        self._control_pattern = re.compile(alternatives or r"(?!)")
        self._plain: dict[bool, _Plain] = {}

    def encode(
        self,
        render: Callable[[Sequence[Mapping[str, Any]], Any], str],
        messages: Sequence[Mapping[str, Any]],
        tools: Any,
        taken: str,
    ) -> Encoded:
        """Token ids of `render(messages, tools)`; no control token comes from a message or a tool.

        `taken` is text whose private-use characters are not free to stand in for others. A
        conversation without lookalikes gives exactly the ids of encoding its rendered text.
        """
        text = render(messages, tools)
        encoding = self._backend.encode(text, add_special_tokens=False)
        plain = Encoded(encoding.ids, encoding.offsets, text, messages)
        written = "".join(_strings([messages, tools]))
        # Where no character is an edge none is covered. A conversation has few different ones.
        if not any(map(self._is_edge, set(written))):
            return plain
        veil = Veil(self._is_edge, taken + text + written)
        veiled_messages = [self._veil_message(veil, message) for message in messages]
        veiled_tools = _map_strings(lambda s: self._cover_control(veil, s), tools)
        if not veil:
            return plain
        veiled_text = render(veiled_messages, veiled_tools)
        veiled = self._backend.encode(veiled_text, add_special_tokens=False)
        controls = [veiled.ids[i] for i in self._control_positions(veiled, veiled_text)]
        if veil.lift(veiled_text) == text and controls == [
            encoding.ids[i] for i in self._control_positions(encoding, text)
        ]:
            return plain
        return Encoded(*self._assemble(veiled, veiled_text, veil), veiled_text, veiled_messages)

    def _assemble(
        self, veiled: Encoding, text: str, veil: Veil
    ) -> tuple[list[int], list[tuple[int, int]]]:
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        first, start = 0, 0
        for position in [*self._control_positions(veiled, text), len(veiled.ids)]:
            last = position == len(veiled.ids)
            begin, end = (len(text), len(text)) if last else veiled.offsets[position]
            lifted = veil.lift(text[start:begin])
            if lifted == text[start:begin]:
                ids += veiled.ids[first:position]
                offsets += veiled.offsets[first:position]
            else:
                plain_ids, inside = self._plain_copy(at_start=start == 0).encode(lifted)
                ids += plain_ids
                # Where JSON escaped a stand-in the piece is longer than this, and ends stay short.
                offsets += [(start + low, start + high) for low, high in inside]
            ids += veiled.ids[position : position + 1]
            offsets += veiled.offsets[position : position + 1]
            first, start = position + 1, end
        return ids, offsets

    def _control_positions(self, encoding: Encoding, text: str) -> list[int]:
        """Where control tokens stand; a character unknown to the vocabulary is none of them."""
        return [
            i
            for i, token_id in enumerate(encoding.ids)
            if token_id in self._control_ids
            and (
                token_id != self._unknown_id
                or encoding.tokens[i] in text[slice(*encoding.offsets[i])]
            )
        ]

    @cached_property
    def _unknown_id(self) -> int | None:
        unknown = getattr(self._backend.model, "unk_token", None)
        return self._backend.token_to_id(unknown) if unknown else None

    def _plain_copy(self, at_start: bool) -> "_Plain":
        if at_start not in self._plain:
            self._plain[at_start] = _Plain(self._backend, self._control, at_start)
        return self._plain[at_start]

    def _has_edge_form(self, character: str) -> bool:
        # A normaliser may turn a full-width bracket into the plain one, or a struck one into two.
        forms = character + "".join(unicodedata.normalize(f, character) for f in ("NFKC", "NFKD"))
        return not self._edges.isdisjoint(forms)

    def _veil_message(self, veil: Veil, message: Mapping[str, Any]) -> Any:
        reply = message.get("role") == "assistant"
        cover = self._cover_reply if reply else lambda veil, text: veil.cover(text)
        return _map_strings(lambda text: cover(veil, text), message)

    def _cover_reply(self, veil: Veil, text: str) -> str:
        """Cover everything but the reply's own markup, such as `</think>`."""
        kept = [
            match.span()
            for pattern in (self._control_pattern, _REPLY_MARKUP)
            for match in pattern.finditer(text)
            if match[0] not in self._special
        ]
        pieces, start = [], 0
        for begin, end in sorted(kept):
            if begin >= start:
                pieces += [veil.cover(text[start:begin]), text[begin:end]]
                start = end
        return "".join([*pieces, veil.cover(text[start:])])

    def _cover_control(self, veil: Veil, text: str) -> str:
        return self._control_pattern.sub(lambda match: veil.cover(match[0]), text)


class _Plain:
    """A copy of a tokenizer that does not know its control tokens."""

    def __init__(self, backend: Backend, control: set[str], at_start: bool):
        spec = json.loads(backend.to_str())
        spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] not in control]
        _unlearn(spec["model"], control)
        if not at_start:
            _never_prepend(spec["pre_tokenizer"])
        spec["post_processor"] = None
        self._copy = Backend.from_str(json.dumps(spec))
        # Without the control tokens, the other added tokens may have been numbered anew.
        ids = backend.get_vocab(with_added_tokens=True)
        self._renumbered = {
            copied: ids[token]
            for token, copied in self._copy.get_vocab(with_added_tokens=True).items()
            if ids.get(token, copied) != copied
        }

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids, and the characters [begin, end) of each."""
        encoding = self._copy.encode(text, add_special_tokens=False)
        ids = [self._renumbered.get(token_id, token_id) for token_id in encoding.ids]
        return ids, encoding.offsets


def _unlearn(model: dict[str, Any], control: set[str]) -> None:
    """Put the control tokens out of reach of the model itself, keeping every id where it is."""
    hidden = control - {model.get("unk_token")}
    vocab = model["vocab"]
    if isinstance(vocab, list):  # Unigram: pieces with scores, the id is the position
        unknown = model.get("unk_id")
        for i, (piece, score) in enumerate(vocab):
            if piece in control and i != unknown:
                vocab[i] = [_hidden(piece), score]
        return
    if "merges" in model:
        pairs = [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]
        model["merges"] = [[a, b] for a, b in pairs if not hidden & {a, b, a + b}]
    model["vocab"] = {_hidden(t) if t in hidden else t: i for t, i in vocab.items()}


def _hidden(token: str) -> str:
    return f"\0{token}\0"


def _never_prepend(pre_tokenizer: Any) -> None:
    """Text behind a control token is not the start of the whole, where a space is put before."""
    if isinstance(pre_tokenizer, dict):
        if pre_tokenizer.get("prepend_scheme") == "first":
            pre_tokenizer["prepend_scheme"] = "never"
        for inner in pre_tokenizer.get("pretokenizers", []):
            _never_prepend(inner)


def _escaped(character: str) -> str:
    return json.dumps(character)[1:-1]


def is_markup(text: str) -> bool:
    """Whether an added token of this text is a control token even if it is not marked special."""
    ends = text[:1] + text[-1:]
    return len(text) > 2 and not any(end.isalnum() or end.isspace() for end in ends)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _strings(inner)


def _map_strings(function: Callable[[str], str], value: Any) -> Any:
    if isinstance(value, str):
        return function(value)
    if isinstance(value, Mapping):
        return {
            key: inner if key in _STRUCTURAL_KEYS else _map_strings(function, inner)
            for key, inner in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_map_strings(function, inner) for inner in value]
    return value
