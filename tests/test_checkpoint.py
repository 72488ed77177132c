"""Checkpoints: what is read is what was written, and every broken one ends in a sentence."""

import json
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from minigen.weights import checkpoint as module
from minigen.weights.checkpoint import Checkpoint, read_config, read_generation_config
from minigen.weights.errors import CheckpointError

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n"


def raw_file(file: Path, header: object, data: bytes = b"", announced: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if announced is None else announced) + text + data)


def entry(shape: object, begin: int, end: int, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def targets_like(path: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    tensors = Checkpoint.open(path).tensors
    return {n: torch.full(info.shape, torch.nan, dtype=dtype) for n, info in tensors.items()}


def sharded(path: Path) -> dict[str, torch.Tensor]:
    tensors = {f"layer.{i}": torch.randn(3, i + 1) for i in range(4)}
    shards = {f"layer.{i}": f"model-0000{i // 2 + 1}-of-00002.safetensors" for i in range(4)}
    for shard in set(shards.values()):
        save_file({n: t for n, t in tensors.items() if shards[n] == shard}, path / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": shards}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=5),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=5, max_size=5),
    target_dtype=st.sampled_from(DTYPES),
    chunk=st.integers(1, 64),
)
def test_loads_what_was_saved(tmp_path, monkeypatch, shapes, dtypes, target_dtype, chunk):
    monkeypatch.setattr(module, "_CHUNK_BYTES", chunk)
    saved = {
        f"t{i}": torch.randn(shape).to(dtype)
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=False))
    }
    save_file(saved, tmp_path / "model.safetensors")
    targets = targets_like(tmp_path, target_dtype)
    Checkpoint.open(tmp_path).load(targets, progress=False)
    assert targets.keys() == saved.keys()
    for name, tensor in saved.items():
        assert torch.equal(targets[name], tensor.to(target_dtype))


def test_loads_shards(tmp_path):
    saved = sharded(tmp_path)
    targets = targets_like(tmp_path)
    Checkpoint.open(tmp_path).load(targets)
    assert all(torch.equal(targets[name], saved[name]) for name in saved)


def test_loads_into_parameters_and_views(tmp_path):
    saved = {"q": torch.randn(4, 3), "k": torch.randn(2, 3), "t": torch.randn(3, 5)}
    save_file(saved, tmp_path / "model.safetensors")
    fused = torch.nn.Parameter(torch.zeros(6, 3))
    transposed = torch.zeros(5, 3)
    Checkpoint.open(tmp_path).load({"q": fused[:4], "k": fused[4:], "t": transposed.T})
    assert torch.equal(fused, torch.cat([saved["q"], saved["k"]]))
    assert torch.equal(transposed, saved["t"].T)


def test_loads_data_that_is_not_aligned(tmp_path):
    data = torch.arange(6.0)
    for padding in range(4):
        header = json.dumps({"w": entry([6], 0, 24)}).encode() + b" " * padding
        raw_file(tmp_path / "model.safetensors", header, data.numpy().tobytes())
        targets = targets_like(tmp_path)
        Checkpoint.open(tmp_path).load(targets)
        assert torch.equal(targets["w"], data)


def test_metadata_and_computed_buffers_are_no_tensors_of_the_model(tmp_path):
    saved = {
        "w": torch.ones(2),
        "layers.0.rotary_emb.inv_freq": torch.ones(3),
        "position_ids": torch.arange(4),
    }
    save_file(saved, tmp_path / "model.safetensors", metadata={"format": "pt"})
    target = torch.zeros(2)
    Checkpoint.open(tmp_path).load({"w": target})
    assert target.tolist() == [1, 1]


def test_optional_names_may_be_missing_or_left_over(tmp_path):
    save_file({"w": torch.ones(2), "extra": torch.ones(1)}, tmp_path / "model.safetensors")
    target, absent = torch.zeros(2), torch.zeros(3)
    Checkpoint.open(tmp_path).load({"w": target, "absent": absent}, optional={"absent", "extra"})
    assert target.tolist() == [1, 1]
    assert absent.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ({"a": (2,), "b": (3, 2), "missing.weight": (1,)}, ["missing.weight", "no tensor"]),
        ({"a": (2,)}, ["'b'", "no place"]),
        ({"a": (2,), "b": (2, 3)}, ["'b'", "[3, 2]", "[2, 3]"]),
        ({"a": (2,), "b": (6,)}, ["'b'", "[3, 2]", "[6]"]),
    ],
)
def test_tensors_that_do_not_fit_are_named_before_anything_is_copied(tmp_path, targets, said):
    save_file({"a": torch.ones(2), "b": torch.ones(3, 2)}, tmp_path / "model.safetensors")
    tensors = {name: torch.zeros(shape) for name, shape in targets.items()}
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(tmp_path).load(tensors)
    assert all(words in str(error.value) for words in said)
    assert all(not tensor.any() for tensor in tensors.values())


DEEP = b"[" * 200_000


@pytest.mark.parametrize(
    ("header", "data", "said"),
    [
        ({"w": entry([2], 0, 8)}, bytes(4), "truncated"),
        ({"w": entry([2], 0, 8)}, bytes(9), "lies"),
        ({"w": entry([2], 0, 4)}, bytes(4), "lies about its size"),
        ({"w": entry([2], 0, 12)}, bytes(12), "lies about its size"),
        ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12), "'b' overlaps 'a'"),
        ({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, bytes(8), "overlaps"),
        ({"a": entry([2], 0, 8), "b": entry([1], 12, 16)}, bytes(16), "gap"),
        ({"a": entry([2], 4, 12)}, bytes(12), "gap"),
        ({"w": entry([2], 8, 0)}, bytes(8), "data_offsets"),
        ({"w": entry([2], -8, 0)}, bytes(8), "data_offsets"),
        ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [8]}}, bytes(8), "data_offsets"),
        ({"w": {"dtype": "F32", "shape": [2]}}, bytes(8), "data_offsets"),
        ({"w": entry([-2], 0, 8)}, bytes(8), "shape"),
        ({"w": entry([True], 0, 4)}, bytes(4), "shape"),
        ({"w": entry("2", 0, 8)}, bytes(8), "shape"),
        ({"w": entry([10**30], 0, 8)}, bytes(8), "lies about its size"),
        ({"w": entry([2], 0, 8, "Q4")}, bytes(8), "'Q4'"),
        ({"w": entry([2], 0, 8, None)}, bytes(8), "dtype"),
        ({"w": entry([1], 0, 8, "F64")}, bytes(8), "F64"),
        ({"w.qweight": entry([2], 0, 8, "I32")}, bytes(8), "I32"),
        ({"w": entry([8], 0, 8, "F8_E4M3")}, bytes(8), "F8_E4M3"),
        ({"w": [1]}, b"", "'w'"),
        ([1, 2], b"", "not a JSON object"),
        (b'{"w": ', b"", "not valid JSON"),
        (b'{"w\xff": 1}', b"", "not valid JSON"),
        (DEEP, b"", "not valid JSON"),
        (b'{"w":' + json.dumps(entry([1], 0, 4)).encode() + b',"w":1}', bytes(4), "'w'"),
    ],
)
def test_a_header_that_lies(tmp_path, header, data, said):
    raw_file(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(tmp_path)
    assert said in str(error.value)
    assert "model.safetensors" in str(error.value)


@pytest.mark.parametrize(
    ("announced", "said"), [(1 << 63, "announces"), (99_000_000, "truncated"), (3, "not valid")]
)
def test_a_header_of_a_false_length(tmp_path, announced, said):
    raw_file(tmp_path / "model.safetensors", {"w": entry([1], 0, 4)}, bytes(4), announced)
    with pytest.raises(CheckpointError, match=said):
        Checkpoint.open(tmp_path)


def test_a_file_cut_at_any_byte(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.randn(3), "b": torch.randn(2, 2)}, file)
    whole = file.read_bytes()
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            Checkpoint.open(tmp_path)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(position=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255))
def test_one_false_byte_is_refused_or_harmless(tmp_path, position, byte):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(3), "b": torch.ones(2, 2)}, file)
    content = bytearray(file.read_bytes())
    content[int(position * len(content))] = byte
    file.write_bytes(content)
    try:
        targets = targets_like(tmp_path)
        Checkpoint.open(tmp_path).load(targets)
    except CheckpointError:
        return
    reference = load_file(file)  # the format's own reader agrees with what was accepted
    for name, tensor in targets.items():
        assert torch.equal(tensor.nan_to_num(), reference[name].float().nan_to_num())


def test_a_file_that_shrank_after_it_was_opened(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(3000)}, file)
    checkpoint, targets = Checkpoint.open(tmp_path), targets_like(tmp_path)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="shorter"):
        checkpoint.load(targets)


def test_an_index_that_names_an_absent_shard(tmp_path):
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names the shard model-00002-of-00002\.safetensors"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ghost": "model-00001-of-00002.safetensors"}, "'ghost'; it does not"),
        ({"layer.0": "model-00002-of-00002.safetensors"}, "'layer.0'"),
        ({"layer.0": "../elsewhere.safetensors"}, "'../elsewhere.safetensors'"),
        ({"layer.0": 7}, "gives 7"),
        ({"layer.0": "pytorch_model-00001-of-00002.bin"}, "convert it to safetensors"),
    ],
)
def test_an_index_that_lies(tmp_path, change, said):
    sharded(tmp_path)
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"].update(change)
    file.write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(tmp_path)
    assert said in str(error.value)


def test_a_shard_with_a_tensor_that_the_index_does_not_name(tmp_path):
    sharded(tmp_path)
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    del index["weight_map"]["layer.3"]
    file.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"'layer\.3'.*does not name it"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_an_index_without_a_map(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "pytorch_model.bin.index.json"])
def test_a_pickle_is_never_opened(tmp_path, name):
    marker = tmp_path / "was_opened"

    class Trap:
        def __reduce__(self):
            return Path.touch, (marker,)

    (tmp_path / name).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CheckpointError, match="convert it to safetensors") as error:
        Checkpoint.open(tmp_path)
    assert name in str(error.value)
    assert not marker.exists()
    pickle.loads((tmp_path / name).read_bytes())
    assert marker.exists()  # the trap works


def test_weights_under_another_name_and_none_at_all(tmp_path):
    with pytest.raises(CheckpointError, match="no weights"):
        Checkpoint.open(tmp_path)
    (tmp_path / "consolidated.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"consolidated\.safetensors"):
        Checkpoint.open(tmp_path)
    with pytest.raises(CheckpointError, match="not a directory"):
        Checkpoint.open(tmp_path / "absent")


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_a_git_lfs_pointer_instead_of_weights(tmp_path, name):
    (tmp_path / name).write_bytes(LFS_POINTER)
    with pytest.raises(CheckpointError, match="git lfs pull"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "has no config.json"),
        (b"", "not valid JSON"),
        (b'{"a": 1', "not valid JSON"),
        (b'"llama"', "a JSON str, not an object"),
        (b"[1]", "a JSON list, not an object"),
        (b"\xff\xfe", "not valid JSON"),
        (DEEP, "not valid JSON"),
        (LFS_POINTER, "git lfs pull"),
    ],
)
def test_a_config_that_is_none(tmp_path, content, said):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        read_config(tmp_path)
    assert said in str(error.value)
    assert "config.json" in str(error.value)


def test_configs(tmp_path, recwarn):
    assert read_generation_config(tmp_path) == {}
    config = {"vocab_size": 10, "eos_token_id": [2, 9], "bos_token_id": None, "pad_token_id": -1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text('\ufeff{"eos_token_id": 3}', "utf-8")
    assert read_config(tmp_path) == config
    assert read_generation_config(tmp_path) == {"eos_token_id": 3}
    assert not recwarn.list


def test_a_special_token_outside_the_vocabulary_is_a_warning(tmp_path):
    (tmp_path / "config.json").write_text('{"vocab_size": 10, "bos_token_id": 10}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 11]}')
    with pytest.warns(UserWarning, match="bos_token_id 10 lies outside the vocabulary of 10"):
        assert read_config(tmp_path)["bos_token_id"] == 10
    with pytest.warns(UserWarning, match="eos_token_id 11 lies outside"):
        assert read_generation_config(tmp_path)["eos_token_id"] == [2, 11]


PEAK = """
import sys, torch
from minigen.weights.checkpoint import Checkpoint

def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

checkpoint = Checkpoint.open(sys.argv[1])
dtype = getattr(torch, sys.argv[2])
torch.ones(4).to(dtype)
open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
before = status("VmRSS")
targets = {n: torch.empty(info.shape, dtype=dtype) for n, info in checkpoint.tensors.items()}
checkpoint.load(targets)
print((status("VmHWM") - before) / sum(t.nbytes for t in targets.values()))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_peak_memory_is_the_weights_and_less_than_a_tenth(tmp_path, dtype):
    count, size = 2, 150 << 20  # one tensor is many chunks
    header = {
        f"w{i}": entry([size // 2 // 1024, 1024], i * size, (i + 1) * size, "BF16")
        for i in range(count)
    }
    raw_file(tmp_path / "model.safetensors", header)
    with (tmp_path / "model.safetensors").open("r+b") as stream:
        stream.truncate(stream.seek(0, 2) + count * size)
    command = [sys.executable, "-c", PEAK, str(tmp_path), dtype]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=120)
    assert done.returncode == 0, done.stderr
    assert 0.9 < float(done.stdout) < 1.1
