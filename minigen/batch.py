"""A micro-batch: samples of different lengths, end to end, and what the loss counts of them.

Shape suffixes: T packed tokens, S sequences, R tokens that count (targets).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minigen.data import Samples
from minigen.model import DecoderConfig


class Batch(NamedTuple):
    """Row `rows_R[i]` of the hidden states predicts token `targets_R[i]`.

    cu_seqlens int32, the others int64. The last sequence is empty: a single sequence would be a
    dimension of 1, for which compiled code is made anew.
    """

    tokens_T: Tensor
    positions_T: Tensor
    cu_seqlens_S1: Tensor
    rows_R: Tensor
    targets_R: Tensor

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self
        return Batch(*(x.pin_memory().to(device, non_blocking=True) for x in self))


@dataclass(frozen=True)
class Corpus:
    """The samples of all files under one numbering, those of the first file first."""

    files: Sequence[Samples]
    lengths_N: np.ndarray
    num_targets_N: np.ndarray
    held_out_N: np.ndarray
    firsts: np.ndarray  # the id of each file's first sample, and the number of all

    @classmethod
    def of(cls, files: Sequence[Samples]) -> Corpus:
        return cls(
            files,
            np.concatenate([f.lengths_N().numpy() for f in files]),
            np.concatenate([f.num_targets_N().numpy() for f in files]),
            np.concatenate([f.held_out_N.numpy() for f in files]),
            np.cumsum([0, *(len(f) for f in files)]),
        )

    def ids(self, file: int, held_out: bool) -> np.ndarray:
        """Ids of a file's samples, of one split."""
        ids = np.arange(self.firsts[file], self.firsts[file + 1])
        return ids[self.held_out_N[ids] == held_out]

    def sample(self, sample: int) -> tuple[Tensor, Tensor]:
        """(tokens, which of them are targets)."""
        file = int(np.searchsorted(self.firsts, sample, side="right")) - 1
        samples, i = self.files[file], sample - int(self.firsts[file])
        span = slice(int(samples.starts_N1[i]), int(samples.starts_N1[i + 1]))
        return samples.tokens_T[span], samples.targets_T[span]

    def batch(self, ids: Sequence[int], config: DecoderConfig, max_length: int) -> Batch:
        """The micro-batch of these samples; `max_length` is the decoder's."""
        pairs = [self.sample(sample) for sample in ids]
        return make_batch([p[0] for p in pairs], [p[1] for p in pairs], config, max_length)


def make_batch(
    tokens: Sequence[Tensor], targets: Sequence[Tensor], config: DecoderConfig, max_length: int
) -> Batch:
    """Packs samples; a token is predicted from the row before it, in its own sample."""
    lengths = torch.tensor([len(t) for t in tokens])
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    positions = [torch.arange(len(t)) for t in tokens]
    if config.rope_switch:
        # Long rope's long factors lie behind its short ones in the table.
        positions = [p + max_length * (len(p) > config.rope_switch) for p in positions]
    tokens_T = torch.cat(list(tokens)).long()
    is_target_T = torch.cat(list(targets)).clone()
    is_target_T[cu_seqlens[:-1]] = False
    target_rows_R = is_target_T.nonzero().squeeze(1)
    return Batch(
        tokens_T,
        torch.cat(positions),
        torch.cat([cu_seqlens, cu_seqlens[-1:]]).int(),
        target_rows_R - 1,
        tokens_T[target_rows_R],
    )
