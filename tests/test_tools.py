"""The benchmark command and the tools: their arithmetic, their refusals, and one run of each."""

import argparse
import contextlib
import gc
import importlib
import importlib.util
import itertools
import json
import lzma
import math
import random
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from random import randint
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minigen import LLM, SamplingParams, bench_rival, cli, measure, workloads
from minigen.__main__ import main
from minigen.bench_options import read_goodput
from minigen.kernels import native
from minigen.measure import Cost, StepMeter, percentile, percentiles
from minigen.model import Decoder, DecoderConfig, jagged
from minigen.report import number, table
from minigen.shapes import SHAPES
from minigen.start import pause_collection
from tests.command_line import ROOT, environment, refuse_in_one_line, run_minigen, run_tool
from tools import compare_batching, compare_compile_modes, padded, scale
from tools.batching_ways import WAYS, Padded, Way, groups_of, padding_share
from tools.common import NO_MATPLOTLIB, Plot, tokens_of
from tools.compare_batching import check_agreement, lengths_of

TINY = SHAPES["tiny"]
SMALL = ("--shape", "tiny", "--compile", "eager")
BENCH = ("bench", "fixed", *SMALL, "--num-cache-blocks", 64, "--max-model-len", 256)


def last_line(text: str) -> dict[str, Any]:
    return json.loads(text.strip().splitlines()[-1])


def trace_file(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]) + "\n")
    return path


# --- arithmetic ----------------------------------------------------------------------------------

NUMBERS = st.floats(-1e6, 1e6)


@given(st.lists(NUMBERS, min_size=1, max_size=30), st.floats(0, 100))
def test_percentile_is_numpys(values: list[float], q: float) -> None:
    assert percentile(values, q) == pytest.approx(np.percentile(values, q), rel=1e-9, abs=1e-6)


def test_percentiles_have_names_and_units() -> None:
    assert percentiles([0.001] * 5, 1e3) == pytest.approx({"p50": 1.0, "p90": 1.0, "p99": 1.0})
    assert percentiles([]) == {}
    with pytest.raises(ValueError, match="at least one"):
        percentile([], 50)


CONFIGS = {
    "full": DecoderConfig.from_hf(TINY),
    "windows": DecoderConfig.from_hf({**TINY, "model_type": "mistral", "sliding_window": 5}),
}


@given(st.sampled_from(sorted(CONFIGS)), st.integers(1, 20), st.integers(0, 20))
def test_cost_counts_each_key_that_is_read(kind: str, first: int, steps: int) -> None:
    config = CONFIGS[kind]
    cost = Cost(config, weight_bytes=0, linear_flop=0, itemsize=4)
    window = config.layer_windows[0] or math.inf
    seen = [min(kv_len, window) for kv_len in range(first, first + steps)]
    a_key = 2 * config.num_kv_heads * config.head_dim * 4  # key and value
    assert cost.decode_bytes(first, first + steps) == config.num_layers * a_key * sum(seen)
    a_pair = 2 * 2 * config.num_heads * config.head_dim  # two products, multiply and add
    seen = [min(at + 1, window) for at in range(steps)]
    assert cost.prompt_flop(steps) == config.num_layers * a_pair * sum(seen)


@pytest.mark.parametrize("tied", [True, False])
def test_cost_of_weights(tied: bool) -> None:
    config = DecoderConfig.from_hf({**TINY, "tie_word_embeddings": tied})
    decoder = Decoder.from_config(config, dtype=torch.bfloat16, seed=0)
    # 2 layers of q, k, v, o and the MLP's three; 5 norms of 64; one matrix of words either way.
    matrices = 2 * (64 * (64 + 32 + 32) + 64 * 64 + 3 * 64 * 160)
    cost = Cost.of(decoder)
    assert cost.weight_bytes == 2 * (matrices + 5 * 64 + 512 * 64)
    assert cost.linear_flop == 2 * (matrices + 5 * 64)
    assert cost.block_bytes(16) == 2 * 2 * 16 * 2 * 16 * 2


def test_numbers_and_tables() -> None:
    assert [number(x) for x in (None, 1234567, 0.012345, 1234.5, "as is")] == [
        "-", "1,234,567", "0.0123", "1,234", "as is",
    ]  # fmt: skip
    assert table(["a", "b"], [["x", 1], ["long", 10]]) == "a      b\nx      1\nlong  10"
    assert table([], [["x", 1]]) == "x  1"


# --- workloads -----------------------------------------------------------------------------------


def test_nano_is_the_published_one() -> None:
    random.seed(0)
    prompts = [[randint(0, 10000) for _ in range(randint(100, 1024))] for _ in range(256)]
    outs = [randint(100, 1024) for _ in range(256)]
    requests = workloads.nano(256, vocab_size=151936)
    assert [r.prompt for r in requests] == prompts
    assert [r.max_tokens for r in requests] == outs
    assert (sum(map(len, prompts)), sum(outs)) == (142_827, 133_966)
    assert workloads.nano(3, vocab_size=151936) == requests[:3]
    assert max(token for r in workloads.nano(2, vocab_size=512) for token in r.prompt) < 512


ROWS = ("2023-11-16 18:15:46.6805900,374,44", "2023-11-16 18:15:50.9951690,396,109")


@pytest.mark.parametrize("packed", [False, True])
def test_read_trace(tmp_path: Path, packed: bool) -> None:
    path = trace_file(tmp_path / "trace.csv", *ROWS)
    if packed:
        path = tmp_path / "trace.csv.xz"
        path.write_bytes(lzma.compress((tmp_path / "trace.csv").read_bytes()))
    first, second = workloads.read_trace(path)
    assert first == workloads.TraceRow(0.0, 374, 44)
    assert (second.prompt_tokens, second.output_tokens) == (396, 109)
    assert second.arrival_s == pytest.approx(4.314579, abs=1e-5)


@given(st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 99), st.integers(1, 99)), min_size=1))
def test_read_trace_sorts_by_arrival(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[float, int, int]]
) -> None:
    path = tmp_path_factory.mktemp("trace") / "trace.csv"
    read = workloads.read_trace(trace_file(path, *(f"{t!r},{p},{o}" for t, p, o in rows)))
    start = min(t for t, _, _ in rows)
    wanted = sorted(((t - start, p, o) for t, p, o in rows), key=lambda row: row[0])
    assert [(r.arrival_s, r.prompt_tokens, r.output_tokens) for r in read] == wanted


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("yesterday,3,4", r":3: TIMESTAMP is 'yesterday'"),
        ("nan,3,4", r":3: TIMESTAMP is 'nan'"),
        ("1,0,4", r":3: ContextTokens is '0': a whole number above 0"),
        ("1,3,-4", r":3: GeneratedTokens is '-4'"),
        ("1,3", r":3: GeneratedTokens is ''"),
    ],
)
def test_read_trace_names_the_bad_line(tmp_path: Path, row: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        workloads.read_trace(trace_file(tmp_path / "trace.csv", ROWS[0], row))


def test_read_trace_refuses_other_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no request"):
        workloads.read_trace(trace_file(tmp_path / "empty.csv"))
    other = tmp_path / "other.csv"
    other.write_text("time,tokens\n1,2\n")
    with pytest.raises(ValueError, match="no column TIMESTAMP"):
        workloads.read_trace(other)
    other = tmp_path / "other.csv.xz"
    other.write_text("this is not packed")
    with pytest.raises(ValueError, match="no readable CSV"):
        workloads.read_trace(other)


def test_replayed_scales_time_and_leaves_out_what_does_not_fit() -> None:
    rows = [workloads.TraceRow(float(i), 10 * (i + 1), 5) for i in range(4)]

    def replay(rate: float, num: int | None = None):
        return workloads.replayed(rows, num_requests=num, rate=rate, vocab_size=9, max_model_len=35)

    requests, left_out = replay(2.0)
    assert left_out == 1
    assert [(len(r.prompt), r.arrival_s) for r in requests] == [(10, 0), (20, 0.5), (30, 1.0)]
    assert all(0 <= token < 9 for r in requests for token in r.prompt)
    assert [r.arrival_s for r in replay(math.inf)[0]] == [0, 0, 0]
    assert len(replay(1.0, 2)[0]) == 2


def test_read_goodput() -> None:
    assert read_goodput(["ttft:200", "e2el:1.5"]) == {"ttft": 200.0, "e2el": 1.5}
    for bad in ("ttft", "speed:3", "tpot:-1", "tpot:fast"):
        with pytest.raises(ValueError, match="NAME:MILLISECONDS"):
            read_goodput([bad])


# --- the model without a checkpoint --------------------------------------------------------------


def test_llm_from_config_runs_the_decoder_of_that_seed() -> None:
    # A head of its own: with the embedding as head a random model repeats its last token.
    untied = {**TINY, "tie_word_embeddings": False}
    options = {"compile": "eager", "num_cache_blocks": 8, "progress": False}
    llm = LLM.from_config(untied, weights_seed=3, **options)
    assert llm.tokenizer is None
    params = SamplingParams(temperature=0, max_tokens=6)
    [found] = llm.generate([[5, 6, 7]], params, progress=False)
    decoder = Decoder.from_config(DecoderConfig.from_hf(untied), seed=3)
    tokens = [5, 6, 7]
    for _ in range(6):
        packed = jagged(torch.tensor(tokens), torch.tensor([0, len(tokens)]))
        tokens.append(int(decoder(packed).values()[-1].argmax()))
    assert found.outputs[0].token_ids == tokens[3:]


def test_llm_from_config_refuses_a_bad_config() -> None:
    with pytest.raises(ValueError, match="model_type is 'bert'"):
        LLM.from_config({"model_type": "bert"})


def test_a_steps_time_has_three_parts() -> None:
    llm = LLM.from_config(TINY, compile="eager", num_cache_blocks=8, progress=False)
    params = SamplingParams(temperature=0, max_tokens=5)
    llm.engine.add_request("a", [1, 2, 3], params)
    meter = StepMeter(llm.engine)
    while llm.engine.has_unfinished():
        meter.step()
    assert [step.output_tokens for step in meter.steps] == [1] * 5
    assert [step.prompt_tokens for step in meter.steps] == [3, 0, 0, 0, 0]
    for step in meter.steps:
        assert min(step.host_seconds, step.launch_seconds, step.wait_seconds) > 0
        parts = step.host_seconds + step.launch_seconds + step.wait_seconds
        assert parts <= step.seconds + 1e-9


# --- bench ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fixed"], "there is no model to measure: give one of --shape"),
        (["fixed", "--shape", "tiny", "--model", "x"], "--model and --shape name two models"),
        (["fixed", "--shape", "huge"], "--shape 'huge' is unknown"),
        (["fixed", "--config", "absent.json"], "absent.json cannot be read"),
        (["fixed", "--shape", "tiny", "--batch-size", "0"], "must be a whole number above 0"),
        (["trace", "--shape", "tiny"], "trace needs --dataset-path"),
        (["trace", "--shape", "tiny", "--dataset-path", "absent.csv"], "absent.csv: No such file"),
        (["trace", "--shape", "tiny", "--rate", "0"], "must be a number above 0"),
        (["start", "--shape", "tiny", "--rival", "transformers"], "not start"),
        (["nano", "--shape", "tiny", "--num-prompts", "257"], "1 to 256 requests, not 257"),
    ],
)
def test_bench_refuses_in_one_line(arguments: list[str], message: str, capsys) -> None:
    try:
        code = main(["bench", *arguments])
    except SystemExit as left:  # argparse's own way
        code = left.code
    printed = capsys.readouterr()
    assert code == 2
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def check_steps(row: dict[str, Any]) -> None:
    for name in ("step_ms", "host_ms", "launch_ms", "wait_ms"):
        assert 0 <= row[name]["p50"] <= row[name]["p90"] <= row[name]["p99"]
    assert row["host_ms"]["p50"] < row["step_ms"]["p50"]
    assert 0 < row["share_of_limit"] < 1
    assert row["gb_s"] > 0


def test_bench_fixed_as_a_command() -> None:
    done = run_minigen(*BENCH, "--batch-size", 1, 3, "--input-len", 20, "--output-len", 9)
    assert done.returncode == 0, done.stderr
    document = last_line(done.stdout)
    assert (document["workload"], document["model"]) == ("fixed", "tiny")
    assert document["start"] == "uncompiled"
    parts = document["start_parts_s"]
    assert set(parts) == {"import", "load", "compile", "capture", "first step"}
    assert min(parts.values()) >= 0
    assert sum(parts.values()) == pytest.approx(document["start_s"], rel=1e-4)
    assert document["recompilations"] == 0
    assert document["memory"]["cache_bytes"] == 64 * 16 * 2 * 2 * 2 * 16 * 4
    # Python and torch, not the half gigabyte tensors that the bandwidth is measured with.
    assert document["memory"]["weight_bytes"] < document["memory"]["peak_bytes"] < 2**30
    assert set(document["limits"]) == {"copy_gb_s", "read_gb_s", "matmul_tflop_s"}
    for batch, row in zip((1, 3), document["rows"], strict=True):
        assert (row["batch"], row["prompt_tokens"]) == (batch, 20 * batch)
        assert row["output_tokens"] == 8 * batch  # all but each first
        assert row["num_steps"] == 8
        rate = row["num_steps"] * batch / row["decode_tokens_s"]
        assert 8 * row["step_ms"]["p50"] / 1e3 / 3 < rate  # the mean is of the median's size
        check_steps(row)
    assert "share of limit" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch-size", 2, "--output-len", 1), "--output-len 1 is too short at batch 2"),
        # Ten steps of prefill: the first request ends in the third.
        (("--batch-size", 4, "--output-len", 3), "--output-len 3 is too short at batch 4"),
        (("--batch-size", 5), "--batch-size 5 is more than --max-num-seqs 4"),
        (("--batch-size", 2, "--output-len", 300), "has 310 tokens with its output, the context"),
    ],
)
def test_bench_refuses_what_cannot_be_timed(
    arguments: tuple[object, ...], message: str, capsys
) -> None:
    engine = ("--max-num-seqs", 4, "--max-num-batched-tokens", 4, "--input-len", 10)
    assert main([str(a) for a in (*BENCH, *engine, *arguments)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("workload", "given"),
    [
        *itertools.product(("nano", "fixed", "trace"), ([], ["--max-model-len", "128"])),
        ("fixed", ["--max-num-seqs", "2"]),
    ],
)
def test_bench_refuses_requests_before_it_loads_a_model(
    workload: str, given: list[str], tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object) -> None:
        pytest.fail("a model was loaded")

    monkeypatch.setattr("minigen.bench.load", load)
    monkeypatch.setattr("minigen.measure.measure_limits", load)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**TINY, "max_position_embeddings": 256}))
    trace = trace_file(tmp_path / "t.csv", "0,300,9", "1,400,1")
    sizes = ("--batch-size", "3", "--input-len", "250", "--output-len", "20")
    options = {"nano": (), "fixed": sizes, "trace": ("--dataset-path", str(trace))}[workload]
    assert main(["bench", workload, "--config", str(config), *options, *given]) == 2
    printed = capsys.readouterr()
    context = 128 if "--max-model-len" in given else 256
    said = {
        "nano": f"tokens with its output, the context holds {context}: give shorter",
        "fixed": f"a request has 270 tokens with its output, the context holds {context}",
        "trace": f"t.csv fits into the context of {context} tokens",
    }[workload]
    if "--max-num-seqs" in given:
        said = "--batch-size 3 is more than --max-num-seqs 2"
    assert said in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("bench", "nano", "--shape", "tiny", "--max-model-len", "512"),
        ("bench", "nano", "--model", "./absent"),
        ("generate", "--model", "./absent", "--prompt", "a"),
        ("chat", "--model", "./absent"),
    ],
)
def test_what_is_refused_is_so_before_torch_is_imported(arguments: tuple[str, ...]) -> None:
    code = (
        "import sys; from minigen.__main__ import main; "
        f"code = main({list(arguments)!r}); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), input="", timeout=120,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1


def test_bench_host_as_a_command() -> None:
    sizes = ("--batch-size", 1, 3, "--waiting", 5, "--max-num-batched-tokens", 64)
    done = run_tool("bench_host", *sizes, "--input-len", 20, "--steps", 5)
    assert done.returncode == 0, done.stderr
    rows = last_line(done.stdout)["rows"]
    assert [(row["step"], row["batch"], row["waiting"]) for row in rows] == [
        ("decode", 1, 0), ("decode", 3, 0), ("decode", 3, 5), ("mixed", 3, 0)
    ]  # fmt: skip
    assert all(0 < row["us"] < 1e6 for row in rows)
    refused = run_tool("bench_host", "--batch-size", 64, "--max-num-batched-tokens", 64)
    assert refused.returncode == 2
    assert "--batch-size 64 leaves no room for a prompt" in refused.stderr


def test_bench_nano_beside_transformers(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    short = [workloads.Request([1] * n, n) for n in (3, 9)]
    monkeypatch.setattr(workloads, "nano", lambda count, vocab_size: short[:count])
    caches, made = [], []

    def load(*args: Any, **options: Any) -> LLM:
        llm = cli_load(*args, **options)
        caches.append(weakref.ref(llm.engine.runner.caches[0][0]))
        return llm

    class Padded(bench_rival._Padded):
        def __init__(self, *args: Any) -> None:
            made.append(caches[0]())
            super().__init__(*args)

    cli_load = cli.load_llm
    monkeypatch.setattr(cli, "load_llm", load)
    monkeypatch.setattr(bench_rival, "_Padded", Padded)
    pause_collection()  # so that loading leaves what it makes out of collections
    try:
        arguments = ["bench", "nano", *SMALL, "--num-prompts", "2", "--rival", "transformers"]
        assert main([*arguments, "--num-cache-blocks", "64"]) == 0
    finally:
        gc.unfreeze()
    assert made == [None]  # the rival has the memory to itself
    document = last_line(capsys.readouterr().out)
    [row] = document["rows"]
    assert (row["requests"], row["prompt_tokens"], row["output_tokens"]) == (2, 12, 12)
    assert row["output_tokens_s"] == pytest.approx(12 / row["seconds"], rel=1e-4)
    check_steps(row)
    [rival] = document["rival"]["rows"]
    assert rival["output_tokens_s"] == pytest.approx(12 / rival["seconds"], rel=1e-4)


@pytest.mark.parametrize(("whole", "rate"), [(3.0, 6.0), (1.0, None), (0.5, None)])
def test_the_rivals_decoding_is_what_is_left_of_all(whole: float, rate: float | None) -> None:
    seconds = iter([9.0, 1.0, whole])
    requests = [workloads.Request([1] * 5, 7)] * 2
    asked = []

    def generate(batch: Sequence[workloads.Request], temperature: float) -> float:
        asked.append([request.max_tokens for request in batch])
        return next(seconds)

    found = bench_rival._rival_decode(generate, requests)
    assert found == {"prefill_tokens_s": 10.0, "decode_tokens_s": rate}
    assert asked == [[2, 2], [1, 1], [7, 7]]  # the first one warms up


def test_bench_trace(tmp_path: Path, capsys) -> None:
    path = trace_file(tmp_path / "t.csv", "10,8,4", "10.5,17,1", "11,4,3", "12,9000,4")
    arguments = ["bench", "trace", *SMALL, "--dataset-path", str(path), "--rate", "2"]
    slo = ["--goodput", "ttft:60000", "tpot:60000"]
    assert main([*arguments, *slo, "--num-cache-blocks", "64", "--max-model-len", "64"]) == 0
    [row] = last_line(capsys.readouterr().out)["rows"]
    assert (row["requests"], row["left_out"], row["output_tokens"]) == (3, 1, 8)
    assert row["seconds"] >= 0.5  # the last arrival: one second at twice the speed
    assert row["good_requests"] == 3
    assert row["goodput_requests_s"] == pytest.approx(3 / row["seconds"], rel=1e-4)
    for name in ("ttft_ms", "itl_ms", "tpot_ms", "e2el_ms"):
        assert 0 < row[name]["p50"] <= row[name]["p99"] < 60000
    assert row["ttft_ms"]["p50"] <= row["e2el_ms"]["p50"]
    assert row["request_tokens_s"]["p99"] <= row["request_tokens_s"]["p50"]


# --- four ways to batch --------------------------------------------------------------------------


def test_padding_of_known_lengths() -> None:
    lengths = [8, 1, 2, 5]
    assert padding_share(lengths, [[0, 1, 2, 3]]) == 1 - 16 / 32
    # One token; two; five and eight, each as long as eight.
    assert groups_of(lengths) == [[1], [2], [0, 3]]
    assert padding_share(lengths, groups_of(lengths)) == pytest.approx(1 - 16 / 19)


@pytest.mark.parametrize("kind", ["uniform", "lognormal", "one-long"])
def test_lengths_of(kind: str) -> None:
    lengths = lengths_of(kind, 50, 100, seed=0)
    assert len(lengths) == 50
    assert all(1 <= length <= 100 for length in lengths)
    assert len(set(lengths)) > 1
    assert lengths == lengths_of(kind, 50, 100, seed=0)
    assert lengths_of("trace", 2, 10, 0, [4, 40, 7]) == [4, 10]


def small_decoder(kind: str, dtype: torch.dtype = torch.float32) -> Decoder:
    return Decoder.from_config(CONFIGS[kind], dtype=dtype, seed=0)


@given(
    kind=st.sampled_from(sorted(CONFIGS)),
    lengths=st.lists(st.integers(1, 20), min_size=2, max_size=5),
    num_steps=st.integers(1, 3),
    native_kernels=st.booleans(),
)
def test_the_four_ways_agree(
    kind: str, lengths: list[int], num_steps: int, native_kernels: bool
) -> None:
    if native_kernels:
        native.load()
    else:
        native.unload()
    decoder = small_decoder(kind)
    rng = random.Random(0)
    prompts = [[rng.randrange(512) for _ in range(length)] for length in lengths]
    steps_NS = torch.randint(512, (num_steps, len(prompts)))
    found = check_agreement(decoder, prompts, steps_NS)
    assert set(found) == {"padded", "grouped", "unpadded"}
    # The oracle: each prompt alone, with what it is given in the steps.
    as_it_is = compare_batching.as_it_is
    for way in WAYS:
        laid = way(decoder, prompts, num_steps, as_it_is)
        laid.make_cache()
        found_RSV = [laid.prefill()]
        found_RSV += [laid.decode(tokens_S, step) for step, tokens_S in enumerate(steps_NS)]
        for i, prompt in enumerate(prompts):
            ids = torch.tensor([*prompt, *steps_NS[:, i].tolist()])
            logits_TV = decoder(jagged(ids, torch.tensor([0, len(ids)]))).values()
            for step, found_SV in enumerate(found_RSV):
                expected_V = logits_TV[len(prompt) - 1 + step]
                torch.testing.assert_close(found_SV[i], expected_V, rtol=1e-4, atol=1e-5)


SERVING = compare_batching.SERVING


@pytest.mark.parametrize(
    ("broken", "phases"),
    [
        ("sdpa_prefill_layer", SERVING),
        ("sdpa_prefill_layer", ["prefill"]),
        ("sdpa_decode_layer", SERVING),
        ("sdpa_decode_layer", ["decode"]),
        ("unpadded_prefill_layer", ["prefill"]),
        ("unpadded_decode_layer", ["decode"]),
    ],
)
def test_a_wrong_way_is_noticed(
    broken: str, phases: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right, calls = getattr(padded, broken), []

    def wrong(*args: Any) -> torch.Tensor:
        calls.append(args)
        # The norms after it would hide a factor.
        out_BLE = right(*args)
        return out_BLE + 0.01 * out_BLE.flip(-1)

    monkeypatch.setattr(padded, broken, wrong)
    with pytest.raises(ValueError, match="and flat disagree"):
        check_agreement(small_decoder("full"), [[1, 2, 3], [4]], torch.tensor([[5, 6]]), phases)
    assert calls


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("broken", ["sdpa_decode_layer", "unpadded_decode_layer"])
def test_what_is_no_number_is_noticed(
    broken: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the last of several results, too."""
    right = getattr(padded, broken)
    monkeypatch.setattr(padded, broken, lambda *args: right(*args) * value)
    with pytest.raises(ValueError, match=r"logits differ by (nan|inf)"):
        check_agreement(small_decoder("full"), [[1, 2, 3], [4]], torch.tensor([[5, 6]]))


@pytest.mark.parametrize("way", WAYS)
@given(lengths=st.lists(st.integers(1, 40), min_size=2, max_size=6), num_steps=st.integers(1, 9))
def test_the_padding_of_a_cache_is_that_of_its_memory(
    way: type[Way], lengths: list[int], num_steps: int
) -> None:
    decoder = small_decoder("full")
    laid = way(decoder, [[1] * n for n in lengths], num_steps, compare_batching.as_it_is)
    laid.make_cache()
    config = decoder.config
    row_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4
    held = sum(lengths) + num_steps * len(lengths)
    assert laid.padding("decode") == pytest.approx(1 - held * row_bytes / laid.cache_bytes())


@pytest.mark.parametrize("way", WAYS)
def test_decoding_can_be_timed_again_and_again(way: type[Way]) -> None:
    """The cache is filled once, without the compiler; each round of steps gives the same logits."""

    calls: list[tuple[Any, ...]] = []

    def wrap(layer: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *args: calls.append(args) or layer(*args)

    prompts, steps_NS = [[1, 2, 3], [4], [5] * 20], torch.tensor([[6, 7, 8], [9, 10, 11]])
    laid = way(small_decoder("full"), prompts, 2, wrap)

    def decoded() -> list[torch.Tensor]:
        return [laid.decode(tokens_S, step) for step, tokens_S in enumerate(steps_NS)]

    laid.make_cache()
    laid.prefill()
    expected = decoded()
    laid.make_cache()
    calls.clear()
    laid.fill_cache()
    assert not calls
    for _ in range(2):
        for found_SV, expected_SV in zip(decoded(), expected, strict=True):
            assert torch.equal(found_SV, expected_SV)


def test_what_does_not_fit_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(padded, "sdpa_prefill_layer", too_large)
    rows = compare_batching.measure(
        Padded, small_decoder("full"), [[1, 2], [3]], torch.tensor([[4, 5]]), 1,
        compare_batching.as_it_is,
    )  # fmt: skip
    assert [(r["phase"], r["ms"], r["error"]) for r in rows] == [
        (phase, None, "out of memory") for phase in ("prefill", "decode")
    ]


def test_the_check_takes_the_first_of_long_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []

    def check(_: Decoder, prompts: list[list[int]], steps_NS: torch.Tensor, phases: object) -> Any:
        checked.append(([len(prompt) for prompt in prompts], list(steps_NS.shape), phases))
        return {}

    monkeypatch.setattr(compare_batching, "check_agreement", check)
    monkeypatch.setattr(compare_batching, "measure", lambda *_: [])
    monkeypatch.setattr(compare_batching, "CHECKED_LEN", 40)
    monkeypatch.setattr(compare_batching, "CHECKED_SEQS", 3)
    monkeypatch.setattr(compare_batching, "CHECKED_STEPS", 1)
    compare_small("--compile", "eager", "--lengths", "one-long", "--phases", "prefill", "decode")
    assert checked == [([40, 16, 16], [1, 3], ["prefill", "decode"])]


@pytest.mark.parametrize(("mode", "serve"), [("default", True), ("eager", False)])
def test_steps_are_timed_with_the_kernels_that_an_engine_runs(
    mode: str, serve: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[bool] = []

    def look(*_: object) -> Any:
        served.append(native.serves(torch.ones(1)))
        return {}  # nothing found

    monkeypatch.setattr(compare_batching, "check_agreement", look)
    monkeypatch.setattr(compare_batching, "measure", look)
    monkeypatch.setattr(compare_batching, "StepModels", look)
    monkeypatch.setattr(compare_batching, "lengths_of", lambda *_: [1, 1])  # nothing to train on
    compare_small("--compile", mode, "--lengths", "uniform")
    # The check, each way, and training, which has torch's kernels.
    assert served == [serve] * (1 + len(WAYS)) + [False]


def compare_small(*arguments: str) -> None:
    few = ("--shape", "tiny", "--device", "cpu", "--num-seqs", "4", "--max-len", "64")
    more = ("--decode-steps", "2", "--repeats", "1", "--plot", "none")
    compare_batching.main(compare_batching.options().parse_args([*few, *more, *arguments]))


def test_figures_are_printed_as_they_are_found(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    printed: list[str] = []

    def measure(way: type[Way], *arguments: Any) -> list[dict[str, Any]]:
        printed.extend(capsys.readouterr().err.splitlines())
        figures = {"ms": 1234.5, "tokens_s": 6789.0, "peak_bytes": 1, "padding": 0.0}
        none = {"ms": None, "tokens_s": None, "peak_bytes": None, "padding": 0.5}
        given = {"prefill": figures, "decode": {**none, "error": "out of memory"}}
        return [{"way": way.name, "phase": phase, **given[phase]} for phase in arguments[-1]]

    monkeypatch.setattr(compare_batching, "measure", measure)
    compare_small("--compile", "eager", "--phases", "prefill", "decode")
    kinds = ("uniform", "lognormal", "one-long")
    wanted = [
        f"{kind}, {phase}, {way.name}: {found}"
        for kind in kinds
        for way in WAYS
        for phase, found in (
            ("prefill", "1,234.50 ms, 6,789 tokens/s"),
            ("decode", "out of memory"),
        )
    ]
    # Each way's when the next one begins; the last one's are said after all calls.
    assert printed == [compare_batching.LEFT_OUT, *wanted[:-2]]
    last = capsys.readouterr()
    assert last.err.splitlines()[:2] == wanted[-2:]
    said = last.out
    assert compare_batching.LEFT_OUT in said.splitlines()
    document = last_line(said)
    assert document["lengths_left_out"] == ["trace"]
    assert len(document["rows"]) == len(wanted)


@pytest.mark.parametrize("phases", [SERVING, ["decode"]])
def test_a_layer_is_compiled_once_for_all_layers_and_lengths(
    phases: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    def compiler(mode: str) -> Any:
        return lambda function: torch.compile(
            function, backend=backend, dynamic=True, fullgraph=True
        )

    lengths = {"uniform": [5, 6, 20, 31], "one-long": [11, 12, 50, 60], "lognormal": [7, 8, 40, 61]}
    found: list[int] = []

    def check(*_: object) -> dict[str, float]:
        found.append(len(graphs))
        return {}

    monkeypatch.setattr(compare_batching, "compiler", compiler)
    monkeypatch.setattr(compare_batching, "lengths_of", lambda kind, *_: lengths[kind])
    monkeypatch.setattr(compare_batching, "check_agreement", check)
    compare_small("--phases", *phases, "--lengths", *lengths)
    # Padded and grouped share their layers; flat has one for prompts and decoding.
    assert [*found, len(graphs)] == [0, *[2 * len(phases) + 1] * 3]


def test_the_padded_ways_refuse_soft_caps() -> None:
    config = DecoderConfig.from_hf({**TINY, "model_type": "gemma2", "head_dim": 16})
    decoder = Decoder.from_config(config, seed=0)
    with pytest.raises(ValueError, match="gemma2 has soft-capped scores"):
        padded.check_supported(decoder)


# --- each tool once ------------------------------------------------------------------------------


def tool_document(tool: str, *arguments: object) -> dict[str, Any]:
    done = run_tool(tool, *arguments)
    assert done.returncode == 0, done.stderr
    return last_line(done.stdout)


HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None


def plot_arguments(plot: Path) -> tuple[object, ...]:
    """A plot where matplotlib is there to make it: asked for in vain it would be refused."""
    return ("--plot", plot if HAS_MATPLOTLIB else "none")


def check_plot(document: dict[str, Any], plot: Path) -> None:
    if HAS_MATPLOTLIB:
        assert plot.read_bytes().startswith(b"\x89PNG")
    else:
        assert document["plot"] is None


def test_compare_batching(tmp_path: Path) -> None:
    trace = trace_file(tmp_path / "t.csv", "0,4,9", "1,32,9", "2,16,9")
    plot = tmp_path / "plot.png"
    document = tool_document(
        "compare_batching", *SMALL, "--num-seqs", 3, "--max-len", 32, "--decode-steps", 2,
        "--repeats", 1, "--lengths", "one-long", "trace", "--trace", trace, *plot_arguments(plot),
    )  # fmt: skip
    assert document["lengths"] == {"one-long": [32, 16, 16], "trace": [4, 32, 16]}
    assert document["lengths_left_out"] == []
    rows = {(r["lengths"], r["phase"], r["way"]): r for r in document["rows"]}
    assert len(rows) == 2 * 4 * 4
    for row in rows.values():
        assert row["ms"] > 0
        assert row["tokens_s"] > 0
        assert row["peak_bytes"] >= 0

    def padding(kind: str, phase: str, way: str) -> float:
        return rows[kind, phase, way]["padding"]

    for phase in ("prefill", "train-forward", "train-step"):
        for way in ("padded", "unpadded"):
            assert padding("one-long", phase, way) == pytest.approx(1 - 64 / 96, abs=1e-5)
            assert padding("trace", phase, way) == pytest.approx(1 - 52 / 96, abs=1e-5)
        assert padding("one-long", phase, "grouped") == 0
        assert padding("one-long", phase, "flat") == 0
    # Two more tokens each: rectangles of 34 (caches of 40); blocks of 16 hold 48, 32 and 32 rows.
    assert padding("one-long", "decode", "padded") == pytest.approx(1 - 70 / 120, abs=1e-5)
    assert padding("one-long", "decode", "flat") == pytest.approx(1 - 70 / 112, abs=1e-5)
    assert all(value < 1e-4 for ways in document["agreement"].values() for value in ways.values())
    check_plot(document, plot)


@pytest.mark.parametrize("budget", [12, 13, 16, 64])
def test_all_decode_in_the_steps_that_are_timed(budget: int) -> None:
    """Those that begin first have tokens left when the last ones join, whatever the budget."""
    llm = LLM.from_config(
        SHAPES["tiny"], compile="eager", device="cpu", max_num_seqs=12, num_cache_blocks=64,
        max_num_batched_tokens=budget, enable_prefix_caching=False, progress=False,
    )  # fmt: skip
    prompts = tokens_of([5] * 12, 512, 0)
    steps, keys = scale.decode_steps(llm, prompts, 3)
    assert [(step.prompt_tokens, step.output_tokens) for step in steps] == [(0, 12)] * 3
    assert len(keys) == 12
    assert not llm.engine.has_unfinished()


def test_scale(tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    document = tool_document(
        "scale", *SMALL, "--batch-size", 1, 3, "--input-len", 20, "--context", 64, 10000,
        "--num-steps", 4, "--waiting", 500, *plot_arguments(plot),
    )  # fmt: skip
    assert [(r["batch"], r["context"]) for r in document["by_batch"]] == [(1, 27), (3, 27)]
    assert [r["context"] for r in document["by_context"]] == [64]
    assert document["contexts_left_out"] == [10000]
    for row in document["by_batch"] + document["by_context"]:
        check_steps(row)
        assert 0 < row["limit_us_per_token"] < row["us_per_token"]
    # One sequence: 119,104 weights; 21 to 24 keys, 512 bytes each with their values.
    limits = document["limits"]
    speed = max(limits["copy_gb_s"], limits["read_gb_s"]) * 1e9
    least = document["by_batch"][0]["limit_us_per_token"] / 1e6 * speed
    assert least == pytest.approx(119_104 * 4 + 22.5 * 512, rel=1e-3)
    assert document["cache"]["bytes"] == document["cache"]["blocks"] * 16 * 2 * 2 * 2 * 16 * 4
    # Prompts of 1, 15, 16, 17 and 33 tokens with 40 more, the last of which has no key.
    assert document["blocks"]["most_held"] == 3 + 4 + 4 + 4 + 5
    assert [q["waiting"] for q in document["queue"]] == [0, 500]
    check_plot(document, plot)


@pytest.mark.slow
def test_compare_compile_modes(tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    document = tool_document(
        "compare_compile_modes", "--shape", "tiny", "--modes", "eager", "--batch-size", 2,
        "--output-len", 8, "--num-cache-blocks", 64, *plot_arguments(plot),
    )  # fmt: skip
    [mode] = document["modes"]
    assert (mode["mode"], mode["warm_start"]) == ("eager", "uncompiled")
    assert mode["cold_s"] > 0
    assert mode["warm_s"] > 0
    assert mode["recompilations"] == 0
    [row] = mode["rows"]
    assert row["batch"] == 2
    check_steps(row)
    check_plot(document, plot)


def mode_document(rate: float = 3.0, **others: object) -> dict[str, Any]:
    """What a process of a mode prints."""
    row = {
        "batch": 1, "prefill_tokens_s": 2.0, "decode_tokens_s": rate, "gb_s": 4.0,
        "step_ms": {"p50": 5.0, "p99": 6.0}, "share_of_limit": 0.5,
    }  # fmt: skip
    return {
        "start_s": 7.0, "start": "warm", "compile_status": "ready", "compiled_graphs": 2,
        "recompilations": 0, "memory": {"peak_bytes": 1}, "limits": {}, "rows": [row],
        **dict.fromkeys(compare_compile_modes.SHARED, "x"), **others,
    }  # fmt: skip


@pytest.mark.parametrize("kind", [ValueError, RuntimeError])
def test_a_mode_that_fails_leaves_the_others_their_figures(
    kind: type[Exception], capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def process(arguments: list[str], cache: Path) -> dict[str, Any]:
        if "reduce-overhead" in arguments:
            raise kind("it broke")
        return mode_document()

    monkeypatch.setattr(compare_compile_modes, "run_process", process)
    arguments = ["--shape", "tiny", "--plot", "none", "--modes", "eager", "reduce-overhead"]
    compare_compile_modes.main(
        compare_compile_modes.options().parse_args([*arguments, "max-autotune"])
    )
    printed = capsys.readouterr().out
    assert "reduce-overhead: it broke\n" in printed
    assert "max-autotune: warm start 7.0 s, batch 1, 3 tokens/s\n" in printed
    modes = last_line(printed)["modes"]
    assert [(m["mode"], m.get("error")) for m in modes] == [
        ("eager", None), ("reduce-overhead", "it broke"), ("max-autotune", None)
    ]  # fmt: skip
    if kind is ValueError:
        args = compare_compile_modes.options().parse_args([*arguments[:-2], "reduce-overhead"])
        with pytest.raises(ValueError, match="it broke"):
            compare_compile_modes.main(args)


MACHINE = {"device": "a device", "torch": "2.0", "python": "3.0"}


@pytest.fixture
def compare_modes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[dict[str, Any]]]:
    """Runs the tool with `--results`, each process giving `document` -> the file's modes."""

    def compare(
        *arguments: str,
        process: Callable[[], dict[str, Any]] = mode_document,
        machine: dict[str, str] = MACHINE,
        path: Path = tmp_path / "modes.json",
    ) -> list[dict[str, Any]]:
        monkeypatch.setattr(compare_compile_modes, "machine", lambda device: machine)
        monkeypatch.setattr(compare_compile_modes, "run_process", lambda *_: process())
        given = ["--shape", "tiny", "--plot", "none", "--results", str(path), *arguments]
        compare_compile_modes.main(compare_compile_modes.options().parse_args(given))
        return json.loads(path.read_text())["modes"]

    return compare


def test_results_of_several_commands_make_one_table(
    compare_modes: Callable[..., list[dict[str, Any]]], tmp_path: Path, capsys
) -> None:
    compare_modes("--modes", "minigen", "default")
    capsys.readouterr()
    kept = compare_modes("--modes", "eager", process=partial(mode_document, rate=4.0))
    printed = capsys.readouterr().out
    assert [row["mode"] for row in kept] == ["eager", "default", "minigen"]
    shown = [line.split() for line in printed.splitlines() if line.endswith("50.0%")]
    # mode, batch, cold, warm, recompiled, prefill, decode
    assert [(cells[0], cells[6]) for cells in shown] == [
        ("eager", "4"), ("default", "3"), ("minigen", "3")
    ]  # fmt: skip
    document = last_line(printed)
    assert [row["mode"] for row in document["modes"]] == ["eager", "default", "minigen"]
    assert document["results"] == str(tmp_path / "modes.json")
    # One that is measured again counts as it is now.
    kept = compare_modes("--modes", "default", process=partial(mode_document, rate=5.0))
    assert [(row["mode"], row["rows"][0]["decode_tokens_s"]) for row in kept] == [
        ("eager", 4.0), ("default", 5.0), ("minigen", 3.0)
    ]  # fmt: skip
    assert [file.name for file in tmp_path.iterdir()] == ["modes.json"]


def test_results_are_written_after_each_mode(
    compare_modes: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    documents = [mode_document()] * 2  # the first mode's two starts; then the user's patience ends

    def process() -> dict[str, Any]:
        if not documents:
            raise KeyboardInterrupt
        return documents.pop()

    with pytest.raises(KeyboardInterrupt):
        compare_modes("--modes", "default", "eager", process=process)
    [row] = json.loads((tmp_path / "modes.json").read_text())["modes"]
    assert row["mode"] == "default"


def test_results_of_other_settings_are_refused(
    compare_modes: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    file = tmp_path / "modes.json"
    compare_modes("--modes", "eager")
    before = file.read_text()

    def never() -> dict[str, Any]:
        pytest.fail("measured")

    for arguments, message in (
        (["--input-len", "5"], "modes.json: its modes were measured with input_len 128, not 5"),
        (["--batch-size", "2"], r"with batch_size \[1, 16\], not \[2\]: give another file"),
        (["--seed", "1"], "with seed 0, not 1"),
    ):
        with pytest.raises(ValueError, match=message):
            compare_modes(*arguments, process=never)
    for name, value in MACHINE.items():
        with pytest.raises(ValueError, match=f"with {name} '{value}', not 'other'"):
            compare_modes(machine={**MACHINE, name: "other"}, process=never)
    # A configuration that has changed under the same name.
    with pytest.raises(ValueError, match="with parameters 'x', this one with 5: give another"):
        compare_modes("--modes", "minigen", process=partial(mode_document, parameters=5))
    assert file.read_text() == before
    for text in ("", "text", "[]", "{}", '{"settings": {}, "modes": []}', '{"settings": 1}'):
        file.write_text(text)
        with pytest.raises(ValueError, match="this is no file of results"):
            compare_modes(process=never)
    changed = json.loads(before)
    del changed["modes"][0]["rows"]
    file.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="this is no file of results"):
        compare_modes(process=never)
    with pytest.raises(ValueError, match=r"absent/modes.json: there is no directory .*absent$"):
        compare_modes(process=never, path=tmp_path / "absent" / "modes.json")


def test_another_process_names_the_machine() -> None:
    assert compare_compile_modes.machine("cpu") == measure.environment(torch.device("cpu"))
    with pytest.raises(ValueError, match="device 'tpu' is unknown"):
        compare_compile_modes.machine("tpu")


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("compare_batching", ["--shape", "huge"], "--shape 'huge' is unknown"),
        ("compare_batching", ["--num-seqs", "1"], "--num-seqs is 1"),
        ("compare_batching", ["--lengths", "trace"], "--lengths trace needs --trace"),
        (
            "compare_batching",
            ["--lengths", "uniform", "--trace", "t.csv"],
            "--trace is for the lengths of a trace, which --lengths leaves out",
        ),
        ("scale", ["--context", "0"], "must be a whole number above 0"),
        ("compare_compile_modes", ["--config", "absent.json"], "absent.json cannot be read"),
    ],
)
def test_tools_refuse_in_one_line(
    tool: str, arguments: list[str], message: str, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module(f"tools.{tool}")
    refuse_in_one_line(module, [*arguments, "--plot", "none"], message, capsys, monkeypatch)


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("bench_decode", ["--batch", "0"], "argument --batch: must be a whole number above 0"),
        ("bench_decode", ["--repeats", "0"], "argument --repeats: must be a whole number above 0"),
        ("bench_decode", ["--dtype", "foo"], "argument --dtype: invalid choice: 'foo'"),
        ("bench_decode", ["--compile", "foo"], "argument --compile: invalid choice: 'foo'"),
        ("bench_decode", ["--tokens", "1"], "--tokens 1: give 2 to 1793"),
        ("bench_decode", ["--tokens", "1794"], "--tokens 1794: give 2 to 1793"),
        ("bench_attention", ["--what", "foo"], "argument --what: invalid choice: 'foo'"),
        ("bench_attention", ["--processes", "0"], "must be a whole number above 0"),
        ("bench_host", ["--steps", "0"], "argument --steps: must be a whole number above 0"),
        ("bench_host", ["--input-len", "-1"], "must be a whole number above 0"),
        ("profile_step", ["--batch-size", "0"], "argument --batch-size: must be a whole number"),
        ("profile_step", ["--prompt-tokens", "0"], "must be a whole number above 0"),
    ],
)
def test_tools_without_a_plot_refuse_in_one_line(
    tool: str, arguments: list[str], message: str, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module(f"tools.{tool}")
    printed = refuse_in_one_line(module, arguments, message, capsys, monkeypatch)
    assert printed == ""


class Bars:
    """Takes the place of `report.bar`: what each bar was to count, and what it did."""

    def __init__(self) -> None:
        self.totals: list[int] = []
        self.counts: list[int] = []

    @contextlib.contextmanager
    def __call__(self, total: int, what: str, unit: str = "token", ticks: bool = True):
        self.totals.append(total)
        self.counts.append(0)

        def update(count: int = 1) -> None:
            self.counts[-1] += count

        yield SimpleNamespace(update=update)


@pytest.mark.parametrize(
    ("tool", "arguments", "totals"),
    [
        # Two sizes, one again with requests that wait, one beside a prompt.
        (
            "bench_host",
            "--batch-size 1 3 --input-len 20 --steps 5 --waiting 5 --max-num-batched-tokens 64",
            [4],
        ),
        # Each engine once to warm up, then one token and all of them.
        (
            "bench_decode",
            "--shape tiny --dtype float32 --compile eager --batch 1 3 --tokens 4 --repeats 1",
            [6, 6],
        ),
        # Three times 20 steps and those before them: five and the prompts', of prompts one.
        (
            "profile_step",
            "--shape tiny --device cpu --compile eager --batch-size 1 3 --input-len 20 "
            "--prompt-tokens 64 --num-cache-blocks 128 --max-model-len 2048",
            [3 * (20 + 6), 3 * (20 + 6), 3 * (20 + 1)],
        ),
    ],
)
def test_a_long_measurement_shows_how_far_it_is(
    tool: str, arguments: str, totals: list[int], capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, bars = importlib.import_module(f"tools.{tool}"), Bars()
    monkeypatch.setattr(module, "bar", bars)
    module.main(module.options().parse_args(arguments.split()))
    assert bars.counts == bars.totals == totals
    printed = capsys.readouterr()
    assert last_line(printed.out)
    assert printed.err == ""


def test_a_plot_needs_matplotlib(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # importing it fails
    with pytest.raises(ValueError, match=r"pip install 'minigen\[plot\]'"):
        Plot(argparse.Namespace(plot="x.png", default_plot="y.png"), 1)
    plot = Plot(argparse.Namespace(plot=None, default_plot="y.png"), 1)
    assert plot.path is None
    assert capsys.readouterr().err == f"no plot: {NO_MATPLOTLIB}\n"


# --- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, not its interpreter")
def test_tools_on_a_gpu(capsys) -> None:
    arguments = (*BENCH, "--device", "cuda", "--batch-size", 1, 3, "--output-len", 16)
    assert main([str(a) for a in arguments]) == 0
    document = last_line(capsys.readouterr().out)
    assert "CPU" not in document["device"]
    for batch, row in zip((1, 3), document["rows"], strict=True):
        assert row["output_tokens"] == 15 * batch
        check_steps(row)
    few = ("--shape", "tiny", "--num-seqs", 4, "--max-len", 64, "--decode-steps", 2,
           "--repeats", 1, "--lengths", "one-long", "--plot", "none")  # fmt: skip
    serving = ("--phases", "prefill", "decode")
    for options, phases in ((("--compile", "eager"), 4), (serving, 2)):
        document = tool_document("compare_batching", *few, *options)
        assert len(document["rows"]) == 4 * phases
        assert all(row["ms"] > 0 for row in document["rows"])
        ways = document["agreement"]["one-long"]
        assert len(ways) == 3
        assert all(value < 1e-3 for value in ways.values())
    document = tool_document(
        "scale", *SMALL, "--batch-size", 1, 3, "--context", 256, "--num-steps", 4,
        "--waiting", 500, "--plot", "none",
    )  # fmt: skip
    assert document["cache"]["bytes"] == document["cache"]["expected_bytes"]
