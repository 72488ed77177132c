"""A model's name: a directory, a hub id, or a sentence that says what to do."""

from pathlib import Path

import huggingface_hub
import pytest

from minigen.weights.errors import CheckpointError
from minigen.weights.hub import resolve_model


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What the hub was asked for; it gives `tmp_path`."""
    calls = []

    def snapshot_download(name, **options):
        calls.append((name, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_a_directory_is_itself(tmp_path, asked, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert resolve_model(tmp_path) == tmp_path
    assert resolve_model(str(tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/name") == Path("org/name")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/org") == tmp_path / "org"
    assert asked == []


def test_a_hub_id_is_fetched_without_pickles(tmp_path, asked):
    assert resolve_model("minigen-tests/some-model") == tmp_path
    ((name, options),) = asked
    assert name == "minigen-tests/some-model"
    assert set(options["allow_patterns"]) == {"*.safetensors", "*.json", "*.jinja"}


@pytest.mark.parametrize(
    "name",
    ["./absent/model", "/absent/model", "../m", "~/absent", "absent", "a/b/c", "", Path("a/b")],
)
def test_a_path_that_is_absent(name, asked, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="there is no directory") as error:
        resolve_model(name)
    assert str(name) in str(error.value)
    assert asked == []


def test_a_file_instead_of_a_directory(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a file: give the directory"):
        resolve_model(file)


def test_offline(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"offline.*pass the directory"):
        resolve_model("minigen-tests/no-such-model")


@pytest.mark.parametrize("error", [OSError("no route\nto host"), RuntimeError()])
def test_a_hub_that_fails_otherwise(monkeypatch, error, tmp_path):
    def fail(name, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="pass the directory") as raised:
        resolve_model("minigen-tests/some-model")
    assert "\n" not in str(raised.value)
    assert (str(error).split("\n")[0] or "RuntimeError") in str(raised.value)
