"""Which tokens of which sequences go into the next step. Plain data in, plain data out, no tensor.

A step first takes one token of every sequence that decodes, then chunks of prompts, oldest first,
until the token budget is spent. When blocks run out the youngest sequence gives its blocks back and
is computed again later.
"""

from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import NamedTuple

from minigen.cache import BlockPool

ROOT, LONG_ROOT = 0, -1  # keys computed with long rope's long factors are another prefix tree


@dataclass(eq=False, slots=True)
class Sequence:
    """One sample of a request: its tokens and what of them lies in the cache.

    `max_length` counts prompt and output tokens. A pending token is sampled but not yet read by
    the host.
    """

    tokens: list[int]
    max_length: int
    samples: bool = True  # False: only the prompt's log-probabilities are wanted
    use_prefix_cache: bool = True
    num_prompt: int = field(init=False)
    row: int = field(default=-1, init=False)  # the row of device state it owns while it runs
    arrival: int = field(default=-1, init=False)
    # Grows in place while the sequence runs, and is another list whenever it is admitted.
    blocks: list[int] = field(default_factory=list, init=False)
    nodes: list[int] = field(default_factory=list, init=False)
    num_computed: int = field(default=0, init=False)
    num_pending: int = field(default=0, init=False)
    # With fewer tokens computed nothing but the next one is due: no block, no end.
    next_due: int = field(default=0, init=False)
    num_cached: int | None = field(default=None, init=False)  # at the first admission
    long_rope: bool = field(default=False, init=False)
    finished: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.num_prompt = len(self.tokens)

    @property
    def length(self) -> int:
        return len(self.tokens) + self.num_pending

    @property
    def remaining(self) -> int:
        """Tokens that can be computed now."""
        if self.samples and self.length >= self.max_length:
            return 0  # the last token was sampled; nothing follows it
        return self.length - self.num_computed


class Chunk(NamedTuple):
    """Tokens [start, start + length) of a sequence; `samples`: the last one gives the next."""

    sequence: Sequence
    start: int
    length: int
    samples: bool


@dataclass(eq=False)
class Chunks:
    """A step: first the sequences that decode a token and draw the next, then chunks of prompts.

    Those that decode are columns: to make an object for each of them, and to take it apart again,
    is work at every step. Iterated over, all are `Chunk`s.

    Attributes:
        decodes, starts: the sequences, and where the token lies that each computes.
        tokens: that token; -1: it was sampled, but the host has not read it yet.
        prompts: chunks of prompts, and of sequences that are computed again, all tokens known.
        admitted: the sequences of `prompts` that got their row and blocks for this step.
        grown: those of `decodes` that got one more block for this step.
        sampled: the sequences that draw a token, in order.
        num_blocks: of the sequence that has most.
    """

    decodes: list[Sequence] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    prompts: list[Chunk] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    grown: list[Sequence] = field(default_factory=list)
    sampled: list[Sequence] = field(default_factory=list)
    num_blocks: int = 0

    def __len__(self) -> int:
        return len(self.decodes) + len(self.prompts)

    def __iter__(self) -> Iterator[Chunk]:
        for sequence, start in zip(self.decodes, self.starts, strict=True):
            yield Chunk(sequence, start, 1, True)
        yield from self.prompts

    @property
    def num_tokens(self) -> int:
        return len(self.decodes) + sum(chunk.length for chunk in self.prompts)


class Scheduler:
    """Owns the queue, the running set and the blocks.

    Args:
        pool: blocks; one sequence of `max_length` must fit into all of them.
        max_num_seqs: rows of device state, sequences that run at once.
        max_num_batched_tokens: token budget of a step.
        rope_switch: length above which a sequence is computed with long rope; 0 = never.
    """

    def __init__(
        self, pool: BlockPool, max_num_seqs: int, max_num_batched_tokens: int, rope_switch: int = 0
    ) -> None:
        if max_num_batched_tokens < max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens {max_num_batched_tokens} is below max_num_seqs "
                f"{max_num_seqs}: a step must hold a token of every running sequence"
            )
        self.pool = pool
        self.budget = max_num_batched_tokens
        self.rope_switch = rope_switch
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self.num_preemptions = 0
        self._rows = list(range(max_num_seqs - 1, -1, -1))
        self._arrivals = 0

    def add(self, sequence: Sequence) -> None:
        sequence.arrival, self._arrivals = self._arrivals, self._arrivals + 1
        self.waiting.append(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Takes a sequence out for good, wherever it is."""
        sequence.finished = True
        if sequence.row >= 0:
            self.running.remove(sequence)
            self._leave(sequence)
        else:
            self.waiting.remove(sequence)

    def reset(self) -> None:
        """After a failed step: every running sequence is computed again, no prefix is trusted."""
        for sequence in reversed(self.running):
            sequence.num_pending = 0
            self._requeue(sequence)
        self.running.clear()
        for sequence in self.waiting:
            sequence.num_pending = 0
        self.pool.forget()

    def schedule(self) -> Chunks:
        """The next step's chunks; none when nothing can run."""
        chunks = Chunks()
        prefilling: list[Sequence] = []
        # Every sequence that decodes goes through here at every step, nearly all the short way: 0.2
        # us each.
        decodes, starts, tokens = chunks.decodes, chunks.starts, chunks.tokens
        for sequence in list(self.running):
            start, num_pending = sequence.num_computed, sequence.num_pending
            if start < sequence.next_due:
                sequence.num_computed = start + 1
                sequence.num_pending = num_pending + 1
            elif sequence.row < 0:
                continue  # preempted by an older one
            elif start < sequence.num_prompt or sequence.length - start != 1:
                prefilling.append(sequence)
                continue
            elif not self._decode(sequence, chunks):
                continue
            decodes.append(sequence)
            starts.append(start)
            tokens.append(-1 if num_pending else sequence.tokens[start])
        budget = self.budget - len(decodes)
        for sequence in prefilling:
            if sequence.row < 0:
                continue
            if budget and (length := min(budget, sequence.remaining)):
                chunks.prompts.append(self._take(sequence, length))
                budget -= length
        while budget and self.waiting and self._admit(self.waiting[0]):
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            chunks.admitted.append(sequence)
            chunks.prompts.append(self._take(sequence, min(budget, sequence.remaining)))
            budget -= chunks.prompts[-1].length
        chunks.sampled = decodes + [chunk.sequence for chunk in chunks.prompts if chunk.samples]
        # One that decodes has just as many as it needs.
        most = self.pool.blocks_for(max(starts) + 1) if starts else 0
        chunks.num_blocks = max([most, *(len(c.sequence.blocks) for c in chunks.prompts)])
        return chunks

    def _decode(self, sequence: Sequence, chunks: Chunks) -> bool:
        """Sets the next token and does all that is due at it. False: it is not computed now."""
        size, num_pending = self.pool.block_size, sequence.num_pending
        length = sequence.num_computed + 1
        if length >= sequence.max_length:
            return False  # the last token was sampled; nothing follows it
        if 0 < self.rope_switch < length and not sequence.long_rope:
            self._restart_long(sequence)
            return False
        if length > len(sequence.blocks) * size:
            if not self._grow(sequence):
                return False
            chunks.grown.append(sequence)
        sequence.num_computed, sequence.num_pending = length, num_pending + 1
        due = min(len(sequence.blocks) * size, sequence.max_length - 1)
        if self.rope_switch and not sequence.long_rope:
            due = min(due, self.rope_switch)
        if sequence.use_prefix_cache and self.pool.enable_prefix_caching:
            self._register(sequence)
            # The host knows the tokens of the next block when those that are pending have come.
            due = min(due, (len(sequence.nodes) + 1) * size - 1 + num_pending)
        sequence.next_due = due
        return True

    def _take(self, sequence: Sequence, length: int) -> Chunk:
        start = sequence.num_computed
        num_known, end = len(sequence.tokens), start + length
        samples = sequence.samples and end == num_known + sequence.num_pending
        sequence.num_computed = end
        if min(end, num_known) // self.pool.block_size > len(sequence.nodes):
            self._register(sequence)
        sequence.num_pending += samples
        return Chunk(sequence, start, length, samples)

    def _register(self, sequence: Sequence) -> None:
        """Full blocks become findable as soon as their tokens are known and their step is set.

        A step writes a layer's keys before it attends, so sequences of one step may share, too.
        """
        if not (sequence.use_prefix_cache and self.pool.enable_prefix_caching):
            return
        size = self.pool.block_size
        known = min(sequence.num_computed, len(sequence.tokens)) // size
        for i in range(len(sequence.nodes), known):
            parent = sequence.nodes[-1] if sequence.nodes else self._root(sequence)
            tokens = sequence.tokens[i * size : (i + 1) * size]
            sequence.nodes.append(self.pool.register(sequence.blocks[i], parent, tokens))

    @staticmethod
    def _root(sequence: Sequence) -> int:
        return LONG_ROOT if sequence.long_rope else ROOT

    def _admit(self, sequence: Sequence) -> bool:
        """Gives a waiting sequence a row and the blocks of all its tokens, or leaves it."""
        if not self._rows or sequence.num_pending:
            return False
        sequence.long_rope = 0 < self.rope_switch < sequence.length
        if not self._allocate(sequence, spare=len(self.running)):
            return False
        sequence.row = self._rows.pop()
        if sequence.num_cached is None:
            sequence.num_cached = sequence.num_computed
        return True

    def _allocate(self, sequence: Sequence, spare: int) -> bool:
        pool = self.pool
        blocks: list[int] = []
        nodes: list[int] = []
        if sequence.use_prefix_cache:
            # The last token is never taken from the cache: its logits are what is wanted.
            known: Seq[int] = sequence.tokens[: sequence.length - 1]
            blocks, nodes = pool.match(known, self._root(sequence))
        pool.share(blocks)
        missing = pool.blocks_for(sequence.length) - len(blocks)
        # Blocks for what already runs stay free, or the newcomer would be preempted at once.
        if pool.num_available < missing + spare:
            pool.release(blocks)
            return False
        sequence.blocks = blocks + pool.allocate(missing)
        sequence.nodes = nodes
        sequence.num_computed = len(blocks) * pool.block_size
        return True

    def _grow(self, sequence: Sequence) -> bool:
        """Gives one more block, by preempting the youngest if need be. False: that was itself."""
        while not self.pool.num_available:
            victim = self.running.pop()
            self.num_preemptions += 1
            self._requeue(victim)
            if victim is sequence:
                return False
        sequence.blocks += self.pool.allocate(1)
        return True

    def _restart_long(self, sequence: Sequence) -> None:
        """All keys depend on the factors: the sequence starts over, with the long ones."""
        self.running.remove(sequence)
        self._requeue(sequence)

    def _requeue(self, sequence: Sequence) -> None:
        self._leave(sequence)
        sequence.num_computed = 0
        # The queue is ordered by arrival; those older than a sequence that ran are few.
        at = 0
        while at < len(self.waiting) and self.waiting[at].arrival < sequence.arrival:
            at += 1
        self.waiting.insert(at, sequence)

    def _leave(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        self._rows.append(sequence.row)
        sequence.blocks, sequence.nodes, sequence.row, sequence.next_due = [], [], -1, 0
