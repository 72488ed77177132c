"""Steps of fixed sizes, each captured once in a CUDA graph and replayed from then on.

A step launches some 400 kernels, and launching them from Python takes 20 ms where the weights of a
small model stream in 0.4 ms and 2,048 tokens of prompts take 6. A graph is launched as one. It
reads buffers that stay where they are; a step that is smaller than its graph is filled up with null
tokens, sequences and rows. Of a step that decodes all is captured, the draw included; of one with
prompts the hidden states, since the number of tokens says little about the number of draws.

Without a GPU the same buffers are filled and the step is called: tests need none.
"""

import bisect
import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from minigen.buffers import HostCopies, StepBuffers
from minigen.sampling_rows import SamplingTensors
from minigen.step import StepSize, StepTensors

HIDDEN = "hidden"  # in the place of a head: the hidden states [T, E] are what is wanted
# (step, sampling, head) -> what the step drew [R], its logits [R, V] or its hidden states
StepCall = Callable[[StepTensors, SamplingTensors | None, str], Tensor]
FIRST_WIDTH = 64  # blocks a sequence: 1,024 tokens in blocks of 16
WIDTH_STEP = 4  # from one width to the next
USUAL_WIDTH = 256  # what is captured at once, where the model's context is longer than that


class CaptureError(RuntimeError):
    """A step could not be captured; launched one by one its kernels may still run."""


def bucket_sizes(max_num_seqs: int, least: int = 2) -> list[int]:
    """Batch sizes that are captured: few small ones, then every eighth, then every 32nd.

    `least` is 1 or 2.
    """
    sizes = [1, 2, 4, 8, *range(16, 257, 8), *range(288, max_num_seqs + 32, 32)]
    most = max(least, max_num_seqs)
    return [size for size in sizes if least <= size < most] + [most]


def prompt_sizes(max_num_tokens: int) -> list[int]:
    """Numbers of tokens that are captured for steps with prompts: a third is padding at worst."""
    sizes = [64, 96]
    while sizes[-1] < max_num_tokens:
        sizes += [2 * sizes[-2], 2 * sizes[-1]]
    most = max(2, max_num_tokens)
    return [size for size in sizes if size < most] + [most]


def width_for(num_blocks: int) -> int:
    """Blocks a sequence that a graph's block table has room for.

    A kernel's grid follows from the width, and programs without keys cost little: steps of
    `WIDTH_STEP` keep the graphs few.
    """
    width = FIRST_WIDTH
    while width < num_blocks:
        width *= WIDTH_STEP
    return width


Captured = tuple[torch.cuda.CUDAGraph, Tensor]


class StepGraphs:
    """Owns the buffers and graphs of decode steps, by batch size, table width and head.

    Graphs share their memory but for results, which last: tokens are small, logits are not (the
    usual sizes' of a vocabulary of 151,936 are 2.6 GB together). So a head gives logits only where
    they are needed, and those graphs are not among the ones captured beforehand.

    Args:
        call: a step on tensors; it must not wait for the device.
        warm_up: launches each kernel that `call` does, perhaps less often.
        sampling_for: (number of rows, head, buffer) -> sampling of so many null rows, in it.
        write_null_step: fills a buffer on the device with a step that has only null rows.
        max_num_seqs, max_num_tokens: the largest step.
        max_num_blocks: blocks that a sequence may have.
        least_rows: of a step that decodes, 2 or 1. `call` is given two tokens at least, and where
            it shall draw one row only (`last_R`) it need not compute the second token.
    """

    def __init__(
        self,
        call: StepCall,
        warm_up: StepCall,
        sampling_for: Callable[[int, str, Tensor | None], SamplingTensors],
        write_null_step: Callable[[Tensor, StepSize], None],
        max_num_seqs: int,
        max_num_tokens: int,
        max_num_blocks: int,
        device: torch.device,
        least_rows: int = 2,
    ) -> None:
        self._call, self._warm_up = call, warm_up
        self._sampling_for, self._write_null_step = sampling_for, write_null_step
        self._device = device
        self.sizes = bucket_sizes(max_num_seqs, least_rows)
        self.prompt_sizes = prompt_sizes(max_num_tokens)
        # One more than there are: the null tokens of a step need a sequence. The few are a chat's.
        self._prompt_seqs = sorted({min(8, max_num_seqs + 1), max_num_seqs + 1})
        # A capture in the midst of serving stalls every request for about a tenth of a second, and
        # the longest sequence of a batch decides, so that no narrower graph would serve for long.
        self._usual_width = min(width_for(max_num_blocks), USUAL_WIDTH)
        self._hosts = HostCopies(device)
        self._buffers: dict[StepSize, StepBuffers] = {}
        self._graphs: dict[tuple[StepSize, str], Captured] = {}
        # Graphs share the memory of their pool only if all are captured on the same stream.
        cuda = device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if cuda else None
        self._stream = torch.cuda.Stream(device) if cuda else None

    def rows_for(self, num_rows: int) -> int:
        """The least of `sizes` that holds so many rows."""
        return self.sizes[bisect.bisect_left(self.sizes, num_rows)]

    def size_for(self, num_seqs: int, num_blocks: int) -> StepSize:
        """The least size that holds so many sequences of so many blocks each."""
        rows = self.rows_for(num_seqs)
        tokens = max(rows, 2)  # compiled functions know no step of one
        return StepSize(tokens, tokens, rows, max(width_for(num_blocks), self._usual_width))

    def prompt_size_for(self, num_tokens: int, num_seqs: int, num_blocks: int) -> StepSize:
        """The same for a step with prompts."""
        tokens = next(size for size in self.prompt_sizes if size >= num_tokens)
        seqs = next(size for size in self._prompt_seqs if size > num_seqs)
        return StepSize(tokens, seqs, seqs, max(width_for(num_blocks), self._usual_width))

    def capture_all(self, heads: Sequence[str]) -> Iterator[StepSize]:
        """Captures every size at the usual width, the largest first: they share memory."""
        for tokens in reversed(self.prompt_sizes):
            for seqs in reversed(self._prompt_seqs):
                size = self.prompt_size_for(tokens, seqs - 1, 1)
                self.buffers(size, HIDDEN)
                yield size
        for rows in reversed(self.sizes):
            size = self.size_for(rows, 1)
            for head in heads:
                self.buffers(size, head)
                yield size
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # what the warm-ups took on the captures' stream

    def num_usual(self, num_heads: int) -> int:
        """How many `capture_all` captures."""
        return len(self.prompt_sizes) * len(self._prompt_seqs) + len(self.sizes) * num_heads

    def buffers(self, size: StepSize, head: str) -> StepBuffers:
        """Where the step and its sampling lie, to be filled before `run`.

        A size and head that is new is captured here, on null rows: the calls that come before a
        capture would draw a real step's tokens twice. Raises CaptureError.
        """
        if size not in self._buffers:
            self._buffers[size] = StepBuffers(size, self._device, self._hosts)
        if self._device.type == "cuda" and (size, head) not in self._graphs:
            try:
                self._graphs[size, head] = self._capture(size, head)
            except RuntimeError as error:  # out of memory, or something no graph can hold
                raise CaptureError(str(error) or type(error).__name__) from error
        return self._buffers[size]

    def run(self, size: StepSize, sampling: SamplingTensors | None, head: str) -> Tensor:
        """Runs what the buffers hold; the result lasts until the next run, of any size."""
        if self._device.type != "cuda":
            return self._call(self._buffers[size].step, sampling, head)
        graph, result = self._graphs[size, head]
        graph.replay()
        return result

    def _capture(self, size: StepSize, head: str) -> Captured:
        buffers = self._buffers[size]
        self._write_null_step(buffers.step_bytes, size)
        sampling = None
        if head != HIDDEN:
            sampling = self._sampling_for(size.num_rows, head, buffers.sampling_bytes)
        step = buffers.step
        current, stream = torch.cuda.current_stream(self._device), self._stream
        assert stream is not None
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                # Loads kernels and gives libraries their memory, which no capture allows.
                self._warm_up(step, sampling, head)
                graph = torch.cuda.CUDAGraph()
                # Not `with torch.cuda.graph`, which waits for the device and gives all free memory
                # back before each capture, to be taken again by the next warm-up.
                # Of this thread: another one may compile meanwhile.
                graph.capture_begin(self._pool, capture_error_mode="thread_local")
                try:
                    result = self._call(step, sampling, head)
                except BaseException:
                    with contextlib.suppress(RuntimeError):
                        graph.capture_end()  # or the stream would go on to capture
                    raise
                graph.capture_end()
        finally:
            # After a failure, too: the buffers are then given up, and their memory to others while
            # the warm-up may still read its slots there.
            current.wait_stream(stream)
        return graph, result
