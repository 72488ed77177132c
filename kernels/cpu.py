"""Attention of one sequence on the CPU, on torch's own vectorised and threaded kernels.

Shapes: Q queries and L keys of one sequence, H query heads, K key/value heads, G = H / K query
heads that share a key/value head, D head dim.
"""

import torch
import torch.nn.functional as functional
from torch import Tensor

from minigen.kernels.checks import Window

# Queries a pass: bounds the mask (and, with a soft cap, the scores) to this many rows of keys, and
# lets a causal pass leave out the keys after its last query.
QUERIES_A_PASS = 128


def attend_sequence(
    q_QHD: Tensor,
    k_LKD: Tensor,
    v_LKD: Tensor,
    out_QHD: Tensor,
    lse_HQ: Tensor | None,
    *,
    scale: float,
    window: Window,
    softcap: float,
) -> None:
    """Writes the attention of the last Q of L positions into `out_QHD` (and `lse_HQ`)."""
    num_queries, num_keys = q_QHD.shape[0], k_LKD.shape[0]
    left, right = window
    offset = num_keys - num_queries  # bottom-right aligned: query i stands at key i + offset

    # Queries that stand before every key they could see come first, if there are any.
    num_blind = 0
    if num_keys == 0:
        num_blind = num_queries
    elif right is not None:
        num_blind = min(max(-offset - right, 0), num_queries)
    if num_blind:
        out_QHD[:num_blind] = 0
        if lse_HQ is not None:
            lse_HQ[:, :num_blind] = -torch.inf

    for start in range(num_blind, num_queries, QUERIES_A_PASS):
        stop = min(start + QUERIES_A_PASS, num_queries)
        first, last = start + offset, stop - 1 + offset
        low = 0 if left is None else max(first - left, 0)
        high = num_keys if right is None else min(last + right + 1, num_keys)
        cut_left = left is not None and last - left > low
        cut_right = right is not None and first + right + 1 < high
        mask_QL = None
        if cut_left or cut_right:
            mask_QL = _mask(q_QHD, range(first, last + 1), range(low, high), window)
        _attend(
            q_QHD[start:stop],
            k_LKD[low:high],
            v_LKD[low:high],
            out_QHD[start:stop],
            None if lse_HQ is None else lse_HQ[:, start:stop],
            mask_QL,
            scale,
            softcap,
        )


def _mask(like: Tensor, queries: range, keys: range, window: Window) -> Tensor:
    """0 where the query sees the key, -inf elsewhere, in the dtype of `like`."""
    position_Q1 = torch.arange(queries.start, queries.stop).unsqueeze(1)
    key_L = torch.arange(keys.start, keys.stop)
    hidden_QL = torch.zeros(len(queries), len(keys), dtype=torch.bool)
    if window.left is not None:
        hidden_QL |= key_L < position_Q1 - window.left
    if window.right is not None:
        hidden_QL |= key_L > position_Q1 + window.right
    return torch.zeros_like(hidden_QL, dtype=like.dtype).masked_fill_(hidden_QL, -torch.inf)


def _attend(
    q_QHD: Tensor,
    k_LKD: Tensor,
    v_LKD: Tensor,
    out_QHD: Tensor,
    lse_HQ: Tensor | None,
    mask_QL: Tensor | None,
    scale: float,
    softcap: float,
) -> None:
    """One pass in which every query sees at least one key."""
    num_queries, num_heads, head_dim = q_QHD.shape
    num_kv_heads = k_LKD.shape[1]
    group = num_heads // num_kv_heads
    # The G heads that share keys become G * Q rows, so that keys are read once and never repeated.
    # For a single query (decode) this is a view.
    q_KRD = q_QHD.view(num_queries, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    q_KRD = q_KRD.reshape(num_kv_heads, group * num_queries, head_dim)
    k_KLD, v_KLD = k_LKD.transpose(0, 1), v_LKD.transpose(0, 1)
    mask_RL = mask_QL
    if mask_QL is not None and group > 1:
        mask_RL = mask_QL.repeat(group, 1)

    if softcap == 0:
        # The public scaled_dot_product_attention ends in this same operation, without the lse.
        out_1KRD, lse_1KR = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_KRD.unsqueeze(0),
            k_KLD.unsqueeze(0),
            v_KLD.unsqueeze(0),
            attn_mask=None if mask_RL is None else mask_RL[None, None],
            scale=scale,
        )
        out_KRD, lse_KR = out_1KRD[0], lse_1KR[0]
    else:
        # Scores in half precision would lose what the cap is there to keep.
        wide = torch.promote_types(q_QHD.dtype, torch.float32)
        score_KRL = torch.matmul(q_KRD.to(wide), k_KLD.to(wide).transpose(1, 2)).mul_(scale)
        score_KRL = score_KRL.div_(softcap).tanh_().mul_(softcap)
        if mask_RL is not None:
            score_KRL += mask_RL
        lse_KR = score_KRL.logsumexp(-1)
        out_KRD = torch.matmul(score_KRL.sub_(lse_KR.unsqueeze(-1)).exp_(), v_KLD.to(wide))

    out_KGQD = out_KRD.unflatten(1, (group, num_queries))
    out_QHD.view(num_queries, num_kv_heads, group, head_dim).copy_(out_KGQD.permute(2, 0, 1, 3))
    if lse_HQ is not None:
        lse_HQ.copy_(lse_KR.reshape(num_heads, num_queries))


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """x [..., D] over its root mean square, times weight [D] + offset (arXiv 1910.07467).

    Computed in float32, in the dtype of x.
    """
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * (weight.float() + offset)).to(x.dtype)


def gated_linear(x_TE: Tensor, weight_GE: Tensor, bias_G: Tensor | None, activation: str) -> Tensor:
    """x @ weight.T + bias; with an activation, that of the first half times the second half."""
    out = functional.linear(x_TE, weight_GE, bias_G)
    if not activation:
        return out
    gate, up = out.chunk(2, -1)
    is_silu = activation == "silu"
    return (functional.silu(gate) if is_silu else functional.gelu(gate, approximate="tanh")) * up
