"""The memory of a step of a captured size: where its graph reads it, and where the host writes it.

Views are made once a size: made anew they were 75 of the host's 194 us at batch 1. Pinned memory is
allocated once for all sizes: CUDA can wait for the device in that, and a batch that dwindles meets
a new size every few steps.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minigen.sampling_rows import RowBatch, SamplingTensors
from minigen.scheduler import Chunks
from minigen.step import StepSize, StepWriter


@dataclass
class HostStep:
    """A step on the host, to be filled by `StepWriter.write` and `RowBatch.write`."""

    whole: Tensor  # all of it, uint8
    step: dict[str, np.ndarray]
    sampling: tuple[np.ndarray, np.ndarray]


class HostCopies:
    """Owns two pieces of host memory, which the steps of all sizes fill by turns.

    The host fills one while the device may still read the other, of the step before. An event says
    when a piece may be filled again; with a step in flight it has long passed, and after steps that
    failed it is what keeps a late copy whole.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._pinned = device, device.type == "cuda"
        self._num_bytes, self._turn = 0, 0
        self._pieces: list[Tensor] = []
        self._copied: list[torch.cuda.Event] = []

    def reserve(self, num_bytes: int) -> None:
        """From the next step on both pieces are at least so long."""
        self._num_bytes = max(self._num_bytes, num_bytes)

    def next(self) -> tuple[int, Tensor]:
        """The number of the piece whose turn it is, and the piece, free to be filled."""
        self._turn = 1 - self._turn
        if not self._pieces or len(self._pieces[0]) < self._num_bytes:
            self._allocate()
        elif self._pinned:
            self._copied[self._turn].synchronize()
        return self._turn, self._pieces[self._turn]

    def uploaded(self) -> None:
        """A copy of the last piece to the device has been launched."""
        if self._pinned:
            # By itself it would record the current device's stream, which need not be this one's.
            self._copied[self._turn].record(torch.cuda.current_stream(self._device))

    def _allocate(self) -> None:
        for event in self._copied:
            event.synchronize()
        self._pieces = [
            torch.zeros(self._num_bytes, dtype=torch.uint8, pin_memory=self._pinned)
            for _ in range(2)
        ]
        self._copied = [torch.cuda.Event() for _ in range(2)] if self._pinned else []


class StepBuffers:
    """Owns the bytes of a step and of its sampling on the device, and views of `hosts`.

    Attributes:
        step_bytes, sampling_bytes: on the device (uint8).
        step, sampling: views of them; `sampling` in the order of `SamplingTensors.tensors`.
    """

    def __init__(self, size: StepSize, device: torch.device, hosts: HostCopies) -> None:
        self._size, self._split, self._hosts = size, size.num_bytes, hosts
        num_bytes = self._split + SamplingTensors.num_bytes(size.num_rows)
        self._whole = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        hosts.reserve(num_bytes)
        self.step_bytes, self.sampling_bytes = (
            self._whole[: self._split],
            self._whole[self._split :],
        )
        self.step = size.views(self.step_bytes)
        self.sampling = SamplingTensors.views(self.sampling_bytes, size.num_rows)
        self._views: list[HostStep | None] = [None, None]

    def host(self) -> HostStep:
        """The copy whose turn it is, free to be filled."""
        turn, piece = self._hosts.next()
        host = self._views[turn]
        if host is None or host.whole.data_ptr() != piece.data_ptr():
            whole = piece[: len(self._whole)]
            host = self._views[turn] = HostStep(
                whole,
                self._size.arrays(whole[: self._split]),
                SamplingTensors.arrays(whole[self._split :], self._size.num_rows),
            )
        return host

    def write(self, chunks: Chunks, batch: RowBatch, writer: StepWriter) -> None:
        """Fills a copy with a step and sends it to the device; the host does not wait."""
        host = self.host()
        positions_R = writer.write(host.step, chunks, self._size)
        batch.write(*host.sampling, positions_R)
        self.upload(host)

    def upload(self, host: HostStep) -> None:
        """Copies it to the device; the host does not wait."""
        self._whole.copy_(host.whole, non_blocking=True)
        self._hosts.uploaded()
