"""A step as flat arrays in one buffer, so that a single copy takes it to the device.

Shape suffixes as in `model.py`, R rows to sample. T, S and R may be larger than the step is: what
is added are null tokens (slot -1), null sequences (kv_len 0) and null rows (a spare row of state),
which touch nothing that anybody owns.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from minigen.scheduler import Chunk

ALIGNMENT = 16  # bytes: a compiled function copies inputs that are less aligned than its example


@dataclass
class StepTensors:
    """A step on the device. T, S and R are at least 2: a compiled size of 1 would be a constant."""

    tokens_T: Tensor  # -1: the token that row `token_rows_T` sampled last
    token_rows_T: Tensor
    positions_T: Tensor
    slots_T: Tensor
    last_R: Tensor  # where the rows to sample lie in T
    rows_R: Tensor
    cu_seqlens_S1: Tensor
    kv_lens_S: Tensor
    block_table_SW: Tensor


INT32 = ("cu_seqlens_S1", "kv_lens_S", "block_table_SW")  # what the kernels take; the rest: int64


@dataclass(frozen=True)
class StepSize:
    """T tokens, S sequences, R rows to sample, W blocks a sequence may have."""

    num_tokens: int
    num_seqs: int
    num_rows: int
    width: int

    @classmethod
    def of(cls, chunks: Sequence[Chunk]) -> "StepSize":
        """The least size for these chunks. The width is a power of two: kernels see few of them."""
        num_blocks = max(len(chunk.sequence.blocks) for chunk in chunks)
        num_rows = sum(chunk.samples for chunk in chunks)
        return cls(
            max(2, sum(chunk.length for chunk in chunks)),
            max(2, len(chunks)),
            max(2, num_rows) if num_rows else 0,
            max(2, 1 << (num_blocks - 1).bit_length()),
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        tokens, rows = (self.num_tokens,), (self.num_rows,)
        return {
            "tokens_T": tokens,
            "token_rows_T": tokens,
            "positions_T": tokens,
            "slots_T": tokens,
            "last_R": rows,
            "rows_R": rows,
            "cu_seqlens_S1": (self.num_seqs + 1,),
            "kv_lens_S": (self.num_seqs,),
            "block_table_SW": (self.num_seqs, self.width),
        }

    @property
    def num_bytes(self) -> int:
        return sum(_padded(_num_bytes(name, shape)) for name, shape in self.shapes().items())

    def views(self, buffer: Tensor) -> StepTensors:
        """The tensors of a step that lie in a buffer of `num_bytes` bytes."""
        found, at = [], 0
        for name, shape in self.shapes().items():
            size = _num_bytes(name, shape)
            dtype = torch.int32 if name in INT32 else torch.int64
            found.append(buffer[at : at + size].view(dtype).view(shape))
            at += _padded(size)
        return StepTensors(*found)


def _num_bytes(name: str, shape: tuple[int, ...]) -> int:
    return int(np.prod(shape)) * (4 if name in INT32 else 8)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def write_step(
    buffer: Tensor,
    chunks: Sequence[Chunk],
    size: StepSize,
    *,
    block_size: int,
    spare_row: int,
    long_rope_row: int,
) -> None:
    """Writes the chunks into a buffer on the host that `size.views` understands.

    Args:
        spare_row: the row of device state that belongs to padding.
        long_rope_row: where the rope table's rows for sequences with long rope begin.
    """
    views = size.views(buffer)
    tensors = {field.name: getattr(views, field.name).numpy() for field in fields(views)}
    tokens, table = tensors["tokens_T"], tensors["block_table_SW"]
    tokens[:] = 0
    tensors["token_rows_T"][:] = spare_row
    tensors["positions_T"][:] = 0
    tensors["slots_T"][:] = -1
    tensors["last_R"][:] = 0
    tensors["rows_R"][:] = spare_row
    tensors["kv_lens_S"][:] = 0
    num_seqs = len(chunks)
    lengths = np.array([chunk.length for chunk in chunks], np.int64)
    starts = np.array([chunk.start for chunk in chunks], np.int64)
    rows = np.array([chunk.sequence.row for chunk in chunks], np.int64)
    ends = np.cumsum(lengths)
    begins, num_tokens = ends - lengths, int(ends[-1]) if num_seqs else 0
    # Null sequences take one null token each, as far as there are any.
    null_ends = np.arange(1, size.num_seqs - num_seqs + 1) + num_tokens
    offsets = tensors["cu_seqlens_S1"]
    offsets[0] = 0
    offsets[1 : num_seqs + 1] = ends
    offsets[num_seqs + 1 :] = np.minimum(null_ends, size.num_tokens)
    offsets[-1] = size.num_tokens
    table[num_seqs:] = 0
    for i, chunk in enumerate(chunks):
        sequence, begin = chunk.sequence, begins[i]
        known = sequence.tokens[chunk.start : chunk.start + chunk.length]
        tokens[begin : begin + len(known)] = known
        tokens[begin + len(known) : ends[i]] = -1  # pending: it is still on the device
        table[i, : len(sequence.blocks)] = sequence.blocks
        table[i, len(sequence.blocks) :] = 0
    if not num_seqs:
        return
    which = np.repeat(np.arange(num_seqs), lengths)
    positions = np.arange(num_tokens) + (starts - begins)[which]
    tensors["slots_T"][:num_tokens] = (
        table[which, positions // block_size].astype(np.int64) * block_size + positions % block_size
    )
    long = np.array([long_rope_row if chunk.sequence.long_rope else 0 for chunk in chunks])
    tensors["positions_T"][:num_tokens] = positions + long[which]
    tensors["token_rows_T"][:num_tokens] = rows[which]
    tensors["kv_lens_S"][:num_seqs] = starts + lengths
    samples = np.array([chunk.samples for chunk in chunks], bool)
    num_rows = int(samples.sum())
    tensors["last_R"][:num_rows] = (ends - 1)[samples]
    tensors["rows_R"][:num_rows] = rows[samples]
