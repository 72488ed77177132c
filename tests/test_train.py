"""`python -m minigen train` and `train-tokenizer` as a user runs them."""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minigen import LLM, SamplingParams, train, training_log
from minigen.__main__ import _parser, main
from minigen.data import read_samples
from minigen.model import Decoder, jagged
from minigen.tokenizing import Settings
from minigen.training_log import read_table
from minigen.weights.save import atomic_directory
from minigen.weights.tokenizer import Tokenizer
from tests.command_line import ROOT, environment, run_minigen
from tests.training_cases import HF, losses, make_inputs, train_args, write_jsonl

EVERY = ("--save-every", 2, "--eval-every", 4, "--keep", 1)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    """As the processes that tests start: sums are then taken in one order."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory) -> Path:
    """An unbroken run."""
    output = tmp_path_factory.mktemp("whole") / "run"
    assert main(train_args(inputs, output, *EVERY, "--steps", 14)) == 0
    return output


def refusal(capsys, args) -> str:
    assert main([*map(str, args)]) == 2
    lines = capsys.readouterr().err.splitlines()
    sentence = lines[-1]
    assert sentence.startswith("minigen: ")
    return sentence


# --- what a run leaves ---------------------------------------------------------------------------


def test_log_and_evaluation(whole, inputs) -> None:
    rows = read_table(whole / "log.csv")
    assert [int(row["step"]) for row in rows] == list(range(1, 15))
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"]) - 0.5
    assert all(row["mfu"] == "" for row in rows)  # nobody said what a CPU could do
    assert all(float(row["tokens_per_s"]) > 0 for row in rows)
    tokens = [int(row["tokens"]) for row in rows]
    assert all(0 < b - a <= 128 for a, b in itertools.pairwise(tokens))
    evaluated = read_table(whole / "evaluation.csv")
    assert [(int(r["step"]), Path(r["file"]).name) for r in evaluated] == [
        (step, name) for step in (4, 8, 12, 14) for name in ("texts.jsonl", "chats.jsonl.xz")
    ]
    tokenizer = Tokenizer.from_dir(inputs / "tok")
    assert tokenizer is not None
    stops = (tokenizer.eos_token_id,)
    for row in evaluated[:2]:
        samples = read_samples(Path(row["file"]), tokenizer, Settings(64, "split", 0.1, stops))  # pyright: ignore[reportArgumentType]
        held_out = samples.num_targets_N()[samples.held_out_N]
        assert int(row["targets"]) == int(held_out.sum()) > 0


def test_evaluation_is_the_mean_over_what_is_held_out(whole, inputs) -> None:
    """Recomputed from the saved model, sample by sample."""
    decoder = Decoder.from_pretrained(whole / "final")
    tokenizer = Tokenizer.from_dir(whole / "final")
    assert tokenizer is not None
    stops = (tokenizer.eos_token_id,)
    samples = read_samples(inputs / "chats.jsonl.xz", tokenizer, Settings(64, "split", 0.1, stops))  # pyright: ignore[reportArgumentType]
    total, count = 0.0, 0
    for i in samples.held_out_N.nonzero().squeeze(1).tolist():
        span = slice(int(samples.starts_N1[i]), int(samples.starts_N1[i + 1]))
        ids, mask = samples.tokens_T[span].long(), samples.targets_T[span]
        logits = decoder(jagged(ids, torch.tensor([0, len(ids)]))).values().log_softmax(-1)
        picked = logits[:-1].gather(1, ids[1:, None]).squeeze(1)[mask[1:]]
        total, count = total - float(picked.sum()), count + len(picked)
    row = read_table(whole / "evaluation.csv")[-1]
    assert row["file"].endswith("chats.jsonl.xz")
    assert float(row["loss"]) == pytest.approx(total / count, rel=1e-5)


def test_only_the_last_checkpoint_is_kept_and_nothing_half_written(whole) -> None:
    names = sorted(path.name for path in whole.iterdir())
    assert names == ["evaluation.csv", "final", "log.csv", "step-00000014", "tokens"]
    state = whole / "step-00000014" / "training"
    assert sorted(path.name for path in state.iterdir()) == ["state.json", "state.safetensors"]


def test_others_may_read_weights_where_they_may_read_the_config(whole) -> None:
    modes = {path.name: path.stat().st_mode for path in (whole / "final").iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]
    assert len(set(modes.values())) == 1


@pytest.mark.parametrize("folder", ["final", "step-00000014"])
def test_transformers_loads_it_and_gives_the_same_logits(whole, folder) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        whole / folder, dtype=torch.float32, attn_implementation="eager"
    )
    mine = Decoder.from_pretrained(whole / folder)
    ids = torch.tensor([3, 200, 45, 46, 270, 8])
    logits = mine(jagged(ids, torch.tensor([0, 6]))).values()
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(whole / folder)
    ours = Tokenizer.from_dir(whole / folder)
    assert ours is not None
    assert tokenizer("a hill 12ü")["input_ids"] == ours.encode("a hill 12ü")
    assert tokenizer.eos_token_id == ours.eos_token_id == mine.config.eos_token_ids[0]


def test_the_engine_runs_it_and_it_stops_by_itself(whole, inputs) -> None:
    llm = LLM(whole / "final", compile="eager", device="cpu", progress=False)
    chat = [{"role": "user", "content": "the little llama"}]
    (output,) = llm.chat([chat], SamplingParams(temperature=0, max_tokens=40), progress=False)
    assert output.prompt_token_ids == llm.tokenizer.chat_tokens(chat)  # pyright: ignore[reportOptionalMemberAccess]
    replied = run_minigen("chat", "--model", whole / "final", "--compile", "eager", input="hello\n")
    assert replied.returncode == 0, replied.stderr


def test_saved_in_bf16_and_in_small_files(inputs, tmp_path) -> None:
    more = ("--steps", 1, "--save-dtype", "bfloat16", "--max-file-bytes", 9000)
    assert main(train_args(inputs, tmp_path / "run", *more)) == 0
    final = tmp_path / "run" / "final"
    files = sorted(final.glob("*.safetensors"))
    assert len(files) > 2
    config = json.loads((final / "config.json").read_text())
    assert (config["dtype"], config["vocab_size"]) == ("bfloat16", 280)
    narrow = Decoder.from_pretrained(final)
    assert narrow.embed.weight.dtype == torch.bfloat16
    embedding = narrow.embed.weight.nbytes
    assert all(f.stat().st_size < max(9000, embedding) + 3000 for f in files)
    theirs = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(final)
    torch.testing.assert_close(theirs.get_input_embeddings().weight, narrow.embed.weight)


def test_samples_and_the_end_of_a_run_are_told(inputs, tmp_path, capsys) -> None:
    prompts = ("--prompt", "the hill", "--chat-prompt", "and?")
    more = ("--steps", 2, *prompts, "--peak-flops", "1e12")
    assert main(train_args(inputs, tmp_path / "run", *more)) == 0
    said = capsys.readouterr().err
    assert "> the hill\n" in said
    assert "> and?\n" in said
    assert re.search(r"texts.jsonl: 6\d samples, \d held out, ", said)
    assert ", MFU " in said
    assert f"python -m minigen chat --model {tmp_path / 'run' / 'final'}" in said
    assert float(read_table(tmp_path / "run" / "log.csv")[-1]["mfu"]) >= 0


def test_reading_the_data_shows_how_far_it_is(inputs, tmp_path, monkeypatch) -> None:
    shown: dict[str, list[int]] = {}

    @contextlib.contextmanager
    def bar(total: int, what: str, unit: str):
        assert unit == "B"
        shown[what] = [total, 0]

        def update(count: int) -> None:
            shown[what][1] += count

        yield SimpleNamespace(update=update)

    monkeypatch.setattr("minigen.training_run.bar", bar)
    args = train_args(inputs, tmp_path / "run", "--steps", 1)
    assert main(args) == 0
    names = ("texts.jsonl", "chats.jsonl.xz")
    assert shown == {name: [(inputs / name).stat().st_size] * 2 for name in names}
    shown.clear()
    assert main(args) == 0
    assert not shown  # it was kept


def test_fine_tuning_begins_with_the_checkpoint(whole, inputs, tmp_path) -> None:
    args = train_args(inputs, tmp_path / "run", "--steps", 2, "--lr", 1e-6)
    at = args.index("--config")
    args[at : at + 4] = ["--model", str(whole / "final")]
    assert main(args) == 0
    begun = float(losses(tmp_path / "run")[0][1])
    ended = float(losses(whole)[-1][1])
    assert begun < float(losses(whole)[0][1]) - 0.5
    assert begun == pytest.approx(ended, abs=1.0)


# --- going on ------------------------------------------------------------------------------------


def test_a_finished_run_does_nothing_more(whole, inputs) -> None:
    before = (whole / "log.csv").read_text()
    weights = (whole / "final" / "model.safetensors").read_bytes()
    assert main(train_args(inputs, whole, *EVERY, "--steps", 14)) == 0
    assert (whole / "log.csv").read_text() == before
    assert (whole / "final" / "model.safetensors").read_bytes() == weights


def test_killed_at_any_moment_it_goes_on_with_the_same_losses(whole, inputs, tmp_path) -> None:
    output = tmp_path / "run"
    args = train_args(inputs, output, *EVERY, "--steps", 14)
    env = {**environment(), "OMP_NUM_THREADS": "1"}
    for rows in (3, 9):
        process = subprocess.Popen(
            [sys.executable, "-m", "minigen", *args], cwd=ROOT, env=env, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 100
        while len(read_table(output / "log.csv")) < rows and time.monotonic() < deadline:
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run was over before it could be killed"
    with (output / "log.csv").open("a") as log:
        log.write("14,0.3,12")  # a row that was being written
    assert main(args) == 0
    assert losses(output) == losses(whole)
    assert read_table(output / "evaluation.csv") == read_table(whole / "evaluation.csv")
    for name in ("final/model.safetensors", "step-00000014/training/state.safetensors"):
        assert (output / name).read_bytes() == (whole / name).read_bytes()
    assert not list(output.glob(".*"))


def test_rows_of_several_steps_are_the_same_after_going_on(inputs, tmp_path) -> None:
    """A checkpoint lies between two rows of the log; dropout draws as if nothing had happened."""
    more = ("--save-every", 2, "--steps", 6, "--dropout", 0.2, "--accumulate", 2)
    found = []
    for stop in (False, True):
        output = tmp_path / str(stop)
        args = [*train_args(inputs, output, *more), "--log-every", "3"]
        assert main(args) == 0
        if stop:  # as if killed after step 4
            for name in ("step-00000006", "final"):
                shutil.rmtree(output / name)
            assert main(args) == 0
        found.append(losses(output))
    assert [step for step, _ in found[0]] == [3, 6]
    assert found[0] == found[1]


def test_ctrl_c_saves_and_leaves(inputs, tmp_path, monkeypatch) -> None:
    from minigen import cli

    args = train_args(inputs, tmp_path / "run", "--steps", 6)
    real = cli.Interrupt.__init__

    def interrupted(self) -> None:
        real(self)
        self.requested = True

    with monkeypatch.context() as patch:
        patch.setattr(cli.Interrupt, "__init__", interrupted)
        assert main(args) == 130
    assert [step for step, _ in losses(tmp_path / "run")] == [1]
    assert main(args) == 0
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_changed_settings_are_refused(whole, inputs, capsys) -> None:
    said = refusal(capsys, train_args(inputs, whole, *EVERY, "--steps", 14, "--lr", 0.02))
    assert "was begun with lr = 0.01, now it is 0.02" in said
    args = train_args(inputs, whole, *EVERY, "--steps", 14, "--no-assistant-only-loss")
    assert "was begun with assistant_only_loss = true, now it is false" in refusal(capsys, args)
    said = refusal(capsys, train_args(inputs, whole, *EVERY, "--steps", 15))
    assert "was begun with steps = 14, now it is 15" in said
    args = train_args(inputs, whole, *EVERY, "--steps", 14)
    args[args.index("--data") + 1] += ":2"
    assert "was begun with data = " in refusal(capsys, args)


def test_a_directory_appears_whole_or_not_at_all(tmp_path) -> None:
    path = tmp_path / "a"
    with atomic_directory(path) as directory:
        (directory / "x").write_text("1")
        assert not path.exists()
    with pytest.raises(KeyError), atomic_directory(path) as directory:
        {}[(directory / "x").write_text("2")]
    assert (path / "x").read_text() == "1"
    with atomic_directory(path) as directory:
        (directory / "y").write_text("3")
    assert [f.name for f in path.iterdir()] == ["y"]
    assert [f.name for f in tmp_path.iterdir()] == ["a"]


# --- two processes -------------------------------------------------------------------------------


def test_two_processes_have_the_losses_of_one(inputs, tmp_path) -> None:
    more = ("--epochs", 1, "--eval-every", 5)
    alone = train_args(inputs, tmp_path / "one", *more, "--accumulate", 2)
    assert main(alone) == 0
    args = train_args(inputs, tmp_path / "two", *more, "--nproc-per-node", 2)
    # What an interpreter does at its end: one of several must not come to it, see `train._leave`.
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import atexit, os, pathlib\n"
        f"ended = pathlib.Path({str(tmp_path)!r}, 'ended-' + os.environ.get('RANK', 'launcher'))\n"
        "atexit.register(ended.touch)\n"
    )
    env = environment()
    env["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(tmp_path / "site"), env.get("PYTHONPATH")))
    )
    finished = subprocess.run(
        [sys.executable, "-m", "minigen", *args],
        cwd=ROOT,
        env={**env, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=170,
    )
    # What went wrong comes first; torchrun's account of it is long.
    assert finished.returncode == 0, finished.stderr[:6000]
    assert [path.name for path in tmp_path.glob("ended-*")] == ["ended-launcher"]
    one, two = (read_table(tmp_path / name / "log.csv") for name in ("one", "two"))
    assert len(one) == len(two) > 5
    # The last step's batches are not cut alike, but hold the same samples.
    for a, b in zip(one, two, strict=True):
        assert (a["step"], a["tokens"], a["targets"]) == (b["step"], b["tokens"], b["targets"])
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-4)
        assert float(a["grad_norm"]) == pytest.approx(float(b["grad_norm"]), rel=1e-3)
    a, b = (read_table(tmp_path / name / "evaluation.csv") for name in ("one", "two"))
    assert [r["targets"] for r in a] == [r["targets"] for r in b]
    for mine, theirs in zip(a, b, strict=True):
        assert float(mine["loss"]) == pytest.approx(float(theirs["loss"]), rel=1e-4)


def test_processes_are_started_for_a_run_that_can_be(inputs, tmp_path, monkeypatch) -> None:
    class Launched(Exception):  # noqa: N818
        pass

    def launch(program: str, command: list[str]) -> None:
        raise Launched(command)

    monkeypatch.setattr("os.execv", launch)
    args = train_args(inputs, tmp_path / "run", "--nproc-per-node", 3)
    parsed = _parser().parse_args(args)
    parsed.argv = args
    with pytest.raises(Launched) as left:
        train.run(parsed)
    (command,) = left.value.args
    assert list((tmp_path / "run" / "tokens").glob("*.safetensors"))  # once for all processes
    assert command[command.index("--nproc-per-node") + 1] == "3"
    assert command[command.index("minigen") + 1 :] == args


def test_no_process_is_started_for_a_run_that_cannot_be(
    inputs, whole, tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr("os.execv", lambda *_: pytest.fail("torchrun was started"))
    good = train_args(inputs, tmp_path / "run", "--steps", 2, "--nproc-per-node", 2)

    def said(*args: str, num_read: int = 0) -> str:
        assert main([*args]) == 2
        *before, sentence = capsys.readouterr().err.splitlines()
        assert len(before) == num_read
        assert all(line.startswith("reading ") for line in before)
        return sentence

    assert "nowhere: No such file" in said(*change(good, "--data", "--data", tmp_path / "nowhere"))
    assert "nowhere" in said(*change(good, "--config", "--config", tmp_path / "nowhere"))
    assert "has no tokenizer.json" in said(*change(good, "--tokenizer", "--tokenizer", tmp_path))
    assert "either --model" in said(*change(good, "--config"))
    assert "either --steps or --epochs" in said(*good, "--epochs", "1")
    assert "use auto, cpu, cuda" in said(*change(good, "--device", "--device", "tpu"))
    assert "is more than --tokens 8" in said(*good, "--tokens", "8", "--max-length", "9")
    assert not (tmp_path / "run").exists()
    sentence = said(*change(good, "--output", "--output", inputs))
    assert "is not empty and no output of train" in sentence
    (tmp_path / "file").touch()
    assert "Not a directory" in said(*change(good, "--output", "--output", tmp_path / "file" / "a"))
    args = train_args(inputs, whole, *EVERY, "--steps", 14, "--nproc-per-node", 2)
    assert "was begun with processes = 1, now it is 2" in said(*args)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "one"}\n')
    little = change(change(good, "--data"), "--data", "--data", bad)
    said_of_it = said(*change(little, "--steps", "--epochs", 1), num_read=1)
    assert "too little for one step of 2 processes" in said_of_it
    bad.write_text('{"text": "one"}\n{"text": 2}\n')
    sentence = said(*change(good, "--data", "--data", bad), num_read=1)
    assert 'bad.jsonl:2: "text" must be a text, not int' in sentence
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    sentence = said(*change(good, "--device", "--device", "cuda"))
    assert "process 1 finds 1 GPUs" in sentence


# --- refusals ------------------------------------------------------------------------------------


def change(args: list[str], option: str, *values: object) -> list[str]:
    at = args.index(option)
    return [*args[:at], *map(str, values), *args[at + 2 :]]


def test_refusals(inputs, whole, tmp_path, capsys) -> None:
    good = train_args(inputs, tmp_path / "run", "--steps", 2)

    def said(*args: str) -> str:
        return refusal(capsys, args)

    assert "either --model" in said(*change(good, "--config"))
    assert "needs --tokenizer" in said(*change(good, "--tokenizer"))
    assert "either --steps or --epochs" in said(*good, "--epochs", "1")
    assert "has no tokenizer.json" in said(*change(good, "--tokenizer", "--tokenizer", tmp_path))
    assert "nowhere" in said(*change(good, "--config", "--config", tmp_path / "nowhere"))
    assert "nowhere: No such file" in said(*change(good, "--data", "--data", tmp_path / "nowhere"))
    assert "the model is made for 64 tokens" in said(*good, "--max-length", "65")
    assert "is more than --tokens 8" in said(*good, "--tokens", "8", "--max-length", "9")
    assert "use auto, cpu, cuda" in said(*change(good, "--device", "--device", "tpu"))
    if not torch.cuda.is_available():
        assert "finds no GPU on this machine" in said(*change(good, "--device", "--device", "cuda"))
    small = write_jsonl(tmp_path / "config.json", [{**HF, "vocab_size": 279}])
    sentence = said(*change(good, "--config", "--config", small))
    assert "has 280 tokens, but vocab_size is 279" in sentence
    write_jsonl(tmp_path / "bad.jsonl", [{"text": "a hill"}, {"prompt": "a"}])
    sentence = said(*change(good, "--data", "--data", tmp_path / "bad.jsonl"))
    assert 'bad.jsonl:2: the line must have either "text" or "messages"' in sentence
    (tmp_path / "file").touch()
    assert "Not a directory" in said(*change(good, "--output", "--output", tmp_path / "file" / "a"))
    sentence = said(*change(good, "--output", "--output", inputs))
    assert "is not empty and no output of train" in sentence
    bare = tmp_path / "bare"
    shutil.copytree(inputs / "tok", bare)
    (bare / "chat_template.jinja").unlink()
    untold = change(good, "--tokenizer", "--tokenizer", bare)
    assert "has no chat template" in said(*untold)
    assert "--chat-prompt: " in said(*untold, "--chat-prompt", "and?")


def test_a_loss_that_is_no_number_ends_the_run(inputs, tmp_path, capsys) -> None:
    args = train_args(inputs, tmp_path / "run", "--steps", 5, "--clip", 0, "--warmup", 0)
    assert main(change(args, "--lr", "--lr", "1e30")) == 1
    assert "give a smaller --lr" in capsys.readouterr().err
    assert not (tmp_path / "run" / "final").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [("--lr", "0"), ("--lr", "x"), ("--holdout", "1"), ("--tokens", "1"), ("--compile", "fast")],
)
def test_numbers_out_of_range(inputs, tmp_path, capsys, option, value) -> None:
    with pytest.raises(SystemExit) as left:
        main([*train_args(inputs, tmp_path / "run"), option, value])
    assert left.value.code == 2
    assert f"argument {option}" in capsys.readouterr().err


def test_two_runs_on_one_output(inputs, whole, capsys) -> None:
    fcntl = pytest.importorskip("fcntl")
    with (whole / "tokens" / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        said = refusal(capsys, train_args(inputs, whole, *EVERY, "--steps", 14))
    assert "another run writes into" in said


# --- plots ---------------------------------------------------------------------------------------


def test_plot_without_matplotlib(inputs, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = refusal(capsys, train_args(inputs, tmp_path / "run", "--plot"))
    assert "pip install 'minigen[plot]'" in said
    assert not (tmp_path / "run").exists()


def test_plot(whole, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("log.csv", "evaluation.csv"):
        shutil.copyfile(whole / name, tmp_path / name)
    training_log.plot(tmp_path)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


# --- tokenizers ----------------------------------------------------------------------------------


def test_a_tokenizer_gives_back_every_text(inputs) -> None:
    tokenizer = Tokenizer.from_dir(inputs / "tok")
    assert tokenizer is not None
    assert tokenizer.vocab_size == 280
    assert [tokenizer.token_text(i) for i in range(4)] == [
        *("<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>")
    ]
    for text in ("", " ", "the hill", "ü🦙\n\t \x00", "1234", "a  b"):
        ids = tokenizer.encode(text)
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids) == text
    assert len(tokenizer.encode("1234")) == 5  # digits alone, and BOS
    learnt = len(tokenizer.encode("the little llama"))
    assert learnt < len("the little llama") / 2


def test_tokenizer_refusals(inputs, tmp_path, capsys) -> None:
    data = ("train-tokenizer", "--data", inputs / "texts.jsonl", "--output", tmp_path / "tok")
    said = refusal(capsys, [*data, "--vocab-size", "257"])
    assert "--vocab-size 257 is too small" in said
    assert "is not empty" in refusal(capsys, [*data[:-1], inputs])
    bad = write_jsonl(tmp_path / "template.jinja", [])
    bad.write_text("{% for m in messages %}{{ m['content'] }}{% endif %}")
    assert "no valid jinja2" in refusal(capsys, [*data, "--chat-template", bad])
    bad.write_text("{{ messages | length }}")
    assert "writes no assistant's turn" in refusal(capsys, [*data, "--chat-template", bad])
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    said = refusal(capsys, [*data[:1], "--data", empty, *data[3:]])
    assert "holds no text" in said
    assert not (tmp_path / "tok").exists()
