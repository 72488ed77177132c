"""What the tests of training share: a tiny tokenizer, config and data, and a way to run it."""

import json
import lzma
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from minigen.__main__ import main
from minigen.batch import Batch, make_batch
from minigen.model import Decoder, DecoderConfig
from minigen.trainer import initialise
from minigen.training_log import read_table

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
HF = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "initializer_range": 0.1,
}
WORDS = ("the", "little", "llama", "ran", "up", "a", "hill", "and", "saw", "one", "red", "ball")


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words)) + "."


def texts(count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [{"text": sentence(rng, rng.randint(1, 30))} for _ in range(count)]


def conversations(count: int, seed: int = 1) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    roles = ("user", "assistant")
    return [
        {
            "messages": [
                {"role": roles[i % 2], "content": sentence(rng, rng.randint(1, 6))}
                for i in range(2 * rng.randint(1, 2))
            ]
        }
        for _ in range(count)
    ]


def write_jsonl(file: Path, items: Sequence[Any]) -> Path:
    content = "".join(json.dumps(item) + "\n" for item in items).encode()
    file.write_bytes(lzma.compress(content) if file.suffix == ".xz" else content)
    return file


def make_inputs(path: Path) -> Path:
    """A directory with tok/, config.json, texts.jsonl and chats.jsonl.xz."""
    write_jsonl(path / "texts.jsonl", texts(60))
    write_jsonl(path / "chats.jsonl.xz", conversations(40))
    (path / "config.json").write_text(json.dumps(HF))
    (path / "template.jinja").write_text(TEMPLATE)
    code = main(
        [
            *("train-tokenizer", "--data", str(path / "texts.jsonl")),
            *("--data", str(path / "chats.jsonl.xz"), "--vocab-size", "280"),
            *("--special-token", "<|user|>", "--special-token", "<|assistant|>"),
            *("--chat-template", str(path / "template.jinja"), "--output", str(path / "tok")),
        ]
    )
    assert code == 0
    return path


def train_args(inputs: Path, output: Path, *more: object) -> list[str]:
    """A run of a few steps, on texts and conversations, uncompiled."""
    return [
        *("train", "--config", str(inputs / "config.json"), "--tokenizer", str(inputs / "tok")),
        *("--data", str(inputs / "texts.jsonl"), "--data", f"{inputs / 'chats.jsonl.xz'}:0.5"),
        *("--holdout", "0.1", "--tokens", "128", "--lr", "0.01", "--compile", "eager"),
        *("--device", "cpu", "--log-every", "1", "--output", str(output)),
        *map(str, more),
    ]


def losses(output: Path) -> list[tuple[int, str]]:
    return [(int(row["step"]), row["loss"]) for row in read_table(output / "log.csv")]


def tiny_decoder(seed: int = 0, **changes: Any) -> Decoder:
    config = DecoderConfig.from_hf({**HF, "vocab_size": 97, **changes})
    decoder = Decoder.from_config(config, dtype=torch.float32)
    initialise(decoder, seed, 0.1)
    return decoder


def random_batch(lengths: Sequence[int], config: DecoderConfig, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(config.vocab_size, (n,), generator=generator) for n in lengths]
    return make_batch(tokens, [torch.ones(n, dtype=torch.bool) for n in lengths], config, 64)
