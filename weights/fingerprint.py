"""Whether two checkpoints are the same, without reading all of either."""

import hashlib
from pathlib import Path

# What decides a model's results. Other files may lie beside them, even the output.
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_templates/*.jinja",
    "additional_chat_templates/*.jinja",
    "model.safetensors.index.json",
    "*.safetensors",
)


def fingerprint(model: Path) -> str:
    """Identifies a checkpoint by its small files and samples of its weights, wherever it lies.

    Reading all of a large checkpoint would take longer than loading it: of each file of weights the
    size and 16 pieces of 64 KiB are read, the header being in the first.
    """
    digest = hashlib.sha256()
    files = {file for pattern in MODEL_FILES for file in model.glob(pattern) if file.is_file()}
    for file in sorted(files):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(model).as_posix()}:{size}:".encode())
        with file.open("rb") as stream:
            if file.suffix != ".safetensors":
                digest.update(stream.read())
                continue
            for piece in range(16):
                stream.seek(size * piece // 16)
                digest.update(stream.read(65536))
    return digest.hexdigest()[:16]
