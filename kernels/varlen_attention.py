"""minigen::varlen_attention: attention over packed sequences, without padding.

Shapes: T packed tokens (of queries, or of keys), S sequences, H query heads, K key/value heads,
G = H / K query heads that share a key/value head, D head dim.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minigen.kernels.checks import check_varlen, read_cu_seqlens, resolve_scale, resolve_window
from minigen.kernels.cpu import attend_sequence


def varlen_attention(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention in which sequence s is rows cu_seqlens[s] to cu_seqlens[s + 1], and sees itself.

    Args:
        q_THD: queries, float16, bfloat16 or float32 (on the CPU also float64).
        k_TKD, v_TKD: keys and values of the same dtype; H must be a multiple of K.
        cu_seqlens_q, cu_seqlens_k: int32 `[S + 1]`, from 0 to the number of rows. A sequence may be
            empty, and may have fewer queries than keys.
        causal: query i of Q stands at key i + L - Q of L (bottom-right aligned), and sees no later.
        scale: factor on the scores, `D ** -0.5` if None.
        window_size: keys seen to the (left, right) of the query's own, -1 for all. Hugging Face's
            `sliding_window=w` is `(w - 1, 0)`.
        softcap: scores become `softcap * tanh(score / softcap)`; 0 is off.
        validate: read and check the offsets on a GPU too, which waits for it.

    Returns:
        `out_THD`, shape and dtype of `q_THD`, and `lse_HT`, the natural log of the sum of exponents,
        float32 (float64 for float64). A query that sees no key has output 0 and lse -inf.

    Raises:
        ValueError: shapes, dtypes, head counts, devices or (where read) offsets that do not fit.

    There is no backward yet; the lse is what it will need.
    """
    return torch.ops.minigen.varlen_attention(
        q_THD,
        k_TKD,
        v_TKD,
        cu_seqlens_q,
        cu_seqlens_k,
        causal,
        scale,
        window_size,
        softcap,
        validate,
    )


def _empty_outputs(q_THD: Tensor) -> tuple[Tensor, Tensor]:
    num_tokens, num_heads, _ = q_THD.shape
    lse_dtype = torch.promote_types(q_THD.dtype, torch.float32)
    out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    return out_THD, torch.empty(num_heads, num_tokens, dtype=lse_dtype, device=q_THD.device)


@torch.library.custom_op("minigen::varlen_attention", mutates_args=(), device_types="cpu")
def _cpu(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool,
    scale: float | None,
    window_size: Sequence[int],
    softcap: float,
    validate: bool,
) -> tuple[Tensor, Tensor]:
    check_varlen(q_THD, k_TKD, v_TKD, cu_seqlens_q, cu_seqlens_k, softcap)
    window = resolve_window(causal, window_size)
    scale = resolve_scale(scale, q_THD.shape[2])
    q_offsets = read_cu_seqlens(cu_seqlens_q, q_THD.shape[0], "cu_seqlens_q")
    k_offsets = read_cu_seqlens(cu_seqlens_k, k_TKD.shape[0], "cu_seqlens_k")
    q_THD, k_TKD, v_TKD = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (q_THD, k_TKD, v_TKD)
    )
    out_THD, lse_HT = _empty_outputs(q_THD)
    for seq in range(len(q_offsets) - 1):
        queries = slice(q_offsets[seq], q_offsets[seq + 1])
        keys = slice(k_offsets[seq], k_offsets[seq + 1])
        attend_sequence(
            q_THD[queries],
            k_TKD[keys],
            v_TKD[keys],
            out_THD[queries],
            lse_HT[:, queries],
            scale=scale,
            window=window,
            softcap=softcap,
        )
    return out_THD, lse_HT


@_cpu.register_fake
def _fake(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool,
    scale: float | None,
    window_size: Sequence[int],
    softcap: float,
    validate: bool,
) -> tuple[Tensor, Tensor]:
    check_varlen(q_THD, k_TKD, v_TKD, cu_seqlens_q, cu_seqlens_k, softcap)
    resolve_window(causal, window_size)
    return _empty_outputs(q_THD)
