"""`tools.compare_logprobs`: the engine's log-probabilities are those of training."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minigen import LLM
from minigen.model import Decoder, DecoderConfig, jagged
from minigen.shapes import SHAPES
from minigen.trainer import TrainingModel
from tests.command_line import make_model, run_tool
from tests.test_tools import last_line
from tools import compare_logprobs
from tools.common import run
from tools.compare_logprobs import (
    Job,
    bound_of,
    differences,
    jobs_of,
    reference_logprobs,
    serve_alone,
    serve_mixed,
    training_logprobs,
    widened,
)

EPS32 = torch.finfo(torch.float32).eps
# A head of its own, and weights that make some tokens likelier than others.
UNTIED = {**SHAPES["tiny"], "tie_word_embeddings": False, "hidden_size": 32, "vocab_size": 97}
FEW = (
    "--compile", "eager", "--tokens", 250, "--longest-prompt", 60, "--longest-output", 30,
    "--max-num-batched-tokens", 24, "--max-num-seqs", 6,
)  # fmt: skip


def small_llm(dtype: str = "float32") -> LLM:
    return LLM.from_config(
        UNTIED, weights_seed=1, dtype=dtype, compile="eager", max_model_len=64, max_num_seqs=4,
        max_num_batched_tokens=8, num_cache_blocks=32, enable_prefix_caching=False, progress=False,
    )  # fmt: skip


def some_jobs(count: int) -> list[Job]:
    return jobs_of(count, 20, 12, 97, seed=3)


@torch.no_grad()
def logprobs_of(decoder: Decoder, prompt: list[int], tokens: list[int]) -> list[float]:
    """The oracle: a sequence alone, log_softmax of all its logits."""
    ids = torch.tensor([*prompt, *tokens])
    values = decoder(jagged(ids, torch.tensor([0, len(ids)]))).values().log_softmax(-1)
    first = len(prompt) - 1
    return [float(values[first + i, token]) for i, token in enumerate(tokens)]


# --- requests ------------------------------------------------------------------------------------


@given(st.integers(1, 500), st.integers(1, 60), st.integers(1, 40), st.integers(0, 9))
def test_jobs_generate_enough(tokens: int, prompt: int, output: int, seed: int) -> None:
    jobs = jobs_of(tokens, prompt, output, 97, seed)
    counts = [job.num_tokens for job in jobs]
    assert sum(counts) >= tokens > sum(counts[:-1])
    assert all(1 <= count <= output for count in counts)
    assert len(jobs[0].prompt) == prompt
    assert all(1 <= len(job.prompt) <= prompt for job in jobs)
    assert all(0 <= token < 97 for job in jobs for token in job.prompt)
    assert jobs == jobs_of(tokens, prompt, output, 97, seed)


def test_served_mixed_and_alone_is_what_the_decoder_says() -> None:
    llm, jobs = small_llm(), some_jobs(60)
    mixed, mixture = serve_mixed(llm.engine, jobs)
    mixture.require()
    assert mixture.chunked_prompts >= 1
    assert 1 < mixture.most_running <= 4
    decoder = widened(llm.engine.runner.model)
    for job, served in zip(jobs, mixed, strict=True):
        assert len(served.tokens) == job.num_tokens
        wanted = logprobs_of(decoder, job.prompt, served.tokens)
        assert served.logprobs == pytest.approx(wanted, abs=20 * EPS32)
        alone, strayed = serve_alone(llm.engine, job, served.tokens)
        assert (alone.tokens, strayed) == (served.tokens, 0)
        assert alone.logprobs == pytest.approx(wanted, abs=20 * EPS32)
    assert not llm.engine.has_unfinished()


@pytest.mark.parametrize("overlap", [False, True])
def test_alone_goes_on_behind_the_tokens_it_is_held_to(overlap: bool) -> None:
    llm = small_llm()
    llm.engine.overlap = overlap  # as on a GPU: a step is in flight when a request is aborted
    job = Job([5, 6, 7], 9, seed=1)
    [[own], _] = serve_mixed(llm.engine, [job])
    # Held to another token in two places, the last one included.
    held = list(own.tokens)
    held[2], held[8] = (held[2] + 1) % 97, (held[8] + 1) % 97
    alone, strayed = serve_alone(llm.engine, job, held)
    assert len(alone.tokens) == len(alone.logprobs) == 9
    assert strayed == sum(a != b for a, b in zip(alone.tokens, held, strict=True)) >= 2
    assert alone.tokens[:3] == own.tokens[:3]
    decoder = widened(llm.engine.runner.model)
    for i, (token, logprob) in enumerate(zip(alone.tokens, alone.logprobs, strict=True)):
        [*_, wanted] = logprobs_of(decoder, job.prompt, [*held[:i], token])
        assert logprob == pytest.approx(wanted, abs=20 * EPS32)
    assert not llm.engine.has_unfinished()


def test_a_batch_that_does_not_mix_is_refused() -> None:
    llm = small_llm()
    _, mixture = serve_mixed(llm.engine, [Job([1, 2, 3], 4, 0)])
    assert (mixture.steps, mixture.mixed_steps, mixture.joined) == (4, 0, 0)
    with pytest.raises(ValueError, match="of 4 steps 0 mixed prompts with decoding, 0 requests"):
        mixture.require()


# --- training and the reference ------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 7)), min_size=1, max_size=6))
def test_training_and_reference_are_what_the_decoder_says(sizes: list[tuple[int, int]]) -> None:
    decoder = Decoder.from_config(DecoderConfig.from_hf(UNTIED), seed=2)
    generator = torch.Generator().manual_seed(len(sizes))

    def ids(count: int) -> list[int]:
        return torch.randint(97, (count,), generator=generator).tolist()

    jobs = [Job(ids(prompt), count, 0) for prompt, count in sizes]
    tokens, others = ([ids(job.num_tokens) for job in jobs] for _ in range(2))
    wanted = [logprobs_of(decoder, job.prompt, own) for job, own in zip(jobs, tokens, strict=True)]
    model = TrainingModel(decoder, dtype=torch.float32, compile="eager")
    found = training_logprobs(model, jobs, tokens, tokens)
    in_place = training_logprobs(model, jobs, tokens, others)
    squares = 0.0
    for i, job in enumerate(jobs):
        assert found[i] == pytest.approx(wanted[i], abs=20 * EPS32)
        # Another token in the place of one, with the same ones before it.
        [*_, last] = logprobs_of(decoder, job.prompt, [*tokens[i][:-1], others[i][-1]])
        assert in_place[i][-1] == pytest.approx(last, abs=20 * EPS32)
        values, square = reference_logprobs(decoder, job, tokens[i], [tokens[i], others[i]])
        assert values[0] == pytest.approx(wanted[i], abs=20 * EPS32)
        assert values[1] == pytest.approx(in_place[i], abs=20 * EPS32)
        squares += square
    assert squares > 0


def test_training_computes_in_the_dtype_asked_for() -> None:
    llm, jobs = small_llm("bfloat16"), some_jobs(40)
    mixed, _ = serve_mixed(llm.engine, jobs)
    tokens = [served.tokens for served in mixed]
    decoder = widened(llm.engine.runner.model)
    assert decoder.embed.weight.dtype == torch.float32
    own = dict(llm.engine.runner.model.named_parameters())
    assert all(torch.equal(p, own[name].float()) for name, p in decoder.named_parameters())
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = TrainingModel(decoder, dtype=dtype, compile="eager")
        found.append([x for xs in training_logprobs(model, jobs, tokens, tokens) for x in xs])
    apart = differences(*found)
    assert 100 * EPS32 < apart["largest"] < bound_of(torch.bfloat16, decoder.config, 1.0, 40)


def test_bound_of_known_sizes() -> None:
    config = DecoderConfig.from_hf(SHAPES["tiny"])  # two layers: 6 roundings
    eps = 2.0**-7 / 2 + 4 * EPS32 / 2
    wanted = 2 * math.sqrt(2) * math.sqrt(2 * math.log(1000)) * math.sqrt(6) * eps * 3.0
    assert bound_of(torch.bfloat16, config, 3.0, 1000) == pytest.approx(wanted)
    assert bound_of(torch.float32, config, 3.0, 1000) < 5.01 * wanted * 2.0**-16
    assert differences([1.0, 2.5], [1.5, 2.0]) == {"tokens": 2, "largest": 0.5, "mean": 0.5}


# --- the command ---------------------------------------------------------------------------------


def check_document(document: dict[str, Any]) -> None:
    assert document["agrees"]
    assert document["tokens"] >= 250
    assert min(document["mixture"].values()) > 0
    found = document["differences"]
    assert set(found) == {
        "alone - training", "mixed batch - training", "alone - mixed batch",
        "alone - float32", "mixed batch - float32", "training - float32",
    }  # fmt: skip
    for row in found.values():
        assert 0 <= row["mean"] <= row["largest"] <= document["bound"]


def run_main(capsys, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[int, Any]:
    monkeypatch.setattr("sys.argv", ["tool", *map(str, arguments)])
    code = 0
    try:
        run(compare_logprobs.options(), compare_logprobs.main)
    except SystemExit as left:
        code = int(str(left.code))
    return code, capsys.readouterr()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_compare_logprobs(dtype: str, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    # Alone, a step a token: all of them once.
    alone = () if dtype == "float32" else ("--alone", 3)
    arguments = ("--shape", "tiny", *FEW, "--dtype", dtype, *alone)
    code, printed = run_main(capsys, monkeypatch, *arguments)
    assert code == 0, printed.err
    document = last_line(printed.out)
    check_document(document)
    assert document["dtype"] == dtype
    assert document["alone"]["requests"] == (3 if alone else document["requests"])
    largest = document["differences"]["mixed batch - training"]["largest"]
    if dtype == "float32":  # some roundings of a number of about 6
        assert largest < 20 * EPS32
    else:
        assert largest > 20 * EPS32
        assert 0.5 < document["engine_error_over_training_error"] < 2


def test_a_checkpoint_as_a_command(tmp_path) -> None:
    path = make_model(tmp_path)
    done = run_tool("compare_logprobs", "--model", path, *FEW, "--alone", 3)
    assert done.returncode == 0, done.stderr
    document = last_line(done.stdout)
    check_document(document)
    assert document["alone"]["requests"] == 3
    assert f"alone: 3 of {document['requests']} requests" in done.stdout
    one = document["differences"]
    assert one["alone - training"]["tokens"] < one["mixed batch - training"]["tokens"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_shifted_target_fails(dtype: str, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    right = compare_logprobs.make_batch

    def shifted(*arguments):
        batch = right(*arguments)
        return batch._replace(rows_R=(batch.rows_R - 1).clamp(min=0))

    monkeypatch.setattr(compare_logprobs, "make_batch", shifted)
    arguments = ("--shape", "tiny", *FEW, "--alone", 1, "--dtype", dtype)
    code, printed = run_main(capsys, monkeypatch, *arguments)
    assert code == 1
    document = last_line(printed.out)
    assert not document["agrees"]
    found = document["differences"]
    assert found["mixed batch - training"]["largest"] > document["bound"]
    assert found["mixed batch - float32"]["largest"] <= document["bound"]


@pytest.mark.slow
def test_compiled(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    arguments = [*FEW, "--alone", 3, "--compile", "default", "--dtype", "bfloat16"]
    code, printed = run_main(capsys, monkeypatch, "--shape", "tiny", *arguments)
    assert code == 0, printed.err
    document = last_line(printed.out)
    check_document(document)
    assert document["start"] == "ready"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "huge"], "--shape 'huge' is unknown"),
        (["--tokens", "0"], "must be a whole number above 0"),
        (["--tokens", "9", "--compile", "eager"], "mixed prompts with decoding"),
        (
            ["--shape", "tiny", "--longest-prompt", "9000"],
            "make 9256 tokens, the model's context has 8192",
        ),
    ],
)
def test_refusals(
    arguments: list[str], message: str, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, printed = run_main(capsys, monkeypatch, *arguments)
    assert code == 2
    assert message in printed.err
    assert printed.err.count("\n") == 1
