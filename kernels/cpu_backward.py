"""Gradients of one sequence's attention on the CPU, through torch's own matrix products.

Shapes: Q queries and L keys of one sequence, H query heads, K key/value heads, G = H / K query
heads that share a key/value head, R = G * Q rows that share keys, D head dim.
"""

import torch
from torch import Tensor

from minigen.kernels.checks import Window

# Scores a pass, over all heads. A pass holds three tensors of that many; in float32 they are 12 MB.
SCORES_A_PASS = 2**20
MOST_QUERIES_A_PASS = 128


def attend_sequence_backward(
    dout_QHD: Tensor,
    dlse_HQ: Tensor,
    q_QHD: Tensor,
    k_LKD: Tensor,
    v_LKD: Tensor,
    out_QHD: Tensor,
    lse_HQ: Tensor,
    dq_QHD: Tensor,
    dk_LKD: Tensor,
    dv_LKD: Tensor,
    *,
    scale: float,
    window: Window,
    softcap: float,
) -> None:
    """Writes the gradients for `attend_sequence`'s queries, keys and values into the d-tensors.

    Computes in float32 (float64 for float64), with the formulas of `varlen_attention_backward`.
    """
    (num_queries, num_heads, _), (num_keys, num_kv_heads, head_dim) = q_QHD.shape, k_LKD.shape
    group = num_heads // num_kv_heads
    left, right = window
    offset = num_keys - num_queries  # bottom-right aligned: query i stands at key i + offset
    wide = torch.promote_types(q_QHD.dtype, torch.float32)
    k_KLD, v_KLD = (x_LKD.transpose(0, 1).to(wide) for x_LKD in (k_LKD, v_LKD))
    dk_KLD, dv_KLD = (
        torch.zeros(num_kv_heads, num_keys, head_dim, dtype=wide) for _ in (dk_LKD, dv_LKD)
    )

    def rows(x_QHD: Tensor) -> Tensor:
        """The G heads that share keys become rows beside the queries: [K, G * Q, D]."""
        x_KGQD = x_QHD.to(wide).unflatten(1, (num_kv_heads, group)).permute(1, 2, 0, 3)
        return x_KGQD.reshape(num_kv_heads, -1, head_dim)

    step = min(max(SCORES_A_PASS // (num_heads * max(num_keys, 1)), 1), MOST_QUERIES_A_PASS)
    for start in range(0, num_queries, step):
        stop = min(start + step, num_queries)
        first, last = start + offset, stop - 1 + offset
        low = 0 if left is None else min(max(first - left, 0), num_keys)
        high = num_keys if right is None else max(min(last + right + 1, num_keys), low)
        keys = slice(low, high)
        q_KRD, dout_KRD, out_KRD = (rows(x[start:stop]) for x in (q_QHD, dout_QHD, out_QHD))
        dlse_KR, lse_KR = (x[:, start:stop].reshape(num_kv_heads, -1) for x in (dlse_HQ, lse_HQ))
        delta_KR = (dout_KRD * out_KRD).sum(-1) - dlse_KR
        # A query that sees no key: its weights are hidden, and NaN may arrive at its lse of -inf.
        delta_KR.masked_fill_(lse_KR == -torch.inf, 0)

        score_KRL = torch.bmm(q_KRD, k_KLD[:, keys].mT).mul_(scale)
        slope_KRL = None
        if softcap:
            tanh_KRL = score_KRL.div_(softcap).tanh_()
            slope_KRL = 1 - tanh_KRL.square()
            score_KRL = tanh_KRL.mul_(softcap)
        weight_KRL = score_KRL.sub_(lse_KR.unsqueeze(-1)).exp_()
        hidden_QL = _hidden(range(first, last + 1), range(low, high), window)
        if hidden_QL is not None:
            weight_KRL.unflatten(1, (group, -1)).masked_fill_(hidden_QL, 0)
        dv_KLD[:, keys].baddbmm_(weight_KRL.mT, dout_KRD)
        dscore_KRL = torch.bmm(dout_KRD, v_KLD[:, keys].mT).sub_(delta_KR.unsqueeze(-1))
        dscore_KRL.mul_(weight_KRL)
        if slope_KRL is not None:
            dscore_KRL.mul_(slope_KRL)
        dk_KLD[:, keys].baddbmm_(dscore_KRL.mT, q_KRD, alpha=scale)
        dq_KRD = torch.bmm(dscore_KRL, k_KLD[:, keys]).mul_(scale)
        dq_KGQD = dq_KRD.unflatten(1, (group, stop - start))
        dq_QHD[start:stop].unflatten(1, (num_kv_heads, group)).copy_(dq_KGQD.permute(2, 0, 1, 3))

    dk_LKD.copy_(dk_KLD.transpose(0, 1))
    dv_LKD.copy_(dv_KLD.transpose(0, 1))


def _hidden(positions: range, keys: range, window: Window) -> Tensor | None:
    """True where the query at a position does not see a key; None where every query sees every."""
    distance_QL = torch.arange(keys.start, keys.stop) - torch.arange(
        positions.start, positions.stop
    ).unsqueeze(1)
    hidden_QL = None
    if window.left is not None and positions[-1] - window.left > keys.start:
        hidden_QL = distance_QL < -window.left
    if window.right is not None and positions[0] + window.right < keys.stop - 1:
        late_QL = distance_QL > window.right
        hidden_QL = late_QL if hidden_QL is None else hidden_QL | late_QL
    return hidden_QL
