"""`python -m minigen train-tokenizer`: byte-level BPE of one's own data."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from minigen import cli
from minigen.data import Source, read_jsonl
from minigen.weights.save import atomic_directory, write_json
from minigen.weights.tokenizer import Tokenizer


def run(args: argparse.Namespace) -> int:
    """The command; raises ValueError (as CheckpointError) or OSError for what it cannot use."""
    output = Path(args.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is not empty: give another --output")
    template = None
    if args.chat_template is not None:
        template = Path(args.chat_template).read_text(encoding="utf-8")
    special = [t for t in (args.bos_token, args.eos_token, *args.special_token) if t]
    special = list(dict.fromkeys(special))
    sources = [Source.parse(text) for text in args.data]
    backend = train_tokenizer(texts(sources), args.vocab_size, special)
    size = backend.get_vocab_size()
    if size < args.vocab_size:
        print(
            f"minigen: the data gives a vocabulary of {size}, not {args.vocab_size}",
            file=sys.stderr,
        )
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "eos_token": args.eos_token or None,
    }
    if args.bos_token:
        settings["bos_token"] = args.bos_token
        backend.post_processor = processors.TemplateProcessing(
            single=[args.bos_token, "$A"],
            special_tokens=[(args.bos_token, backend.token_to_id(args.bos_token))],
        )
    with atomic_directory(output) as directory:
        backend.save(str(directory / "tokenizer.json"))
        write_json(directory / "tokenizer_config.json", settings)
        if template is not None:
            (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
            _check_template(directory)
    print(f"{output}: {size} tokens")
    return cli.EXIT_OK


def train_tokenizer(
    texts: Iterator[str], vocab_size: int, special_tokens: Sequence[str]
) -> Backend:
    """Byte-level BPE (GPT-2, 2.2) that gives back every text; special tokens have the first ids.

    Digits stand alone, and words are cut as GPT-2 does. Raises ValueError if there are no texts.
    """
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(special_tokens):
        raise ValueError(
            f"--vocab-size {vocab_size} is too small: 256 bytes and {len(special_tokens)} special "
            "tokens come first"
        )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=alphabet,
        show_progress=cli.is_terminal(sys.stderr),
    )
    count = 0

    def counted() -> Iterator[str]:
        nonlocal count
        for text in texts:
            count += 1
            yield text

    backend.train_from_iterator(counted(), trainer)
    if not count:
        raise ValueError("--data holds no text: a tokenizer cannot be trained on nothing")
    return backend


def texts(sources: Sequence[Source]) -> Iterator[str]:
    """Every text and every message's content. Raises ValueError naming file and line; OSError."""
    for source in sources:
        for number, item in read_jsonl(source.path):
            if isinstance(item.get("text"), str):
                yield item["text"]
                continue
            messages = item.get("messages")
            if not isinstance(messages, list):
                raise ValueError(
                    f'{source.path}:{number}: the line must have either "text" or "messages"'
                )
            for message in messages:
                content = message.get("content") if isinstance(message, dict) else None
                if isinstance(content, str):
                    yield content


def _check_template(directory: Path) -> None:
    """Raises ValueError for a template that cannot render the simplest conversation."""
    tokenizer = Tokenizer.from_dir(directory)
    assert tokenizer is not None
    hello = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello."}]
    _, targets, _ = tokenizer.chat_tokens_and_targets(hello)
    if not any(targets):
        raise ValueError(
            "--chat-template: the template writes no assistant's turn behind its generation "
            "prompt, so nothing could be learnt from it"
        )
