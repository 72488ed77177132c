"""`LLM`: a model directory in, texts out. The engine below it does the work."""

import itertools
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from minigen.cache import BlockPool
from minigen.engine import Engine, is_integer, items_of
from minigen.model import DTYPES, Decoder, DecoderConfig
from minigen.outputs import RequestOutput
from minigen.runner import Runner, check_compile_mode
from minigen.sampling_params import SamplingParams
from minigen.scheduler import Scheduler
from minigen.start import compiler_imported
from minigen.ticking import ticking
from minigen.weights.checkpoint import read_generation_config
from minigen.weights.hub import resolve_model
from minigen.weights.tokenizer import Tokenizer

Prompt = str | Sequence[int]
Params = SamplingParams | Sequence[SamplingParams] | None
# What generation_config.json may set; the other fields keep SamplingParams' defaults.
GENERATION_DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class _RandomWeights:
    """What takes a checkpoint's place in `LLM.from_config`."""

    config: Mapping[str, Any]
    seed: int


class LLM:
    """A loaded model.

    Args:
        model: directory in Hugging Face layout, or a hub name; default the bundled model.
        dtype: "auto" (the checkpoint's), a name or a torch dtype.
        device: "auto" (cuda if there is one), "cpu" or "cuda[:n]".
        compile: "eager", "default", "reduce-overhead" or "max-autotune".
        max_model_len: most tokens of a prompt with its output, not above what the model was made
            for; default what model and cache allow.
        max_num_seqs: most sequences that run at once.
        max_num_batched_tokens: most tokens of a step.
        num_cache_blocks: size of the cache in blocks; default from the free memory.
        block_size: tokens of a cache block.
        enable_prefix_caching: keep full blocks for later requests with the same beginning.
        gpu_memory_utilization: share of the GPU's memory that may be used in all.
        decode_graphs: replay steps from CUDA graphs; None: on a GPU with compile "default".
        compile_in_background: serve uncompiled until the compiled step is ready.
        progress: show progress bars.
        seed: for requests without a seed.

    Raises:
        CheckpointError: the checkpoint is broken, or none is found. ValueError: an option or the
            config is wrong.
    """

    def __init__(
        self,
        model: str | Path | _RandomWeights | None = None,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        compile: str = "default",
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 2048,
        num_cache_blocks: int | None = None,
        block_size: int = 16,
        enable_prefix_caching: bool = True,
        gpu_memory_utilization: float = 0.9,
        decode_graphs: bool | None = None,
        compile_in_background: bool = False,
        progress: bool = True,
        seed: int = 0,
    ) -> None:
        check_compile_mode(compile)
        counts = {
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max_num_batched_tokens,
            "num_cache_blocks": num_cache_blocks,
            "block_size": block_size,
        }
        for name, value in counts.items():
            if value is not None and (not is_integer(value) or value < 1):
                raise ValueError(f"{name} is {value!r}: a positive integer is needed")
        if not 0 < gpu_memory_utilization <= 1:
            raise ValueError(
                f"gpu_memory_utilization is {gpu_memory_utilization}: "
                "a share between 0 and 1 is needed"
            )
        self.device = device_of(device)
        # Of a start: "load", "compile" and "capture", in seconds.
        self.start_seconds: dict[str, float] = {}
        began = time.perf_counter()

        def passed(part: str) -> None:
            nonlocal began
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            now = time.perf_counter()
            self.start_seconds[part], began = now - began, now

        # Not in the background: the first reply would wait for it.
        with compiler_imported(compile != "eager" and not compile_in_background):
            decoder = self._load(model, _dtype(dtype), max_model_len, progress)
        self.config, self.dtype = decoder.config, decoder.embed.weight.dtype
        config, wanted = self.config, decoder.max_length
        block_bytes = (
            2 * config.num_layers * block_size * config.num_kv_heads * config.head_dim
        ) * self.dtype.itemsize
        if num_cache_blocks is None:
            reserve = max_num_batched_tokens * (config.hidden_size + config.intermediate_size) * 16
            reserve += max_num_seqs * config.vocab_size * 72  # a draw that sorts takes 63 bytes
            free = _free_memory(self.device, gpu_memory_utilization)
            free -= min(reserve, free // 2)  # a small machine seldom runs max_num_seqs at once
            enough = max_num_seqs * -(-wanted // block_size)
            fitting = max(0, free // block_bytes)
            num_cache_blocks = enough if enough <= fitting else _rounded_down(fitting)
        room = num_cache_blocks * block_size
        if room < 2:
            raise ValueError("there is no memory left for a cache: use a smaller model or dtype")
        if max_model_len is not None and room < max_model_len:
            raise ValueError(
                f"max_model_len {max_model_len} is more than {num_cache_blocks} cache blocks of "
                f"{block_size} tokens hold: give at most {room}"
            )
        self.max_model_len = min(wanted, room)
        if self.max_model_len < wanted:
            warnings.warn(
                f"the cache holds {room} tokens, so the context is {room} of the model's {wanted}",
                stacklevel=2,
            )
        max_num_seqs = min(max_num_seqs, max_num_batched_tokens)
        self._runner = Runner(
            decoder,
            num_blocks=num_cache_blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            compile=compile,
            decode_graphs=decode_graphs,
        )
        scheduler = Scheduler(
            BlockPool(num_cache_blocks, block_size, enable_prefix_caching),
            max_num_seqs,
            max_num_batched_tokens,
            config.rope_switch,
        )
        self.engine = Engine(
            self._runner, scheduler, self.tokenizer, self._eos_ids(), self.max_model_len, seed
        )
        self._ids = itertools.count()
        passed("load")
        if compile != "eager":
            bar = progress and not compile_in_background
            with (
                tqdm(
                    total=1, desc="Compiling", disable=not bar, bar_format="{desc}: {elapsed}"
                ) as b,
                ticking(b),
            ):
                self._runner.start_compiling(compile_in_background)
                b.update()
            if self.compile_status.startswith("failed") and not compile_in_background:
                warnings.warn(
                    f"the step could not be compiled and runs uncompiled ({self.compile_status})",
                    stacklevel=2,
                )
        passed("compile")
        if not compile_in_background and self._runner.num_captures:
            captures = self._runner.capture_steps()
            total = self._runner.num_captures
            for _ in tqdm(captures, desc="Capturing", total=total, disable=not progress):
                pass
        passed("capture")

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], *, weights_seed: int = 0, **options: Any
    ) -> "LLM":
        """Random weights of a `config.json`'s shape, made on the device; prompts are token ids.

        For measuring: no checkpoint is written or read. `options` are those of `LLM`.

        Raises ValueError as `LLM`.
        """
        return cls(_RandomWeights(config, weights_seed), **options)

    def _load(
        self,
        model: str | Path | _RandomWeights | None,
        dtype: torch.dtype | None,
        max_length: int | None,
        progress: bool,
    ) -> Decoder:
        """The decoder; sets what comes with it: path, tokenizer, generation config."""
        self.path: Path | None = None
        self.tokenizer: Tokenizer | None = None
        self._generation: dict[str, Any] = {}
        if isinstance(model, _RandomWeights):
            return Decoder.from_config(
                DecoderConfig.from_hf(dict(model.config)),
                dtype=dtype,
                device=self.device,
                max_length=max_length,
                seed=model.seed,
            )
        self.path = resolve_model(model)
        self._generation = read_generation_config(self.path)
        self.tokenizer = Tokenizer.from_dir(self.path)
        return Decoder.from_pretrained(
            self.path, dtype=dtype, device=self.device, max_length=max_length, progress=progress
        )

    @property
    def compile_status(self) -> str:
        """ "eager", "compiling", "ready" or "failed: why"."""
        return self._runner.compile_status

    def _eos_ids(self) -> list[int]:
        found = self._generation.get("eos_token_id")
        if found is None:
            found = list(self.config.eos_token_ids)
        ids = list(found) if isinstance(found, list) else [found]
        # The configs of many chat models name the end of a document, the tokenizer that of a turn.
        if self.tokenizer and self.tokenizer.eos_token_id not in (None, *ids):
            ids.append(self.tokenizer.eos_token_id)
        # Reading the configs has warned of ids outside the vocabulary.
        return [i for i in ids if isinstance(i, int) and 0 <= i < self.config.vocab_size]

    def default_params(self, **overrides: Any) -> SamplingParams:
        """Sampling parameters as the model's authors recommend, with `overrides` on top.

        Raises ValueError, naming the file if the wrong value comes from there.
        """
        given, file = self._generation, (self.path or Path()) / "generation_config.json"
        values = {k: given[k] for k in GENERATION_DEFAULTS if given.get(k) is not None}
        if given.get("do_sample") is False:
            # Greedy; a penalty applies all the same, filters where a temperature is asked for.
            values["temperature"] = 0.0
        values = {name: value for name, value in values.items() if name not in overrides}
        try:
            SamplingParams(**values)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        return SamplingParams(**{**values, **overrides})

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: Params = None, progress: bool = True
    ) -> list[RequestOutput]:
        """Continues every prompt (text or token ids) -> results in the order given.

        Raises ValueError, naming the prompt, before anything runs.
        """
        many = _as_list(prompts)
        every = self._params_for(params, len(many))
        requests = zip(many, every, strict=True)
        adds = [partial(self.engine.add_request, prompt=p, params=one) for p, one in requests]
        return self._serve(adds, progress)

    def chat(
        self, conversations: Sequence[Any], params: Params = None, progress: bool = True
    ) -> list[RequestOutput]:
        """Replies to conversations, each a list of {"role", "content"} messages, or to one."""
        if self.tokenizer is None or not self.tokenizer.has_chat_template:
            raise ValueError("this model has no chat template: use generate with a prompt")
        if isinstance(conversations, Mapping):
            raise ValueError("conversations must be a list of messages, not one message")
        if conversations and isinstance(conversations[0], dict):
            conversations = [conversations]
        prompts = [self.tokenizer.chat_tokens(list(messages)) for messages in conversations]
        return self.generate(prompts, params, progress)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[str]:
        """Pieces of the continuation as they come; joined they are `.text`."""
        params = self._params_for(params, 1)[0]
        if params.n != 1:
            raise ValueError(f"n is {params.n}: a stream has one continuation")
        request_id = self._new_id()
        self.engine.add_request(request_id, prompt, params)
        pieces = self._pieces(request_id)
        next(pieces)  # from here on, whoever drops the stream ends the request
        return pieces

    def _pieces(self, request_id: str) -> Iterator[str]:
        shown, finished = 0, False
        try:
            yield ""
            while not finished:
                for output in self.engine.step(only=[request_id]):
                    text, finished = output.outputs[0].text, output.finished
                    if len(text) > shown:
                        yield text[shown:]
                        shown = len(text)
        finally:
            if not finished:
                self._drop([request_id])

    def score(
        self, prompts: Prompt | Sequence[Prompt], progress: bool = True
    ) -> list[list[float | None]]:
        """The natural log-probability of every token of every prompt; None for each first one."""
        adds = [partial(self.engine.add_scoring, prompt=p) for p in _as_list(prompts)]
        outputs = self._serve(adds, progress)
        scores: list[list[float | None]] = []
        for output in outputs:
            found = zip(output.prompt_token_ids, output.prompt_logprobs or [], strict=True)
            scores.append(
                [None if entry is None else entry[token].logprob for token, entry in found]
            )
        return scores

    def _serve(self, adds: Sequence[Callable[[str], None]], progress: bool) -> list[RequestOutput]:
        """Queues a request by each of `adds`, which take its id, and runs until all have finished.

        Whatever ends it early, none of them stays in the engine.
        """
        ids: list[str] = []
        done: dict[str, RequestOutput] = {}
        try:
            for i, add in enumerate(adds):
                request_id = self._new_id()
                try:
                    add(request_id)
                except ValueError as error:
                    raise ValueError(f"prompt {i}: {error}") from None
                ids.append(request_id)
            waiting = set(ids)
            with tqdm(total=len(ids), desc="Requests", disable=not progress, delay=2) as bar:
                while waiting:
                    for output in self.engine.step(only=waiting, only_finished=True):
                        waiting.remove(output.request_id)
                        done[output.request_id] = output
                        bar.update()
        except BaseException:
            self._drop(ids)
            raise
        return [done[request_id] for request_id in ids]

    def _drop(self, ids: Sequence[str]) -> None:
        for request_id in ids:
            try:
                self.engine.abort(request_id)
            except ValueError:
                continue  # it had finished

    def _new_id(self) -> str:
        return f"llm-{next(self._ids)}"

    def _params_for(self, params: Params, count: int) -> list[SamplingParams]:
        if params is None:
            return [self.default_params()] * count
        if isinstance(params, SamplingParams):
            return [params] * count
        if not isinstance(params, Sequence) or not all(
            isinstance(one, SamplingParams) for one in params
        ):
            raise ValueError(
                "params must be SamplingParams or a list of them: SamplingParams(temperature=0)"
            )
        if len(params) != count:
            raise ValueError(
                f"params has {len(params)} entries for {count} prompts: give one or all"
            )
        return list(params)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    items = items_of(prompts, "prompts must be a text, token ids or a list of them")
    return [items] if items and all(hasattr(item, "__index__") for item in items) else items


def device_of(device: str | torch.device) -> torch.device:
    """The device that "auto", "cpu" or "cuda[:n]" names. Raises ValueError."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f'device {device!r} is unknown: use "auto", "cpu" or "cuda"') from None
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f'device {device!r} is not supported: use "auto", "cpu" or "cuda"')
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError('device "cuda" was asked for, but torch finds no GPU: use "cpu"')
    return found


def _dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """None for "auto": the checkpoint says."""
    if dtype == "auto":
        return None
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    if dtype in DTYPES:
        return DTYPES[str(dtype)]
    raise ValueError(f"dtype {dtype!r} is unknown: use auto, {', '.join(DTYPES)}")


def _rounded_down(count: int) -> int:
    """To five binary digits, 3 % at most: the compiled step holds the number of blocks, and free
    memory is never twice the same, but the next start shall find the step in the compile cache."""
    unit = 1 << max(count.bit_length() - 5, 0)
    return count // unit * unit


def _free_memory(device: torch.device, utilization: float) -> int:
    """Bytes that the cache may take."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(free - (1 - utilization) * total)
    # A quarter of what is free: on a CPU the memory is shared with everything else.
    free_bytes = free_host_memory()
    if free_bytes is not None:
        return free_bytes // 4
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 8


def free_host_memory() -> int | None:
    """Bytes that the system would give out; None where it does not say (Linux does)."""
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
