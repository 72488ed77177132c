"""Other ways to compile the engine on a GPU: torch's own graphs, and beside the first answers.

A file of their own, because they compile for themselves: pytest-xdist runs files beside each other.
"""

import time

import pytest

from minigen import LLM, SamplingParams
from tests.gpu_model import random_prompts, save_random_qwen3

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory) -> str:
    return save_random_qwen3(tmp_path_factory.mktemp("qwen3"))


@pytest.mark.parametrize("compile", ["reduce-overhead", "max-autotune"])
def test_torchs_own_graphs_are_used(qwen3: str, compile: str) -> None:
    from torch._dynamo.utils import counters
    from torch._inductor import config

    counters.clear()
    # Two templates a matrix product, where "max-autotune" compiles and times twenty: 90 s of it.
    with config.patch({"test_configs.max_mm_configs": 2}):
        llm = LLM(qwen3, compile=compile, num_cache_blocks=1024, max_model_len=512, progress=False)
    assert llm.compile_status == "ready"
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    found = llm.generate(random_prompts([30, 7]), params, progress=False)
    assert [len(output.outputs[0].token_ids) for output in found] == [20, 20]
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_chat_answers_before_and_after_compiling(qwen3: str) -> None:
    """What chat does: serve at once, compile beside, take over."""
    llm = LLM(
        qwen3, compile="default", compile_in_background=True, num_cache_blocks=1024,
        max_model_len=512, progress=False,
    )  # fmt: skip
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    prompt = random_prompts([12])[0]
    first = llm.generate([prompt], params, progress=False)[0].outputs[0].token_ids
    assert len(first) == 5
    deadline = time.monotonic() + 300
    while llm.compile_status == "compiling" and time.monotonic() < deadline:
        assert len(llm.generate([prompt], params, progress=False)[0].outputs[0].token_ids) == 5
    assert llm.compile_status == "ready"
    assert len(llm.generate([prompt], params, progress=False)[0].outputs[0].token_ids) == 5
