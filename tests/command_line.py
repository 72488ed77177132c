"""What the tests of the commands share: tiny models, and a way to run `python -m minigen`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools.common import run

ROOT = Path(__file__).resolve().parent.parent
# Of Hypothesis: `ci` is small and the same at every run, `deep` looks for new examples.
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "ci")
SHARED = Path(os.environ.get("MINIGEN_SHARED", ROOT.parent / "shared"))
STORIES = SHARED / "models" / "stories260K"

needs_stories = pytest.mark.skipif(
    not STORIES.is_dir(), reason=f"{STORIES} is absent (set MINIGEN_SHARED)"
)

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "Once upon a time there was a little llama who lived on a hill.",
    "What is your name? My name is Lily and I like to play in the park.",
    "user assistant system hello world, how are you today? I am fine.",
] * 4
CONTEXT = 4096


def make_model(
    path: Path,
    chat_template: str | None = CHAT_TEMPLATE,
    tokenizer: bool = True,
    seed: int = 0,
    max_shard_size: str = "1GB",
) -> Path:
    """A Llama of random weights with a byte-level tokenizer, made from a fixed seed."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|bos|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=backend.get_vocab_size(),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).float().save_pretrained(path, max_shard_size=max_shard_size)
    (path / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 0, "eos_token_id": 2, "do_sample": False})
    )
    if tokenizer:
        backend.save(str(path / "tokenizer.json"))
        settings = {"bos_token": "<|bos|>", "eos_token": "<|im_end|>"}
        if chat_template is not None:
            settings["chat_template"] = chat_template
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def make_bundled(path: Path, seed: int = 0) -> Path:
    """The same with the files that the bundled model has: shards, a template, a card."""
    make_model(path, chat_template=None, seed=seed, max_shard_size="60KB")
    (path / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (path / "README.md").write_text("# A stand-in of random weights\n")
    assert len(list(path.glob("*.safetensors"))) > 1
    return path


def environment(state: Path | None = None) -> dict[str, str]:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"}
    env.pop("NO_COLOR", None)
    if state is not None:
        env["XDG_STATE_HOME"] = str(state)
    return env


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "minigen", *map(str, args)]


def run_minigen(*args: object, **options) -> subprocess.CompletedProcess[str]:
    """Run to the end, with standard input empty unless given."""
    options = {"input": "", "timeout": 120, **options}
    return subprocess.run(
        command(*args), cwd=ROOT, env=environment(), capture_output=True, text=True, **options
    )


def run_tool(name: str, *args: object, **options) -> subprocess.CompletedProcess[str]:
    """`python -m tools.NAME` from the root, to the end."""
    return subprocess.run(
        [sys.executable, "-m", f"tools.{name}", *map(str, args)],
        cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True,
        **{"timeout": 120, **options},
    )  # fmt: skip


def refuse_in_one_line(
    tool: Any,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    """A module of `tools`, run in this process, refuses these; what it wrote to standard output."""
    monkeypatch.setattr("sys.argv", ["tool", *arguments])
    with pytest.raises(SystemExit) as left:
        run(tool.options(), tool.main)
    assert left.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    return printed.out
