"""`python -m minigen train`: pre-training and fine-tuning, from scratch or from a checkpoint.

This file owns the command: what its options rule out, its processes, and the device of each.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import logging
import os
import sys
from collections.abc import Iterator
from typing import NoReturn

import torch
import torch.distributed as dist

from minigen.trainer import Ranks
from minigen.training_log import check_matplotlib
from minigen.training_run import Run

# The first process reads and tokenizes for all; the others wait that long.
WAIT = datetime.timedelta(hours=6)


def run(args: argparse.Namespace) -> int:
    """The command; raises ValueError (as CheckpointError) or OSError for what it cannot use."""
    if (args.model is None) == (args.config is None):
        raise ValueError("give either --model (a checkpoint) or --config (for random weights)")
    if args.steps is not None and args.epochs is not None:
        raise ValueError("give either --steps or --epochs")
    if args.plot:
        check_matplotlib()
    if args.nproc_per_node and "LOCAL_RANK" not in os.environ:
        return _launch(args)
    # torch 2.13 warns its own jagged tensors about a rename; a user can do nothing about it.
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    with _join(args.device) as (ranks, device):
        code = Run(args, ranks, device).train()
    return code if ranks.world == 1 else _leave(code)


# --- processes -----------------------------------------------------------------------------------


def _launch(args: argparse.Namespace) -> int:
    """Becomes torchrun, which starts this command once a process.

    What can be checked is checked before, the data too: each process would refuse it, and torchrun
    then shows a traceback of its own.
    """
    device = _device(args.device)
    if device.type == "cuda":
        _check_gpu(args.nproc_per_node - 1)
    Run(args, Ranks(0, args.nproc_per_node), device).prepare()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    count = ["--nproc-per-node", str(args.nproc_per_node)]
    command = [*launcher, *count, "-m", "minigen", *args.argv]
    os.execv(command[0], command)


@contextlib.contextmanager
def _join(device: str) -> Iterator[tuple[Ranks, torch.device]]:
    """The processes that torchrun started, or this one alone, and this one's device."""
    world = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
    found = _device(device)
    if world == 1:
        yield Ranks(), found
        return
    local = int(os.environ["LOCAL_RANK"])
    if found.type == "cuda":
        _check_gpu(local)
        found = torch.device("cuda", local)
        torch.cuda.set_device(found)
    dist.init_process_group(
        "nccl" if found.type == "cuda" else "gloo",
        timeout=WAIT,
        device_id=found if found.type == "cuda" else None,
    )
    try:
        yield Ranks(dist.get_rank(), world), found
    finally:
        dist.destroy_process_group()


def _check_gpu(local: int) -> None:
    """Raises ValueError where process `local` of this machine has no GPU for itself."""
    count = torch.cuda.device_count()
    if local >= count:
        raise ValueError(
            f"process {local} finds {count} GPUs: start no more processes than there are"
        )


def _leave(code: int) -> NoReturn:
    """Ends one process of several without taking its interpreter down.

    `DistributedDataParallel` leaves gloo's threads running, and one that lets go of a tensor while
    the interpreter ends aborts the whole run at its very end (pytorch/pytorch#190489).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"--device {name}: torch {torch.__version__} finds no GPU on this machine: use cpu"
        )
    if device.index is not None and device.type == "cuda":
        count = torch.cuda.device_count()
        if device.index >= count:
            raise ValueError(f"--device {name}: torch finds {count} GPUs, the first is cuda:0")
    return device
