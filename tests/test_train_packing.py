"""Packing: which samples stand in which micro-batch of which step."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigen.flops import step_flops
from minigen.model import DecoderConfig
from minigen.packing import LOOKAHEAD, deal, epoch_order, pack, plan, stream
from minigen.shapes import SHAPES

BUDGET = 32
LLAMA_1B = SHAPES["llama-3.2-1b"]
lengths_of = st.lists(st.integers(2, BUDGET), min_size=1, max_size=80).map(np.array)


def cost(lengths: np.ndarray) -> np.ndarray:
    return 10.0 * lengths + lengths**2


@given(lengths=lengths_of, batches=st.integers(1, 4))
def test_every_sample_once_and_none_over_budget(lengths, batches) -> None:
    groups = list(pack(iter(range(len(lengths))), lengths, cost(lengths), BUDGET, batches))
    found = [sample for group in groups for batch in group for sample in batch]
    assert sorted(found) == list(range(len(lengths)))
    for group in groups:
        assert len(group) <= batches
        assert all(lengths[batch].sum() <= BUDGET for batch in group)


@given(seed=st.integers(0, 9), batches=st.integers(1, 3))
def test_no_more_is_read_ahead_than_is_looked_at(seed, batches) -> None:
    """The queue does not grow with the run: time would grow with its square."""
    lengths = np.random.default_rng(seed).integers(2, BUDGET, 4000)
    read = 0

    def ids():
        nonlocal read
        for read in range(1, len(lengths) + 1):
            yield read - 1

    taken = 0
    for group in pack(ids(), lengths, cost(lengths), BUDGET, batches):
        # Besides what is looked at, one group's samples, of two tokens at least.
        assert read - taken <= LOOKAHEAD + batches * BUDGET // 2 + 1
        taken += sum(map(len, group))
    assert taken == len(lengths)


@given(
    lengths=lengths_of,
    ranks=st.integers(1, 3),
    accumulate=st.integers(1, 3),
    epochs=st.sampled_from([1.0, 2.0, 2.5]),
)
def test_plan_gives_every_rank_as_many_batches(lengths, ranks, accumulate, epochs) -> None:
    ids = [np.arange(len(lengths))]
    steps = plan(
        stream(ids, [1.0], epochs, 0),
        lengths,
        cost(lengths),
        budget=BUDGET,
        accumulate=accumulate,
        ranks=ranks,
    )
    for step in steps:
        assert len(step) == ranks
        assert len({len(batches) for batches in step}) == 1
        assert all(0 < len(batches) <= accumulate + 1 for batches in step)
        assert all(batch and lengths[batch].sum() <= BUDGET for rank in step for batch in rank)
    found = Counter(sample for step in steps for rank in step for batch in rank for sample in batch)
    wanted = Counter(stream(ids, [1.0], epochs, 0))
    assert found <= wanted
    assert (wanted - found).total() < ranks


def test_order_is_about_kept_and_batches_are_full() -> None:
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(4.0, 1.0, 5000)).astype(int).clip(2, 1024)
    groups = list(pack(iter(range(len(lengths))), lengths, cost(lengths), 4096, 2))
    fill = [lengths[batch].sum() / 4096 for group in groups[:-5] for batch in group]
    assert np.mean(fill) > 0.98
    middles = [np.mean([s for batch in group for s in batch]) for group in groups[:-5]]
    assert np.corrcoef(middles, np.arange(len(middles)))[0, 1] > 0.99


def test_ranks_get_equal_work() -> None:
    """Long samples cost more than their tokens: 1B parameters, up to 4,096 tokens."""
    config = DecoderConfig.from_hf(LLAMA_1B)
    rng = np.random.default_rng(1)
    lengths = np.where(rng.random(8000) < 0.03, 4096, rng.integers(8, 200, 8000))
    costs = step_flops(config, lengths, lengths - 1)
    assert (
        costs[lengths == 4096][0] / 4096 / (costs[lengths < 200] / lengths[lengths < 200]).max()
        > 1.1
    )
    steps = plan(iter(range(8000)), lengths, costs, budget=32768, accumulate=1, ranks=2)
    spread = [
        max(work) / np.mean(work)
        for step in steps[:-2]
        for work in [[sum(costs[batch].sum() for batch in rank) for rank in step]]
    ]
    assert len(spread) > 15
    assert np.mean(spread) < 1.005
    assert max(spread) < 1.02


def test_gaps_are_filled_unless_the_others_would_wait() -> None:
    lengths = np.array([8, 6, 7, 2, 2, 2])
    first = next(pack(iter(range(6)), lengths, lengths**2, 10, 2))
    assert first == [[0], [1, 3, 4]]
    (alone, *_) = pack(iter(range(6)), lengths, lengths**2, 10, 1)
    assert alone == [[0, 3]]


def test_dealing_goes_there_and_back() -> None:
    group = [[0], [1], [2], [3]]
    assert deal(group, np.array([1.0, 4.0, 2.0, 3.0]), 2) == [[[1], [0]], [[3], [2]]]


def test_two_ranks_do_what_one_does_in_two_steps() -> None:
    lengths = np.random.default_rng(2).integers(2, 20, 200)

    def of(ranks: int, accumulate: int) -> list[list[list[int]]]:
        steps = plan(
            iter(range(200)),
            lengths,
            cost(lengths),
            budget=64,
            accumulate=accumulate,
            ranks=ranks,
        )
        return [sorted(batch for rank in step for batch in rank) for step in steps]

    two, one = of(2, 1), of(1, 2)
    assert two[:-1] == one[:-1]
    last = [sorted(sample for batch in steps[-1] for sample in batch) for steps in (two, one)]
    assert last[0] == last[1]


@pytest.mark.parametrize("weight", [0.25, 1.0, 1.5, 3.0])
def test_weight_is_how_often_an_epoch_takes_a_sample(weight) -> None:
    ids = [np.arange(8), np.arange(8, 20)]
    epochs = [epoch_order(ids, [1.0, weight], epoch, 5) for epoch in range(4)]
    for order in epochs:
        counts = Counter(order.tolist())
        assert all(counts[i] == 1 for i in range(8))
        rest = [counts[i] for i in range(8, 20)]
        assert sum(rest) == 12 * weight
        assert max(rest) - min(rest) <= 1
    # Over whole laps of the file every sample is taken equally often.
    total = Counter(np.concatenate(epochs).tolist())
    assert len({total[i] for i in range(8, 20)}) == 1
    assert epochs[0].tolist() != epochs[1].tolist()
    again = epoch_order(ids, [1.0, weight], 0, 5)
    assert again.tolist() == epochs[0].tolist()
    assert epoch_order(ids, [1.0, weight], 0, 6).tolist() != again.tolist()


def test_flops_are_six_a_weight_and_attention_over_visible_pairs() -> None:
    config = DecoderConfig.from_hf(LLAMA_1B)
    lengths = np.array([1, 7, 100])
    weights = 16 * (2048 * 64 * (2 * 32 + 2 * 8) + 3 * 2048 * 8192)
    heads = 16 * 32 * 64
    for length, flops in zip(lengths, step_flops(config, lengths, 0 * lengths), strict=True):
        pairs = sum(i + 1 for i in range(length))
        assert flops == 6 * weights * length + 3 * 4 * heads * pairs
    flops = step_flops(config, lengths, np.array([0, 0, 5])) - step_flops(
        config, lengths, 0 * lengths
    )
    assert flops.tolist() == [0, 0, 6 * 5 * 2048 * 128256]
    windowed = DecoderConfig.from_hf({**LLAMA_1B, "model_type": "mistral", "sliding_window": 8})
    pairs = sum(min(i + 1, 8) for i in range(100))
    (flops,) = step_flops(windowed, np.array([100]), np.array([0]))
    assert flops == 6 * weights * 100 + 3 * 4 * heads * pairs
