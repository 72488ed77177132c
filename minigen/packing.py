"""Which samples make up each micro-batch of a whole run; plain data in, plain data out.

A run is a fixed list of steps, made from the lengths of the samples and a seed before it begins:
its length is known to the schedule, and a run that goes on needs no more than its step's number.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

Array = np.ndarray
# Samples ahead of the queue among which the best fit for what is left of a batch is looked for.
LOOKAHEAD = 256

MicroBatch = list[int]  # ids of samples
Step = list[list[MicroBatch]]  # [rank][micro-step]


def epoch_order(
    ids_of_files: Sequence[Array], weights: Sequence[float], epoch: int, seed: int
) -> Array:
    """The ids of one epoch in random order; file f gives `weights[f]` times its samples.

    Each file is an endless row of shuffles of itself, of which an epoch takes the next part, so
    that after 1 / weight epochs every sample was taken equally often.
    """
    parts = []
    for file, (ids, weight) in enumerate(zip(ids_of_files, weights, strict=True)):
        begin, end = (int(e * weight * len(ids)) for e in (epoch, epoch + 1))
        for lap in range(begin // max(len(ids), 1), -(-end // max(len(ids), 1))):
            shuffled = np.random.default_rng((seed, 1, file, lap)).permutation(ids)
            first = lap * len(ids)
            parts.append(shuffled[max(begin - first, 0) : end - first])
    order = np.concatenate(parts) if parts else np.empty(0, np.int64)
    return np.random.default_rng((seed, 0, epoch)).permutation(order)


def stream(
    ids_of_files: Sequence[Array], weights: Sequence[float], epochs: float | None, seed: int
) -> Iterator[int]:
    """The ids of that many epochs, or of endlessly many; a last part of an epoch is its start."""
    for epoch in itertools.count():
        share = 1.0 if epochs is None else min(epochs - epoch, 1.0)
        if share <= 0:
            return
        order = epoch_order(ids_of_files, weights, epoch, seed)
        yield from order[: round(share * len(order))].tolist()


def pack(
    ids: Iterator[int], lengths: Array, costs: Array, budget: int, num_batches: int
) -> Iterator[list[MicroBatch]]:
    """Groups of `num_batches` micro-batches of at most `budget` tokens and of about equal cost.

    Samples stay in the order of `ids`, but for those that fill what a batch has left. Longest
    processing time first (Graham, 1969) spreads a group's samples; where one has no room left, it
    waits for the next group. The last group has as few batches as its samples need, and may have
    some more if the samples do not fit so.

    Args:
        lengths, costs: of every sample, by id; no length may be above `budget`.
    """
    queue: list[int] = []
    while True:
        wanted = num_batches * budget
        ends = np.cumsum(lengths[queue]) if queue else np.empty(0, np.int64)
        tokens = int(ends[-1]) if queue else 0
        # What an earlier group left counts, too, or the queue would grow from group to group.
        spare = int((ends > wanted).sum())
        while spare < LOOKAHEAD and (sample := next(ids, None)) is not None:
            queue.append(sample)
            tokens += int(lengths[sample])
            spare += tokens > wanted
        if not queue:
            return
        count = num_batches if tokens > wanted else -(-tokens // budget)
        group, queue = _fill(queue, lengths, costs, budget, count)
        yield group


def _fill(
    queue: list[int], lengths: Array, costs: Array, budget: int, num_batches: int
) -> tuple[list[MicroBatch], list[int]]:
    """(the batches, what is left of the queue)."""
    taken = int(np.searchsorted(np.cumsum(lengths[queue]), num_batches * budget, side="right"))
    batches: list[MicroBatch] = [[] for _ in range(num_batches)]
    room, cost = np.full(num_batches, budget), np.zeros(num_batches)
    # Positions in the queue, since a sample may stand in it twice.
    placed: set[int] = set()
    for position in sorted(range(taken), key=lambda position: -costs[queue[position]]):
        sample = queue[position]
        fits = np.flatnonzero(room >= lengths[sample])
        if len(fits):
            at = fits[np.argmin(cost[fits])]
            batches[at].append(sample)
            room[at] -= lengths[sample]
            cost[at] += costs[sample]
            placed.add(position)
    queue = [sample for position, sample in enumerate(queue) if position not in placed]
    ahead = lengths[queue[:LOOKAHEAD]].copy() if queue else np.empty(0, np.int64)
    used: set[int] = set()
    # Without padding a gap costs nothing, but the others would wait for a batch that is dearer.
    limit = cost.max() if num_batches > 1 else np.inf
    for at in np.argsort(cost, kind="stable"):
        while True:
            fitting = np.where(ahead <= room[at], ahead, 0)
            if not len(fitting) or fitting.max() == 0:
                break
            best = int(np.argmax(fitting))
            if cost[at] + costs[queue[best]] > limit:
                break
            cost[at] += costs[queue[best]]
            batches[at].append(queue[best])
            room[at] -= ahead[best]
            ahead[best] = budget + 1
            used.add(best)
    return batches, [sample for i, sample in enumerate(queue) if i not in used]


def deal(group: list[MicroBatch], costs: Array, ranks: int) -> Step:
    """A group's batches over ranks: costliest first, there and back, so that the sums agree."""
    by_cost = sorted(group, key=lambda batch: -float(costs[batch].sum()))
    step: Step = [[] for _ in range(ranks)]
    for row, start in enumerate(range(0, len(by_cost), ranks)):
        batches = by_cost[start : start + ranks]
        for rank, batch in zip(range(ranks), batches[:: -1 if row % 2 else 1], strict=True):
            step[rank].append(batch)
    return step


def plan(
    ids: Iterator[int],
    lengths: Array,
    costs: Array,
    *,
    budget: int,
    accumulate: int,
    ranks: int,
    max_steps: int | None = None,
) -> list[Step]:
    """All steps of a run, every rank with equally many micro-batches in each.

    A last step that is not full has fewer micro-batches; the up to `ranks - 1` samples that cannot
    give every rank one are left out.
    """
    steps: list[Step] = []
    for group in pack(ids, lengths, costs, budget, accumulate * ranks):
        if max_steps is not None and len(steps) == max_steps:
            break
        group = [batch for batch in group if batch]
        while len(group) % ranks:
            largest = max(group, key=len)
            if len(largest) < 2:
                group = group[: len(group) // ranks * ranks]
                break
            group.remove(largest)
            group += [largest[::2], largest[1::2]]
        if group:
            steps.append(deal(group, costs, ranks))
    return steps
