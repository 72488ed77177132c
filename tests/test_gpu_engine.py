"""The engine on a GPU, with the real kernels, compiled and not."""

import time
from typing import Any

import pytest
import torch

from minigen import LLM, SamplingParams
from minigen.model import Decoder
from tools.bench_decode import SHAPES

pytestmark = pytest.mark.gpu
# In one process, because they share what torch has compiled. The others compile for themselves, and
# run beside these.
shares_compiled = pytest.mark.xdist_group("engine")

# Every width of the real model; of its 28 layers only so many, because each is compiled anew.
SHAPE = {**SHAPES["qwen3-0.6b"], "num_hidden_layers": 4}
MODEL_TYPE = SHAPE.pop("model_type")


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory) -> str:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(MODEL_TYPE, **SHAPE)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    path = tmp_path_factory.mktemp("qwen3")
    model.save_pretrained(path)
    return str(path)


def _prompts(lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 150000, (n,), generator=generator).tolist() for n in lengths]


@shares_compiled
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("compile", ["eager", "default"])
def test_log_probabilities_agree_with_float64(qwen3: str, dtype: str, compile: str) -> None:
    options: Any = {"num_cache_blocks": 2048, "max_num_seqs": 8}
    llm = LLM(qwen3, dtype=dtype, compile=compile, progress=False, **options)
    assert llm.compile_status in ("eager", "ready")
    many = _prompts([1, 2, 17, 64, 300, 1023])
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logprobs=0)
    outputs = llm.generate(many, params, progress=False)
    reference = Decoder.from_pretrained(qwen3, dtype=torch.float32, device="cuda", progress=False)
    # Activations are rounded to `dtype` about ten times a layer; errors add up like a random walk.
    tolerance = (
        4 * torch.finfo(getattr(torch, dtype)).eps * (10 * SHAPE["num_hidden_layers"]) ** 0.5
    )
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


@shares_compiled
def test_a_crowd_and_a_cache_too_small(qwen3: str) -> None:
    small = LLM(qwen3, compile="default", num_cache_blocks=96, max_model_len=1024, progress=False)
    roomy = LLM(qwen3, compile="eager", num_cache_blocks=4096, max_model_len=1024, progress=False)
    many = _prompts([100 + 13 * i for i in range(40)])
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


@shares_compiled
@pytest.mark.parametrize("count", [1, 2, 3, 8, 9, 16, 17])
def test_replayed_steps_agree_with_launched_ones(
    replayed_and_launched: tuple[LLM, LLM], count: int
) -> None:
    """Same batch, same kernels, other shapes: the numbers differ by rounding, so near ties may."""
    replayed, launched = replayed_and_launched
    assert replayed._runner._graphs is not None
    many = _prompts([5 + 11 * i for i in range(count)])
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


@shares_compiled
def test_seeded_draws_do_not_change_with_neighbours(qwen3: str) -> None:
    """Same batch shape, other contents: bitwise the same tokens and log-probabilities."""
    # Without prefixes of the first call, which would leave the second one fewer tokens to compute.
    options: Any = {"num_cache_blocks": 1024, "max_num_seqs": 4, "enable_prefix_caching": False}
    llm = LLM(qwen3, compile="default", progress=False, **options)
    params = SamplingParams(seed=5, max_tokens=30, ignore_eos=True, logprobs=0)
    mine, *others = _prompts([50, 60, 70, 80])
    strangers = [[token // 2 + 1 for token in prompt] for prompt in others]
    first, second = (
        llm.generate([mine, *rest], params, progress=False)[0].outputs[0]
        for rest in (others, strangers)
    )
    assert first.token_ids == second.token_ids
    assert first.cumulative_logprob == second.cumulative_logprob


@pytest.mark.parametrize("compile", ["reduce-overhead", "max-autotune"])
def test_torchs_own_graphs_are_used(qwen3: str, compile: str) -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    llm = LLM(qwen3, compile=compile, num_cache_blocks=1024, max_model_len=512, progress=False)
    assert llm.compile_status == "ready"
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    found = llm.generate(_prompts([30, 7]), params, progress=False)
    assert [len(output.outputs[0].token_ids) for output in found] == [20, 20]
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_chat_answers_before_and_after_compiling(qwen3: str) -> None:
    """What chat does: serve at once, compile beside, take over."""
    llm = LLM(
        qwen3, compile="default", compile_in_background=True, num_cache_blocks=1024,
        max_model_len=512, progress=False,
    )  # fmt: skip
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    prompt = _prompts([12])[0]
    first = llm.generate([prompt], params, progress=False)[0].outputs[0].token_ids
    assert len(first) == 5
    deadline = time.monotonic() + 300
    while llm.compile_status == "compiling" and time.monotonic() < deadline:
        assert len(llm.generate([prompt], params, progress=False)[0].outputs[0].token_ids) == 5
    assert llm.compile_status == "ready"
    assert len(llm.generate([prompt], params, progress=False)[0].outputs[0].token_ids) == 5
