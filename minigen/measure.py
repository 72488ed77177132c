"""What benchmarks measure with: percentiles, the machine's limits, the time of a step, memory.

Sizes are bytes, times are seconds, rates are a second's.
"""

import contextlib
import ctypes
import gc
import math
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from minigen.engine import Engine
from minigen.model import Decoder, DecoderConfig
from minigen.outputs import RequestOutput

PERCENTILES = (50, 90, 99)


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile, q from 0 to 100, linear between the two nearest of the sorted values.

    Raises ValueError for no values.
    """
    if not values:
        raise ValueError("no values: a percentile needs at least one")
    ordered = sorted(values)
    at = (len(ordered) - 1) * q / 100
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def percentiles(
    values: Sequence[float], factor: float = 1.0, qs: Iterable[int] = PERCENTILES
) -> dict[str, float]:
    """{"p50": ...} of the values times `factor`; empty for no values."""
    return {f"p{q}": percentile(values, q) * factor for q in qs} if values else {}


# --- the machine ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """What this device reaches with nothing else to do."""

    copy_bytes_s: float  # read and written bytes counted
    read_bytes_s: float
    flop_s: float  # of a large matrix product in the model's dtype

    @property
    def bytes_s(self) -> float:
        return max(self.copy_bytes_s, self.read_bytes_s)

    def as_dict(self) -> dict[str, float]:
        return {
            "copy_gb_s": round(self.copy_bytes_s / 1e9, 2),
            "read_gb_s": round(self.read_bytes_s / 1e9, 2),
            "matmul_tflop_s": round(self.flop_s / 1e12, 3),
        }


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(function: Callable[[], Any], device: torch.device, repeats: int = 5) -> float:
    """Median time of a call, the device waited for, after one call that does not count."""
    function()
    return median(spans_of(function, device, repeats))


def spans_of(function: Callable[[], Any], device: torch.device, repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls, the device waited for."""
    spans = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        spans.append(time.perf_counter() - start)
    return spans


@torch.inference_mode()
def measure_limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """Measures a copy and a sum over more than the caches hold, and one large matrix product.

    Takes 2 GiB for a moment on a GPU, 1 GiB elsewhere.
    """
    cuda = device.type == "cuda"
    size = 2**30 if cuda else 2**29
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copy = seconds_of(lambda: target.copy_(source), device)
    read = seconds_of(lambda: source.sum(), device)
    side = 8192 if cuda else 1024
    a = torch.randn(side, side, device=device).to(dtype)
    product = seconds_of(lambda: a @ a, device)
    return Limits(2 * size / copy, size / read, 2 * side**3 / product)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def environment(device: torch.device) -> dict[str, Any]:
    """What a figure depends on beside the code."""
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }


def reset_peak_memory(device: torch.device) -> None:
    """Lets `peak_memory` count from here, where the system can."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError, AttributeError):
        # What has been freed but not given back would hide what is taken next.
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # Linux: the peak becomes what is resident now


def peak_memory(device: torch.device) -> int:
    """On a GPU the most that tensors took; else the most that the process had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    resident = _status_bytes("VmHWM")
    return resident or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def current_memory(device: torch.device) -> int:
    """As `peak_memory`, now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _status_bytes("VmRSS")


def _status_bytes(name: str) -> int:
    """A field of Linux's /proc/self/status; 0 where there is none."""
    try:
        with open("/proc/self/status") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields[name].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 0


# --- the model's work ----------------------------------------------------------------------------


def _sum_of_keys(first: int, last: int, window: int) -> int:
    """Keys read by queries that have first to last - 1 keys, of which a window shows the latest."""
    if last <= first:
        return 0
    whole = min(last, max(first, window)) if window else last
    seen = (whole - first) * (first + whole - 1) // 2
    return seen + (last - whole) * window


@dataclass(frozen=True)
class Cost:
    """Bytes and operations that the model's arithmetic cannot do without."""

    config: DecoderConfig
    weight_bytes: int  # read in every step
    linear_flop: int  # a token, the head left out: it is for few rows
    itemsize: int

    @classmethod
    def of(cls, decoder: Decoder) -> "Cost":
        weight = decoder.embed.weight
        total = sum(p.numel() for p in decoder.parameters())
        # Untied, the embedding is read row by row only.
        read = total if decoder.config.tie_word_embeddings else total - weight.numel()
        head = decoder.lm_head.weight.numel()
        return cls(decoder.config, read * weight.itemsize, 2 * (read - head), weight.itemsize)

    def block_bytes(self, block_size: int) -> int:
        """Of a cache block, all layers, keys and values."""
        config = self.config
        row = config.num_kv_heads * config.head_dim * self.itemsize
        return 2 * config.num_layers * block_size * row

    def decode_bytes(self, first: int, last: int) -> int:
        """Cache read by the steps of a sequence whose contexts go from first to last - 1 keys."""
        row = 2 * self.config.num_kv_heads * self.config.head_dim * self.itemsize
        windows = Counter(self.config.layer_windows)
        return row * sum(n * _sum_of_keys(first, last, w) for w, n in windows.items())

    def prompt_flop(self, length: int) -> int:
        """Attention over a prompt; the linear layers are counted by the step."""
        head = 4 * self.config.num_heads * self.config.head_dim
        windows = Counter(self.config.layer_windows)
        return head * sum(n * _sum_of_keys(1, length + 1, w) for w, n in windows.items())


# --- steps ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One step of the engine.

    `seconds` goes from the end of the step before to its own. `host_seconds` is what the host did:
    scheduling, laying out inputs, reading results, drawing that is not compiled; `launch_seconds`
    went into calling the step's functions, on a CPU their computation; `wait_seconds` into waiting.
    """

    seconds: float
    host_seconds: float
    launch_seconds: float
    wait_seconds: float
    prompt_tokens: int
    output_tokens: int


class StepMeter:
    """Runs an engine's steps and keeps what each took."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.steps: list[Step] = []
        self._counts = self._read()
        self._last: float | None = None

    def step(self) -> list[RequestOutput]:
        start = time.perf_counter()
        outputs = self.engine.step()
        end = time.perf_counter()
        before, now = self._counts, self._read()
        self._counts = now
        launch, wait = now[0] - before[0], now[1] - before[1]
        host = max(0.0, end - start - launch - wait)
        begin = start if self._last is None else self._last
        self.steps.append(
            Step(end - begin, host, launch, wait, now[2] - before[2], now[3] - before[3])
        )
        self._last = end
        return outputs

    def idle(self) -> None:
        """There was nothing to do: the time since the last step belongs to none."""
        self._last = None

    def _read(self) -> tuple[float, float, int, int]:
        stats = self.engine.stats
        return (
            stats.launch_seconds, stats.wait_seconds,
            stats.num_prompt_tokens, stats.num_output_tokens,
        )  # fmt: skip


def step_report(
    steps: Sequence[Step], cost: Cost, limits: Limits, cache_bytes: int, prompt_flop: int = 0
) -> dict[str, Any]:
    """Times of steps in milliseconds, and how near they came to the machine's limit.

    cache_bytes: cache that the decoding rows of all these steps had to read.
    prompt_flop: operations of the attention over the prompts that were computed in them.

    The least time of a step is that of its weights or, if longer, of its linear layers' arithmetic,
    and that of its cache and of its prompts' attention on top.
    """
    if not steps:
        return {}
    total = sum(step.seconds for step in steps)
    least = cache_bytes / limits.bytes_s + prompt_flop / limits.flop_s
    for step in steps:
        tokens = step.prompt_tokens + step.output_tokens
        least += max(cost.weight_bytes / limits.bytes_s, tokens * cost.linear_flop / limits.flop_s)
    read = len(steps) * cost.weight_bytes + cache_bytes
    prompts = [step.seconds for step in steps if step.prompt_tokens]
    others = [step.seconds for step in steps if not step.prompt_tokens]
    kinds = {}
    if prompts and others:  # what a token waits for while prompts are computed, and else
        kinds = {
            "num_prompt_steps": len(prompts),
            "prompt_steps_s": sum(prompts),
            "prompt_step_ms": percentiles(prompts, 1e3),
            "decode_step_ms": percentiles(others, 1e3),
        }
    return {
        "num_steps": len(steps),
        "step_ms": percentiles([step.seconds for step in steps], 1e3),
        "host_ms": percentiles([step.host_seconds for step in steps], 1e3),
        "launch_ms": percentiles([step.launch_seconds for step in steps], 1e3),
        "wait_ms": percentiles([step.wait_seconds for step in steps], 1e3),
        **kinds,
        "gb_s": read / total / 1e9,
        "share_of_limit": least / total,
    }


# --- compilation ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compilations:
    """Counts of this process: graphs that torch traced, and what its compile caches had of them."""

    graphs: int
    cache_hits: int
    cache_misses: int

    @classmethod
    def so_far(cls) -> "Compilations":
        from torch._dynamo.utils import counters

        # Where the outer cache has an entry, the inner one is not asked for a hit.
        outer, inner = counters["aot_autograd"], counters["inductor"]
        return cls(
            counters["stats"]["unique_graphs"],
            outer["autograd_cache_hit"] + inner["fxgraph_cache_hit"],
            outer["autograd_cache_miss"]
            + outer["autograd_cache_bypass"]
            + inner["fxgraph_cache_miss"]
            + inner["fxgraph_cache_bypass"],
        )

    @property
    def start(self) -> str:
        """ "uncompiled", "warm" (all of it was cached) or "cold"."""
        if self.graphs == 0:
            return "uncompiled"
        return "cold" if self.cache_misses else "warm"
