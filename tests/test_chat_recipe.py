"""The data of the bundled model: what is cleaned, what is left out, what is drawn."""

import json
import lzma
import random
import re
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigen import LLM, SamplingParams
from minigen.tokenizing import is_held_out
from tests.command_line import ROOT, make_model, run_tool
from tools.chat_recipe import names, samples
from tools.chat_recipe.__main__ import friendly, main, parser, small_talk
from tools.chat_recipe.clean import clean, is_foul, is_kind, paragraphs
from tools.chat_recipe.dialogues import Dialogues, fill, your
from tools.chat_recipe.stories import heroes, is_tellable, request, told

FILE = ROOT / "tools" / "chat_recipe" / "dialogues.txt"
OWN = Dialogues.parse(FILE.read_text(encoding="utf-8"))

# --- cleaning ------------------------------------------------------------------------------------


@given(st.text())
def test_cleaning_is_done_once(text: str) -> None:
    assert clean(clean(text)) == clean(text)
    assert not re.search(r"^\s|\s$|  |\n\n|[“”‘’\xa0]", clean(text))


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126)))
def test_plain_text_keeps_its_words(text: str) -> None:
    assert clean(text).split() == text.split()


@given(st.sampled_from("“”’…–é"), st.text("abc ", max_size=5))
def test_broken_encodings_are_mended(mark: str, text: str) -> None:
    whole = f"x{text}{mark}y"
    # Bytes without a character in Windows-1252 arrive as the control characters of Latin-1.
    bytes_ = whole.encode()
    broken = "".join(
        bytes([b]).decode("cp1252")
        if b not in (0x81, 0x8D, 0x8F, 0x90, 0x9D)
        else bytes([b]).decode("latin-1")
        for b in bytes_
    )
    assert clean(broken) == clean(whole)


def test_lines_broken_within_sentences_are_joined() -> None:
    assert paragraphs("Goat and Cow\nwere friends. One\nday\n\nthey went.\nHome.") == (
        "Goat and Cow were friends. One day they went.\nHome."
    )


def test_what_is_foul_and_what_is_unkind() -> None:
    for text in ("what a Shitty day", "they were NAKED", "some sexual thing"):
        assert is_foul(text)
        assert not is_kind(text)
    for text in ("You are stupid", "he has a gun", "I will kill it"):
        assert not is_foul(text)
        assert not is_kind(text)
    for text in ("an assistant passes the class", "skilled and begun", "Sussex", "Scunthorpe"):
        assert is_kind(text)


# --- dialogues -----------------------------------------------------------------------------------


@given(st.integers(0, 2**32))
def test_a_drawn_dialogue_is_whole(seed: int) -> None:
    messages = OWN.draw(random.Random(seed), "Mini")["messages"]
    if messages[0]["role"] == "system":
        messages = messages[1:]
    roles = [message["role"] for message in messages]
    assert roles == ["user", "assistant"] * (len(roles) // 2)
    assert roles
    for message in messages:
        assert message["content"]
        assert not re.search(r"[{}|]|  ", message["content"])
        assert is_kind(message["content"]) or message["role"] == "user"
        assert clean(message["content"]) == message["content"]


def test_the_same_seed_draws_the_same() -> None:
    a, b = (random.Random(3) for _ in range(2))
    assert [OWN.draw(a, "Mini") for _ in range(20)] == [OWN.draw(b, "Mini") for _ in range(20)]


def test_slots_are_drawn_together_and_kept() -> None:
    own = Dialogues.parse(
        "= pet, does: dog, bark at my door | cat, sleep\n\n"
        "weight 3\nu: My {pet} likes to {does}.\na: A {pet}!\n+: It can {does}.\n\n"
        "recall pet\nu: My pet?\na: A {pet}.\n"
    )
    rng, seen = random.Random(0), set()
    for _ in range(200):
        messages = own.draw(rng, "Mini")["messages"]
        messages = [m["content"] for m in messages if m["role"] != "system"]
        pet = "dog" if "dog" in messages[0] else "cat"
        does = {"dog": "bark at your door", "cat": "sleep"}[pet]
        assert messages[1] == f"A {pet}! It can {does}."
        if len(messages) > 2:
            assert messages[3] == f"A {pet}."
        seen.add((pet, len(messages)))
    assert seen == {("dog", 2), ("dog", 4), ("cat", 2), ("cat", 4)}


def test_half_of_the_names_are_made_up() -> None:
    own = Dialogues.parse("= ~name: Ann | Bob\n\nu: I am {name}.\na: Hi {name}!\n")
    rng = random.Random(0)
    names = []
    for _ in range(400):
        messages = own.draw(rng, "Mini")["messages"]
        names.append(messages[-1]["content"].removeprefix("Hi ").removesuffix("!"))
        assert names[-1].lower() in messages[-2]["content"].lower()
        assert re.fullmatch("[A-Z][a-z]+", names[-1])
    given = sum(name in ("Ann", "Bob") for name in names)
    assert 150 < given < 250
    assert len(set(names)) > 100


def test_what_is_recalled_was_said() -> None:
    rng, count = random.Random(1), 0
    for _ in range(4000):
        texts = [m["content"] for m in OWN.draw(rng, "Mini")["messages"] if m["role"] != "system"]
        for i, text in enumerate(texts):
            if match := re.fullmatch(r"I remember: your name is (\w+)\.", text):
                assert match[1].lower() in " ".join(texts[: i - 1]).lower()
                count += 1
    assert count > 5


def test_filling() -> None:
    assert fill("a {x}. {x} runs", {"x": "owl"}) == "An owl. Owl runs"
    assert your("I ride my bike to me, Imy") == "you ride your bike to you, Imy"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("u: hi {nobody}\na: x", "line 1: no line gives the slot nobody a value"),
        ("a: hi", "line 1: u: and a: must alternate"),
        ("u: hi\nu: hi", "line 2: u: and a: must alternate"),
        ("+: hi", "line 1: u: and a: must alternate"),
        ("u: hi", "line 1: a block must end with what a: says"),
        ("u: hi\na: x\nu: and\n\nu: hi\na: x", "line 3: a block must end with what a: says"),
        ("= a, b: x", "line 1: each alternative must give all of a, b a value"),
        ("\nwhat", "line 2 is none of"),
        ("weight 0", "line 1 is none of"),
        ("recall x", "line 1 is none of"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        Dialogues.parse(text)


# --- stories, personas, talk ---------------------------------------------------------------------

STORY = (
    "Once upon a time there was a little girl named Lily. She had an owl. The owl was old. "
    "One day the owl flew away. Lily cried. Then the owl came back, and it had a gift for her. "
    "It was a golden feather, and Lily kept it for ever."
)


def test_stories_are_asked_for_by_what_is_in_them() -> None:
    assert heroes(STORY) == ["a girl named Lily", "Lily", "an owl"]
    assert is_tellable(STORY)
    assert not is_tellable(STORY[:150])
    assert not is_tellable(STORY * 9)
    assert not is_tellable("Names of things. " * 20)
    asked = {request(STORY, random.Random(i)) for i in range(300)}
    assert any("an owl" in text for text in asked)
    assert any("Lily" in text for text in asked)
    assert not any("{" in text for text in asked)
    messages = told([STORY, STORY + " The end."], random.Random(0))["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)


def test_answers_that_contradict_who_it_is_are_left_out() -> None:
    def item(answer: str, persona: str = "caring") -> dict:
        messages = [
            {"role": "user", "content": "a?"},
            {"role": "assistant", "content": answer},
        ]
        return {"messages": messages, "persona": persona}

    items = [item("I'm fine."), item("I'm a bot."), item("No name."), item("Hi.", "witty")]
    rows = list(small_talk(items, random.Random(0)))
    assert [[m["content"] for m in row["messages"]] for row in rows] == [["a?", "I'm fine."]]
    said = {"messages": [{"role": "assistant", "content": text} for text in ("Hi", "Okay")]}
    assert friendly(said)
    said["messages"][0]["content"] = "you idiot"
    assert not friendly(said)


# --- the whole command ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """A few lines under each set's name."""
    path = tmp_path_factory.mktemp("sets")
    talk = {"messages": [{"role": r, "content": "Nice “day”."} for r in ("user", "assistant")] * 2}
    foul = {"messages": [{"role": "user", "content": "shit"}, *talk["messages"][1:]]}
    single = {"messages": talk["messages"][:2]}
    for name in ("self_dialogue", "sgd", "topical_chat_valid_test", "human_chat", "taskmaster4"):
        write(path, name, [talk, talk, foul])
    write(path, "fairytaleqa_qa", [single])
    asked = [{"role": "user", "content": "Fine?"}, {"role": "assistant", "content": "Yes."}]
    write(path, "ms_personality_chat_english", [{"messages": asked, "persona": "friendly"}])
    tales = [{"text": STORY.replace("Lily", name)} for name in ("Ann", "Bea", "Cleo", "Dora")]
    for name in ("tinystories_sample", "stories_asp_pratham_en", "fairytaleqa_stories"):
        write(path, name, [*tales, tales[0], {"text": "naked"}])
    return path


def write(path: Path, name: str, items: list[dict]) -> None:
    lines = "".join(json.dumps(item) + "\n" for item in items)
    (path / f"{name}.jsonl.xz").write_bytes(lzma.compress(lines.encode()))


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_command_writes_what_train_reads(sets, tmp_path) -> None:
    options = ["--data", str(sets), "--output", str(tmp_path), "--holdout", "0.5"]
    args = parser().parse_args([*options, "--dialogues", "30", "--tellings", "10"])
    main(args)
    talk = lines(tmp_path / "pretrain" / "sgd.jsonl")
    assert [m["content"] for m in talk[0]["messages"]] == ['Nice "day".'] * 4
    assert len(talk) == 1
    tales = lines(tmp_path / "pretrain" / "tinystories_sample.jsonl")
    assert len(tales) == 4
    assert len(lines(tmp_path / "finetune" / "dialogues.jsonl")) == 30
    # Stories that the first stage holds out are not told in the second.
    told_rows = lines(tmp_path / "finetune" / "stories.jsonl")
    shown = {message["content"] for row in told_rows for message in row["messages"]}
    for tale in tales:
        assert (tale["text"] in shown) == (not is_held_out(tale, 0.5))
    before = {p.name: p.read_bytes() for p in (tmp_path / "finetune").iterdir()}
    main(args)
    assert {p.name: p.read_bytes() for p in (tmp_path / "finetune").iterdir()} == before


def test_an_absent_set_is_named(tmp_path) -> None:
    finished = run_tool("chat_recipe", "--data", tmp_path, "--output", tmp_path)
    assert finished.returncode == 2
    assert "Traceback" not in finished.stderr
    assert "self_dialogue.jsonl.xz" in finished.stderr


def test_sample_chats_are_what_the_model_says(tmp_path) -> None:
    llm = LLM(make_model(tmp_path / "tiny"), compile="eager", device="cpu", progress=False)
    params = SamplingParams(temperature=0, max_tokens=5)
    scripts = (("Hello!",), ("a", "b"))
    talks = samples.chats(llm, scripts, params)
    assert [[m["role"] for m in talk] for talk in talks] == [
        ["user", "assistant"],
        ["user", "assistant"] * 2,
    ]
    alone = llm.chat([{"role": "user", "content": "Hello!"}], params)
    assert talks[0][1]["content"] == alone[0].outputs[0].text
    said = [talks[1][0], talks[1][1], {"role": "user", "content": "b"}]
    assert talks[1][3]["content"] == llm.chat(said, params)[0].outputs[0].text
    text = samples.as_markdown(talks[0])
    assert text.startswith("**Hello!**\n\n> ")


def test_repeated_names_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that gives back what stood last before it, but forgets where a turn lies between."""

    def chats(_: object, scripts: list[list[str]], params: SamplingParams) -> list[Any]:
        assert params.temperature == 0
        talks = []
        for script in scripts:
            talk = []
            for before, turn in zip(["", *script], script, strict=False):
                talk.append({"role": "user", "content": turn})
                talk.append({"role": "assistant", "content": f"{before} {turn}".upper()})
            talks.append(talk)
        return talks

    monkeypatch.setattr(names, "chats", chats)
    found = names.count_repeated(cast(LLM, None), 60)
    assert found == {"at once": [*names.NAMES], "two turns later": [], "a dog's": [*names.NAMES]}
    # A name that stands in the questions would be found in vain.
    asked = " ".join(turn for script, _ in names.QUESTIONS.values() for turn in script)
    assert not set(names.NAMES) & set(re.findall(r"\w+", asked))
    # A part of a word is no name.
    monkeypatch.setattr(names, "NAMES", ("Ann",))
    monkeypatch.setattr(
        names, "chats", lambda *_: [[{"role": "user", "content": "Anna Ann's"}] * 8]
    )
    assert names.count_repeated(cast(LLM, None), 60)["at once"] == ["Ann"]
    monkeypatch.setattr(names, "chats", lambda *_: [[{"role": "user", "content": "Anna"}] * 8])
    assert names.count_repeated(cast(LLM, None), 60)["at once"] == []


def test_names_as_a_command(tmp_path: Path) -> None:
    model = make_model(tmp_path / "tiny")
    done = run_tool("chat_recipe.names", "--model", model, "--max-tokens", 2)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert set(document["repeated"]) == set(names.QUESTIONS)
    assert document["names"] == 30
