"""`python -m minigen chat`: a conversation with a model, at a terminal or line by line."""

import argparse
import dataclasses
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from minigen import cli
from minigen.weights import bundled

if TYPE_CHECKING:
    from minigen.llm import LLM
    from minigen.outputs import RequestOutput
    from minigen.weights.tokenizer import Tokenizer

Message = dict[str, Any]

# A turn keeps this share of the context free for the reply: older turns go first.
REPLY_SHARE = 4
# Parameters that have no meaning where one reply is shown as it comes.
NOT_IN_CHAT = frozenset({"n", "logprobs", "prompt_logprobs"})

HELP = """\
/help              this list
/system [TEXT]     show or set the system message; `/system -` removes it
/reset             forget the conversation, keep the system message
/retry             another reply to the last message (the same one without temperature)
/set [NAME VALUE]  show or set sampling parameters, as in `/set temperature 0.7`
/stats             figures of the last reply and of the session
/save FILE         write the conversation as JSON
/exit              leave, as Ctrl-D does
A message that begins with a slash is written with two. Enter sends, Alt-Enter begins a new line,
Ctrl-C stops a reply or clears the line."""
COMMANDS = ("/help", "/system", "/reset", "/retry", "/set", "/stats", "/save", "/exit")


def run(args: argparse.Namespace) -> int:
    """Load the model, then talk until the input ends. Returns the exit code."""
    if sys.stdin is None or sys.stdin.closed:
        raise ValueError("standard input is closed: chat reads messages from it")
    if sys.stdout is None or sys.stdout.closed:
        raise ValueError("standard output is closed: chat writes replies to it")
    overrides = cli.sampling_overrides(args)
    _check_sampling(overrides)
    at_terminal = cli.is_terminal(sys.stdin) and cli.is_terminal(sys.stdout)
    screen: Screen = Terminal() if at_terminal else Lines()
    llm = cli.load_llm(args, compile_in_background=True)
    chat = Chat(llm, screen, overrides, system=args.system)
    chat.greet(args.model)
    while True:
        try:
            line = screen.read()
        except EOFError:
            return cli.EXIT_OK
        if line is None:
            continue
        try:
            goes_on = chat.take(line)
        except (ValueError, OSError) as error:
            if isinstance(error, BrokenPipeError):
                raise
            screen.note(cli.one_line(error))
            continue
        except KeyboardInterrupt:  # the second Ctrl-C within a step
            if not screen.interactive:
                raise
            screen.note("\nstopped: nothing of this turn stays in the chat")
            continue
        if not goes_on:
            return cli.EXIT_OK


def _check_sampling(overrides: dict[str, Any]) -> None:
    """Refuse values out of range before a model is loaded."""
    from minigen.sampling_params import SamplingParams

    # Without a limit of its own a reply may fill the context, so min_tokens alone is no mistake.
    SamplingParams(**{"max_tokens": None, **overrides})


# --- where the conversation is read and shown ----------------------------------------------------


class Screen(Protocol):
    def read(self) -> str | None:
        """The next message; None: nothing was said, ask again. Raises EOFError at the end."""
        ...

    def write(self, text: str) -> None:
        """A piece of a reply."""
        ...

    def note(self, text: str) -> None:
        """What the program itself has to say."""
        ...

    @property
    def interactive(self) -> bool: ...


class Lines:
    """Plain text: a line is a message, replies go to standard output, notes to standard error."""

    interactive = False

    def __init__(self) -> None:
        for stream in (sys.stdin, sys.stdout):
            # Half a character in a script's input or a model's output must not end the chat.
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]

    def read(self) -> str | None:
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\r\n")

    def write(self, text: str) -> None:
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            # Not an OSError: of those the chat tells and goes on, here every reply would be lost.
            raise RuntimeError(f"standard output: {error.strerror}") from error

    def note(self, text: str) -> None:
        print(f"minigen: {text}", file=sys.stderr, flush=True)


class Terminal:
    """A prompt with history, multi-line editing and completion; notes are dim."""

    interactive = True

    def __init__(self) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import Completer, Completion
        from prompt_toolkit.document import Document
        from prompt_toolkit.key_binding import KeyBindings
        from prompt_toolkit.key_binding.key_processor import KeyPressEvent

        keys = KeyBindings()

        @keys.add("enter")
        def _(event: KeyPressEvent) -> None:
            event.current_buffer.validate_and_handle()

        @keys.add("escape", "enter")
        def _(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        class CommandCompleter(Completer):
            def get_completions(self, document: Document, complete_event: Any) -> Iterator[Any]:
                for start, candidate in completions(document.text_before_cursor):
                    yield Completion(candidate, start_position=start)

        self._dim, self._plain = ("", "") if os.environ.get("NO_COLOR") else ("\x1b[2m", "\x1b[0m")
        self._session: PromptSession[str] = PromptSession(
            history=_history(),
            multiline=True,
            key_bindings=keys,
            completer=CommandCompleter(),
            complete_while_typing=False,
            prompt_continuation="  ",
            enable_history_search=True,
        )

    def read(self) -> str | None:
        try:
            return self._session.prompt("> ")
        except KeyboardInterrupt:
            return None

    def write(self, text: str) -> None:
        sys.stdout.write(printable(text))
        sys.stdout.flush()

    def note(self, text: str) -> None:
        print(f"{self._dim}{printable(text)}{self._plain}", flush=True)


def completions(text: str) -> Iterator[tuple[int, str]]:
    """What could stand at the end of a command line: (where it starts, seen from the end; it)."""
    words = text.split(" ")
    if not text.startswith("/") or "\n" in text:
        return
    if len(words) == 1:
        candidates: Sequence[str] = COMMANDS
    elif words[0] == "/set" and len(words) == 2:
        candidates = [name for name in cli.PARAMETERS if name not in NOT_IN_CHAT]
    else:
        return
    yield from ((-len(words[-1]), c) for c in candidates if c.startswith(words[-1]))


def printable(text: str) -> str:
    """The text without control characters: a model must not drive the user's terminal."""
    return "".join(
        c for c in text if c in "\n\t" or not (c < " " or c == "\x7f" or "\x80" <= c <= "\x9f")
    )


def _history() -> Any:
    """The history file, private to the user; in memory only where no file can be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    try:
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        file = Path(state) / "minigen" / "history"
        file.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        return InMemoryHistory()
    return FileHistory(str(file))


# --- the conversation ----------------------------------------------------------------------------


class Conversation:
    """Messages, and the token ids that the engine has seen for them."""

    def __init__(self, tokenizer: "Tokenizer", max_model_len: int, system: str | None = None):
        self.system = system
        self.turns: list[Message] = []  # user, assistant, user, assistant, …
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._seen_ids: list[int] = []

    @property
    def messages(self) -> list[Message]:
        return self._with_system(self.turns)

    def prompt(self, text: str, reply_len: int | None) -> tuple[list[int], int]:
        """Token ids of the conversation with `text` as its next message, and how many of the
        oldest turns have to go for it.

        Turns go until there is room for `reply_len` tokens, but for no more than a quarter of the
        context. ValueError if the message alone is too long, or the template refuses it.
        """
        room = max(1, self._max_model_len // REPLY_SHARE)
        room = min(room, reply_len) if reply_len is not None else room
        for dropped in range(0, len(self.turns) + 1, 2):
            kept = [*self.turns[dropped:], {"role": "user", "content": text}]
            ids = self._tokenizer.chat_tokens(self._with_system(kept))
            ids = splice(self._tokenizer, self._seen_ids, ids)
            if len(ids) + room <= self._max_model_len:
                return ids, dropped // 2
        # Alone in the context the message may take the reply's room too, except one token.
        if len(ids) < self._max_model_len:
            return ids, len(self.turns) // 2
        what = "the system message and this message" if self.system else "this message"
        raise ValueError(
            f"{what} take{'' if self.system else 's'} {len(ids)} tokens, and the context has "
            f"{self._max_model_len}: say it in fewer words"
        )

    def add(self, text: str, reply: str, ids: list[int], dropped: int) -> None:
        """Take a turn into the conversation; `ids` are those of its prompt and its reply."""
        del self.turns[: 2 * dropped]
        self.turns += [
            {"role": "user", "content": text},
            {"role": "assistant", "content": reply},
        ]
        self._seen_ids = ids

    def take_back(self) -> str:
        """Remove the last turn and return what the user said in it."""
        message = self.turns[-2]["content"]
        del self.turns[-2:]
        return message

    def forget(self) -> None:
        self.turns.clear()
        self._seen_ids = []

    def _with_system(self, turns: list[Message]) -> list[Message]:
        return [{"role": "system", "content": self.system}, *turns] if self.system else turns


def splice(tokenizer: "Tokenizer", seen: list[int], fresh: list[int]) -> list[int]:
    """`fresh` with as much of its beginning as possible replaced by ids already `seen`.

    The two spell the same text, but a reply that the model generated often has other ids than the
    tokenizer gives for its text, and the engine's cache knows only the former. Returned is the
    longest prefix of `seen` whose text ends where a token of `fresh` ends, and the rest of `fresh`.
    It ends before a control token that the other has not: spelled alike, one is what a user typed.
    """
    same = _common(seen, fresh)
    if same in (len(seen), len(fresh)):
        return fresh
    # Decoders treat the first token in their own ways: some common ones go before the difference.
    start = max(0, same - 8)
    seen_ends, seen_text, seen_controls = _ends(tokenizer, seen[start:])
    fresh_ends, fresh_text, fresh_controls = _ends(tokenizer, fresh[start:])
    num_alike = _common(seen_controls, fresh_controls)
    differing = seen_controls[num_alike : num_alike + 1] + fresh_controls[num_alike : num_alike + 1]
    common = min([_common(seen_text, fresh_text), *(at for at, _ in differing)])
    end = max((end for end in seen_ends.keys() & fresh_ends.keys() if end <= common), default=None)
    if end is None:
        return fresh
    return seen[: start + seen_ends[end]] + fresh[start + fresh_ends[end] :]


def _common(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many items at their beginnings are equal."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def _ends(
    tokenizer: "Tokenizer", ids: list[int]
) -> tuple[dict[int, int], str, list[tuple[int, int]]]:
    """{length of text: number of tokens that spell it}, the text, special tokens included, and
    [(where in the text it begins, id)] of the control tokens."""
    stream = tokenizer.stream(skip_special_tokens=False)
    is_control = {token_id: _is_control(tokenizer, token_id) for token_id in set(ids)}
    ends, text = {0: 0}, ""
    controls: list[tuple[int, int]] = []
    for i, token_id in enumerate(ids, start=1):
        if is_control[token_id]:
            controls.append((len(text), token_id))
        text += stream.push(token_id)
        ends.setdefault(len(text), i)
    text += stream.flush()  # half a character at the end of a reply
    ends.setdefault(len(text), len(ids))
    return ends, text, controls


def _is_control(tokenizer: "Tokenizer", token_id: int) -> bool:
    """Whether a user may not write this token: it is special, or reads like markup.

    Some ordinary tokens read so too; one more or less of them only ends what `splice` keeps.
    """
    from minigen.weights.lookalikes import is_markup

    text = tokenizer.decode([token_id], skip_special_tokens=False)
    return is_markup(text) or text != tokenizer.decode([token_id])


# --- replies -------------------------------------------------------------------------------------


@dataclasses.dataclass
class Reply:
    """One reply, and the figures that the user sees of it. Times are seconds."""

    text: str
    token_ids: list[int]
    finish_reason: str | None
    num_prompt_tokens: int
    num_cached_tokens: int
    first_token_time: float | None  # from the request on
    total_time: float

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens after the first, whose time is the prompt's."""
        if self.first_token_time is None or len(self.token_ids) < 2:
            return None
        return (len(self.token_ids) - 1) / max(self.total_time - self.first_token_time, 1e-9)

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + len(self.token_ids)

    def summary(self, max_model_len: int) -> str:
        parts = [f"{len(self.token_ids)} tokens"]
        if self.tokens_per_second is not None:
            parts.append(f"{self.tokens_per_second:.1f} tokens/s")
        if self.first_token_time is not None:
            parts.append(f"first token after {self.first_token_time:.2f} s")
        parts.append(f"context {self.num_tokens}/{max_model_len}")
        return f"[{', '.join(parts)}]"


class Chat:
    """A conversation, the engine that answers in it, and the commands that steer it.

    `overrides` are sampling parameters over the model's own; `max_tokens` among them limits a
    reply, which otherwise ends with the context. ValueError for a model without tokenizer.
    """

    def __init__(
        self,
        llm: "LLM",
        screen: Screen,
        overrides: dict[str, Any] | None = None,
        system: str | None = None,
    ):
        if llm.tokenizer is None:
            raise ValueError(
                "this model has no tokenizer.json, and chat needs a tokenizer: put the file beside "
                "config.json, or generate from token ids with `generate --input`"
            )
        if system and not llm.tokenizer.has_chat_template:
            raise ValueError("this model has no chat template, so it takes no system message")
        overrides = dict(overrides or {})
        self._llm = llm
        self._tokenizer = llm.tokenizer
        self._screen = screen
        self._max_tokens: int | None = overrides.pop("max_tokens", None)
        self._params = llm.default_params(**{**overrides, "max_tokens": None})
        self._conversation = Conversation(self._tokenizer, llm.max_model_len, system)
        self._replies: list[Reply] = []
        self._last_message: str | None = None  # what /retry asks again
        self._last_is_in_chat = False
        self._request_numbers = itertools.count()
        self._compile_status: str | None = None

    def greet(self, model: str | None) -> None:
        """Say what there is to know before the first message; None is the bundled model."""
        if model is None:
            # In a script, too: what was not chosen should be known.
            self._screen.note(
                f"this is {bundled.NAME}, the small model that comes with minigen: --model "
                "PATH_OR_HUB_ID, with make MODEL=PATH_OR_HUB_ID, chooses another"
            )
        if self._screen.interactive:
            self._screen.note(
                f"{model or bundled.NAME}, context {self._llm.max_model_len} tokens. "
                "/help lists the commands, Ctrl-C stops a reply, Ctrl-D leaves."
            )
        if not self._tokenizer.has_chat_template:
            self._screen.note(
                "this model has no chat template: it continues each line as plain text, and an "
                "empty line lets it begin by itself"
            )
        self._note_compilation()

    def take(self, line: str) -> bool:
        """Do what a line asks for: a command or a message. False if it asks to leave.

        Raises ValueError or OSError where it cannot be done; the chat is then as it was.
        """
        if line.startswith("//"):
            line = line[1:]
        elif line.startswith("/"):
            return self._command(line)
        if line.strip() or not self._tokenizer.has_chat_template:
            self._say(line)
        return True

    # --- commands --------------------------------------------------------------------------------

    def _command(self, line: str) -> bool:
        name, _, rest = line.partition(" ")
        actions: dict[str, Callable[[str], None]] = {
            "/help": lambda rest: self._screen.note(HELP),
            "/system": self._set_system,
            "/reset": self._reset,
            "/retry": self._retry,
            "/set": self._set,
            "/stats": lambda rest: self._screen.note(self._stats()),
            "/save": self._save,
        }
        if name == "/exit":
            return False
        if name not in actions:
            raise ValueError(
                f"there is no command {name}: the commands are {' '.join(COMMANDS)}; a message "
                "that begins with a slash is written with two"
            )
        actions[name](rest.strip())
        return True

    def _set_system(self, text: str) -> None:
        if not self._tokenizer.has_chat_template:
            raise ValueError("this model has no chat template, so it takes no system message")
        if not text:
            system = self._conversation.system
            self._screen.note(f"system message: {system}" if system else "no system message")
            return
        before = self._conversation.system
        self._conversation.system = None if text == "-" else text
        try:  # some templates refuse a system message
            self._conversation.prompt("", reply_len=1)
        except ValueError:
            self._conversation.system = before
            raise
        self._screen.note("system message removed" if text == "-" else "system message set")

    def _reset(self, rest: str) -> None:
        self._conversation.forget()
        self._last_message = None
        self._last_is_in_chat = False
        self._screen.note("conversation forgotten")

    def _retry(self, rest: str) -> None:
        if self._last_message is None:
            raise ValueError("there is no message yet to reply to again")
        turns, was_in_chat = list(self._conversation.turns), self._last_is_in_chat
        if was_in_chat:
            self._conversation.take_back()
        self._last_is_in_chat = False
        try:
            self._say(self._last_message)
        finally:
            if not self._last_is_in_chat:  # refused, or stopped before its first word
                self._conversation.turns = turns
                self._last_is_in_chat = was_in_chat

    def _set(self, rest: str) -> None:
        name, _, text = rest.partition(" ")
        name, text = name.replace("-", "_"), text.strip()
        if not name:
            values = {**dataclasses.asdict(self._params), "max_tokens": self._max_tokens}
            shown = (f"{n} = {values[n]}" for n in cli.PARAMETERS if n not in NOT_IN_CHAT)
            self._screen.note("\n".join(shown))
            return
        if name in NOT_IN_CHAT:
            raise ValueError(f"{name} has no meaning in a chat: `generate` takes it")
        if name in cli.PARAMETERS and not text:
            raise ValueError(f"/set {name} needs a value, as in `/set temperature 0.7`")
        value = cli.read_parameter(name, text)
        params = dataclasses.replace(self._params, **{name: value})
        if name == "max_tokens":
            self._max_tokens = value
        else:
            self._params = params
        self._screen.note(f"{name} = {text}")

    def _stats(self) -> str:
        if not self._replies:
            return f"no reply yet; compiled step: {self._llm.compile_status}"
        last, limit = self._replies[-1], self._llm.max_model_len
        rate = last.tokens_per_second
        first = last.first_token_time
        total_tokens = sum(len(reply.token_ids) for reply in self._replies)
        total_time = sum(reply.total_time for reply in self._replies)
        return "\n".join(
            [
                f"prompt        {last.num_prompt_tokens} tokens, {last.num_cached_tokens} of them "
                "from the cache (num_cached_tokens)",
                f"reply         {len(last.token_ids)} tokens, ended by {last.finish_reason}",
                f"speed         {'-' if rate is None else f'{rate:.1f}'} tokens/s",
                f"first token   {'-' if first is None else f'{first:.3f} s'}",
                f"whole reply   {last.total_time:.3f} s",
                f"context       {last.num_tokens}/{limit} tokens",
                f"compiled step {self._llm.compile_status}",
                f"session       {len(self._replies)} replies, {total_tokens} tokens in "
                f"{total_time:.1f} s",
            ]
        )

    def _save(self, rest: str) -> None:
        if not rest:
            raise ValueError("/save needs a file name, as in `/save chat.json`")
        path = Path(rest).expanduser()
        messages = self._conversation.messages
        cli.write_atomically(
            path, json.dumps({"messages": messages}, ensure_ascii=False, indent=2) + "\n"
        )
        self._screen.note(f"saved {len(messages)} messages to {path}")

    # --- a turn ----------------------------------------------------------------------------------

    def _say(self, text: str) -> None:
        """Answer a message and take both into the conversation. ValueError if it cannot be."""
        # Ctrl-C counts from here on: a long prompt takes time before its first step, too.
        with cli.Interrupt() as interrupt:
            if self._tokenizer.has_chat_template:
                prompt_ids, dropped = self._conversation.prompt(text, self._max_tokens)
            else:
                prompt_ids, dropped = self._plain_prompt(text), 0
            if dropped:
                turns = "turn is" if dropped == 1 else f"{dropped} turns are"
                self._screen.note(f"the context is full: the oldest {turns} dropped")
            self._note_compilation()
            reply = self._reply(prompt_ids, interrupt)
            self._replies.append(reply)
            self._last_message = text
            self._last_is_in_chat = bool(reply.text) or reply.finish_reason != "abort"
            if self._last_is_in_chat:
                ids = prompt_ids + reply.token_ids
                self._conversation.add(text, reply.text, ids, dropped)
            if self._screen.interactive:
                self._screen.note(reply.summary(self._llm.max_model_len))
            self._explain_end(reply)
            self._note_compilation()
        if reply.finish_reason == "abort" and not self._screen.interactive:
            raise KeyboardInterrupt  # in a script Ctrl-C ends the program

    def _plain_prompt(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text)
        bos = self._tokenizer.bos_token_id
        if not ids and bos is not None:
            ids = [bos]
        if not ids:
            raise ValueError("this model has no token to begin with: give it some text to continue")
        if len(ids) >= self._llm.max_model_len:
            raise ValueError(
                f"this text takes {len(ids)} tokens, and the context has "
                f"{self._llm.max_model_len}: give fewer"
            )
        return ids

    def _explain_end(self, reply: Reply) -> None:
        if reply.finish_reason == "abort":
            kept = "the part that is there stays in the chat" if reply.text else "nothing was said"
            self._screen.note(f"stopped: {kept}")
        elif reply.finish_reason == "length":
            if reply.num_tokens >= self._llm.max_model_len:
                self._screen.note("the context is full: the reply ends here")
            else:
                self._screen.note(f"the reply ends at max_tokens = {self._max_tokens}")

    def _reply(self, prompt_ids: list[int], interrupt: cli.Interrupt) -> Reply:
        """Generate and show one reply; Ctrl-C ends it."""
        engine = self._llm.engine
        room = self._llm.max_model_len - len(prompt_ids)
        max_tokens = room if self._max_tokens is None else min(room, self._max_tokens)
        min_tokens = min(self._params.min_tokens, max_tokens)
        params = dataclasses.replace(self._params, max_tokens=max_tokens, min_tokens=min_tokens)
        request_id = f"chat-{next(self._request_numbers)}"
        output: RequestOutput | None = None
        first_token_time, shown, reason = None, "", None
        start = time.perf_counter()
        engine.add_request(request_id, prompt_ids, params)
        try:
            while reason is None:
                if interrupt.requested:
                    reason = "abort"
                    break
                for step_output in engine.step():
                    if step_output.request_id == request_id:
                        output = step_output
                if output is None:
                    continue
                completion = output.outputs[0]
                if completion.token_ids and first_token_time is None:
                    first_token_time = time.perf_counter() - start
                self._screen.write(completion.text[len(shown) :])
                shown = completion.text
                reason = completion.finish_reason
        finally:
            # A reply that was stopped, or whose reader went away, leaves nothing in the engine.
            if reason in (None, "abort"):
                engine.abort(request_id)
        if not shown.endswith("\n"):
            self._screen.write("\n")
        token_ids = list(output.outputs[0].token_ids) if output else []
        return Reply(
            text=shown,
            token_ids=token_ids,
            finish_reason=reason,
            num_prompt_tokens=len(prompt_ids),
            num_cached_tokens=(output.metrics.num_cached_tokens or 0) if output else 0,
            first_token_time=first_token_time,
            total_time=time.perf_counter() - start,
        )

    def _note_compilation(self) -> None:
        """Say once what changed about the compiled step."""
        before, now = self._compile_status, self._llm.compile_status
        self._compile_status = now
        if now == before:
            return
        if now == "compiling":
            self._screen.note("compiling in the background: replies run uncompiled until then")
        elif now == "ready" and before == "compiling":
            self._screen.note("the compiled step has taken over")
        elif now.startswith("failed"):
            why = now.partition(":")[2].strip() or "no reason given"
            self._screen.note(f"compiling failed, replies run uncompiled: {why}")
