"""minigen: language models on one flat batch. `from minigen import LLM, SamplingParams`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minigen.llm import LLM
    from minigen.sampling_params import SamplingParams

__all__ = ["LLM", "SamplingParams"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Loaded when asked for: `python -m minigen --help` need not wait for torch.
    if name == "LLM":
        from minigen.llm import LLM

        return LLM
    if name == "SamplingParams":
        from minigen.sampling_params import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'minigen' has no attribute {name!r}")
