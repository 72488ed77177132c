"""A step as flat arrays in one buffer, so that a single copy takes it to the device.

Shape suffixes as in `model.py`, R rows to sample. T, S and R may be larger than the step is: what
is added are null tokens (slot -1), null sequences (kv_len 0) and null rows (a spare row of state),
which touch nothing that anybody owns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

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

    @cached_property
    def layout(self) -> list[tuple[str, int, int, tuple[int, ...]]]:
        """(name, first byte, last byte + 1, shape) of each tensor in a buffer."""
        tokens, rows = (self.num_tokens,), (self.num_rows,)
        shapes = {
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
        found, at = [], 0
        for name, shape in shapes.items():
            end = at + prod(shape) * (4 if name in INT32 else 8)
            found.append((name, at, end, shape))
            at = -(-end // ALIGNMENT) * ALIGNMENT
        return found

    @property
    def num_bytes(self) -> int:
        end = self.layout[-1][2]
        return -(-end // ALIGNMENT) * ALIGNMENT

    def views(self, buffer: Tensor) -> StepTensors:
        """The tensors of a step that lie in a buffer of `num_bytes` bytes."""
        return StepTensors(
            *(
                buffer[at:end].view(torch.int32 if name in INT32 else torch.int64).view(shape)
                for name, at, end, shape in self.layout
            )
        )

    def arrays(self, buffer: Tensor) -> dict[str, np.ndarray]:
        """The same of a buffer on the host, by name, for `StepWriter`."""
        whole = buffer.numpy()
        return {
            name: whole[at:end].view(np.int32 if name in INT32 else np.int64).reshape(shape)
            for name, at, end, shape in self.layout
        }


class StepWriter:
    """Writes chunks as the flat arrays of a step.

    Keeps each device row's blocks as a line of a table: most sequences of a step got no block since
    the last one, and numpy gathers the lines. 256 sequences of 32 blocks take 0.11 ms; written anew
    from each sequence's list they took 0.56.

    Args:
        num_rows: rows of device state that sequences may own.
        num_blocks: the most a sequence may have.
        spare_row: the row of device state that belongs to padding.
        long_rope_row: where the rope table's rows for sequences with long rope begin.
    """

    def __init__(
        self, num_rows: int, num_blocks: int, block_size: int, spare_row: int, long_rope_row: int
    ) -> None:
        self._block_size, self._spare_row = block_size, spare_row
        self._long_rope_row = long_rope_row
        self._table_MW = np.zeros((num_rows, num_blocks), np.int32)
        # The list whose blocks a line holds, and how many of them. A sequence's list only grows;
        # one that is admitted again has another.
        self._lists: list[list[int] | None] = [None] * num_rows
        self._counts = [0] * num_rows

    def write(self, arrays: dict[str, np.ndarray], chunks: Sequence[Chunk], size: StepSize) -> None:
        """Writes the chunks into `size.arrays` of a buffer; what they leave over becomes null."""
        sequences, starts, lengths, samples = zip(*chunks, strict=True) if chunks else ((),) * 4
        num_seqs = len(chunks)
        lines = [sequence.row for sequence in sequences]
        for row, sequence in zip(lines, sequences, strict=True):
            blocks = sequence.blocks
            if self._lists[row] is not blocks or self._counts[row] != len(blocks):
                self._copy_blocks(row, blocks)
        rows = np.array(lines, np.int64)
        starts_S, lengths_S = np.array(starts, np.int64), np.array(lengths, np.int64)
        ends = lengths_S.cumsum()
        begins, num_tokens = ends - lengths_S, sum(lengths)

        offsets = arrays["cu_seqlens_S1"]
        offsets[0] = 0
        offsets[1 : num_seqs + 1] = ends
        # Null sequences take one null token each, as far as there are any.
        null_ends = np.arange(num_tokens + 1, num_tokens + 1 + size.num_seqs - num_seqs)
        offsets[num_seqs + 1 :] = np.minimum(null_ends, size.num_tokens)
        offsets[-1] = size.num_tokens
        arrays["kv_lens_S"][:num_seqs] = starts_S + lengths_S
        arrays["kv_lens_S"][num_seqs:] = 0
        table, width = arrays["block_table_SW"], min(size.width, self._table_MW.shape[1])
        table[:num_seqs, :width] = self._table_MW[rows, :width]
        table[:num_seqs, width:] = 0
        table[num_seqs:] = 0

        which = np.arange(num_seqs).repeat(lengths_S)
        positions = np.arange(num_tokens) + (starts_S - begins)[which]
        num_known = [len(sequence.tokens) for sequence in sequences]
        known: list[int] = []
        for sequence, start, length, num in zip(sequences, starts, lengths, num_known, strict=True):
            if start < num:
                known += sequence.tokens[start : start + length]
        tokens = np.full(num_tokens, -1)  # pending: still on the device
        tokens[positions < np.array(num_known, np.int64)[which]] = known
        token_rows = rows[which]
        block, offset = np.divmod(positions, self._block_size)
        slots = self._table_MW[token_rows, block].astype(np.int64) * self._block_size + offset
        has_long = [sequence.long_rope for sequence in sequences]
        if any(has_long):
            positions += self._long_rope_row * np.array(has_long)[which]
        is_sampled = np.array(samples, bool)
        for name, values, null in (
            ("tokens_T", tokens, 0),
            ("token_rows_T", token_rows, self._spare_row),
            ("positions_T", positions, 0),
            ("slots_T", slots, -1),
            ("last_R", (ends - 1)[is_sampled], 0),
            ("rows_R", rows[is_sampled], self._spare_row),
        ):
            array = arrays[name]
            array[: len(values)] = values
            array[len(values) :] = null

    def _copy_blocks(self, row: int, blocks: list[int]) -> None:
        line = self._table_MW[row]
        # Only what is new, where the list has grown.
        begin = self._counts[row] if self._lists[row] is blocks else 0
        line[begin : len(blocks)] = blocks[begin:]
        line[len(blocks) :] = 0
        self._lists[row], self._counts[row] = blocks, len(blocks)
