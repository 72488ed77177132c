"""The C++ kernels of the CPU: the same answers as the definition, whoever shares the batch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from minigen.kernels import kv_cache_write, linear, native, paged_attention, rope_cache_write
from tests.attention_cases import Case, assert_within, cases, cu_seqlens, make_paged, make_qkv
from tests.attention_cases import reference as attention_reference
from tests.fused_cases import RopeCase, make_rope_problem, rope_cases
from tests.test_kernels import PLAIN, paged_arguments, run_paged

DTYPES = native.DTYPES
# The sizes at which the kernel changes its way: a tile of keys, and what one work item takes.
LONG = (63, 64, 65, 511, 512, 513, 1024, 1025)
DECODE = dataclasses.replace(PLAIN, q_lens=(1,) * len(LONG), kv_lens=LONG)


@pytest.fixture(autouse=True)
def native_kernels() -> None:
    native.load()


def test_they_serve_without_gradients_only() -> None:
    x, weight = torch.ones(2, 4), torch.ones(3, 4, requires_grad=True)
    assert native.serves(x)
    assert not native.serves(x, weight)
    with torch.inference_mode():
        assert native.serves(x, weight)
    assert not native.serves(x.double())
    assert linear(x, weight).grad_fn is not None
    native.unload()
    assert not native.serves(x)


def test_a_machine_that_cannot_build_them_is_told_why(monkeypatch) -> None:
    def load() -> None:
        raise RuntimeError("no C++ compiler\nand more about it")

    native.unload()
    monkeypatch.setattr(native, "load", load)
    with pytest.warns(UserWarning, match=r"could not be built.*: RuntimeError: no C\+\+ compiler$"):
        native.load_if_possible()
    assert not native.serves(torch.ones(1))


# Torch's attention takes what has 128 queries or more, 128 a pass.
PROMPTS = dataclasses.replace(
    PLAIN, q_lens=(128, 200, 127, 129), kv_lens=(128, 330, 127, 129), dtype=torch.bfloat16
)


@given(cases(DTYPES))
@example(DECODE)
@example(dataclasses.replace(DECODE, window_size=(600, -1), dtype=torch.bfloat16))
@example(dataclasses.replace(PLAIN, q_lens=(16, 17), kv_lens=(1025, 1025), num_heads=8))
@example(PROMPTS)
@example(dataclasses.replace(PROMPTS, window_size=(50, -1)))
@example(dataclasses.replace(PROMPTS, window_size=(40, 20), causal=False))
def test_paged_equals_definition(case: Case) -> None:
    q_THD, k_TKD, v_TKD = make_qkv(case)
    expected = attention_reference(case, q_THD, k_TKD, v_TKD)
    out_THD = run_paged(case, q_THD, k_TKD, v_TKD)
    assert_within(out_THD, expected.out_THD, expected.out_error_THD)


@given(cases(DTYPES, max_len=1100))
@example(dataclasses.replace(DECODE, num_heads=9, num_kv_heads=3, dtype=torch.bfloat16))
def test_a_sequence_is_the_same_alone(case: Case) -> None:
    """Many sequences are divided among threads with all their heads, one by its heads."""
    q_THD, k_TKD, v_TKD = make_qkv(case)
    together = run_paged(case, q_THD, k_TKD, v_TKD).split(case.q_lens)
    for i, mine in enumerate(together):
        one = dataclasses.replace(case, q_lens=(case.q_lens[i],), kv_lens=(case.kv_lens[i],))
        alone = run_paged(
            one,
            q_THD.split(case.q_lens)[i],
            k_TKD.split(case.kv_lens)[i],
            v_TKD.split(case.kv_lens)[i],
        )
        assert torch.equal(mine, alone)


@given(cases(DTYPES, max_len=1100))
@example(dataclasses.replace(PLAIN, q_lens=(1,), kv_lens=(1025,), num_heads=9, num_kv_heads=3))
def test_threads_do_not_change_a_bit(case: Case) -> None:
    q_THD, k_TKD, v_TKD = make_qkv(case)
    weight_FE = torch.randn(500, case.head_dim).to(case.dtype)
    num_threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            out_THD = run_paged(case, q_THD, k_TKD, v_TKD)
            found.append((out_THD, linear(q_THD[:8].flatten(0, 1)[:32], weight_FE)))
    finally:
        torch.set_num_threads(num_threads)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@given(cases(DTYPES, max_len=70))
def test_cache_write_changes_its_slots_only(case: Case) -> None:
    _, k_TKD, v_TKD = make_qkv(case)
    paged = make_paged(case)
    slots_T = paged.slots_T.clone()
    slots_T[::3] = -1
    # Heads and tokens that are not neighbours in memory, as slices of a fused projection.
    k_TKD = k_TKD.transpose(0, 1).contiguous().transpose(0, 1)
    kv_cache_write(k_TKD, v_TKD, paged.k_cache_NBKD, paged.v_cache_NBKD, slots_T)
    for cache_NBKD, x_TKD in ((paged.k_cache_NBKD, k_TKD), (paged.v_cache_NBKD, v_TKD)):
        expected_NBKD = torch.full_like(cache_NBKD, torch.nan)
        for token, slot in enumerate(slots_T.tolist()):
            if slot >= 0:
                expected_NBKD[slot // case.block_size, slot % case.block_size] = x_TKD[token]
        torch.testing.assert_close(cache_NBKD, expected_NBKD, rtol=0, atol=0, equal_nan=True)


@given(rope_cases(DTYPES, 130))
def test_rope_and_cache_write_equal_the_separate_operations(case: RopeCase) -> None:
    """To the last bit; those are compared with float64 elsewhere."""
    case = dataclasses.replace(case, has_norm=False, has_positions=False)
    problem, other = make_rope_problem(case), make_rope_problem(case)
    assert native.serves(problem.qkv_TXD)
    q_THD = rope_cache_write(*problem)
    native.unload()
    assert torch.equal(q_THD, rope_cache_write(*other))
    native.load()
    for cache, expected in zip(problem[7:9], other[7:9], strict=True):
        torch.testing.assert_close(cache, expected, rtol=0, atol=0, equal_nan=True)


sizes = st.sampled_from([1, 2, 3, 15, 16, 17, 31, 32, 33, 64, 100])


@given(
    rows=st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 17, 31, 32, 33]),
    depth=sizes | st.just(576),
    outputs=sizes,
    dtype=st.sampled_from(DTYPES),
    has_bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_linear_equals_float64(
    rows: int, depth: int, outputs: int, dtype: torch.dtype, has_bias: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # A slice of wider rows; the column beside it must not be read.
    x_TE = torch.randn(rows, depth + 1, generator=generator).to(dtype)
    x_TE[:, depth:] = torch.nan
    x_TE = x_TE[:, :depth]
    weight_FE = torch.randn(outputs, depth, generator=generator).to(dtype)
    bias_F = torch.randn(outputs, generator=generator).to(dtype) if has_bias else None
    out_TF = linear(x_TE, weight_FE, bias_F)
    expected_TF = x_TE.double() @ weight_FE.double().T
    size_TF = x_TE.double().abs() @ weight_FE.double().abs().T
    if bias_F is not None:
        expected_TF, size_TF = expected_TF + bias_F.double(), size_TF + bias_F.double().abs()
    # One rounding to the dtype, and float32 sums: a few eps of the terms' sizes.
    error_TF = torch.finfo(dtype).eps * expected_TF.abs()
    error_TF += 8 * torch.finfo(torch.float32).eps * size_TF
    assert_within(out_TF, expected_TF, error_TF)
    if rows <= 32:
        for i in range(rows):
            assert torch.equal(linear(x_TE[i : i + 1], weight_FE, bias_F)[0], out_TF[i])


def call_linear(**changes: Any) -> None:
    arguments = {"x": torch.ones(2, 4), "weight": torch.ones(3, 4), "bias": None, **changes}
    linear(*arguments.values())


def call_paged(**changes: Any) -> None:
    paged_attention(**{**paged_arguments(), **changes})


def call_write(**changes: Any) -> None:
    caches = [torch.zeros(2, 4, 2, 8) for _ in range(2)]
    kv_cache_write(torch.ones(1, 2, 8), torch.ones(1, 2, 8), *caches, **changes)


def call_rope(**changes: Any) -> None:
    arguments = {
        "qkv_TXD": torch.ones(1, 6, 8), "q_weight_D": None, "k_weight_D": None, "eps": 1.0,
        "cos_PR": torch.ones(1, 4), "sin_PR": torch.ones(1, 4), "positions_T": None,
        "k_cache_NBKD": torch.zeros(2, 4, 2, 8), "v_cache_NBKD": torch.zeros(2, 4, 2, 8),
        "slots_T": torch.tensor([0]),
    }  # fmt: skip
    rope_cache_write(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("call", "changes", "message"),
    [
        (call_linear, {"weight": torch.ones(3, 5)}, r"weight \[F, E\]"),
        (call_linear, {"weight": torch.ones(3, 4).bfloat16()}, "one dtype"),
        (call_linear, {"bias": torch.ones(4)}, r"bias must be \[3\]"),
        (call_paged, {"cu_seqlens_q": cu_seqlens((3, 3))}, "cu_seqlens_q must start at 0"),
        (call_paged, {"kv_lens_S": torch.tensor([2, 99]).int()}, r"kv_lens\[1\]"),
        (call_paged, {"block_table_SW": torch.full((2, 2), 77).int()}, r"block_table\[0\]"),
        (call_paged, {"softcap": -1.0}, "softcap"),
        (call_rope, {"slots_T": torch.tensor([8])}, "slots must be from 0 to 7"),
        (call_rope, {"cos_PR": torch.ones(2, 4)}, "cos and sin must have one shape"),
        (call_write, {"slots_T": torch.tensor([8])}, "slots must be from 0 to 7"),
        (call_write, {"slots_T": torch.tensor([-2])}, "slots must be from 0 to 7"),
    ],
)
def test_bad_arguments_are_refused(call: Callable, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_opcheck() -> None:
    case = dataclasses.replace(PLAIN, q_lens=(2, 1), kv_lens=(5, 9))
    q_THD, k_TKD, v_TKD = make_qkv(case)
    paged = make_paged(case)
    ops = torch.ops.minigen
    k_cache, v_cache = (torch.zeros_like(paged.k_cache_NBKD) for _ in range(2))
    torch.library.opcheck(
        ops.native_kv_cache_write.default, (k_TKD, v_TKD, k_cache, v_cache, paged.slots_T)
    )
    qkv_TXD = torch.cat([q_THD, k_TKD[: len(q_THD)], v_TKD[: len(q_THD)]], 1)
    tables = (torch.ones(len(q_THD), 2), torch.ones(len(q_THD), 2))
    torch.library.opcheck(
        ops.native_rope_cache_write.default,
        (qkv_TXD, *tables, k_cache, v_cache, paged.slots_T[: len(q_THD)], True),
    )
    lengths = (cu_seqlens(case.q_lens), paged.kv_lens_S, paged.block_table_SW)
    torch.library.opcheck(
        ops.native_paged_attention.default,
        (q_THD, k_cache, v_cache, *lengths, 1.0, 3, -1, 2.0),
    )
    torch.library.opcheck(ops.native_linear.default, (torch.ones(2, 4), torch.ones(3, 4), None))
