"""The memory of a step of a captured size: where its graph reads it, and twice on the host.

Views are made once a size: made anew they were 75 of the host's 194 us at batch 1.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minigen.sampling import SamplingTensors
from minigen.step import StepSize


@dataclass
class HostStep:
    """A step on the host, to be filled by `StepWriter.write` and `RowBatch.write`."""

    whole: Tensor  # all of it, uint8
    step: dict[str, np.ndarray]
    sampling: tuple[np.ndarray, np.ndarray]
    copied: torch.cuda.Event | None  # the device has read it


class StepBuffers:
    """Owns the bytes of a step and of its sampling, on the device and on the host.

    The host fills one of two copies while the device may still read the other one, of the step
    before. An event says when a copy may be filled again; with a step in flight it has long passed,
    and after steps that failed it is what keeps a late copy whole.

    Attributes:
        step_bytes, sampling_bytes: on the device (uint8).
        step, sampling: views of them; `sampling` in the order of `SamplingTensors.tensors`.
    """

    def __init__(self, size: StepSize, device: torch.device) -> None:
        self._size, self._split = size, size.num_bytes
        num_bytes = self._split + SamplingTensors.num_bytes(size.num_rows)
        self._whole = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self._pinned = device.type == "cuda"
        self.step_bytes, self.sampling_bytes = (
            self._whole[: self._split],
            self._whole[self._split :],
        )
        self.step = size.views(self.step_bytes)
        self.sampling = SamplingTensors.views(self.sampling_bytes, size.num_rows)
        self._hosts: list[HostStep] = []  # made when wanted: many sizes never are
        self._turn = 0

    def host(self) -> HostStep:
        """The copy whose turn it is, free to be filled."""
        if not self._hosts:
            self._hosts = [self._new_host() for _ in range(2)]
        self._turn = 1 - self._turn
        host = self._hosts[self._turn]
        if host.copied is not None:
            host.copied.synchronize()
        return host

    def upload(self, host: HostStep) -> None:
        """Copies it to the device; the host does not wait."""
        self._whole.copy_(host.whole, non_blocking=True)
        if host.copied is not None:
            host.copied.record()

    def _new_host(self) -> HostStep:
        whole = torch.zeros(len(self._whole), dtype=torch.uint8, pin_memory=self._pinned)
        return HostStep(
            whole,
            self._size.arrays(whole[: self._split]),
            SamplingTensors.arrays(whole[self._split :], self._size.num_rows),
            torch.cuda.Event() if self._pinned else None,
        )
