"""The training step: packed, accumulated, recomputed, in bf16, compiled."""

import math
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minigen.batch import Batch
from minigen.greedy import continue_greedily
from minigen.model import Decoder
from minigen.trainer import Ranks, Schedule, Trainer, TrainingModel, initialise
from tests.training_cases import random_batch, tiny_decoder

FLAT = Schedule("constant", 1e-2, 100, 0)
# Gradients of tens of tokens at width 32, summed in another order: errors of some hundred eps.
TOLERANCE = 300 * torch.finfo(torch.float32).eps
FAMILIES = [
    {"model_type": "llama"},
    {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": False},
    {
        "model_type": "gemma2",
        "head_dim": 8,
        "query_pre_attn_scalar": 12,
        "sliding_window": 4,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 4.0,
    },
]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads would only wait for each other on tensors this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def training_model(seed: int = 0, *, dtype=torch.float32, changes=None, **options) -> TrainingModel:
    decoder = tiny_decoder(seed, **(changes or {}))
    return TrainingModel(decoder, dtype=dtype, **{"compile": "eager", **options})


def gradients(model: TrainingModel, batches: list[Batch]) -> tuple[Tensor, dict[str, Tensor]]:
    """(summed loss, gradients of it), summed over the batches."""
    parameters = dict(model.decoder.named_parameters())
    total = torch.zeros(())
    model.zero_grad()
    for batch in batches:
        loss = model(*batch)
        loss.backward()
        total += loss.detach()
    return total, {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].norm() > 0, name
        assert (a[name] - b[name]).norm() <= tolerance * b[name].norm() + 1e-12, name


@given(lengths=st.lists(st.integers(2, 9), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_packed_gradients_are_those_of_each_sample_alone(lengths, seed) -> None:
    model = training_model(seed)
    packed = random_batch(lengths, model.decoder.config, seed)
    alone, start = [], 0
    for length in lengths:
        one = random_batch([length], model.decoder.config)
        alone.append(one._replace(tokens_T=packed.tokens_T[start : start + length]))
        alone[-1] = alone[-1]._replace(targets_R=alone[-1].tokens_T[1:])
        start += length
    loss, got = gradients(model, [packed])
    expected, wanted = gradients(model, alone)
    torch.testing.assert_close(loss, expected, rtol=TOLERANCE, atol=0.0)
    assert_same(got, wanted)


@pytest.mark.parametrize("changes", FAMILIES, ids=lambda c: c["model_type"])
def test_loss_and_gradients_against_the_decoders_logits(changes) -> None:
    """The head, the soft cap, tied weights, and the rows chosen: all as autograd does them."""
    model = training_model(1, changes=changes)
    decoder = model.decoder
    batch = random_batch([5, 2, 7], decoder.config)
    batch = batch._replace(rows_R=batch.rows_R[::2], targets_R=batch.targets_R[::2])
    loss, got = gradients(model, [batch])
    decoder.zero_grad()
    hidden_TE = decoder.hidden_states(batch.tokens_T, batch.positions_T, batch.cu_seqlens_S1)
    logits_RV = decoder.logits(hidden_TE[batch.rows_R])
    expected = F.cross_entropy(logits_RV, batch.targets_R, reduction="sum")
    expected.backward()
    wanted = {n: p.grad for n, p in decoder.named_parameters() if p.grad is not None}
    torch.testing.assert_close(loss, expected.detach(), rtol=TOLERANCE, atol=0.0)
    assert_same(got, wanted)


def test_recomputing_changes_no_gradient() -> None:
    for dropout in (0.0, 0.3):
        found = []
        for recompute in (False, True):
            model = training_model(2, recompute=recompute, dropout=dropout)
            torch.manual_seed(7)
            found.append(gradients(model, [random_batch([6, 3], model.decoder.config)]))
        assert torch.equal(found[0][0], found[1][0])
        assert_same(found[1][1], found[0][1], 0.0)


def test_dropout_only_while_training_and_by_step() -> None:
    def run(steps: int, seed: int, dropout: float) -> list[float]:
        trainer = Trainer(training_model(3, dropout=dropout), FLAT, seed=seed)
        batch = random_batch([9, 9], trainer.model.decoder.config)
        found = []
        for _ in range(steps):
            torch.manual_seed(len(found) * 100 + seed)  # what is left of other draws is no matter
            found.append(float(trainer.update([batch], 16)[0]))
        return [*found, float(trainer.evaluate([batch])[0])]

    assert run(2, 0, 0.5) == run(2, 0, 0.5)
    assert run(2, 0, 0.5) != run(2, 1, 0.5)
    assert run(2, 0, 0.5)[0] != run(2, 0, 0.0)[0]
    assert run(0, 0, 0.5) == run(0, 0, 0.0)  # evaluation drops nothing


def test_bf16_compute_keeps_fp32_weights_and_gradients() -> None:
    wide, narrow = training_model(4), training_model(4, dtype=torch.bfloat16)
    batch = random_batch([20, 30, 14], wide.decoder.config)
    expected, wanted = gradients(wide, [batch])
    loss, got = gradients(narrow, [batch])
    assert {g.dtype for g in got.values()} == {torch.float32}
    assert {p.dtype for p in narrow.decoder.parameters()} == {torch.float32}
    eps = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(loss, expected, rtol=eps, atol=0.0)
    assert not torch.equal(loss, expected)
    # Some ten roundings on the way through two layers and back.
    assert_same(got, wanted, 10 * eps)


def test_bf16_compute_is_what_the_bf16_model_serves() -> None:
    model = training_model(5, dtype=torch.bfloat16)
    served = tiny_decoder(5).to(torch.bfloat16)
    batch = random_batch([5, 2, 7], served.config)
    with torch.no_grad():
        mine = model.hidden(batch.tokens_T, batch.positions_T, batch.cu_seqlens_S1)
        theirs = served.hidden_states(batch.tokens_T, batch.positions_T, batch.cu_seqlens_S1)
    assert torch.equal(mine, theirs)


def test_accumulated_micro_steps_are_one_step() -> None:
    """Normalised over all targets: micro-batches of unequal size weigh by their tokens."""
    config = tiny_decoder().config
    whole = random_batch([9, 2, 3], config)
    parts = []
    for start, stop in ((0, 9), (9, 14)):
        part = random_batch([9] if start == 0 else [2, 3], config)
        part = part._replace(tokens_T=whole.tokens_T[start:stop])
        parts.append(part._replace(targets_R=part.tokens_T[part.rows_R + 1]))
    found = []
    for batches in ([whole], parts):
        trainer = Trainer(training_model(6), FLAT)
        losses = [trainer.update(batches, len(whole.targets_R)) for _ in range(3)]
        found.append((losses, dict(trainer.model.decoder.named_parameters())))
    for (a, norm_a), (b, norm_b) in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=0.0)
        torch.testing.assert_close(norm_a, norm_b, rtol=1e-3, atol=0.0)


def test_first_update_is_adamws() -> None:
    """After one step AdamW moves every weight by lr against its gradient's sign, and decays."""
    trainer = Trainer(training_model(7), FLAT, weight_decay=0.1, clip=1e-3)
    before = {n: p.detach().clone() for n, p in trainer.parameters.items()}
    batch = random_batch([9, 9, 9], trainer.model.decoder.config)
    _, grads = gradients(trainer.model, [batch])
    trainer.model.zero_grad()
    _, norm = trainer.update([batch], len(batch.targets_R))
    total = torch.stack([g.norm() for g in grads.values()]).norm() / len(batch.targets_R)
    torch.testing.assert_close(norm, total, rtol=1e-5, atol=0.0)
    for name, p in trainer.parameters.items():
        grad = grads[name] / len(batch.targets_R) * (1e-3 / total)
        decay = 0.1 if p.dim() > 1 else 0.0
        wanted = before[name] * (1 - 1e-2 * decay) - 1e-2 * grad / (grad.abs() + 1e-8)
        torch.testing.assert_close(p.detach(), wanted, rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_schedule(kind) -> None:
    rate = Schedule(kind, 2.0, 100, 10, 0.1, 0.3)
    rates = [rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] == pytest.approx(2.0 if kind == "constant" else 0.2)
    middle = {
        "cosine": 2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi * 45 / 90)) / 2),
        "linear": 2.0 * (0.1 + 0.9 * 0.5),
        "wsd": 2.0,
        "constant": 2.0,
    }
    assert rates[54] == pytest.approx(middle[kind])
    if kind == "wsd":
        assert rates[69] == 2.0
        assert rates[84] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))


def test_initial_weights() -> None:
    model = tiny_decoder(1, hidden_size=64, model_type="qwen2", num_hidden_layers=8)
    initialise(model, 3, 0.05)
    for name, p in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (p == 1).all()
        elif name.endswith("bias"):
            assert (p == 0).all()
        else:
            ends = name.endswith(("o_proj.weight", "down_proj.weight"))
            assert float(p.std()) == pytest.approx(0.05 / (4 if ends else 1), rel=0.1)


def test_a_small_text_is_learnt_by_heart() -> None:
    trainer = Trainer(training_model(8), FLAT, weight_decay=0.0)
    config = trainer.model.decoder.config
    batch = random_batch([12, 7], config)
    first, last = batch.tokens_T[:12].tolist(), batch.tokens_T[12:].tolist()
    for _ in range(60):
        trainer.update([batch], len(batch.targets_R))
    total, count = trainer.evaluate([batch]).tolist()
    assert total / count < 0.1
    found = continue_greedily(trainer.model, [first[:3], last[:2]], 20, {first[-1], last[-1]})
    assert found == [first[3:-1], last[2:-1]]
    assert continue_greedily(trainer.model, [first[:3]], 4, ()) == [first[3:7]]


def greedy_reference(decoder: Decoder, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        tokens = torch.nested.nested_tensor([torch.tensor(ids)], layout=torch.jagged)
        ids.append(int(decoder(tokens).values()[-1].argmax()))
    return ids[len(prompt) :]


def test_greedy_continuations_are_the_decoders_own() -> None:
    model = training_model(9)
    prompts = [[1, 2, 3], [4], [5, 6]]
    wanted = [greedy_reference(model.decoder, p, 6) for p in prompts]
    assert continue_greedily(model, prompts, 6, ()) == wanted
    stops = {wanted[1][2]}
    cut = [w[: next((i for i, t in enumerate(w) if t in stops), 6)] for w in wanted]
    assert continue_greedily(model, prompts, 6, stops) == cut
    long = list(range(62))
    assert [len(c) for c in continue_greedily(model, [long, [1]], 6, ())] == [2, 6]


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_step(recompute) -> None:
    """Block by block with fullgraph: eager's gradients, and one compilation for all lengths."""
    torch._dynamo.reset()
    changes = {"num_hidden_layers": 3}
    eager = training_model(10, changes=changes)
    compiled = training_model(10, changes=changes, compile="default", recompute=recompute)
    counters = torch._dynamo.utils.counters
    counters.clear()
    graphs = []
    for lengths in ([5, 9], [3], [7, 7, 7], [30], [3, 4, 2, 6, 8]):
        batch = random_batch(lengths, eager.decoder.config, sum(lengths))
        loss, got = gradients(compiled, [batch])
        expected, wanted = gradients(eager, [batch])
        torch.testing.assert_close(loss, expected, rtol=TOLERANCE, atol=0.0)
        assert_same(got, wanted)
        graphs.append(counters["stats"]["unique_graphs"])
    # All layers of one kind share one graph; the head's chunk is the other.
    assert graphs == [2] * 5


@pytest.mark.slow
def test_compiled_step_within_ddp(tmp_path) -> None:
    """A layer whose gradients fill a bucket (the first holds 1 MiB) is not cut there."""
    changes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 97}
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        results = []
        # Two would be needed to add up gradients, not to cut graphs; the scale is two's.
        for ranks in (Ranks(), Ranks(0, 2)):
            torch._dynamo.reset()
            model = training_model(11, changes=changes, compile="default")
            trainer = Trainer(model, FLAT, ranks=ranks, clip=0)
            batches = [random_batch(lengths, model.decoder.config) for lengths in ([5, 9], [7, 3])]
            results.append([trainer.update([b], len(b.targets_R)) for b in batches])
    finally:
        dist.destroy_process_group()
    for (loss, norm), (parallel_loss, parallel_norm) in zip(*results, strict=True):
        torch.testing.assert_close(parallel_loss, loss, rtol=TOLERANCE, atol=0.0)
        torch.testing.assert_close(parallel_norm, 2 * norm, rtol=TOLERANCE, atol=0.0)
