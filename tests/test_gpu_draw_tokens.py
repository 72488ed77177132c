"""The draw of tokens in Triton: on a GPU, or (as in test_gpu_kernels) interpreted.

The oracle is `minigen.sampling.draw` on the CPU, float64 all through. Shapes: R rows, V vocabulary.
"""

from typing import NamedTuple
from unittest import mock

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from minigen.kernels import draw_tokens as kernels
from minigen.kernels.draw_tokens import score_bounds, upper_scores
from minigen.kernels.triton_import import tl, triton
from minigen.sampling import draw
from tests.interpreted import DEVICE, INTERPRETED

pytestmark = [] if INTERPRETED else [pytest.mark.gpu]


class Case(NamedTuple):
    """Logits of some spread about `centre`, rounded to `step` so that many are equal where it is
    large; a share of them is ruled out (-inf). A program takes some runs of words."""

    num_rows: int
    vocab_size: int
    dtype: torch.dtype
    spread: float
    step: float
    temperatures: tuple[float, ...]
    min_p: float
    seed: int
    centre: float = 0.0
    ruled_out: float = 0.0
    runs_a_program: int = 1


TEMPERATURES = [0.0, 1e-5, 1e-3, 0.1, 0.6, 1.0, 5.0, 100.0, 1e30]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    return Case(
        num_rows=draw(st.integers(0, 5)),
        vocab_size=draw(st.sampled_from([1, 2, 1023, 1024, 1025, 4095, 4097, 9000])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        spread=draw(st.sampled_from([0.0, 0.01, 1.0, 8.0, 100.0])),
        step=draw(st.sampled_from([1e-6, 0.5, 10.0])),
        temperatures=tuple(draw(st.lists(st.sampled_from(TEMPERATURES),
                                         min_size=1, max_size=3))),
        min_p=draw(st.sampled_from([0.0, 0.05, 1.0])),
        seed=draw(st.integers(0, 2**31)),
        centre=draw(st.sampled_from([0.0, 20.0, -300.0])),
        ruled_out=draw(st.sampled_from([0.0, 0.5, 0.999])),
        runs_a_program=draw(st.sampled_from([1, 4])),
    )  # fmt: skip


def problem(case: Case) -> tuple[Tensor, ...]:
    """logits_RV and the seven tensors of `draw`, on the CPU."""
    generator = torch.Generator().manual_seed(case.seed)
    R, V = case.num_rows, case.vocab_size
    logits_RV = case.spread * torch.randn(R, V, generator=generator)
    logits_RV = ((logits_RV / case.step).round() * case.step + case.centre).to(case.dtype)
    is_out_RV = torch.rand(R, V, generator=generator) < case.ruled_out
    is_out_RV[:, V // 2] = False  # one word is left
    logits_RV[is_out_RV] = -torch.inf
    temperature_R = torch.tensor([case.temperatures[r % len(case.temperatures)] for r in range(R)])
    seed_R, sample_R, position_R = torch.randint(-(2**63), 2**63 - 1, (3, R), generator=generator)
    return (
        logits_RV, temperature_R, torch.full((R,), V), torch.ones(R), torch.full((R,), case.min_p),
        seed_R, sample_R, position_R,
    )  # fmt: skip


def drawn(tensors: tuple[Tensor, ...], greedy: bool = False, runs_a_program: int = 1) -> list[int]:
    launch = kernels.choose_launch(1, 1)._replace(runs_a_program=runs_a_program)
    with mock.patch.object(kernels, "choose_launch", return_value=launch):
        return kernels.draw_tokens_triton(*arguments_of(tensors), greedy=greedy).tolist()


def arguments_of(
    tensors: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All but top-k and top-p, on the device."""
    logits_RV, temperature_R, _, _, min_p_R, seed_R, sample_R, position_R = (
        tensor.to(DEVICE) for tensor in tensors
    )
    return logits_RV, temperature_R, min_p_R, seed_R, sample_R, position_R


FEW = Case(5, 1025, torch.bfloat16, 1.0, 1e-6, (0.6, 0.0), 0.0, 0)


@given(cases())
@example(FEW)
@example(FEW._replace(spread=0.0, temperatures=(1.0,)))  # noise alone decides
@example(FEW._replace(min_p=1.0, step=0.5))
@example(FEW._replace(vocab_size=5000, min_p=1.0))  # a run of words that are not kept wins nothing
@example(FEW._replace(vocab_size=9000, spread=0.0, temperatures=(1e-5,), centre=-300.0))
@example(FEW._replace(vocab_size=9000, spread=0.0, temperatures=(1e-3, 100.0), centre=20.0))
@example(FEW._replace(vocab_size=9000, runs_a_program=4, spread=8.0, min_p=0.05))
@example(FEW._replace(vocab_size=9000, ruled_out=0.999, temperatures=(100.0, 1.0)))
def test_draws_what_the_definition_draws(case: Case) -> None:
    tensors, runs = problem(case), case.runs_a_program
    assert drawn(tensors, runs_a_program=runs) == draw(*tensors, mode="plain").tolist()
    expected = draw(*tensors, mode="greedy").tolist()
    assert drawn(tensors, greedy=True, runs_a_program=runs) == expected


def test_rows_apart_from_each_other() -> None:
    """Logits that are a view into wider rows."""
    logits_RV, *rest = problem(FEW)
    wide = torch.full((FEW.num_rows, 3000), 50.0, dtype=FEW.dtype)
    wide[:, 100:1125] = logits_RV
    assert drawn((wide[:, 100:1125], *rest)) == drawn((logits_RV, *rest))


def test_rows_without_a_largest_give_some_word() -> None:
    logits_RV, *rest = problem(FEW._replace(dtype=torch.float32))
    logits_RV[0], logits_RV[1], logits_RV[2, 7] = -torch.inf, torch.nan, torch.nan
    for greedy in (False, True):
        found = drawn((logits_RV, *rest), greedy)
        assert all(0 <= token < FEW.vocab_size for token in found)
        assert found[3:] == drawn((logits_RV[3:], *(t[3:] for t in rest)), greedy)


@triton.jit
def bounds_kernel(logits_ptr, bits_ptr, temperature_ptr, peak_ptr, upper_ptr, BLOCK: tl.constexpr):
    temperature, peak = tl.load(temperature_ptr), tl.load(peak_ptr)
    place_N = tl.arange(0, BLOCK)
    logit_N, bits_N = tl.load(logits_ptr + place_N), tl.load(bits_ptr + place_N).to(tl.uint32)
    bound_N = score_bounds(logit_N, bits_N, temperature)
    tl.store(upper_ptr + place_N, upper_scores(bound_N, peak, temperature))


@given(
    st.sampled_from(TEMPERATURES[1:]),
    st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e3, 1e5]),
    st.integers(0, 2**31),
)
@example(1.0, 0.0, 0)
@example(1e-5, 1e5, 1)
@example(1e-3, 30.0, 2)
def test_bounds_are_above_scores_and_near_those_that_win(
    temperature: float, spread: float, seed: int
) -> None:
    """Bits of every size, both ends, and about the powers of two, where the straight line bends."""
    generator = torch.Generator().manual_seed(seed)
    near = [2**k + i for k in range(33) for i in range(-3, 4)]
    near += torch.randint(0, 2**32, (600,), generator=generator).tolist()
    bits_N = torch.tensor([x for x in near if 0 <= x < 2**32] + [0] * 1024)[:1024]
    logits_N = spread * torch.randn(1024, generator=generator)
    peak = float(logits_N.max())
    upper_N = torch.empty(1024, dtype=torch.float64, device=DEVICE)
    bounds_kernel[(1,)](
        logits_N.to(DEVICE), bits_N.to(DEVICE),
        torch.tensor([temperature]).to(DEVICE), torch.tensor([peak]).to(DEVICE), upper_N,
        BLOCK=1024,
    )  # fmt: skip
    temperature = float(torch.tensor(temperature))
    u_N = (bits_N.double() + 0.5) * 2.0**-32
    scaled_N = (logits_N.double() - peak) / temperature
    above_N = upper_N.cpu() - (scaled_N - torch.log(-torch.log1p(-u_N)))
    assert float(above_N.min()) >= 0
    # The line is below the logarithm by 0.0861 of base 2 at most, u below E by u / 2 and little
    # more; bits of 0 and 1, of which half a bit is much, are left out; then twice the rounding.
    room_N = 2e-3 + 2e-6 * logits_N.double().abs() / temperature
    may_win_N = (bits_N > 100) & (u_N < 0.1)
    assert bool((above_N <= 0.06 + 0.55 * u_N + 0.01 + 2 * room_N)[may_win_N].all())


if not INTERPRETED:

    def test_the_operator_passes_opcheck_and_refuses() -> None:
        arguments = arguments_of(problem(FEW))
        torch.library.opcheck(torch.ops.minigen.draw_tokens.default, (*arguments, False))
        logits_RV, temperature_R, min_p_R, *noise = arguments
        for wrong, message in (
            ((temperature_R.double(), min_p_R), r"temperature must be torch\.float32"),
            ((temperature_R, min_p_R[1:]), "min_p must be contiguous with one entry for each"),
        ):
            with pytest.raises(ValueError, match=message):
                kernels.draw_tokens(logits_RV, *wrong, noise[0], noise[1], noise[2], False)
