"""`python -m tools.bench_host`: the host's time of a step, with the model left out.

The engine schedules, writes and reads its steps as ever, a step in flight while the next one is
made ready; in place of the decoder and its graphs stand tensors that never change. What is left is
what Python does between two launches. Rows: decode steps by batch size, the largest one again with
requests that wait, and again beside a prompt that fills the step's budget. The median step in µs;
the last line is one JSON document.
"""

import argparse
import time
from statistics import median
from typing import Any

import torch

from minigen import LLM, SamplingParams
from minigen.cli import positive
from minigen.graphs import HIDDEN
from minigen.measure import device_name, synchronize
from minigen.report import bar, print_document, table
from minigen.sampling_rows import SamplingTensors
from minigen.step import StepSize
from tools.common import model_config, parser, run, tokens_of

WARM_STEPS = 20


def without_model(llm: LLM) -> LLM:
    """The same engine, whose steps compute nothing."""
    runner, width = llm.engine.runner, llm.config.hidden_size
    drawn_R = torch.full((runner.max_num_seqs + 2,), 7, device=llm.device)
    hidden_TE = torch.zeros(runner.max_tokens + 2, width, dtype=llm.dtype, device=llm.device)

    def replay(size: StepSize, sampling: SamplingTensors | None, head: str) -> torch.Tensor:
        return hidden_TE if head == HIDDEN else drawn_R[: size.num_rows]

    runner.serve_by(
        hidden=lambda tokens_T, *_: hidden_TE[: len(tokens_T)],
        head=lambda hidden_TE, last_R, *_: drawn_R[: len(last_R)],
        replay=replay,
    )
    llm.engine.overlap = True
    return llm


def step_us(args: argparse.Namespace, batch: int, waiting: int = 0, mixed: bool = False) -> float:
    """The median of `--steps` steps that decode `batch` sequences."""
    config = model_config(args, "tiny")
    if config is None:
        raise ValueError("no weights are used: give --shape or --config in place of --model")
    num_steps, budget = args.steps + WARM_STEPS, args.max_num_batched_tokens
    # The first sequences decode while the others' prompts are computed, and none may end early.
    prefills = -(-batch * args.input_len // (budget - batch)) + 2
    length = args.input_len + prefills + num_steps
    num_seqs = batch + 2 * mixed  # a prompt's row is free again a step later
    blocks = batch * -(-length // args.block_size) + (2 * mixed + 1) * -(-budget // args.block_size)
    llm = without_model(
        LLM.from_config(
            config,
            dtype=args.dtype,
            device=args.device,
            compile="eager",
            max_num_seqs=num_seqs,
            max_num_batched_tokens=max(budget, num_seqs),
            num_cache_blocks=blocks,
            block_size=args.block_size,
            max_model_len=max(length, budget),
            decode_graphs=True,
            progress=False,
        )
    )
    vocab_size, engine = llm.config.vocab_size, llm.engine
    params = SamplingParams(
        temperature=args.temperature, max_tokens=length - args.input_len, ignore_eos=True
    )
    prompts = tokens_of([args.input_len] * (batch + waiting), vocab_size, args.seed)
    for i, prompt in enumerate(prompts[:batch]):
        engine.add_request(f"decode-{i}", prompt, params)
    while any(s.num_computed < s.num_prompt for s in engine.scheduler.running) or (
        len(engine.scheduler.running) < batch
    ):
        engine.step()
    for i, prompt in enumerate(prompts[batch:]):
        engine.add_request(f"waiting-{i}", prompt, params)
    if mixed:
        rest = tokens_of([budget - batch] * num_steps, vocab_size, args.seed + 1)
        for i, prompt in enumerate(rest):
            engine.add_request(f"prompt-{i}", prompt, SamplingParams(temperature=0, max_tokens=1))
    spans = []
    for _ in range(num_steps):
        start = time.perf_counter()
        engine.step()
        spans.append(time.perf_counter() - start)
        synchronize(llm.device)
    assert sum(s.max_length == length for s in engine.scheduler.running) == batch
    return 1e6 * median(spans[WARM_STEPS:])


def main(args: argparse.Namespace) -> None:
    most = max(args.batch_size)
    if most >= args.max_num_batched_tokens:
        raise ValueError(
            f"--batch-size {most} leaves no room for a prompt: raise --max-num-batched-tokens "
            f"{args.max_num_batched_tokens} above it"
        )
    wanted = [("decode", batch, 0) for batch in args.batch_size]
    wanted += [("decode", most, args.waiting), ("mixed", most, 0)]
    rows: list[dict[str, Any]] = []
    with bar(len(wanted), "Rows", "row") as shown:
        for step, batch, waiting in wanted:
            us = step_us(args, batch, waiting, mixed=step == "mixed")
            rows.append({"step": step, "batch": batch, "waiting": waiting, "us": us})
            shown.update()
    print(table(["step", "batch", "waiting", "µs"], [list(row.values()) for row in rows]))
    device = device_name(torch.device("cuda" if args.device == "auto" else args.device))
    print_document({"device": device, "torch": torch.__version__, "rows": rows})


def options() -> argparse.ArgumentParser:
    made = parser("tools.bench_host", __doc__)
    made.set_defaults(device="cpu")
    sizes = [1, 8, 32, 128, 256]
    made.add_argument("--batch-size", type=positive, nargs="+", default=sizes, metavar="N")
    made.add_argument(
        "--waiting", type=positive, default=10_000, metavar="N", help="requests in a row"
    )
    made.add_argument("--input-len", type=positive, default=512, metavar="N", help="of each prompt")
    made.add_argument("--steps", type=positive, default=200, metavar="N", help="that are timed")
    made.add_argument("--temperature", type=float, default=0.0, metavar="T")
    made.add_argument("--max-num-batched-tokens", type=positive, default=2048, metavar="N")
    made.add_argument("--block-size", type=positive, default=16, metavar="N")
    return made


if __name__ == "__main__":
    run(options(), main)
