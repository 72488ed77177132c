"""Tokenizing in several processes: the same samples, the first error, and nothing left behind."""

import copy
import functools
import json
import lzma
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minigen import data, pool
from minigen.data import Samples, read_samples
from minigen.tokenizing import Settings, Tokens, tokenize_lines
from minigen.weights.assistant_turns import mask_of_spans
from minigen.weights.lookalikes import Veil
from minigen.weights.tokenizer import Tokenizer
from tests.command_line import ROOT
from tests.training_cases import conversations, make_inputs, texts

SETTINGS = Settings(48, "split", 0.3)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    found = Tokenizer.from_dir(make_inputs(tmp_path_factory.mktemp("inputs")) / "tok")
    assert found is not None
    return found


def mixed_lines(count: int) -> list[str]:
    """Texts and conversations, some over-long, some that look like control tokens, empty lines."""
    rng = random.Random(count)
    items = texts(count) + conversations(count)
    items += [
        {"text": "the hill <|eos|> ü " * 40},
        {"messages": [{"role": "user", "content": "a"}]},
    ]
    items += [{"messages": [{"role": "user", "content": "<|user|>"}, *item["messages"][1:]]}
              for item in conversations(3, 7)]  # fmt: skip
    rng.shuffle(items)
    return [json.dumps(item) + "\n" + "\n" * (rng.random() < 0.1) for item in items]


def write(file: Path, lines: list[str]) -> Path:
    content = "".join(lines).encode()
    file.write_bytes(lzma.compress(content) if file.suffix == ".xz" else content)
    return file


def contents(samples: Samples) -> list[object]:
    tensors = samples.tokens_T, samples.targets_T, samples.starts_N1, samples.held_out_N
    return [*((t.dtype, t.tolist()) for t in tensors), list(samples.counts.items())]


def of_tokens(found: Tokens) -> list[object]:
    ends = torch.tensor([0, *found.lengths]).cumsum(0)
    return [
        (torch.int32, list(found.ids)),
        (torch.bool, list(map(bool, found.targets))),
        (torch.int64, ends.tolist()),
        (torch.bool, list(map(bool, found.held_out))),
        list(found.counts.items()),
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.xz"])
def test_two_processes_give_the_samples_of_one(tmp_path, tokenizer, monkeypatch, name) -> None:
    monkeypatch.setattr(data, "CHUNK_BYTES", 500)
    lines = mixed_lines(60)
    file, taken = write(tmp_path / name, lines), []
    one = read_samples(file, tokenizer, SETTINGS, processes=1)
    two = read_samples(file, tokenizer, SETTINGS, taken.append, processes=2)
    assert contents(one) == contents(two)
    assert one.counts["split"] > 0
    assert one.counts["dropped"] > 0
    assert 0 < int(one.held_out_N.sum()) < len(one)
    assert sum(taken) == file.stat().st_size
    if name == "a.jsonl":
        assert len(taken) > 10  # a bar moves


@given(chunk=st.integers(1, 3000), count=st.integers(1, 8))
def test_chunks_join_to_the_whole(tmp_path_factory, tokenizer, chunk, count) -> None:
    lines = mixed_lines(count)
    file = write(tmp_path_factory.mktemp("c") / "a.jsonl", lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "CHUNK_BYTES", chunk)
        found = read_samples(file, tokenizer, SETTINGS)
    whole = file.read_bytes().splitlines(keepends=True)
    assert contents(found) == of_tokens(tokenize_lines(file, tokenizer, SETTINGS, 1, whole))


@pytest.mark.parametrize("processes", [1, 2])
def test_the_first_bad_line_is_named(tmp_path, tokenizer, monkeypatch, processes) -> None:
    monkeypatch.setattr(data, "CHUNK_BYTES", 300)
    lines = [json.dumps(item) + "\n" for item in texts(200)]
    for bad in (150, 120, 121):
        lines[bad - 1] = '{"text": 3}\n'
    file = write(tmp_path / "a.jsonl", lines)
    with pytest.raises(ValueError, match=r'a.jsonl:120: "text" must be a text'):
        read_samples(file, tokenizer, SETTINGS, processes=processes)
    # A file that is torn behind a bad line: the line comes first, and is in the same chunk, too.
    torn = tmp_path / "a.jsonl.xz"
    for chunk in (300, 1 << 20):
        monkeypatch.setattr(data, "CHUNK_BYTES", chunk)
        torn.write_bytes(lzma.compress(file.read_bytes())[:-20])
        with pytest.raises(ValueError, match=r"a.jsonl.xz:120: "):
            read_samples(torn, tokenizer, SETTINGS, processes=processes)
        torn.write_bytes(lzma.compress("".join(lines[:119]).encode())[:-20])
        with pytest.raises(ValueError, match=r"a.jsonl.xz is not a whole xz file"):
            read_samples(torn, tokenizer, SETTINGS, processes=processes)


@pytest.mark.parametrize(
    ("cores", "bytes_", "expected"), [(4, 3900, 1), (4, 4200, 4), (99, 4200, 16), (1, 4200, 1)]
)
@pytest.mark.parametrize("suffix", ["", ".xz"])
def test_only_large_files_get_processes(
    tmp_path, tokenizer, monkeypatch, cores, bytes_, expected, suffix
) -> None:
    """What counts is the lines' size, not the packed file's."""
    line = json.dumps({"text": "hill"}) + "\n"
    lines = [line] * (bytes_ // len(line))
    lines[-1] = lines[-1][:-1] + " " * (bytes_ - len(line) * len(lines)) + "\n"
    file = write(tmp_path / f"a.jsonl{suffix}", lines)
    used = []

    def in_order(function, calls, processes):
        used.append(processes)
        return in_this_process(function, calls, 1)

    in_this_process = pool.in_order
    monkeypatch.setattr(data, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(data, "SMALL_CHUNKS", 4)
    monkeypatch.setattr(pool, "cores", lambda: cores)
    monkeypatch.setattr(pool, "in_order", in_order)
    assert len(read_samples(file, tokenizer, SETTINGS)) == len(lines)
    assert used == [expected]


def test_a_tokenizer_without_files_stays_here(tmp_path, tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(data, "CHUNK_BYTES", 100)
    monkeypatch.setattr(data, "SMALL_CHUNKS", 1)
    monkeypatch.setattr(pool, "cores", lambda: 2)
    alone = copy.copy(tokenizer)
    alone.directory = None
    file = write(tmp_path / "a.jsonl", mixed_lines(20))
    with monkeypatch.context() as patch:
        patch.setattr(pool, "ProcessPoolExecutor", None)  # none is made
        found = read_samples(file, alone, SETTINGS)
    assert contents(found) == contents(read_samples(file, tokenizer, SETTINGS))
    with pytest.raises(TypeError, match="was not read from files"):
        copy.deepcopy(alone)


# --- processes -----------------------------------------------------------------------------------


def test_results_keep_the_order_of_their_calls() -> None:
    delays = [(0.3,), (0.0,), (0.1,), (0.0,)] * 3
    assert list(pool.in_order(functools.partial(max, 0.05), delays, 2)) == [
        max(0.05, delay) for (delay,) in delays
    ]


def test_a_killed_process_is_told() -> None:
    with pytest.raises(RuntimeError, match="one of 2 processes has ended: was it killed"):
        list(pool.in_order(os._exit, [(3,)], 2))


ENDLESS = """
import time
from minigen import pool
def calls():
    while True:
        print("one", flush=True)
        yield (0.3,)
for _ in pool.in_order(time.sleep, calls(), 2):
    pass
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize(("begun", "wait"), [(3, 0.0), (3, 0.1), (3, 0.2), (8, 0.0)])
def test_processes_end_with_the_one_that_made_them(how, begun, wait, tmp_path) -> None:
    """Ctrl-C goes to all of them, a kill to the first one only.

    With three calls begun both processes are starting, with eight there is a result.
    """
    with subprocess.Popen(
        [sys.executable, "-c", ENDLESS], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True, env={**os.environ, "TMPDIR": str(tmp_path)},
    ) as child:  # fmt: skip
        assert child.stdout is not None
        for _ in range(begun):
            assert child.stdout.readline() == "one\n"
        time.sleep(wait)
        others = psutil.Process(child.pid).children(recursive=True)
        assert len(others) >= 2
        os.killpg(child.pid, how) if how == signal.SIGINT else child.send_signal(how)
        _, errors = child.communicate(timeout=60)
    assert child.returncode != 0
    if how == signal.SIGINT:
        assert errors.count("Traceback") == 1, errors
    _, alive = psutil.wait_procs(others, timeout=30)
    assert not alive
    assert not list(tmp_path.iterdir())


def test_workers_do_without_torch() -> None:
    code = "import sys, minigen.tokenizing, minigen.pool; "
    code += "print(sorted({'torch', 'numpy'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


# --- parts of it, against their plain definitions ------------------------------------------------


@given(pieces=st.lists(st.text("ab<>＜|\ue000ü", max_size=8)), taken=st.text("\ue000\ue001"))
def test_a_veil_covers_edges_and_nothing_else(pieces, taken) -> None:
    edges = "<>＜"
    veil = Veil(lambda character: character in edges, taken)
    covered = [veil.cover(piece) for piece in pieces]
    stand_ins: dict[str, str] = {}
    free = iter(c for c in map(chr, range(0xE000, 0xF900)) if c not in taken)
    for piece, found in zip(pieces, covered, strict=True):
        for character in piece:
            if character in edges and character not in stand_ins:
                stand_ins[character] = next(free)
        for character, stand_in in stand_ins.items():
            piece = piece.replace(character, stand_in)
        assert found == piece
    assert bool(veil) == bool(stand_ins)
    if not {*"".join(pieces)} & {*stand_ins.values()}:
        assert [veil.lift(piece) for piece in covered] == pieces


@given(sizes=st.lists(st.integers(1, 4), max_size=12), cuts=st.sets(st.integers(0, 30), max_size=8))
def test_the_mask_of_spans_is_that_of_its_definition(sizes, cuts) -> None:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    offsets = [(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    bounds = sorted(cuts)
    spans = list(zip(bounds[::2], bounds[1::2], strict=False))
    assert mask_of_spans(offsets, spans) == [
        any(first <= begin and end <= last for first, last in spans) for begin, end in offsets
    ]
