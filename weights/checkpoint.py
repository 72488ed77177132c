"""Safetensors checkpoints: check everything first, then copy straight to where it belongs.

Headers are read and checked here, with `json` and `struct`, because a header that lies has to end
in a sentence that names the tensor, before any memory is taken. Pickle files are never opened.
"""

import json
import math
import mmap
import re
import struct
import sys
import warnings
from collections.abc import Collection, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from tqdm import tqdm

from minigen.weights.errors import CheckpointError
from minigen.weights.json_file import LFS_MAGIC, lfs_sentence, read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_FLOAT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ITEM_BYTES = {
    **{"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1},
    **{"I16": 2, "U16": 2, "F16": 2, "BF16": 2},
    **{"I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8},
}
# Buffers that old exporters saved although every implementation computes them.
_COMPUTED_BUFFER = re.compile(r"(^|\.)(inv_freq|position_ids|masked_bias|attn\.bias)$")
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
_CHUNK_BYTES = 16 << 20  # the share of a file that is resident while it is copied
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `start` is the offset of its first byte in `file`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    start: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one checkpoint directory, checked but not loaded."""

    path: Path
    tensors: dict[str, TensorInfo]

    @classmethod
    def open(cls, path: str | Path) -> "Checkpoint":
        """Read and check the headers of `model.safetensors`, or of the index and its shards.

        Raises CheckpointError, naming the file or the tensor, for whatever is missing or false.
        """
        path = Path(path)
        if not path.is_dir():
            raise CheckpointError(f"{path} is not a directory with a checkpoint in it")
        if (path / SINGLE_FILE).exists():
            return cls(path, _read_header(path / SINGLE_FILE))
        if (path / INDEX_FILE).exists():
            return cls(path, _read_shards(path))
        raise CheckpointError(_why_no_weights(path))

    def load(
        self,
        targets: Mapping[str, torch.Tensor],
        optional: Collection[str] = (),
        progress: bool = True,
    ) -> None:
        """Copy each tensor of the files into the target of its name, converting dtype and device.

        Everything is compared, as `compare` does, before the first byte is copied. `progress` shows
        a bar on stderr, at once on a terminal and after two seconds elsewhere.
        """
        self.compare(targets, optional)
        wanted = sorted(
            (name for name in targets if name in self.tensors),
            key=lambda name: (self.tensors[name].file, self.tensors[name].start),
        )
        by_file: dict[Path, list[str]] = {}
        for name in wanted:
            by_file.setdefault(self.tensors[name].file, []).append(name)
        bar = tqdm(
            total=sum(self.tensors[name].num_bytes for name in wanted),
            desc="Loading weights",
            unit="B",
            unit_scale=True,
            leave=False,
            disable=not progress or sys.stderr is None,  # None: closed by `2>&-`
            delay=0 if sys.stderr is not None and sys.stderr.isatty() else 2,
        )
        with bar, torch.no_grad():
            for file, names in by_file.items():
                for num_bytes in _copy_file(file, [(self.tensors[n], targets[n]) for n in names]):
                    bar.update(num_bytes)

    def compare(self, targets: Mapping[str, torch.Tensor], optional: Collection[str] = ()) -> None:
        """Raise CheckpointError where `load` could not fill the targets, which may be on "meta".

        It names a tensor that is missing from the files, is in them but in neither `targets` nor
        `optional`, or has another shape than its target. A name in both may be missing.
        """
        missing = [n for n in targets if n not in self.tensors and n not in optional]
        if missing:
            raise CheckpointError(
                f"{self.path} has no tensor {_names(missing)}, which its config.json asks for"
            )
        unexpected = [
            n
            for n in self.tensors
            if n not in targets and n not in optional and not _COMPUTED_BUFFER.search(n)
        ]
        if unexpected:
            file = self.tensors[unexpected[0]].file
            raise CheckpointError(
                f"{file} holds tensor {_names(unexpected)}, for which the model of its config.json "
                "has no place"
            )
        for name, target in targets.items():
            info = self.tensors.get(name)
            if info is not None and info.shape != tuple(target.shape):
                raise CheckpointError(
                    f"tensor {name!r} in {info.file} has shape {list(info.shape)}, but its "
                    f"config.json asks for {list(target.shape)}"
                )


def read_config(path: str | Path) -> dict[str, Any]:
    """The `config.json` of a checkpoint directory; CheckpointError if there is none to read.

    Warns, and does no more, where a special token's id lies outside the vocabulary.
    """
    path = Path(path)
    if not (path / "config.json").exists():
        raise CheckpointError(
            f"{path} has no config.json: give a directory in Hugging Face layout (config.json, "
            f"{SINGLE_FILE}, tokenizer.json)"
        )
    config = read_json(path / "config.json")
    _warn_outside_vocabulary(path / "config.json", config, config.get("vocab_size"))
    return config


def read_generation_config(path: str | Path) -> dict[str, Any]:
    """The `generation_config.json` of a checkpoint directory, empty if there is none.

    Raises CheckpointError for one that is no JSON object; warns like `read_config`.
    """
    file = Path(path) / "generation_config.json"
    if not file.exists():
        return {}
    generation_config = read_json(file)
    config_file = Path(path) / "config.json"
    vocab_size = read_json(config_file).get("vocab_size") if config_file.exists() else None
    _warn_outside_vocabulary(file, generation_config, vocab_size)
    return generation_config


def _warn_outside_vocabulary(file: Path, config: dict[str, Any], vocab_size: object) -> None:
    if not isinstance(vocab_size, int):
        return
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = config.get(key)
        for token_id in ids if isinstance(ids, list) else [ids]:
            # -1 is how several exporters write "none".
            if isinstance(token_id, int) and not -1 <= token_id < vocab_size:
                warnings.warn(
                    f"{file}: {key} {token_id} lies outside the vocabulary of {vocab_size} tokens "
                    "and will never be met",
                    stacklevel=3,
                )


def _read_shards(path: Path) -> dict[str, TensorInfo]:
    index = path / INDEX_FILE
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no 'weight_map' that names a file for each tensor")
    for name, shard in weight_map.items():
        # A shard is a neighbour of its index: an index must not reach other directories.
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{index} gives {shard!r} as the file of tensor {name!r}")
        if not shard.endswith(".safetensors"):
            raise CheckpointError(_pickle_sentence(path, shard))
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(weight_map.values())):
        if not (path / shard).exists():
            count = sum(s == shard for s in weight_map.values())
            raise CheckpointError(
                f"{index} names the shard {shard} ({count} tensors), which is not in {path}"
            )
        for name, info in _read_header(path / shard).items():
            named = weight_map.get(name)
            if named != shard:
                where = f"says it is in {named}" if named else "does not name it"
                raise CheckpointError(f"{path / shard} holds tensor {name!r}, but {index} {where}")
            tensors[name] = info
    for name, shard in weight_map.items():
        if name not in tensors and not _COMPUTED_BUFFER.search(name):
            raise CheckpointError(f"{index} says that {shard} holds tensor {name!r}; it does not")
    return tensors


def _read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, after every claim of its header was checked.

    Layout: 8 bytes n, little endian; n bytes of JSON {name: {dtype, shape, data_offsets}}; data.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(len(LFS_MAGIC))
            if start == LFS_MAGIC:
                raise CheckpointError(lfs_sentence(file))
            if len(start) < 8:
                raise CheckpointError(f"{file} is truncated: {size} bytes cannot hold a header")
            (header_bytes,) = struct.unpack("<Q", start[:8])
            if header_bytes > _MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{file} is no safetensors file: it announces a header of {header_bytes} bytes"
                )
            if 8 + header_bytes > size:
                raise CheckpointError(
                    f"{file} is truncated: its header takes {header_bytes} bytes, the file {size}"
                )
            stream.seek(8)
            text = stream.read(header_bytes)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the header of {file} is not valid JSON: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"the header of {file} is not a JSON object")
    header.pop("__metadata__", None)

    data_start = 8 + header_bytes
    entries = [_read_entry(file, name, entry, size - data_start) for name, entry in header.items()]
    tensors: dict[str, TensorInfo] = {}
    end_before, name_before = 0, "the header"
    for begin, end, name, dtype, shape in sorted(entries, key=lambda entry: entry[:2]):
        if begin != end_before:
            relation = "overlaps" if begin < end_before else "leaves a gap after"
            raise CheckpointError(
                f"the header of {file} lies: tensor {name!r} {relation} {name_before!r}"
            )
        end_before, name_before = end, name
        if dtype in _FLOAT_DTYPES:
            tensors[name] = TensorInfo(shape, _FLOAT_DTYPES[dtype], file, data_start + begin)
        elif not _COMPUTED_BUFFER.search(name):
            raise CheckpointError(
                f"tensor {name!r} in {file} has dtype {dtype}: minigen reads F32, F16 and BF16, "
                "so convert or dequantise the checkpoint first"
            )
    if data_start + end_before != size:
        raise CheckpointError(
            f"the header of {file} lies: it describes {end_before} bytes of tensors, the file has "
            f"{size - data_start}"
        )
    return tensors


def _read_entry(
    file: Path, name: str, entry: Any, data_bytes: int
) -> tuple[int, int, str, str, tuple[int, ...]]:
    """(begin, end, name, dtype, shape) of one header entry, offsets counted from the data."""
    where = f"tensor {name!r} in {file}"
    if not isinstance(entry, dict):
        raise CheckpointError(f"the header of {file} describes tensor {name!r} by no JSON object")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise CheckpointError(f"{where} has dtype {dtype!r}: minigen reads F32, F16 and BF16")
    if not _all_sizes(shape):
        raise CheckpointError(f"{where} has shape {shape!r}, which is no list of sizes")
    if not _all_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where} has data_offsets {offsets!r}, which is no [begin, end]")
    begin, end = offsets
    expected = math.prod(shape) * _ITEM_BYTES[dtype]
    if end - begin != expected:
        raise CheckpointError(
            f"{where} lies about its size: shape {shape} of {dtype} is {expected} bytes, its "
            f"data_offsets span {end - begin}"
        )
    if end > data_bytes:
        raise CheckpointError(
            f"{file} is truncated: tensor {name!r} ends at byte {end} of {data_bytes}"
        )
    return begin, end, name, dtype, tuple(shape)


def _all_sizes(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is given twice")
    return result


def _copy_file(file: Path, pairs: list[tuple[TensorInfo, torch.Tensor]]) -> Iterable[int]:
    """Copy tensors of one file into their targets; yields the number of bytes after each chunk."""
    if all(info.num_bytes == 0 for info, _ in pairs):
        return  # an empty file region cannot be mapped
    # ACCESS_COPY because torch wants a writable buffer; nothing writes, so no page is duplicated.
    with (
        file.open("rb") as stream,
        closing(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)) as mapped,
    ):
        for info, target in pairs:
            if info.start + info.num_bytes > len(mapped):  # reading on would be a bus error
                raise CheckpointError(f"{file} has become shorter since its header was read")
            for start, source, view in _chunks(mapped, info, target):
                num_bytes = source.numel() * source.element_size()
                view.copy_(source)
                del source  # a mapping cannot be closed while a tensor looks into it
                _forget(mapped, start, num_bytes)
                yield num_bytes


def _chunks(
    mapped: mmap.mmap, info: TensorInfo, target: torch.Tensor
) -> Iterable[tuple[int, torch.Tensor, torch.Tensor]]:
    """(offset in the file, tensor over the mapping, its part of the target), by leading rows."""
    shape = info.shape or (1,)
    target = target if info.shape else target.view(1)
    row_elements = math.prod(shape[1:])
    if row_elements * shape[0] == 0:
        return
    rows = max(1, _CHUNK_BYTES // (row_elements * info.dtype.itemsize))
    for first in range(0, shape[0], rows):
        count = min(rows, shape[0] - first)
        start = info.start + first * row_elements * info.dtype.itemsize
        elements = count * row_elements
        source: Any = mapped
        offset = start
        if start % info.dtype.itemsize:  # the header was not padded: torch wants aligned data
            source = bytearray(mapped[start : start + elements * info.dtype.itemsize])
            offset = 0
        flat = torch.frombuffer(source, dtype=info.dtype, count=elements, offset=offset)
        yield start, flat.view(count, *shape[1:]), target[first : first + count]
        del flat


def _forget(mapped: mmap.mmap, start: int, num_bytes: int) -> None:
    """Drop copied pages from this process, else the whole file stays resident beside its copy."""
    if hasattr(mmap, "MADV_DONTNEED"):
        first = start - start % mmap.PAGESIZE
        mapped.madvise(mmap.MADV_DONTNEED, first, start + num_bytes - first)


def _names(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _why_no_weights(path: Path) -> str:
    for file in sorted(path.iterdir()):
        if file.suffix in _PICKLE_SUFFIXES or file.name.endswith(".bin.index.json"):
            return _pickle_sentence(path, file.name)
    found = [file.name for file in sorted(path.glob("*.safetensors"))]
    if found:
        return (
            f"{path} has neither {SINGLE_FILE} nor {INDEX_FILE}, although it holds {_names(found)}"
        )
    return f"{path} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE} is there"


def _pickle_sentence(path: Path, name: str) -> str:
    return (
        f"{path} holds its weights in {name}, a pickle file, which minigen never opens because it "
        "can run code: convert it to safetensors first"
    )
