"""What a request may ask of sampling, and the batched sampler that does it on the device.

Shape suffixes: R rows to sample, V vocabulary, C candidates (the largest logits of a row, sorted),
P rows with penalties, k asked for by the caller.

Noise is keyed by (seed, sample, position, vocabulary id) and by nothing else. A row therefore draws
the same token in any batch, at any place of it, through every `mode` and on every device, given the
same logits.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeGuard

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from minigen.kernels.draw_tokens import draw_tokens, draws_tokens

GREEDY_BELOW = 1e-5  # vLLM's limit: a lower temperature is greedy
MAX_CANDIDATES = 128  # the largest top_k that is served without sorting the vocabulary

_HOTTEST = 1e30  # in float32, times a logarithm, still finite

Mode = Literal["greedy", "plain", "top_k", "sort"]


# --- what a request may ask ----------------------------------------------------------------------


@dataclass
class SamplingParams:
    """How a request's tokens are drawn and when it ends; names and meanings are vLLM's.

    `temperature` 0 is greedy. `top_k` 0 or -1, `top_p` 1 and `min_p` 0 are off. `max_tokens` None
    goes on to the end of the context. `logprobs` and `prompt_logprobs` ask for that many of the
    likeliest tokens beside the chosen one, -1 for the whole vocabulary. `stop` and `stop_token_ids`
    are kept as lists (empty where none are given), `logit_bias` with whole numbers as keys.

    Raises ValueError, one sentence with the field, the value and what would be right.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[Any, float] | None = None  # from token ids, also as text: JSON's keys
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        self._check_int("n", 1)
        self._check_float("temperature", 0.0)
        self._check_int("top_k", -1, hint=" (-1 or 0 takes every token)")
        self._check_float("top_p", 0.0, 1.0, open_low=True)
        self._check_float("min_p", 0.0, 1.0)
        self._check_float("repetition_penalty", 0.0, open_low=True)
        self._check_float("presence_penalty", -2.0, 2.0)
        self._check_float("frequency_penalty", -2.0, 2.0)
        self._check_int("max_tokens", 1, optional=True)
        self._check_int("min_tokens", 0)
        self._check_int("logprobs", -1, optional=True, hint=" (-1 is the whole vocabulary)")
        self._check_int("prompt_logprobs", -1, optional=True, hint=" (-1 is the whole vocabulary)")
        self._check_int("seed", -(2**63), 2**63 - 1, optional=True)
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise self._wrong(name, "True or False")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise self._wrong("min_tokens", f"at most max_tokens, which is {self.max_tokens}")
        if self.n > 1 and self.is_greedy:
            raise self._wrong("n", "1 where temperature is 0: all samples would be the same")
        self.stop = self._stop_list()
        self.stop_token_ids = self._stop_id_list()
        self.logit_bias = self._bias_dict()

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def has_penalties(self) -> bool:
        """Whether drawing a token needs to know which tokens came before."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise ValueError where `logit_bias` names a token that the model does not have."""
        for token in self.logit_bias or ():
            if int(token) >= vocab_size:
                raise ValueError(
                    f"logit_bias names the token {token}, and the model has the tokens 0 to "
                    f"{vocab_size - 1}"
                )

    def _wrong(self, name: str, right: str) -> ValueError:
        return ValueError(f"{name} must be {right}, not {reprlib.repr(getattr(self, name))}")

    def _check_int(
        self,
        name: str,
        low: int,
        high: int | None = None,
        *,
        optional: bool = False,
        hint: str = "",
    ) -> None:
        value = getattr(self, name)
        if optional and value is None:
            return
        if not _is_int(value) or value < low or (high is not None and value > high):
            limits = f"of {low} or more" if high is None else f"from {low} to {high}"
            raise self._wrong(name, f"a whole number {limits}{hint}{' or None' * optional}")

    def _check_float(
        self, name: str, low: float, high: float | None = None, *, open_low: bool = False
    ) -> None:
        value = getattr(self, name)
        if (
            not _is_number(value)
            or value < low
            or (open_low and value == low)
            or (high is not None and value > high)
        ):
            limits = f"above {low:g}" if open_low else f"of {low:g} or more"
            if high is not None:
                above = f"above {low:g} and at most" if open_low else f"from {low:g} to"
                limits = f"{above} {high:g}"
            raise self._wrong(name, f"a finite number {limits}")
        setattr(self, name, float(value))

    def _stop_list(self) -> list[str]:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        if stop is None:
            return []
        if not isinstance(stop, (list, tuple)) or not all(isinstance(s, str) and s for s in stop):
            raise self._wrong("stop", "a text or a list of texts, none of them empty")
        return list(stop)

    def _stop_id_list(self) -> list[int]:
        ids = self.stop_token_ids
        if ids is None:
            return []
        if not isinstance(ids, (list, tuple)) or not all(_is_int(i) and i >= 0 for i in ids):
            raise self._wrong("stop_token_ids", "a list of token ids, whole numbers of 0 or more")
        return list(ids)

    def _bias_dict(self) -> dict[int, float] | None:
        if self.logit_bias is None:
            return None
        if not isinstance(self.logit_bias, Mapping):
            raise self._wrong("logit_bias", "a dict from token ids to numbers")
        bias = {}
        for token, value in self.logit_bias.items():
            if not (_is_int(token) and token >= 0) and not (
                isinstance(token, str) and token.isascii() and token.isdecimal()
            ):
                raise ValueError(
                    f"logit_bias must have token ids as keys, whole numbers of 0 or more, "
                    f"not {token!r}"
                )
            if not _is_number(value) or not -100 <= value <= 100:
                raise ValueError(
                    f"logit_bias must have finite numbers from -100 to 100 as values, not "
                    f"{value!r} for the token {token}"
                )
            bias[int(token)] = float(value)
        return bias


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    try:
        return (_is_int(value) or isinstance(value, float)) and math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False


# --- what a step draws ---------------------------------------------------------------------------


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
        self.prompt_V.index_fill_(0, _to_device(prompt_ids, torch.int64, device), True)
        self.catch_up(output_ids)

    def append(self, token: int | Tensor) -> None:
        """Count a drawn token: an id, or an int64 tensor of one element (never synchronised)."""
        if not isinstance(token, Tensor):
            token = _to_device([token], torch.int64, self.outputs_V.device)
        self._count(token.reshape(1))

    def catch_up(self, output_ids: Sequence[int]) -> None:
        """Count those of a sequence's outputs that are not counted yet."""
        new_ids = output_ids[self.num_outputs :]
        if new_ids:
            self._count(_to_device(new_ids, torch.int64, self.outputs_V.device))

    def _count(self, tokens: Tensor) -> None:
        self.outputs_V.index_add_(0, tokens, torch.ones_like(tokens, dtype=torch.int32))
        self.num_outputs += tokens.numel()


@dataclass
class Row:
    """One token to draw. Plain data, but for `counts`.

    `seed` is 64 bits (`params.seed`, or one that the engine chose), `sample` the index among the
    request's `n`, `position` the absolute position that the token will have. `stop_ids` are ruled
    out while there are fewer than `min_tokens` outputs, of which the last `num_pending` are not in
    `output_token_ids` yet. `counts` carries the penalties' state from
    step to step; without it the state is built anew from the ids at every step.
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
    ]
)


class RowBatch:
    """The rows of a step as arrays, and what they need of the draw.

    Attributes:
        mode: the cheapest way to draw that serves all rows.
        needs_edits: whether some row does.
    """

    def __init__(self, rows: Sequence[Row], vocab_size: int) -> None:
        self.rows, self.vocab_size = rows, vocab_size
        # Joining what each row keeps: 256 rows take 40 us with `write`; from their fields, 210.
        self._numbers = np.frombuffer(b"".join([row.numbers for row in rows]), _NUMBERS)
        top_k = self._numbers["top_k"]
        self._top_k = np.where(top_k > 0, np.minimum(top_k, vocab_size), vocab_size)
        self.mode: Mode = self._mode()
        self.needs_edits = bool(self._numbers["needs_edits"].any()) or (
            bool(self._numbers["may_mask"].any()) and any(row.masks_stop_ids for row in rows)
        )

    def _mode(self) -> Mode:
        is_sampled = self._numbers["temperature"] > 0
        if not is_sampled.any():
            return "greedy"
        is_filtered = (self._top_k < self.vocab_size) | (self._numbers["top_p"] < 1)
        filtered = self._top_k[is_sampled & is_filtered]
        if not len(filtered):
            return "plain"
        return "top_k" if filtered.max() <= MAX_CANDIDATES else "sort"

    def write(self, ints_4R: np.ndarray, floats_3R: np.ndarray) -> None:
        """Writes the rows as `SamplingTensors` holds them; what they leave over are greedy rows."""
        num_rows, numbers = len(self.rows), self._numbers
        positions = [row.position for row in self.rows]
        columns = (self._top_k, numbers["seed"], numbers["sample"], positions)
        for array, column in zip(ints_4R, columns, strict=True):
            array[:num_rows] = column
        for array, name in zip(floats_3R, ("temperature", "top_p", "min_p"), strict=True):
            array[:num_rows] = numbers[name]
        ints_4R[:, num_rows:] = np.array([[self.vocab_size], [0], [0], [0]])
        floats_3R[:, num_rows:] = np.array([[0.0], [1.0], [0.0]])


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
        return cls.from_batch(RowBatch(rows, vocab_size), len(rows), device, into)

    @classmethod
    def from_batch(
        cls,
        batch: RowBatch,
        num_rows: int,
        device: torch.device | str,
        into: Tensor | None = None,
    ) -> SamplingTensors:
        """The same of `num_rows` rows, of which those that the batch does not have are greedy."""
        device = torch.device(device)
        host = torch.zeros(
            cls.num_bytes(num_rows), dtype=torch.uint8, pin_memory=device.type == "cuda"
        )
        batch.write(*cls.arrays(host, num_rows))
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


# --- drawing -------------------------------------------------------------------------------------


def draw(
    logits_RV: Tensor,
    temperature_R: Tensor,
    top_k_R: Tensor,
    top_p_R: Tensor,
    min_p_R: Tensor,
    seed_R: Tensor,
    sample_R: Tensor,
    position_R: Tensor,
    mode: Mode,
) -> Tensor:
    """One token a row: int64 ids [R]. Parameters are those of `SamplingTensors`.

    Temperature, then min-p, top-k and top-p in vLLM's order, then an exponential race over the
    tokens left (argmax of log p - log E, E exponential: the same as drawing from p). Greedy rows
    take the largest logit, the lowest id of equal ones. All tokens as likely as the last one that a
    filter keeps are kept: the result does not depend on how a sort orders equal logits.

    `mode` says what the rows need, and more than they need gives the same tokens: "greedy" only for
    greedy rows alone, "plain" for rows without top-k and top-p, "top_k" where every row with top-k
    or top-p has top_k <= MAX_CANDIDATES, "sort" for all. A function of tensors only: torch.compile
    takes it with fullgraph=True and any R. A row with NaN gives some id of the vocabulary.
    """
    if mode in ("greedy", "plain") and draws_tokens(logits_RV):
        numbers = temperature_R, min_p_R, seed_R, sample_R, position_R
        return draw_tokens(logits_RV, *numbers, greedy=mode == "greedy")
    logits_RV = logits_RV.float()
    if mode == "greedy":
        return logits_RV.argmax(-1)
    is_greedy_R1 = temperature_R[:, None] == 0
    temperature_R1 = torch.where(is_greedy_R1, 1.0, temperature_R[:, None]).double()

    # float64 from here on: the logarithms of two devices, or of a vector loop and its scalar rest,
    # and the sums of two batch sizes differ in the last bit. In float32 that turns about one draw
    # in a million, here one in 10^15.
    peak_R1 = logits_RV.amax(-1, keepdim=True).double()
    scaled_RV = (logits_RV.double() - peak_R1) / temperature_R1

    # Each filter keeps the logits from some value on, so a row needs one number, and no mask and no
    # scatter back from sorted order. Thresholds are logits as they came, before the temperature:
    # comparing them is exact.
    threshold_R1 = peak_R1 + temperature_R1 * min_p_R[:, None].double().log()
    if mode != "plain":
        num_candidates = logits_RV.shape[1]
        if mode == "top_k":
            num_candidates = min(MAX_CANDIDATES, num_candidates)
            candidates_RC = logits_RV.topk(num_candidates, -1).values
        else:
            candidates_RC = logits_RV.sort(-1, descending=True).values

        top_k_R1 = top_k_R[:, None]
        kth_R1 = candidates_RC.gather(1, top_k_R1.clamp(max=num_candidates) - 1).double()
        kth_R1 = torch.where(top_k_R1 <= num_candidates, kth_R1, -math.inf)
        threshold_R1 = torch.maximum(threshold_R1, kth_R1)

        # Masses are relative to the likeliest token's. Top-p shares out what top-k left, equals of
        # the k-th logit included, which may lie beyond the candidates: the sum is the whole row's.
        mass_RV = torch.where(logits_RV >= threshold_R1, scaled_RV.exp(), 0.0)
        total_R1 = mass_RV.sum(-1, keepdim=True)
        is_left_RC = candidates_RC >= threshold_R1
        mass_RC = ((candidates_RC.double() - peak_R1) / temperature_R1).exp()
        mass_RC = torch.where(is_left_RC, mass_RC, 0.0)
        is_kept_RC = is_left_RC & (_sum_before(mass_RC) < top_p_R[:, None] * total_R1)
        last_kept_RC = torch.where(is_kept_RC, candidates_RC, math.inf)
        last_kept_R1 = last_kept_RC.amin(-1, keepdim=True).double()
        threshold_R1 = torch.where(top_p_R[:, None] < 1, last_kept_R1, threshold_R1)

    race_RV = scaled_RV - _exponential(logits_RV.shape[1], seed_R, sample_R, position_R).log()
    race_RV = torch.where(logits_RV >= threshold_R1, race_RV, -math.inf)
    return torch.where(is_greedy_R1, logits_RV.double(), race_RV).argmax(-1)


def _sum_before(x_RC: Tensor) -> Tensor:
    """The sum of a row's entries before each entry.

    In two levels, runs of 256 and then their totals: Inductor fails on a long scan (torch 2.11,
    CUDA, 151,936 entries).
    """
    num_entries = x_RC.shape[1]
    runs = pad(x_RC, (0, -num_entries % 256)).unflatten(1, (-1, 256))
    within = pad(runs.cumsum(-1), (1, 0))
    before = pad(within[..., -1].cumsum(-1)[:, :-1], (1, 0))
    return (before[..., None] + within[..., :-1]).flatten(1)[:, :num_entries]


def _exponential(vocab_size: int, seed_R: Tensor, sample_R: Tensor, position_R: Tensor) -> Tensor:
    """Exponential noise [R, V], float64, from a hash of (seed, sample, position, id).

    The uniform (bits + 1/2) / 2^32 is exact in float64 and neither 0 nor 1, so that E is neither 0
    nor inf.
    """
    key_R = _mix(_mix(_mix(seed_R + _GOLDEN) + sample_R + _GOLDEN) + position_R + _GOLDEN)
    bits_RV = _word_bits(vocab_size, key_R)
    return -torch.log1p(-(bits_RV.double() + 0.5) * 2.0**-32)


# The constants of both hashes; SplitMix64's as the signed numbers that int64 tensors take.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - 2**64
_MULTIPLIER_2 = 0x94D049BB133111EB - 2**64
_ROUNDS = ((17, 0xED5AD4BB), (11, 0xAC4C1B51), (15, 0x31848BAB))
_LOW_32 = 2**32 - 1


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finish (Steele, Lea, Flood, "Fast splittable pseudorandom number generators",
    2014): once a row, so that rows have keys of 64 unrelated bits."""
    x = (x ^ _logical_shift(x, 30)) * _MULTIPLIER_1
    x = (x ^ _logical_shift(x, 27)) * _MULTIPLIER_2
    return x ^ _logical_shift(x, 31)


def _word_bits(vocab_size: int, key_R: Tensor) -> Tensor:
    """32 random bits a word [R, V], as int64 of 0 to 2^32 - 1: a finish of 32 bits, ten
    instructions of a GPU, where one of 64 bits takes thirty.

    The rounds are those of triple32 (Wellons, "Prospecting for hash functions", 2018) in 32 bits.
    One half of the key turns the ids and is added at the end, the other is added after the first
    round. A row's words never share their bits, for each step can be undone. Without the last sum
    a word whose bits are small, so one that wins, would tell much of its neighbours'.
    """
    low_R1, high_R1 = (key_R & _LOW_32)[:, None], _logical_shift(key_R, 32)[:, None]
    # Ids are joined by xor: Inductor turns sums and products of an arange into index arithmetic,
    # which does not wrap at 64 bits (torch 2.13 on the CPU: other numbers, then memory corrupted).
    x_RV = low_R1 ^ torch.arange(vocab_size, device=key_R.device)
    for (shift, multiplier), added in zip(_ROUNDS, (high_R1, 0, low_R1), strict=True):
        x_RV = ((x_RV ^ (x_RV >> shift)) * multiplier + added) & _LOW_32
    return x_RV


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & (2 ** (64 - bits) - 1)


# --- before and after a draw ---------------------------------------------------------------------


def edit_logits(logits_RV: Tensor, rows: Sequence[Row]) -> Tensor:
    """The logits with each row's edits, as a new float32 tensor, in vLLM's order.

    Stop ids are ruled out below `min_tokens`, `logit_bias` is added, then the penalties: repetition
    over prompt and outputs (Keskar et al., "CTRL", 2019), frequency and presence over the outputs.
    Raises ValueError for a biased token outside the vocabulary.
    """
    edited_RV = logits_RV.to(torch.float32, copy=True)
    vocab_size, device = edited_RV.shape[1], edited_RV.device
    masked = [
        (r, token)
        for r, row in enumerate(rows)
        if row.masks_stop_ids
        for token in row.stop_ids
        if token < vocab_size  # a tokenizer may name an end that the model does not have
    ]
    if masked:
        places = _to_device(masked, torch.int64, device)
        # The value is made on the device: a number of the host would be copied, and waited for.
        edited_RV.index_put_(places.unbind(1), edited_RV.new_full((), -math.inf))

    biased = []
    for r, row in enumerate(rows):
        row.params.check_vocabulary(vocab_size)
        biased += [(r, int(token), value) for token, value in (row.params.logit_bias or {}).items()]
    if biased:
        places = _to_device([(r, token) for r, token, _ in biased], torch.int64, device)
        values = _to_device([value for _, _, value in biased], torch.float32, device)
        edited_RV.index_put_(places.unbind(1), values, accumulate=True)

    penalised = [r for r, row in enumerate(rows) if row.params.has_penalties]
    if penalised:
        index_P = _to_device(penalised, torch.int64, device)
        edited_RV[index_P] = _penalise(edited_RV[index_P], [rows[r] for r in penalised])
    return edited_RV


def _penalise(logits_PV: Tensor, rows: Sequence[Row]) -> Tensor:
    vocab_size, device = logits_PV.shape[1], logits_PV.device
    counts = [row.counts or TokenCounts(row.prompt_token_ids, vocab_size, device) for row in rows]
    for row, count in zip(rows, counts, strict=True):
        count.catch_up(row.output_token_ids)
    outputs_PV = torch.stack([count.outputs_V for count in counts])
    is_seen_PV = torch.stack([count.prompt_V for count in counts]) | (outputs_PV > 0)
    penalties = [
        (row.params.repetition_penalty, row.params.frequency_penalty, row.params.presence_penalty)
        for row in rows
    ]
    penalties_P3 = _to_device(penalties, torch.float32, device)
    repetition_P1, frequency_P1, presence_P1 = penalties_P3.split(1, dim=1)
    repeated_PV = torch.where(logits_PV > 0, logits_PV / repetition_P1, logits_PV * repetition_P1)
    logits_PV = torch.where(is_seen_PV, repeated_PV, logits_PV)
    return logits_PV - frequency_P1 * outputs_PV - presence_P1 * (outputs_PV > 0)


def top_logprobs(
    logits_RV: Tensor, tokens_R: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities of raw logits: of the chosen tokens and of the `k` likeliest.

    Returns chosen_R (float32), ranks_R (int64, 1 = likeliest; of equals the last one's, as in
    vLLM), top_Rk (float32, falling) and top_ids_Rk (int64). `k` may be 0, and -1 or anything above
    V is all of V.
    """
    logits_RV = logits_RV.float()
    vocab_size = logits_RV.shape[1]
    k = vocab_size if k < 0 else min(k, vocab_size)
    norm_R1 = logits_RV.logsumexp(-1, keepdim=True)
    chosen_R1 = logits_RV.gather(1, tokens_R[:, None])
    ranks_R = (logits_RV >= chosen_R1).sum(-1)
    top_Rk, top_ids_Rk = logits_RV.topk(k, -1)
    return (chosen_R1 - norm_R1)[:, 0], ranks_R, top_Rk - norm_R1, top_ids_Rk


def _to_device(values: Iterable[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copy numbers over without waiting for the device."""
    host = torch.tensor(list(values), dtype=dtype)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
