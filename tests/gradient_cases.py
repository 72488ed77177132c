"""The oracle for gradients of attention, and how far rounding may take a kernel from it.

Shapes: T packed tokens, S sequences, H query heads, K key/value heads, D head dim, Q queries and L
keys of one sequence.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tests.attention_cases import Case, visible


class Gradients(NamedTuple):
    dq_THD: Tensor
    dk_TKD: Tensor
    dv_TKD: Tensor


def make_upstream(case: Case, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Gradients that arrive at out and lse."""
    generator = torch.Generator().manual_seed(case.seed + 1)
    num_tokens = sum(case.q_lens)
    dout_THD = torch.randn(num_tokens, case.num_heads, case.head_dim, generator=generator)
    dlse_HT = torch.randn(case.num_heads, num_tokens, generator=generator)
    lse_dtype = torch.promote_types(case.dtype, torch.float32)
    return dout_THD.to(device, case.dtype), dlse_HT.to(device, lse_dtype)


def reference_gradients(
    case: Case, qkv: tuple[Tensor, ...], dout_THD: Tensor, dlse_HT: Tensor
) -> Gradients:
    """Sequence by sequence in float64: attention by its definition, gradients by autograd."""
    parts = [_reference_of_one(case, *tensors) for tensors in _split(case, qkv, dout_THD, dlse_HT)]
    return Gradients(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _split(case: Case, qkv: tuple[Tensor, ...], dout_THD: Tensor, dlse_HT: Tensor):
    q_THD, k_TKD, v_TKD, dout_THD, dlse_HT = (x.cpu().double() for x in (*qkv, dout_THD, dlse_HT))
    return zip(
        q_THD.split(case.q_lens),
        k_TKD.split(case.kv_lens),
        v_TKD.split(case.kv_lens),
        dout_THD.split(case.q_lens),
        dlse_HT.split(case.q_lens, 1),
        strict=True,
    )


def _reference_of_one(
    case: Case, q_QHD: Tensor, k_LKD: Tensor, v_LKD: Tensor, dout_QHD: Tensor, dlse_HQ: Tensor
) -> tuple[Tensor, ...]:
    qkv = [x.clone().requires_grad_() for x in (q_QHD, k_LKD, v_LKD)]
    visible_QL = visible(case, len(q_QHD), len(k_LKD))
    sees_Q = visible_QL.any(1)  # a query that sees no key has no softmax, and takes no part
    k_LHD, v_LHD = (x.repeat_interleave(case.num_heads // case.num_kv_heads, 1) for x in qkv[1:])
    score_HQL = torch.einsum("qhd,lhd->hql", qkv[0][sees_Q], k_LHD) * case.scale
    if case.softcap:
        score_HQL = case.softcap * torch.tanh(score_HQL / case.softcap)
    score_HQL = score_HQL.masked_fill(~visible_QL[sees_Q], -torch.inf)
    out_QHD = torch.einsum("hql,lhd->qhd", score_HQL.softmax(-1), v_LHD)
    of_out = (out_QHD * dout_QHD[sees_Q]).sum()
    if not sees_Q.any():
        return tuple(torch.zeros_like(x) for x in qkv)
    of_lse = (score_HQL.logsumexp(-1) * dlse_HQ[:, sees_Q]).sum()
    return torch.autograd.grad(of_out + of_lse, qkv)


def rounding(case: Case, qkv: tuple[Tensor, ...], dout_THD: Tensor, dlse_HT: Tensor) -> Gradients:
    """A bound on the error of each element, for kernels that sum in float32."""
    parts = [_rounding_of_one(case, *tensors) for tensors in _split(case, qkv, dout_THD, dlse_HT)]
    return Gradients(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _rounding_of_one(
    case: Case, q_QHD: Tensor, k_LKD: Tensor, v_LKD: Tensor, dout_QHD: Tensor, dlse_HQ: Tensor
) -> tuple[Tensor, ...]:
    group = case.num_heads // case.num_kv_heads
    k_LHD, v_LHD = (x.repeat_interleave(group, 1) for x in (k_LKD, v_LKD))
    visible_QL = visible(case, len(q_QHD), len(k_LKD))
    score_HQL = torch.einsum("qhd,lhd->hql", q_QHD, k_LHD) * case.scale
    slope_HQL = torch.ones_like(score_HQL)
    if case.softcap:
        tanh_HQL = torch.tanh(score_HQL / case.softcap)
        score_HQL, slope_HQL = case.softcap * tanh_HQL, 1 - tanh_HQL.square()
    weight_HQL = score_HQL.masked_fill(~visible_QL, -torch.inf).softmax(-1).nan_to_num(0.0)
    out_QHD = torch.einsum("hql,lhd->qhd", weight_HQL, v_LHD)
    dweight_HQL = torch.einsum("qhd,lhd->hql", dout_QHD, v_LHD)
    delta_HQ1 = ((dout_QHD * out_QHD).sum(-1).T - dlse_HQ).unsqueeze(-1)

    # What each step adds: eps is a rounding to the dtype, wide a few in float32; a dtype with a
    # short exponent (float16) is off by `least` near 0. Weights inherit the errors of two scores,
    # its own and the lse's; delta those of the rounded output (see `reference`).
    info = torch.finfo(case.dtype)
    eps, least = info.eps, info.smallest_normal * info.eps
    wide = 8 * torch.finfo(torch.float32).eps
    size_HQL = torch.einsum("qhd,lhd->hql", q_QHD.abs(), k_LHD.abs()) * case.scale
    most_HQ1 = size_HQL.amax(-1, keepdim=True) if len(k_LKD) else torch.zeros_like(delta_HQ1)
    relative_HQ1 = wide * (4 + 2 * most_HQ1 + case.softcap)
    magnitude_QHD = torch.einsum("hql,lhd->qhd", weight_HQL, v_LHD.abs())
    delta_error_HQ1 = (dout_QHD.abs() * magnitude_QHD).sum(-1).T.unsqueeze(-1)
    delta_error_HQ1 = (2 * eps + relative_HQ1) * delta_error_HQ1 + wide * dlse_HQ.abs().unsqueeze(
        -1
    )
    dweight_error_HQL = wide * torch.einsum("qhd,lhd->hql", dout_QHD.abs(), v_LHD.abs())
    rest_HQL = (dweight_HQL - delta_HQ1).abs()
    dscore_HQL = weight_HQL * rest_HQL * slope_HQL
    dscore_error_HQL = (
        dscore_HQL * (eps + relative_HQ1)
        + weight_HQL * slope_HQL * (dweight_error_HQL + delta_error_HQ1)
        + (weight_HQL * rest_HQL * relative_HQ1 if case.softcap else 0.0)
        + least
    )

    def bound(terms: str, error: Tensor, value: Tensor, factor: Tensor) -> Tensor:
        """Of a sum of value * factor, rounded to the dtype in the end."""
        return torch.einsum(terms, error + (eps + wide) * value.abs(), factor.abs()) + least

    dq_QHD = case.scale * bound("hql,lhd->qhd", dscore_error_HQL, dscore_HQL, k_LHD)
    dk_LHD = case.scale * bound("hql,qhd->lhd", dscore_error_HQL, dscore_HQL, q_QHD)
    weight_error_HQL = (eps + relative_HQ1) * weight_HQL + least
    dv_LHD = bound("hql,qhd->lhd", weight_error_HQL, weight_HQL, dout_QHD)
    dk_LKD, dv_LKD = (x.unflatten(1, (case.num_kv_heads, group)).sum(2) for x in (dk_LHD, dv_LHD))
    return dq_QHD, dk_LKD, dv_LKD
