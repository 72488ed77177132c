"""Programmatic dependent launch: a kernel begins while the one before it still runs (sm_90).

Sound under two conditions. Every program of a kernel so launched calls `wait_for_predecessor`, and
before that neither reads what a kernel since the last ordinary launch has written nor writes
anything: because each waits for the whole of the one before, behind its wait all are done. And what
is read before the wait (weights, tables, the step's positions) was written before that last
ordinary launch.
"""

import functools
from typing import Any

import torch

from minigen.kernels.triton_import import tl, triton


@functools.cache
def has_dependent_launch(device: torch.device) -> bool:
    """Whether this GPU can: sm_90 and later (AMD's numbers are others)."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return is_nvidia and torch.cuda.get_device_capability(device) >= (9, 0)


def launch_options(pdl: bool) -> dict[str, Any]:
    """Of a launch whose kernel is compiled with PDL=pdl."""
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}


@triton.jit
def wait_for_predecessor():
    """Lets the next kernel begin, and waits until the one before has ended and written all."""
    # At the first moment: the next kernel's programs take no place from this one's, for they start
    # only once all of these have.
    tl.extra.cuda.gdc_launch_dependents()  # pyright: ignore[reportAttributeAccessIssue]
    tl.extra.cuda.gdc_wait()  # pyright: ignore[reportAttributeAccessIssue]
