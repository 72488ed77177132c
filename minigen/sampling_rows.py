"""The tokens that a step draws, a row each: as the engine has them, and as tensors on the device.

Shape suffixes: R rows to sample, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from minigen.sampling_params import SamplingParams

MAX_CANDIDATES = 128  # the largest top_k that is served without sorting the vocabulary

_HOTTEST = 1e30  # in float32, times a logarithm, still finite

Mode = Literal["greedy", "plain", "top_k", "sort"]


class TokenCounts:
    """Which tokens a sequence has, on the device: what penalties need. 5 bytes a vocabulary entry.

    `prompt_V` (bool) marks the tokens of the prompt, `outputs_V` (int32) counts the drawn ones.
    Ids must lie in the vocabulary. A sequence that was cut short needs a new one.
    """

    def __init__(
        self,
        prompt_ids: Sequence[int],
        vocab_size: int,
        device: torch.device | str,
        output_ids: Sequence[int] = (),
    ):
        device = torch.device(device)
        self.prompt_V = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self.outputs_V = torch.zeros(vocab_size, dtype=torch.int32, device=device)
        self.num_outputs = 0
        self.prompt_V.index_fill_(0, to_device(prompt_ids, torch.int64, device), True)
        self.catch_up(output_ids)

    def append(self, token: int | Tensor) -> None:
        """Count a drawn token: an id, or an int64 tensor of one element (never synchronised)."""
        if not isinstance(token, Tensor):
            token = to_device([token], torch.int64, self.outputs_V.device)
        self._count(token.reshape(1))

    def catch_up(self, output_ids: Sequence[int]) -> None:
        """Count those of a sequence's outputs that are not counted yet."""
        new_ids = output_ids[self.num_outputs :]
        if new_ids:
            self._count(to_device(new_ids, torch.int64, self.outputs_V.device))

    def _count(self, tokens: Tensor) -> None:
        self.outputs_V.index_add_(0, tokens, torch.ones_like(tokens, dtype=torch.int32))
        self.num_outputs += tokens.numel()


@dataclass
class Row:
    """One token to draw. Plain data, but for `counts`.

    `seed` is 64 bits (`params.seed`, or one that the engine chose), `sample` the index among the
    request's `n`, `position` the absolute position that the token will have (an engine's rows serve
    many tokens, and `RowBatch.write` is given the positions). `stop_ids` are ruled out while there
    are fewer than `min_tokens` outputs, of which the last `num_pending` are not in
    `output_token_ids` yet. `counts` carries the penalties' state from step to step; without it the
    state is built anew from the ids at every step.
    """

    params: SamplingParams
    seed: int
    sample: int
    position: int
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    stop_ids: frozenset[int] = frozenset()
    num_pending: int = 0
    counts: TokenCounts | None = field(default=None, repr=False)

    @cached_property
    def numbers(self) -> bytes:
        """What does not change from one draw to the next, as a `_NUMBERS` record."""
        params = self.params
        return np.array(
            (
                0.0 if params.is_greedy else min(params.temperature, _HOTTEST),
                params.top_p,
                params.min_p,
                min(max(params.top_k, 0), 2**62),
                _signed(self.seed),
                self.sample,
                params.min_tokens > 0 and bool(self.stop_ids),
                bool(params.logit_bias) or params.has_penalties,
                {None: -1, -1: _ALL}.get(params.logprobs, params.logprobs),
            ),
            _NUMBERS,
        ).tobytes()

    @property
    def masks_stop_ids(self) -> bool:
        num_outputs = len(self.output_token_ids) + self.num_pending
        return bool(self.stop_ids) and num_outputs < self.params.min_tokens

    @property
    def needs_edits(self) -> bool:
        return bool(self.params.logit_bias) or self.params.has_penalties or self.masks_stop_ids


_NUMBERS = np.dtype(
    [
        ("temperature", np.float64),  # 0: greedy
        ("top_p", np.float64),
        ("min_p", np.float64),
        ("top_k", np.int64),  # 0: off
        ("seed", np.int64),
        ("sample", np.int64),
        ("may_mask", np.bool_),  # stop ids, as long as there are few outputs
        ("needs_edits", np.bool_),  # at every draw
        ("num_logprobs", np.int64),  # -1: it wants none
    ]
)
_ALL = 2**62  # more log-probabilities than any vocabulary has


class RowBatch:
    """The rows of a step as arrays, and what they need of the draw.

    Serves all steps that draw for the same rows: only positions differ from one to the next.

    Attributes:
        mode: the cheapest way to draw that serves all rows.
        num_logprobs: the most log-probabilities that a row wants; None = no row any.
        may_mask: whether some row rules stop ids out as long as it has few outputs.
    """

    def __init__(self, rows: Sequence[Row], vocab_size: int) -> None:
        self.rows, self.vocab_size = rows, vocab_size
        # Joining what each row keeps: 256 rows take 40 us with `write`; from their fields, 210.
        numbers = np.frombuffer(b"".join([row.numbers for row in rows]), _NUMBERS)
        top_k = numbers["top_k"]
        top_k = np.where(top_k > 0, np.minimum(top_k, vocab_size), vocab_size)
        self._ints_3R = np.stack([top_k, numbers["seed"], numbers["sample"]])
        self._floats_3R = np.stack([numbers[name] for name in ("temperature", "top_p", "min_p")])
        self.mode: Mode = _mode(numbers["temperature"], top_k, numbers["top_p"], vocab_size)
        self.may_mask = bool(numbers["may_mask"].any())
        self._always_edits = bool(numbers["needs_edits"].any())
        most = int(numbers["num_logprobs"].max(initial=-1))
        self.num_logprobs = None if most < 0 else most

    @property
    def needs_edits(self) -> bool:
        """Whether some row does in this step."""
        return self._always_edits or (
            self.may_mask and any(row.masks_stop_ids for row in self.rows)
        )

    def write(self, ints_4R: np.ndarray, floats_3R: np.ndarray, positions_R: np.ndarray) -> None:
        """Writes the rows as `SamplingTensors` holds them; what they leave over are greedy rows.

        positions_R: what each row draws for, int64.
        """
        num_rows = len(self.rows)
        ints_4R[:3, :num_rows] = self._ints_3R
        ints_4R[3, :num_rows] = positions_R
        floats_3R[:, :num_rows] = self._floats_3R
        ints_4R[:, num_rows:] = [[self.vocab_size], [0], [0], [0]]
        floats_3R[:, num_rows:] = [[0.0], [1.0], [0.0]]


def _mode(
    temperature_R: np.ndarray, top_k_R: np.ndarray, top_p_R: np.ndarray, vocab_size: int
) -> Mode:
    is_sampled_R = temperature_R > 0
    if not is_sampled_R.any():
        return "greedy"
    is_filtered_R = (top_k_R < vocab_size) | (top_p_R < 1)
    filtered = top_k_R[is_sampled_R & is_filtered_R]
    if not len(filtered):
        return "plain"
    return "top_k" if filtered.max() <= MAX_CANDIDATES else "sort"


@dataclass
class SamplingTensors:
    """The rows of a step as `draw` takes them, on the device, and what the host knows of them.

    float32: `temperature_R` (0 = greedy), `top_p_R`, `min_p_R`. int64: `top_k_R` (the
    vocabulary's size where off), `seed_R`, `sample_R`, `position_R`. `mode` is the
    cheapest that serves all rows.
    """

    temperature_R: Tensor
    top_k_R: Tensor
    top_p_R: Tensor
    min_p_R: Tensor
    seed_R: Tensor
    sample_R: Tensor
    position_R: Tensor
    mode: Mode
    needs_edits: bool

    @property
    def needs_sort(self) -> bool:
        """Whether some row has top-k or top-p."""
        return self.mode in ("top_k", "sort")

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors in the order of `draw`'s parameters: `draw(logits_RV, *t.tensors(), …)`."""
        return (
            self.temperature_R,
            self.top_k_R,
            self.top_p_R,
            self.min_p_R,
            self.seed_R,
            self.sample_R,
            self.position_R,
        )

    def first(self, num_rows: int) -> SamplingTensors:
        """Views of the first rows."""
        firsts = (tensor[:num_rows] for tensor in self.tensors())
        return SamplingTensors(*firsts, mode=self.mode, needs_edits=self.needs_edits)

    @classmethod
    def from_rows(
        cls,
        rows: Sequence[Row],
        vocab_size: int,
        device: torch.device | str,
        into: Tensor | None = None,
    ) -> SamplingTensors:
        """Lay rows out on `device` in one copy, which the host does not wait for.

        `into`: a uint8 tensor of `num_bytes(len(rows))` there, which the tensors are views of.
        """
        positions_R = np.array([row.position for row in rows], np.int64)
        return cls.from_batch(RowBatch(rows, vocab_size), positions_R, len(rows), device, into)

    @classmethod
    def from_batch(
        cls,
        batch: RowBatch,
        positions_R: np.ndarray,
        num_rows: int,
        device: torch.device | str,
        into: Tensor | None = None,
    ) -> SamplingTensors:
        """The same of `num_rows` rows, of which those that the batch does not have are greedy.

        positions_R: what each of the batch's rows draws for, int64.
        """
        device = torch.device(device)
        host = torch.zeros(
            cls.num_bytes(num_rows), dtype=torch.uint8, pin_memory=device.type == "cuda"
        )
        batch.write(*cls.arrays(host, num_rows), positions_R)
        if into is None:
            packed = host.to(device, non_blocking=True)
        else:
            packed = into.copy_(host, non_blocking=True)
        return cls.of(cls.views(packed, num_rows), batch)

    @classmethod
    def of(cls, views: tuple[Tensor, ...], batch: RowBatch) -> SamplingTensors:
        """Of tensors that `views` made."""
        temperature_R, top_k_R, top_p_R, min_p_R, seed_R, sample_R, position_R = views
        return cls(
            temperature_R, top_k_R, top_p_R, min_p_R, seed_R, sample_R, position_R,
            mode=batch.mode, needs_edits=batch.needs_edits,
        )  # fmt: skip

    @staticmethod
    def views(packed: Tensor, num_rows: int) -> tuple[Tensor, ...]:
        """The tensors, in the order of `tensors`, in a buffer of `num_bytes(num_rows)` bytes."""
        ints_4R, floats_3R = _number_views(packed, num_rows)
        top_k_R, seed_R, sample_R, position_R = ints_4R.unbind()
        temperature_R, top_p_R, min_p_R = floats_3R.unbind()
        return temperature_R, top_k_R, top_p_R, min_p_R, seed_R, sample_R, position_R

    @staticmethod
    def arrays(host: Tensor, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Such a buffer on the host as `RowBatch.write` fills it."""
        ints_4R, floats_3R = _number_views(host, num_rows)
        return ints_4R.numpy(), floats_3R.numpy()

    @staticmethod
    def num_bytes(num_rows: int) -> int:
        return _row_width(num_rows) * (4 * 8 + 3 * 4)


def _row_width(num_rows: int) -> int:
    """A row of numbers begins at a multiple of 16 bytes: a compiled function copies inputs that are
    less aligned than those it was compiled with."""
    return -(-num_rows // 4) * 4


def _number_views(packed: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """int64 [4, R] and float32 [3, R] in a buffer of `num_bytes(R)`."""
    width = _row_width(num_rows)
    split = 4 * width * 8
    ints = packed[:split].view(torch.int64).view(4, width)
    floats = packed[split:].view(torch.float32).view(3, width)
    return ints[:, :num_rows], floats[:, :num_rows]


def _signed(seed: int) -> int:
    return (seed + 2**63) % 2**64 - 2**63


def to_device(values: Iterable[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copy numbers over without waiting for the device."""
    host = torch.tensor(list(values), dtype=dtype)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
