"""The report runs commands that succeed, fail, hang and speak JSON."""

import importlib
import json
import signal
import subprocess
import sys
import time
from itertools import takewhile
from pathlib import Path

import pytest

from minigen.__main__ import main
from minigen.shapes import SHAPES
from tests.command_line import ROOT, run_tool
from tools import report
from tools.compare_batching import PHASES
from tools.compare_compile_modes import MODES
from tools.report import Step, last_json, run_all, steps
from tools.scale import GPU_CONTEXTS


@pytest.fixture
def module(tmp_path, monkeypatch):
    """`python -m act WHAT`, found by every step."""
    (tmp_path / "act.py").write_text(
        "import subprocess, sys, time\n"
        "what = sys.argv[1]\n"
        "if what == 'hang':\n"
        "    print('waiting', flush=True)\n"
        "    sleep = [sys.executable, '-c', 'import time; time.sleep(60)']\n"
        "    child = subprocess.Popen(sleep)\n"
        "    open(sys.argv[2], 'w').write(str(child.pid))\n"
        "    time.sleep(60)\n"
        "print('text')\n"
        "print('{\"a\": 1}')\n"
        "sys.exit(3 if what == 'fail' else 0)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "act"


def is_gone(file: Path) -> None:
    """The process whose number the file holds has ended; a zombie may wait for its new parent."""
    stat = Path("/proc", file.read_text(), "stat")
    assert not stat.exists() or stat.read_text().split()[2] == "Z"


def test_every_step_is_reported(module, tmp_path) -> None:
    planned = [
        Step("good", (module, "good"), 30),
        Step("bad", (module, "fail"), 30),
        Step("long", (module, "hang", str(tmp_path / "child")), 2),
        Step("last", (module, "good"), 30),
    ]
    begin = time.monotonic()
    done = run_all(planned, tmp_path, float("inf"))
    assert time.monotonic() - begin < 30
    assert [(step["name"], step["result"], step["json"]) for step in done] == [
        ("good", "ok", {"a": 1}),
        ("bad", "failed (exit code 3)", {"a": 1}),
        ("long", "ended after 2 s", None),
        ("last", "ok", {"a": 1}),
    ]
    assert json.loads((tmp_path / "report.json").read_text()) == done
    assert (tmp_path / "good.log").read_text() == 'text\n{"a": 1}\n'
    assert (tmp_path / "long.log").read_text() == "waiting\n"
    # What the step had started ended with it.
    is_gone(tmp_path / "child")


def test_nothing_is_begun_without_time_for_it(module, tmp_path) -> None:
    planned = [Step("a", (module, "good"), 30), Step("b", (module, "good"), 30)]
    done = run_all(planned, tmp_path, report.LEAST_SECONDS - 1)
    assert [step["result"] for step in done] == ["not begun"] * 2
    assert not list(tmp_path.glob("*.log"))


def test_a_step_ends_with_the_budget(module, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(report, "LEAST_SECONDS", 0.5)
    planned = [Step("a", (module, "hang", str(tmp_path / "child")), 30)] * 2
    done = run_all(planned, tmp_path, 2)
    assert [step["result"] for step in done] == ["ended after 2 s", "not begun"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_step_ends_with_a_report_that_is_ended(number, module, tmp_path) -> None:
    child = tmp_path / "child"
    step = f"report.Step('a', {(module, 'hang', str(child))!r}, 60)"
    # Tests that run under nohup hand down that SIGHUP is ignored.
    script = (
        f"import signal\nsignal.signal({int(number)}, signal.SIG_DFL)\n"
        f"from tools import report\nreport.steps = lambda *_: [{step}]\n"
        f"report.main(report.parser().parse_args(['--output', {str(tmp_path)!r}]))"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    while process.poll() is None and not (child.exists() and child.read_text()):
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(30) == 128 + number
    is_gone(child)


@pytest.mark.parametrize("text", ["", "x", "x\n1\n", '{"a": 1}\nmore', "\n\n"])
def test_only_an_object_on_the_last_line_counts(text, tmp_path) -> None:
    file = tmp_path / "log"
    file.write_text(text)
    assert last_json(file) is None
    file.write_text(text + '\n{"b": 2}\n')
    assert last_json(file) == {"b": 2}


def bench_help(capsys) -> str:
    with pytest.raises(SystemExit) as left:
        main(["bench", "--help"])
    assert left.value.code == 0
    return capsys.readouterr().out


def test_the_steps_are_commands_with_such_options(tmp_path, capsys) -> None:
    trace = tmp_path / "trace.csv"
    planned = [step for gpu in (False, True) for step in steps(gpu, "tiny", tmp_path, trace)]
    options: dict[str, set[str]] = {}
    for step in planned:
        known = options.setdefault(step.command[0], set())
        known.update(word for word in step.command if word.startswith("--"))
    del options["pytest"]
    for module, wanted in options.items():
        tool = importlib.import_module(module)
        # `minigen` leaves the parsing to its commands, a tool to its `options`.
        helped = bench_help(capsys) if module == "minigen" else tool.options().format_help()
        assert not {option for option in wanted if option not in helped}
    for gpu in (False, True):
        names = [step.name for step in steps(gpu, "tiny", tmp_path, trace)]
        assert len(set(names)) == len(names)
    assert all(step.limit <= 540 for step in planned)


@pytest.mark.parametrize(
    ("installed", "options"),
    [
        ((), []),
        (("pytest_timeout",), []),  # alone it would end all tests with the one that hangs
        (("xdist",), ["-n", "--dist"]),
        (("xdist", "pytest_timeout"), ["-n", "--dist", "--timeout", "--timeout-method"]),
    ],
)
def test_plugins_are_used_where_they_are(installed, options, monkeypatch) -> None:
    find = dict.fromkeys(installed, True).get
    monkeypatch.setattr(report.importlib.util, "find_spec", find)
    assert [word for word in report.pytest_plugins("6") if word.startswith("-")] == options


def test_unknown_steps_are_refused(tmp_path) -> None:
    said = run_tool("report", "--output", tmp_path / "out", "--only", "speed")
    assert said.returncode == 2
    assert "--only speed: the steps here are" in said.stderr
    assert not (tmp_path / "out").exists()


def values(command: tuple[str, ...], option: str) -> list[str]:
    """What follows an option; none where it is absent."""
    after = command[command.index(option) + 1 :] if option in command else ()
    return list(takewhile(lambda word: not word.startswith("--"), after))


@pytest.mark.parametrize("gpu", [False, True])
def test_a_trace_is_replayed_and_gives_lengths(gpu: bool, tmp_path) -> None:
    without, trace = steps(gpu, "tiny", tmp_path), tmp_path / "trace.csv"
    assert not [step for step in without if {"trace", "--trace"} & {step.name, *step.command}]
    planned = steps(gpu, "tiny", tmp_path, trace)
    assert {s.name for s in planned} - {s.name for s in without} == {"trace"}
    [replay] = [step.command for step in planned if step.name == "trace"]
    assert replay[:3] == ("minigen", "bench", "trace")
    assert values(replay, "--dataset-path") == [str(trace)]
    assert float(*values(replay, "--rate")) > 0
    batching = [s.command for s in planned if s.command[0] == "tools.compare_batching"]
    assert [values(command, "--trace") for command in batching] == [[str(trace)]] * len(batching)
    assert all(values(c, "--lengths") in ([], ["lognormal", "one-long", "trace"]) for c in batching)
    phases = [phase for command in batching for phase in values(command, "--phases")]
    assert phases == list(PHASES if gpu else PHASES[:3])
    if gpu:  # a rectangle of long rows may need more memory than there is
        assert all(values(c, "--max-rows") for c in batching if "train-forward" in c)


@pytest.mark.parametrize("gpu", [False, True])
def test_all_modes_come_into_one_table(gpu: bool, tmp_path) -> None:
    planned = steps(gpu, "tiny", tmp_path)
    modes = [s.command for s in planned if s.command[0] == "tools.compare_compile_modes"]
    assert len(modes) > 1
    assert sorted(mode for c in modes for mode in values(c, "--modes")) == sorted(MODES)
    shared = {(*values(c, "--results"), *values(c, "--plot")) for c in modes}
    assert shared == {(str(tmp_path / "modes.json"), str(tmp_path / "modes.png"))}


def test_long_contexts_have_a_model_that_holds_them(tmp_path) -> None:
    [scale] = [step for step in steps(True, "qwen3-0.6b", tmp_path) if step.name == "scale"]
    [shape] = values(scale.command, "--shape")
    assert SHAPES[shape]["max_position_embeddings"] >= max(GPU_CONTEXTS)


def test_the_trace_is_found(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MINIGEN_SHARED", str(tmp_path))
    assert report.find_trace() is None
    (tmp_path / "traces").mkdir()
    for name in ("azure_llm_conv.csv.xz", "azure_llm_conv.csv"):
        file = tmp_path / "traces" / name
        file.touch()
        assert report.find_trace() == file


@pytest.mark.parametrize("given", ["none", "found", "named"])
def test_the_report_says_whether_there_is_a_trace(given, tmp_path, monkeypatch, capsys) -> None:
    ran: list[Step] = []
    done = {"name": "fixed", "result": "ok", "seconds": 1.0}

    def run_none(planned: list[Step], *_: object) -> list[dict[str, object]]:
        ran.extend(planned)
        return [done]

    monkeypatch.setattr(report, "run_all", run_none)
    monkeypatch.setenv("MINIGEN_SHARED", str(tmp_path))
    file = tmp_path / ("mine.csv" if given == "named" else "traces/azure_llm_conv.csv")
    if given != "none":
        file.parent.mkdir(exist_ok=True)
        file.touch()
    arguments = ["--output", str(tmp_path / "out"), *["--trace", str(file)] * (given == "named")]
    report.main(report.parser().parse_args(arguments))
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines == ([report.NO_TRACE] if given == "none" else [])
    assert json.loads(last)["trace"] == (None if given == "none" else str(file))
    assert [step.name for step in ran if step.name == "trace"] == ["trace"] * (given != "none")
    assert {str(file)} & {word for step in ran for word in step.command} == (
        set() if given == "none" else {str(file)}
    )


def test_a_trace_that_is_not_there_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MINIGEN_SHARED", str(tmp_path))
    for arguments, message in (
        (["--trace", "absent.csv"], "--trace absent.csv: there is no such file"),
        (["--only", "trace"], "--only trace: there is no trace, give --trace FILE"),
    ):
        given = report.parser().parse_args(["--output", str(tmp_path / "out"), *arguments])
        with pytest.raises(ValueError, match=message):
            report.main(given)
    assert not (tmp_path / "out").exists()
