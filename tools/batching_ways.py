"""Four ways to lay requests of different lengths out, with one interface.

Shape suffixes as in `tools/padded.py`, T packed tokens, S requests, W blocks of one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from minigen.model import Decoder, PagedKV
from tools import padded
from tools.padded import Cache, PaddedBatch

BLOCK_SIZE = 16
Compile = Callable[[Callable[..., Tensor]], Callable[..., Tensor]]


def without_coalescing() -> dict[str, bool]:
    """Inductor's settings without its analysis of coalesced access, where it has one.

    The analysis chooses the tiles of kernels, but not yet for dynamic sizes, and fails on those of
    a rectangle, a product of sums (torch 2.11 on a GPU, pytorch issue 181563: an assertion in
    `get_pw_red_splits`). Without it Inductor chooses as it did before there was one.
    """
    from torch._inductor import config

    name = "coalesce_tiling_analysis"
    return {f"triton.{name}": False} if hasattr(config.triton, name) else {}


def groups_of(lengths: Sequence[int]) -> list[list[int]]:
    """Indices by length, those between two powers of two together, shortest first."""
    groups: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        groups.setdefault((length - 1).bit_length(), []).append(i)
    return [groups[key] for key in sorted(groups)]


def padding_share(lengths: Sequence[int], groups: Sequence[Sequence[int]]) -> float:
    """Share of the rows that are padding where each group is as long as its longest."""
    rows = sum(len(group) * max(lengths[i] for i in group) for group in groups)
    return 1 - sum(lengths) / rows


class Way(ABC):
    """Requests laid out in one way. Logits and hidden states come in the requests' order.

    Args:
        prompts: at least two, of token ids.
        num_steps: decode steps that the cache has room for.
        wrap: what compiles a function; the training step is wrapped only by `wrap_train`.
    """

    name: str

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[list[int]],
        num_steps: int,
        wrap: Compile,
        wrap_train: Compile,
    ) -> None:
        self.decoder, self.prompts, self.num_steps = decoder, prompts, num_steps
        self.device = decoder.embed.weight.device
        self.lengths = [len(prompt) for prompt in prompts]
        self._lay_out(wrap, wrap_train)

    @abstractmethod
    def _lay_out(self, wrap: Compile, wrap_train: Compile) -> None:
        """Puts the prompts on the device."""

    @abstractmethod
    def make_cache(self) -> None:
        """Memory for prompts and `num_steps` tokens."""

    @abstractmethod
    def drop_cache(self) -> None:
        """Gives that memory back."""

    @abstractmethod
    def cache_bytes(self) -> int: ...

    @abstractmethod
    def prefill(self) -> Tensor:
        """fp32 logits [S, V] after the prompts, whose keys are then in the cache."""

    @abstractmethod
    def fill_cache(self) -> None:
        """What the prefill leaves in the cache, without compiling anything."""

    @abstractmethod
    def decode(self, tokens_S: Tensor, step: int) -> Tensor:
        """fp32 logits [S, V] after one token more; `step` counts from 0."""

    @abstractmethod
    def hidden_of_real(self) -> Tensor:
        """Hidden states [T, E] of all real tokens, prompt by prompt, without a cache."""

    @abstractmethod
    def loss(self) -> Tensor:
        """Mean cross-entropy of every token that has one before it."""

    @abstractmethod
    def padding(self, phase: str) -> float:
        """Share of rows that are padding (decode: of the cache, at its end)."""


def _summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum")


class Padded(Way):
    """One rectangle, or one a group."""

    name = "padded"

    def groups(self) -> list[list[int]]:
        return [list(range(len(self.prompts)))]

    def _lay_out(self, wrap: Compile, wrap_train: Compile) -> None:
        self._groups = self.groups()
        self._order = torch.tensor(
            [i for group in self._groups for i in group], device=self.device
        ).argsort()
        self._batches = [
            PaddedBatch.of([self.prompts[i] for i in group], self.device) for group in self._groups
        ]
        self._targets = []
        for batch in self._batches:
            # What follows each token; the last one's and padding's are ignored.
            after_BL = batch.tokens_BL.roll(-1, 1)
            real_BL = batch.positions_BL < batch.lengths_B[:, None] - 1
            self._targets.append(after_BL.masked_fill(~real_BL, -100))
        self._caches: list[Cache] = []
        self._prefill, self._decode = wrap(self._prefill_rows), wrap(self._decode_rows)
        self._loss = wrap_train(self._loss_sum)

    def make_cache(self) -> None:
        self._caches = [
            padded.new_cache(self.decoder, len(group), batch.tokens_BL.shape[1] + self.num_steps)
            for group, batch in zip(self._groups, self._batches, strict=True)
        ]

    def drop_cache(self) -> None:
        self._caches = []

    def cache_bytes(self) -> int:
        return sum(t.nbytes for cache in self._caches for pair in cache for t in pair)

    def hidden(self, batch: PaddedBatch, cache: Cache | None) -> Tensor:
        return padded.sdpa_prefill(self.decoder, batch, cache)

    def _prefill_rows(self, batch: PaddedBatch, cache: Cache) -> Tensor:
        hidden_BLE = self.hidden(batch, cache)
        row_B = torch.arange(len(batch.lengths_B), device=self.device)
        return self.decoder.logits(hidden_BLE[row_B, batch.lengths_B - 1])

    def _decode_rows(self, tokens_B: Tensor, kv_lens_B: Tensor, cache: Cache) -> Tensor:
        return self.decoder.logits(padded.sdpa_decode(self.decoder, tokens_B, kv_lens_B, cache))

    def _loss_sum(self, batch: PaddedBatch, targets_BL: Tensor) -> Tensor:
        return _summed_loss(self.decoder.logits(self.hidden(batch, None)), targets_BL)

    def prefill(self) -> Tensor:
        parts = zip(self._batches, self._caches, strict=True)
        return torch.cat([self._prefill(*part) for part in parts])[self._order]

    def fill_cache(self) -> None:
        for part in zip(self._batches, self._caches, strict=True):
            self._prefill_rows(*part)

    def decode(self, tokens_S: Tensor, step: int) -> Tensor:
        logits = []
        for group, batch, cache in zip(self._groups, self._batches, self._caches, strict=True):
            tokens_B = tokens_S if len(self._groups) == 1 else tokens_S[group]
            logits.append(self._decode(tokens_B, batch.lengths_B + step, cache))
        return logits[0] if len(logits) == 1 else torch.cat(logits)[self._order]

    def hidden_of_real(self) -> Tensor:
        rows: dict[int, Tensor] = {}
        for group, batch in zip(self._groups, self._batches, strict=True):
            hidden_BLE = self.hidden(batch, None)
            rows |= {i: hidden_BLE[b, : self.lengths[i]] for b, i in enumerate(group)}
        return torch.cat([rows[i] for i in range(len(self.prompts))])

    def loss(self) -> Tensor:
        parts = zip(self._batches, self._targets, strict=True)
        total = sum(self._loss(*part) for part in parts)
        return torch.as_tensor(total) / sum(length - 1 for length in self.lengths)

    def padding(self, phase: str) -> float:
        extra = self.num_steps if phase == "decode" else 0
        return padding_share([length + extra for length in self.lengths], self._groups)


class Grouped(Padded):
    name = "grouped"

    def groups(self) -> list[list[int]]:
        return groups_of(self.lengths)


class Unpadded(Padded):
    """Padded activations and cache, attention over real rows only."""

    name = "unpadded"

    def hidden(self, batch: PaddedBatch, cache: Cache | None) -> Tensor:
        return padded.unpadded_prefill(self.decoder, batch, cache)

    def make_cache(self) -> None:
        super().make_cache()
        # Where the real keys of each step lie: known from the lengths, once for all layers.
        self._real_keys = []
        for step in range(self.num_steps):
            kv_lens = torch.tensor([length + step + 1 for length in self.lengths])
            row_T = torch.arange(len(kv_lens)).repeat_interleave(kv_lens)
            ends = torch.cat((torch.zeros(1, dtype=torch.int64), kv_lens.cumsum(0)))
            at_T = torch.arange(len(row_T)) - ends[row_T]
            keys = (row_T, at_T, ends.int())
            self._real_keys.append(tuple(tensor.to(self.device) for tensor in keys))

    def _decode_rows(
        self, tokens_B: Tensor, kv_lens_B: Tensor, cache: Cache, *keys: Tensor
    ) -> Tensor:
        hidden = padded.unpadded_decode(self.decoder, tokens_B, kv_lens_B, cache, *keys)
        return self.decoder.logits(hidden)

    def decode(self, tokens_S: Tensor, step: int) -> Tensor:
        kv_lens_B = self._batches[0].lengths_B + step
        return self._decode(tokens_S, kv_lens_B, self._caches[0], *self._real_keys[step])


class Flat(Way):
    """minigen's: packed tokens, the paged cache."""

    name = "flat"

    def _lay_out(self, wrap: Compile, wrap_train: Compile) -> None:
        flat = [token for prompt in self.prompts for token in prompt]
        at = [i for prompt in self.prompts for i in range(len(prompt))]
        ends = torch.tensor([0, *self.lengths]).cumsum(0)
        self._tokens_T = torch.tensor(flat).to(self.device)
        self._positions_T = torch.tensor(at).to(self.device)
        self._cu_seqlens_S1 = ends.int().to(self.device)
        self._last_S = (ends[1:] - 1).to(self.device)
        self._lengths_S = torch.tensor(self.lengths).to(self.device)
        targets_T = self._tokens_T.roll(-1)
        targets_T[self._last_S] = -100
        self._targets_T = targets_T
        self._cu_decode_S1 = torch.arange(len(self.prompts) + 1, device=self.device).int()
        self._prefill, self._decode = wrap(self._paged_rows), wrap(self._decode_rows)
        self._loss = wrap_train(self._loss_sum)

    def make_cache(self) -> None:
        config, weight = self.decoder.config, self.decoder.embed.weight
        counts = [-(-(length + self.num_steps) // BLOCK_SIZE) for length in self.lengths]
        table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
        begin = 0
        for row, count in zip(table, counts, strict=True):
            row[:count] = torch.arange(begin, begin + count)
            begin += count
        self._num_blocks = begin
        shape = (begin, BLOCK_SIZE, config.num_kv_heads, config.head_dim)

        def zeros() -> Tensor:
            return torch.empty(shape, dtype=weight.dtype, device=self.device).fill_(0)

        self._caches = [(zeros(), zeros()) for _ in range(config.num_layers)]
        self._table_SW = table.to(self.device)
        row_T = torch.arange(len(counts)).repeat_interleave(torch.tensor(self.lengths))
        at_T = self._positions_T.cpu()
        slots_T = table[row_T, at_T // BLOCK_SIZE].long() * BLOCK_SIZE + at_T % BLOCK_SIZE
        self._slots_T = slots_T.to(self.device)

    def drop_cache(self) -> None:
        self._caches = []

    def cache_bytes(self) -> int:
        return sum(t.nbytes for pair in self._caches for t in pair)

    def _paged_rows(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        slots_T: Tensor,
        cu_seqlens_S1: Tensor,
        kv_lens_S: Tensor,
        table_SW: Tensor,
        last_S: Tensor,
    ) -> Tensor:
        kv = PagedKV(self._caches, slots_T, kv_lens_S, table_SW)
        hidden_TE = self.decoder.hidden_states(tokens_T, positions_T, cu_seqlens_S1, kv)
        return self.decoder.logits(hidden_TE[last_S])

    def _decode_rows(
        self, tokens_S: Tensor, kv_lens_S: Tensor, table_SW: Tensor, cu_seqlens_S1: Tensor
    ) -> Tensor:
        block_S1 = (kv_lens_S // BLOCK_SIZE)[:, None]
        block_S = table_SW.gather(1, block_S1)[:, 0].long()
        slots_S = block_S * BLOCK_SIZE + kv_lens_S % BLOCK_SIZE
        kv = PagedKV(self._caches, slots_S, (kv_lens_S + 1).int(), table_SW)
        return self.decoder.logits(
            self.decoder.hidden_states(tokens_S, kv_lens_S, cu_seqlens_S1, kv)
        )

    def _loss_sum(
        self, tokens_T: Tensor, positions_T: Tensor, cu_seqlens_S1: Tensor, targets_T: Tensor
    ) -> Tensor:
        hidden_TE = self.decoder.hidden_states(tokens_T, positions_T, cu_seqlens_S1)
        return _summed_loss(self.decoder.logits(hidden_TE), targets_T)

    def _prefill_inputs(self) -> tuple[Tensor, ...]:
        return (
            self._tokens_T, self._positions_T, self._slots_T, self._cu_seqlens_S1,
            self._lengths_S.int(), self._table_SW, self._last_S,
        )  # fmt: skip

    def prefill(self) -> Tensor:
        return self._prefill(*self._prefill_inputs())

    def fill_cache(self) -> None:
        self._paged_rows(*self._prefill_inputs())

    def decode(self, tokens_S: Tensor, step: int) -> Tensor:
        return self._decode(tokens_S, self._lengths_S + step, self._table_SW, self._cu_decode_S1)

    def hidden_of_real(self) -> Tensor:
        return self.decoder.hidden_states(self._tokens_T, self._positions_T, self._cu_seqlens_S1)

    def loss(self) -> Tensor:
        total = self._loss(self._tokens_T, self._positions_T, self._cu_seqlens_S1, self._targets_T)
        return total / sum(length - 1 for length in self.lengths)

    def padding(self, phase: str) -> float:
        if phase != "decode":
            return 0.0
        held = sum(length + self.num_steps for length in self.lengths)
        return 1 - held / (self._num_blocks * BLOCK_SIZE)


WAYS: tuple[type[Way], ...] = (Padded, Grouped, Unpadded, Flat)
