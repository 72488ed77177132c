"""generation_config.json: the defaults of sampling, and what ends a reply."""

import dataclasses
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigen import LLM, SamplingParams
from minigen.__main__ import main
from tests.command_line import make_model

FAST = ("--compile", "eager", "--device", "cpu")
OPTIONS: dict[str, Any] = {"compile": "eager", "device": "cpu", "progress": False}
VALUES = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.floats(0, 2),
        "top_k": st.integers(0, 50),
        "top_p": st.floats(0.1, 1),
        "min_p": st.floats(0, 1),
        "repetition_penalty": st.floats(0.5, 2),
    },
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("generation") / "tiny")


@pytest.fixture(scope="module")
def with_generation_config(model, tmp_path_factory):
    """The model with another generation_config.json."""

    def make(**values: Any) -> Path:
        path = tmp_path_factory.mktemp("variant")
        for file in model.iterdir():
            if file.name != "generation_config.json":
                os.symlink(file, path / file.name)
        (path / "generation_config.json").write_text(json.dumps(values))
        return path

    return make


@given(file=VALUES, do_sample=st.sampled_from([None, True, False]), overrides=VALUES)
def test_the_file_gives_defaults_and_what_is_asked_for_wins(
    with_generation_config, file, do_sample, overrides
) -> None:
    named = {} if do_sample is None else {"do_sample": do_sample}
    llm = LLM(with_generation_config(**file, **named), max_model_len=16, **OPTIONS)
    expected = {**dataclasses.asdict(SamplingParams()), **file}
    if do_sample is False:
        expected["temperature"] = 0.0
    expected.update(overrides)
    assert dataclasses.asdict(llm.default_params(**overrides)) == expected


def test_what_is_not_said_keeps_its_default(with_generation_config) -> None:
    llm = LLM(with_generation_config(top_k=None, max_length=20), max_model_len=16, **OPTIONS)
    assert llm.default_params() == SamplingParams()


def chat(monkeypatch, capsys, model: Path, *arguments: object) -> str:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    options = ("--model", model, *FAST, *arguments)
    assert main(["chat", *map(str, options)]) == 0
    return capsys.readouterr().out


def generate(monkeypatch, capsys, model: Path, *arguments: object) -> str:
    options = ("--model", model, *FAST, "--prompt", "hello", *arguments)
    assert main(["generate", *map(str, options)]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("run", [chat, generate])
def test_commands_sample_as_the_file_says(run, with_generation_config, monkeypatch, capsys) -> None:
    def reply(model: Path, *arguments: object) -> str:
        return run(monkeypatch, capsys, model, "--max-tokens", 40, "--ignore-eos", *arguments)

    hot = with_generation_config(temperature=1.5)
    greedy, penalised = ("--temperature", 0), ("--repetition-penalty", 2)
    # Of one token nothing is drawn: the file's top_k shows.
    expected = reply(hot, *greedy)
    assert reply(with_generation_config(temperature=1.5, top_k=1)) == expected
    assert reply(with_generation_config(temperature=0)) == expected
    assert reply(with_generation_config(temperature=1.5, top_k=1), "--top-k", 0) == reply(hot)
    assert reply(hot) != expected
    # Greedy, and with the penalty all the same.
    unlike = reply(hot, *greedy, *penalised)
    assert unlike != expected
    assert reply(with_generation_config(do_sample=False, repetition_penalty=2.0)) == unlike
    alike = with_generation_config(do_sample=False, repetition_penalty=2.0)
    assert reply(alike, "--repetition-penalty", 1) == expected


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("run", [chat, generate])
def test_its_end_token_ends_a_reply(
    run, as_list, model, with_generation_config, monkeypatch, capsys
) -> None:
    greedy = ("--temperature", 0, "--max-tokens", 12)
    llm = LLM(model, **OPTIONS)
    assert llm.tokenizer is not None
    prompt = llm.tokenizer.encode("hello")
    if run is chat:
        prompt = llm.tokenizer.chat_tokens([{"role": "user", "content": "hello"}])
    params = SamplingParams(temperature=0, max_tokens=12)
    ids = llm.generate([prompt], params, progress=False)[0].outputs[0].token_ids
    assert len(ids) == 12
    end = next(i for i in ids[3:] if llm.tokenizer.decode([i]).strip())
    before = ids[: ids.index(end)]
    shorter = with_generation_config(eos_token_id=[1, end] if as_list else end)
    # What a reply is printed with: an end of its own if the text has none.
    expected = llm.tokenizer.stream(prompt_ids=prompt)
    text = "".join(map(expected.push, before)) + expected.flush()
    assert run(monkeypatch, capsys, shorter, *greedy).rstrip("\n") == text.rstrip("\n")
    longer = run(monkeypatch, capsys, shorter, *greedy, "--ignore-eos")
    assert longer.startswith(text)
    assert len(longer.rstrip("\n")) > len(text)
