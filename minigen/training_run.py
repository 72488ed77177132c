"""One training run in one of its processes: its data, its steps, its evaluations, its checkpoints.

    OUTPUT/tokens/          the data as token ids, and the lock of the run that writes here
    OUTPUT/step-00000500/   checkpoints to go on from
    OUTPUT/final/           the model at the end

The processes themselves are made before it, see `minigen.train`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minigen import cli
from minigen.batch import Corpus
from minigen.data import Samples, Source, fingerprint, load_samples, read_samples
from minigen.data import save_samples as keep_samples
from minigen.flops import step_flops
from minigen.greedy import continue_greedily
from minigen.model import DTYPES, Decoder
from minigen.packing import Step, pack, plan, stream
from minigen.report import bar
from minigen.tokenizing import Settings
from minigen.trainer import INIT_STD, Ranks, Schedule, Trainer, TrainingModel, initialise
from minigen.training_log import Clock, Report, plot
from minigen.training_start import read_start
from minigen.training_state import (
    check_settings,
    checkpoints,
    load_state,
    read_state,
    remove_leftovers,
    remove_old,
    save_state,
    step_directory,
)
from minigen.weights.fingerprint import fingerprint as checkpoint_fingerprint
from minigen.weights.save import atomic_directory, save_checkpoint

FINAL, TOKENS = "final", "tokens"
SAMPLE_TOKENS = 60


class Run:
    """One call of the command, in one of its processes.

    It is checked when it is made, nothing is written and no other process waited for; `train` runs
    it. Raises ValueError (as CheckpointError) and OSError for what it cannot use.
    """

    def __init__(self, args: argparse.Namespace, ranks: Ranks, device: torch.device) -> None:
        self.args, self.ranks, self.device = args, ranks, device
        self.output = Path(args.output)
        auto = "bfloat16" if device.type == "cuda" else "float32"
        self.dtype = DTYPES[auto if args.dtype == "auto" else args.dtype]
        self.save_dtype = self.dtype if args.save_dtype == "auto" else DTYPES[args.save_dtype]
        self.sources = [Source.parse(text) for text in args.data]
        for source in self.sources:
            source.path.open("rb").close()
        self.start = read_start(args)
        if args.chat_prompt and not self.start.tokenizer.has_chat_template:
            raise ValueError(f"--chat-prompt: {self.start.tokenizer_dir} has no chat template")
        self.data_settings = Settings(
            self._max_length(),
            args.overlong,
            args.holdout,
            self.start.stop_ids,
            args.assistant_only_loss,
        )
        self.last = self._last_checkpoint()

    def _last_checkpoint(self) -> Path | None:
        """What to go on from. Raises ValueError if it was made with other settings."""
        saved = checkpoints(self.output)
        if not saved:
            return None
        check_settings(saved[-1], self.settings)
        return saved[-1]

    def _max_length(self) -> int:
        args, possible = self.args, self.start.config.max_position_embeddings
        longest = min(possible, args.tokens) if args.max_length is None else args.max_length
        if longest > possible:
            raise ValueError(f"--max-length {longest}: the model is made for {possible} tokens")
        if longest > args.tokens:
            raise ValueError(f"--max-length {longest} is more than --tokens {args.tokens}")
        return longest

    def prepare(self) -> None:
        """Does and checks what one process can for all, before they are made: makes the output,
        brings the data there as token ids, plans the steps."""
        self._prepare_output()
        self._plan(self._samples())

    def _prepare_output(self) -> None:
        """Makes the output, and locks it for as long as this object and process live."""
        output = self.output
        if output.is_dir() and any(output.iterdir()) and not (output / TOKENS).is_dir():
            raise ValueError(f"{output} is not empty and no output of train: give another")
        (output / TOKENS).mkdir(parents=True, exist_ok=True)
        if not os.access(output, os.W_OK):
            raise ValueError(f"{output} cannot be written to")
        self._lock = _lock(output)
        remove_leftovers(output)

    @cached_property
    def digests(self) -> list[str]:
        """Of all data, which is read for it."""
        return fingerprint(self.sources, self.start.tokenizer_dir, self.data_settings)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All that decides the losses; a run that goes on must have the same."""
        args = self.args
        names = (
            "overlong", "holdout", "epochs", "steps", "tokens", "accumulate", "seed", "lr",
            "schedule", "warmup", "min_lr_ratio", "decay_ratio", "weight_decay", "beta1", "beta2",
            "clip", "dropout", "assistant_only_loss",
        )  # fmt: skip
        return {
            **{name: getattr(args, name) for name in names},
            "max_length": self.data_settings.max_length,
            "dtype": str(self.dtype).removeprefix("torch."),
            "processes": self.ranks.world,
            "data": [[d, s.weight] for d, s in zip(self.digests, self.sources, strict=True)],
            "config": self.start.hf,
            "from": "scratch"
            if self.start.model is None
            else checkpoint_fingerprint(self.start.model),
        }

    # --- data

    def _samples(self) -> list[Samples]:
        """Every file's samples, from its copy on the disk, which the first process makes."""
        found = []
        for source, digest in zip(self.sources, self.digests, strict=True):
            file = self.output / TOKENS / f"{digest}.safetensors"
            samples = load_samples(file)
            if samples is None and not self.ranks.first:
                raise ValueError(f"{file} cannot be read: is --output on a disk that all share?")
            if samples is None:
                self._say(f"reading {source.path}")
                with bar(source.path.stat().st_size, source.path.name, "B") as shown:
                    samples = read_samples(
                        source.path, self.start.tokenizer, self.data_settings, shown.update
                    )
                keep_samples(samples, file)
            found.append(samples)
        return found

    def _plan(self, samples: list[Samples]) -> tuple[Corpus, np.ndarray, list[Step]]:
        """The samples together, what each of them costs in FLOP, and the steps."""
        corpus = Corpus.of(samples)
        costs = step_flops(self.start.config, corpus.lengths_N, corpus.num_targets_N)
        args, files = self.args, range(len(self.sources))
        epochs = args.epochs or 1.0
        ids = [corpus.ids(file, held_out=False) for file in files]
        if not sum(map(len, ids)):
            raise ValueError("every sample is held out: give more data, or a smaller --holdout")
        weights = [source.weight for source in self.sources]
        endless = None if args.steps else epochs
        steps = plan(
            stream(ids, weights, endless, args.seed),
            corpus.lengths_N,
            costs,
            budget=args.tokens,
            accumulate=args.accumulate,
            ranks=self.ranks.world,
            max_steps=args.steps,
        )
        if not steps:
            raise ValueError(
                f"the data is too little for one step of {self.ranks.world} processes: give more"
            )
        return corpus, costs, steps

    # --- training

    def train(self) -> int:
        args, ranks = self.args, self.ranks
        samples = []
        if ranks.first:
            self._prepare_output()
            samples = self._samples()
        ranks.wait()
        self.last = self._last_checkpoint()  # another run may have ended in between
        samples = samples or self._samples()
        for source, found in zip(self.sources, samples, strict=True):
            self._say(_summary(source, found))
        corpus, costs, steps = self._plan(samples)
        warmup = math.ceil(0.02 * len(steps)) if args.warmup is None else args.warmup
        trainer = self._trainer(
            Schedule(
                args.schedule, args.lr, len(steps), warmup, args.min_lr_ratio, args.decay_ratio
            )
        )
        totals = _Totals()
        if self.last is not None:
            load_state(self.last, trainer)
            totals = _Totals(**read_state(self.last)["totals"])
            self._say(f"going on after step {trainer.step} of {len(steps)}")
        size = sum(p.numel() for p in trainer.parameters.values())
        self._say(f"{size:,} parameters, {len(steps)} steps, on {ranks.world} x {self.device.type}")
        report = Report(self.output, len(steps), trainer.step) if ranks.first else None
        try:
            with cli.Interrupt() if ranks.world == 1 else contextlib.nullcontext() as interrupt:
                self._loop(trainer, steps, corpus, costs, totals, report, interrupt)
        finally:
            if report:
                report.progress.close()
        if trainer.step < len(steps):
            self._say(f"saved after step {trainer.step}: the same command goes on from there")
            return cli.EXIT_INTERRUPTED
        self._finish(trainer)
        return cli.EXIT_OK

    def _loop(
        self,
        trainer: Trainer,
        steps: Sequence[Step],
        corpus: Corpus,
        costs: np.ndarray,
        totals: _Totals,
        report: Report | None,
        interrupt: cli.Interrupt | None,
    ) -> None:
        """The steps that are left, until all are done or Ctrl-C."""
        args, ranks, config = self.args, self.ranks, self.start.config
        evaluation = self._evaluation(corpus, costs)
        epoch_tokens = self._epoch_tokens(corpus)
        clock = Clock(self.device, args.peak_flops, ranks.world)
        loss = torch.tensor(totals.loss if ranks.first else 0.0, dtype=torch.float64)
        loss = loss.to(self.device)
        while trainer.step < len(steps):
            step = steps[trainer.step]
            batches = [
                corpus.batch(ids, config, trainer.model.decoder.max_length)
                for ids in step[ranks.rank]
            ]
            ids = [sample for rank in step for batch in rank for sample in batch]
            tokens, targets = (
                int(counts[ids].sum()) for counts in (corpus.lengths_N, corpus.num_targets_N)
            )
            part, norm = trainer.update(batches, targets)
            loss += part
            totals.tokens += tokens
            totals.targets += targets
            totals.loss_targets += targets
            clock.count(tokens, float(costs[ids].sum()))
            done, last = trainer.step, trainer.step == len(steps)
            stop = interrupt is not None and interrupt.requested
            if report:
                report.progress.step()
            if done % args.log_every == 0 or last:
                mean = _finite(float(ranks.sum(loss)) / totals.loss_targets, done)
                rate, mfu, seconds = clock.read()
                totals.seconds += seconds
                if report:
                    report.log(
                        {
                            "step": done,
                            "epoch": round(totals.tokens / epoch_tokens, 4),
                            "tokens": totals.tokens,
                            "targets": totals.targets,
                            "loss": mean,
                            "lr": trainer.schedule(done - 1),
                            "grad_norm": float(norm),
                            "tokens_per_s": round(rate, 1),
                            "mfu": mfu,
                            "seconds": round(totals.seconds, 3),
                        }
                    )
                loss, totals.loss_targets = torch.zeros_like(loss), 0
            with clock.paused():
                if done % args.eval_every == 0 or last:
                    self._evaluate(trainer, evaluation, report)
                if done % args.save_every == 0 or last or stop:
                    totals.loss = _finite(float(ranks.sum(loss.clone())), done)
                    self._save(trainer, dataclasses.asdict(totals))
            if stop:
                return

    def _epoch_tokens(self, corpus: Corpus) -> float:
        """Tokens of an epoch."""
        return sum(
            source.weight * float(corpus.lengths_N[corpus.ids(file, held_out=False)].sum())
            for file, source in enumerate(self.sources)
        )

    def _trainer(self, schedule: Schedule) -> Trainer:
        args, start = self.args, self.start
        if start.model is not None:
            decoder = Decoder.from_pretrained(
                start.model,
                dtype=torch.float32,
                device=self.device,
                progress=self.ranks.first and cli.is_terminal(sys.stderr),
            )
        else:
            decoder = Decoder.from_config(start.config, dtype=torch.float32, device=self.device)
            if self.last is None:
                std = start.hf.get("initializer_range", INIT_STD)
                initialise(decoder, args.seed, float(std))
        model = TrainingModel(
            decoder,
            dtype=self.dtype,
            compile=args.compile,
            recompute=args.recompute,
            dropout=args.dropout,
        )
        return Trainer(
            model,
            schedule,
            ranks=self.ranks,
            weight_decay=args.weight_decay,
            betas=(args.beta1, args.beta2),
            clip=args.clip,
            seed=args.seed,
        )

    # --- evaluation

    def _evaluation(self, corpus: Corpus, costs: np.ndarray) -> list[tuple[str, list[Any]]]:
        """(file, this rank's batches) of what is held out of each file."""
        found = []
        for file, source in enumerate(self.sources):
            ids = iter(corpus.ids(file, held_out=True).tolist())
            batches = [
                corpus.batch(batch, self.start.config, self.start.config.max_position_embeddings)
                for group in pack(ids, corpus.lengths_N, costs, self.args.tokens, 1)
                for batch in group
            ]
            if batches:
                found.append((str(source.path), batches[self.ranks.rank :: self.ranks.world]))
        return found

    def _evaluate(
        self, trainer: Trainer, evaluation: Sequence[tuple[str, list[Any]]], report: Report | None
    ) -> None:
        for file, batches in evaluation:
            total, count = self.ranks.sum(trainer.evaluate(batches)).tolist()
            if report:
                report.evaluated(trainer.step, file, total / count, int(count))
        if report and (self.args.prompt or self.args.chat_prompt):
            for prompt, text in self._continuations(trainer.model):
                report.progress.say(f"> {prompt}\n{text}")
        if report and self.args.plot:
            plot(self.output)

    def _continuations(self, model: TrainingModel) -> Iterator[tuple[str, str]]:
        """Of each `--prompt` and `--chat-prompt`: (the prompt, what the model writes after it)."""
        tokenizer, room = self.start.tokenizer, model.decoder.max_length
        prompts = [(text, tokenizer.encode(text)) for text in self.args.prompt]
        prompts += [
            (text, tokenizer.chat_tokens([{"role": "user", "content": text}]))
            for text in self.args.chat_prompt
        ]
        # Nothing to go on from (no BOS), or no room: the end of the prompt has to do.
        usable = [(text, ids[-(room - 1) :]) for text, ids in prompts if ids]
        replies = continue_greedily(
            model, [ids for _, ids in usable], SAMPLE_TOKENS, self.start.stop_ids
        )
        for (text, _), reply in zip(usable, replies, strict=True):
            yield text, tokenizer.decode(reply)

    # --- saving

    def _save(self, trainer: Trainer, totals: dict[str, Any]) -> None:
        if self.ranks.first:
            with atomic_directory(step_directory(self.output, trainer.step)) as directory:
                self._save_model(trainer, directory)
                save_state(directory, trainer, {"settings": self.settings, "totals": totals})
            remove_old(self.output, self.args.keep)
        self.ranks.wait()

    def _save_model(self, trainer: Trainer, directory: Path) -> None:
        save_checkpoint(
            directory,
            trainer.model.decoder.checkpoint_tensors(),
            self.start.hf,
            dtype=self.save_dtype,
            copied_from=self.start.tokenizer_dir,
            max_file_bytes=self.args.max_file_bytes,
        )

    def _finish(self, trainer: Trainer) -> None:
        final = self.output / FINAL
        if self.ranks.first:
            with atomic_directory(final) as directory:
                self._save_model(trainer, directory)
            self._say(f"done: python -m minigen chat --model {final}")
        self.ranks.wait()

    def _say(self, text: str) -> None:
        if self.ranks.first:
            print(text, file=sys.stderr, flush=True)


@dataclass
class _Totals:
    """What a run has seen; `loss` and `loss_targets` since the last row of the log."""

    tokens: int = 0
    targets: int = 0
    seconds: float = 0.0
    loss: float = 0.0
    loss_targets: int = 0


def _finite(loss: float, step: int) -> float:
    if not math.isfinite(loss):
        raise RuntimeError(f"the loss is {loss} after step {step}: give a smaller --lr")
    return loss


def _summary(source: Source, samples: Samples) -> str:
    counts = samples.counts
    held_out = int(samples.held_out_N.sum())
    parts = [
        f"{source.path}: {len(samples) - held_out:,} samples",
        f"{held_out:,} held out",
        f"{len(samples.tokens_T):,} tokens, {int(samples.targets_T.sum()):,} of them targets",
    ]
    if counts["split"]:
        parts.append(f"{counts['split']:,} too long and split")
    if counts["dropped"]:
        parts.append(f"{counts['dropped']:,} dropped (too long or without a target)")
    if counts["unlike"]:
        parts.append(f"{counts['unlike']:,} turns left out (the template shows them otherwise)")
    return ", ".join(parts)


def _lock(output: Path) -> Any:
    """Two runs on one output would remove each other's files: the second is refused."""
    stream = (output / TOKENS / ".lock").open("a")
    with contextlib.suppress(ImportError):  # Windows has none
        import fcntl

        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run writes into {output}") from None
    return stream
