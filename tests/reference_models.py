"""Small models of every family with random weights, and what transformers computes with them.

Shapes: T tokens of one sequence, V vocabulary.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
LLAMA31_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def long_rope(entries: int) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.05 * i for i in range(entries)],
        "long_factor": [1.5 + 0.7 * i for i in range(entries)],
    }


@dataclass(frozen=True)
class Case:
    """A config as transformers takes it; `stored_as` is the model_type written to config.json."""

    name: str
    family: str
    options: dict[str, Any] = field(default_factory=dict)
    stored_as: str = ""

    def build(self, seed: int = 0) -> PreTrainedModel:
        """transformers' model in fp32 with eager attention, its weights random."""
        if self.family not in CONFIG_MAPPING:
            pytest.skip(f"transformers {transformers.__version__} has no {self.family}")
        # A copy: transformers completes the rope dict that it is given in place.
        options = json.loads(json.dumps({**SMALL, **self.options}))
        config = AutoConfig.for_model(self.family, **options)
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="eager"
        )
        randomise(model, seed)
        return model.eval()

    def save(self, model: PreTrainedModel, path: Path) -> None:
        model.save_pretrained(path)
        if self.stored_as:
            edit_config(path, model_type=self.stored_as)


# Every entry differs from the others in something that the decoder must do differently.
CASES = [
    Case("llama2", "llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    Case(
        "llama3-biases",
        "llama",
        {"rope_theta": 500000.0, "head_dim": 24, "attention_bias": True, "mlp_bias": True},
    ),
    Case("llama3.1", "llama", {"rope_scaling": LLAMA31_ROPE, "tie_word_embeddings": True}),
    Case("llama-linear", "llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.5}}),
    Case("llama-yarn", "llama", {"rope_scaling": YARN}),
    Case(
        "qwen3-yarn-set",
        "qwen3",
        {
            "head_dim": 32,
            "rope_scaling": {
                **YARN,
                "beta_fast": 8.0,
                "beta_slow": 0.5,
                "mscale": 1.3,
                "mscale_all_dim": 0.7,
                "truncate": False,
            },
        },
    ),
    Case("mistral", "mistral", {"sliding_window": 8, "head_dim": 32}),
    Case("mistral-open", "mistral", {"sliding_window": None, "num_key_value_heads": 1}),
    Case(
        # transformers reads a mistral config with layer_types as ministral.
        "mistral-layer-types",
        "ministral",
        {
            "sliding_window": 8,
            "head_dim": 16,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
        stored_as="mistral",
    ),
    Case("qwen2", "qwen2", {"sliding_window": 8, "tie_word_embeddings": True}),
    Case(
        "qwen2-window",
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    ),
    Case("qwen3", "qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    Case(
        "qwen3-window",
        "qwen3",
        {
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 1,
        },
    ),
    Case("smollm3", "smollm3", {"num_hidden_layers": 5, "tie_word_embeddings": True}),
    Case(
        "smollm3-window",
        "smollm3",
        {
            "no_rope_layers": [0, 1, 0],
            "attention_bias": True,
            "mlp_bias": True,
            "use_sliding_window": True,
            "sliding_window": 8,
        },
    ),
    Case(
        "gemma2",
        "gemma2",
        {
            "num_hidden_layers": 4,
            "head_dim": 24,
            "query_pre_attn_scalar": 20,
            "sliding_window": 8,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 4.0,
            "tie_word_embeddings": True,
        },
    ),
    Case(
        "gemma2-open",
        "gemma2",
        {
            "head_dim": 16,
            "attention_bias": True,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        },
    ),
    Case("phi3", "phi3", {"sliding_window": 10, "num_key_value_heads": None}),
    Case("phi3-partial", "phi3", {"partial_rotary_factor": 0.5}),
    Case(
        "phi3-longrope",
        "phi3",
        {"rope_scaling": long_rope(8), "original_max_position_embeddings": 32},
    ),
    Case(
        "phi3-longrope-partial",
        "phi3",
        {
            "rope_scaling": long_rope(6),
            "original_max_position_embeddings": 32,
            "partial_rotary_factor": 0.75,
            "tie_word_embeddings": True,
        },
    ),
]
BY_NAME = {case.name: case for case in CASES}


def full(name: str, family: str, layers: int, widths: tuple[int, ...], **options: Any) -> Case:
    """The real widths (hidden, intermediate, query heads, key heads, head dim) of a known model."""
    keys = (
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    )
    shape = dict(zip(keys, widths, strict=True))
    return Case(name, family, {"vocab_size": 1000, "num_hidden_layers": layers, **shape, **options})


FULL_CASES = [
    full("SmolLM2-135M", "llama", 2, (576, 1536, 9, 3, 64), max_position_embeddings=8192),
    full(
        "Llama-3.2-1B",
        "llama",
        2,
        (2048, 8192, 32, 8, 64),
        max_position_embeddings=131072,
        rope_theta=500000.0,
        rope_scaling={**LLAMA31_ROPE, "factor": 32.0, "original_max_position_embeddings": 8192},
        tie_word_embeddings=True,
    ),
    full("Qwen3-0.6B", "qwen3", 2, (1024, 3072, 16, 8, 128), rope_theta=1000000.0),
    full("gemma-2-2b", "gemma2", 2, (2304, 9216, 8, 4, 256), sliding_window=64),
    full(
        "Phi-3.5-mini",
        "phi3",
        1,
        (3072, 8192, 32, 32, 96),
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_scaling=long_rope(48),
        sliding_window=262144,
    ),
]


def randomise(module: nn.Module, seed: int) -> None:
    """Random weights whose every part shows in the output; transformers' start is too tame.

    Matrices keep the size of what they multiply, times 1.5; norms and biases are far from 1 and 0.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "norm" in name:  # uniform around what transformers or `Decoder` starts with
                start = round(float(parameter.flatten()[0]))
                parameter.uniform_(start - 0.6, start + 0.6, generator=generator)
            elif parameter.dim() == 1:
                parameter.normal_(0.0, 0.5, generator=generator)
            else:
                std = 1.5 * parameter.shape[1] ** -0.5
                parameter.normal_(0.0, std, generator=generator)


@torch.no_grad()
def reference_logits(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """fp32 logits [T, V] of each sequence, run alone: long rope looks at the longest of a batch."""
    vocab_size = model.config.vocab_size
    return [
        model(input_ids=torch.tensor([tokens])).logits[0].float()
        if tokens
        else torch.empty(0, vocab_size)
        for tokens in sequences
    ]


@torch.no_grad()
def reference_greedy(model: PreTrainedModel, prompt: Sequence[int], num_tokens: int) -> list[int]:
    generated = model.generate(  # pyright: ignore[reportCallIssue] - untyped mixin
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        do_sample=False,
        min_new_tokens=num_tokens,
        max_new_tokens=num_tokens,
        pad_token_id=0,
    )
    return generated[0, len(prompt) :].tolist()


def random_sequences(lengths: Sequence[int], vocab_size: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths]


def edit_config(path: Path, **changes: Any) -> dict[str, Any]:
    """Writes the changes into `config.json`, and returns it."""
    config = {**json.loads((path / "config.json").read_text()), **changes}
    (path / "config.json").write_text(json.dumps(config))
    return config


def as_transformers_4(config: dict[str, Any]) -> dict[str, Any]:
    """The config in the words of transformers 4."""
    config = dict(config)
    config["torch_dtype"] = config.pop("dtype", None) or config.get("torch_dtype")
    rope = dict(config.pop("rope_parameters", None) or {})
    if rope:
        config["rope_theta"] = rope.pop("rope_theta")
        if "partial_rotary_factor" in rope:
            config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
        rope["type"] = rope.pop("rope_type")
        config["rope_scaling"] = None if rope["type"] == "default" else rope
    if config["model_type"] != "mistral":
        config.pop("layer_types", None)  # follows from the other keys
    if config["model_type"] == "phi3" and config.get("rope_scaling"):
        rope["type"] = "su"  # the name that the first Phi-3 files gave to long rope
        del rope["original_max_position_embeddings"]  # stood outside only
    return config
