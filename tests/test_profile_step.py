"""tools.profile_step: what it says a step consists of."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.command_line import run_tool
from tools import profile_step


def test_profile_step(tmp_path: Path) -> None:
    done = run_tool(
        "profile_step", "--shape", "tiny", "--device", "cpu", "--compile", "eager",
        "--batch-size", 1, 3, "--input-len", 9, "--prompt-tokens", 64, "--num-cache-blocks", 128,
        "--output", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    everything = json.loads((tmp_path / "profile.json").read_text())
    for name in ("decode 1", "decode 3", "prompts"):
        assert document[name]["step_us"] > document[name]["launch_us"] > 0
        assert document[name]["num_kernels"] == document[name]["device_us"] == 0
        functions = {row["name"].split()[-1]: row for row in everything[name]["functions"]}
        assert functions["launch"]["count"] == functions["_upload"]["count"] == 1
        assert functions["launch"]["with_calls_us"] > functions["_upload"]["with_calls_us"]
    assert everything["start"]["functions"][0]["with_calls_us"] > 0


def test_kernels_are_added_up_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def event(device: str, name: str, us: float) -> SimpleNamespace:
        span = SimpleNamespace(elapsed_us=lambda: us)
        kind = SimpleNamespace(name=device)
        return SimpleNamespace(device_type=kind, name=name, time_range=span)

    class Profile:
        def __init__(self, activities: list[Any]) -> None: ...
        def __enter__(self) -> "Profile":
            return self

        def __exit__(self, *_: object) -> None: ...
        def events(self) -> list[SimpleNamespace]:
            return [
                event("CUDA", "a", 1.0), event("CUDA", "b", 5.0), event("CUDA", "a", 2.0),
                event("CPU", "a", 100.0),
            ]  # fmt: skip

    monkeypatch.setattr(profile_step, "profile", Profile)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    assert profile_step.kernels_of(lambda: None, 2) == [
        {"name": "b", "count": 0.5, "us": 2.5},
        {"name": "a", "count": 1.0, "us": 1.5},
    ]


def test_a_kernels_short_name() -> None:
    assert profile_step.short("void at::native::index_kernel<4>") == "index_kernel<4>"
    assert len(profile_step.short("x" * 200)) == profile_step.NAME_LENGTH
