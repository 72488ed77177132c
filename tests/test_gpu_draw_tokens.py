"""The draw of tokens in Triton: on a GPU, or (as in test_gpu_kernels) interpreted.

The oracle is `minigen.sampling.draw` on the CPU, float64 all through. Shapes: R rows, V vocabulary.
"""

import os
from typing import NamedTuple

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from minigen.kernels import draw_tokens as kernels
from minigen.sampling import draw

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]


class Case(NamedTuple):
    """Logits of some spread, rounded to `step` so that many are equal where it is large."""

    num_rows: int
    vocab_size: int
    dtype: torch.dtype
    spread: float
    step: float
    temperatures: tuple[float, ...]
    min_p: float
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    return Case(
        num_rows=draw(st.integers(0, 5)),
        vocab_size=draw(st.sampled_from([1, 2, 1000, 1023, 1024, 1025, 2049, 5000])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        spread=draw(st.sampled_from([0.0, 0.01, 1.0, 8.0, 100.0])),
        step=draw(st.sampled_from([1e-6, 0.5, 10.0])),
        temperatures=tuple(draw(st.lists(st.sampled_from([0.0, 1e-4, 0.1, 0.6, 1.0, 5.0, 1e30]),
                                         min_size=1, max_size=3))),
        min_p=draw(st.sampled_from([0.0, 0.05, 1.0])),
        seed=draw(st.integers(0, 2**31)),
    )  # fmt: skip


def problem(case: Case) -> tuple[Tensor, ...]:
    """logits_RV and the seven tensors of `draw`, on the CPU."""
    generator = torch.Generator().manual_seed(case.seed)
    R, V = case.num_rows, case.vocab_size
    logits_RV = case.spread * torch.randn(R, V, generator=generator)
    logits_RV = ((logits_RV / case.step).round() * case.step).to(case.dtype)
    temperature_R = torch.tensor([case.temperatures[r % len(case.temperatures)] for r in range(R)])
    seed_R, sample_R, position_R = torch.randint(-(2**63), 2**63 - 1, (3, R), generator=generator)
    return (
        logits_RV, temperature_R, torch.full((R,), V), torch.ones(R), torch.full((R,), case.min_p),
        seed_R, sample_R, position_R,
    )  # fmt: skip


def drawn(tensors: tuple[Tensor, ...], greedy: bool = False) -> list[int]:
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
def test_draws_what_the_definition_draws(case: Case) -> None:
    tensors = problem(case)
    assert drawn(tensors) == draw(*tensors, mode="plain").tolist()
    assert drawn(tensors, greedy=True) == draw(*tensors, mode="greedy").tolist()


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


def test_noise_is_as_near_as_the_margin_needs() -> None:
    """At both ends of its range, where it decides, and about where one formula takes over."""
    take_over = int(0.03 * 2**32)
    near = [*range(5), *range(take_over - 99, take_over + 99), *range(2**32 - 5, 2**32)]
    bits = torch.tensor(near, dtype=torch.float64)
    exact = -torch.log(-torch.log1p(-(bits + 0.5) * 2.0**-32))
    u, rest = (
        (x.float() + 0.5) * 2.0**-32 for x in (torch.tensor(near), 2**32 - 1 - torch.tensor(near))
    )
    series = u * (1 + u * (0.5 + u * (1 / 3 + u * (0.25 + u * 0.2))))
    quick = -torch.log(torch.where(u < 0.03, series, -torch.log(rest)))
    assert float((quick.double() - exact).abs().max()) < 0.02 * kernels.MARGIN.value


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
