"""What a request gives back, in vLLM's shape."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Logprob:
    """One token's natural log-probability under the model, before temperature and penalties."""

    logprob: float
    rank: int  # 1 = the most likely token of the vocabulary
    decoded_token: str | None  # None where the model has no tokenizer


@dataclass
class CompletionOutput:
    """One of a request's `n` samples. `text` and `token_ids` only grow between steps.

    `text` is up to date when the step has told of its request.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None  # "stop", "length" or "abort"
    stop_reason: int | str | None = None  # the stop token id or stop string; None for eos


@dataclass
class RequestMetrics:
    """Times are `time.perf_counter()` seconds; `num_cached_tokens` were reused, not computed."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None
    num_cached_tokens: int | None = None


@dataclass
class RequestOutput:
    """A request as it stands after a step. One that goes on has the same after each."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
