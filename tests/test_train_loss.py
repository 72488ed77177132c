"""The chunked cross-entropy against torch's own. R rows, E width, V vocabulary."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minigen.loss import chunk_rows_of, chunked_cross_entropy

E, V = 8, 13


def reference(hidden_RE: Tensor, weight_VE: Tensor, targets_R: Tensor, softcap: float) -> Tensor:
    logits_RV = hidden_RE @ weight_VE.T
    if softcap:
        logits_RV = softcap * torch.tanh(logits_RV / softcap)
    return F.cross_entropy(logits_RV, targets_R, reduction="sum")


def inputs(rows: int, seed: int, dtype: torch.dtype, vocab: int = V) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    hidden_RE = torch.randn(rows, E, generator=generator, dtype=torch.float64)
    weight_VE = torch.randn(vocab, E, generator=generator, dtype=torch.float64)
    targets_R = torch.randint(vocab, (rows,), generator=generator)
    return (
        hidden_RE.to(dtype).requires_grad_(),
        weight_VE.to(dtype).requires_grad_(),
        targets_R,
    )


@given(
    rows=st.integers(0, 9),
    chunk=st.integers(1, 10),
    softcap=st.sampled_from([0.0, 0.7, 30.0]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 1000),
)
def test_loss_and_gradients_are_torchs(rows, chunk, softcap, dtype, seed) -> None:
    hidden_RE, weight_VE, targets_R = inputs(rows, seed, dtype)
    scale = 0.37  # a gradient of 1 would not show whether it is used
    loss = chunked_cross_entropy(hidden_RE, weight_VE, targets_R, softcap=softcap, chunk_rows=chunk)
    got = torch.autograd.grad(loss * scale, (hidden_RE, weight_VE))
    expected = reference(hidden_RE, weight_VE, targets_R, softcap)
    wanted = torch.autograd.grad(expected * scale, (hidden_RE, weight_VE))
    # Sums of at most 9 * 13 terms of size 10 at most.
    tolerance = torch.finfo(dtype).eps * 1000
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def test_bf16_rows_with_fp32_weights() -> None:
    """What training does: the weight's gradient is fp32, and sums over chunks do not round."""
    hidden_RE, weight_VE, targets_R = inputs(400, 1, torch.float32)
    narrow_RE = hidden_RE.detach().bfloat16().requires_grad_()
    loss = chunked_cross_entropy(narrow_RE, weight_VE, targets_R, chunk_rows=3)
    d_hidden_RE, d_weight_VE = torch.autograd.grad(loss, (narrow_RE, weight_VE))
    assert (d_hidden_RE.dtype, d_weight_VE.dtype) == (torch.bfloat16, torch.float32)
    expected = reference(hidden_RE, weight_VE, targets_R, 0.0)
    wanted_RE, wanted_VE = torch.autograd.grad(expected, (hidden_RE, weight_VE))
    eps = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(loss, expected, rtol=eps, atol=0.0)
    assert (d_hidden_RE.float() - wanted_RE).norm() < 4 * eps * wanted_RE.norm()
    assert (d_weight_VE - wanted_VE).norm() < 4 * eps * wanted_VE.norm()


@pytest.mark.parametrize("frozen", [0, 1])
def test_one_gradient_alone(frozen) -> None:
    hidden_RE, weight_VE, targets_R = inputs(5, 2, torch.float64)
    pair = [hidden_RE, weight_VE]
    pair[frozen] = pair[frozen].detach()
    loss = chunked_cross_entropy(pair[0], pair[1], targets_R, chunk_rows=2)
    wanted = reference(pair[0], pair[1], targets_R, 0.0)
    other = pair[1 - frozen]
    torch.testing.assert_close(torch.autograd.grad(loss, other), torch.autograd.grad(wanted, other))


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return out


def test_no_tensor_is_as_large_as_all_logits() -> None:
    rows, vocab, chunk = 600, 500, 16
    hidden_RE, weight_VE, targets_R = inputs(rows, 3, torch.float32, vocab)
    with Largest() as seen:
        reference(hidden_RE, weight_VE, targets_R, 30.0).backward()
    assert seen.elements == rows * vocab
    with Largest() as seen:
        chunked_cross_entropy(
            hidden_RE, weight_VE, targets_R, softcap=30.0, chunk_rows=chunk
        ).backward()
    assert seen.elements == chunk * vocab


def test_default_chunks_hold_half_a_gigabyte_at_most() -> None:
    for vocab in (256, 49_152, 128_256, 262_144):
        assert chunk_rows_of(vocab) >= 256
        assert chunk_rows_of(vocab) * vocab * 4 <= 2**29
