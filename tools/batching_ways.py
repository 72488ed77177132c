"""Four ways to serve requests of different lengths, with one interface; each runs layer by layer.

Shape suffixes as in `tools/padded.py`, T packed tokens, S requests, W blocks of one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minigen.model import Decoder, PagedKV, packed_layer
from tools import padded
from tools.padded import Cache, PaddedBatch

BLOCK_SIZE = 16
Layer = Callable[..., Tensor]
Compile = Callable[[Layer], Layer]


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
    """Requests laid out in one way. Logits come in the requests' order.

    Args:
        prompts: at least two, of token ids.
        num_steps: decode steps that the cache has room for.
        wrap: what compiles a layer.
    """

    name: str

    def __init__(
        self, decoder: Decoder, prompts: Sequence[list[int]], num_steps: int, wrap: Compile
    ) -> None:
        self.decoder, self.prompts, self.num_steps = decoder, prompts, num_steps
        self.device = decoder.embed.weight.device
        self.lengths = [len(prompt) for prompt in prompts]
        self._lay_out(wrap)

    @abstractmethod
    def _lay_out(self, wrap: Compile) -> None:
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

    def _logits(self, x_RE: Tensor) -> Tensor:
        """fp32 logits [R, V] of rows that the last layer gave."""
        return self.decoder.logits(self.decoder.norm(x_RE))

    def padding(self, phase: str) -> float:
        """Share of rows that are padding (decode: of the cache, at its end)."""
        if phase != "decode":
            return self._prefill_padding()
        held = sum(length + self.num_steps for length in self.lengths)
        return 1 - held / self._cache_rows()

    @abstractmethod
    def _prefill_padding(self) -> float: ...

    @abstractmethod
    def _cache_rows(self) -> int:
        """Tokens that the cache has memory for."""


class Padded(Way):
    """One rectangle, or one a group."""

    name = "padded"

    def groups(self) -> list[list[int]]:
        return [list(range(len(self.prompts)))]

    def layers(self) -> tuple[Layer, Layer]:
        """The layer of the prefill and that of a decode step."""
        return padded.sdpa_prefill_layer, padded.sdpa_decode_layer

    def _lay_out(self, wrap: Compile) -> None:
        self._indices = groups = self.groups()
        self._groups = [torch.tensor(group, device=self.device) for group in groups]
        self._order = torch.cat(self._groups).argsort()
        self._batches = [
            PaddedBatch.of([self.prompts[i] for i in group], self.device) for group in groups
        ]
        self._caches: list[Cache] = []
        self._plain_layer, decode_layer = self.layers()
        self._prefill_layer, self._decode_layer = wrap(self._plain_layer), wrap(decode_layer)

    def make_cache(self) -> None:
        self._caches = []
        for batch in self._batches:
            rows, capacity = self._cache_shape(batch)
            self._caches.append(padded.new_cache(self.decoder, rows, capacity))

    def _cache_shape(self, batch: PaddedBatch) -> tuple[int, int]:
        """(sequences, rows for each)."""
        # A multiple of 8, as the fast kernels want the rows of a mask.
        rows, longest = batch.tokens_BL.shape
        return rows, -(-(longest + self.num_steps) // 8) * 8

    def drop_cache(self) -> None:
        self._caches = []

    def cache_bytes(self) -> int:
        return sum(t.nbytes for cache in self._caches for pair in cache for t in pair)

    def _shared(self, batch: PaddedBatch) -> tuple[Tensor, ...]:
        """What all layers of the prefill are given."""
        return ()

    def _keys(self, kv_lens_B: Tensor, cache: Cache, step: int) -> tuple[Tensor, ...]:
        """What all layers of a decode step are given besides the number of keys."""
        k_BKCD, _ = cache[0]
        return (padded.seen_keys(kv_lens_B, k_BKCD.shape[2], k_BKCD.dtype),)

    def _prefill(self, layer: Layer) -> list[Tensor]:
        logits = []
        for batch, cache in zip(self._batches, self._caches, strict=True):
            inputs = batch.tokens_BL, batch.positions_BL, layer, cache
            x_BLE = padded.hidden_states(self.decoder, *inputs, *self._shared(batch))
            row_B = torch.arange(len(batch.lengths_B), device=self.device)
            logits.append(self._logits(x_BLE[row_B, batch.lengths_B - 1]))
        return logits

    def prefill(self) -> Tensor:
        return torch.cat(self._prefill(self._prefill_layer))[self._order]

    def fill_cache(self) -> None:
        self._prefill(self._plain_layer)

    def decode(self, tokens_S: Tensor, step: int) -> Tensor:
        logits = []
        for ids_B, batch, cache in zip(self._groups, self._batches, self._caches, strict=True):
            kv_lens_B = batch.lengths_B + step
            inputs = tokens_S[ids_B, None], kv_lens_B[:, None], self._decode_layer, cache
            keys = self._keys(kv_lens_B, cache, step)
            x_B1E = padded.hidden_states(self.decoder, *inputs, kv_lens_B, *keys)
            logits.append(self._logits(x_B1E[:, 0]))
        return torch.cat(logits)[self._order]

    def _prefill_padding(self) -> float:
        return padding_share(self.lengths, self._indices)

    def _cache_rows(self) -> int:
        return sum(math.prod(self._cache_shape(batch)) for batch in self._batches)


class Grouped(Padded):
    name = "grouped"

    def groups(self) -> list[list[int]]:
        return groups_of(self.lengths)


class Unpadded(Padded):
    """Padded activations and cache, attention over real rows only."""

    name = "unpadded"

    def layers(self) -> tuple[Layer, Layer]:
        return padded.unpadded_prefill_layer, padded.unpadded_decode_layer

    def make_cache(self) -> None:
        super().make_cache()
        # Where the real keys of each step lie: known from the lengths, once for all layers.
        self._real_keys = []
        for step in range(self.num_steps):
            kv_lens = torch.tensor([length + step + 1 for length in self.lengths])
            row_T = torch.arange(len(kv_lens)).repeat_interleave(kv_lens)
            ends = torch.cat((torch.zeros(1, dtype=torch.int64), kv_lens.cumsum(0)))
            at_T = torch.arange(len(row_T)) - ends[row_T]
            keys = (row_T, at_T, torch.arange(len(kv_lens) + 1, dtype=torch.int32), ends.int())
            self._real_keys.append(tuple(tensor.to(self.device) for tensor in keys))

    def _shared(self, batch: PaddedBatch) -> tuple[Tensor, ...]:
        return batch.real_T, batch.cu_seqlens_S1

    def _keys(self, kv_lens_B: Tensor, cache: Cache, step: int) -> tuple[Tensor, ...]:
        return self._real_keys[step]


class Flat(Way):
    """minigen's: packed tokens, the paged cache."""

    name = "flat"

    def _lay_out(self, wrap: Compile) -> None:
        flat = [token for prompt in self.prompts for token in prompt]
        at = [i for prompt in self.prompts for i in range(len(prompt))]
        ends = torch.tensor([0, *self.lengths]).cumsum(0)
        self._tokens_T = torch.tensor(flat).to(self.device)
        self._positions_T = torch.tensor(at).to(self.device)
        self._cu_seqlens_S1 = ends.int().to(self.device)
        self._last_S = (ends[1:] - 1).to(self.device)
        self._lengths_S = torch.tensor(self.lengths).to(self.device)
        self._cu_decode_S1 = torch.arange(len(self.prompts) + 1, device=self.device).int()
        self._layer = wrap(packed_layer)

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

    def _rows(
        self, layer: Layer, tokens_T: Tensor, positions_T: Tensor, ends_S1: Tensor, kv: PagedKV
    ) -> Tensor:
        """Hidden states [T, E] before the last norm."""
        x_TE, cos_TR, sin_TR = self.decoder.begin(tokens_T, positions_T)
        for i, block in enumerate(self.decoder.blocks):
            x_TE = layer(block, x_TE, cos_TR, sin_TR, ends_S1, kv.layer(i))
        return x_TE

    def _prefill(self, layer: Layer) -> Tensor:
        kv = PagedKV(self._caches, self._slots_T, self._lengths_S.int(), self._table_SW)
        x_TE = self._rows(layer, self._tokens_T, self._positions_T, self._cu_seqlens_S1, kv)
        return self._logits(x_TE[self._last_S])

    def prefill(self) -> Tensor:
        return self._prefill(self._layer)

    def fill_cache(self) -> None:
        self._prefill(packed_layer)

    def decode(self, tokens_S: Tensor, step: int) -> Tensor:
        kv_lens_S = self._lengths_S + step
        block_S = self._table_SW.gather(1, (kv_lens_S // BLOCK_SIZE)[:, None])[:, 0].long()
        slots_S = block_S * BLOCK_SIZE + kv_lens_S % BLOCK_SIZE
        kv = PagedKV(self._caches, slots_S, (kv_lens_S + 1).int(), self._table_SW)
        return self._logits(self._rows(self._layer, tokens_S, kv_lens_S, self._cu_decode_S1, kv))

    def _prefill_padding(self) -> float:
        return 0.0

    def _cache_rows(self) -> int:
        return self._num_blocks * BLOCK_SIZE


WAYS: tuple[type[Way], ...] = (Padded, Grouped, Unpadded, Flat)
