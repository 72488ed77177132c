"""Gradients of varlen_attention: the CPU implementation, its registration, compiled training.

Shapes: T packed tokens, S sequences, H query heads, K key/value heads, D head dim, Q queries and L
keys of one sequence, E model width, V vocabulary.
"""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from minigen.kernels import varlen_attention
from minigen.kernels.checks import Window
from minigen.kernels.cpu_backward import attend_sequence_backward
from minigen.model import Decoder, DecoderConfig
from tests.attention_cases import Case, assert_within, cases, cu_seqlens, make_qkv, visible
from tests.gradient_cases import make_upstream, reference_gradients, rounding

CASE = Case(
    q_lens=(5, 1, 0, 4),
    kv_lens=(5, 4, 3, 2),
    num_heads=4,
    num_kv_heads=2,
    head_dim=3,
    dtype=torch.float64,
    causal=True,
    window_size=(-1, -1),
    softcap=0.0,
    scale=0.7,
    block_size=1,
    seed=0,
)


def attend(case: Case, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> tuple[Tensor, Tensor]:
    return varlen_attention(
        q_THD,
        k_TKD,
        v_TKD,
        cu_seqlens(case.q_lens),
        cu_seqlens(case.kv_lens),
        causal=case.causal,
        scale=case.scale,
        window_size=case.window_size,
        softcap=case.softcap,
    )


def gradients(
    case: Case, qkv: tuple[Tensor, ...], dout_THD: Tensor, dlse_HT: Tensor
) -> tuple[Tensor, ...]:
    q_THD, k_TKD, v_TKD = (x.detach().requires_grad_() for x in qkv)
    outputs = attend(case, q_THD, k_TKD, v_TKD)
    return torch.autograd.grad(outputs, (q_THD, k_TKD, v_TKD), (dout_THD, dlse_HT))


@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("window_size", [(-1, -1), (1, -1), (2, 1)])
@pytest.mark.parametrize("causal", [True, False])
def test_gradcheck(causal: bool, window_size: tuple[int, int], softcap: float) -> None:
    """GQA, an empty sequence, fewer queries than keys, and queries that see no key."""
    case = dataclasses.replace(CASE, causal=causal, window_size=window_size, softcap=softcap)
    qkv = tuple(x.requires_grad_() for x in make_qkv(case))

    def outputs(*qkv: Tensor) -> tuple[Tensor, Tensor]:
        out_THD, lse_HT = attend(case, *qkv)
        return out_THD, lse_HT.masked_fill(lse_HT == -torch.inf, 0)

    assert torch.autograd.gradcheck(outputs, qkv)


@given(cases((torch.float64,)))
def test_packed_equals_one_by_one(case: Case) -> None:
    qkv, upstream = make_qkv(case), make_upstream(case)
    expected = reference_gradients(case, qkv, *upstream)
    for actual, wanted in zip(gradients(case, qkv, *upstream), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)


@given(cases((torch.float64,), max_len=70))
def test_packed_equals_padded(case: Case) -> None:
    """The batch that minigen never builds, [S, longest, H, D], through einsum and autograd."""
    qkv, (dout_THD, dlse_HT) = make_qkv(case), make_upstream(case)
    lens = case.q_lens, case.kv_lens, case.kv_lens
    group = case.num_heads // case.num_kv_heads
    leaves = [x.clone().requires_grad_() for x in qkv]
    q_SQHD, k_SLKD, v_SLKD = (
        torch.nn.utils.rnn.pad_sequence(list(x.split(n)), batch_first=True)
        for x, n in zip(leaves, lens, strict=True)
    )
    num_seqs, most_q, most_k = len(case.q_lens), max(case.q_lens), max(case.kv_lens)
    visible_SQL = torch.zeros(num_seqs, most_q, most_k, dtype=torch.bool)
    for seq, (q_len, kv_len) in enumerate(zip(case.q_lens, case.kv_lens, strict=True)):
        visible_SQL[seq, :q_len, :kv_len] = visible(case, q_len, kv_len)
    k_SLHD, v_SLHD = (x.repeat_interleave(group, 2) for x in (k_SLKD, v_SLKD))
    score_SHQL = torch.einsum("sqhd,slhd->shql", q_SQHD, k_SLHD) * case.scale
    if case.softcap:
        score_SHQL = case.softcap * torch.tanh(score_SHQL / case.softcap)
    # Rows that see nothing (padding, too) get even weights, and are then left out.
    sees_S1Q = visible_SQL.any(2).unsqueeze(1)
    score_SHQL = score_SHQL.masked_fill(~visible_SQL.unsqueeze(1), -1e30)
    out_SHQD = torch.einsum("shql,slhd->shqd", score_SHQL.softmax(-1), v_SLHD)
    out_SHQD = out_SHQD.masked_fill(~sees_S1Q.unsqueeze(-1), 0)
    lse_SHQ = score_SHQL.logsumexp(-1).masked_fill(~sees_S1Q, 0)
    loss = torch.zeros((), dtype=torch.float64)
    for seq, (dout_QHD, dlse_HQ) in enumerate(
        zip(dout_THD.split(case.q_lens), dlse_HT.split(case.q_lens, 1), strict=True)
    ):
        rows = slice(0, len(dout_QHD))
        loss = loss + (out_SHQD[seq, :, rows].transpose(0, 1) * dout_QHD).sum()
        loss = loss + (lse_SHQ[seq, :, rows] * dlse_HQ).sum()
    expected = torch.autograd.grad(loss, leaves)
    actual = gradients(case, qkv, dout_THD, dlse_HT)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@given(cases((torch.float32, torch.bfloat16, torch.float16)))
def test_other_dtypes_within_their_rounding(case: Case) -> None:
    qkv, upstream = make_qkv(case), make_upstream(case)
    expected = reference_gradients(case, qkv, *upstream)
    bounds = rounding(case, qkv, *upstream)
    actual = gradients(case, qkv, *upstream)
    for ours, theirs, bound in zip(actual, expected, bounds, strict=True):
        assert ours.dtype == case.dtype
        assert_within(ours, theirs, bound)


def test_gradients_of_either_output_alone() -> None:
    """A gradient that arrives at lse is used, and one that does not arrive is no error."""
    qkv, (dout_THD, dlse_HT) = make_qkv(CASE), make_upstream(CASE)
    both = gradients(CASE, qkv, dout_THD, dlse_HT)
    leaves = tuple(x.requires_grad_() for x in qkv)
    out_THD, lse_HT = attend(CASE, *leaves)
    of_out = torch.autograd.grad(out_THD, leaves, dout_THD, retain_graph=True)
    of_lse = torch.autograd.grad(lse_HT, leaves, dlse_HT)
    assert of_lse[0].any()
    for sum_, one, other in zip(both, of_out, of_lse, strict=True):
        torch.testing.assert_close(sum_, one + other)


LEAK = dataclasses.replace(
    CASE, q_lens=(30, 70, 3), kv_lens=(30, 70, 3), num_heads=6, head_dim=16, causal=False
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_gradient_flows_between_sequences(dtype: torch.dtype) -> None:
    """My gradients, bit by bit, whoever the neighbours are; and none of mine reaches them."""
    case = dataclasses.replace(LEAK, dtype=dtype)
    mine = (*make_qkv(case), *make_upstream(case))
    other = dataclasses.replace(case, seed=1)
    others = (*make_qkv(other), *make_upstream(other))
    for theirs in (others, tuple(torch.full_like(x, torch.nan) for x in mine)):
        changed = [x.clone() for x in mine]
        for x, y in zip(changed, theirs, strict=True):
            x_T, y_T = (x, y) if x.ndim == 3 else (x.T, y.T)  # dlse_HT counts tokens last
            x_T[:30], x_T[100:] = y_T[:30], y_T[100:]
        before = gradients(case, tuple(mine[:3]), *mine[3:])
        after = gradients(case, tuple(changed[:3]), *changed[3:])
        for one, two in zip(before, after, strict=True):
            assert torch.equal(one[30:100], two[30:100])
            assert not torch.equal(one[:30], two[:30])


def test_a_leak_would_be_noticed() -> None:
    """Offsets that give my sequence a row of my neighbour: the comparison above must see it."""
    wrong = dataclasses.replace(LEAK, q_lens=(29, 71, 3), kv_lens=(29, 71, 3))
    mine, upstream = make_qkv(LEAK), make_upstream(LEAK)
    others = make_qkv(dataclasses.replace(LEAK, seed=1))
    changed = tuple(torch.cat([y[:30], x[30:]]) for x, y in zip(mine, others, strict=True))
    before, after = (gradients(wrong, qkv, *upstream) for qkv in (mine, changed))
    assert not torch.equal(before[0][30:100], after[0][30:100])


def test_queries_that_see_no_key_have_gradient_zero() -> None:
    case = dataclasses.replace(CASE, q_lens=(3, 5), kv_lens=(0, 2))
    dout_THD, dlse_HT = make_upstream(case)
    dlse_HT[:, :6] = torch.nan  # what log(0) easily sends back
    dq_THD, dk_TKD, dv_TKD = gradients(case, make_qkv(case), dout_THD, dlse_HT)
    assert not dq_THD[:6].any()
    assert dq_THD[6:].any()
    assert dk_TKD.isfinite().all()
    assert dv_TKD.isfinite().all()
    empty = dataclasses.replace(CASE, q_lens=(0, 0), kv_lens=(0, 3))
    dq_THD, dk_TKD, dv_TKD = gradients(empty, make_qkv(empty), *make_upstream(empty))
    assert dq_THD.shape == (0, 4, 3)
    assert not dk_TKD.any()
    assert not dv_TKD.any()


class LargestTensor(TorchDispatchMode):
    """Counts the elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_memory_of_a_long_sequence_grows_with_its_length_only() -> None:
    length, heads = 3000, 2
    q, k, v, out, dout, dq, dk, dv = torch.randn(8, length, heads, 8)
    lse_HQ = torch.full((heads, length), 9.0)
    with LargestTensor() as largest:
        attend_sequence_backward(
            *(dout, torch.zeros_like(lse_HQ), q, k, v, out, lse_HQ, dq, dk, dv),
            scale=0.3,
            window=Window(None, 0),
            softcap=0.0,
        )
    assert 0 < largest.elements <= heads * length * 128  # 128 queries a pass


# Registration.


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_opcheck(dtype: torch.dtype, softcap: float) -> None:
    # No query without a key: opcheck compares outputs, and takes -inf - -inf for a difference.
    case = dataclasses.replace(CASE, kv_lens=(5, 4, 3, 6), dtype=dtype, softcap=softcap)
    qkv = make_qkv(case)
    offsets = cu_seqlens(case.q_lens), cu_seqlens(case.kv_lens)
    options = (True, None, [3, -1], softcap)
    outputs = torch.ops.minigen.varlen_attention(*qkv, *offsets, *options, False)
    torch.library.opcheck(
        torch.ops.minigen.varlen_attention_backward.default,
        (*make_upstream(case), *qkv, *outputs, *offsets, *options),
    )
    leaves = tuple(x.requires_grad_() for x in qkv)
    torch.library.opcheck(
        torch.ops.minigen.varlen_attention.default, (*leaves, *offsets, *options, False)
    )


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (0, torch.zeros(10, 4, 2), r"the gradient of out must have shape \(10, 4, 3\) .*float64"),
        (1, torch.zeros(10, 4), r"the gradient of lse must have shape \(4, 10\) .*float64"),
        (5, torch.zeros(10, 4, 3).half(), "out must have .*float64, got .*float16"),
        (6, torch.zeros(4, 9), r"lse must have shape \(4, 10\)"),
        (7, cu_seqlens((5, 1, 0, 5)), "cu_seqlens_q must start at 0.*10 packed tokens"),
    ],
)
def test_backward_refuses(position: int, wrong: Tensor, message: str) -> None:
    qkv = make_qkv(CASE)
    offsets = cu_seqlens(CASE.q_lens), cu_seqlens(CASE.kv_lens)
    arguments: list[Any] = [*make_upstream(CASE), *qkv, *attend(CASE, *qkv), *offsets]
    arguments[position] = wrong
    with pytest.raises(ValueError, match=message):
        torch.ops.minigen.varlen_attention_backward(*arguments, True, None, [-1, -1], 0.0)


def test_second_derivatives_are_refused_not_wrong() -> None:
    leaves = tuple(x.requires_grad_() for x in make_qkv(CASE))
    out_THD, _ = attend(CASE, *leaves)
    (dq_THD,) = torch.autograd.grad(out_THD.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        torch.autograd.grad(dq_THD.sum(), leaves[:1])


# A compiled training step of the decoder.


def tiny_decoder() -> Decoder:
    config = DecoderConfig.from_hf(
        {
            "model_type": "qwen3",
            "vocab_size": 50,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 128,
            "tie_word_embeddings": True,
        }
    )
    decoder = Decoder.from_config(config, dtype=torch.float32, seed=0)
    return decoder.requires_grad_(True).train()


def batch_of(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(tokens_T, positions_T, cu_seqlens_S1, labels_T); the last token of each has no label."""
    generator = torch.Generator().manual_seed(sum(lengths))
    tokens_T = torch.randint(50, (sum(lengths),), generator=generator)
    positions_T = torch.cat([torch.arange(n) for n in lengths])
    offsets = cu_seqlens(lengths)
    labels_T = tokens_T.roll(-1)
    labels_T[offsets[1:].long() - 1] = -100
    return tokens_T, positions_T, offsets, labels_T


def training_loss(
    decoder: Decoder, tokens_T: Tensor, positions_T: Tensor, offsets: Tensor, labels_T: Tensor
) -> Tensor:
    hidden_TE = decoder.hidden_states(tokens_T, positions_T, offsets)
    return F.cross_entropy(decoder.logits(hidden_TE), labels_T)


@pytest.mark.slow
@pytest.mark.usefixtures("cold_compiler")
def test_compiled_training_step_equals_eager() -> None:
    """The jagged tensor is built inside the graph; every mix of lengths runs one of two graphs."""
    decoder = tiny_decoder()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(training_loss, backend=counter, fullgraph=True)
    for lengths in [(7, 5), (3, 20, 9), (2, 2), (2, 3, 4, 60), (50,) * 6, (11, 30)]:
        batch = batch_of(lengths)
        of_each = []
        for step in (training_loss, compiled):
            decoder.zero_grad()
            loss = step(decoder, *batch)
            loss.backward()
            gradients = {name: p.grad for name, p in decoder.named_parameters()}
            of_each.append({"loss": loss.detach(), **gradients})
        eager, fused = of_each
        for name, expected in eager.items():
            assert expected is not None
            torch.testing.assert_close(fused[name], expected, rtol=0, atol=1e-6, msg=name)
    assert counter.frame_count <= 2


# The Triton kernels without a GPU; tests/test_kernels_aot.py compiles them.


def test_triton_backward_in_the_interpreter() -> None:
    """A process of its own: Triton reads the variable once, when it is imported."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider"]
    finished = subprocess.run(
        [*command, "-k", "not registered", "tests/test_gpu_kernels_backward.py"],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-2000:]
    assert " passed" in finished.stdout
    assert "skipped" not in finished.stdout
