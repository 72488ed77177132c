"""All layers in one native operation: what the separate ones give, whoever shares the batch.

Shapes as in `minigen/model.py`.
"""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from minigen.kernels import native
from minigen.model import Block, Decoder, DecoderConfig, PagedKV, packed_layer
from tests.attention_cases import cu_seqlens


@pytest.fixture(autouse=True)
def native_kernels() -> None:
    native.load()


@dataclass(frozen=True)
class Case:
    """Layers and one step. `kv_lens` count the step's own tokens; 0 is a null row's.

    Layer i has the window where `has_window[i]`, and in one of the families no rope there.
    """

    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    family: str
    num_kv_heads: int
    group: int
    head_dim: int
    width: int
    hidden: int
    window: int
    has_window: tuple[bool, ...]
    has_bias: bool
    dtype: torch.dtype
    seed: int


@st.composite
def layer_cases(draw: st.DrawFn, lengths: st.SearchStrategy[int], most_layers: int = 3) -> Case:
    """One row is the least; 32 are the most that run in one parallel region."""
    q_lens = tuple(draw(st.lists(lengths, min_size=1, max_size=5)))
    before = st.sampled_from([0, 1, 63, 64, 511, 600])
    return Case(
        q_lens=q_lens,
        kv_lens=tuple(0 if n == 0 else n + draw(before) for n in q_lens),
        family=draw(st.sampled_from(["llama", "mistral", "qwen3", "smollm3"])),
        num_kv_heads=draw(st.sampled_from([1, 2, 3])),
        group=draw(st.sampled_from([1, 3])),
        head_dim=draw(st.sampled_from([2, 16, 34, 64])),
        width=draw(st.sampled_from([1, 5, 31, 33, 96])),
        hidden=draw(st.sampled_from([1, 3, 4, 5, 64, 70])),
        window=draw(st.sampled_from([1, 70])),
        has_window=tuple(draw(st.lists(st.booleans(), min_size=1, max_size=most_layers))),
        has_bias=draw(st.booleans()),
        dtype=draw(st.sampled_from(native.DTYPES)),
        seed=draw(st.integers(0, 2**31)),
    )


def make_decoder(case: Case) -> Decoder:
    heads = case.num_kv_heads * case.group
    kinds = [("full_attention", "sliding_attention")[has] for has in case.has_window]
    config = DecoderConfig.from_hf(
        {
            "model_type": case.family, "vocab_size": 8, "hidden_size": case.width,
            "intermediate_size": case.hidden, "num_attention_heads": heads,
            "num_key_value_heads": case.num_kv_heads, "head_dim": case.head_dim,
            "num_hidden_layers": len(kinds), "max_position_embeddings": 2048, "hidden_act": "silu",
            "sliding_window": case.window, "use_sliding_window": True, "layer_types": kinds,
            "attention_bias": case.has_bias, "mlp_bias": case.has_bias,
            "no_rope_layers": [1 - has for has in case.has_window],
        }
    )  # fmt: skip
    decoder = Decoder.from_config(config, dtype=case.dtype, seed=case.seed)
    generator = torch.Generator().manual_seed(case.seed)
    with torch.no_grad():
        for parameter in decoder.parameters():  # sizes that keep each stage near 1
            values = torch.randn(parameter.shape, generator=generator)
            is_matrix = parameter.ndim == 2
            parameter.copy_(values / parameter.shape[-1] ** 0.5 if is_matrix else 1 + values / 4)
    return decoder


Step = tuple[Tensor, Tensor, Tensor, Tensor, PagedKV]


def make_step(case: Case) -> Step:
    """Rows, tables, offsets and caches that hold what came before."""
    generator = torch.Generator().manual_seed(case.seed)
    size = 16
    num_blocks = max(1, *(-(-n // size) for n in case.kv_lens))
    shape = (len(case.kv_lens) * num_blocks, size, case.num_kv_heads, case.head_dim)

    def cache() -> Tensor:
        return torch.randn(shape, generator=generator).to(case.dtype)

    caches = [(cache(), cache()) for _ in case.has_window]
    table_SW = torch.randperm(shape[0], generator=generator).view(-1, num_blocks)
    slots: list[int] = []
    for row, queries, keys in zip(table_SW.tolist(), case.q_lens, case.kv_lens, strict=True):
        slots += [row[i // size] * size + i % size for i in range(keys - queries, keys)]
    slots_T, kv_lens_S = torch.tensor(slots, dtype=torch.int64), torch.tensor(case.kv_lens).int()
    kv = PagedKV(caches, slots_T, kv_lens_S, table_SW.int())
    x_TE = torch.randn(sum(case.q_lens), case.width, generator=generator).to(case.dtype)
    angle_TR = torch.rand(len(x_TE), case.head_dim // 2, generator=generator) * 6.28
    return x_TE, angle_TR.cos(), angle_TR.sin(), cu_seqlens(case.q_lens), kv


def run(decoder: Decoder, step: Step) -> Tensor:
    with torch.no_grad():
        return decoder._in_one_operation(*step)


def run_in_float64(case: Case, step: Step) -> tuple[Tensor, PagedKV]:
    """Layer by layer, in separate operations -> rows and the caches after."""
    x_TE, cos_TR, sin_TR, offsets, kv = step
    x_TE = x_TE.double()
    kv = replace(kv, caches=[(k.double(), v.double()) for k, v in kv.caches])
    with torch.no_grad():
        for i, block in enumerate(make_decoder(case).double().blocks):
            assert isinstance(block, Block)
            x_TE = packed_layer(block, x_TE, cos_TR, sin_TR, offsets, kv.layer(i))
    return x_TE, kv


COUNTS = st.sampled_from([0, 1, 1, 1, 2, 3, 8])


@given(layer_cases(COUNTS, 1) | layer_cases(st.sampled_from([30, 31, 32, 33, 40]), 1))
@example(Case((1,), (1,), "llama", 3, 3, 64, 576, 1536, 1, (False,), False, torch.bfloat16, 0))
@example(Case((1, 1), (600, 0), "qwen3", 1, 2, 16, 64, 100, 1, (False,), False, torch.bfloat16, 1))
def test_a_layer_equals_the_separate_operations_in_float64(case: Case) -> None:
    decoder, step = make_decoder(case), make_step(case)
    assert decoder._is_one_operation(step[0])
    expected_TE, expected = run_in_float64(case, step)
    out_TE = run(decoder, step)
    # Eight roundings follow one another: norm, qkv, rotation, attention, sum, norm, hidden, sum.
    # Each shifts what follows by half an eps of its size, which all stages keep near that of x; a
    # second layer's norm might enlarge it.
    eps = torch.finfo(case.dtype).eps
    scale = 1 + max(x.abs().max().item() for x in (step[0], expected_TE)) if len(out_TE) else 1
    atol = 16 * eps * scale
    torch.testing.assert_close(out_TE.double(), expected_TE, rtol=0, atol=atol)
    for pair, wanted in zip(step[4].caches, expected.caches, strict=True):
        for cache, wanted_cache in zip(pair, wanted, strict=True):
            torch.testing.assert_close(cache.double(), wanted_cache, rtol=0, atol=atol)


@given(layer_cases(st.sampled_from([0, 1, 1, 2, 5])))
def test_a_sequence_is_the_same_alone_and_with_other_threads(case: Case) -> None:
    decoder, num_threads = make_decoder(case), torch.get_num_threads()
    together = run(decoder, make_step(case)).split(case.q_lens)
    begin = 0
    for i, queries in enumerate(case.q_lens):
        x_TE, cos_TR, sin_TR, _, kv = make_step(case)
        mine, begin = slice(begin, begin + queries), begin + queries
        alone = PagedKV(
            kv.caches, kv.slots_T[mine], kv.kv_lens_S[i : i + 1], kv.block_table_SW[i : i + 1]
        )
        try:
            torch.set_num_threads(1 + i % 3)
            offsets = cu_seqlens((queries,))
            out_TE = run(decoder, (x_TE[mine], cos_TR[mine], sin_TR[mine], offsets, alone))
        finally:
            torch.set_num_threads(num_threads)
        assert torch.equal(out_TE, together[i])


PLAIN = Case(
    (1, 2), (5, 7), "qwen3", 2, 3, 16, 24, 20, 4, (True, False), False, torch.float32, 0
)  # fmt: skip


@given(layer_cases(st.sampled_from([0, 1, 2, 11])))
def test_they_equal_one_layer_after_the_other(case: Case) -> None:
    """To the last bit, with the caches: nothing of a layer stays for the next one."""
    decoder, step, other = make_decoder(case), make_step(case), make_step(case)
    out_TE = run(decoder, step)
    x_TE, cos_TR, sin_TR, offsets, kv = other
    blocks, config = list(decoder.blocks), decoder.config
    for i, block in enumerate(blocks):
        decoder.blocks = torch.nn.ModuleList([block])
        decoder.config = replace(config, layer_rope=config.layer_rope[i : i + 1])
        one = replace(kv, caches=kv.caches[i : i + 1])
        x_TE = run(decoder, (x_TE, cos_TR, sin_TR, offsets, one))
    assert torch.equal(out_TE, x_TE)
    for pair, wanted in zip(step[4].caches, kv.caches, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(pair, wanted, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slots_T": torch.tensor([0, 1, 999])}, "slots must be from 0 to"),
        ({"kv_lens_S": torch.tensor([5, 99]).int()}, r"kv_lens\[1\]"),
        ({"block_table_SW": torch.full((2, 2), 77).int()}, r"block_table\[0\]"),
        ({"caches": [(torch.zeros(2, 16, 3, 16),) * 2] * 2}, "qkv must have 3 heads of keys"),
        ({"caches": [(torch.zeros(2, 16, 2, 16),) * 2] * 1}, "must be one for each of 1 layers"),
    ],
)
def test_bad_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    x_TE, cos_TR, sin_TR, offsets, kv = make_step(PLAIN)
    with pytest.raises(ValueError, match=message):
        run(make_decoder(PLAIN), (x_TE, cos_TR, sin_TR, offsets, replace(kv, **changes)))


def test_a_layer_that_is_unlike_the_others_is_refused() -> None:
    decoder, step = make_decoder(PLAIN), make_step(PLAIN)
    shape = step[4].caches[1][1].shape
    step[4].caches[1] = (step[4].caches[1][0], torch.zeros(1, *shape[1:]))
    with pytest.raises(ValueError, match=r"v_cache of layer 1 must be contiguous"):
        run(decoder, step)
    block = decoder.blocks[1]
    assert isinstance(block, Block)
    block.mlp.gate_up_proj.weight = torch.nn.Parameter(torch.ones(39, 24), requires_grad=False)
    with pytest.raises(ValueError, match=r"gate_up of layer 1 must be contiguous \[40, 24\]"):
        run(decoder, make_step(PLAIN))


def test_families_that_need_more_keep_the_separate_operations() -> None:
    decoder, x_TE = make_decoder(PLAIN), torch.ones(3, 24)
    assert decoder._is_one_operation(x_TE)
    assert not decoder.train()._is_one_operation(x_TE)
    decoder.eval()
    for changes in (
        {"activation": "gelu"}, {"post_norms": True}, {"norm_offset": 1.0},
        {"attention_softcap": 50.0},
    ):  # fmt: skip
        other = make_decoder(PLAIN)
        other.config = replace(other.config, **changes)
        assert not other._is_one_operation(x_TE)
    native.unload()
    assert not decoder._is_one_operation(x_TE)


def test_opcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    operation, found = torch.ops.minigen.native_decoder_layers, []

    def recorded(*args: Any) -> Tensor:
        found.append(args)
        return operation(*args)

    with monkeypatch.context() as patched:
        patched.setattr(torch.ops.minigen, "native_decoder_layers", recorded)
        run(make_decoder(PLAIN), make_step(PLAIN))
    torch.library.opcheck(operation.default, *found)
