"""What a request may ask of sampling: vLLM's names and meanings, checked when it is made."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

GREEDY_BELOW = 1e-5  # vLLM's limit: a lower temperature is greedy


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
