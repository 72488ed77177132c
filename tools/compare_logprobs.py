"""`python -m tools.compare_logprobs`: what serving and training say of the same tokens.

The engine generates many requests of mixed lengths at once: more than run at a time, so that new
ones join while others decode, and some with prompts of several chunks. Then each request runs alone
and is held to the same tokens: where it draws another one, which a near tie can do, it goes on
behind the mixed batch's token. Training's model computes all of it again, packed, in the same
dtype, and a decoder in float32 once more, each sequence by itself: the yardstick of what rounding
does.

The exit code is 1 where a difference is larger than the bound, which follows from the dtype and the
model's size. The last line is one JSON document.

Shape suffixes as in `minigen/trainer.py`; N generated tokens of all requests, one after the other.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minigen.batch import make_batch
from minigen.cli import EXIT_RUNTIME, positive
from minigen.engine import Engine
from minigen.llm import LLM
from minigen.loss import chunk_loss, chunked_cross_entropy
from minigen.measure import environment
from minigen.model import Decoder, DecoderConfig
from minigen.outputs import CompletionOutput
from minigen.packing import pack
from minigen.report import bar, print_document, table
from minigen.sampling_params import SamplingParams
from minigen.scheduler import Sequence as Running
from minigen.trainer import TrainingModel
from tools.common import model_config, parser, run

BLOCK_SIZE = 16
MOST_PACKED = 4096  # tokens of a training micro-batch, more where one sequence is longer
REFERENCE_ROWS = 512  # logits held at once
# Of the bound, see `bound_of`. Measured on a CPU, the largest difference was 0.04 to 0.2 of it.
MARGIN, SUMS = 2.0, 4.0


# --- requests ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One request."""

    prompt: list[int]
    num_tokens: int
    seed: int

    def params(self, missing: int) -> SamplingParams:
        """Of the last `missing` tokens; the draws follow from seed and position alone."""
        return SamplingParams(
            temperature=1.0, seed=self.seed, max_tokens=missing, ignore_eos=True, logprobs=0
        )


def jobs_of(
    num_tokens: int, longest_prompt: int, longest_output: int, vocab_size: int, seed: int
) -> list[Job]:
    """Requests of `num_tokens` generated tokens or somewhat more.

    Lengths are log-uniform, so that there are as many from 1 to 10 as from 10 to 100; the first
    prompt is the longest.
    """
    rng = random.Random(seed)

    def length(most: int) -> int:
        return min(most, int(math.exp(rng.uniform(0, math.log(most + 1)))))

    jobs: list[Job] = []
    while sum(job.num_tokens for job in jobs) < num_tokens:
        count = length(longest_prompt) if jobs else longest_prompt
        prompt = [rng.randrange(vocab_size) for _ in range(count)]
        jobs.append(Job(prompt, length(longest_output), rng.getrandbits(62)))
    return jobs


# --- serving -------------------------------------------------------------------------------------


@dataclass
class Served:
    """The tokens of a request and their log-probabilities."""

    tokens: list[int]
    logprobs: list[float]

    @classmethod
    def of(cls, output: CompletionOutput) -> Served:
        pairs = zip(output.token_ids, output.logprobs or [], strict=True)
        return cls(list(output.token_ids), [entry[token].logprob for token, entry in pairs])


@dataclass
class Mixture:
    """How mixed the steps were."""

    steps: int = 0
    mixed_steps: int = 0  # in which some prompts were computed while others decoded
    most_running: int = 0
    joined: int = 0  # requests that began while others were running
    chunked_prompts: int = 0  # of more than one chunk

    def require(self) -> None:
        """Raises ValueError where nothing was mixed: the comparison would say little."""
        if not (self.mixed_steps and self.joined and self.chunked_prompts):
            raise ValueError(
                f"of {self.steps} steps {self.mixed_steps} mixed prompts with decoding, "
                f"{self.joined} requests joined others and {self.chunked_prompts} prompts came in "
                "chunks: raise --tokens or --longest-prompt, or lower --max-num-batched-tokens"
            )


def serve_mixed(engine: Engine, jobs: Sequence[Job]) -> tuple[list[Served], Mixture]:
    """All requests at once, and how the engine mixed them."""
    for i, job in enumerate(jobs):
        engine.add_request(str(i), job.prompt, job.params(job.num_tokens))
    served: dict[int, Served] = {}
    mixture, chunked, scheduler = Mixture(), set[Running](), engine.scheduler
    with bar(len(jobs), "Mixed", "request") as shown:
        while engine.has_unfinished():
            before = {sequence: sequence.num_computed for sequence in scheduler.running}
            for output in engine.step():
                if output.finished:
                    served[int(output.request_id)] = Served.of(output.outputs[0])
                    shown.update()
            begun = [sequence for sequence in scheduler.running if sequence not in before]
            grown = [s for s in [*before, *begun] if s.num_computed > before.get(s, 0)]
            prefill = [s for s in grown if before.get(s, 0) < s.num_prompt]
            mixture.steps += 1
            mixture.mixed_steps += 0 < len(prefill) < len(grown)
            mixture.most_running = max(mixture.most_running, len(scheduler.running))
            mixture.joined += len(begun) if before else 0
            chunked |= {s for s in prefill if s.num_computed < s.num_prompt}
    mixture.chunked_prompts = len(chunked)
    return [served[i] for i in range(len(jobs))], mixture


def serve_alone(engine: Engine, job: Job, tokens: Sequence[int]) -> tuple[Served, int]:
    """The request alone, held to `tokens`; how often it drew another one.

    A token that it drew instead stands in the result, and what follows is computed behind
    `tokens` again.
    """
    found, strayed = Served([], []), 0
    while len(found.tokens) < len(tokens):
        start = len(found.tokens)
        wanted = tokens[start:]
        got = _follow(engine, job, [*job.prompt, *tokens[:start]], wanted)
        same = next(
            (
                i
                for i, pair in enumerate(zip(got.tokens, wanted, strict=False))
                if pair[0] != pair[1]
            ),
            None,
        )
        count = len(wanted) if same is None else same + 1
        found.tokens += got.tokens[:count]
        found.logprobs += got.logprobs[:count]
        strayed += same is not None
    return found, strayed


def _follow(engine: Engine, job: Job, prompt: list[int], wanted: Sequence[int]) -> Served:
    """Runs a request until it ends or draws what is not wanted."""
    engine.add_request("alone", prompt, job.params(len(wanted)))
    while True:
        for output in engine.step():
            drawn = output.outputs[0].token_ids
            if output.finished:
                return Served.of(output.outputs[0])
            if drawn[-1] != wanted[len(drawn) - 1]:
                engine.abort("alone")
                return Served.of(output.outputs[0])


# --- training, and the reference -----------------------------------------------------------------


def widened(decoder: Decoder) -> Decoder:
    """A copy with the same weights in float32, in which training keeps them."""
    copy = Decoder.from_config(
        decoder.config,
        dtype=torch.float32,
        device=decoder.embed.weight.device,
        max_length=decoder.max_length,
    )
    copy.load_state_dict(decoder.state_dict())
    return copy


@torch.no_grad()
def training_logprobs(
    model: TrainingModel,
    jobs: Sequence[Job],
    sequences: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
) -> list[list[float]]:
    """Log-probabilities of each job's `targets` behind its prompt and its tokens of `sequences`.

    Computed as the loss is: packed, by the layers and the chunked cross-entropy of training.
    """
    decoder = model.decoder
    device = decoder.embed.weight.device
    rows = [len(job.prompt) + len(tokens) for job, tokens in zip(jobs, sequences, strict=True)]
    lengths = np.array(rows)
    found: dict[int, list[float]] = {}
    budget = max(MOST_PACKED, int(lengths.max()))
    for (ids,) in pack(iter(range(len(jobs))), lengths, lengths, budget, 1):
        tokens = [torch.tensor([*jobs[i].prompt, *sequences[i]]) for i in ids]
        counted = [torch.arange(rows[i]) >= len(jobs[i].prompt) for i in ids]
        batch = make_batch(tokens, counted, decoder.config, decoder.max_length).to(device)
        targets_R = torch.tensor([token for i in ids for token in targets[i]], device=device)
        losses: list[Tensor] = []

        def recorded(
            logits_CV: Tensor,
            targets_C: Tensor,
            softcap: float,
            with_grad: bool,
            losses: list[Tensor] = losses,
        ) -> tuple[Tensor, Tensor | None]:
            # The loss of each row alone; the sum is what training uses.
            losses += [
                chunk_loss(row, target, softcap, False)[0]
                for row, target in zip(logits_CV.split(1), targets_C.split(1), strict=True)
            ]
            return chunk_loss(logits_CV, targets_C, softcap, with_grad)

        hidden_TE = model.hidden(batch.tokens_T, batch.positions_T, batch.cu_seqlens_S1)
        chunked_cross_entropy(
            hidden_TE[batch.rows_R],
            decoder.lm_head.weight,
            targets_R,
            softcap=decoder.config.logit_softcap,
            chunk_loss=recorded,
        )
        values = iter((-torch.stack(losses)).tolist())
        found |= {i: [next(values) for _ in targets[i]] for i in ids}
    return [found[i] for i in range(len(jobs))]


@torch.no_grad()
def reference_logprobs(
    decoder: Decoder, job: Job, tokens: Sequence[int], targets: Sequence[Sequence[int]]
) -> tuple[list[list[float]], float]:
    """(log-probabilities of each of `targets` in the place of `tokens`, sum of the squares of the
    rows' largest logits), by the decoder uncompiled and the sequence by itself."""
    device = decoder.embed.weight.device
    ids_T = torch.tensor([*job.prompt, *tokens], device=device)
    ends = torch.tensor([0, len(ids_T)], dtype=torch.int32, device=device)
    hidden_TE = decoder.hidden_states(ids_T, torch.arange(len(ids_T), device=device), ends)
    found: list[list[float]] = [[] for _ in targets]
    squares, first = 0.0, len(job.prompt) - 1
    for at in range(0, len(tokens), REFERENCE_ROWS):
        part = slice(at, min(at + REFERENCE_ROWS, len(tokens)))
        logits_RV = decoder.logits(hidden_TE[first + part.start : first + part.stop])
        values_RV = logits_RV.log_softmax(-1)
        for each, values in zip(targets, found, strict=True):
            ids_R1 = torch.tensor(each[part], device=device)[:, None]
            values += values_RV.gather(1, ids_R1)[:, 0].tolist()
        squares += float(logits_RV.abs().amax(-1).double().pow(2).sum())
    return found, squares


# --- the comparison ------------------------------------------------------------------------------


def bound_of(dtype: torch.dtype, config: DecoderConfig, scale: float, count: int) -> float:
    """How far apart the log-probabilities of two right computations may be, the largest of `count`.

    The residual stream is rounded after each of its 2 * layers sums, then its norm and the logits:
    n = 2 * layers + 2 independent roundings by at most u = eps / 2 of the dtype. Together they make
    relative errors of about sqrt(n) * u in the logits, whose size is `scale`: the root mean
    square of the rows' largest. Products are added up in float32 in orders of their own, which is
    some more of float32's u (`SUMS`). Two computations differ by sqrt(2) of one's error, and the
    largest of `count` normal errors is sqrt(2 * ln(count)) standard deviations. `MARGIN` is for
    tensors inside a layer, and layers that amplify.
    """
    unit = torch.finfo(dtype).eps / 2 + SUMS * torch.finfo(torch.float32).eps / 2
    error = math.sqrt(2 * config.num_layers + 2) * unit * scale
    return MARGIN * math.sqrt(2) * math.sqrt(2 * math.log(max(count, 2))) * error


def differences(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    apart = np.abs(np.array(a) - np.array(b))
    return {"tokens": len(apart), "largest": float(apart.max()), "mean": float(apart.mean())}


def main(args: argparse.Namespace) -> None:
    config = model_config(args, "tiny")
    longest = args.longest_prompt + args.longest_output
    blocks = args.max_num_seqs * -(-longest // BLOCK_SIZE)
    options: dict[str, Any] = {
        "dtype": args.dtype,
        "device": args.device,
        "compile": args.compile,
        "max_model_len": longest,
        "max_num_seqs": args.max_num_seqs,
        "max_num_batched_tokens": args.max_num_batched_tokens,
        "num_cache_blocks": blocks,
        "block_size": BLOCK_SIZE,
        # A prefix computed in one run must not serve the other.
        "enable_prefix_caching": False,
        "progress": False,
        "seed": args.seed,
    }
    if config is None:
        llm = LLM(args.model, **options)
    else:
        context = DecoderConfig.from_hf(config).longest_context
        if longest > context:
            raise ValueError(
                f"--longest-prompt and --longest-output make {longest} tokens, the model's context "
                f"has {context}"
            )
        llm = LLM.from_config(config, weights_seed=args.seed, **options)
    switch = llm.config.rope_switch
    if 0 < switch < longest:
        raise ValueError(
            f"--longest-prompt and --longest-output make {longest} tokens: above {switch} the rope "
            "changes, and serving computes the tokens before with the short one"
        )
    vocab_size = llm.config.vocab_size
    jobs = jobs_of(args.tokens, args.longest_prompt, args.longest_output, vocab_size, args.seed)
    mixed, mixture = serve_mixed(llm.engine, jobs)
    mixture.require()
    alone, strayed = _all_alone(llm.engine, jobs[: args.alone], mixed)
    decoder = widened(llm.engine.runner.model)
    dtype, device, started = llm.dtype, llm.device, llm.compile_status
    del llm

    # Where a request did not run alone, the mixed batch's tokens hold its place.
    tokens = [served.tokens for served in mixed]
    drawn = [served.tokens for served in alone] + tokens[len(alone) :]
    reference, squares = _reference(decoder, jobs, tokens, drawn)
    model = TrainingModel(decoder, dtype=dtype, compile=args.compile)
    trained = [training_logprobs(model, jobs, tokens, each) for each in (tokens, drawn)]
    found = _compare(mixed, alone, trained, reference)
    count = sum(map(len, tokens))
    scale = math.sqrt(squares / count)
    bound = bound_of(dtype, decoder.config, scale, count)
    largest = max(row["largest"] for row in found.values())
    ratio = found["mixed batch - float32"]["mean"] / max(found["training - float32"]["mean"], 1e-30)
    # Not `largest > bound`: a NaN is no agreement.
    agrees = all(row["largest"] <= bound for row in found.values())

    print(
        f"{count:,} tokens of {len(jobs)} requests, up to {mixture.most_running} at once, in "
        f"{mixture.steps:,} steps: {mixture.mixed_steps:,} mixed prompts with decoding, "
        f"{mixture.chunked_prompts} prompts came in chunks, {mixture.joined} requests joined others"
    )
    computed = sum(len(served.tokens) for served in alone)
    print(
        f"alone: {len(alone)} of {len(jobs)} requests, {computed:,} tokens, {strayed} of which it "
        "drew otherwise"
    )
    print()
    rows = [[name, *row.values()] for name, row in found.items()]
    print(table(["difference of log-probabilities", "tokens", "largest", "mean"], rows))
    print(
        f"\nlargest {largest:.3g}, bound {bound:.3g}: roundings of {_name(dtype)} through "
        f"{decoder.config.num_layers} layers, logits of {scale:.3g}; "
        f"the engine's mean error against float32 is {ratio:.3g} of training's"
    )
    print_document(
        {
            "command": "compare_logprobs",
            "model": args.shape or args.config or args.model,
            **environment(device),
            "dtype": _name(dtype),
            "compile": args.compile,
            "start": started,
            "requests": len(jobs),
            "tokens": count,
            "mixture": vars(mixture),
            "alone": {"requests": len(alone), "strayed": strayed},
            "logit_scale": scale,
            "bound": bound,
            "engine_error_over_training_error": ratio,
            "agrees": agrees,
            "differences": found,
        }
    )
    if not agrees:
        raise SystemExit(EXIT_RUNTIME)


def _all_alone(
    engine: Engine, jobs: Sequence[Job], mixed: Sequence[Served]
) -> tuple[list[Served], int]:
    found, strayed = [], 0
    with bar(len(jobs), "Alone", "request") as shown:
        for job, served in zip(jobs, mixed, strict=False):
            one, count = serve_alone(engine, job, served.tokens)
            found.append(one)
            strayed += count
            shown.update()
    return found, strayed


def _reference(
    decoder: Decoder,
    jobs: Sequence[Job],
    tokens: Sequence[list[int]],
    drawn: Sequence[list[int]],
) -> tuple[list[list[list[float]]], float]:
    """([of `tokens` and of `drawn`][job], the sum of squares) of `reference_logprobs`."""
    total, found = 0.0, ([], [])
    with bar(len(jobs), "Reference", "request") as shown:
        for job, *targets in zip(jobs, tokens, drawn, strict=True):
            values, squares = reference_logprobs(decoder, job, targets[0], targets)
            for kept, value in zip(found, values, strict=True):
                kept.append(value)
            total += squares
            shown.update()
    return list(found), total


def _compare(
    mixed: Sequence[Served],
    alone: Sequence[Served],
    trained: Sequence[Sequence[list[float]]],
    reference: Sequence[Sequence[list[float]]],
) -> dict[str, dict[str, float]]:
    """`trained` and `reference` have the tokens of the mixed batch and of the requests alone."""

    def flat(lists: Sequence[list[float]]) -> list[float]:
        return [value for values in lists for value in values]

    in_mixed = flat([served.logprobs for served in mixed])
    in_alone = flat([served.logprobs for served in alone])
    trained_mixed, trained_alone = flat(trained[0]), flat(trained[1][: len(alone)])
    wide_mixed, wide_alone = flat(reference[0]), flat(reference[1][: len(alone)])
    pairs = zip(
        in_alone,
        in_mixed,
        (token for served in alone for token in served.tokens),
        (token for served in mixed for token in served.tokens),
        strict=False,  # those alone are the first ones
    )
    same = [(a, m) for a, m, token, other in pairs if token == other]
    return {
        "alone - training": differences(in_alone, trained_alone),
        "mixed batch - training": differences(in_mixed, trained_mixed),
        "alone - mixed batch": differences(*zip(*same, strict=True)),
        "alone - float32": differences(in_alone, wide_alone),
        "mixed batch - float32": differences(in_mixed, wide_mixed),
        "training - float32": differences(trained_mixed, wide_mixed),
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def options() -> argparse.ArgumentParser:
    made = parser("tools.compare_logprobs", __doc__)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument(
        "--compile", default="default", choices=["eager", "default"], help="of both sides"
    )
    work = made.add_argument_group("requests")
    add = work.add_argument
    add("--tokens", type=positive, default=10_000, metavar="N", help="to generate; 10000")
    add(
        "--alone", type=positive, metavar="N",
        help="run only the first N requests alone, where all would take long",
    )  # fmt: skip
    add("--longest-prompt", type=positive, default=600, metavar="N", help="600")
    add("--longest-output", type=positive, default=256, metavar="N", help="256")
    add("--max-num-seqs", type=positive, default=32, metavar="N", help="most at once; 32")
    add(
        "--max-num-batched-tokens", type=positive, default=256, metavar="N",
        help="of a step; longer prompts come in chunks; 256",
    )  # fmt: skip
    return made


if __name__ == "__main__":
    run(options(), main)
