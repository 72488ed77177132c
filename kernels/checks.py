"""Argument checks that the operations share: one sentence that names argument, value and remedy.

Shapes, dtypes and head counts are checked at every call. The values inside `cu_seqlens`, `kv_lens`,
`block_table` and `slots` are read at every call on the CPU, and on a GPU only with `validate=True`,
because reading them there waits for the GPU.

Shapes: T packed tokens, S sequences, H query heads, K key/value heads, D head dim, N cache blocks,
B tokens a block, W blocks a sequence may have (the block table's width).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MAX_HEAD_DIM = 256
GPU_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CPU_DTYPES = (*GPU_DTYPES, torch.float64)


class Window(NamedTuple):
    """How many keys a query sees on each side of its own position; None is open."""

    left: int | None
    right: int | None


def resolve_window(causal: bool, window_size: Sequence[int]) -> Window:
    """Folds `causal` and `window_size=(left, right)`, -1 for open, into one window."""
    if len(window_size) != 2 or any(side < -1 for side in window_size):
        raise ValueError(
            f"window_size must be (left, right) with entries of at least -1 (-1 is open), "
            f"got {tuple(window_size)}"
        )
    left, right = (None if side == -1 else side for side in window_size)
    return Window(left, 0 if causal else right)


def resolve_scale(scale: float | None, head_dim: int) -> float:
    return head_dim**-0.5 if scale is None else scale


def _require(tensor: Tensor, name: str, ndim: int, dtypes: Sequence[torch.dtype]) -> None:
    if tensor.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got shape {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name} must be {wanted}, got {tensor.dtype}")


def _require_same_device(device: torch.device, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise ValueError(f"{name} must be on {device} as the first tensor is: {tensor.device}")


def _require_heads(q_THD: Tensor, num_kv_heads: int, head_dim: int, keys: str) -> None:
    num_heads = q_THD.shape[1]
    if q_THD.shape[2] != head_dim:
        raise ValueError(f"q has head dim {q_THD.shape[2]}, {keys} has {head_dim}: make them equal")
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"the head dim of q must be from 1 to {MAX_HEAD_DIM}, got {head_dim}")
    if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"the heads of q must be a multiple of those of {keys}, got {num_heads} and "
            f"{num_kv_heads}"
        )


def _require_softcap(softcap: float) -> None:
    if not softcap >= 0:
        raise ValueError(f"softcap must be positive, or 0 for off, got {softcap}")


def _float_dtypes(device: torch.device) -> Sequence[torch.dtype]:
    return GPU_DTYPES if device.type == "cuda" else CPU_DTYPES


def check_varlen(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    softcap: float,
) -> None:
    """Raises ValueError unless shapes, dtypes, head counts and devices agree."""
    _require(q_THD, "q", 3, _float_dtypes(q_THD.device))
    _require(k_TKD, "k", 3, (q_THD.dtype,))
    _require(v_TKD, "v", 3, (q_THD.dtype,))
    if k_TKD.shape != v_TKD.shape:
        raise ValueError(
            f"k and v must have one shape, got {tuple(k_TKD.shape)} and {tuple(v_TKD.shape)}"
        )
    _require_heads(q_THD, k_TKD.shape[1], k_TKD.shape[2], "k")
    _require(cu_seqlens_q, "cu_seqlens_q", 1, (torch.int32,))
    _require(cu_seqlens_k, "cu_seqlens_k", 1, (torch.int32,))
    if cu_seqlens_q.shape[0] < 1 or cu_seqlens_q.shape[0] != cu_seqlens_k.shape[0]:
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_k must both have one entry more than there are sequences, "
            f"got {cu_seqlens_q.shape[0]} and {cu_seqlens_k.shape[0]} entries"
        )
    _require_softcap(softcap)
    _require_same_device(
        q_THD.device, k=k_TKD, v=v_TKD, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k
    )


def check_varlen_gradients(
    q_THD: Tensor, out_THD: Tensor, lse_HT: Tensor, dout_THD: Tensor, dlse_HT: Tensor
) -> None:
    """Raises ValueError unless outputs and their gradients fit queries that `check_varlen` took."""
    num_tokens, num_heads, _ = q_THD.shape
    of_lse = (num_heads, num_tokens), torch.promote_types(q_THD.dtype, torch.float32)
    of_out = tuple(q_THD.shape), q_THD.dtype
    for name, tensor, (shape, dtype) in (
        ("out", out_THD, of_out),
        ("lse", lse_HT, of_lse),
        ("the gradient of out", dout_THD, of_out),
        ("the gradient of lse", dlse_HT, of_lse),
    ):
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(
                f"{name} must have shape {shape} and dtype {dtype}, "
                f"got {tuple(tensor.shape)} and {tensor.dtype}"
            )
        _require_same_device(q_THD.device, **{name: tensor})


def check_paged(
    q_THD: Tensor,
    k_cache_NBKD: Tensor,
    v_cache_NBKD: Tensor,
    cu_seqlens_q: Tensor,
    kv_lens_S: Tensor,
    block_table_SW: Tensor,
    softcap: float,
) -> None:
    """Raises ValueError unless shapes, dtypes, head counts and devices agree."""
    _require(q_THD, "q", 3, _float_dtypes(q_THD.device))
    _check_caches(k_cache_NBKD, v_cache_NBKD, q_THD.dtype)
    _require_heads(q_THD, k_cache_NBKD.shape[2], k_cache_NBKD.shape[3], "k_cache")
    _require(cu_seqlens_q, "cu_seqlens_q", 1, (torch.int32,))
    _require(kv_lens_S, "kv_lens", 1, (torch.int32,))
    _require(block_table_SW, "block_table", 2, (torch.int32,))
    if not cu_seqlens_q.shape[0] - 1 == kv_lens_S.shape[0] == block_table_SW.shape[0]:
        raise ValueError(
            "kv_lens and the rows of block_table must be one a sequence and cu_seqlens_q one more, "
            f"got {kv_lens_S.shape[0]}, {block_table_SW.shape[0]} and {cu_seqlens_q.shape[0]}"
        )
    _require_softcap(softcap)
    _require_same_device(
        q_THD.device,
        k_cache=k_cache_NBKD,
        v_cache=v_cache_NBKD,
        cu_seqlens_q=cu_seqlens_q,
        kv_lens=kv_lens_S,
        block_table=block_table_SW,
    )


def check_cache_write(
    k_TKD: Tensor, v_TKD: Tensor, k_cache_NBKD: Tensor, v_cache_NBKD: Tensor, slots_T: Tensor
) -> None:
    """Raises ValueError unless shapes, dtypes and devices agree."""
    _require(k_TKD, "k", 3, _float_dtypes(k_TKD.device))
    _require(v_TKD, "v", 3, (k_TKD.dtype,))
    _check_caches(k_cache_NBKD, v_cache_NBKD, k_TKD.dtype)
    _require(slots_T, "slots", 1, (torch.int64,))
    wanted = (slots_T.shape[0], *k_cache_NBKD.shape[2:])
    for name, tensor in (("k", k_TKD), ("v", v_TKD)):
        if tuple(tensor.shape) != wanted:
            raise ValueError(
                f"{name} must have one row a slot and the heads of the cache, shape {wanted}, "
                f"got {tuple(tensor.shape)}"
            )
    _require_same_device(
        k_TKD.device, v=v_TKD, k_cache=k_cache_NBKD, v_cache=v_cache_NBKD, slots=slots_T
    )


def check_rope_cache_write(
    qkv_TXD: Tensor,
    q_weight_D: Tensor | None,
    k_weight_D: Tensor | None,
    cos_PR: Tensor,
    sin_PR: Tensor,
    positions_T: Tensor | None,
    k_cache_NBKD: Tensor,
    v_cache_NBKD: Tensor,
    slots_T: Tensor,
) -> None:
    """Raises ValueError unless shapes, dtypes and devices agree. X heads: queries, keys, values."""
    if qkv_TXD.dim() == 4:
        _require(qkv_TXD, "qkv in parts", 4, (torch.float32,))
        if qkv_TXD.shape[0] < 1 or not qkv_TXD.is_contiguous():
            raise ValueError(
                "qkv in parts must be contiguous and have at least one, got shape "
                f"{tuple(qkv_TXD.shape)} and strides {qkv_TXD.stride()}"
            )
        _require(k_cache_NBKD, "k_cache", 4, _float_dtypes(qkv_TXD.device))
        _check_caches(k_cache_NBKD, v_cache_NBKD, k_cache_NBKD.dtype)
    else:
        _require(qkv_TXD, "qkv", 3, _float_dtypes(qkv_TXD.device))
        _check_caches(k_cache_NBKD, v_cache_NBKD, qkv_TXD.dtype)
    num_tokens, num_heads, head_dim = qkv_TXD.shape[-3:]
    num_kv_heads = k_cache_NBKD.shape[2]
    num_q_heads = num_heads - 2 * num_kv_heads
    if num_kv_heads < 1 or num_q_heads < 1 or num_q_heads % num_kv_heads:
        raise ValueError(
            f"qkv must have {num_kv_heads} heads of keys and of values, as k_cache has, and a "
            f"multiple of queries, got {num_heads} heads in all"
        )
    if not 1 <= head_dim <= MAX_HEAD_DIM or k_cache_NBKD.shape[3] != head_dim:
        raise ValueError(
            f"qkv and k_cache must have one head dim from 1 to {MAX_HEAD_DIM}, got {head_dim} and "
            f"{k_cache_NBKD.shape[3]}"
        )
    if (q_weight_D is None) != (k_weight_D is None):
        raise ValueError("q_weight and k_weight must be given both or neither")
    for name, weight in (("q_weight", q_weight_D), ("k_weight", k_weight_D)):
        if weight is not None and (tuple(weight.shape) != (head_dim,) or weight.stride(0) != 1):
            raise ValueError(
                f"{name} must be contiguous with one entry for each of {head_dim} dims of a head, "
                f"got shape {tuple(weight.shape)}"
            )
    for name, table in (("cos", cos_PR), ("sin", sin_PR)):
        _require(table, name, 2, (torch.float32,))
        if table.shape != cos_PR.shape or not 2 <= 2 * table.shape[1] <= head_dim:
            raise ValueError(
                f"cos and sin must have one shape, with at most {head_dim // 2} columns, half the "
                f"head dim, got {tuple(cos_PR.shape)} and {tuple(sin_PR.shape)}"
            )
        if not table.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {table.stride()}")
    if positions_T is None and cos_PR.shape[0] != num_tokens:
        raise ValueError(
            f"without positions cos and sin must have one row for each of {num_tokens} tokens of "
            f"qkv, got {cos_PR.shape[0]}"
        )
    for name, numbers in (("positions", positions_T), ("slots", slots_T)):
        if numbers is None:
            continue
        _require(numbers, name, 1, (torch.int64,))
        if numbers.shape[0] != num_tokens:
            raise ValueError(
                f"{name} must have one entry for each of {num_tokens} tokens of qkv, "
                f"got {numbers.shape[0]}"
            )
    given = {"q_weight": q_weight_D, "k_weight": k_weight_D, "positions": positions_T}
    _require_same_device(
        qkv_TXD.device,
        k_cache=k_cache_NBKD,
        v_cache=v_cache_NBKD,
        cos=cos_PR,
        sin=sin_PR,
        slots=slots_T,
        **{name: tensor for name, tensor in given.items() if tensor is not None},
    )


def check_few_rows_linear(
    x_TE: Tensor,
    weight_GE: Tensor,
    bias_G: Tensor | None,
    residual_TF: Tensor | None,
    norm_weight_E: Tensor | None,
    activation: str,
) -> None:
    """Raises ValueError unless shapes, dtypes, devices and the activation fit each other."""
    _require(x_TE, "x", 2, _float_dtypes(x_TE.device))
    _require(weight_GE, "weight", 2, (x_TE.dtype,))
    if activation not in ("", "silu", "gelu_tanh"):
        raise ValueError(f"activation must be '', 'silu' or 'gelu_tanh', got {activation!r}")
    num_rows, num_inputs = weight_GE.shape
    if num_inputs != x_TE.shape[1] or num_inputs < 1 or not weight_GE.is_contiguous():
        raise ValueError(
            f"weight must be contiguous with one column for each of {x_TE.shape[1]} columns of x, "
            f"at least one, got shape {tuple(weight_GE.shape)} and strides {weight_GE.stride()}"
        )
    if activation and num_rows % 2:
        raise ValueError(
            f"weight must have as many rows for the gate as for what it multiplies, got {num_rows}"
        )
    num_outputs = num_rows // 2 if activation else num_rows
    for name, tensor, shape in (
        ("bias", bias_G, (num_rows,)),
        ("residual", residual_TF, (x_TE.shape[0], num_outputs)),
        ("norm_weight", norm_weight_E, (num_inputs,)),
    ):
        if tensor is None:
            continue
        _require(tensor, name, len(shape), (x_TE.dtype,))
        if tuple(tensor.shape) != shape or (tensor.ndim == 1 and not tensor.is_contiguous()):
            raise ValueError(
                f"{name} must have shape {shape} and, a vector, be contiguous, "
                f"got {tuple(tensor.shape)}"
            )
        _require_same_device(x_TE.device, **{name: tensor})
    _require_same_device(x_TE.device, weight=weight_GE)


def check_tile_linear(
    x_TE: Tensor, weight_GE: Tensor, bias_G: Tensor | None, activation: str, parts: int
) -> None:
    """Raises ValueError unless all fit each other as `tile_linear` wants it."""
    check_few_rows_linear(x_TE, weight_GE, bias_G, None, None, activation)
    if parts < 0 or (parts and activation):
        what = "0 beside an activation" if activation else "0 or more"
        raise ValueError(f"parts must be {what}, got {parts}")


def check_sum_norm(x_TE: Tensor, part_PTE: Tensor, norm_weight_E: Tensor) -> None:
    """Raises ValueError unless shapes, dtypes and devices fit each other."""
    _require(x_TE, "x", 2, _float_dtypes(x_TE.device))
    _require(part_PTE, "part", 3, (torch.float32,))
    _require(norm_weight_E, "norm_weight", 1, (x_TE.dtype,))
    num_rows, num_inputs = x_TE.shape
    for name, tensor, shape in (
        ("part", part_PTE, (part_PTE.shape[0], num_rows, num_inputs)),
        ("norm_weight", norm_weight_E, (num_inputs,)),
    ):
        if tuple(tensor.shape) != shape or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous and have shape {shape}, got {tuple(tensor.shape)} "
                f"and strides {tensor.stride()}"
            )
        _require_same_device(x_TE.device, **{name: tensor})


def check_draw_tokens(
    logits_RV: Tensor,
    temperature_R: Tensor,
    min_p_R: Tensor,
    seed_R: Tensor,
    sample_R: Tensor,
    position_R: Tensor,
) -> None:
    """Raises ValueError unless shapes, dtypes and devices agree."""
    _require(logits_RV, "logits", 2, (torch.float32, torch.bfloat16, torch.float16))
    if logits_RV.shape[1] < 1:
        raise ValueError("logits must have at least one word to draw")
    numbers = {
        "temperature": (temperature_R, torch.float32),
        "min_p": (min_p_R, torch.float32),
        "seed": (seed_R, torch.int64),
        "sample": (sample_R, torch.int64),
        "position": (position_R, torch.int64),
    }
    for name, (tensor, dtype) in numbers.items():
        _require(tensor, name, 1, (dtype,))
        if tensor.shape[0] != logits_RV.shape[0] or tensor.stride(0) != 1:
            raise ValueError(
                f"{name} must be contiguous with one entry for each of {logits_RV.shape[0]} rows "
                f"of logits, got {tensor.shape[0]}"
            )
    _require_same_device(
        logits_RV.device, **{name: tensor for name, (tensor, _) in numbers.items()}
    )


def _check_caches(k_cache_NBKD: Tensor, v_cache_NBKD: Tensor, dtype: torch.dtype) -> None:
    _require(k_cache_NBKD, "k_cache", 4, (dtype,))
    _require(v_cache_NBKD, "v_cache", 4, (dtype,))
    if k_cache_NBKD.shape != v_cache_NBKD.shape:
        raise ValueError(
            f"k_cache and v_cache must have one shape, got {tuple(k_cache_NBKD.shape)} and "
            f"{tuple(v_cache_NBKD.shape)}"
        )
    for name, cache in (("k_cache", k_cache_NBKD), ("v_cache", v_cache_NBKD)):
        if not cache.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {cache.stride()}")


def read_cu_seqlens(cu_seqlens: Tensor, num_tokens: int, name: str) -> list[int]:
    """The offsets as a list (waits for the device); ValueError unless they split the tokens."""
    offsets: list[int] = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != num_tokens or offsets != sorted(offsets):
        raise ValueError(
            f"{name} must start at 0, never decrease and end at the {num_tokens} packed tokens, "
            f"got {_shorten(offsets)}"
        )
    return offsets


def read_block_tables(
    kv_lens_S: Tensor, block_table_SW: Tensor, num_blocks: int, block_size: int
) -> tuple[list[int], list[list[int]]]:
    """Key counts and used block numbers a sequence, as lists (waits for the device).

    Entries of the table beyond a sequence's last used block are not looked at.
    """
    kv_lens: list[int] = kv_lens_S.tolist()
    capacity = block_table_SW.shape[1] * block_size
    used: list[list[int]] = []
    for seq, (kv_len, row) in enumerate(zip(kv_lens, block_table_SW.tolist(), strict=True)):
        if not 0 <= kv_len <= capacity:
            raise ValueError(
                f"kv_lens[{seq}] must be from 0 to {capacity}, what a row of block_table holds, "
                f"got {kv_len}"
            )
        blocks = row[: -(-kv_len // block_size)]
        if blocks and not 0 <= min(blocks) <= max(blocks) < num_blocks:
            raise ValueError(
                f"block_table[{seq}] must name blocks from 0 to {num_blocks - 1}, "
                f"got {_shorten(blocks)}"
            )
        used.append(blocks)
    return kv_lens, used


def read_slots(slots_T: Tensor, num_slots: int) -> list[int]:
    """The slots as a list (waits for the device); ValueError for one outside the cache."""
    slots: list[int] = slots_T.tolist()
    if slots and not -1 <= min(slots) <= max(slots) < num_slots:
        raise ValueError(
            f"slots must be from 0 to {num_slots - 1}, or -1 to skip a token, got {_shorten(slots)}"
        )
    return slots


def read_positions(positions_T: Tensor, num_rows: int) -> None:
    """Waits for the device; ValueError for a position that is no row of the rope tables."""
    positions: list[int] = positions_T.tolist()
    if positions and not 0 <= min(positions) <= max(positions) < num_rows:
        raise ValueError(
            f"positions must be from 0 to {num_rows - 1}, the rows of cos and sin, "
            f"got {_shorten(positions)}"
        )


def _shorten(values: list[int]) -> str:
    return str(values) if len(values) <= 16 else f"{values[:8]} ... {values[-8:]}"
