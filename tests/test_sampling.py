"""Sampling: what is refused, what is drawn and how often, and that no neighbour changes a draw.

Shape suffixes: R rows to sample, V vocabulary.
"""

import dataclasses
import json
import math
import re
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.loop_body import LoopBody

from minigen import sampling
from minigen.sampling import draw, edit_logits, top_logprobs
from minigen.sampling_params import SamplingParams
from minigen.sampling_rows import MAX_CANDIDATES, Mode, Row, SamplingTensors, TokenCounts

CPU = torch.device("cpu")
MODES = ("plain", "top_k", "sort")


def make_row(params: SamplingParams, seed=0, sample=0, position=0, prompt=(), outputs=(), **more):
    return Row(params, seed, sample, position, prompt, outputs, **more)


def draw_rows(logits_RV: Tensor, rows: list[Row], mode: Mode | None = None) -> list[int]:
    tensors = SamplingTensors.from_rows(rows, logits_RV.shape[1], logits_RV.device)
    return draw(logits_RV, *tensors.tensors(), mode=mode or tensors.mode).tolist()


def draw_many(logits_V: Tensor, params: SamplingParams, count: int, seed=0, mode=None) -> list[int]:
    """Draws from the same logits at `count` positions."""
    rows = [make_row(params, seed, position=i) for i in range(count)]
    return draw_rows(logits_V.expand(count, -1), rows, mode)


# --- parameters ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("n", [1, 2, 100], [0, -1, 1.0, True, None, "2"]),
        ("temperature", [0, 0.0, 1e-6, 0.7, 2], [-0.1, math.nan, math.inf, True, None, "1"]),
        ("top_k", [-1, 0, 1, 10**6], [-2, 1.5, True, None]),
        ("top_p", [1e-9, 0.5, 1, 1.0], [0, 0.0, -0.1, 1.0001, math.nan, True, None]),
        ("min_p", [0, 0.0, 0.5, 1], [-0.1, 1.1, math.nan, True, None]),
        ("repetition_penalty", [0.01, 1, 1.3, 5.0], [0, -1.0, math.nan, math.inf, True, None]),
        ("presence_penalty", [-2, -2.0, 0, 2.0], [-2.1, 2.1, math.nan, True, None]),
        ("frequency_penalty", [-2, -2.0, 0, 2.0], [-2.1, 2.1, math.nan, True, None]),
        ("seed", [None, 0, -(2**63), 2**63 - 1], [2**63, -(2**63) - 1, 1.0, True, "1"]),
        ("max_tokens", [None, 1, 10**9], [0, -1, 1.5, True]),
        ("min_tokens", [0, 1, 16], [-1, 17, 1.5, True, None]),
        ("logprobs", [None, -1, 0, 5], [-2, 1.5, True]),
        ("prompt_logprobs", [None, -1, 0, 5], [-2, 1.5, False]),
        ("ignore_eos", [True, False], [0, 1, None, "yes"]),
        ("include_stop_str_in_output", [True, False], [0, None]),
        ("skip_special_tokens", [True, False], [1, None]),
        ("stop", [None, "a", [], ["a", "b"], ("a",)], ["", [""], ["a", 1], 3, b"a", {"a": 1}]),
        ("stop_token_ids", [None, [], [0, 7], (7,)], [[-1], [True], [1.0], 7, "7"]),
        (
            "logit_bias",
            [None, {}, {3: 1}, {"3": -100.0}, {3: 100}],
            [{3: 101}, {3: math.nan}, {3: True}, {-1: 0.0}, {True: 0.0}, {"a": 1.0}, [3], "3"],
        ),
    ],
)
def test_each_parameter_has_its_range(name, good, bad):
    for value in good:
        assert isinstance(SamplingParams(**{name: value}), SamplingParams)
    for value in bad:
        with pytest.raises(ValueError, match=rf"^{name} must [^\n]* not [^\n]*$") as error:
            SamplingParams(**{name: value})
        # The value is named; of a bias, the key or the value that is wrong.
        parts = [value]
        if name == "logit_bias" and isinstance(value, dict):
            parts = [*value.keys(), *value.values()]
        assert any(repr(part) in str(error.value) for part in parts)


def test_a_number_that_no_float_holds_is_refused():
    for name in ("temperature", "repetition_penalty", "top_p", "presence_penalty"):
        with pytest.raises(ValueError, match=rf"^{name} must be a finite number") as error:
            SamplingParams(**{name: 10**400})
        assert len(str(error.value)) < 200


def test_what_is_stored():
    params = SamplingParams(stop="END", stop_token_ids=(1, 2), logit_bias={"7": 1, "007": 2})
    assert (params.stop, params.stop_token_ids) == (["END"], [1, 2])
    assert params.logit_bias == {7: 2.0}
    assert (SamplingParams().stop, SamplingParams().stop_token_ids) == ([], [])
    given_list = ["a"]
    params = SamplingParams(stop=given_list)
    given_list.append("b")
    assert params.stop == ["a"]


def test_greedy_has_one_sample():
    with pytest.raises(ValueError, match="n must be 1 where temperature is 0"):
        SamplingParams(n=2, temperature=0)
    assert SamplingParams(temperature=9e-6).is_greedy
    assert not SamplingParams(temperature=1e-5).is_greedy
    # Greedy leaves the rest as it is: replacing the temperature brings it back.
    params = SamplingParams(temperature=0, top_p=0.5)
    assert dataclasses.replace(params, temperature=1.0).top_p == 0.5


def test_min_tokens_lies_below_max_tokens():
    with pytest.raises(ValueError, match="min_tokens must be at most max_tokens, which is 3, not"):
        SamplingParams(min_tokens=4, max_tokens=3)
    assert SamplingParams(min_tokens=400, max_tokens=None).min_tokens == 400


def test_parameters_survive_json():
    params = SamplingParams(
        n=2, stop="a", seed=3, logit_bias={4: -1.0}, stop_token_ids=[3], max_tokens=None
    )
    assert SamplingParams(**json.loads(json.dumps(dataclasses.asdict(params)))) == params
    assert dataclasses.replace(params, n=1).logit_bias == {4: -1.0}
    with pytest.raises(ValueError, match="top_p"):
        dataclasses.replace(params, top_p=2.0)


def test_bias_outside_the_vocabulary_is_refused():
    params = SamplingParams(logit_bias={10: 1.0})
    params.check_vocabulary(11)
    with pytest.raises(ValueError, match="names the token 10, and the model has the tokens 0 to 9"):
        params.check_vocabulary(10)
    with pytest.raises(ValueError, match="token 10"):
        edit_logits(torch.zeros(1, 10), [make_row(params)])


# --- the oracle: one row, in numbers of Python ---------------------------------------------------


def splitmix(x: int) -> int:
    """SplitMix64's finalizer."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def word_bits(key: int, token: int) -> int:
    """triple32's rounds, of a key in two halves."""
    high, low = divmod(key, 2**32)
    x = low ^ token
    x = ((x ^ (x >> 17)) * 0xED5AD4BB + high) % 2**32
    x = (x ^ (x >> 11)) * 0xAC4C1B51 % 2**32
    return ((x ^ (x >> 15)) * 0x31848BAB + low) % 2**32


def exponential(seed: int, sample: int, position: int, token: int) -> float:
    key = 0
    for part in (seed, sample, position):
        key = splitmix((key + part + 0x9E3779B97F4A7C15) % 2**64)
    return -math.log1p(-(word_bits(key, token) + 0.5) / 2**32)


def hugging_face_scores(logits_V: Tensor, params: SamplingParams) -> Tensor:
    """The filtered scores of a row as transformers' processors give them, in vLLM's order."""
    from transformers import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    ids: Any = torch.zeros(1, 1, dtype=torch.int64)
    scores: Any = TemperatureLogitsWarper(params.temperature)(ids, logits_V[None])
    if params.min_p > 0:
        scores = MinPLogitsWarper(params.min_p)(ids, scores)
    if params.top_k > 0:
        scores = TopKLogitsWarper(params.top_k)(ids, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(ids, scores)
    return scores[0]


def expected_token(scores_V: list[float], row: Row) -> int:
    race = [
        (score - math.log(exponential(row.seed, row.sample, row.position, token)), token)
        for token, score in enumerate(scores_V)
        if score > -math.inf
    ]
    return max(race)[1]


filters = st.builds(
    SamplingParams,
    temperature=st.floats(0.05, 3),
    top_k=st.sampled_from([0, -1, 1, 2, 5, 39, 40, 41, 1000]),
    top_p=st.sampled_from([1.0, 1e-6, 0.999]) | st.floats(0.01, 1),
    min_p=st.sampled_from([0.0, 0.0, 1.0]) | st.floats(0, 1),
)


def clear_of_the_edge(logits_V: Tensor, params: SamplingParams) -> bool:
    """Whether no filter cuts so near a token that the reference's float32 decides."""
    scores = logits_V.double() / params.temperature
    probs = scores.softmax(-1)
    near_min_p = (probs / probs.max() - params.min_p).abs() < 1e-5
    scores[probs < params.min_p * probs.max()] = -math.inf
    if params.top_k > 0:
        scores[scores < scores.sort(descending=True).values[: params.top_k][-1]] = -math.inf
    sums = scores.softmax(-1).sort(descending=True).values.cumsum(0)
    near_top_p = (sums - params.top_p).abs() < 1e-5
    return not ((params.min_p < 1 and near_min_p.any()) or (params.top_p < 1 and near_top_p.any()))


@settings(deadline=None)
@given(filters, st.integers(0, 2**31), st.integers(-(2**63), 2**63 - 1), st.integers(0, 3))
def test_draws_what_transformers_filters_leave(params, logits_seed, seed, sample):
    logits_V = torch.randn(40, generator=torch.Generator().manual_seed(logits_seed)) * 2
    assume(clear_of_the_edge(logits_V, params))
    scores_V = hugging_face_scores(logits_V, params).tolist()
    rows = [make_row(params, seed, sample, position) for position in range(24)]
    expected = [expected_token(scores_V, row) for row in rows]
    logits_RV = logits_V.expand(len(rows), -1)
    assert draw_rows(logits_RV, rows) == expected
    assert draw_rows(logits_RV, rows, "sort") == expected


@pytest.mark.parametrize("mode", ["top_k", "sort"])
def test_equals_of_the_last_kept_token_are_kept(mode):
    """vLLM keeps equals of the k-th logit; 300 draws miss a token of 1/5 once in 10^29 times."""
    probs_V = torch.tensor([0.1, 0.2, 0.2, 0.2, 0.3])
    drawn = draw_many(probs_V.log(), SamplingParams(top_k=2), 300, mode=mode)
    assert set(drawn) == {1, 2, 3, 4}
    drawn = draw_many(probs_V.log(), SamplingParams(top_k=5, top_p=0.4), 300, mode=mode)
    assert set(drawn) == {1, 2, 3, 4}
    # The equals count in the sum that top-p shares out: 0.3 of 0.9 is a third.
    drawn = draw_many(probs_V.log(), SamplingParams(top_k=2, top_p=0.32), 300, mode=mode)
    assert set(drawn) == {4}
    drawn = draw_many(probs_V.log(), SamplingParams(top_k=2, top_p=0.35), 300, mode=mode)
    assert set(drawn) == {1, 2, 3, 4}


@pytest.mark.parametrize("params", [SamplingParams(top_k=100), SamplingParams(top_k=5, top_p=0.9)])
def test_more_equals_than_candidates(params):
    logits_V = torch.zeros(3 * MAX_CANDIDATES)
    logits_V[0] = 3.0
    drawn = draw_many(logits_V, params, 500)
    assert drawn == draw_many(logits_V, params, 500, mode="sort")
    # 500 draws of about 384 tokens show the lowest and the highest quarter of them.
    assert min(set(drawn) - {0}) < 96
    assert max(drawn) >= 288


def test_rows_without_filters_draw_the_same_in_every_mode():
    """Nearly flat logits, no two of them equal: most draws lie beyond the top-k candidates."""
    logits_V = torch.linspace(0, 0.1, 3 * MAX_CANDIDATES)
    plain, top_k, full = (draw_many(logits_V, SamplingParams(), 100, mode=mode) for mode in MODES)
    assert plain == top_k == full
    assert sum(token < 2 * MAX_CANDIDATES for token in plain) > 50


bfloat16_rows = st.lists(
    st.tuples(
        st.builds(
            SamplingParams,
            temperature=st.sampled_from([0.0, 0.5, 1.0, 1.7]),
            top_k=st.sampled_from([0, 1, 3, 20, MAX_CANDIDATES, MAX_CANDIDATES + 1, 10**6]),
            top_p=st.sampled_from([0.3, 0.95, 1.0]),
            min_p=st.sampled_from([0.0, 0.1]),
        ),
        st.integers(-(2**63), 2**63 - 1),
        st.integers(0, 2),
        st.integers(0, 10**6),
    ),
    min_size=1,
    max_size=6,
)


@settings(deadline=None)
@given(bfloat16_rows, st.randoms(use_true_random=False), st.integers(0, 2**31))
def test_no_neighbour_changes_a_draw(rows, random, logits_seed):
    """A row alone, in any order and in any mode: the same token. Vocabulary of no round size."""
    rows = [make_row(*row) for row in rows]
    generator = torch.Generator().manual_seed(logits_seed)
    logits_RV = (torch.randn(len(rows), 1003, generator=generator) * 3).bfloat16()  # many equals
    together = draw_rows(logits_RV, rows)
    order = list(range(len(rows)))
    random.shuffle(order)
    assert draw_rows(logits_RV[order], [rows[r] for r in order]) == [together[r] for r in order]
    for r, row in enumerate(rows):
        assert draw_rows(logits_RV[r : r + 1], [row]) == [together[r]]
        assert draw_rows(logits_RV[r : r + 1], [row], "sort") == [together[r]]


@pytest.mark.parametrize("mode", [None, *MODES])
def test_greedy_takes_the_lowest_of_the_largest(mode):
    logits_RV = torch.tensor([[0.0, 2.0, 1.0, 2.0], [5.0, -1.0, 5.0, 5.0]])
    rows = [make_row(SamplingParams(temperature=0, top_k=3, min_p=0.5), seed=r) for r in range(2)]
    assert draw_rows(logits_RV, rows, mode) == [1, 0]


@pytest.mark.parametrize("mode", MODES)
def test_impossible_tokens_are_never_drawn(mode):
    logits_V = torch.full((300,), -math.inf)
    logits_V[[7, 200]] = torch.tensor([-1000.0, -1000.0])
    drawn = draw_many(logits_V, SamplingParams(temperature=2.0), 100, mode=mode)
    assert set(drawn) == {7, 200}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fill", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_stay_in_range_and_to_themselves(mode, fill, temperature):
    params = SamplingParams(temperature=temperature, top_k=4, top_p=0.9, min_p=0.1)
    generator = torch.Generator().manual_seed(0)
    logits_RV = torch.randn(3, 200, generator=generator)
    rows = [make_row(params, seed=r) for r in range(3)]
    healthy = draw_rows(logits_RV, rows, mode)
    for broken in (slice(None), slice(50, 60), slice(-1, None)):
        damaged_RV = logits_RV.clone()
        damaged_RV[1, broken] = fill
        drawn = draw_rows(damaged_RV, rows, mode)
        assert (drawn[0], drawn[2]) == (healthy[0], healthy[2])
        assert 0 <= drawn[1] < 200


@pytest.mark.parametrize("size", [1, 255, 256, 257, 1003])
def test_sums_before_each_entry(size):
    x_RC = torch.rand(2, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = [[sum(row[:i]) for i in range(size)] for row in x_RC.tolist()]
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(sampling._sum_before(x_RC), expected, rtol=1e-12, atol=0)


def rows_with_ties(size: int) -> Tensor:
    """Few distinct numbers; a row of -inf alone, one of NaN alone, one with some NaN."""
    generator = torch.Generator().manual_seed(size)
    x_RV = torch.randint(-3, 2, (7, size), generator=generator).float()
    x_RV[0], x_RV[1] = -math.inf, math.nan
    x_RV[2, torch.rand(size, generator=generator) < 0.01] = math.nan
    x_RV[3, -1] = x_RV[4, size // 2 :] = 5.0
    return x_RV


def lowest_of_largest(x_RV: Tensor) -> list[int]:
    rows = [[math.inf if math.isnan(x) else x for x in row] for row in x_RV.tolist()]
    return [row.index(max(row)) for row in rows]


# --- how often -----------------------------------------------------------------------------------


def chi_square_limit(cells: int) -> float:
    """What chi-square exceeds once in a million times (Laurent and Massart 2000, lemma 1)."""
    x = math.log(1e6)
    return cells - 1 + 2 * math.sqrt((cells - 1) * x) + 2 * x


def chi_square(counts: Tensor, probs: Tensor) -> float:
    expected = probs * counts.sum()
    assert expected.min() > 5
    return float(((counts - expected) ** 2 / expected).sum())


PROBS = torch.tensor([0.4, 0.01, 0.2, 0.05, 0.1, 0.2, 0.03, 0.01], dtype=torch.float64)
NUM_DRAWS = 20_000


def draws_along(keys: list[tuple[int, int, int]], probs_V: Tensor) -> Tensor:
    rows = [make_row(SamplingParams(), *key) for key in keys]
    logits_RV = probs_V.log().float().expand(len(rows), -1)
    return torch.tensor(draw_rows(logits_RV, rows))


@pytest.mark.parametrize(
    "key",
    [
        lambda i: (1, 0, i),
        lambda i: (1, i, 0),
        lambda i: (i, 0, 0),
        lambda i: (i << 44, 0, 0),
        lambda i: (i % 100, i // 100, i % 100),
    ],
    ids=["positions", "samples", "seeds", "high bits of seeds", "mixed"],
)
def test_tokens_come_as_often_as_they_should(key):
    """Also two neighbours in a row: pairs of draws are as frequent as independent ones."""
    drawn = draws_along([key(i) for i in range(NUM_DRAWS)], PROBS)
    counts = torch.bincount(drawn, minlength=len(PROBS))
    assert chi_square(counts, PROBS) < chi_square_limit(len(PROBS))
    few = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    drawn = draws_along([key(i) for i in range(NUM_DRAWS)], few)
    pairs = torch.bincount(drawn[:-1] * 3 + drawn[1:], minlength=9)
    # Pairs overlap: twice the limit covers the dependence of each on the next.
    assert chi_square(pairs, torch.outer(few, few).flatten()) < 2 * chi_square_limit(9)


def test_no_vocabulary_id_is_preferred():
    """Ids one by one, and by their lowest and highest bits, in uniform draws."""
    size, count = 256, 16_384
    drawn = torch.tensor(draw_many(torch.zeros(size), SamplingParams(), count, seed=5))
    uniform = torch.full((size,), 1 / size, dtype=torch.float64)
    counts = torch.bincount(drawn, minlength=size)
    assert chi_square(counts, uniform) < chi_square_limit(size)
    for groups in (counts.view(2, -1).sum(1), counts.view(-1, 2).sum(0)):
        half = torch.full((2,), 0.5, dtype=torch.float64)
        assert chi_square(groups, half) < chi_square_limit(2)


def test_noise_is_positive_and_finite_at_its_ends(monkeypatch):
    zero = torch.zeros(1, dtype=torch.int64)
    for bits, expected in ((0, 2.0**-33), (2**32 - 1, 33 * math.log(2))):
        monkeypatch.setattr(
            sampling, "_word_bits", lambda size, key_R, bits=bits: torch.full((1, size), bits)
        )
        noise = sampling._exponential(3, zero, zero, zero)
        torch.testing.assert_close(noise, torch.full((1, 3), expected, dtype=torch.float64))


def bits_of(size: int, seeds: Tensor, samples: Tensor, positions: Tensor) -> Tensor:
    """The noise's bits [R, V]."""
    noise_RV = sampling._exponential(size, seeds, samples, positions)
    return (-torch.expm1(-noise_RV) * 2.0**32 - 0.5).round().long()


def random_keys(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator)


def uniform_chi_square(cell: Tensor, num_cells: int) -> float:
    counts = torch.bincount(cell.flatten(), minlength=num_cells)
    return chi_square(counts, torch.full((num_cells,), 1 / num_cells, dtype=torch.float64))


def test_bits_of_words_are_uniform_and_distinct():
    """Each byte of them, over the words of a row and over rows; no two words of a row share all."""
    position_R = torch.arange(8)
    bits_RV = bits_of(65_536, torch.full((8,), 3), torch.zeros_like(position_R), position_R)
    assert all(len(row.unique()) == len(row) for row in bits_RV)
    for shift in (24, 16, 8, 0):
        assert uniform_chi_square((bits_RV >> shift) & 255, 256) < chi_square_limit(256)


@pytest.mark.parametrize("name", ["word", "position", "sample", "seed"])
def test_neighbours_bits_tell_nothing_of_each_other(name):
    """Pairs fill 16 x 16 cells alike, by their highest bits and by their sizes: a word wins with
    bits near 0. Also of words that differ in one bit of their ids, wherever it is."""
    key_R = random_keys(800, 1)
    zero_R = torch.zeros_like(key_R)
    pairs = []
    if name == "word":
        ids_V = torch.arange(2**10)
        bits_RV = bits_of(2**10, key_R, zero_R, zero_R)
        for d in (1, 2, 3, 5, 7, 64, 512, 1023):
            first_V = ids_V[ids_V < ids_V ^ d]  # each pair once
            pairs.append((bits_RV[:, first_V], bits_RV[:, first_V ^ d]))
        far_RV = sampling._word_bits(2**16 + 1024, key_R[:400])
        for bit in range(10, 17):
            pairs.append((far_RV[:, :1024], far_RV[:, 2**bit : 2**bit + 1024]))
    else:
        at = ["seed", "sample", "position"].index(name)
        numbers = [key_R, zero_R, zero_R]
        bits_RV = bits_of(256, *numbers)
        for step in (1, 2, 1 << 31, 1 << 32):
            other = list(numbers)
            other[at] = other[at] + step
            pairs.append((bits_RV, bits_of(256, *other)))
    for a, b in pairs:
        cell = (a >> 28) * 16 + (b >> 28)
        assert uniform_chi_square(cell, 256) < chi_square_limit(256)
        sizes = [(32 - (x + 1).double().log2().ceil()).clamp(max=7).long() for x in (a, b)]
        probs = torch.tensor([2.0 ** -min(i + 1, 7) for i in range(8)], dtype=torch.float64)
        counts = torch.bincount((sizes[0] * 8 + sizes[1]).flatten(), minlength=64)
        assert chi_square(counts, torch.outer(probs, probs).flatten()) < chi_square_limit(64)


def keys_that_give(bits_R: Tensor, low_R: Tensor) -> Tensor:
    """Keys with these low halves whose word 0 has these bits: the rounds undone."""

    def unshift(x_R: Tensor, shift: int) -> Tensor:
        result_R = x_R
        for _ in range(32 // shift):
            result_R = x_R ^ (result_R >> shift)
        return result_R

    x_R = (bits_R - low_R) % 2**32
    for shift, multiplier in ((15, 0x31848BAB), (11, 0xAC4C1B51)):
        x_R = unshift(x_R * pow(multiplier, -1, 2**32) % 2**32, shift)
    high_R = (x_R - (low_R ^ (low_R >> 17)) * 0xED5AD4BB) % 2**32
    return (high_R << 32) | low_R


def test_a_word_that_wins_tells_nothing_of_its_neighbours():
    """Bits below 2^8, which win any race, beside those of words that differ in one bit or two."""
    generator = torch.Generator().manual_seed(6)
    small_R = torch.randint(0, 2**8, (16_384,), generator=generator)
    low_R = torch.randint(0, 2**32, (16_384,), generator=generator)
    bits_RV = sampling._word_bits(1025, keys_that_give(small_R, low_R))
    assert torch.equal(bits_RV[:, 0], small_R)
    for word in (1, 2, 3, 4, 5, 8, 64, 65, 1024):
        assert uniform_chi_square(bits_RV[:, word] >> 24, 256) < chi_square_limit(256)


def test_a_bit_of_any_number_turns_half_of_the_bits():
    """Avalanche: each bit of seed, sample, position and id turns each of the 26 highest bits of the
    noise in half of 4,096 rows. The six below move u by less than 2^-26."""
    key_R, (count,) = random_keys(4_096, 2), (4_096,)
    numbers = [key_R, random_keys(count, 3), random_keys(count, 4)]
    shifts = torch.arange(6, 32)

    def bits(numbers: list[Tensor], words: list[int]) -> Tensor:
        return bits_of(max(words) + 1, *numbers)[:, words]

    plain_RW = bits(numbers, [5, 5 ^ 1, 5 ^ 2, 5 ^ 8, 5 ^ 64])
    turned = [plain_RW[:, :1] ^ plain_RW[:, w : w + 1] for w in range(1, 5)]
    for at in range(3):
        for bit in (0, 1, 17, 31, 32, 47, 62):
            other = list(numbers)
            other[at] = other[at] ^ (1 << bit)
            turned.append(plain_RW[:, :1] ^ bits(other, [5]))
    share = ((torch.cat(turned, 1)[..., None] >> shifts) & 1).double().mean(0)
    # Six standard deviations of 4,096 draws; there are 650 shares.
    assert float((share - 0.5).abs().max()) < 6 * 0.5 / math.sqrt(count)


# --- tensors of a step ---------------------------------------------------------------------------


def test_tensors_of_a_step():
    rows = [
        make_row(SamplingParams(temperature=0), seed=2**64 - 1, sample=0, position=3),
        make_row(SamplingParams(temperature=0.5, top_k=7, min_p=0.25), -5, 2, 2**40),
        make_row(SamplingParams(top_k=-1, top_p=0.5), 2**63, 1, 9),
        make_row(SamplingParams(top_k=10**9), 2**63 - 1, 1, 0),
        make_row(SamplingParams(), 0, 0, 1),
    ]
    tensors = SamplingTensors.from_rows(rows, 1000, "cpu")
    assert tensors.temperature_R.tolist() == [0.0, 0.5, 1.0, 1.0, 1.0]
    assert tensors.top_k_R.tolist() == [1000, 7, 1000, 1000, 1000]
    assert tensors.top_p_R.tolist() == [1.0, 1.0, 0.5, 1.0, 1.0]
    assert tensors.min_p_R.tolist() == [0.0, 0.25, 0.0, 0.0, 0.0]
    assert tensors.seed_R.tolist() == [-1, -5, -(2**63), 2**63 - 1, 0]
    assert tensors.sample_R.tolist() == [0, 2, 1, 1, 0]
    assert tensors.position_R.tolist() == [3, 2**40, 9, 0, 1]
    f, i = torch.float32, torch.int64
    assert [t.dtype for t in tensors.tensors()] == [f, i, f, f, i, i, i]
    base = tensors.temperature_R.untyped_storage().data_ptr()
    assert {t.untyped_storage().data_ptr() for t in tensors.tensors()} == {base}  # one copy
    assert all((t.data_ptr() - base) % 16 == 0 for t in tensors.tensors())


@pytest.mark.parametrize(
    ("changes", "mode"),
    [
        ([{"temperature": 0}, {"temperature": 0, "top_p": 0.5}], "greedy"),
        ([{}, {"temperature": 0, "top_p": 0.5}], "plain"),
        ([{"min_p": 0.5}], "plain"),
        ([{"top_k": 10**6}], "plain"),
        ([{"top_k": MAX_CANDIDATES, "top_p": 0.5}, {}], "top_k"),
        ([{"top_k": MAX_CANDIDATES + 1}, {}], "sort"),
        ([{"top_k": 5}, {"top_p": 0.9}], "sort"),
    ],
)
def test_cheapest_mode(changes, mode):
    rows = [make_row(SamplingParams(**change)) for change in changes]
    tensors = SamplingTensors.from_rows(rows, 1000, "cpu")
    assert tensors.mode == mode
    assert tensors.needs_sort == (mode in ("top_k", "sort"))


# --- edits of the logits -------------------------------------------------------------------------


token_lists = st.lists(st.integers(0, 19), max_size=12)
edit_rows = st.lists(
    st.builds(
        make_row,
        st.builds(
            SamplingParams,
            repetition_penalty=st.sampled_from([1.0, 0.5, 1.7]),
            presence_penalty=st.sampled_from([0.0, -1.5, 2.0]),
            frequency_penalty=st.sampled_from([0.0, -0.5, 0.25]),
            logit_bias=st.none() | st.dictionaries(st.integers(0, 19), st.floats(-100, 100)),
            min_tokens=st.integers(0, 8),
        ),
        prompt=token_lists,
        outputs=token_lists,
        stop_ids=st.frozensets(st.integers(0, 25), max_size=3),
    ),
    min_size=1,
    max_size=5,
)


def edited_row(logits_V: Tensor, row: Row) -> list[float]:
    """The definition of each edit, one token at a time, in double precision."""
    params, logits = row.params, logits_V.tolist()
    for token in range(len(logits)):
        if token in row.stop_ids and len(row.output_token_ids) < params.min_tokens:
            logits[token] = -math.inf
        logits[token] += dict(params.logit_bias or {}).get(token, 0.0)
        count = list(row.output_token_ids).count(token)
        if count or token in row.prompt_token_ids:
            factor = params.repetition_penalty
            logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
        logits[token] -= params.frequency_penalty * count
        logits[token] -= params.presence_penalty * (count > 0)
    return logits


@settings(deadline=None)
@given(edit_rows, st.integers(0, 2**31), st.sampled_from([torch.float32, torch.bfloat16]))
def test_edits_are_what_they_are_defined_as(rows, logits_seed, dtype):
    generator = torch.Generator().manual_seed(logits_seed)
    logits_RV = (torch.randn(len(rows), 20, generator=generator) * 4).to(dtype)
    before_RV = logits_RV.clone()
    expected = torch.tensor([edited_row(x, row) for x, row in zip(logits_RV, rows, strict=True)])
    # Five roundings of numbers up to 200: 5 * 2^-24 * 200.
    torch.testing.assert_close(edit_logits(logits_RV, rows), expected, rtol=0, atol=6e-5)
    assert torch.equal(logits_RV, before_RV)  # the raw logits are for the log-probabilities
    needed = not torch.equal(expected, logits_RV.float())
    assert SamplingTensors.from_rows(rows, 20, "cpu").needs_edits >= needed


def test_repetition_penalty_is_transformers():
    from transformers import RepetitionPenaltyLogitsProcessor

    logits_RV = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    ids = [3, 3, 9, 40, 9]
    penalise: Any = RepetitionPenaltyLogitsProcessor(1.3)
    expected = penalise(torch.tensor([ids]), logits_RV.clone())
    row = make_row(SamplingParams(repetition_penalty=1.3), prompt=ids[:2], outputs=ids[2:])
    torch.testing.assert_close(edit_logits(logits_RV, [row]), expected, rtol=1e-6, atol=0)


@settings(deadline=None)
@given(token_lists, token_lists)
def test_counts_kept_between_steps_are_those_of_the_ids(prompt, outputs):
    params = SamplingParams(repetition_penalty=1.5, frequency_penalty=0.5, presence_penalty=0.5)
    logits_RV = torch.randn(1, 20, generator=torch.Generator().manual_seed(0))
    counts = TokenCounts(prompt, 20, CPU)
    for step in range(len(outputs) + 1):
        made_anew = make_row(params, prompt=prompt, outputs=outputs[:step])
        kept = dataclasses.replace(made_anew, counts=counts)
        assert torch.equal(edit_logits(logits_RV, [kept]), edit_logits(logits_RV, [made_anew]))
        if step == len(outputs):
            break
        # Told of a token as a number, as a tensor, or not at all: then it reads the row's ids.
        if step % 3 == 0:
            counts.append(outputs[step])
        elif step % 3 == 1:
            counts.append(torch.tensor(outputs[step]))


def test_min_tokens_end_with_the_last_of_them():
    params = SamplingParams(min_tokens=2, temperature=0)
    logits_RV = torch.tensor([[0.0, 1.0, 5.0, 9.0]])
    for outputs, expected in (((), 1), ((1,), 1), ((1, 1), 3)):
        row = make_row(params, outputs=outputs, stop_ids=frozenset({2, 3, 4000}))
        assert row.needs_edits == (expected == 1)
        assert draw_rows(edit_logits(logits_RV, [row]), [row]) == [expected]


# --- log-probabilities ---------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, 1, 5, 30, 100, -1])
def test_top_logprobs(k):
    logits_RV = torch.randn(4, 30, generator=torch.Generator().manual_seed(1)) * 5
    tokens_R = torch.tensor([0, 29, 7, int(logits_RV[3].argmax())])
    chosen_R, ranks_R, top_Rk, top_ids_Rk = top_logprobs(logits_RV, tokens_R, k)
    logprobs_RV = logits_RV.double().log_softmax(-1)
    # Two roundings of numbers up to 64: 2 * 2^-24 * 64.
    close = {"rtol": 0, "atol": 8e-6, "check_dtype": False}
    torch.testing.assert_close(chosen_R, logprobs_RV[range(4), tokens_R], **close)
    width = {-1: 30, 100: 30}.get(k, k)
    assert top_Rk.shape == top_ids_Rk.shape == (4, width)
    assert chosen_R.dtype == top_Rk.dtype == torch.float32
    torch.testing.assert_close(top_Rk, logprobs_RV.sort(descending=True).values[:, :width], **close)
    torch.testing.assert_close(top_Rk, logprobs_RV.gather(1, top_ids_Rk), **close)
    by_rank = logits_RV.sort(descending=True).indices
    assert [by_rank[r, rank - 1] for r, rank in enumerate(ranks_R.tolist())] == tokens_R.tolist()
    assert ranks_R[3] == 1


def test_ranks_of_equals_are_the_last_ones():
    _, ranks_R, _, _ = top_logprobs(torch.tensor([[1.0, 2.0, 2.0]] * 3), torch.tensor([0, 1, 2]), 0)
    assert ranks_R.tolist() == [3, 2, 2]


# --- compiled, and on a GPU ----------------------------------------------------------------------


MIXED = [
    {"temperature": 0},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    {"min_p": 0.1},
    {"temperature": 1.5},
]
WITH_TOP_P = [*MIXED, {"top_p": 0.9}, {"top_k": 200}]


def batch(num_rows: int, changes: list[dict], vocab_size: int, device: torch.device):
    rows = [
        make_row(SamplingParams(**changes[r % len(changes)]), 3 * r - 7, r % 3, 11 * r)
        for r in range(num_rows)
    ]
    generator = torch.Generator().manual_seed(num_rows)
    logits_RV = torch.randn(num_rows, vocab_size, generator=generator) * 3
    tensors = SamplingTensors.from_rows(rows, vocab_size, device)
    return logits_RV.to(device), tensors.tensors()


def compiled_like_eager(
    mode: Mode, changes: list[dict], vocab_size: int, device: torch.device
) -> None:
    """One compilation takes every number of rows, and draws what eager on the CPU draws."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(draw, fullgraph=True, backend=counter)
    for num_rows in (5, 2, 3, 16, 33):
        logits_RV, tensors = batch(num_rows, changes, vocab_size, device)
        for tensor in (logits_RV, *tensors):
            torch._dynamo.mark_dynamic(tensor, 0, min=2, max=1024)
        drawn_R = compiled(logits_RV, *tensors, mode=mode)
        logits_RV, tensors = batch(num_rows, changes, vocab_size, CPU)
        assert drawn_R.tolist() == draw(logits_RV, *tensors, mode=mode).tolist()
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("mode", "changes"),
    [("greedy", MIXED[:1]), ("plain", MIXED[::2]), ("top_k", MIXED), ("sort", WITH_TOP_P)],
)
def test_compiled_draw_is_the_eager_one(mode, changes, monkeypatch):
    made = LoopBody.__init__
    operations = []

    def count(self, *args, **options):
        made(self, *args, **options)
        operations.append(len(self.root_block.graph.nodes))

    monkeypatch.setattr(LoopBody, "__init__", count)
    compiled_like_eager(mode, changes, 1003, CPU)
    # 1,044 to 1,254, or none where a cache has the code. 24,000 take 25 s more of Python.
    assert sum(operations) < 5000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(
    ("mode", "changes"), [("plain", MIXED[::2]), ("top_k", MIXED), ("sort", WITH_TOP_P)]
)
def test_gpu_draws_what_the_cpu_draws(mode, changes):
    gpu = torch.device("cuda")
    compiled_like_eager(mode, changes, 151_936, gpu)  # Qwen3's vocabulary
    logits_RV, tensors = batch(64, changes, 50_257, CPU)
    expected = draw(logits_RV, *tensors, mode=mode)
    logits_RV, tensors = batch(64, changes, 50_257, gpu)
    assert torch.equal(draw(logits_RV, *tensors, mode=mode).cpu(), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("size", [1000, 1025, 151_936])
def test_gpu_takes_the_lowest_of_the_largest(size):
    x_RV = rows_with_ties(size)
    rows = [make_row(SamplingParams(temperature=0.0)) for _ in x_RV]
    tensors = SamplingTensors.from_rows(rows, size, torch.device("cuda"))
    for function in (draw, torch.compile(draw, fullgraph=True)):
        drawn_R = function(x_RV.cuda(), *tensors.tensors(), mode="greedy").tolist()
        assert drawn_R[0] == 0
        assert 0 <= min(drawn_R[1:3]) <= max(drawn_R[1:3]) < size  # rows with NaN
        assert drawn_R[3:] == lowest_of_largest(x_RV)[3:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_gpu_edits_do_not_wait_for_the_host():
    params = SamplingParams(
        repetition_penalty=1.3, presence_penalty=0.5, logit_bias={3: 2.0}, min_tokens=5
    )
    row = make_row(params, prompt=[1, 2, 3], outputs=[4, 4, 19], stop_ids=frozenset({7}))
    logits_RV = torch.randn(2, 20, generator=torch.Generator().manual_seed(0))
    expected = edit_logits(logits_RV, [row, row])
    logits_RV = logits_RV.cuda()
    counts = TokenCounts([1, 2, 3], 20, "cuda", [4])
    row = dataclasses.replace(row, counts=counts)
    torch.cuda.set_sync_debug_mode("error")
    try:
        counts.append(torch.full((), 4, device="cuda"))
        counts.append(19)
        edited_RV = edit_logits(logits_RV, [row, row])
        tensors = SamplingTensors.from_rows([row, row], 20, "cuda")
        drawn_R = draw(edited_RV, *tensors.tensors(), mode="sort")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(edited_RV.cpu(), expected)
    assert drawn_R.tolist() == draw_rows(expected, [row, row])


def test_sentences_name_what_is_right():
    with pytest.raises(ValueError, match=re.escape("top_p must be a finite number above 0 and")):
        SamplingParams(top_p=0)
    with pytest.raises(ValueError, match="top_k must be a whole number of -1 or more"):
        SamplingParams(top_k=-7)
    with pytest.raises(ValueError, match="temperature must be a finite number of 0 or more, not"):
        SamplingParams(temperature=-1)
