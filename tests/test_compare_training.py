"""The whole training step of `tools.compare_batching`: four ways to the same loss and gradients."""

import itertools
import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch._dynamo.utils
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from hypothesis import strategies as st
from torch._inductor.exc import InductorError

from minigen.batch import make_batch
from minigen.model import Decoder, DecoderConfig, jagged
from minigen.shapes import SHAPES
from minigen.trainer import initialise
from tests.command_line import refuse_in_one_line, run_tool
from tests.test_tools import last_line
from tools import compare_batching, memory, padded, training_ways
from tools.compare_batching import lengths_of, step_lengths
from tools.training_ways import (
    FLAT,
    PADDED,
    TRAINING_WAYS,
    UNPADDED,
    StepComparison,
    StepModels,
    StepOptions,
    TrainingWay,
    as_rectangle,
    rectangle_rows,
    split,
)

SMALL = {**SHAPES["tiny"], "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24}
CONFIGS = {
    "full": SMALL,
    "windows": {**SMALL, "model_type": "mistral", "sliding_window": 5},
    "norms": {**SMALL, "model_type": "qwen3", "head_dim": 8, "tie_word_embeddings": False},
}
FP32 = StepOptions(torch.float32, compile="eager", repeats=1)
LENGTHS = st.lists(st.integers(1, 12), min_size=2, max_size=6).filter(lambda n: max(n) > 1)


def small_decoder(kind: str = "full") -> Decoder:
    decoder = Decoder.from_config(DecoderConfig.from_hf(CONFIGS[kind]), dtype=torch.float32)
    initialise(decoder, 0, 0.1)
    return decoder


def random_samples(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(61) for _ in range(length)] for length in lengths]


# --- which samples, and how they lie -------------------------------------------------------------


@given(
    st.sampled_from(["uniform", "lognormal", "one-long"]),
    st.integers(1, 3000),
    st.integers(2, 9),
    st.integers(4, 200),
)
def test_step_lengths_fill_the_budget(kind: str, tokens: int, num_seqs: int, longest: int) -> None:
    lengths = step_lengths(kind, tokens, num_seqs, longest, seed=1)
    assert sum(lengths) == tokens
    assert all(1 <= length <= longest for length in lengths)
    # Draw after draw, the first one as the other phases have it; only the last length is cut.
    first = lengths_of(kind, num_seqs, longest, 1)[: len(lengths)]
    assert lengths[: len(first) - 1] == first[: len(lengths) - 1][: len(first) - 1]
    if kind == "one-long":
        full = [i for i, length in enumerate(lengths[:-1]) if length == longest]
        assert longest <= 16 or full == list(range(0, len(lengths) - 1, num_seqs))


def test_step_lengths_of_a_trace() -> None:
    assert step_lengths("trace", 25, 2, 10, 0, [4, 40, 7, 30]) == [4, 10, 7, 4]
    with pytest.raises(ValueError, match=r"the trace has 31 tokens, --tokens is 32"):
        step_lengths("trace", 32, 2, 10, 0, [4, 40, 7, 30])


@given(LENGTHS, st.none() | st.integers(12, 60))
def test_split_keeps_order_and_bound(lengths: list[int], max_rows: int | None) -> None:
    for rows_of in (rectangle_rows, sum):
        runs = split(range(len(lengths)), lengths, max_rows, rows_of)
        assert [i for run in runs for i in run] == list(range(len(lengths)))
        rows = [rows_of([lengths[i] for i in run]) for run in runs]
        if max_rows is None:
            assert len(runs) == 1
            continue
        assert max(rows) <= max_rows
        for run, after in itertools.pairwise(runs):  # none could take one sample more
            assert rows_of([lengths[i] for i in [*run, after[0]]]) > max_rows


@given(LENGTHS)
def test_rectangle_of_packed_samples(lengths: list[int]) -> None:
    samples = random_samples(lengths)
    config = DecoderConfig.from_hf(SMALL)
    tokens = [torch.tensor(sample) for sample in samples]
    packed = make_batch(tokens, [torch.ones_like(t, dtype=torch.bool) for t in tokens], config, 64)
    found = as_rectangle(packed)
    longest = max(lengths)
    rows = found.tokens_T.view(len(samples), longest).tolist()
    assert rows == [sample + [0] * (longest - len(sample)) for sample in samples]
    assert found.positions_T.tolist() == list(range(longest)) * len(samples)
    wanted = [
        (b * longest + i, token)
        for b, sample in enumerate(samples)
        for i, token in enumerate(sample[1:])
    ]
    assert list(zip(found.rows_R.tolist(), found.targets_R.tolist(), strict=True)) == wanted
    assert found.cu_seqlens_S1.diff().tolist() == lengths


# --- the same step -------------------------------------------------------------------------------


@given(
    kind=st.sampled_from(sorted(CONFIGS)),
    lengths=LENGTHS,
    max_rows=st.none() | st.integers(12, 40),
    recompute=st.booleans(),
    timed=st.sampled_from(TRAINING_WAYS),
)
def test_the_four_ways_take_the_same_step(
    kind: str, lengths: list[int], max_rows: int | None, recompute: bool, timed: TrainingWay
) -> None:
    decoder, samples = small_decoder(kind), random_samples(lengths)
    before = {name: p.clone() for name, p in decoder.named_parameters()}
    options = StepOptions(torch.float32, "eager", recompute, max_rows, repeats=1, peak_flops=1e9)
    comparison = StepComparison(decoder, samples, options)
    found = comparison.check()
    assert set(found) == {"padded", "grouped", "unpadded"}
    assert None not in found.values()
    # The oracle: each sample alone, by autograd's own cross-entropy.
    total = torch.zeros(())
    for sample in samples:
        ids = torch.tensor(sample)
        logits = decoder(jagged(ids, torch.tensor([0, len(ids)]))).values()
        total = total + F.cross_entropy(logits[:-1], ids[1:], reduction="sum")
    (total / (sum(lengths) - len(lengths))).backward()
    norm = math.sqrt(
        sum(float(p.grad.pow(2).sum()) for p in decoder.parameters() if p.grad is not None)
    )
    decoder.zero_grad()
    for way in TRAINING_WAYS:
        loss, its_norm = comparison.checked[way.name]
        assert loss == pytest.approx(
            float(total.detach()) / (sum(lengths) - len(lengths)), rel=1e-5
        )
        assert its_norm == pytest.approx(norm, rel=1e-4)
    row = comparison.measure(timed)
    assert row["ms"] > 0
    assert row["tokens_s"] == pytest.approx(sum(lengths) / row["ms"] * 1e3)
    assert row["mfu"] == pytest.approx(comparison.flop / row["ms"] * 1e3 / 1e9)
    assert row["peak_bytes"] >= 3 * sum(p.nbytes for p in decoder.parameters())
    assert 0 <= row["padding"] < 1
    if max_rows is not None:
        assert row["micro_batches"] >= sum(lengths) / max_rows
    forward = comparison.measure(timed, "train-forward")
    assert forward["ms"] > 0
    assert forward["tokens_s"] == pytest.approx(sum(lengths) / forward["ms"] * 1e3)
    assert all(forward[name] == row[name] for name in ("padding", "micro_batches"))
    assert all(p.grad is None for p in decoder.parameters())
    # At a rate of 0 AdamW leaves the weights as they are, for the next way to begin with.
    assert all(torch.equal(p, before[name]) for name, p in decoder.named_parameters())


def test_what_counts_as_arithmetic() -> None:
    comparison = StepComparison(small_decoder(), random_samples([3, 1]), FP32)
    # q and o 16 x 16, k and v 16 x 8, the MLP's three 16 x 24, twice; the head for two targets.
    weights = 2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24)
    pairs = 1 + 2 + 3 + 1
    # Two products of head dim 4 for 4 heads in 2 layers, three times with the backward.
    attention = 3 * 2 * 2 * 4 * 4 * 2 * pairs
    assert comparison.flop == 6 * weights * 4 + 6 * 16 * 61 * 2 + attention


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_ways_agree_in_half_precision(dtype: torch.dtype) -> None:
    comparison = StepComparison(
        small_decoder(), random_samples([9, 2, 12, 5]), StepOptions(dtype, "eager", repeats=1)
    )
    for differences in comparison.check().values():
        assert differences is not None
        assert differences["gradients"] < 16 * torch.finfo(dtype).eps
    assert comparison.measure(FLAT)["ms"] > 0


@pytest.mark.slow
def test_compiled_as_it_is_timed() -> None:
    options = StepOptions(torch.float32, "default", repeats=1, max_rows=24)
    torch.compiler.reset()
    comparison = StepComparison(small_decoder(), random_samples([9, 2, 12, 5, 12, 1]), options)
    comparison.check()
    for way in TRAINING_WAYS:
        assert comparison.measure(way)["ms"] > 0


# --- what is refused, and what does not fit ------------------------------------------------------


@pytest.mark.parametrize("broken", ["sdpa_rectangle", "unpadded_rectangle"])
def test_a_wrong_layer_is_noticed(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(padded, broken)
    monkeypatch.setattr(padded, broken, lambda *args: right(*args) * 1.01)
    with pytest.raises(ValueError, match="and flat disagree"):
        StepComparison(small_decoder(), random_samples([7, 3]), FP32).check()


def test_a_sample_less_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_last(packed):
        right = as_rectangle(packed)
        return right._replace(rows_R=right.rows_R[:-1], targets_R=right.targets_R[:-1])

    monkeypatch.setattr(training_ways, "as_rectangle", without_last)
    with pytest.raises(ValueError, match="disagree: the loss differs by"):
        StepComparison(small_decoder(), random_samples([7, 3]), FP32).check()


def test_what_is_timed_must_be_what_was_checked() -> None:
    decoder = small_decoder()
    comparison = StepComparison(decoder, random_samples([7, 3]), FP32)
    comparison.check()
    with torch.no_grad():
        decoder.embed.weight *= 1.1
    for phase in ("train-step", "train-forward"):
        with pytest.raises(ValueError, match="padded and flat disagree"):
            comparison.measure(PADDED, phase)


def too_large(*_: object) -> torch.Tensor:
    raise torch.OutOfMemoryError


def test_what_does_not_fit_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(padded, "sdpa_rectangle", too_large)
    comparison = StepComparison(small_decoder(), random_samples([7, 3]), FP32)
    found = comparison.check()
    assert [name for name, value in found.items() if value is None] == ["grouped", "padded"]
    rows = {way.name: comparison.measure(way) for way in TRAINING_WAYS}
    for name in ("grouped", "padded"):
        assert (rows[name]["ms"], rows[name]["error"]) == (None, "out of memory")
    for name in ("unpadded", "flat"):
        assert rows[name]["ms"] > 0
    monkeypatch.undo()


def test_what_does_not_fit_once_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = small_decoder()
    comparison = StepComparison(decoder, random_samples([7, 3]), FP32)
    comparison.check()
    monkeypatch.setattr(padded, "unpadded_rectangle", too_large)
    for phase in ("train-forward", "train-step"):
        row = comparison.measure(UNPADDED, phase)
        assert (row["ms"], row["error"]) == (None, "out of memory")
    assert all(p.grad is None for p in decoder.parameters())
    assert comparison.measure(FLAT)["ms"] > 0


@pytest.mark.parametrize("times", [1, 3])
def test_what_does_not_compile_runs_uncompiled(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where that fails, too, it is a result."""
    right, calls = padded.unpadded_rectangle, []

    def fails(*args: Any) -> torch.Tensor:
        calls.append(args)
        if len(calls) <= times:
            raise InductorError(AssertionError(""), None)
        return right(*args)

    monkeypatch.setattr(padded, "unpadded_rectangle", fails)
    decoder = small_decoder()
    models = StepModels(decoder, FP32)
    comparison = StepComparison(decoder, random_samples([7, 3]), FP32, models)
    left_out = [name for name, value in comparison.check().items() if value is None]
    assert left_out == (["unpadded"] if times == 3 else [])
    row = comparison.measure(UNPADDED)
    reason = "does not compile (InductorError)"
    assert row["uncompiled"] == reason
    assert (row["ms"] is None) == (times == 3)
    assert row.get("error") == (reason if times == 3 else None)
    assert comparison.measure(FLAT)["ms"] > 0
    # What did not compile for the first lengths is not tried again for the next.
    later = StepComparison(decoder, random_samples([5, 4]), FP32, models)
    assert later.check()["unpadded"] is not None
    assert later.measure(UNPADDED)["uncompiled"] == reason


@pytest.mark.slow
def test_other_lengths_run_what_is_compiled() -> None:
    options = StepOptions(torch.float32, "default", repeats=1)
    torch.compiler.reset()
    decoder = small_decoder()
    models = StepModels(decoder, options)
    graphs = []
    for lengths in ([9, 2, 12, 5], [7, 30, 3, 3, 3, 25, 2]):
        StepComparison(decoder, random_samples(lengths), options, models).check()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] > 0


def test_flat_must_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = StepComparison(small_decoder(), random_samples([7, 3]), FP32)
    monkeypatch.setattr(training_ways, "extra_memory", too_large)
    with pytest.raises(ValueError, match="flat, which the others are compared with, does not fit"):
        comparison.check()


def test_a_cpu_is_not_asked_for_more_than_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system would end the process: what needs too much is not tried."""
    asked = []

    def refuses(num_bytes: float, device: torch.device) -> bool:
        asked.append(num_bytes)
        return len(asked) == 3  # padded, the last

    monkeypatch.setattr(training_ways, "too_large_for_host", refuses)
    monkeypatch.setattr(training_ways, "extra_memory", lambda function, _: function() and 10**9)
    decoder = small_decoder()
    comparison = StepComparison(decoder, random_samples([12, 2, 2, 2]), FP32)
    assert [name for name, value in comparison.check().items() if value is None] == ["padded"]
    # Rectangles of 48 and of 12 rows where flat has 18, and weights that do not grow with rows.
    weights = sum(p.nbytes for p in decoder.parameters())
    rest = 10**9 - weights
    assert asked == pytest.approx([weights + rest * rows / 18 for rows in (48, 12, 48)])
    assert memory.too_large_for_host(1e18, torch.device("cpu"))
    assert not memory.too_large_for_host(1.0, torch.device("cpu"))
    assert not memory.too_large_for_host(1e18, torch.device("cuda"))


def test_is_out_of_memory() -> None:
    for error in (
        torch.OutOfMemoryError(),
        MemoryError(),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("CUDA error: out of memory"),
    ):
        assert memory.is_out_of_memory(error)
    assert not memory.is_out_of_memory(RuntimeError("shapes do not match"))
    assert not memory.is_out_of_memory(ValueError("out of memory"))


# --- the command ---------------------------------------------------------------------------------


def test_the_training_step_as_a_command() -> None:
    done = run_tool(
        "compare_batching", "--shape", "tiny", "--compile", "eager", "--phases", "train-step",
        "--num-seqs", 4, "--max-len", 64, "--tokens", 300, "--max-rows", 128, "--repeats", 1,
        "--lengths", "lognormal", "one-long", "--dtype", "bfloat16", "--peak-flops", "1e12",
        "--recompute", "--plot", "none",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = last_line(done.stdout)
    trained = document["train_step"]
    # Four a draw: 64 + 3 x 16 are 112 tokens, twice; then 64 and 12 of 16.
    assert trained["lengths"]["one-long"] == [64, 16, 16, 16] * 2 + [64, 12]
    assert sum(trained["lengths"]["lognormal"]) == 300
    assert (trained["recompute"], trained["max_rows"]) == (True, 128)
    assert document["agreement"] == {}
    rows = {(r["lengths"], r["way"]): r for r in document["rows"]}
    assert len(rows) == 2 * 4
    for row in rows.values():
        assert row["phase"] == "train-step"
        assert row["mfu"] == pytest.approx(row["tflop_s"], rel=1e-4)
    assert rows["one-long", "flat"]["micro_batches"] == 3
    # [64, 16], [16, 16] twice, and [64, 12]: another sample would make more than 128 rows.
    assert rows["one-long", "padded"]["micro_batches"] == 5
    assert rows["one-long", "padded"]["padding"] == pytest.approx(1 - 300 / 448, abs=1e-5)
    assert rows["one-long", "flat"]["padding"] == 0
    assert "MFU" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-rows", "16", "--max-len", "32"], "--max-rows is 16, but must hold a sequence"),
        (["--phases", "decode", "--tokens", "9"], "--tokens is for the training phases"),
        (["--phases", "decode", "--recompute"], "--recompute is for the training phases"),
    ],
)
def test_options_that_contradict(
    arguments: list[str], message: str, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*arguments, "--plot", "none"]
    refuse_in_one_line(compare_batching, arguments, message, capsys, monkeypatch)
