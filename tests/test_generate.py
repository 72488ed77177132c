"""`generate`: what it writes, what it refuses, and that no interruption loses anything."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from minigen import generate
from minigen.__main__ import main
from tests.command_line import CONTEXT, ROOT, command, environment, make_model

GREEDY = ("--temperature", "0", "--ignore-eos")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("generate") / "tiny")


@pytest.fixture(scope="module")
def llm(model):
    from minigen.llm import LLM

    return LLM(str(model), compile="eager", device="cpu", progress=False)


@pytest.fixture
def loaded(llm, monkeypatch):
    """The command in this process, with the model loaded once."""
    monkeypatch.setattr("minigen.cli.load_llm", lambda args, **options: llm)
    return llm


class Job:
    """An input, an output, and the command between them."""

    def __init__(self, path: Path, model: Path, lines: list[object]):
        self.source, self.target, self.model = path / "in.jsonl", path / "out.jsonl", model
        self.write(lines)

    def write(self, lines):
        text = (line if isinstance(line, str) else json.dumps(line) for line in lines)
        self.source.write_text("".join(f"{line}\n" for line in text))

    def arguments(self, *options: object):
        files = ("--model", self.model, "--input", self.source, "--output", self.target)
        fast = ("--compile", "eager", "--device", "cpu")
        return [str(a) for a in ("generate", *files, *fast, *GREEDY, *options)]

    def run(self, *options: object) -> int:
        return main(self.arguments(*options))

    def results(self) -> dict:
        lines = self.target.read_text().splitlines()
        results = {json.loads(line)["id"]: json.loads(line) for line in lines}
        assert len(results) == len(lines)
        return results


@pytest.fixture
def job(tmp_path, model):
    return lambda lines: Job(tmp_path, model, lines)


def lasting(results: dict) -> dict:
    """The results without what the company in the batch decides."""
    passing = ("timings", "num_cached_tokens")
    return {i: {k: v for k, v in r.items() if k not in passing} for i, r in results.items()}


PROMPTS = [{"prompt": f"{number} llamas on a hill", "id": f"r{number}"} for number in range(12)]


# --- what it writes ------------------------------------------------------------------------------


def test_one_line_a_result(job, loaded):
    messages = [{"role": "user", "content": "hello"}]
    work = job(
        [
            {"prompt": "Once upon a time"},
            {"id": "ids", "prompt_token_ids": [5, 6, 7]},
            "",
            {"messages": messages, "params": {"max_tokens": 3}},
            {"id": 77, "prompt": "a", "params": {"n": 2, "temperature": 1.5, "seed": 3}},
        ]
    )
    assert work.run("--max-tokens", 6, "--logprobs", 2) == 0
    results = work.results()
    assert set(results) == {1, "ids", 4, 77}
    params = loaded.default_params(max_tokens=6, temperature=0, ignore_eos=True, logprobs=2)
    expected = loaded.generate(["Once upon a time", [5, 6, 7]], params, progress=False)
    for request_id, result in zip((1, "ids"), expected, strict=True):
        line, output = results[request_id], result.outputs[0]
        assert line["text"] == output.text
        assert line["token_ids"] == output.token_ids
        assert line["finish_reason"] == "length"
        assert line["num_prompt_tokens"] == len(result.prompt_token_ids)
        assert 0 < line["timings"]["first_token_s"] <= line["timings"]["total_s"]
        for position, token in zip(line["logprobs"], output.logprobs, strict=True):
            assert {int(i) for i in position} == set(token)
            for i, logprob in token.items():
                assert position[str(i)]["logprob"] == pytest.approx(logprob.logprob, abs=1e-4)
                assert position[str(i)]["rank"] == logprob.rank
        assert "outputs" not in line
    assert len(results[4]["token_ids"]) == 3
    assert results[4]["num_prompt_tokens"] == len(loaded.tokenizer.chat_tokens(messages))
    samples = results[77]["outputs"]
    assert len(samples) == 2
    assert samples[0]["token_ids"] != samples[1]["token_ids"]
    assert {k: results[77][k] for k in samples[0]} == samples[0]


def test_prompts_are_printed(loaded, model, capsys):
    texts = ["Once upon a time", "What is"]
    arguments = ["generate", "--model", str(model), *GREEDY, "--max-tokens", "6"]
    for text in texts:
        arguments += ["--prompt", text]
    assert main(arguments) == 0
    params = loaded.default_params(max_tokens=6, temperature=0, ignore_eos=True)
    expected = [r.outputs[0].text for r in loaded.generate(texts, params, progress=False)]
    assert capsys.readouterr().out == "".join(f"{text}\n" for text in expected)


def test_prompts_are_written_as_lines(job, loaded, tmp_path):
    target = tmp_path / "prompts.jsonl"
    arguments = ["generate", "--model", str(job([]).model), "--output", str(target), *GREEDY]
    texts = ["Once upon a time", "What is"]
    arguments += ["--prompt", texts[0], "--prompt", texts[1]]
    assert main([*arguments, "--max-tokens", "3", "--logprobs", "2"]) == 0
    work = job([{"prompt": text} for text in texts])
    assert work.run("--max-tokens", 3, "--logprobs", 2) == 0
    expected = lasting(work.results())
    assert all(len(result["logprobs"]) == 3 for result in expected.values())
    work.target = target
    assert lasting(work.results()) == expected


def test_bad_request_harms_no_other(job, loaded, capsys):
    lines = [*PROMPTS[:2], {"id": "long", "prompt": "é" * 5000}, *PROMPTS[2:4]]
    work = job([*lines, {"id": "alien", "prompt_token_ids": [10**6]}])
    assert work.run("--max-tokens", 4) == 2
    results = work.results()
    assert "4096" in results["long"]["error"]
    assert results["alien"]["error"]
    for request in PROMPTS[:4]:
        assert len(results[request["id"]]["token_ids"]) == 4
    assert not loaded.engine.has_unfinished()
    # An error is a result: it is not tried again.
    before = work.target.read_bytes()
    capsys.readouterr()
    assert work.run("--max-tokens", 4) == 2
    assert work.target.read_bytes() == before
    assert "6 of 6 results are in" in (says := capsys.readouterr().err)
    assert "2 of them with an error" in says


def test_queue_stays_short(job, loaded, monkeypatch):
    monkeypatch.setattr(generate, "MAX_QUEUED", 3)
    queued, longest = set(), 0
    add_request, step = loaded.engine.add_request, loaded.engine.step

    def spy_add(request_id, prompt, params):
        nonlocal longest
        queued.add(request_id)
        longest = max(longest, len(queued))
        return add_request(request_id, prompt, params)

    def spy_step(**options):
        outputs = step(**options)
        queued.difference_update(output.request_id for output in outputs if output.finished)
        return outputs

    monkeypatch.setattr(loaded.engine, "add_request", spy_add)
    monkeypatch.setattr(loaded.engine, "step", spy_step)
    work = job(PROMPTS)
    assert work.run("--max-tokens", 4) == 0
    assert longest == 3
    assert len(work.results()) == len(PROMPTS)


# --- what it refuses -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not JSON"),
        ("[1]", "must be an object"),
        ('{"text": "a"}', "unknown field 'text'"),
        ("{}", "exactly one of prompt, prompt_token_ids, messages, this one has none"),
        ('{"prompt": "a", "messages": []}', "this one has prompt and messages"),
        ('{"prompt": 3}', "prompt must be a text"),
        ('{"prompt_token_ids": []}', "one or more token ids"),
        ('{"prompt_token_ids": [1, true]}', "one or more token ids"),
        ('{"messages": [{"content": "a"}]}', "messages must be a list of objects"),
        ('{"prompt": "a", "id": 1.5}', "id must be a text or a whole number"),
        ('{"prompt": "a", "id": "r0"}', 'the id "r0" is taken by line 1'),
        ('{"prompt": "a", "params": 3}', "params must be an object"),
        ('{"prompt": "a", "params": {"temprature": 1}}', "no sampling parameter 'temprature'"),
        ('{"prompt": "a", "params": {"temperature": "hot"}}', "temperature must be a number"),
        ('{"prompt": "a", "params": {"temperature": -1}}', "temperature"),
        ('{"prompt": "a", "params": {"max_tokens": 0}}', "max_tokens"),
    ],
)
def test_whole_input_is_checked_before_anything_runs(job, capsys, monkeypatch, line, says):
    monkeypatch.setattr("minigen.cli.load_llm", lambda *a, **k: pytest.fail("a model was loaded"))
    work = job([PROMPTS[0], line, PROMPTS[1]])
    assert work.run() == 2
    error = capsys.readouterr().err
    assert error.startswith(f"minigen: {work.source}:2: ")
    assert says in error
    assert error.count("\n") == 1
    assert os.listdir(work.source.parent) == ["in.jsonl"]


def test_line_number_as_id_is_taken(job, capsys):
    work = job([{"prompt": "a", "id": 2}, {"prompt": "b"}])
    assert work.run() == 2
    assert "in.jsonl:2: the id 2 is taken by line 1" in capsys.readouterr().err


def test_files_that_cannot_be_used(job, model, tmp_path, capsys):
    work = job([])
    assert work.run() == 2
    assert "holds no request" in capsys.readouterr().err
    work.source.unlink()
    assert work.run() == 2
    assert "No such file" in capsys.readouterr().err
    work = job(PROMPTS[:1])
    work.target = work.source
    assert work.run() == 2
    assert "both --input and --output" in capsys.readouterr().err
    work.target = tmp_path
    assert work.run() == 2
    assert "no regular file" in capsys.readouterr().err


def test_foreign_output_is_left_alone(job, loaded, capsys):
    work = job(PROMPTS[:1])
    work.target.write_text("my notes, no newline at the end")
    assert work.run() == 2
    assert "give another --output" in capsys.readouterr().err
    Path(f"{work.target}.settings.json").write_text("{}")
    assert work.run() == 2
    assert work.target.read_text() == "my notes, no newline at the end"


@pytest.mark.parametrize(
    ("options", "line", "says"),
    [
        (["--logit-bias", '{"9999": 1}'], {}, "minigen: logit_bias names the token 9999"),
        ([], {"logit_bias": {"9999": 1}}, "in.jsonl:2: logit_bias names the token 9999"),
        ([], {"n": 2}, "in.jsonl:2: n must be 1"),  # the model's own default is greedy
    ],
)
def test_parameters_are_checked_against_the_model(job, loaded, capsys, options, line, says):
    work = job([PROMPTS[0], {"prompt": "a", "params": line}])
    arguments = [a for a in work.arguments(*options) if a not in GREEDY]
    assert main(arguments) == 2
    assert says in capsys.readouterr().err
    assert not work.target.exists()


def test_stop_strings_need_a_tokenizer(job, loaded, capsys, monkeypatch):
    monkeypatch.setattr(loaded, "tokenizer", None)
    work = job([{"prompt_token_ids": [1]}])
    assert work.run("--stop", "a") == 2
    assert "stop strings need a tokenizer" in capsys.readouterr().err
    work = job([{"prompt_token_ids": [1], "params": {"stop": "a"}}])
    assert work.run() == 2
    assert "in.jsonl:1: stop strings need a tokenizer" in capsys.readouterr().err
    assert not work.target.exists()


def test_max_tokens_may_be_none(job, loaded):
    work = job([{"prompt_token_ids": [1] * (CONTEXT - 3), "params": {"max_tokens": None}}])
    assert work.run() == 0
    assert len(work.results()[1]["token_ids"]) == 3


def test_failed_run_that_wrote_nothing_leaves_nothing(job, loaded, monkeypatch):
    work = job(PROMPTS[:1])

    def broken():
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(loaded.engine, "step", broken)
        assert work.run() == 1
    assert os.listdir(work.source.parent) == ["in.jsonl"]
    assert work.run("--max-tokens", 2) == 0
    assert len(os.listdir(work.source.parent)) == 3


def test_models_that_lack_something(job, loaded, capsys, monkeypatch):
    work = job([{"prompt_token_ids": [1]}, {"prompt": "a"}])
    monkeypatch.setattr(loaded, "tokenizer", None)
    assert work.run() == 2
    assert "in.jsonl:2: this model has no tokenizer.json" in capsys.readouterr().err
    assert not work.target.exists()


# --- stopping and going on -----------------------------------------------------------------------


@pytest.fixture
def unbroken(job, loaded, tmp_path):
    """A finished run: the command, and its results."""
    work = job(PROMPTS)
    assert work.run("--max-tokens", 5) == 0
    return work, work.target.read_bytes()


def test_finished_run_has_nothing_to_do(unbroken, loaded, monkeypatch, capsys):
    work, data = unbroken
    monkeypatch.setattr(loaded.engine, "step", lambda: pytest.fail("a step was run"))
    assert work.run("--max-tokens", 5) == 0
    assert work.target.read_bytes() == data
    assert "12 of 12 results" in capsys.readouterr().err


def test_torn_last_line_is_done_anew(unbroken):
    work, data = unbroken
    expected = lasting(work.results())
    last = data.rindex(b"\n", 0, len(data) - 1) + 1
    second = data.index(b"\n") + 1
    for end in (1, 5, second - 1, second, last + 1, last + 30, len(data) - 1):
        work.target.write_bytes(data[:end])
        assert work.run("--max-tokens", 5) == 0
        assert work.target.read_bytes().startswith(data[: data.rfind(b"\n", 0, end) + 1])
        assert lasting(work.results()) == expected


def test_draws_do_not_depend_on_where_a_run_was_stopped(job, loaded):
    same = [{"prompt": "Once upon a time", "params": {"temperature": 1.5}} for _ in range(4)]
    work = job(same[:2])
    assert work.run("--max-tokens", 8) == 0
    work.write(same)
    assert work.run("--max-tokens", 8) == 0
    continued = lasting(work.results())
    assert len({tuple(result["token_ids"]) for result in continued.values()}) == 4
    work.target.unlink()
    assert work.run("--max-tokens", 8) == 0
    assert lasting(work.results()) == continued


def test_input_may_grow(unbroken):
    work, data = unbroken
    work.write([*PROMPTS, {"id": "new", "prompt": "hello"}])
    assert work.run("--max-tokens", 5) == 0
    assert work.target.read_bytes().startswith(data)
    assert set(work.results()) == {request["id"] for request in PROMPTS} | {"new"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--max-tokens", "6"], "sampling.max_tokens = 5, now it is 6"),
        (["--max-tokens", "5", "--seed", "1"], "sampling.seed = null, now it is 1"),
        (["--max-tokens", "5", "--stop", "a"], "sampling.stop"),
        (["--max-tokens", "5", "--dtype", "bfloat16"], 'dtype = "auto"'),
    ],
)
def test_changed_settings_are_refused(unbroken, capsys, options, says):
    work, data = unbroken
    assert work.run(*options) == 2
    assert says in capsys.readouterr().err
    assert work.target.read_bytes() == data


def test_changed_model_is_refused(unbroken, tmp_path, capsys):
    work, data = unbroken
    copy = tmp_path / "elsewhere"
    shutil.copytree(work.model, copy)
    work.model = copy
    assert work.run("--max-tokens", 5) == 0  # the same model, in another place
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert work.run("--max-tokens", 5) == 2
    assert "was begun with model" in capsys.readouterr().err
    assert work.target.read_bytes() == data


def test_changed_input_is_refused(unbroken, capsys):
    work, data = unbroken
    work.write([{**PROMPTS[0], "prompt": "something else"}, *PROMPTS[1:]])
    assert work.run("--max-tokens", 5) == 2
    assert '"r0" is another request in' in capsys.readouterr().err
    work.write(PROMPTS[1:])
    assert work.run("--max-tokens", 5) == 2
    assert '"r0" is not in' in capsys.readouterr().err
    assert work.target.read_bytes() == data


def test_missing_settings_are_refused(unbroken, capsys):
    work, data = unbroken
    Path(f"{work.target}.settings.json").unlink()
    assert work.run("--max-tokens", 5) == 2
    assert "give another --output" in capsys.readouterr().err
    assert work.target.read_bytes() == data


def test_second_run_on_one_output_is_refused(job, capsys):
    work = job(PROMPTS[:1])
    with generate._Results(work.target):
        assert work.run() == 2
    assert "is being written by another run" in capsys.readouterr().err


def start(work, *options):
    return subprocess.Popen(
        command(*work.arguments(*options)),
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_results(work, count):
    deadline = time.monotonic() + 60
    while not work.target.exists() or work.target.read_bytes().count(b"\n") < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def many_lengths(count=20):
    """Requests that end one after another, so that there is a middle to stop in."""
    return [
        {"prompt": f"{number} llamas", "params": {"max_tokens": 5 + 12 * number}}
        for number in range(count)
    ]


def test_killed_run_is_continued(job, loaded):
    work = job(many_lengths())
    child = start(work)
    wait_for_results(work, 3)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    torn = work.target.read_bytes()
    whole = torn[: torn.rfind(b"\n") + 1]
    assert 3 <= whole.count(b"\n") < 20, "the run was not stopped in its middle"
    assert work.run() == 0
    assert work.target.read_bytes().startswith(whole)
    continued = lasting(work.results())

    work.target.unlink()
    assert work.run() == 0
    assert lasting(work.results()) == continued
    assert set(continued) == set(range(1, 21))


def test_ctrl_c_leaves_a_valid_file_and_says_how_to_go_on(job, loaded):
    work = job(many_lengths())
    child = start(work)
    wait_for_results(work, 2)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "Traceback" not in err
    count = len(work.results())
    assert 2 <= count < 20
    assert f"stopped: {count} of 20 results are in {work.target}" in err
    assert "same command continues" in err
    assert work.run() == 0
    assert set(work.results()) == set(range(1, 21))


def test_fingerprint_sees_every_file(model, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    assert generate.fingerprint(copy) == generate.fingerprint(model)
    seen = {generate.fingerprint(model)}
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        (copy / name).write_text((copy / name).read_text() + "\n")
        seen.add(generate.fingerprint(copy))
    for name in ("chat_template.jinja", "chat_templates/tool_use.jinja"):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text("{{ messages }}")
        seen.add(generate.fingerprint(copy))
    assert len(seen) == 6


def test_output_may_lie_beside_the_model(job, loaded, tmp_path):
    work = job(PROMPTS[:2])
    copy = tmp_path / "copy"
    shutil.copytree(work.model, copy)
    work.model, work.target = copy, copy / "out.json"
    assert work.run("--max-tokens", 2) == 0
    (copy / "more.json").mkdir()
    assert work.run("--max-tokens", 2) == 0
    assert len(work.results()) == 2


def test_large_input_is_not_held(tmp_path, monkeypatch):
    """Reading is lazy: the second pass has read no further than what was asked for."""
    file = tmp_path / "in.jsonl"
    file.write_text("".join(f'{{"prompt": "{number}"}}\n' for number in range(100_000)))
    requests = list(itertools.islice(generate.read_requests(file), 3))
    assert [request.id for request in requests] == [1, 2, 3]
