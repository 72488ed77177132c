"""What a training run begins with: the model or config, the tokenizer, and what ends a text."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigen.model import DecoderConfig
from minigen.weights.checkpoint import read_config, read_generation_config
from minigen.weights.hub import resolve_model
from minigen.weights.json_file import read_json
from minigen.weights.tokenizer import Tokenizer


@dataclass(frozen=True)
class Start:
    """Where the model comes from: `hf` is its config.json, completed for the tokenizer."""

    model: Path | None
    tokenizer_dir: Path
    tokenizer: Tokenizer
    hf: dict[str, Any]
    config: DecoderConfig
    stop_ids: tuple[int, ...]


def read_start(args: argparse.Namespace) -> Start:
    """Raises ValueError where model and tokenizer do not fit each other."""
    model = None if args.model is None else resolve_model(args.model)
    if model is None and args.tokenizer is None:
        raise ValueError(
            "--config needs --tokenizer: a directory with a tokenizer.json, such as "
            "`python -m minigen train-tokenizer` makes"
        )
    tokenizer_dir = model if args.tokenizer is None else Path(args.tokenizer)
    assert tokenizer_dir is not None
    tokenizer = Tokenizer.from_dir(tokenizer_dir)
    if tokenizer is None:
        raise ValueError(f"{tokenizer_dir} has no tokenizer.json")
    hf = read_config(model) if model else read_json(Path(args.config))
    if model is None:
        # What a config for a new model leaves open, the tokenizer says.
        for key, value in (
            ("vocab_size", tokenizer.vocab_size),
            ("bos_token_id", tokenizer.bos_token_id),
            ("eos_token_id", tokenizer.eos_token_id),
        ):
            hf[key] = value if hf.get(key) is None else hf[key]
    config = DecoderConfig.from_hf(hf)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer in {tokenizer_dir} has {tokenizer.vocab_size} tokens, but vocab_size "
            f"is {config.vocab_size}: give a model and a tokenizer that belong together"
        )
    generation = read_generation_config(tokenizer_dir).get("eos_token_id")
    stops = generation if isinstance(generation, list) else [generation]
    stops = {*stops, *config.eos_token_ids, tokenizer.eos_token_id} - {None}
    stop_ids = tuple(sorted(i for i in stops if isinstance(i, int)))
    return Start(model, tokenizer_dir, tokenizer, hf, config, stop_ids)
