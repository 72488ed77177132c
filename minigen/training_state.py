"""Checkpoints of a run: the model as everyone reads it, and beside it all that going on needs.

    OUTPUT/step-00000500/                the model in Hugging Face layout
    OUTPUT/step-00000500/training/       fp32 weights and AdamW's moments, step, settings

A generator's state is not among it: every draw of a step is keyed by the seed and its number.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from minigen.trainer import Trainer
from minigen.weights.errors import CheckpointError
from minigen.weights.json_file import read_json
from minigen.weights.save import write_json

FOLDER, TENSORS, STATE = "training", "state.safetensors", "state.json"
_STEP = re.compile(r"step-(\d{8,})")
_MOMENTS = ("exp_avg", "exp_avg_sq")


def step_directory(output: Path, step: int) -> Path:
    return output / f"step-{step:08d}"


def checkpoints(output: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [path for path in output.glob("step-*") if _STEP.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def remove_old(output: Path, keep: int) -> None:
    """Removes all but the last `keep` checkpoints, each as a whole. Raises OSError."""
    for path in checkpoints(output)[:-keep]:
        hidden = path.with_name(f".{path.name}.old.partial")
        path.rename(hidden)
        shutil.rmtree(hidden)


def remove_leftovers(output: Path) -> None:
    """Removes what a killed run was writing or removing."""
    for path in output.glob(".*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def save_state(path: Path, trainer: Trainer, values: Mapping[str, Any]) -> None:
    """Writes the folder `training` into a checkpoint directory; `values` go into its JSON."""
    folder = path / FOLDER
    folder.mkdir()
    tensors = {}
    for name, parameter in trainer.parameters.items():
        tensors[f"weights/{name}"] = parameter.detach().cpu()
        for moment in _MOMENTS:
            tensors[f"{moment}/{name}"] = trainer.optimizer.state[parameter][moment].cpu()
    save_file(tensors, folder / TENSORS)
    write_json(folder / STATE, {"step": trainer.step, **values})


def read_state(path: Path) -> dict[str, Any]:
    """The JSON of a checkpoint's state. Raises CheckpointError."""
    state = read_json(path / FOLDER / STATE)
    if type(state.get("step")) is not int or not isinstance(state.get("settings"), dict):
        raise CheckpointError(f"{path / FOLDER / STATE} is damaged: it lacks step or settings")
    return state


def load_state(path: Path, trainer: Trainer) -> None:
    """Puts weights, moments and step of a checkpoint into the trainer. Raises CheckpointError."""
    file = path / FOLDER / TENSORS
    step = read_state(path)["step"]
    try:
        with safe_open(file, "pt") as stored, torch.no_grad():
            for name, parameter in trainer.parameters.items():
                parameter.copy_(stored.get_tensor(f"weights/{name}"))
                moments = {
                    moment: stored.get_tensor(f"{moment}/{name}").to(parameter.device)
                    for moment in _MOMENTS
                }
                count = torch.tensor(float(step), device=parameter.device)
                trainer.optimizer.state[parameter] = {"step": count, **moments}
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{file} cannot be read as the state of this run: {error}") from None
    trainer.step = step


def check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Raises ValueError if the run of this checkpoint was begun with other settings."""
    kept = read_state(path)["settings"]
    settings = json.loads(json.dumps(settings))
    for name in sorted(kept.keys() | settings.keys()):
        if kept.get(name) != settings.get(name):
            raise ValueError(
                f"{path.parent} was begun with {name} = {json.dumps(kept.get(name))}, now it is "
                f"{json.dumps(settings.get(name))}: continue with the former, or give another "
                "--output"
            )
