"""The training step: packed micro-batches in, one update of the weights out.

Shape suffixes as in `model.py`, and R tokens that count.

Weights are fp32 and stay so; each layer rounds them to the dtype it computes in, so that gradients
arrive in fp32 and sum up in fp32 over micro-batches and over processes.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from minigen.batch import Batch
from minigen.loss import chunk_loss, chunked_cross_entropy
from minigen.model import Block, Decoder, packed_layer
from minigen.start import share_triton_cache

# Two of torch's modes capture CUDA graphs, which hold for one shape; a packed batch rarely has the
# shape of the one before.
COMPILE_MODES = ("eager", "default", "max-autotune-no-cudagraphs")
# Rope tables are the same everywhere; the switch has a new name since torch 2.13.
_SYNC_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)
INIT_STD = 0.02
# (block, x_TE, cos_TR, sin_TR, *what tells its sequences apart) -> x_TE
Layer = Callable[..., Tensor]


@dataclass(frozen=True)
class Schedule:
    """Learning rate by step: a linear warm-up, then down to `lr * min_ratio` at the last step.

    kind: "cosine" or "linear" decay from the warm-up on; "wsd" (warm-up, stable, decay) stays up
    and goes down linearly over the last `decay_ratio` of the steps; "constant" stays up.
    """

    kind: str
    lr: float
    num_steps: int
    warmup: int
    min_ratio: float = 0.1
    decay_ratio: float = 0.2

    def __call__(self, step: int) -> float:
        """The rate of step `step`, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        begin = self.warmup
        if self.kind == "wsd":
            begin = max(begin, self.num_steps - math.ceil(self.decay_ratio * self.num_steps))
        if self.kind == "constant" or step < begin:
            return self.lr
        done = (step + 1 - begin) / max(self.num_steps - begin, 1)
        share = (1 + math.cos(math.pi * done)) / 2 if self.kind == "cosine" else 1 - done
        return self.lr * (self.min_ratio + (1 - self.min_ratio) * share)


def initialise(decoder: Decoder, seed: int, std: float = INIT_STD) -> None:
    """Random weights: normal, biases 0, what ends in the residual scaled down (GPT-2, 2.3)."""
    generator = torch.Generator(decoder.embed.weight.device).manual_seed(seed)
    residual_std = std / math.sqrt(2 * decoder.config.num_layers)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0 - decoder.config.norm_offset)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                ends = name.endswith(("o_proj.weight", "down_proj.weight"))
                parameter.normal_(0.0, residual_std if ends else std, generator=generator)


class TrainingModel(nn.Module):
    """The decoder with its loss, compiled block by block.

    Args:
        decoder: in fp32.
        dtype: to compute in.
        compile: one of `COMPILE_MODES`.
        recompute: keep only each layer's input, and compute the layer again in the backward.
        dropout: share of what attention and MLP add that is dropped.
        layer: runs one block; the tools compare others with the packed one.
        layer_options: Inductor's settings for the layer, besides those of the mode.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        dtype: torch.dtype,
        compile: str = "default",
        recompute: bool = False,
        dropout: float = 0.0,
        layer: Layer = packed_layer,
        layer_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.decoder = decoder.requires_grad_(True).train()
        self.dtype, self.recompute, self.dropout = dtype, recompute, dropout
        for block in decoder.blocks:
            assert isinstance(block, Block)
            block.dropout = dropout
        self._layer = layer
        self._chunk_loss = chunk_loss
        self._compiled = compile != "eager"
        if self._compiled:
            share_triton_cache(decoder.embed.weight.device)
            mode = None if compile == "default" else compile
            how: dict[str, Any] = {"mode": mode}
            if layer_options:  # torch takes one of the two
                of_mode = torch._inductor.list_mode_options(mode) if mode else {}
                how = {"options": {**of_mode, **layer_options}}
            self._layer = torch.compile(layer, fullgraph=True, **how)
            compiled = torch.compile(chunk_loss, fullgraph=True, mode=mode)

            def compiled_loss(
                logits_CV: Tensor, targets_C: Tensor, softcap: float, with_grad: bool
            ) -> tuple[Tensor, Tensor | None]:
                torch._dynamo.maybe_mark_dynamic(logits_CV, 0)
                torch._dynamo.maybe_mark_dynamic(targets_C, 0)
                return compiled(logits_CV, targets_C, softcap, with_grad)

            self._chunk_loss = compiled_loss

    def hidden(self, tokens_T: Tensor, positions_T: Tensor, *sequences: Tensor) -> Tensor:
        """Normed hidden states [T, E]; of the sequences the packed layer wants cu_seqlens_S1."""
        decoder = self.decoder
        x_TE, cos_TR, sin_TR = decoder.begin(tokens_T, positions_T, self.dtype)
        if self._compiled:
            for x in (cos_TR, sin_TR, *sequences):
                torch._dynamo.maybe_mark_dynamic(x, 0)
        for block in decoder.blocks:
            if self._compiled:
                torch._dynamo.maybe_mark_dynamic(x_TE, 0)
            inputs = (block, x_TE, cos_TR, sin_TR, *sequences)
            if self.recompute and torch.is_grad_enabled():
                x_TE = checkpoint(
                    self._layer,
                    *inputs,
                    use_reentrant=False,
                    preserve_rng_state=self.dropout > 0,
                )
            else:
                x_TE = self._layer(*inputs)
        return decoder.norm(x_TE)

    def forward(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        cu_seqlens_S1: Tensor,
        rows_R: Tensor,
        targets_R: Tensor,
    ) -> Tensor:
        """Summed cross-entropy of the targets, fp32."""
        hidden_RE = self.hidden(tokens_T, positions_T, cu_seqlens_S1)[rows_R]
        return chunked_cross_entropy(
            hidden_RE,
            self.decoder.lm_head.weight,
            targets_R,
            softcap=self.decoder.config.logit_softcap,
            chunk_loss=self._chunk_loss,
        )


@dataclass(frozen=True)
class Ranks:
    """The processes that train together; one alone needs no others."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier()


class Trainer:
    """Owns the model, the optimizer and the update.

    Args:
        model: on its device.
        schedule: the learning rate.
        ranks: with more than one, gradients are averaged by `DistributedDataParallel`.
        weight_decay: of matrices; norms and biases have none.
        betas, clip: AdamW's (arXiv 1711.05101), and the largest norm of all gradients; 0 is off.
        seed: of the dropout, together with the step.
    """

    def __init__(
        self,
        model: TrainingModel,
        schedule: Schedule,
        *,
        ranks: Ranks | None = None,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        clip: float = 1.0,
        seed: int = 0,
    ) -> None:
        self.model, self.schedule, self.ranks = model, schedule, ranks or Ranks()
        self.clip, self.seed = clip, seed
        self.device = model.decoder.embed.weight.device
        self.step = 0
        self.parameters = dict(model.decoder.named_parameters())
        matrices = [p for p in self.parameters.values() if p.dim() > 1]
        others = [p for p in self.parameters.values() if p.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=schedule(0),
            betas=betas,
            fused=True,
        )
        self._run: TrainingModel | DistributedDataParallel = model
        if self.ranks.world > 1:
            still: dict[str, Any] = {_SYNC_BUFFERS: False}
            self._run = DistributedDataParallel(
                model,
                device_ids=[self.device] if self.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                **still,
            )

    def update(self, batches: Sequence[Batch], num_targets: int) -> tuple[Tensor, Tensor]:
        """One step over this rank's micro-batches.

        num_targets counts the targets of all micro-batches of all ranks. Returns the summed
        cross-entropy of this rank's, and the norm of all gradients before clipping, both on the
        device.
        """
        self.model.train()
        lr = self.schedule(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        total = torch.zeros((), device=self.device)
        # DDP takes the mean over processes, but the loss is one sum over all their targets.
        scale = self.ranks.world / num_targets
        for i, batch in enumerate(batches):
            if self.model.dropout:
                torch.manual_seed(_seed(self.seed, self.step, i, self.ranks.rank))
            last = i == len(batches) - 1
            run = self._run
            parallel = run if isinstance(run, DistributedDataParallel) else None
            with parallel.no_sync() if parallel and not last else nullcontext():
                with _whole_graphs() if parallel else nullcontext():
                    loss = run(*batch.to(self.device))
                (loss * scale).backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return total, norm

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        """[summed cross-entropy, number of targets] of these micro-batches, fp64 on the device."""
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for batch in batches:
            sums[0] += self.model(*batch.to(self.device))
            sums[1] += len(batch.targets_R)
        return sums


def _whole_graphs() -> AbstractContextManager[None]:
    """Keeps torch from cutting a layer's compiled code where a bucket of gradients is full.

    It would, within `DistributedDataParallel`, and then fails on counts that are not fixed
    (KeyError in torch 2.13). Compiled layer by layer there is nothing to gain by it: a layer's
    gradients are sent while those of the layer below are computed.
    """
    return torch._dynamo.config.patch(optimize_ddp=False)


def _seed(*numbers: int) -> int:
    """A seed of each step's own, so that a run that goes on needs no generator's state."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
