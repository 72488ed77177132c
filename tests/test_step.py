"""A step's flat arrays, against a loop over tokens."""

import random

import torch
from hypothesis import given
from hypothesis import strategies as st

from minigen.buffers import HostCopies, StepBuffers
from minigen.cache import BlockPool
from minigen.sampling_params import SamplingParams
from minigen.sampling_rows import Row, RowBatch
from minigen.scheduler import Chunks, Scheduler, Sequence
from minigen.step import StepSize, StepTensors, StepWriter

NUM_ROWS, BLOCK_SIZE, MOST_BLOCKS, LONG = 4, 2, 16, 100


def expected(chunks: Chunks, size: StepSize) -> dict[str, list]:
    """The oracle: token by token, then null ones."""
    found: dict[str, list] = {
        name: [] for name in ("tokens_T", "token_rows_T", "positions_T", "slots_T")
    }
    last, rows, offsets, kv_lens, table = [], [], [0], [], []
    for sequence, start, length, samples in chunks:
        for at in range(start, start + length):
            known = at < len(sequence.tokens)
            found["tokens_T"].append(sequence.tokens[at] if known else -1)
            found["token_rows_T"].append(sequence.row)
            found["positions_T"].append(at + LONG * sequence.long_rope)
            block = sequence.blocks[at // BLOCK_SIZE]
            found["slots_T"].append(block * BLOCK_SIZE + at % BLOCK_SIZE)
        offsets.append(len(found["tokens_T"]))
        kv_lens.append(start + length)
        table.append(sequence.blocks + [0] * (size.width - len(sequence.blocks)))
        if samples:
            last.append(offsets[-1] - 1)
            rows.append(sequence.row)
    for name, null in (("tokens_T", 0), ("token_rows_T", NUM_ROWS), ("positions_T", 0)):
        found[name] += [null] * (size.num_tokens - len(found[name]))
    found["slots_T"] += [-1] * (size.num_tokens - len(found["slots_T"]))
    for _ in range(size.num_seqs - len(chunks)):
        offsets.append(min(offsets[-1] + 1, size.num_tokens))
        kv_lens.append(0)
        table.append([0] * size.width)
    offsets[-1] = size.num_tokens
    return {
        **found,
        "last_R": last + [0] * (size.num_rows - len(last)),
        "rows_R": rows + [NUM_ROWS] * (size.num_rows - len(rows)),
        "cu_seqlens_S1": offsets,
        "kv_lens_S": kv_lens,
        "block_table_SW": table,
    }


def written(
    chunks: Chunks, writer: StepWriter, buffers: StepBuffers | None, size: StepSize
) -> tuple[StepTensors, list[int]]:
    """A step in kept buffers, or in bytes that were not empty; and the positions of its draws."""
    if buffers is None:
        whole = torch.full((size.num_bytes,), 77, dtype=torch.uint8)
        positions_R = writer.write(size.arrays(whole), chunks, size)
        return size.views(whole), positions_R.tolist()
    params = SamplingParams()
    rows = [Row(params, i, 0, 0, (), ()) for i in range(len(chunks.sampled))]
    buffers.write(chunks, RowBatch(rows, vocab_size=5), writer)
    *_, seed_R, _, position_R = buffers.sampling
    assert seed_R[: len(rows)].tolist() == list(range(len(rows)))
    return buffers.step, position_R[: len(rows)].tolist()


@given(st.integers(0, 2**32), st.booleans(), st.integers(0, 3), st.booleans())
def test_a_written_step_is_the_schedulers(
    seed: int, overlap: bool, padding: int, keep: bool
) -> None:
    """Sequences grow, are preempted, end, and leave their rows to others."""
    rng = random.Random(seed)
    scheduler = Scheduler(BlockPool(MOST_BLOCKS, BLOCK_SIZE), NUM_ROWS, 9, rope_switch=12)
    writer = StepWriter(NUM_ROWS, MOST_BLOCKS, BLOCK_SIZE, spare_row=NUM_ROWS, long_rope_row=LONG)
    in_flight: list[Chunks] = []
    hosts = HostCopies(torch.device("cpu"))
    kept: dict[StepSize, StepBuffers] = {}  # with what the steps before left in them
    for _ in range(40):
        if rng.random() < 0.5 and len(scheduler.waiting) < 3:
            prompt = [rng.randrange(3) for _ in range(rng.randint(1, 10))]
            scheduler.add(Sequence(prompt, len(prompt) + rng.randint(1, 12)))
        if rng.random() < 0.1 and scheduler.running:
            scheduler.finish(rng.choice(scheduler.running))
        chunks = scheduler.schedule()
        if chunks:
            least = StepSize.of(chunks)
            size = StepSize(
                least.num_tokens + padding, least.num_seqs + padding, least.num_rows + padding,
                least.width * (1 + padding),
            )  # fmt: skip
            if keep and size not in kept:
                kept[size] = StepBuffers(size, torch.device("cpu"), hosts)
            step, positions = written(chunks, writer, kept.get(size), size)
            for name, values in expected(chunks, size).items():
                assert getattr(step, name).tolist() == values, name
            assert positions == [start + length for _, start, length, draws in chunks if draws]
        in_flight.append(chunks)
        while len(in_flight) > overlap:
            for chunk in in_flight.pop(0):
                sequence = chunk.sequence
                if chunk.samples and not sequence.finished:
                    sequence.num_pending -= 1
                    sequence.tokens.append(rng.randrange(3))
                    if len(sequence.tokens) == sequence.max_length:
                        scheduler.finish(sequence)


def test_steps_of_all_sizes_fill_two_pieces_by_turns() -> None:
    """A step's bytes stay as they are while the next one, of another size, is written."""
    cpu = torch.device("cpu")
    hosts = HostCopies(cpu)
    sizes = [StepSize(2, 2, 2, 64), StepSize(40, 9, 9, 64), StepSize(2, 2, 2, 64)]
    small, large, _ = buffers = [StepBuffers(size, cpu, hosts) for size in sizes]
    for round_ in range(3):
        first, second = small.host(), large.host()
        first.step["tokens_T"][:], second.step["tokens_T"][:] = round_ + 1, -round_ - 1
        small.upload(first)
        large.upload(second)
        assert small.step.tokens_T.tolist() == [round_ + 1] * 2
        assert large.step.tokens_T.tolist() == [-round_ - 1] * 40
        assert first.whole.data_ptr() != second.whole.data_ptr()
    pieces = {buffer.host().whole.data_ptr() for buffer in buffers}
    assert len(pieces) == 2
    hosts.reserve(1 << 20)  # a larger size appears while others are known
    for token in (7, 8):  # each of the two, of which `small` has seen one before
        host = small.host()
        host.step["tokens_T"][:] = token
        small.upload(host)
        assert small.step.tokens_T.tolist() == [token] * 2
        assert host.whole.data_ptr() not in pieces


class Serving:
    """A scheduler and the steps in flight, driven by numbers that another one may be given, too."""

    def __init__(self, caching: bool, rope_switch: int) -> None:
        self.pool = BlockPool(MOST_BLOCKS, BLOCK_SIZE, caching)
        self.scheduler = Scheduler(self.pool, NUM_ROWS, 9, rope_switch)
        self.added: list[Sequence] = []
        self.in_flight: list[Chunks] = []

    def step(self, rng: random.Random, overlap: bool) -> tuple[object, ...]:
        """A few things that may happen, and what is then scheduled and kept."""
        if rng.random() < 0.5 and len(self.scheduler.waiting) < 3:
            prompt = [rng.randrange(3) for _ in range(rng.randint(1, 10))]
            draws, cached = rng.random() < 0.8, rng.random() < 0.8
            most = len(prompt) + draws * rng.randint(1, 12)
            self.added.append(Sequence(prompt, most, draws, use_prefix_cache=cached))
            self.scheduler.add(self.added[-1])
        chunks = self.scheduler.schedule()
        self.in_flight.append(chunks)
        while len(self.in_flight) > overlap:
            for sequence, start, length, draws in self.in_flight.pop(0):
                end = start + length == sequence.max_length
                if draws and not sequence.finished:
                    sequence.num_pending -= 1
                    sequence.tokens.append(rng.randrange(3))
                    end = len(sequence.tokens) == sequence.max_length
                if end and not sequence.finished:
                    self.scheduler.finish(sequence)
        places = [(self.added.index(chunk.sequence), *chunk[1:]) for chunk in chunks]
        blocks = [sequence.blocks for sequence in self.added]
        return places, blocks, self.pool.num_cached, self.scheduler.num_preemptions


@given(st.integers(0, 2**32), st.booleans(), st.booleans(), st.sampled_from([0, 12, 13]))
def test_nothing_is_due_where_a_sequence_only_goes_on(
    seed: int, overlap: bool, caching: bool, rope_switch: int
) -> None:
    """Steps are those of a scheduler that looks at all that may be due at every token."""
    rng = random.Random(seed)
    short, long = (Serving(caching, rope_switch) for _ in range(2))
    for _ in range(40):
        happens = rng.random()
        for sequence in long.scheduler.running:
            sequence.next_due = 0
        found, expected = (s.step(random.Random(happens), overlap) for s in (short, long))
        assert found == expected
