"""The bundled model: how it is found and used, on a stand-in; and the real one, if it is there."""

import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.repocard import metadata_load

from minigen.__main__ import main
from minigen.weights import bundled
from minigen.weights.bundled import bundled_model
from minigen.weights.checkpoint import Checkpoint, read_config, read_generation_config
from minigen.weights.errors import CheckpointError
from minigen.weights.fingerprint import fingerprint
from minigen.weights.hub import resolve_model
from minigen.weights.tokenizer import Tokenizer
from tests.command_line import make_bundled

FAST = ("--compile", "eager", "--device", "cpu", "--max-tokens", "4", "--ignore-eos")
OPTIONS: dict[str, Any] = {"compile": "eager", "device": "cpu", "progress": False}


# --- how it is found and used, with a tiny model in its place ------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    """Two models of other weights."""
    path = tmp_path_factory.mktemp("bundled")
    return make_bundled(path / "one", seed=1), make_bundled(path / "two", seed=2)


@pytest.fixture
def carried(models, monkeypatch) -> Path:
    """The first of them is the one that comes with minigen."""
    monkeypatch.setattr(bundled, "DIRECTORY", models[0])
    return models[0]


def test_the_bundled_model_has_a_name_too(carried, tmp_path, monkeypatch) -> None:
    assert bundled_model() == resolve_model(None) == resolve_model(bundled.NAME) == carried
    monkeypatch.chdir(tmp_path)
    (tmp_path / bundled.NAME).mkdir()
    assert resolve_model(bundled.NAME) == Path(bundled.NAME)  # a directory wins, as over a hub id


def test_llm_without_a_model(carried, models) -> None:
    from minigen import LLM, SamplingParams

    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    llm = LLM(**OPTIONS)
    assert llm.path == carried
    texts = [
        one.generate("Once", params, progress=False)[0].outputs[0].text
        for one in (llm, LLM(carried, **OPTIONS), LLM(models[1], **OPTIONS))
    ]
    assert texts[0] == texts[1] != texts[2]


def talk(monkeypatch, *arguments: str) -> int:
    """`chat` in a script that says one thing."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    return main(["chat", *FAST, "--temperature", "0", *arguments])


def test_chat_without_a_model_says_which_it_is(carried, models, monkeypatch, capsys) -> None:
    assert talk(monkeypatch) == 0
    reply, told = capsys.readouterr()
    [line] = [line for line in told.splitlines() if bundled.NAME in line]
    assert line.startswith("minigen: this is ")
    assert "--model" in line
    assert talk(monkeypatch, "--model", str(carried)) == 0
    same, told = capsys.readouterr()
    assert same == reply
    assert bundled.NAME not in told
    assert talk(monkeypatch, "--model", str(models[1])) == 0
    assert capsys.readouterr().out != reply


def generate_to(target: Path, *arguments: object) -> int:
    options = ("--output", target, *FAST, "--temperature", 0, *arguments)
    return main([str(argument) for argument in ("generate", *options)])


def test_generate_goes_on_with_the_same_weights_only(
    carried, models, monkeypatch, tmp_path, capsys
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "Once"}\n')
    assert generate_to(target, "--input", source) == 0
    settings = json.loads((tmp_path / "out.jsonl.settings.json").read_text())
    assert settings["model"] == fingerprint(carried)
    source.write_text('{"prompt": "Once"}\n{"prompt": "Twice"}\n')
    first = target.read_bytes()
    capsys.readouterr()
    # Other weights are refused, named on the command line or come with another minigen.
    assert generate_to(target, "--input", source, "--model", models[1]) == 2
    assert "was begun with model = " in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(bundled, "DIRECTORY", models[1])
        assert generate_to(target, "--input", source) == 2
        assert "was begun with model = " in capsys.readouterr().err
    assert target.read_bytes() == first
    # The same ones go on, however they are named.
    assert generate_to(target, "--input", source, "--model", carried) == 0
    assert generate_to(target, "--input", source) == 0
    assert [json.loads(line)["id"] for line in target.read_bytes().splitlines()] == [1, 2]
    # And a run that was begun with a named model does not go on with the default.
    other = tmp_path / "other.jsonl"
    assert generate_to(other, "--input", source, "--model", models[1]) == 0
    assert generate_to(other, "--input", source) == 2


@pytest.mark.parametrize(
    "arguments", [("chat",), ("generate", "--prompt", "Once"), ("generate", "--input", "in.jsonl")]
)
def test_without_a_bundled_model_one_sentence_says_what_to_do(
    arguments, monkeypatch, tmp_path, capsys
) -> None:
    monkeypatch.setattr(bundled, "DIRECTORY", tmp_path / "absent")
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text('{"prompt": "Once"}\n')
    output = ("--output", "out.jsonl") if "--input" in arguments else ()
    assert main([*arguments, *output]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("minigen: this copy of minigen carries no model of its own")
    assert "--model" in err
    assert err.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]


def test_llm_without_a_bundled_model(monkeypatch, tmp_path) -> None:
    from minigen import LLM

    monkeypatch.setattr(bundled, "DIRECTORY", tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"carries no model of its own.*LLM\(model\)"):
        LLM(**OPTIONS)


@pytest.mark.parametrize("name", [*bundled.FILES, "model.safetensors.index.json", "shard", "end"])
def test_a_bundled_model_that_is_incomplete(models, monkeypatch, tmp_path, name) -> None:
    for file in models[0].iterdir():
        os.symlink(file, tmp_path / file.name)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    if name == "end":
        whole = shard.read_bytes()
        shard.unlink()
        shard.write_bytes(whole[:-1])
        says = "truncated"
    else:
        says = shard.name if name == "shard" else name
        (tmp_path / says).unlink()
    monkeypatch.setattr(bundled, "DIRECTORY", tmp_path)
    with pytest.raises(CheckpointError, match=rf"is incomplete \(.*{re.escape(says)}.*--model"):
        bundled_model()


@pytest.mark.parametrize(("command", "named"), [("chat", 1), ("generate", 1), ("bench", 0)])
def test_help_names_the_default(command, named, monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert text.count(f"by default {bundled.NAME}, which comes with minigen") == named


# --- what its card says --------------------------------------------------------------------------

CARD = """\
---
license: mit
datasets:
- someone/small-talk
- someone/tales
---
# A model

Sources: small-talk (CC BY 4.0) and someone/tales.

## Licence

MIT, as minigen.

## How it was made

    python -m minigen train --config config.json --tokenizer tok --data a.jsonl --output run

It took 42 minutes on one H200.
"""


def what_the_card_lacks(file: Path) -> list[str]:
    """What a reader of a model card would look for in vain."""
    metadata = metadata_load(file) or {}
    body = file.read_text(encoding="utf-8").split("\n---\n", 1)[-1]
    sources = metadata.get("datasets") or []
    lacking = [] if sources else ["datasets in the front matter"]
    # By the whole id or by its last part, as a word of its own.
    for source in sources:
        ends = "|".join(re.escape(name) for name in (source, source.rpartition("/")[2]))
        if not re.search(rf"(?<![\w-])({ends})(?![\w-])", body, re.IGNORECASE):
            lacking.append(f"the source {source}")
    if not metadata.get("license"):
        lacking.append("license in the front matter")
    for what, pattern in {
        "the licence": r"\blicen[cs]e\b",
        "the command": r"python -m minigen train(?!-)",
        "the time": r"\d\s*(s|min|h|seconds?|minutes?|hours?)\b",
        "the device": r"\b([AH]\d{3}|B\d{3}|RTX|CPU cores?)\b",
    }.items():
        if not re.search(pattern, body, re.IGNORECASE if what != "the device" else 0):
            lacking.append(what)
    return lacking


@pytest.mark.parametrize(
    ("taken_out", "lacking"),
    [
        ("", []),
        ("small-talk (CC BY 4.0) and ", ["the source someone/small-talk"]),
        ("and someone/tales", ["the source someone/tales"]),
        ("- someone/small-talk\n- someone/tales\n", ["datasets in the front matter"]),
        ("license: mit\n", ["license in the front matter"]),
        ("## Licence\n", ["the licence"]),
        ("python -m minigen train", ["the command"]),
        ("42 minutes", ["the time"]),
        (" on one H200", ["the device"]),
    ],
)
def test_what_a_card_lacks(taken_out, lacking, tmp_path) -> None:
    assert taken_out in CARD
    (tmp_path / "README.md").write_text(CARD.replace(taken_out, "", 1))
    assert what_the_card_lacks(tmp_path / "README.md") == lacking


# --- the real one --------------------------------------------------------------------------------

MAX_FILE_BYTES = 12_000_000  # of each file, so that any host of the repository takes it
MAX_WEIGHT_BYTES = 24_000_000
REAL = bundled.DIRECTORY
needs_model = pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} is not there (yet)")
TURNS = [
    {"role": "user", "content": "Hello!"},
    {"role": "assistant", "content": "Hello, how are you?"},
    {"role": "user", "content": "Fine. Tell me a story."},
    {"role": "assistant", "content": "Once upon a time there was a llama. It was happy."},
]


@pytest.fixture(scope="module")
def real_llm():
    from minigen import LLM

    return LLM(**OPTIONS)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    found = Tokenizer.from_dir(REAL)
    assert found is not None
    return found


def end_ids() -> set[int]:
    found = read_generation_config(REAL)["eos_token_id"]
    return set(found) if isinstance(found, list) else {found}


@needs_model
def test_the_files_are_small() -> None:
    assert bundled_model() == REAL  # all of it is there
    sizes = {file: file.stat().st_size for file in REAL.rglob("*") if file.is_file()}
    assert not [file for file, size in sizes.items() if size >= MAX_FILE_BYTES]
    weights = [size for file, size in sizes.items() if file.suffix == ".safetensors"]
    assert 0 < sum(weights) <= MAX_WEIGHT_BYTES
    assert {info.dtype for info in Checkpoint.open(REAL).tensors.values()} == {torch.bfloat16}


@needs_model
def test_transformers_gives_the_same_logits(tokenizer) -> None:
    """In fp32, into which bf16 weights go without rounding; one batch beside each text alone."""
    transformers = pytest.importorskip("transformers")
    from minigen.model import Decoder
    from tests.reference_models import random_sequences, reference_logits

    reference = transformers.AutoModelForCausalLM.from_pretrained(REAL, dtype=torch.float32).eval()
    vocab_size = read_config(REAL)["vocab_size"]
    sequences = [tokenizer.chat_tokens(TURNS), *random_sequences([1, 65, 300], vocab_size)]
    expected = reference_logits(reference, sequences)
    decoder = Decoder.from_pretrained(REAL, dtype=torch.float32, progress=False)
    with torch.no_grad():
        tokens_Sj = torch.nested.nested_tensor(
            [torch.tensor(tokens) for tokens in sequences], layout=torch.jagged
        )
        found = decoder(tokens_Sj).unbind()
    # eps, times the size of the logits, times 100 for sums of other order through the layers.
    for got, wanted in zip(found, expected, strict=True):
        tolerance = 100 * torch.finfo(torch.float32).eps * float(wanted.abs().max())
        torch.testing.assert_close(got, wanted, atol=tolerance, rtol=0)


@needs_model
def test_transformers_reads_the_same_tokens(tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(REAL)
    for add_generation_prompt in (False, True):
        found = theirs.apply_chat_template(
            TURNS, add_generation_prompt=add_generation_prompt, return_dict=False
        )
        ours = tokenizer.chat_tokens(TURNS, add_generation_prompt=add_generation_prompt)
        assert found == ours
    assert theirs.eos_token_id in end_ids()


@needs_model
def test_the_context_is_long_enough(real_llm) -> None:
    assert read_config(REAL)["max_position_embeddings"] >= 1024
    assert real_llm.max_model_len >= 1024


@needs_model
@pytest.mark.parametrize("with_system", [False, True])
def test_the_template_ends_each_turn_of_the_assistant(tokenizer, with_system) -> None:
    system = [{"role": "system", "content": "Be brief."}] if with_system else []
    ids, is_target, num_unlike = tokenizer.chat_tokens_and_targets([*system, *TURNS], end_ids())
    assert num_unlike == 0
    assert tokenizer.eos_token_id in end_ids()
    turns: list[list[int]] = [[]]
    for token_id, target in zip(ids, is_target, strict=True):
        if target:
            turns[-1].append(token_id)
        elif turns[-1]:
            turns.append([])
    turns = [turn for turn in turns if turn]
    said = [turn["content"] for turn in TURNS if turn["role"] == "assistant"]
    assert [tokenizer.decode(turn[:-1]).strip() for turn in turns] == said
    assert all(turn[-1] in end_ids() for turn in turns)
    assert not any(end_ids() & set(turn[:-1]) for turn in turns)


@needs_model
def test_a_greeting_is_answered_and_the_answer_ends(real_llm) -> None:
    params = real_llm.default_params(temperature=0.0, max_tokens=100)
    [result] = real_llm.chat([TURNS[:1]], params, progress=False)
    reply = result.outputs[0]
    assert reply.finish_reason == "stop"
    assert reply.text.strip()


@needs_model
def test_its_card_says_what_a_reader_looks_for() -> None:
    assert what_the_card_lacks(REAL / "README.md") == []
