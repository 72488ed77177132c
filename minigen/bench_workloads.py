"""The workloads of `python -m minigen bench` over one LLM, and what each reports."""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

from minigen import workloads
from minigen.llm import LLM
from minigen.measure import (
    PERCENTILES,
    Cost,
    Limits,
    StepMeter,
    percentile,
    percentiles,
    step_report,
)
from minigen.outputs import RequestOutput
from minigen.report import bar
from minigen.sampling_params import SamplingParams
from minigen.workloads import Request

NANO_TEMPERATURE = 0.6


class _Progress:
    """Requests on their way through the engine, by their latest output."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = requests
        self.outputs: dict[int, RequestOutput] = {}
        self.num_finished = 0

    def take(self, outputs: Sequence[RequestOutput]) -> None:
        for output in outputs:
            self.outputs[int(output.request_id)] = output
            self.num_finished += output.finished

    def lengths(self) -> list[int]:
        """Output tokens of each request so far."""
        return [
            len(self.outputs[i].outputs[0].token_ids) if i in self.outputs else 0
            for i in range(len(self.requests))
        ]


def _params(request: Request, temperature: float, seed: int) -> SamplingParams:
    return SamplingParams(
        temperature=temperature, max_tokens=request.max_tokens, ignore_eos=True, seed=seed
    )


def serve(
    llm: LLM,
    requests: Sequence[Request],
    temperature: float,
    watch: Callable[[StepMeter, _Progress], None] | None = None,
    what: str = "Warm-up",
) -> tuple[StepMeter, _Progress]:
    """All requests at once, to their end; `watch` sees every step."""
    for i, request in enumerate(requests):
        llm.engine.add_request(str(i), request.prompt, _params(request, temperature, i))
    meter, progress = StepMeter(llm.engine), _Progress(requests)
    with bar(sum(r.max_tokens for r in requests), what) as shown:
        while llm.engine.has_unfinished():
            progress.take(meter.step())
            shown.update(meter.steps[-1].output_tokens)
            if watch is not None:
                watch(meter, progress)
    return meter, progress


class Bench:
    """The workloads over one LLM; each returns what the JSON document holds of it.

    Whoever runs them has checked that the requests fit into batch and context.
    """

    def __init__(self, args: argparse.Namespace, llm: LLM, cost: Cost, limits: Limits) -> None:
        self.args, self.llm, self.cost, self.limits = args, llm, cost, limits
        self.vocab_size = llm.config.vocab_size

    def _report(
        self, steps: Sequence[Any], cache_bytes: int, prompts: Sequence[Request] = ()
    ) -> dict[str, Any]:
        flop = sum(self.cost.prompt_flop(len(request.prompt)) for request in prompts)
        return step_report(steps, self.cost, self.limits, cache_bytes, flop)

    def nano(self) -> dict[str, Any]:
        requests = workloads.nano(self.args.num_prompts or workloads.NANO_REQUESTS, self.vocab_size)
        # On a GPU with all prompts: what a kind of step needs at its first time takes long to load.
        warm = requests if self.llm.device.type == "cuda" else requests[:2]
        serve(self.llm, [Request(r.prompt, 4) for r in warm], NANO_TEMPERATURE)
        before = self.llm.engine.stats.num_preemptions
        start = time.perf_counter()
        meter, _ = serve(self.llm, requests, NANO_TEMPERATURE, what="nano")
        seconds = time.perf_counter() - start
        cache = sum(self._decode_bytes(r, 1, r.max_tokens) for r in requests)
        prompt_tokens = sum(len(r.prompt) for r in requests)
        output_tokens = sum(r.max_tokens for r in requests)
        row = {
            "requests": len(requests),
            "seconds": seconds,
            "prompt_tokens": prompt_tokens,
            "output_tokens": output_tokens,
            "output_tokens_s": output_tokens / seconds,
            "total_tokens_s": (prompt_tokens + output_tokens) / seconds,
            "preemptions": self.llm.engine.stats.num_preemptions - before,
            **self._report(meter.steps, cache, requests),
        }
        return {"rows": [row]}

    def fixed(self) -> dict[str, Any]:
        return {"rows": [self._fixed(batch) for batch in self.args.batch_size]}

    def _fixed(self, batch: int) -> dict[str, Any]:
        args, llm = self.args, self.llm
        requests = workloads.fixed(
            batch, args.input_len, args.output_len, self.vocab_size, args.seed
        )
        prompts = [Request(r.prompt, 1) for r in requests]
        serve(llm, [Request(r.prompt, min(4, r.max_tokens)) for r in requests], 0.0)
        start = time.perf_counter()
        prefill, _ = serve(llm, prompts, 0.0, what=f"batch {batch}, prefill")
        prefill_seconds = time.perf_counter() - start

        # Decoding is timed from the step that gave the last first token to the first request's end.
        window: list[tuple[int, list[int]]] = []

        def watch(meter: StepMeter, progress: _Progress) -> None:
            all_began = len(progress.outputs) == len(requests)
            begins = not window and all_began and not progress.num_finished
            if begins or (len(window) == 1 and progress.num_finished):
                window.append((len(meter.steps), progress.lengths()))

        before = llm.engine.stats.num_preemptions
        decode, _ = serve(llm, requests, 0.0, watch, f"batch {batch}, decode")
        if len(window) < 2:
            raise ValueError(
                f"--output-len {args.output_len} is too short at batch {batch}: the first request "
                "ends before the last one's prompt is computed; give more"
            )
        (first, had), (last, have) = window
        steps = decode.steps[first:last]
        cache = sum(
            self._decode_bytes(r, a, b) for r, a, b in zip(requests, had, have, strict=True)
        )
        return {
            "batch": batch,
            "prompt_tokens": sum(len(r.prompt) for r in requests),
            "output_tokens": sum(have) - sum(had),
            "prefill_tokens_s": sum(len(r.prompt) for r in requests) / prefill_seconds,
            "prefill_share_of_limit": self._report(prefill.steps, 0, requests)["share_of_limit"],
            "decode_tokens_s": (sum(have) - sum(had)) / sum(step.seconds for step in steps),
            "preemptions": llm.engine.stats.num_preemptions - before,
            **self._report(steps, cache),
        }

    def trace(
        self, rows: Sequence[workloads.TraceRow], goodput: dict[str, float]
    ) -> dict[str, Any]:
        args, llm = self.args, self.llm
        requests, left_out = workloads.replayed(
            rows, num_requests=args.num_prompts, rate=args.rate, vocab_size=self.vocab_size,
            max_model_len=llm.max_model_len, seed=args.seed,
        )  # fmt: skip
        serve(llm, [Request(requests[0].prompt, min(4, requests[0].max_tokens))], 0.0)
        meter = StepMeter(llm.engine)
        # When each request's tokens came. A request counts from its time in the trace: one that
        # waits because a step is running has waited.
        times: list[list[float]] = [[] for _ in requests]
        added = 0
        start = time.perf_counter()
        with bar(sum(r.max_tokens for r in requests), "trace") as shown:
            while added < len(requests) or llm.engine.has_unfinished():
                now = time.perf_counter() - start
                while added < len(requests) and requests[added].arrival_s <= now:
                    request = requests[added]
                    llm.engine.add_request(str(added), request.prompt, _params(request, 0.0, added))
                    added += 1
                if not llm.engine.has_unfinished():
                    meter.idle()
                    time.sleep(max(0.0, requests[added].arrival_s - now))
                    continue
                outputs = meter.step()
                now = time.perf_counter() - start
                for output in outputs:
                    came = times[int(output.request_id)]
                    came += [now] * (len(output.outputs[0].token_ids) - len(came))
                shown.update(meter.steps[-1].output_tokens)
        seconds = time.perf_counter() - start

        ttft = [came[0] - r.arrival_s for came, r in zip(times, requests, strict=True)]
        e2el = [came[-1] - r.arrival_s for came, r in zip(times, requests, strict=True)]
        tpot = [(came[-1] - came[0]) / max(1, len(came) - 1) for came in times]
        between = [b - a for came in times for a, b in itertools.pairwise(came)]
        kept = {"ttft": ttft, "tpot": tpot, "e2el": e2el}
        good = sum(
            all(kept[name][i] * 1e3 <= limit for name, limit in goodput.items())
            for i in range(len(requests))
        )
        cache = sum(self._decode_bytes(r, 1, r.max_tokens) for r in requests)
        output_tokens = sum(r.max_tokens for r in requests)
        row = {
            "requests": len(requests),
            "left_out": left_out,
            "rate": args.rate if args.rate < float("inf") else "inf",
            "seconds": seconds,
            "prompt_tokens": sum(len(r.prompt) for r in requests),
            "output_tokens": output_tokens,
            "output_tokens_s": output_tokens / seconds,
            "requests_s": len(requests) / seconds,
            "goodput_requests_s": good / seconds,
            "good_requests": good,
            "goodput": goodput,
            "ttft_ms": percentiles(ttft, 1e3),
            "itl_ms": percentiles(between, 1e3),
            "tpot_ms": percentiles(
                [t for t, came in zip(tpot, times, strict=True) if came[1:]], 1e3
            ),
            "e2el_ms": percentiles(e2el, 1e3),
            # Of one request, its waiting included; p99 is the speed that 99 % of them exceed.
            "request_tokens_s": _slow_side([len(c) / e for c, e in zip(times, e2el, strict=True)]),
            **self._report(meter.steps, cache, requests),
        }
        return {"rows": [row]}

    def _decode_bytes(self, request: Request, had: int, have: int) -> int:
        """Cache that the steps read which took a request from `had` output tokens to `have`."""
        context = len(request.prompt)
        return self.cost.decode_bytes(context + had, context + have)


def _slow_side(speeds: Sequence[float]) -> dict[str, float]:
    return {f"p{q}": percentile(speeds, 100 - q) for q in PERCENTILES}
