"""The model that comes with minigen: where it lies, and whether all of it is there."""

from pathlib import Path

from minigen.weights.errors import CheckpointError

NAME = "minichat-11m"
DIRECTORY = Path(__file__).parent / NAME
# Beside the weights. Without one of them it would load and then talk worse than it can.
FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
_INSTEAD = (
    "choose a model with --model (in Python LLM(model)), a directory in Hugging Face layout or a "
    "hub name such as HuggingFaceTB/SmolLM2-135M-Instruct, which is downloaded on first use"
)


def bundled_model() -> Path:
    """The directory of the bundled model.

    Raises CheckpointError if this copy of minigen has none, or not all of it.
    """
    if not DIRECTORY.is_dir():
        raise CheckpointError(
            f"this copy of minigen carries no model of its own, there is no {DIRECTORY}: {_INSTEAD}"
        )
    # Imported here: it loads torch, and `--help` needs the model's name only.
    from minigen.weights.checkpoint import Checkpoint

    try:
        for name in FILES:
            if not (DIRECTORY / name).is_file():
                raise CheckpointError(f"{DIRECTORY} has no {name}")
        Checkpoint.open(DIRECTORY)  # reads headers only: no shard is absent or cut short
    except CheckpointError as error:
        raise CheckpointError(
            f"the model that came with this copy of minigen is incomplete ({error}): install "
            f"minigen anew, or {_INSTEAD}"
        ) from None
    return DIRECTORY
