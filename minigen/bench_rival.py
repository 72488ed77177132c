"""The rival of a benchmark: the same requests through transformers' `generate`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from minigen import workloads
from minigen.bench_workloads import NANO_TEMPERATURE
from minigen.measure import synchronize
from minigen.report import bar
from minigen.start import free_engines
from minigen.weights.hub import resolve_model
from minigen.workloads import Request


def run_rival(
    args: argparse.Namespace,
    config: dict[str, Any] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """The same requests through transformers' generate, padded on the left to the longest."""
    try:
        import transformers
    except ImportError:
        raise ValueError(
            "--rival transformers is not installed: pip install transformers"
        ) from None

    free_engines(device)
    transformers.logging.set_verbosity_error()
    if config is None:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            resolve_model(args.model), dtype=dtype
        )
    else:
        shape = {k: v for k, v in config.items() if k not in ("model_type", "dtype", "torch_dtype")}
        made = transformers.AutoConfig.for_model(config["model_type"], **shape)
        model = transformers.AutoModelForCausalLM.from_config(made, dtype=dtype)
    generate = _Padded(model.eval().to(device), device)
    vocab_size = model.config.vocab_size
    rows = []
    if args.workload == "nano":
        requests = workloads.nano(args.num_prompts or workloads.NANO_REQUESTS, vocab_size)
        generate([Request(r.prompt, 2) for r in requests[:2]], NANO_TEMPERATURE)
        start = time.perf_counter()
        with bar(len(requests), "transformers, nano", "request") as shown:
            for at in range(0, len(requests), args.rival_batch_size):
                batch = requests[at : at + args.rival_batch_size]
                generate(batch, NANO_TEMPERATURE)
                shown.update(len(batch))
        seconds = time.perf_counter() - start
        tokens = sum(r.max_tokens for r in requests)
        rows.append(
            {"requests": len(requests), "seconds": seconds, "output_tokens_s": tokens / seconds}
        )
    else:
        with bar(len(args.batch_size), "transformers, fixed", "batch") as shown:
            for batch in args.batch_size:
                requests = workloads.fixed(
                    batch, args.input_len, args.output_len, vocab_size, args.seed
                )
                rows.append({"batch": batch, **_rival_decode(generate, requests)})
                shown.update()
    return {"name": "transformers", "version": transformers.__version__, "rows": rows}


class _Padded:
    """`model.generate` for requests, every row as long as the longest and for as many tokens."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model, self.device = model, device

    def __call__(self, requests: Sequence[Request], temperature: float) -> float:
        """Runs them -> seconds, the device waited for."""
        longest = max(len(r.prompt) for r in requests)
        count = max(r.max_tokens for r in requests)
        gaps = [longest - len(r.prompt) for r in requests]
        ids = [[0] * gap + r.prompt for gap, r in zip(gaps, requests, strict=True)]
        mask = [[0] * gap + [1] * (longest - gap) for gap in gaps]
        draw = {"do_sample": True, "temperature": temperature} if temperature else {}
        start = time.perf_counter()
        with torch.inference_mode():
            self.model.generate(
                torch.tensor(ids, device=self.device),
                attention_mask=torch.tensor(mask, device=self.device),
                max_new_tokens=count, min_new_tokens=count, pad_token_id=0,
                **({"do_sample": False} | draw),
            )  # fmt: skip
        synchronize(self.device)
        return time.perf_counter() - start


def _rival_decode(
    generate: Callable[[Sequence[Request], float], float], requests: Sequence[Request]
) -> dict[str, float | None]:
    """The time of one new token is taken off the time of all: what is left is decoding.

    None where nothing is left: the two runs differ by more than a few tokens take.
    """
    generate([Request(r.prompt, 2) for r in requests], 0.0)
    first = generate([Request(r.prompt, 1) for r in requests], 0.0)
    whole = generate(requests, 0.0)
    tokens = sum(r.max_tokens - 1 for r in requests)
    return {
        "prefill_tokens_s": sum(len(r.prompt) for r in requests) / first,
        "decode_tokens_s": tokens / (whole - first) if whole > first else None,
    }
