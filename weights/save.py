"""Checkpoints written in Hugging Face layout, whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from minigen.weights.checkpoint import INDEX_FILE, SINGLE_FILE

# What belongs to a tokenizer, and what tells how to sample.
COPIED_PATTERNS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "chat_templates/*.jinja",
)
MAX_FILE_BYTES = 5_000_000_000


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A directory to fill, which takes the name `path` when all in it is on the disk.

    A directory of that name is replaced. Killed at any moment, this leaves the old directory, the
    new one, or (between two renames) the new one beside none; and perhaps `.NAME.partial`.
    Raises OSError.
    """
    temporary = path.with_name(f".{path.name}.partial")
    old = path.with_name(f".{path.name}.old.partial")
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for folder, _, files in os.walk(temporary):
            for name in files:
                _sync(Path(folder, name))
            _sync(Path(folder))
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        _sync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def save_checkpoint(
    path: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    config: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    copied_from: Path | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Fills a directory: weights in `dtype`, `config.json`, and the tokenizer of another one.

    Args:
        path: an existing directory.
        tensors: (Hugging Face name, tensor), as `Decoder.checkpoint_tensors` gives them.
        config: the `config.json`; its dtype becomes the one given.
        copied_from: the directory whose tokenizer and generation config go along.
        max_file_bytes: where a file of weights would be larger, there are several, with an index.
    """
    files: list[dict[str, torch.Tensor]] = [{}]
    room = max_file_bytes
    for name, tensor in tensors:
        # A copy: safetensors wants every tensor in memory of its own.
        stored = tensor.detach().to("cpu", dtype, copy=True).contiguous()
        if files[-1] and stored.nbytes > room:
            files.append({})
            room = max_file_bytes
        files[-1][name] = stored
        room -= stored.nbytes
    values = {key: value for key, value in config.items() if key != "torch_dtype"}
    write_json(path / "config.json", {**values, "dtype": str(dtype).removeprefix("torch.")})
    metadata = {"format": "pt"}
    if len(files) == 1:
        save_file(files[0], path / SINGLE_FILE, metadata)
    else:
        weight_map: dict[str, str] = {}
        for i, part in enumerate(files, start=1):
            name = f"model-{i:05d}-of-{len(files):05d}.safetensors"
            save_file(part, path / name, metadata)
            weight_map.update(dict.fromkeys(part, name))
        total = sum(t.nbytes for part in files for t in part.values())
        write_json(path / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    for file in path.glob("*.safetensors"):
        # safetensors lets only the owner read; who may read the config may read the weights.
        shutil.copymode(path / "config.json", file)
    if copied_from is not None:
        for pattern in COPIED_PATTERNS:
            for file in copied_from.glob(pattern):
                target = path / file.relative_to(copied_from)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
