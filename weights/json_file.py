"""JSON files beside a checkpoint's weights. Nothing here imports torch: tokenizers need no more."""

import json
from pathlib import Path
from typing import Any

from minigen.weights.errors import CheckpointError

LFS_MAGIC = b"version https://git-lfs"


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; CheckpointError names a file that is absent or holds no object."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
    if content.startswith(LFS_MAGIC):
        raise CheckpointError(lfs_sentence(file))
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds a JSON {type(value).__name__}, not an object")
    return value


def lfs_sentence(file: Path) -> str:
    return f"{file} is a git-lfs pointer, not the file itself: run `git lfs pull` in its directory"
