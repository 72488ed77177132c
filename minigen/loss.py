"""Cross-entropy from hidden states, without ever holding the logits of all rows.

Shape suffixes: R rows (tokens that count), E model width, V vocabulary, C rows of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Elements of a chunk's logits: 2**27 in fp32 are 512 MiB, 1,046 rows of a vocabulary of 128,256.
CHUNK_ELEMENTS = 2**27
MIN_CHUNK_ROWS = 256

ChunkLoss = Callable[[Tensor, Tensor, float, bool], tuple[Tensor, Tensor | None]]


def chunk_rows_of(vocab_size: int) -> int:
    """Rows of a chunk that `chunked_cross_entropy` takes by itself."""
    return max(MIN_CHUNK_ROWS, CHUNK_ELEMENTS // vocab_size)


def chunk_loss(
    logits_CV: Tensor, targets_C: Tensor, softcap: float, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Summed cross-entropy of a chunk (fp32, fp64 for fp64) and its gradient for `logits_CV`."""
    raw_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    capped_CV = softcap * torch.tanh(raw_CV / softcap) if softcap else raw_CV
    lse_C1 = torch.logsumexp(capped_CV, -1, keepdim=True)
    loss = (lse_C1 - capped_CV.gather(1, targets_C[:, None])).sum()
    if not with_grad:
        return loss, None
    ids_V = torch.arange(logits_CV.shape[1], device=logits_CV.device)
    grad_CV = torch.exp(capped_CV - lse_C1) - (ids_V == targets_C[:, None]).to(raw_CV.dtype)
    if softcap:
        grad_CV = grad_CV * (1 - (capped_CV / softcap) ** 2)
    return loss, grad_CV.to(logits_CV.dtype)


def chunked_cross_entropy(
    hidden_RE: Tensor,
    weight_VE: Tensor,
    targets_R: Tensor,
    *,
    softcap: float = 0.0,
    chunk_rows: int | None = None,
    chunk_loss: ChunkLoss = chunk_loss,
) -> Tensor:
    """Sum over rows of the cross-entropy of `softcap(hidden @ weight.T)` with the targets.

    The gradients are computed with the loss, chunk by chunk, so that logits and their gradient take
    the memory of one chunk; the products with the weight run in the dtype of `hidden_RE`.

    Args:
        hidden_RE: rows in the dtype to compute in.
        weight_VE: the head's weight, of any float dtype, which its gradient gets too.
        targets_R: int64 from 0 to V - 1.
        softcap: logits become `softcap * tanh(logits / softcap)`; 0 is off.
        chunk_rows: rows whose logits are held at once; `chunk_rows_of(V)` if None.
        chunk_loss: the function of this name, or a compiled form of it.

    Returns:
        A scalar, fp32 (fp64 for fp64).
    """
    rows = chunk_rows_of(weight_VE.shape[0]) if chunk_rows is None else chunk_rows
    return _ChunkedCrossEntropy.apply(hidden_RE, weight_VE, targets_R, softcap, rows, chunk_loss)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_RE: Tensor,
        weight_VE: Tensor,
        targets_R: Tensor,
        softcap: float,
        chunk_rows: int,
        chunk_loss: ChunkLoss,
    ) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        dtype = hidden_RE.dtype
        wide = torch.promote_types(dtype, torch.float32)
        narrow_VE = weight_VE.to(dtype)
        total = hidden_RE.new_zeros((), dtype=wide)
        d_hidden_RE = torch.empty_like(hidden_RE) if need_hidden else None
        # Summed over chunks, so wider than the products.
        d_weight_VE = torch.zeros_like(weight_VE, dtype=wide) if need_weight else None
        for start in range(0, hidden_RE.shape[0], chunk_rows):
            chunk = slice(start, start + chunk_rows)
            hidden_CE = hidden_RE[chunk]
            loss, grad_CV = chunk_loss(
                hidden_CE @ narrow_VE.T, targets_R[chunk], softcap, need_hidden or need_weight
            )
            total += loss
            if d_hidden_RE is not None and grad_CV is not None:
                torch.mm(grad_CV, narrow_VE, out=d_hidden_RE[chunk])
            if d_weight_VE is not None and grad_CV is not None:
                d_weight_VE += grad_CV.T @ hidden_CE
        ctx.save_for_backward(
            d_hidden_RE, None if d_weight_VE is None else d_weight_VE.to(weight_VE.dtype)
        )
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden_RE, d_weight_VE = ctx.saved_tensors
        d_hidden_RE = None if d_hidden_RE is None else d_hidden_RE * grad.to(d_hidden_RE.dtype)
        d_weight_VE = None if d_weight_VE is None else d_weight_VE * grad.to(d_weight_VE.dtype)
        return d_hidden_RE, d_weight_VE, None, None, None, None
