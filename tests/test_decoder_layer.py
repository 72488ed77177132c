"""A layer in one native operation: what the separate operations give, whoever shares the batch.

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
from minigen.model import Block, Decoder, DecoderConfig, LayerKV, packed_layer
from tests.attention_cases import cu_seqlens


@pytest.fixture(autouse=True)
def native_kernels() -> None:
    native.load()


@dataclass(frozen=True)
class LayerCase:
    """One layer and one step. `kv_lens` count the step's own tokens; 0 is a null row's."""

    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    family: str
    num_kv_heads: int
    group: int
    head_dim: int
    width: int
    hidden: int
    window: int | None
    has_bias: bool
    dtype: torch.dtype
    seed: int


@st.composite
def layer_cases(draw: st.DrawFn, lengths: st.SearchStrategy[int]) -> LayerCase:
    """One row is the least; 32 are the most that run in one parallel region."""
    q_lens = tuple(draw(st.lists(lengths, min_size=1, max_size=5)))
    before = st.sampled_from([0, 1, 63, 64, 511, 600])
    return LayerCase(
        q_lens=q_lens,
        kv_lens=tuple(0 if n == 0 else n + draw(before) for n in q_lens),
        family=draw(st.sampled_from(["llama", "mistral", "qwen3", "smollm3"])),
        num_kv_heads=draw(st.sampled_from([1, 2, 3])),
        group=draw(st.sampled_from([1, 3])),
        head_dim=draw(st.sampled_from([2, 16, 34, 64])),
        width=draw(st.sampled_from([1, 5, 31, 33, 96])),
        hidden=draw(st.sampled_from([1, 3, 4, 5, 64, 70])),
        window=draw(st.sampled_from([None, 1, 70])),
        has_bias=draw(st.booleans()),
        dtype=draw(st.sampled_from(native.DTYPES)),
        seed=draw(st.integers(0, 2**31)),
    )


def make_block(case: LayerCase) -> Block:
    heads = case.num_kv_heads * case.group
    config = DecoderConfig.from_hf(
        {
            "model_type": case.family, "vocab_size": 8, "hidden_size": case.width,
            "intermediate_size": case.hidden, "num_attention_heads": heads,
            "num_key_value_heads": case.num_kv_heads, "head_dim": case.head_dim,
            "num_hidden_layers": 1, "max_position_embeddings": 2048, "hidden_act": "silu",
            "sliding_window": case.window, "attention_bias": case.has_bias,
            "mlp_bias": case.has_bias, "no_rope_layers": [case.seed % 2],
        }
    )  # fmt: skip
    block = Decoder.from_config(config, dtype=case.dtype, seed=case.seed).blocks[0]
    assert isinstance(block, Block)
    generator = torch.Generator().manual_seed(case.seed)
    with torch.no_grad():
        for parameter in block.parameters():  # sizes that keep each stage near 1
            values = torch.randn(parameter.shape, generator=generator)
            is_matrix = parameter.ndim == 2
            parameter.copy_(values / parameter.shape[-1] ** 0.5 if is_matrix else 1 + values / 4)
    return block


def make_step(case: LayerCase) -> tuple[Tensor, Tensor, Tensor, Tensor, LayerKV]:
    """Rows, tables, offsets and a cache that holds what came before."""
    generator = torch.Generator().manual_seed(case.seed)
    size = 16
    num_blocks = max(1, *(-(-n // size) for n in case.kv_lens))
    shape = (len(case.kv_lens) * num_blocks, size, case.num_kv_heads, case.head_dim)
    k_cache, v_cache = (torch.randn(shape, generator=generator).to(case.dtype) for _ in range(2))
    table_SW = torch.randperm(shape[0], generator=generator).view(-1, num_blocks)
    slots: list[int] = []
    for row, queries, keys in zip(table_SW.tolist(), case.q_lens, case.kv_lens, strict=True):
        slots += [row[i // size] * size + i % size for i in range(keys - queries, keys)]
    slots_T, kv_lens_S = torch.tensor(slots, dtype=torch.int64), torch.tensor(case.kv_lens).int()
    kv = LayerKV(k_cache, v_cache, slots_T, kv_lens_S, table_SW.int())
    x_TE = torch.randn(sum(case.q_lens), case.width, generator=generator).to(case.dtype)
    angle_TR = torch.rand(len(x_TE), case.head_dim // 2, generator=generator) * 6.28
    return x_TE, angle_TR.cos(), angle_TR.sin(), cu_seqlens(case.q_lens), kv


def run(block: Block, step: tuple[Tensor, Tensor, Tensor, Tensor, LayerKV]) -> Tensor:
    with torch.no_grad():
        return packed_layer(block, *step)


def wide(step: tuple[Any, ...]) -> tuple[Any, ...]:
    x_TE, cos_TR, sin_TR, offsets, kv = step
    caches = {name: getattr(kv, name).double() for name in ("k_cache_NBKD", "v_cache_NBKD")}
    return x_TE.double(), cos_TR, sin_TR, offsets, replace(kv, **caches)


COUNTS = st.sampled_from([0, 1, 1, 1, 2, 3, 8])


@given(layer_cases(COUNTS) | layer_cases(st.sampled_from([30, 31, 32, 33, 40])))
@example(LayerCase((1,), (1,), "llama", 3, 3, 64, 576, 1536, None, False, torch.bfloat16, 0))
@example(LayerCase((1, 1), (600, 0), "qwen3", 1, 2, 16, 64, 100, None, False, torch.bfloat16, 1))
def test_a_layer_equals_the_separate_operations_in_float64(case: LayerCase) -> None:
    block, step = make_block(case), make_step(case)
    assert block._is_one_operation(torch.nested.nested_tensor_from_jagged(step[0], step[3]))
    wide_step = wide(step)
    out_TE = run(block, step)
    expected_TE = run(make_block(case).double(), wide_step)
    # Eight roundings follow one another: norm, qkv, rotation, attention, sum, norm, hidden, sum.
    # Each shifts what follows by half an eps of its size, which all stages keep near that of x.
    eps = torch.finfo(case.dtype).eps
    scale = 1 + max(x.abs().max().item() for x in (step[0], expected_TE)) if len(out_TE) else 1
    torch.testing.assert_close(out_TE.double(), expected_TE, rtol=0, atol=16 * eps * scale)
    for name in ("k_cache_NBKD", "v_cache_NBKD"):
        cache, wanted = getattr(step[4], name).double(), getattr(wide_step[4], name)
        torch.testing.assert_close(cache, wanted, rtol=0, atol=16 * eps * scale)


@given(layer_cases(st.sampled_from([0, 1, 1, 2, 5])))
def test_a_sequence_is_the_same_alone_and_with_other_threads(case: LayerCase) -> None:
    block, num_threads = make_block(case), torch.get_num_threads()
    together = run(block, make_step(case)).split(case.q_lens)
    begin = 0
    for i, queries in enumerate(case.q_lens):
        x_TE, cos_TR, sin_TR, _, kv = make_step(case)
        mine, begin = slice(begin, begin + queries), begin + queries
        alone = LayerKV(
            kv.k_cache_NBKD, kv.v_cache_NBKD, kv.slots_T[mine], kv.kv_lens_S[i : i + 1],
            kv.block_table_SW[i : i + 1],
        )  # fmt: skip
        try:
            torch.set_num_threads(1 + i % 3)
            offsets = cu_seqlens((queries,))
            out_TE = run(block, (x_TE[mine], cos_TR[mine], sin_TR[mine], offsets, alone))
        finally:
            torch.set_num_threads(num_threads)
        assert torch.equal(out_TE, together[i])


PLAIN = LayerCase((1, 2), (5, 7), "qwen3", 2, 3, 16, 24, 20, None, False, torch.float32, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slots_T": torch.tensor([0, 1, 999])}, "slots must be from 0 to"),
        ({"kv_lens_S": torch.tensor([5, 99]).int()}, r"kv_lens\[1\]"),
        ({"block_table_SW": torch.full((2, 2), 77).int()}, r"block_table\[0\]"),
        ({"k_cache_NBKD": torch.zeros(2, 16, 3, 16)}, "must have one shape"),
    ],
)
def test_bad_arguments_are_refused(changes: dict[str, Tensor], message: str) -> None:
    x_TE, cos_TR, sin_TR, offsets, kv = make_step(PLAIN)
    with pytest.raises(ValueError, match=message):
        run(make_block(PLAIN), (x_TE, cos_TR, sin_TR, offsets, replace(kv, **changes)))


def test_a_weight_that_does_not_fit_is_refused() -> None:
    block = make_block(PLAIN)
    block.mlp.gate_up_proj.weight = torch.nn.Parameter(torch.ones(39, 24), requires_grad=False)
    with pytest.raises(ValueError, match=r"gate_up must be contiguous \[40, 24\]"):
        run(block, make_step(PLAIN))


def test_families_that_need_more_keep_the_separate_operations() -> None:
    x_SjE = torch.nested.nested_tensor_from_jagged(torch.ones(3, 24), cu_seqlens((1, 2)))
    block = make_block(PLAIN)
    assert block._is_one_operation(x_SjE)
    assert not block.train()._is_one_operation(x_SjE)
    native.unload()
    assert not block.eval()._is_one_operation(x_SjE)


def test_opcheck() -> None:
    block, (x_TE, cos_TR, sin_TR, offsets, kv) = make_block(PLAIN), make_step(PLAIN)
    attention, mlp = block.attention, block.mlp
    weights = (
        block.input_norm.weight, attention.qkv_proj.weight, None, attention.q_norm.weight,
        attention.k_norm.weight, attention.o_proj.weight, None, block.mlp_norm.weight,
        mlp.gate_up_proj.weight, None, mlp.down_proj.weight, None,
    )  # fmt: skip
    caches = kv.k_cache_NBKD, kv.v_cache_NBKD, kv.slots_T
    lengths = offsets, kv.kv_lens_S, kv.block_table_SW
    torch.library.opcheck(
        torch.ops.minigen.native_decoder_layer.default,
        (x_TE, *weights, cos_TR, sin_TR, *caches, *lengths, 1e-5, True, 1.0, 3, 0),
    )
