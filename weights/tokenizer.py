"""Tokenizers of checkpoints: text to ids, ids to text piece by piece, conversations to ids."""

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from os.path import commonprefix
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from minigen.weights.assistant_turns import assistant_turns, mask_of_spans
from minigen.weights.chat_template import ChatTemplates
from minigen.weights.errors import CheckpointError
from minigen.weights.json_file import read_json
from minigen.weights.lookalikes import Encoded, LookalikeGuard

_SPECIAL_NAMES = tuple(
    f"{name}_token" for name in ("bos", "eos", "unk", "pad", "sep", "cls", "mask")
)
_UNFINISHED = "\ufffd"  # what an incomplete character decodes to
# Tokens that are decoded one by one after many: a character ends in them.
_NUM_LAST = 4
# Tokens of a prompt that its continuation is decoded behind; a character has at most four.
_NUM_READ_BEFORE = 8


class Tokenizer:
    """A `tokenizer.json` with the special tokens and chat templates of the files beside it.

    `bos_token_id` and `eos_token_id` are None where the files name no such token, or (with a
    warning) one outside the vocabulary. `vocab_size` is the largest id plus one.
    """

    def __init__(
        self,
        backend: Backend,
        special_tokens: Mapping[str, Any],
        templates: ChatTemplates,
        add_bos_token: bool | None = None,
    ):
        self.directory: Path | None = None  # that it was read from
        self._backend = backend
        self._templates = templates
        self._add_bos_token = add_bos_token
        self._guard = LookalikeGuard(backend)
        self.bos_token_id = self._special_id(special_tokens, "bos_token")
        self.eos_token_id = self._special_id(special_tokens, "eos_token")
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        added = backend.get_added_tokens_decoder()
        self._skipped_ids = frozenset(i for i, token in added.items() if token.special)
        self._byte_ids = _byte_fallback_ids(backend)

    @classmethod
    def from_dir(cls, path: str | Path) -> "Tokenizer | None":
        """The tokenizer of a checkpoint directory, None without a `tokenizer.json`.

        Raises CheckpointError for files that cannot be read.
        """
        path = Path(path)
        if not (path / "tokenizer.json").exists():
            return None
        try:
            backend = Backend.from_file(str(path / "tokenizer.json"))
        except Exception as error:  # `tokenizers` raises nothing more precise
            read_json(path / "tokenizer.json")  # says more where the file is no JSON at all
            raise CheckpointError(
                f"{path / 'tokenizer.json'} is not a tokenizer that can be used: {error}"
            ) from None
        # What training code left there: a prompt is never cut or filled up.
        backend.no_truncation()
        backend.no_padding()
        config = _optional_json(path / "tokenizer_config.json")
        special_tokens = _special_tokens(_optional_json(path / "special_tokens_map.json"), config)
        _add_missing_tokens(backend, config, special_tokens.values())
        templates = ChatTemplates.from_dir(path, config, special_tokens)
        made = cls(backend, special_tokens, templates, config.get("add_bos_token"))
        made.directory = path.resolve()
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        """For processes that tokenize: they read the same files."""
        if self.directory is None:
            raise TypeError("a tokenizer that was not read from files is of this process alone")
        return _read_again, (self.directory,)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; by default with the BOS that the checkpoint asks for, never two.

        Raises ValueError for half a surrogate pair, which is no text.
        """
        _check_text(text)
        ids = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        bos = self.bos_token_id
        if add_special_tokens and self._add_bos_token and bos is not None and ids[:1] != [bos]:
            ids = [bos, *ids]
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; ids outside the vocabulary have none."""
        return self._backend.decode(
            [i for i in ids if 0 <= i < self.vocab_size], skip_special_tokens=skip_special_tokens
        )

    def stream(
        self, skip_special_tokens: bool = True, prompt_ids: Sequence[int] = ()
    ) -> "DecodeStream":
        """A decoder that takes one id at a time and gives the text behind that of `prompt_ids`."""
        return DecodeStream(self, skip_special_tokens, prompt_ids)

    def token_text(self, token_id: int) -> str:
        """One token as it reads inside a text, its leading space included."""
        # Decoders drop the space at the start of a text, so something stands before the token.
        anchor = self._backend.encode("a", add_special_tokens=False).ids
        before = self.decode(anchor, skip_special_tokens=False)
        return self.decode([*anchor, token_id], skip_special_tokens=False)[len(before) :]

    @property
    def has_chat_template(self) -> bool:
        return bool(self._templates.sources)

    def chat_tokens(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
        template_name: str | None = None,
        **variables: Any,
    ) -> list[int]:
        """Token ids of a conversation, through its chat template.

        `messages` are dicts with a `role` and what the template reads, `content` above all;
        `variables` go to the template. Text in them that looks like a control token stays text.
        Raises ValueError for messages of another form, without a template, and where the template
        refuses the conversation, or where it has half a surrogate pair.
        """
        _check_messages(messages)
        name = self._templates.select(template_name, with_tools=tools is not None)
        variables = {"add_generation_prompt": add_generation_prompt, **variables}
        return self._encode_chat(name, messages, tools, variables).ids

    def chat_tokens_and_targets(
        self,
        messages: list[dict[str, Any]],
        stop_ids: Collection[int] = (),
        tools: list[dict[str, Any]] | None = None,
        **variables: Any,
    ) -> tuple[list[int], list[bool], int]:
        """A whole conversation for training: its ids, and which of them the assistant writes.

        Those are what follows a generation prompt in serving, up to and with the first of
        `stop_ids` (or EOS); or what the template's `{% generation %}` blocks hold, if it has any.
        The last result is the number of assistant turns that are no targets: the template renders
        what stands before them otherwise than when it asks for them, or nothing tells their end.
        Raises ValueError as `chat_tokens`.
        """
        _check_messages(messages)
        name = self._templates.select(with_tools=tools is not None)
        closed = {"add_generation_prompt": False, **variables}
        encoded = self._encode_chat(name, messages, tools, closed)
        if self._templates.marks_generation(name):
            spans = self._templates.generation_spans(
                name, encoded.text, encoded.messages, tools=tools, documents=None, **closed
            )
            return encoded.ids, mask_of_spans(encoded.offsets, spans), 0

        def render(messages: Sequence[Mapping[str, Any]], prompt: bool) -> str:
            options = {**closed, "add_generation_prompt": prompt}
            return self._render_chat(name, messages, tools, options)

        turns, unlike = assistant_turns(encoded.text, encoded.messages, render)
        stops = {*stop_ids, self.eos_token_id}
        ends = [
            end
            for token_id, (_, end) in zip(encoded.ids, encoded.offsets, strict=True)
            if token_id in stops
        ]
        spans = []
        for turn in turns:
            stop = next((end for end in ends if turn.begin < end <= turn.end), None)
            if stop is None and not turn.exact:
                unlike += 1
            else:
                spans.append((turn.begin, turn.end if stop is None else stop))
        return encoded.ids, mask_of_spans(encoded.offsets, spans), unlike

    def _encode_chat(
        self, name: str, messages: Sequence[Mapping[str, Any]], tools: Any, variables: Any
    ) -> Encoded:
        def render(messages: Sequence[Mapping[str, Any]], tools: Any) -> str:
            return self._render_chat(name, messages, tools, variables)

        return self._guard.encode(render, messages, tools, self._templates.sources[name])

    def _render_chat(
        self, name: str, messages: Sequence[Mapping[str, Any]], tools: Any, variables: Any
    ) -> str:
        text = self._templates.render(name, messages, tools=tools, documents=None, **variables)
        _check_text(text)
        return text

    def _special_id(self, special_tokens: Mapping[str, Any], name: str) -> int | None:
        token = special_tokens.get(name)
        if token is None:
            return None
        token_id = self._backend.token_to_id(token)
        if token_id is None:
            warnings.warn(f"{name} {token!r} is not in the tokenizer's vocabulary", stacklevel=3)
        return token_id


def _read_again(directory: Path) -> Tokenizer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the first process has said it
        found = Tokenizer.from_dir(directory)
    if found is None:
        raise CheckpointError(f"{directory / 'tokenizer.json'} is no longer there")
    return found


class DecodeStream:
    """Decodes one token at a time; the pieces and the flush join to the decoding of all ids.

    With a prompt they join to what the ids add to it: decoders drop the space at the start of a
    text, and a continuation is none. A character that the prompt leaves unfinished comes whole.

    What a token adds is the difference between two decodings of a short window, with and without
    it: decoders treat the start of a text in their own ways, and the window's first tokens take
    that part. A piece is held back while a later token could still change it.
    """

    def __init__(
        self, tokenizer: Tokenizer, skip_special_tokens: bool, prompt_ids: Sequence[int] = ()
    ):
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window = self._end_of(prompt_ids)
        self._num_read = len(self._window)  # tokens of the window whose text has been given out
        self._read_text = self._decode(self._window)

    def push(self, token_id: int) -> str:
        """The text that is certain now and was not before, perhaps empty."""
        if not self._has_text(token_id):
            return ""
        self._window.append(token_id)
        # A run of byte tokens is decoded as a whole: one more may make all of it invalid.
        if token_id in self._tokenizer._byte_ids:
            return ""
        text = self._decode(self._window)
        if len(text) <= len(self._read_text) or text.endswith(_UNFINISHED):
            return ""
        return self._give(text)

    def push_all(self, token_ids: Sequence[int]) -> str:
        """The pieces of many tokens, joined. 512 take 0.9 ms, one by one 5.4."""
        first, last = token_ids[:-_NUM_LAST], token_ids[-_NUM_LAST:]
        num_before = len(self._window)
        self._window += [token_id for token_id in first if self._has_text(token_id)]
        text = "".join([self.push(token_id) for token_id in last])
        if text or not first:
            return text
        # Nothing of the last ones is certain: what is before them has to be looked at by itself.
        del self._window[num_before:]
        return "".join([self.push(token_id) for token_id in token_ids])

    def flush(self) -> str:
        """The rest, with U+FFFD for characters that were never finished."""
        return self._give(self._decode(self._window))

    def _give(self, text: str) -> str:
        # What was read stays, but for half a character at the end of the prompt.
        num_same = len(commonprefix([self._read_text, text]))  # noqa: RUF071 - characters are meant
        piece = text[num_same:]
        self._window = self._window[self._num_read :]
        self._num_read = len(self._window)
        self._read_text = self._decode(self._window)
        return piece

    def _end_of(self, prompt_ids: Sequence[int]) -> list[int]:
        """Its last ids that have text, not cut within a run of byte tokens."""
        end: list[int] = []
        for token_id in reversed(prompt_ids):
            if self._has_text(token_id):
                end.append(token_id)
                if len(end) >= _NUM_READ_BEFORE and token_id not in self._tokenizer._byte_ids:
                    break
        return end[::-1]

    def _has_text(self, token_id: int) -> bool:
        if self._skip_special_tokens and token_id in self._tokenizer._skipped_ids:
            return False
        return 0 <= token_id < self._tokenizer.vocab_size

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special_tokens)


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has half a surrogate pair at position {error.start}: "
            f"{text[error.start]!r} alone is no character"
        ) from None


def _byte_fallback_ids(backend: Backend) -> frozenset[int]:
    """The tokens `<0x00>` to `<0xFF>`, if the decoder takes them for bytes."""
    ids = [backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
    known = frozenset(i for i in ids if i is not None)
    letter = ids[ord("A")]
    return known if letter is not None and backend.decode([letter]) == "A" else frozenset()


def _optional_json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.exists() else {}


def _special_tokens(*configs: Mapping[str, Any]) -> dict[str, str]:
    """{'bos_token': '<s>', …}: a later config wins; a token is a string or an object with one."""
    tokens: dict[str, str] = {}
    for config in configs:
        for name in _SPECIAL_NAMES:
            token = config.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                tokens[name] = token
    return tokens


def _add_missing_tokens(
    backend: Backend, config: Mapping[str, Any], special_tokens: Iterable[str]
) -> None:
    """Add what only `tokenizer_config.json` declares, as far as the ids agree."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    declared = config.get("added_tokens_decoder")
    for name, token in declared.items() if isinstance(declared, dict) else ():
        if not name.isdigit() or not isinstance(token, dict) or "content" not in token:
            continue
        token_id = int(name)
        here = backend.token_to_id(token["content"])
        next_id = backend.get_vocab_size(with_added_tokens=True)
        if token["content"] not in known and (here if here is not None else next_id) == token_id:
            options = ("single_word", "lstrip", "rstrip", "normalized", "special")
            backend.add_tokens(
                [AddedToken(token["content"], **{o: bool(token.get(o)) for o in options})]
            )
    for token in special_tokens:
        # A token that is named special is one, even if tokenizer.json does not mark it.
        if backend.token_to_id(token) is not None:
            backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, (list, tuple)):
        raise ValueError(f"messages must be a list of dicts, not {type(messages).__name__}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(f"messages[{i}] must be a dict, not {type(message).__name__}")
        role = message.get("role")
        # The role is the one part of a message that a template may put inside a control token.
        if not isinstance(role, str) or not role.replace("_", "").replace("-", "").isalnum():
            raise ValueError(f"messages[{i}] must have a role of letters and digits, not {role!r}")
