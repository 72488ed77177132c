"""The paged cache's blocks: which are free, which are in use, which hold a prefix worth keeping.

Plain data, no tensor. A block is a number in [0, num_blocks); its keys and values lie in the same
place of every layer's cache. Prefixes are a tree: a full block's key is (node of the block before
it, its tokens), looked up whole, so that no hash collision can hand out another prompt's cache.
"""

from collections import OrderedDict, deque
from collections.abc import Sequence

Key = tuple[int, tuple[int, ...]]


class BlockPool:
    """Gives out blocks, shares full ones by reference count, evicts the least recently used.

    Every block is in one of three states: free, used (reference count > 0) or cached (unused, but
    a registered prefix that a later request may take up again).
    """

    def __init__(
        self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True
    ) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._free = deque(range(num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest use first
        self._references = [0] * num_blocks
        self._nodes: dict[Key, tuple[int, int]] = {}  # key -> (node, block)
        self._key_of: dict[int, Key] = {}  # registered block -> key
        self._next_node = 1  # 0 and below are roots

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` could give out now."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_available

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def match(self, tokens: Sequence[int], root: int = 0) -> tuple[list[int], list[int]]:
        """The longest registered prefix -> (its blocks, its nodes). Takes no reference."""
        blocks: list[int] = []
        nodes: list[int] = []
        size, node = self.block_size, root
        if self.enable_prefix_caching:
            for start in range(0, len(tokens) - size + 1, size):
                found = self._nodes.get((node, tuple(tokens[start : start + size])))
                if found is None:
                    break
                node, block = found
                nodes.append(node)
                blocks.append(block)
        return blocks, nodes

    def share(self, blocks: Sequence[int]) -> None:
        """Takes a reference to each block."""
        for block in blocks:
            if self._references[block] == 0:
                del self._cached[block]
            self._references[block] += 1

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one reference each; the caller has checked `num_available`."""
        blocks = []
        for _ in range(count):
            if self._free:
                block = self._free.popleft()
            else:
                block, _ = self._cached.popitem(last=False)
                del self._nodes[self._key_of.pop(block)]
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def register(self, block: int, parent: int, tokens: Sequence[int]) -> int:
        """Makes a full block findable -> its node. A prefix that is known keeps its block."""
        key = (parent, tuple(tokens))
        known = self._nodes.get(key)
        if known is not None:
            return known[0]
        node, self._next_node = self._next_node, self._next_node + 1
        self._nodes[key] = (node, block)
        self._key_of[block] = key
        return node

    def release(self, blocks: Sequence[int]) -> None:
        """Gives references back. Last blocks first, so that a prefix is evicted from its end."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._key_of:
                    self._cached[block] = None
                else:
                    self._free.append(block)

    def forget(self) -> None:
        """Drops every registered prefix (after a failed step nobody knows what the cache holds)."""
        self._nodes.clear()
        self._key_of.clear()
        self._free.extend(self._cached)
        self._cached.clear()
