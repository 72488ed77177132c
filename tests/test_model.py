"""The decoder against transformers, sequence by sequence, and against itself, packed and alone.

Shapes: T packed tokens, S sequences, j the jagged dimension, V vocabulary, E width.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minigen import LLM, SamplingParams
from minigen.model import FAMILIES, Decoder, DecoderConfig, offsets_of, rope_frequencies
from minigen.weights.errors import CheckpointError
from tests.reference_models import (
    BY_NAME,
    CASES,
    FULL_CASES,
    SMALL,
    YARN,
    Case,
    as_transformers_4,
    edit_config,
    long_rope,
    random_sequences,
    randomise,
    reference_greedy,
    reference_logits,
)

# Empty and single sequences, both sides of the windows (8, 10) and of long rope's switch (32).
LENGTHS = (1, 0, 8, 9, 32, 33, 70, 0)
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def jagged(sequences: Sequence[Sequence[int]]) -> Tensor:
    tensors = [torch.tensor(tokens, dtype=torch.int64) for tokens in sequences]
    return torch.nested.nested_tensor(tensors, layout=torch.jagged)


def split(packed_Sj: Tensor) -> list[Tensor]:
    return list(packed_Sj.values().split(offsets_of(packed_Sj).diff().tolist()))


def logits_of(decoder: Decoder, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    return split(decoder(jagged(sequences)))


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    assert [x.shape for x in found] == [x.shape for x in expected]
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=tolerance, rtol=0)


def small_decoder(name: str, **options: Any) -> Decoder:
    """The decoder of one case, its weights random, without transformers."""
    case = BY_NAME[name]
    config = DecoderConfig.from_hf({"model_type": case.family, **SMALL, **case.options, **options})
    decoder = Decoder.from_config(config, seed=0)
    randomise(decoder, seed=0)
    return decoder


# ---- against transformers


@by_case
@pytest.mark.parametrize("style", ["as saved", "transformers 4"])
def test_logits_equal_transformers(tmp_path: Path, case: Case, style: str):
    reference = case.build()
    case.save(reference, tmp_path)
    if style == "transformers 4":
        config = as_transformers_4(json.loads((tmp_path / "config.json").read_text()))
        (tmp_path / "config.json").write_text(json.dumps(config))
    sequences = random_sequences(LENGTHS, SMALL["vocab_size"])
    expected = reference_logits(reference, sequences)
    assert max(x.std() for x in expected if len(x)) > 0.5  # logits that differ say something

    decoder = Decoder.from_pretrained(tmp_path, progress=False)

    assert_close(logits_of(decoder, sequences), expected, 1e-4)
    assert (
        decoder.lm_head.weight is decoder.embed.weight or not reference.config.tie_word_embeddings
    )


@pytest.mark.parametrize("case", FULL_CASES, ids=lambda case: case.name)
def test_real_widths_equal_transformers(tmp_path: Path, case: Case):
    reference = case.build()
    case.save(reference, tmp_path)
    sequences = random_sequences((1, 0, 130, 17), 1000)
    expected = reference_logits(reference, sequences)
    del reference
    decoder = Decoder.from_pretrained(tmp_path, max_length=256, progress=False)
    assert_close(logits_of(decoder, sequences), expected, 1e-4)


@by_case
def test_greedy_tokens_equal_transformers(tmp_path: Path, case: Case):
    reference = case.build(seed=1)
    case.save(reference, tmp_path)
    decoder = Decoder.from_pretrained(tmp_path, progress=False)
    prompts = random_sequences((4, 21), SMALL["vocab_size"])  # long rope switches on the way
    expected = [reference_greedy(reference, prompt, 64) for prompt in prompts]

    sequences = [list(prompt) for prompt in prompts]
    for _ in range(64):
        for tokens, logits_TV in zip(sequences, logits_of(decoder, sequences), strict=True):
            tokens.append(int(logits_TV[-1].argmax()))

    assert [s[len(p) :] for s, p in zip(sequences, prompts, strict=True)] == expected

    # Through the paged cache: windows over blocks, chunks of prompts, decode.
    llm = LLM(
        tmp_path, compile="eager", block_size=4, max_num_batched_tokens=16, max_num_seqs=2,
        progress=False,
    )  # fmt: skip
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    outputs = llm.generate([list(map(int, p)) for p in prompts], params, progress=False)
    assert [output.outputs[0].token_ids for output in outputs] == expected


def test_config_is_saved_in_the_words_of_the_installed_transformers(tmp_path: Path):
    """The two styles above are two only if transformers 5 wrote the first."""
    case = BY_NAME["llama3.1"]
    case.save(case.build(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    modern = int(transformers.__version__.split(".")[0]) >= 5
    assert ("rope_parameters" in config) == modern
    assert ("rope_scaling" in config) != modern
    assert ("dtype" in config) == (modern or "torch_dtype" not in config)


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_keys_mean_what_transformers_assumes(family: str):
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    given = {key: 40 if key == "num_hidden_layers" else 4096 for key in sizes}
    given["num_attention_heads"] = 32
    theirs = transformers.AutoConfig.for_model(family, **given)
    ours = DecoderConfig.from_hf({"model_type": family, **given})
    rope = as_transformers_4(theirs.to_dict())

    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 4096 // 32)
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.rope["rope_theta"] == rope["rope_theta"]
    assert ours.activation == getattr(theirs, "hidden_activation", None) or theirs.hidden_act
    assert ours.attention_softcap == (getattr(theirs, "attn_logit_softcapping", None) or 0.0)
    assert ours.logit_softcap == (getattr(theirs, "final_logit_softcapping", None) or 0.0)
    scalar = getattr(theirs, "query_pre_attn_scalar", ours.head_dim)
    assert ours.attention_scale == pytest.approx(scalar**-0.5, rel=1e-12)
    window = getattr(theirs, "sliding_window", None) or 0
    types = getattr(theirs, "layer_types", None)
    sliding = [t == "sliding_attention" for t in types] if types else [bool(window)] * 40
    assert ours.layer_windows == tuple(window if on else 0 for on in sliding)
    flags = getattr(theirs, "no_rope_layers", None) or [1] * 40
    assert ours.layer_rope == tuple(bool(flag) for flag in flags)


def test_phi3_length_outside_its_rope_wins():
    rope = {**long_rope(8), "original_max_position_embeddings": 64}
    for outside in ({}, {"original_max_position_embeddings": 32}):
        options = {**SMALL, "rope_scaling": rope, **outside}
        theirs = transformers.AutoConfig.for_model("phi3", **json.loads(json.dumps(options)))
        ours = DecoderConfig.from_hf({"model_type": "phi3", **options})
        assert ours.rope_switch == theirs.original_max_position_embeddings
        assert ours.rope_switch == outside.get("original_max_position_embeddings", 4096)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama3-biases", "gemma2", "phi3-longrope", "qwen3"])
def test_half_precision_is_near_fp32(tmp_path: Path, name: str, dtype: torch.dtype):
    case = BY_NAME[name]
    reference = case.build()
    case.save(reference, tmp_path)
    sequences = random_sequences((40, 1, 9), SMALL["vocab_size"])
    exact = torch.cat(reference_logits(reference, sequences))

    edit_config(tmp_path, dtype=str(dtype).removeprefix("torch."))
    for decoder in (
        Decoder.from_pretrained(tmp_path, progress=False),
        Decoder.from_pretrained(tmp_path, dtype=dtype, progress=False),
    ):
        assert {p.dtype for p in decoder.parameters()} == {dtype}
        found = decoder(jagged(sequences)).values()
        assert found.dtype == torch.float32
        # Each of some 10 roundings a layer is at most eps / 2 and random: sqrt(30) / 2 of them
        # add up to 3 eps; weights of 1.5 times the neutral size and softmax amplify that.
        error = (found - exact).norm() / exact.norm()
        assert 0 < error < 8 * torch.finfo(dtype).eps


def test_rope_tables_stay_fp32_when_the_model_is_cast():
    decoder = small_decoder("gemma2")
    table = decoder.cos_PR.clone()
    decoder.to(torch.bfloat16)
    assert decoder.lm_head.weight.dtype == torch.bfloat16
    assert decoder.cos_PR.dtype == decoder.sin_PR.dtype == torch.float32
    assert torch.equal(decoder.cos_PR, table)
    assert decoder.embedding_scale == torch.tensor(8.0, dtype=torch.bfloat16)


# ---- packed and alone

PACKED_NAMES = ("llama3-biases", "gemma2", "phi3-longrope-partial", "smollm3-window")


@pytest.fixture(scope="module")
def packed_decoders() -> dict[str, Decoder]:
    return {name: small_decoder(name) for name in PACKED_NAMES}


# fp32's eps, times the logits' size of about 8, times 100 for sums of other order through 3 layers.
PACKED_TOLERANCE = 100 * 8 * torch.finfo(torch.float32).eps


def assert_packed_equals_alone(
    decoder: Decoder, sequences: list[list[int]], packed: list[Tensor]
) -> None:
    alone = [logits_of(decoder, [tokens])[0] for tokens in sequences]
    assert_close(packed, alone, PACKED_TOLERANCE)


lengths_lists = st.lists(
    st.sampled_from([0, 1, 2, 7, 8, 9, 31, 32, 33]) | st.integers(0, 60), min_size=1, max_size=6
)


@given(name=st.sampled_from(PACKED_NAMES), lengths=lengths_lists, seed=st.integers(0, 99))
def test_packed_equals_alone(packed_decoders, name: str, lengths: list[int], seed: int):
    sequences = random_sequences(lengths, SMALL["vocab_size"], seed)
    decoder = packed_decoders[name]
    assert_packed_equals_alone(decoder, sequences, logits_of(decoder, sequences))


@given(
    name=st.sampled_from(PACKED_NAMES),
    lengths=lengths_lists,
    mine=st.integers(0, 5),
    data=st.data(),
)
def test_neighbours_cannot_leak(packed_decoders, name, lengths, mine: int, data):
    mine %= len(lengths)
    sequences = random_sequences(lengths, SMALL["vocab_size"], data.draw(st.integers(0, 99)))
    others = random_sequences(lengths, SMALL["vocab_size"], data.draw(st.integers(100, 199)))
    others[mine] = sequences[mine]
    decoder = packed_decoders[name]
    before, after = (logits_of(decoder, batch)[mine] for batch in (sequences, others))
    assert torch.equal(before, after)


@pytest.mark.parametrize("name", PACKED_NAMES)
def test_wrong_offsets_are_noticed(packed_decoders, name: str):
    """The comparison above fails where one token changes sides."""
    decoder = packed_decoders[name]
    sequences = random_sequences((5, 6, 4), SMALL["vocab_size"])
    tokens_T = torch.tensor([t for tokens in sequences for t in tokens])
    positions_T = torch.cat([torch.arange(n) for n in (5, 6, 4)])

    def packed(cu_seqlens: list[int]) -> list[Tensor]:
        offsets = torch.tensor(cu_seqlens, dtype=torch.int32)
        hidden_TE = decoder.hidden_states(tokens_T, positions_T, offsets)
        return list(decoder.logits(hidden_TE).split([5, 6, 4]))

    assert_packed_equals_alone(decoder, sequences, packed([0, 5, 11, 15]))
    for wrong in ([0, 4, 11, 15], [0, 6, 11, 15], [0, 5, 12, 15], [0, 11, 15], [0, 15]):
        with pytest.raises(AssertionError, match="not close"):
            assert_packed_equals_alone(decoder, sequences, packed(wrong))


@pytest.mark.parametrize("sequences", [[[]], [[], [], []], [[3]], [[], [3]]])
def test_next_to_nothing(packed_decoders, sequences: list[list[int]]):
    for decoder in packed_decoders.values():
        logits_SjV = decoder(jagged(sequences))
        assert [x.shape for x in split(logits_SjV)] == [(len(s), 128) for s in sequences]
        assert logits_SjV.values().isfinite().all()


def test_int32_tokens_and_offsets(packed_decoders):
    decoder = packed_decoders["gemma2"]
    tokens_Sj = torch.nested.nested_tensor_from_jagged(
        torch.tensor([5, 6, 7], dtype=torch.int32), torch.tensor([0, 1, 3], dtype=torch.int32)
    )
    assert_close(split(decoder(tokens_Sj)), logits_of(decoder, [[5], [6, 7]]), 0.0)


@pytest.mark.parametrize("name", ["gemma2", "phi3-longrope-partial"])
def test_traces_without_graph_breaks(packed_decoders, name: str):
    decoder = packed_decoders[name]
    torch._dynamo.reset()
    compiled = torch.compile(decoder.hidden_states, backend="eager", fullgraph=True)
    sequences = random_sequences((5, 6), SMALL["vocab_size"])
    tokens_T = torch.tensor([t for tokens in sequences for t in tokens])
    positions_T = torch.cat([torch.arange(5), torch.arange(6)])
    offsets = torch.tensor([0, 5, 11], dtype=torch.int32)
    hidden_TE = compiled(tokens_T, positions_T, offsets)
    torch.testing.assert_close(hidden_TE, decoder.hidden_states(tokens_T, positions_T, offsets))


# ---- what is refused


def two(ids: Tensor, lengths: Tensor | None = None) -> Tensor:
    """A jagged tensor of the first value and of the other three."""
    return torch.nested.nested_tensor_from_jagged(ids, torch.tensor([0, 1, 4]), lengths=lengths)


IDS = torch.tensor([1, 2, 3, 4])


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (lambda: IDS, r"nested jagged tensor \[S, j\].*dense one \[4\]"),
        (lambda: torch.nested.nested_tensor([IDS, IDS]), "jagged.*strided"),
        (lambda: two(IDS.float()), "float32"),
        (lambda: two(IDS[:, None]), "3 dimensions"),
        (
            lambda: two(IDS, lengths=torch.tensor([1, 2])),
            r"holes.*contiguous\(\)",
        ),
        (lambda: two(IDS - 2), "id -1.*from 0 to 127"),
        (lambda: two(IDS + 124), "id 128.*from 0 to 127"),
        (lambda: jagged([[1] * 20, [1] * 21]), "sequence of 21 tokens.*max_length is 20"),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_forward_refuses(tokens: Callable[[], Tensor], words: str):
    config = DecoderConfig.from_hf({"model_type": "llama", **SMALL})
    decoder = Decoder.from_config(config, max_length=20, seed=0)
    decoder(jagged([[1] * 20, [127]]))
    with pytest.raises(ValueError, match=words):
        decoder(tokens())


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (
            {"intermediate_size": 2_000_000_000},
            CheckpointError,
            "tensor 'model.layers.0.mlp.gate_proj.weight' in .* has shape .*2000000000, 64",
        ),
        ({"vocab_size": 2**31 - 1}, CheckpointError, "tensor 'model.embed_tokens.weight' in"),
        (
            {"hidden_size": 2**31 - 8, "intermediate_size": 2**31 - 1, "head_dim": 16},
            ValueError,
            "config.json: no tensor can have its sizes",
        ),
    ],
)
def test_a_config_larger_than_its_files_takes_no_memory(
    tmp_path: Path, monkeypatch, changes: dict[str, int], error: type[ValueError], words: str
):
    case = BY_NAME["qwen3"]
    case.save(case.build(), tmp_path)
    edit_config(tmp_path, **changes)
    monkeypatch.setattr(Decoder, "to_empty", lambda *_, **__: pytest.fail("memory was taken"))
    with pytest.raises(error, match=words):
        Decoder.from_pretrained(tmp_path, progress=False)


def test_rope_tables_without_memory_name_the_option(monkeypatch):
    def refuse(*_: object) -> Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    config = DecoderConfig.from_hf({"model_type": "llama", **SMALL})
    monkeypatch.setattr(torch, "outer", refuse)
    with pytest.raises(ValueError, match=r"rope tables of 131072 positions take .* max_model_len"):
        Decoder.from_config(config, max_length=131072)


def test_max_length_must_be_positive():
    config = DecoderConfig.from_hf({"model_type": "llama", **SMALL})
    with pytest.raises(ValueError, match="max_length is 0, but must be at least 1"):
        Decoder.from_config(config, max_length=0)


GONE = object()
PHI3_LONG = {"original_max_position_embeddings": 32, "rope_scaling": long_rope(8)}
LINEAR = {"rope_type": "linear"}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0}


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("llama", {"model_type": "mamba"}, "model_type is 'mamba'.*gemma2, llama, mistral, phi3"),
        ("llama", {"model_type": GONE}, "model_type is None"),
        ("llama", {"model_type": ["llama"]}, "model_type"),
        ("llama", {"hidden_size": GONE}, "hidden_size is None.*an integer"),
        ("llama", {"hidden_size": "64"}, "hidden_size is '64'.*an integer"),
        ("llama", {"hidden_size": 64.0}, "hidden_size is 64.0.*an integer"),
        ("llama", {"vocab_size": 0}, "vocab_size is 0"),
        ("llama", {"vocab_size": True}, "vocab_size is True"),
        ("llama", {"intermediate_size": -1}, "intermediate_size is -1"),
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000.*1 to 10000"),
        ("llama", {"num_attention_heads": 5}, "hidden_size 64.*num_attention_heads 5"),
        ("llama", {"num_attention_heads": 5, "head_dim": 8}, "num_key_value_heads 2"),
        ("llama", {"num_key_value_heads": 3}, "num_attention_heads 4.*num_key_value_heads 3"),
        ("llama", {"head_dim": 257}, "head_dim is 257.*1 to 256"),
        ("llama", {"head_dim": 15}, "head_dim is 15.*even"),
        ("llama", {"max_position_embeddings": None, "x": 1}, "max_position_embeddings is None"),
        ("llama", {"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'.*positive number"),
        ("llama", {"rms_norm_eps": math.nan}, "rms_norm_eps is nan"),
        ("llama", {"hidden_act": "relu6"}, "hidden_act is 'relu6'.*silu"),
        ("gemma2", {"hidden_activation": 3}, "hidden_activation is 3"),
        ("gemma2", {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping is -1.0"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0"),
        ("gemma2", {"query_pre_attn_scalar": None}, "query_pre_attn_scalar is None"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'.*true or false"),
        ("llama", {"attention_bias": 1}, "attention_bias is 1.*true or false"),
        ("llama", {"dtype": "float8"}, "dtype is 'float8'.*bfloat16"),
        ("llama", {"torch_dtype": 16}, "torch_dtype is 16.*bfloat16"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama", {"eos_token_id": "</s>"}, "eos_token_id is '</s>'.*token id"),
        ("llama", {"eos_token_id": [2, None]}, "eos_token_id"),
        ("llama", {"bos_token_id": 1.0}, "bos_token_id is 1.0"),
        ("llama", {"rope_scaling": "linear"}, "rope_scaling is 'linear'.*object"),
        ("llama", {"rope_parameters": [1]}, "rope_parameters is"),
        (
            "llama",
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            "rope_parameters.*full_attention.*flat",
        ),
        ("llama", {"rope_scaling": {"type": "dynamic"}}, "type is 'dynamic'.*yarn"),
        ("llama", {"rope_parameters": {"rope_type": 7}}, "rope_type is 7.*yarn"),
        ("llama", {"rope_scaling": LINEAR}, "'linear' needs factor, which rope_scaling lacks"),
        ("llama", {"rope_scaling": {**LINEAR, "factor": "2"}}, "factor is '2'"),
        ("llama", {"rope_scaling": {**LINEAR, "factor": 0.0}}, "factor is 0.0"),
        ("llama", {"rope_scaling": {"rope_type": "yarn"}}, "'yarn' needs factor"),
        ("llama", {"rope_scaling": {**YARN, "beta_fast": -1}}, "beta_fast is -1"),
        ("llama", {"rope_scaling": {**YARN, "truncate": 1}}, "truncate is 1"),
        ("llama", {"rope_scaling": LLAMA3}, "'llama3' needs low_freq_factor"),
        (
            "llama",
            {"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0, "high_freq_factor": 4.0}},
            "high_freq_factor is 4.0.*above low_freq_factor",
        ),
        (
            "llama",
            {"rope_scaling": {**YARN, "original_max_position_embeddings": 4.5}},
            "original_max_position_embeddings is 4.5",
        ),
        ("llama", {"rope_theta": "1e4"}, "rope_theta is '1e4'"),
        ("llama", {"rope_theta": 1}, "rope_theta is 1.*above 1"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5.*1 for llama"),
        ("phi3", {"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5"),
        ("phi3", {"partial_rotary_factor": 0.2}, "head_dim is 16.*not 3"),
        ("phi3", {"rope_scaling": {"type": "su"}}, "short_factor is None.*8 numbers"),
        (
            "phi3",
            {"rope_scaling": {**long_rope(8), "long_factor": [1.0] * 7}},
            "long_factor is .*8 numbers",
        ),
        (
            "phi3",
            {"rope_scaling": {**long_rope(8), "short_factor": [1.0] * 7 + ["1"]}},
            "short_factor is '1'",
        ),
        (
            "phi3",
            {**PHI3_LONG, "original_max_position_embeddings": 1},
            "original_max_position_embeddings is 1.*above 1",
        ),
        ("mistral", {"sliding_window": -1}, "sliding_window is -1"),
        ("mistral", {"sliding_window": 0}, "sliding_window is 0"),
        ("mistral", {"sliding_window": "8"}, "sliding_window is '8'"),
        ("gemma2", {"layer_types": ["full_attention"] * 2}, "layer_types.*num_hidden_layers = 3"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 3}, "layer_types is 'chunked_atten"),
        ("gemma2", {"layer_types": "full_attention"}, "layer_types is 'full_attention'"),
        ("qwen2", {"use_sliding_window": "no"}, "use_sliding_window is 'no'"),
        (
            "qwen2",
            {"use_sliding_window": True, "max_window_layers": -1},
            "max_window_layers is -1",
        ),
        ("smollm3", {"no_rope_layers": [1, 1]}, "no_rope_layers.*num_hidden_layers = 3"),
        ("smollm3", {"no_rope_layers": [1, 1, 2]}, "no_rope_layers.*0s and 1s"),
        ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval is 0"),
    ],
)
def test_config_refuses(family: str, changes: dict[str, Any], words: str):
    good = {"model_type": family, **SMALL, "head_dim": 16}
    DecoderConfig.from_hf(good)
    bad = {key: value for key, value in {**good, **changes}.items() if value is not GONE}
    if "head_dim" not in changes and family != "gemma2":
        del bad["head_dim"]
    with pytest.raises(ValueError, match=words) as caught:
        DecoderConfig.from_hf(bad)
    assert str(caught.value).startswith("config.json: ")
    assert "\n" not in str(caught.value)


def test_token_ids_of_the_config():
    base = {"model_type": "llama", **SMALL}
    for value, expected in ((7, (7,)), ([7, 8], (7, 8)), (None, ()), (-1, ()), ([], ())):
        config = DecoderConfig.from_hf({**base, "eos_token_id": value, "bos_token_id": None})
        assert config.eos_token_ids == expected
        assert config.bos_token_id is None


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 300)
    | st.integers()
    | st.sampled_from([10**400, -(10**400)])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["full_attention", "yarn", "longrope", "llama3", "linear", "float16"]),
    lambda children: (
        st.lists(children, max_size=9) | st.dictionaries(st.text(max_size=5), children, max_size=3)
    ),
    max_leaves=9,
)


@st.composite
def corrupted_configs(draw: st.DrawFn) -> dict[str, Any]:
    """A good config of some case with one key, or one key of its rope, gone or replaced."""
    case = draw(st.sampled_from(CASES))
    config = {"model_type": case.stored_as or case.family, **SMALL, **case.options}
    target = config
    if isinstance(config.get("rope_scaling"), dict) and draw(st.booleans()):
        target = config["rope_scaling"] = dict(config["rope_scaling"])
    else:
        for key in ("hidden_act", "rms_norm_eps", "layer_types", "dtype", "rope_parameters"):
            config.setdefault(key, None)
        config.setdefault("rope_theta", 10000.0)
    key = draw(st.sampled_from(sorted(target)))
    if draw(st.booleans()) and draw(st.booleans()):
        del target[key]
    else:
        target[key] = draw(anything)
    return config


@settings(max_examples=30 * settings().max_examples)  # cheap, and there are many keys
@given(hf=corrupted_configs())
def test_a_corrupted_config_is_refused_or_valid(hf: dict[str, Any]):
    try:
        config = DecoderConfig.from_hf(hf)
    except ValueError as error:
        if not str(error).startswith("config.json: "):
            raise
        return
    assert len(config.layer_windows) == len(config.layer_rope) == config.num_layers
    assert all(window >= 0 for window in config.layer_windows)
    frequencies, scale = rope_frequencies(config)
    assert all(f.shape == (config.rotary_dim // 2,) for f in frequencies)
    assert math.isfinite(scale)
    assert math.isfinite(config.attention_scale)
