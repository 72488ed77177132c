"""A checkpoint of a real model's widths, for the GPU tests."""

from pathlib import Path

import pytest
import torch

from minigen.shapes import SHAPES

NUM_LAYERS = 4  # of 28: the engine is compiled again and again, layer by layer


def save_random_qwen3(path: Path) -> str:
    """Random weights in bf16, written by transformers."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {**SHAPES["qwen3-0.6b"], "num_hidden_layers": NUM_LAYERS}
    config = transformers.AutoConfig.for_model(shape.pop("model_type"), **shape)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(path)
    return str(path)


def random_prompts(lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 150000, (n,), generator=generator).tolist() for n in lengths]
