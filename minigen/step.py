"""A step as flat arrays in one buffer, so that a single copy takes it to the device.

Shape suffixes as in `model.py`, R rows to sample. T, S and R may be larger than the step is: what
is added are null tokens (slot -1), null sequences (kv_len 0) and null rows (a spare row of state),
which touch nothing that anybody owns.
"""

from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
import torch
from torch import Tensor

from minigen.scheduler import Chunks

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
    def of(cls, chunks: Chunks) -> "StepSize":
        """The least size for these chunks. The width is a power of two: kernels see few of them."""
        num_rows = len(chunks.sampled)
        return cls(
            max(2, chunks.num_tokens),
            max(2, len(chunks)),
            max(2, num_rows) if num_rows else 0,
            max(2, 1 << (chunks.num_blocks - 1).bit_length()),
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

    Keeps the blocks of each device row as a line of a table, from which numpy gathers. It is told
    of a sequence's blocks when that gets a row, and of each one more, and so does not look at all
    of them in each step. It must be given all chunks that a scheduler makes, but for those that
    `Scheduler.reset` has undone.

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
        self._rope_rows_M = np.zeros(num_rows, np.int64)  # added to a position

    def write(self, arrays: dict[str, np.ndarray], chunks: Chunks, size: StepSize) -> np.ndarray:
        """Writes the chunks into `size.arrays` of a buffer; what they leave over becomes null.

        Returns the positions of the tokens that are drawn, int64 [len(chunks.sampled)].
        """
        self._take_blocks(chunks)
        prompts, num_decodes, num_seqs = chunks.prompts, len(chunks.decodes), len(chunks)
        sequences = chunks.decodes + [chunk.sequence for chunk in prompts]
        rows_S = np.array([sequence.row for sequence in sequences], np.int64)
        starts_S = np.array(chunks.starts + [chunk.start for chunk in prompts], np.int64)
        # Of steps that only decode, what is said of sequences holds for tokens and draws, too.
        ends_S, kv_lens_S = np.arange(1, num_seqs + 1), starts_S + 1
        token_rows_T, positions_T, tokens_T = rows_S, starts_S, np.array(chunks.tokens, np.int64)
        is_sampled_S: np.ndarray | slice = slice(None)
        if prompts:
            lengths_S = np.ones(num_seqs, np.int64)
            lengths_S[num_decodes:] = [chunk.length for chunk in prompts]
            ends_S, kv_lens_S = lengths_S.cumsum(), starts_S + lengths_S
            which_T = np.arange(num_seqs).repeat(lengths_S)
            token_rows_T = rows_S[which_T]
            positions_T = np.arange(len(which_T)) + (kv_lens_S - ends_S)[which_T]
            known = [s.tokens[start : start + length] for s, start, length, _ in prompts]
            tokens_T = np.concatenate([tokens_T, *(np.array(ids, np.int64) for ids in known)])
            is_sampled_S = np.ones(num_seqs, bool)
            is_sampled_S[num_decodes:] = [chunk.samples for chunk in prompts]

        offsets, num_tokens = arrays["cu_seqlens_S1"], len(tokens_T)
        offsets[0] = 0
        offsets[1 : num_seqs + 1] = ends_S
        # Null sequences take one null token each, as far as there are any.
        null_ends = np.arange(num_tokens + 1, num_tokens + 1 + size.num_seqs - num_seqs)
        offsets[num_seqs + 1 :] = np.minimum(null_ends, size.num_tokens)
        offsets[-1] = size.num_tokens
        table_SW, width = arrays["block_table_SW"], chunks.num_blocks
        table_SW[:num_seqs, :width] = self._table_MW[rows_S, :width]
        table_SW[:num_seqs, width:] = 0
        table_SW[num_seqs:] = 0
        block_T, offset_T = np.divmod(positions_T, self._block_size)
        slots_T = self._table_MW[token_rows_T, block_T].astype(np.int64) * self._block_size
        for name, values, null in (
            ("tokens_T", tokens_T, 0),
            ("token_rows_T", token_rows_T, self._spare_row),
            ("positions_T", positions_T + self._rope_rows_M[token_rows_T], 0),
            ("slots_T", slots_T + offset_T, -1),
            ("kv_lens_S", kv_lens_S, 0),
            ("last_R", ends_S[is_sampled_S] - 1, 0),
            ("rows_R", rows_S[is_sampled_S], self._spare_row),
        ):
            array = arrays[name]
            array[: len(values)] = values
            array[len(values) :] = null
        return kv_lens_S[is_sampled_S]

    def _take_blocks(self, chunks: Chunks) -> None:
        for sequence in chunks.admitted:
            row, num_blocks = sequence.row, len(sequence.blocks)
            self._table_MW[row, :num_blocks] = sequence.blocks
            self._table_MW[row, num_blocks:] = 0
            self._rope_rows_M[row] = self._long_rope_row * sequence.long_rope
        if chunks.grown:
            rows = [sequence.row for sequence in chunks.grown]
            at = [len(sequence.blocks) - 1 for sequence in chunks.grown]
            self._table_MW[rows, at] = [sequence.blocks[-1] for sequence in chunks.grown]
