"""The engine on a GPU, with the real kernels, compiled and not."""

from typing import Any

import pytest
import torch

from minigen import LLM, SamplingParams
from minigen.model import Decoder
from tests.gpu_model import NUM_LAYERS, random_prompts, save_random_qwen3

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory) -> str:
    return save_random_qwen3(tmp_path_factory.mktemp("qwen3"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("compile", ["eager", "default"])
def test_log_probabilities_agree_with_float64(qwen3: str, dtype: str, compile: str) -> None:
    options: Any = {"num_cache_blocks": 2048, "max_num_seqs": 8}
    llm = LLM(qwen3, dtype=dtype, compile=compile, progress=False, **options)
    assert llm.compile_status in ("eager", "ready")
    many = random_prompts([1, 2, 17, 64, 300, 1023])
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logprobs=0)
    outputs = llm.generate(many, params, progress=False)
    reference = Decoder.from_pretrained(qwen3, dtype=torch.float32, device="cuda", progress=False)
    # Activations are rounded to `dtype` about ten times a layer; errors add up like a random walk.
    tolerance = 4 * torch.finfo(getattr(torch, dtype)).eps * (10 * NUM_LAYERS) ** 0.5
    for prompt, output in zip(many, outputs, strict=True):
        ids = output.outputs[0].token_ids
        assert len(ids) == 40
        text = torch.tensor([*prompt, *ids], device="cuda")
        offsets = torch.tensor([0, len(text)], device="cuda")
        with torch.no_grad():
            logits = reference(torch.nested.nested_tensor_from_jagged(text, offsets)).values()
        logits = logits[len(prompt) - 1 : -1].log_softmax(-1)
        for at, (token, entry) in enumerate(
            zip(ids, output.outputs[0].logprobs or [], strict=True)
        ):
            assert entry[token].logprob == pytest.approx(float(logits[at, token]), abs=tolerance)
            assert float(logits[at].max() - logits[at, token]) < 2 * tolerance


def test_a_crowd_and_a_cache_too_small(qwen3: str) -> None:
    small = LLM(qwen3, compile="default", num_cache_blocks=96, max_model_len=1024, progress=False)
    roomy = LLM(qwen3, compile="eager", num_cache_blocks=4096, max_model_len=1024, progress=False)
    many = random_prompts([100 + 13 * i for i in range(40)])
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, logprobs=1)
    crowded = small.generate(many, params, progress=False)
    assert small.engine.stats.num_preemptions > 0
    for a, b in zip(crowded, roomy.generate(many, params, progress=False), strict=True):
        left, right = a.outputs[0], b.outputs[0]
        same = next((i for i in range(30) if left.token_ids[i] != right.token_ids[i]), 30)
        # Up to the first token that differs, they were as likely; there, the two were a near tie.
        for i in range(min(same + 1, 30)):
            assert left.logprobs is not None
            assert right.logprobs is not None
            one = left.logprobs[i][left.token_ids[i]].logprob
            other = right.logprobs[i][right.token_ids[i]].logprob
            assert one == pytest.approx(other, abs=0.25)


@pytest.fixture(scope="module")
def replayed_and_launched(qwen3: str) -> tuple[LLM, LLM]:
    options: Any = {"num_cache_blocks": 1024, "max_num_seqs": 17, "max_model_len": 512}
    options |= {"compile": "default", "enable_prefix_caching": False, "progress": False}
    return LLM(qwen3, **options), LLM(qwen3, decode_graphs=False, **options)


@pytest.mark.parametrize("count", [1, 2, 3, 8, 9, 16, 17])
def test_replayed_steps_agree_with_launched_ones(
    replayed_and_launched: tuple[LLM, LLM], count: int
) -> None:
    """Same batch, same kernels, other shapes: the numbers differ by rounding, so near ties may."""
    replayed, launched = replayed_and_launched
    assert replayed._runner._graphs is not None
    many = random_prompts([5 + 11 * i for i in range(count)])
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logprobs=1)
    pairs = zip(
        replayed.generate(many, params, progress=False),
        launched.generate(many, params, progress=False),
        strict=True,
    )
    assert replayed._runner._graphs is not None, "a capture failed: see the warning"
    for a, b in pairs:
        left, right = a.outputs[0], b.outputs[0]
        same = next((i for i in range(40) if left.token_ids[i] != right.token_ids[i]), 40)
        assert left.logprobs is not None
        assert right.logprobs is not None
        for i in range(min(same + 1, 40)):
            one = left.logprobs[i][left.token_ids[i]].logprob
            other = right.logprobs[i][right.token_ids[i]].logprob
            assert one == pytest.approx(other, abs=0.25)


def test_seeded_draws_do_not_change_with_neighbours(qwen3: str) -> None:
    """Same batch shape, other contents: bitwise the same tokens and log-probabilities."""
    # Without prefixes of the first call, which would leave the second one fewer tokens to compute.
    options: Any = {"num_cache_blocks": 1024, "max_num_seqs": 4, "enable_prefix_caching": False}
    llm = LLM(qwen3, compile="default", progress=False, **options)
    params = SamplingParams(seed=5, max_tokens=30, ignore_eos=True, logprobs=0)
    mine, *others = random_prompts([50, 60, 70, 80])
    strangers = [[token // 2 + 1 for token in prompt] for prompt in others]
    first, second = (
        llm.generate([mine, *rest], params, progress=False)[0].outputs[0]
        for rest in (others, strangers)
    )
    assert first.token_ids == second.token_ids
    assert first.cumulative_logprob == second.cumulative_logprob


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("compile", ["eager", "default"])
def test_a_gpu_that_is_not_the_current_one(qwen3: str, compile: str) -> None:
    """Results are read when its stream has written them, not the current GPU's."""
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    many, found = random_prompts([1, 2, 17, 64, 300, 1023]), []
    for device in ("cuda:0", "cuda:1"):
        options: Any = {"num_cache_blocks": 2048, "max_num_seqs": 8}
        llm = LLM(qwen3, device=device, compile=compile, progress=False, **options)
        outputs = llm.generate(many, params, progress=False)
        found.append([output.outputs[0].token_ids for output in outputs])
        del llm
    assert torch.cuda.current_device() == 0
    assert found[0] == found[1]
