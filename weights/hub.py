"""From what the user typed to a directory on this machine."""

import re
from pathlib import Path

from minigen.weights import bundled
from minigen.weights.errors import CheckpointError

# What a checkpoint consists of. Pickle files are not even fetched.
FILE_PATTERNS = ["*.safetensors", "*.json", "*.jinja"]
# Second copies of the same weights, in their authors' own layout.
IGNORED_PATTERNS = ["consolidated*", "original/*"]
_HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")


def resolve_model(name_or_path: str | Path | None) -> Path:
    """The directory of a checkpoint: the one given, or the local copy of a hub repository.

    None is the bundled model, which its name means too. An existing directory wins over that name
    and over a hub id. Raises CheckpointError, with what to do about it, if there is no such
    directory and the hub cannot give one.
    """
    if name_or_path is None:
        return bundled.bundled_model()
    name = str(name_or_path)
    path = Path(name).expanduser()
    if name and path.is_dir():  # Path("") is the working directory
        return path
    if name and path.exists():
        raise CheckpointError(f"{path} is a file: give the directory that holds the checkpoint")
    if name_or_path == bundled.NAME:
        return bundled.bundled_model()
    local = isinstance(name_or_path, Path) or name.startswith(("/", ".", "~")) or "\\" in name
    if local or not _HUB_ID.fullmatch(name):
        raise CheckpointError(
            f"there is no directory {name!r}: give the path of a checkpoint directory, or a hub id "
            "like 'org/name'"
        )
    return _fetch(name)


def _fetch(name: str) -> Path:
    # Imported here: it costs a quarter of a second, and a local directory needs none of it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    elsewhere = "download it on a machine that can and pass the directory"
    try:
        return Path(
            snapshot_download(name, allow_patterns=FILE_PATTERNS, ignore_patterns=IGNORED_PATTERNS)
        )
    except HFValidationError as error:
        why = f"{name!r} is neither a directory nor a hub id: {error}"
    except GatedRepoError:
        why = f"{name} is gated: accept its licence on the hub and log in with `hf auth login`"
    except RepositoryNotFoundError:
        why = f"there is no directory {name!r}, and the hub has no repository of that name"
    except LocalEntryNotFoundError:
        why = (
            f"there is no directory {name!r}, the hub cannot be reached (offline), and no copy is "
            f"in the local cache: {elsewhere}"
        )
    except Exception as error:  # a network fails in more ways than the client has names for
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        why = f"there is no directory {name!r}, and the hub did not give it ({reason}): {elsewhere}"
    raise CheckpointError(why)
