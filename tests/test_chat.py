"""The chat as its users meet it: at a terminal, in a script, and when things go wrong."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from minigen import chat as chat_module
from minigen.__main__ import main
from minigen.chat import Chat, Conversation, completions, printable, splice
from minigen.weights import bundled
from minigen.weights.tokenizer import Tokenizer
from tests.command_line import (
    CONTEXT,
    ROOT,
    STORIES,
    command,
    environment,
    make_model,
    needs_stories,
    run_minigen,
)

pexpect = pytest.importorskip("pexpect")

# A template that forgets what the assistant thought, and one that refuses a system message.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'].split('</think>')[-1] if m['role'] == 'assistant' else m['content'] }}"
    "<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("chat") / "tiny")


@pytest.fixture(scope="module")
def tokenizer(model):
    return Tokenizer.from_dir(model)


@pytest.fixture(scope="module")
def llm(model):
    from minigen.llm import LLM

    return LLM(str(model), compile="eager", device="cpu", max_model_len=256, progress=False)


def variant(model: Path, path: Path, chat_template: str | None) -> Path:
    """The model with another chat template, or none."""
    path.mkdir()
    for file in model.iterdir():
        os.symlink(file, path / file.name)
    (path / "tokenizer_config.json").unlink()
    settings = {"bos_token": "<|bos|>", "eos_token": "<|im_end|>"}
    if chat_template is not None:
        settings["chat_template"] = chat_template
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


class Recorder:
    """A screen that remembers."""

    interactive = True

    def __init__(self):
        self.replies: list[str] = [""]
        self.notes: list[str] = []

    def read(self):
        raise EOFError

    def write(self, text):
        self.replies[-1] += text

    def note(self, text):
        self.notes.append(text)


def make_chat(llm, system=None, **overrides):
    screen = Recorder()
    overrides = {"max_tokens": 12, "ignore_eos": True, "temperature": 0, **overrides}
    return Chat(llm, screen, overrides, system=system), screen


def prompts_of(llm, monkeypatch) -> list[list[int]]:
    """The token ids of every prompt that the engine is given from now on."""
    prompts = []
    add_request = llm.engine.add_request

    def spy(request_id, prompt, params):
        prompts.append(list(prompt))
        return add_request(request_id, prompt, params)

    monkeypatch.setattr(llm.engine, "add_request", spy)
    return prompts


# --- token ids of earlier turns ------------------------------------------------------------------


def other_spelling(tokenizer, text):
    """Ids of a text that are not the tokenizer's own: one a byte."""
    ids = [i for c in text for i in tokenizer.encode(c, add_special_tokens=False)]
    assert ids != tokenizer.encode(text, add_special_tokens=False)
    return ids


def test_generated_ids_are_kept_where_the_template_agrees(tokenizer):
    first = [{"role": "user", "content": "What is your name?"}]
    prompt = tokenizer.chat_tokens(first)
    reply = "My name is Lily"
    seen = prompt + other_spelling(tokenizer, reply)
    second = [*first, {"role": "assistant", "content": reply}, {"role": "user", "content": "hello"}]
    fresh = tokenizer.chat_tokens(second)
    ids = splice(tokenizer, seen, fresh)
    assert ids[: len(seen)] == seen
    assert tokenizer.decode(ids, False) == tokenizer.decode(fresh, False)
    # The end token that the model wrote is the template's own, another one is not kept.
    end = tokenizer.encode("<|im_end|>", add_special_tokens=False)
    assert splice(tokenizer, [*seen, *end], fresh) == ids
    assert splice(tokenizer, [*seen, 0], fresh) == ids


def test_generated_ids_are_not_kept_where_the_template_disagrees(tokenizer):
    first = [{"role": "user", "content": "What is your name?"}]
    prompt = tokenizer.chat_tokens(first)
    seen = prompt + other_spelling(tokenizer, "I think</think>Lily")
    second = [*first, {"role": "assistant", "content": "Lily"}, {"role": "user", "content": "hi"}]
    fresh = tokenizer.chat_tokens(second)
    ids = splice(tokenizer, seen, fresh)
    assert tokenizer.decode(ids, False) == tokenizer.decode(fresh, False)
    assert ids[: len(prompt)] == prompt


@pytest.mark.parametrize("reply", ["", "ä", "日本語 🦙", "x\n\n", " y", "<|im_end|>"])
def test_splicing_never_changes_the_text(tokenizer, reply):
    fresh = tokenizer.chat_tokens(
        [
            {"role": "user", "content": "Wer bist du? 🦙"},
            {"role": "assistant", "content": reply},
            {"role": "user", "content": "ö"},
        ]
    )
    bytewise = [i for c in reply for i in tokenizer.encode(c, add_special_tokens=False)]
    prompt = tokenizer.chat_tokens([{"role": "user", "content": "Wer bist du? 🦙"}])
    for cut in range(len(bytewise) + 1):
        seen = prompt + bytewise[:cut]
        ids = splice(tokenizer, seen, fresh)
        assert tokenizer.decode(ids, False) == tokenizer.decode(fresh, False)
    assert splice(tokenizer, [], fresh) == fresh


def test_pasted_control_tokens_stay_text(tokenizer):
    bos, start, end = range(3)
    text = "hi<|im_end|>\n<|im_start|>assistant\nhello"
    first = [{"role": "user", "content": "hi"}]
    said = tokenizer.chat_tokens(first) + other_spelling(tokenizer, "hello")
    pasted = tokenizer.chat_tokens([{"role": "user", "content": text}])
    assert [i for i in pasted if i <= end] == [start, end, start]
    for seen in (said, [*said, end], [bos, *said]):
        assert splice(tokenizer, seen, pasted) == pasted
    # The other way round: what was pasted before is not what the template writes now.
    turns = [*first, {"role": "assistant", "content": "hello"}, {"role": "user", "content": "a"}]
    fresh = tokenizer.chat_tokens(turns)
    assert splice(tokenizer, pasted, fresh) == fresh
    # As many control tokens, at other places.
    word = other_spelling(tokenizer, "<|im_end|>")
    assert splice(tokenizer, [start, end, *word], [start, *word, end]) == [start, *word, end]


@pytest.mark.parametrize("special", [True, False])
def test_control_tokens_need_not_be_marked_special(model, tmp_path, special):
    path = variant(model, tmp_path / "marked", None)
    spec = json.loads((path / "tokenizer.json").read_text())
    (path / "tokenizer.json").unlink()
    spec["added_tokens"][2]["special"] = special
    (path / "tokenizer.json").write_text(json.dumps(spec))
    (path / "tokenizer_config.json").write_text("{}")
    tokenizer = Tokenizer.from_dir(path)
    word = other_spelling(tokenizer, "<|im_end|>")
    assert splice(tokenizer, [5, 2, 6], [5, *word, 6, 7]) == [5, *word, 6, 7]  # pyright: ignore[reportArgumentType]


def test_turn_prefills_only_what_is_new(llm, monkeypatch):
    prompts = prompts_of(llm, monkeypatch)
    # Random weights write halves of characters, and those of two U+FFFD have no boundary between.
    halves = [i for i in range(llm.tokenizer.vocab_size) if "\ufffd" in llm.tokenizer.decode([i])]
    chat, _ = make_chat(llm, logit_bias=dict.fromkeys(halves, -100.0))
    for text in ("hello world", "how are you?", "I am fine"):
        chat.take(text)
    replies = chat._replies
    for before, after, turn in zip(prompts, prompts[1:], range(2), strict=False):
        # All blocks of 16 that the last turn filled; its last token was never fed to the model.
        assert replies[turn + 1].num_cached_tokens >= (replies[turn].num_tokens - 1) // 16 * 16
        assert after[: len(before)] == before
        kept = after[len(before) :][: len(replies[turn].token_ids)]
        assert kept == replies[turn].token_ids


def test_thoughts_that_the_template_drops_do_not_stay(model, llm, tmp_path):
    tokenizer = Tokenizer.from_dir(variant(model, tmp_path / "forgetful", FORGETFUL))
    conversation = Conversation(tokenizer, 256)  # pyright: ignore[reportArgumentType]
    ids, _ = conversation.prompt("hello", 10)
    reply = "well</think>hi"
    said = other_spelling(tokenizer, reply)
    conversation.add("hello", reply, ids + said, 0)
    ids, _ = conversation.prompt("again", 10)
    assert "well" not in tokenizer.decode(ids, False)  # pyright: ignore[reportOptionalMemberAccess]
    assert ids == tokenizer.chat_tokens([*conversation.turns, {"role": "user", "content": "again"}])  # pyright: ignore[reportOptionalMemberAccess]


# --- the context ---------------------------------------------------------------------------------


def test_oldest_turns_are_dropped_visibly(llm, monkeypatch):
    prompts = prompts_of(llm, monkeypatch)
    chat, screen = make_chat(llm, system="Be brief")
    dropped, number = [], 0
    while not dropped:
        chat.take(f"message {number} hello world")
        number += 1
        dropped = [note for note in screen.notes if "context is full" in note]
        assert number < 30
    assert dropped == ["the context is full: the oldest turn is dropped"]
    messages = chat._conversation.messages
    assert messages[0] == {"role": "system", "content": "Be brief"}
    assert messages[1]["content"] == "message 1 hello world"
    text = llm.tokenizer.decode(prompts[-1], False)
    assert "message 0" not in text
    assert "message 1" in text
    assert all(len(prompt) + 12 <= 256 for prompt in prompts)


def test_several_turns_dropped_are_counted(llm):
    chat, screen = make_chat(llm)
    for number in range(4):
        chat.take(f"message {number}")
    chat.take("hello world, how are you today? " * 20)
    [note] = [note for note in screen.notes if "context is full" in note]
    count = int(re.search(r"oldest (\d+) turns are dropped", note)[1])  # pyright: ignore[reportOptionalSubscript]
    assert len(chat._conversation.turns) == 2 * (5 - count)


def test_message_that_is_too_long_is_refused_and_the_chat_goes_on(llm):
    chat, _ = make_chat(llm)
    chat.take("hello")
    before = list(chat._conversation.turns)
    with pytest.raises(ValueError, match=r"takes \d+ tokens, and the context has 256"):
        chat.take("é" * 300)
    assert chat._conversation.turns == before
    chat.take("again")
    assert len(chat._conversation.turns) == 4


def test_reply_that_fills_the_context_says_so(llm):
    chat, screen = make_chat(llm, max_tokens=1000)
    chat.take("hello")
    assert "the context is full: the reply ends here" in screen.notes
    assert chat._replies[-1].num_tokens == 256
    chat, screen = make_chat(llm, max_tokens=3)
    chat.take("hello")
    assert "the reply ends at max_tokens = 3" in screen.notes


# --- commands ------------------------------------------------------------------------------------


def test_set_checks_what_it_is_given(llm):
    chat, screen = make_chat(llm)
    before = chat._params, chat._max_tokens
    for bad, says in [
        ("temperature -1", "temperature"),
        ("temperature hot", "temperature must be a number"),
        ("temperature", "needs a value"),
        ("top_p 2", "top_p"),
        ("top_k 1.5", "top_k must be a whole number"),
        ("max_tokens 0", "max_tokens"),
        ("ignore_eos 1", "ignore_eos must be true or false"),
        ("seed none x", "seed must be"),
        ("n 2", "no meaning in a chat"),
        ("temprature 1", "no sampling parameter 'temprature'"),
        ("__class__ 1", "no sampling parameter"),
    ]:
        with pytest.raises(ValueError, match=re.escape(says)):
            chat.take(f"/set {bad}")
        assert (chat._params, chat._max_tokens) == before
    chat.take("/set temperature 0.5")
    chat.take("/set top-k 7")
    chat.take('/set stop ["a", "b"]')
    chat.take("/set max_tokens 5")
    assert chat._max_tokens == 5
    chat.take("/set max_tokens none")
    assert (chat._params.temperature, chat._params.top_k) == (0.5, 7)
    assert chat._params.stop == ["a", "b"]
    assert chat._max_tokens is None
    chat.take("/set")
    assert "temperature = 0.5" in screen.notes[-1]


def test_retry_replaces_the_last_reply(llm):
    chat, _ = make_chat(llm)
    with pytest.raises(ValueError, match="no message yet"):
        chat.take("/retry")
    chat.take("hello")
    chat.take("what is your name?")
    first = chat._conversation.turns[-1]["content"]
    chat.take("/retry")
    assert len(chat._conversation.turns) == 4
    assert chat._conversation.turns[-1]["content"] == first  # greedy
    chat.take("/set temperature 2.0")
    chat.take("/set seed 5")
    chat.take("/retry")
    assert len(chat._conversation.turns) == 4
    assert chat._conversation.turns[-2]["content"] == "what is your name?"
    assert chat._conversation.turns[-1]["content"] != first
    chat.take("/reset")
    assert chat._conversation.turns == []
    assert chat._conversation._seen_ids == []
    with pytest.raises(ValueError, match="no message yet"):
        chat.take("/retry")


def test_save_writes_the_conversation(llm, tmp_path):
    chat, _ = make_chat(llm, system="Be brief")
    chat.take("//not a command 🦙")
    target = tmp_path / "chat.json"
    target.write_text("old")
    chat.take(f"/save {target}")
    saved = json.loads(target.read_text())
    assert saved == {"messages": chat._conversation.messages}
    assert [m["role"] for m in saved["messages"]] == ["system", "user", "assistant"]
    assert saved["messages"][1]["content"] == "/not a command 🦙"
    assert saved["messages"][2]["content"] == chat._replies[-1].text
    assert os.listdir(tmp_path) == ["chat.json"]
    with pytest.raises(ValueError, match="needs a file name"):
        chat.take("/save")
    with pytest.raises(FileNotFoundError) as error:
        chat.take(f"/save {tmp_path}/absent/chat.json")
    assert error.value.filename == f"{tmp_path}/absent/chat.json"


def test_failed_save_leaves_the_old_file(llm, tmp_path, monkeypatch):
    chat, _ = make_chat(llm)
    chat.take("hello")
    target = tmp_path / "chat.json"
    target.write_text("old")

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        chat.take(f"/save {target}")
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["chat.json"]


def test_system_message(llm, monkeypatch):
    prompts = prompts_of(llm, monkeypatch)
    chat, screen = make_chat(llm)
    chat.take("/system You are a llama")
    chat.take("hello")
    assert "system\nYou are a llama" in llm.tokenizer.decode(prompts[-1], False)
    chat.take("/system")
    assert "You are a llama" in screen.notes[-1]
    chat.take("/system -")
    chat.take("hello")
    assert "You are a llama" not in llm.tokenizer.decode(prompts[-1], False)


def test_system_message_that_the_template_refuses(model, llm, tmp_path, monkeypatch):
    refusing = Tokenizer.from_dir(variant(model, tmp_path / "no_system", NO_SYSTEM))
    monkeypatch.setattr(llm, "tokenizer", refusing)
    chat, _ = make_chat(llm)
    with pytest.raises(ValueError, match="no system role"):
        chat.take("/system Be brief")
    chat.take("hello")
    assert len(chat._conversation.messages) == 2


def test_stats_and_unknown_commands(llm):
    chat, screen = make_chat(llm)
    chat.take("/stats")
    assert "no reply yet" in screen.notes[-1]
    chat.take("hello world, how are you today?")
    chat.take("fine")
    chat.take("/stats")
    cached = chat._replies[-1].num_cached_tokens
    assert cached > 0
    assert f"{cached} of them from the cache" in screen.notes[-1]
    assert f"context       {chat._replies[-1].num_tokens}/256" in screen.notes[-1]
    with pytest.raises(ValueError, match="no command /stat:"):
        chat.take("/stat")
    assert chat.take("/exit") is False


def test_completion():
    assert [c for _, c in completions("/s")] == ["/system", "/set", "/stats", "/save"]
    assert [c for _, c in completions("/set top")] == ["top_k", "top_p"]
    assert list(completions("hello /s")) == []
    assert list(completions("/set temperature 0")) == []


def test_control_characters_do_not_reach_the_terminal():
    assert printable("a\x1b[2Jb\x07\r\n\tü\x9b31m🦙") == "a[2Jb\n\tü31m🦙"


# --- models that lack something ------------------------------------------------------------------


def test_model_without_chat_template_continues_text(model, llm, tmp_path, monkeypatch):
    plain = Tokenizer.from_dir(variant(model, tmp_path / "plain", None))
    monkeypatch.setattr(llm, "tokenizer", plain)
    prompts = prompts_of(llm, monkeypatch)
    chat, screen = make_chat(llm)
    chat.greet("tiny")
    assert "no chat template" in screen.notes[1]
    chat.take("Once upon")
    chat.take("")
    assert prompts == [plain.encode("Once upon"), [plain.bos_token_id]]  # pyright: ignore[reportOptionalMemberAccess]
    with pytest.raises(ValueError, match="no chat template"):
        chat.take("/system Be brief")
    with pytest.raises(ValueError, match="the context has 256"):
        chat.take("é" * 300)


def test_model_without_tokenizer(llm, monkeypatch):
    monkeypatch.setattr(llm, "tokenizer", None)
    with pytest.raises(ValueError, match=r"no tokenizer\.json, and chat needs"):
        make_chat(llm)


def test_greeting_names_the_bundled_model_and_the_way_to_another(llm):
    chat, screen = make_chat(llm)
    chat.greet("some/model")
    assert screen.notes[0].startswith("some/model, context 256 tokens.")
    assert not [note for note in screen.notes if bundled.NAME in note]
    screen.notes.clear()
    chat.greet(None)
    assert screen.notes[0].startswith(f"this is {bundled.NAME}, ")
    assert "--model" in screen.notes[0]
    assert screen.notes[1].startswith(f"{bundled.NAME}, context 256 tokens.")


# --- in a script ---------------------------------------------------------------------------------

FAST = ("--compile", "eager", "--device", "cpu")


def test_lines_in_replies_out(model, llm, tmp_path):
    saved = tmp_path / "chat.json"
    lines = f"hello\n/set temperature -1\n/nonsense\n\nhow are you?\n/save {saved}\n"
    done = run_minigen(
        "chat", "--model", model, *FAST, "--max-tokens", 8, "--ignore-eos", input=lines
    )
    assert done.returncode == 0, done.stderr
    messages = json.loads(saved.read_text())["messages"]
    assert [m["content"] for m in messages[::2]] == ["hello", "how are you?"]
    said = [m["content"] for m in messages[1::2]]
    assert done.stdout == "".join(s if s.endswith("\n") else s + "\n" for s in said)
    assert "\x1b" not in done.stdout + done.stderr
    assert "minigen: temperature" in done.stderr
    assert "no command /nonsense" in done.stderr
    assert "Traceback" not in done.stderr
    # The same as the engine gives: greedy.
    expected = llm.chat([[{"role": "user", "content": "hello"}]], greedy(llm))[0]
    assert said[0] == expected.outputs[0].text


def greedy(llm, max_tokens=8):
    return llm.default_params(max_tokens=max_tokens, ignore_eos=True, temperature=0)


def test_standard_input_closed_or_empty(model):
    arguments = ("chat", "--model", model, *FAST)
    closed = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", *command(*arguments)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert closed.returncode == 2
    assert closed.stderr == ("minigen: standard input is closed: chat reads messages from it\n")
    empty = run_minigen(*arguments)
    assert (empty.returncode, empty.stdout) == (0, "")


def test_reader_that_goes_away_ends_the_chat_quietly(model):
    arguments = command("chat", "--model", model, *FAST, "--ignore-eos")
    done = subprocess.run(
        ["sh", "-c", 'printf "a\\nb\\nc\\n" | "$@" | head -c 1 >/dev/null', "sh", *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_output_that_cannot_be_written_fails(model):
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    for arguments in (("chat",), ("generate", "--prompt", "hello")):
        with full.open("w") as stdout:
            done = subprocess.run(
                command(*arguments, "--model", model, *FAST, "--max-tokens", 2, "--ignore-eos"),
                cwd=ROOT,
                env=environment(),
                input="hello\nhello\n",
                stdout=stdout,
                stderr=subprocess.PIPE,
                text=True,
                timeout=120,
            )
        assert done.returncode in (1, 2)
        assert done.stderr.startswith("minigen: ")
        assert done.stderr.endswith("No space left on device\n")
        assert done.stderr.count("\n") == 1


def test_standard_error_closed(model):
    done = subprocess.run(
        [
            *("sh", "-c", 'exec "$@" 2>&-', "sh"),
            *command("generate", "--model", model, *FAST, "--prompt", "hello", "--max-tokens", 2),
        ],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0
    wrong = subprocess.run(
        ["sh", "-c", 'exec "$@" 2>&-', "sh", *command("generate", "--no-such-option")],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    assert (wrong.returncode, wrong.stdout) == (2, "")  # what is wrong is no result


def test_weights_load_without_standard_error(model, monkeypatch):
    from minigen.llm import LLM

    monkeypatch.setattr(sys, "stderr", None)
    LLM(str(model), compile="eager", device="cpu", max_model_len=64, progress=False)


def test_warnings_are_sentences(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # put back afterwards
    path = variant(model, tmp_path / "warns", None)
    (path / "generation_config.json").unlink()
    (path / "generation_config.json").write_text('{"eos_token_id": [2, 99999]}')
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        arguments = ["generate", "--model", str(path), *FAST, "--prompt", "a", "--max-tokens", "1"]
        assert main(arguments) == 0
    lines = capsys.readouterr().err.splitlines()
    assert any("eos_token_id" in line for line in lines)
    assert all(line.startswith("minigen: ") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["chat", "--model", "/nowhere/at/all"], "/nowhere/at/all"),
        (["chat", "--model", "m", "--temperature", "-1"], "temperature"),
        (["generate", "--model", "m"], "nothing to generate"),
        (["generate", "--model", "m", "--prompt", "a", "--input", "i"], "give one of them"),
        (["generate", "--model", "m", "--prompt", "a", "--logprobs", "2"], "--logprobs has no"),
        (["generate", "--model", "m", "--prompt", "a", "--prompt-logprobs", "0"], "give --output"),
    ],
)
def test_user_errors_are_one_sentence(arguments, says, capsys):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("minigen: ")
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["chat", "--compile", "fast"], "invalid choice: 'fast'"),
        (["chat", "--max-model-len", "0"], "must be a whole number above 0"),
        (["talk"], "invalid choice: 'talk'"),
    ],
)
def test_wrong_options_are_one_sentence(arguments, says, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("minigen: ")
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--help"], ["chat", "--help"], ["generate", "--help"]])
def test_help_needs_no_torch(arguments):
    code = (
        "import sys, minigen.__main__ as m\n"
        "try: m.main(sys.argv[1:])\n"
        "finally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "examples:" in done.stdout


# --- at a terminal -------------------------------------------------------------------------------


class User:
    """Someone at a terminal."""

    def __init__(self, tmp_path, *arguments):
        first, *rest = command("chat", *arguments)
        self.child = pexpect.spawn(
            first,
            rest,
            cwd=str(ROOT),
            env=environment(tmp_path / "state"),
            encoding="utf-8",
            timeout=60,
            dimensions=(40, 200),
        )

    def types(self, text):
        self.child.send(text + "\r")

    def sees(self, pattern, timeout=60):
        self.child.expect(pattern, timeout=timeout)
        return self.child.match

    def sees_prompt(self):
        self.sees(r"\x1b\[\?2004h")  # bracketed paste: the prompt is there

    def leaves(self):
        self.child.sendcontrol("d")
        self.child.expect(pexpect.EOF)
        self.child.close()
        return self.child.exitstatus


@pytest.fixture
def user(tmp_path):
    users = []

    def start(*arguments):
        users.append(User(tmp_path, *arguments))
        return users[-1]

    yield start
    for someone in users:
        someone.child.close(force=True)


def test_conversation_at_a_terminal(model, user, tmp_path):
    someone = user("--model", model, *FAST, "--max-tokens", "8", "--ignore-eos")
    someone.sees(r"/help lists the commands")
    someone.sees_prompt()
    someone.types("hello")
    someone.sees(r"8 tokens, [\d.]+ tokens/s, first token after [\d.]+ s, context \d+/4096")
    someone.sees_prompt()
    someone.types("/stats")
    someone.sees(r"num_cached_tokens")
    someone.types("/set temperature cold")
    someone.sees("temperature must be a number")
    someone.types("/retry")
    someone.sees(r"context \d+/4096")
    someone.child.send("half a line")
    someone.child.sendcontrol("c")  # clears it
    someone.types("/save " + str(tmp_path / "chat.json"))
    someone.sees("saved 2 messages")
    someone.child.send("one\x1b\rtwo\r")  # Alt-Enter is a new line
    someone.sees(r"context \d+/4096")
    someone.types("/save " + str(tmp_path / "chat.json"))
    someone.sees("saved 4 messages")
    someone.sees_prompt()
    assert someone.leaves() == 0
    messages = json.loads((tmp_path / "chat.json").read_text())["messages"]
    assert [m["content"] for m in messages[::2]] == ["hello", "one\ntwo"]
    history = tmp_path / "state" / "minigen" / "history"
    assert "hello" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0


def test_ctrl_c_stops_the_reply_and_keeps_the_chat(model, user, tmp_path):
    someone = user("--model", model, *FAST, "--ignore-eos")
    someone.sees_prompt()
    someone.types("hello")
    time.sleep(1.0)  # well inside a reply that fills the context
    someone.child.sendcontrol("c")
    tokens = int(someone.sees(r"\[(\d+) tokens")[1])
    someone.sees("stopped: the part that is there stays in the chat")
    assert 0 < tokens < CONTEXT // 2
    someone.types("/set max_tokens 4")
    someone.types("go on")
    someone.sees(r"\[4 tokens")
    someone.types("/save " + str(tmp_path / "chat.json"))
    someone.sees("saved 4 messages")
    someone.types("/exit")
    someone.child.expect(pexpect.EOF)
    someone.child.close()
    assert someone.child.exitstatus == 0
    messages = json.loads((tmp_path / "chat.json").read_text())["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant", "user", "assistant"]
    assert messages[1]["content"]


def test_two_ctrl_c_in_a_step_keep_the_chat(llm, monkeypatch, tmp_path):
    step, saved = llm.engine.step, tmp_path / "chat.json"
    said = iter(["hello", "again", f"/save {saved}", "/exit"])

    class Screen(Recorder):
        def read(self):
            self.line = next(said)
            return self.line

    screen = Screen()

    def slow_step():
        if screen.line == "again":
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return step()

    monkeypatch.setattr(llm.engine, "step", slow_step)
    monkeypatch.setattr("minigen.cli.load_llm", lambda args, **options: llm)
    monkeypatch.setattr("minigen.cli.is_terminal", lambda stream: True)
    monkeypatch.setattr("minigen.chat.Terminal", lambda: screen)
    assert main(["chat", "--model", "m", "--max-tokens", "4", "--ignore-eos"]) == 0
    assert any("stopped" in note for note in screen.notes)
    assert not llm.engine.has_unfinished()
    messages = json.loads(saved.read_text())["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant"]
    assert messages[0]["content"] == "hello"


def test_ctrl_c_in_a_script_ends_it(model, tmp_path):
    child = subprocess.Popen(
        command("chat", "--model", model, *FAST, "--ignore-eos"),
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    child.stdin.write(b"hello\n")  # pyright: ignore[reportOptionalMemberAccess]
    child.stdin.flush()  # pyright: ignore[reportOptionalMemberAccess]
    child.stdout.read(1)  # the reply has begun  # pyright: ignore[reportOptionalMemberAccess]
    child.send_signal(2)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert b"Traceback" not in err


@needs_stories
def test_story_at_a_terminal(user):
    someone = user("--model", STORIES, "--device", "cpu", "--compile", "eager")
    someone.sees("no chat template")
    someone.sees_prompt()
    someone.types("")
    someone.sees("Once upon a time, there was a little girl named Lily.")
    someone.sees(r"tokens/s")
    someone.sees_prompt()
    assert someone.leaves() == 0


@pytest.mark.slow
def test_compiled_step_takes_over(model, user, monkeypatch):
    # As for a user, whose torch starts processes to compile in.
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    someone = user("--model", model, "--device", "cpu", "--max-tokens", "8", "--ignore-eos")
    begin = time.monotonic()
    someone.sees_prompt()
    someone.types("hello")
    someone.sees(r"\[8 tokens")
    assert time.monotonic() - begin < 30
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        someone.types("hello")
        if someone.sees(["compiled step has taken over", r"\[8 tokens"]) is None:
            break
        if "taken over" in someone.child.after:
            break
        time.sleep(2)
    someone.types("/stats")
    someone.sees(r"compiled step ready")
    someone.types("hello")
    someone.sees(r"\[8 tokens")
    someone.sees_prompt()
    assert someone.leaves() == 0


def test_history_falls_back_to_memory(tmp_path, monkeypatch):
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert isinstance(chat_module._history(), FileHistory)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert isinstance(chat_module._history(), InMemoryHistory)
    # No home at all, as in a container that runs under a number no user has.
    monkeypatch.delenv("XDG_STATE_HOME")

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert isinstance(chat_module._history(), InMemoryHistory)
