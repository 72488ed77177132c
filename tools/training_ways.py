"""A whole training step in the four ways: forward, chunked cross-entropy, backward, clip, AdamW.

Or its forward alone, with what the backward needs kept and the head's gradients, which the chunked
cross-entropy computes with the loss. All four are run by minigen's own `Trainer`; "flat" is what
`python -m minigen train` runs. A way that pads differs from it in the rows that it computes and in
how its layers attend, and in nothing else: the loss picks the same targets out of the rectangle, so
that the head never sees padding. (Usual padded training computes the head for padding, too, and is
slower still.)

Shape suffixes as in `minigen/trainer.py`, B rows of a rectangle and L its longest sample.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from minigen.batch import Batch, make_batch
from minigen.flops import step_flops
from minigen.measure import seconds_of, spans_of, synchronize
from minigen.model import Attention, Block, Decoder, packed_layer
from minigen.trainer import Layer, Schedule, Trainer, TrainingModel
from tools import padded
from tools.batching_ways import groups_of, without_coalescing
from tools.memory import (
    OUT_OF_MEMORY,
    extra_memory,
    reason_to_leave_out,
    release,
    too_large_for_host,
)

# How far a way may be from flat, relative, in roundings of the dtype that is computed in. On a CPU
# right ways differed by at most 1.2, 0.8 and 6 (three dtypes, tiny and smollm2-135m shapes): sums
# in another order, attention by another kernel. The gradients' bound is on the norm of their
# difference; their own norm does not see what turns them.
ROUNDINGS = {"loss": 4, "norm": 4, "gradients": 16}
WORDS = {"loss": "loss", "norm": "norm of the gradients", "gradients": "gradient"}
SECONDS = 2.0  # of timing a way takes at most, unless a single update takes longer
TOO_LARGE = (
    "flat, which the others are compared with, does not fit into memory: use fewer tokens or "
    "--recompute"
)


# --- micro-batches -------------------------------------------------------------------------------


def split(
    ids: Iterable[int],
    lengths: Sequence[int],
    max_rows: int | None,
    rows_of: Callable[[list[int]], int],
) -> list[list[int]]:
    """Cuts `ids`, in their order, into runs of at most `max_rows` rows; None does not cut."""
    runs: list[list[int]] = [[]]
    for i in ids:
        tried = [*runs[-1], i]
        if runs[-1] and max_rows and rows_of([lengths[j] for j in tried]) > max_rows:
            runs.append([i])
        else:
            runs[-1] = tried
    return runs


def rectangle_rows(lengths: list[int]) -> int:
    return len(lengths) * max(lengths)


def as_rectangle(packed: Batch) -> Batch:
    """The same samples, targets and loss, each sample padded on the right to the longest.

    The rectangle lies flat; `cu_seqlens_S1` still tells the samples' own lengths, without the
    empty sequence at its end.
    """
    cu_seqlens = packed.cu_seqlens_S1[:-1].long()
    lengths_B = cu_seqlens.diff()
    B, L = len(lengths_B), int(lengths_B.max())
    row_T = torch.arange(B).repeat_interleave(lengths_B)
    # Where each packed token lies in the flat rectangle.
    place_T = torch.arange(len(row_T)) - cu_seqlens[row_T] + L * row_T
    tokens = torch.zeros(B * L, dtype=torch.int64)
    tokens[place_T] = packed.tokens_T
    return Batch(
        tokens,
        torch.arange(L).repeat(B),
        cu_seqlens.int(),
        place_T[packed.rows_R],
        packed.targets_R,
    )


# --- the ways ------------------------------------------------------------------------------------


def padded_layer(
    block: Block, x_TE: Tensor, cos_TR: Tensor, sin_TR: Tensor, cu_seqlens_S1: Tensor
) -> Tensor:
    """The block over a flat rectangle, attention over all of it."""
    x_BLE = x_TE.view(cu_seqlens_S1.shape[0] - 1, -1, x_TE.shape[1])
    return padded.block_output(block, x_BLE, cos_TR, sin_TR, padded.sdpa_rectangle).flatten(0, 1)


def unpadded_layer(
    block: Block,
    x_TE: Tensor,
    cos_TR: Tensor,
    sin_TR: Tensor,
    cu_seqlens_S1: Tensor,
    real_T: Tensor,
) -> Tensor:
    """The block over a flat rectangle, attention over its real rows."""

    def attend(layer: Attention, q_BLHD: Tensor, k_BLKD: Tensor, v_BLKD: Tensor) -> Tensor:
        real = real_T, cu_seqlens_S1
        return padded.unpadded_rectangle(layer, q_BLHD, k_BLKD, v_BLKD, *real)

    x_BLE = x_TE.view(cu_seqlens_S1.shape[0] - 1, -1, x_TE.shape[1])
    return padded.block_output(block, x_BLE, cos_TR, sin_TR, attend).flatten(0, 1)


class UnpaddedModel(TrainingModel):
    """Tells its layers where the real rows are, found once a micro-batch."""

    def hidden(self, tokens_T: Tensor, positions_T: Tensor, *sequences: Tensor) -> Tensor:
        (cu_seqlens_S1,) = sequences
        lengths_B1 = cu_seqlens_S1.diff()[:, None]
        is_real_BL = positions_T.view(len(lengths_B1), -1) < lengths_B1
        real_T = is_real_BL.flatten().nonzero().squeeze(1)
        return super().hidden(tokens_T, positions_T, cu_seqlens_S1, real_T)


@dataclass(frozen=True)
class TrainingWay:
    """How a step's samples become micro-batches, and which layer runs them.

    groups: lengths -> samples that may share a micro-batch.
    layer_options: Inductor's settings for the layer.
    """

    name: str
    layer: Layer
    model: type[TrainingModel] = TrainingModel
    groups: Callable[[Sequence[int]], list[list[int]]] = field(
        default=lambda lengths: [list(range(len(lengths)))]
    )
    layer_options: Callable[[], dict[str, bool]] = dict

    @property
    def pads(self) -> bool:
        return self.layer is not packed_layer

    def micro_batches(
        self, samples: Sequence[list[int]], decoder: Decoder, max_rows: int | None
    ) -> list[Batch]:
        """All samples, every token but each first one a target.

        max_rows: most rows of a micro-batch, padding included; None: as few micro-batches as the
            way has groups.
        """
        lengths = [len(sample) for sample in samples]
        made = []
        for group in self.groups(lengths):
            for run in split(group, lengths, max_rows, rectangle_rows if self.pads else sum):
                tokens = [torch.tensor(samples[i]) for i in run]
                targets = [torch.ones(len(t), dtype=torch.bool) for t in tokens]
                batch = make_batch(tokens, targets, decoder.config, decoder.max_length)
                made.append(as_rectangle(batch) if self.pads else batch)
        return made


PADDED = TrainingWay("padded", padded_layer, layer_options=without_coalescing)
GROUPED = TrainingWay("grouped", padded_layer, groups=groups_of, layer_options=without_coalescing)
UNPADDED = TrainingWay("unpadded", unpadded_layer, UnpaddedModel, layer_options=without_coalescing)
FLAT = TrainingWay("flat", packed_layer)
TRAINING_WAYS = (PADDED, GROUPED, UNPADDED, FLAT)


# --- check and measure ---------------------------------------------------------------------------


@dataclass(frozen=True)
class StepOptions:
    """What all ways have in common.

    dtype: to compute in; weights are fp32. compile: one of `minigen.trainer.COMPILE_MODES`.
    peak_flops: of the device, for the MFU; None where it is not known.
    """

    dtype: torch.dtype
    compile: str = "default"
    recompute: bool = False
    max_rows: int | None = None
    repeats: int = 5
    peak_flops: float | None = None


class StepModels:
    """Each way's model, made when it is asked for: one compilation for all lengths.

    decoder: in fp32, on its device.
    """

    def __init__(self, decoder: Decoder, options: StepOptions) -> None:
        self.decoder, self.options = decoder, options
        self._made: dict[str, TrainingModel] = {}
        self.uncompiled: dict[str, str] = {}  # ways that do not compile, and why

    def of(self, way: TrainingWay) -> TrainingModel:
        if way.name not in self._made:
            options = self.options
            self._made[way.name] = way.model(
                self.decoder,
                dtype=options.dtype,
                compile="eager" if way.name in self.uncompiled else options.compile,
                recompute=options.recompute,
                layer=way.layer,
                layer_options=way.layer_options(),
            )
        return self._made[way.name]

    def give_up_compiling(self, way: TrainingWay, reason: str) -> None:
        self.uncompiled[way.name] = reason
        self._made.pop(way.name, None)


class StepComparison:
    """The ways on the same samples and weights: `check` first, then `measure`.

    Args:
        decoder: in fp32, on its device; its weights are never changed (the rate is 0).
        samples: token ids, at least one sample of two tokens or more.
        models: of an earlier comparison with the same decoder and options.
    """

    def __init__(
        self,
        decoder: Decoder,
        samples: Sequence[list[int]],
        options: StepOptions,
        models: StepModels | None = None,
    ) -> None:
        self.decoder, self.samples, self.options = decoder, samples, options
        self.device = decoder.embed.weight.device
        self.num_targets = sum(len(sample) - 1 for sample in samples)
        self._parameters = list(decoder.parameters())
        self._batches = {
            way.name: way.micro_batches(samples, decoder, options.max_rows) for way in TRAINING_WAYS
        }
        # The same objects are checked and timed.
        self._models = models or StepModels(decoder, options)
        self.checked: dict[str, tuple[float, float]] = {}
        self.left_out: dict[str, str] = {}  # ways, and why

    @property
    def flop(self) -> float:
        """Of the samples' forward and backward, the same for every way."""
        lengths = torch.tensor([len(sample) for sample in self.samples]).numpy()
        return float(step_flops(self.decoder.config, lengths, lengths - 1).sum())

    def rows(self, way: TrainingWay) -> int:
        return sum(len(batch.tokens_T) for batch in self._batches[way.name])

    def check(self) -> dict[str, dict[str, float] | None]:
        """{way: its relative differences from flat} of loss, gradients' norm and gradients.

        The gradients' is the norm of the difference of all gradients over their norm. None for a
        way that runs out of memory, which is then not measured either. A way that does not compile
        runs uncompiled.

        Raises ValueError where a way differs by more than the roundings of the dtype allow, or
        where flat does not fit.
        """
        found: dict[str, dict[str, float] | None] = {}
        reference: list[Tensor] = []
        taken = 0
        for way in reversed(TRAINING_WAYS):
            release(self.device)
            try:
                if way is FLAT:
                    taken = extra_memory(lambda: self._gradients(FLAT), self.device)
                    self._drop_gradients()
                elif too_large_for_host(self._estimate(way, taken), self.device):
                    found[way.name], self.left_out[way.name] = None, OUT_OF_MEMORY
                    continue
                loss, norm = self._gradients_compiled_or_not(way)
            except (RuntimeError, MemoryError) as error:
                reason = reason_to_leave_out(error)
                if reason == OUT_OF_MEMORY and way is FLAT:
                    raise ValueError(TOO_LARGE) from None
                if reason is None or way is FLAT:
                    raise
                found[way.name], self.left_out[way.name] = None, reason
                continue
            finally:
                gradients = self._drop_gradients()
            self.checked[way.name] = loss, norm
            if way is FLAT:
                reference = gradients
                continue
            flat_loss, flat_norm = self.checked[FLAT.name]
            pairs = zip(gradients, reference, strict=True)
            apart = float(torch.stack([(a - b).norm() for a, b in pairs]).norm())
            found[way.name] = {
                "loss": abs(loss - flat_loss) / abs(flat_loss),
                "norm": abs(norm - flat_norm) / flat_norm,
                "gradients": apart / flat_norm,
            }
            self._refuse_disagreement(way, found[way.name] or {})
        return found

    def _refuse_disagreement(self, way: TrainingWay, differences: dict[str, float]) -> None:
        eps = torch.finfo(self.options.dtype).eps
        for name, difference in differences.items():
            bound = ROUNDINGS[name] * eps
            if not difference <= bound:
                raise ValueError(
                    f"{way.name} and flat disagree: the {WORDS[name]} differs by "
                    f"{difference:.2g} of its size, more than {bound:.2g}"
                )

    def _estimate(self, way: TrainingWay, taken: int) -> float:
        """Bytes of the way's largest micro-batch, as flat took `taken` for its own."""
        weights = sum(p.nbytes for p in self._parameters)
        largest = max(len(batch.tokens_T) for batch in self._batches[way.name])
        flat = max(len(batch.tokens_T) for batch in self._batches[FLAT.name])
        return weights + max(0, taken - weights) * largest / flat

    def _gradients_compiled_or_not(self, way: TrainingWay) -> tuple[float, float]:
        try:
            return self._gradients(way)
        except RuntimeError as error:
            reason = reason_to_leave_out(error)
            if reason in (None, OUT_OF_MEMORY) or way is FLAT:
                raise
            self._models.give_up_compiling(way, str(reason))
        # Not in the handler, where the error's traceback holds what the attempt has allocated.
        self._drop_gradients()
        release(self.device)
        return self._gradients(way)

    def _gradients(self, way: TrainingWay) -> tuple[float, float]:
        """(loss a target, norm of all gradients), which stay in the parameters."""
        model, total = self._models.of(way), 0.0
        model.train()
        for batch in self._batches[way.name]:
            loss = model(*batch.to(self.device)) / self.num_targets
            loss.backward()
            total += float(loss.detach())
        norm = nn.utils.clip_grad_norm_(self._parameters, math.inf)
        return total, float(norm)

    def _drop_gradients(self) -> list[Tensor]:
        taken = [p.grad for p in self._parameters if p.grad is not None]
        for p in self._parameters:
            p.grad = None
        return taken

    def measure(self, way: TrainingWay, phase: str = "train-step") -> dict[str, Any]:
        """Time, rates and memory of an update, or of its forward alone ("train-forward").

        The memory is that of weights, gradients, AdamW's moments and activations, or of what a
        forward adds to the weights.
        """
        real = sum(len(sample) for sample in self.samples)
        row: dict[str, Any] = {
            "way": way.name,
            "phase": phase,
            "padding": 1 - real / self.rows(way),
            "micro_batches": len(self._batches[way.name]),
            "uncompiled": self._models.uncompiled.get(way.name),
            **dict.fromkeys(("ms", "tokens_s", "tflop_s", "mfu", "peak_bytes")),
        }
        if way.name not in self.checked:
            return {**row, "error": self.left_out[way.name]}
        release(self.device)
        timed = self._timed_forward if phase == "train-forward" else self._timed
        try:
            return {**row, **timed(way, real)}
        except (RuntimeError, MemoryError) as error:
            reason = reason_to_leave_out(error)
            if reason is None:
                raise
            # Where padding does not fit, that is the result.
            return {**row, "error": reason}
        finally:
            self._drop_gradients()

    def _timed_forward(self, way: TrainingWay, real: int) -> dict[str, Any]:
        model = self._models.of(way).train()
        batches = [batch.to(self.device) for batch in self._batches[way.name]]

        def forward() -> Tensor:
            # Each loss lets go of what its backward would need.
            losses = [model(*batch).detach() for batch in batches]
            return torch.stack(losses).sum() / self.num_targets

        loss, _ = self.checked[way.name]
        self._refuse_disagreement(way, {"loss": abs(float(forward()) - loss) / abs(loss)})
        extra = extra_memory(forward, self.device)
        seconds = seconds_of(forward, self.device, self.options.repeats)
        return {
            "ms": seconds * 1e3,
            "repeats": self.options.repeats,
            "tokens_s": real / seconds,
            "peak_bytes": extra,
        }

    def _timed(self, way: TrainingWay, real: int) -> dict[str, Any]:
        batches = self._batches[way.name]
        # At a rate of 0 AdamW computes all it does, and every update sees the same weights.
        trainer = Trainer(self._models.of(way), Schedule("constant", 0.0, 1, 0))

        def update() -> tuple[Tensor, Tensor]:
            return trainer.update(batches, self.num_targets)

        synchronize(self.device)
        start = time.perf_counter()
        self._refuse_other_step(way, *update())  # reads the device's numbers, so waits for it
        first = time.perf_counter() - start
        # All is compiled and warm after the check and this update. Long ones vary little.
        repeats = min(self.options.repeats, max(1, int(SECONDS / first)))
        spans: list[float] = []

        def timed() -> None:
            spans.extend(spans_of(update, self.device, repeats))

        extra = extra_memory(timed, self.device)
        seconds = median(spans)
        moments = [
            value
            for state in trainer.optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        ]
        rate, peak = self.flop / seconds, self.options.peak_flops
        return {
            "ms": seconds * 1e3,
            "repeats": repeats,
            "tokens_s": real / seconds,
            "tflop_s": rate / 1e12,
            "mfu": None if peak is None else rate / peak,
            "peak_bytes": extra + sum(t.nbytes for t in (*self._parameters, *moments)),
        }

    def _refuse_other_step(self, way: TrainingWay, total: Tensor, norm: Tensor) -> None:
        """What is timed must be what was checked."""
        loss, checked_norm = self.checked[way.name]
        differences = {
            "loss": abs(float(total) / self.num_targets - loss) / abs(loss),
            "norm": abs(float(norm) - checked_norm) / checked_norm,
        }
        self._refuse_disagreement(way, differences)
