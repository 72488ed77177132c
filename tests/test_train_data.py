"""Reading training data: lines to samples, what counts in them, what is held out."""

import itertools
import json
import lzma
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minigen.batch import Corpus, make_batch
from minigen.data import (
    Source,
    fingerprint,
    load_samples,
    read_jsonl,
    read_lines,
    read_samples,
    save_samples,
)
from minigen.model import DecoderConfig
from minigen.tokenizing import Settings, is_held_out
from minigen.weights.tokenizer import Tokenizer
from tests.training_cases import HF, conversations, make_inputs, texts, write_jsonl

GENERATION = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Cuts what it thought from all turns but the last, and closes the text with a token of its own.
REWRITING = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if m['role'] == 'assistant' %}{% if loop.last %}Hm. {% endif %}{{ m['content'] }}"
    "{{ eos_token }}{% else %}{{ m['content'] }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% else %}<|user|>{% endif %}"
)
CHAT = [
    {"role": "user", "content": "hello llama"},
    {"role": "assistant", "content": "the hill."},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "one red ball"},
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def tokenizer(inputs) -> Tokenizer:
    found = Tokenizer.from_dir(inputs / "tok")
    assert found is not None
    return found


def with_template(inputs: Path, tmp_path: Path, template: str) -> Tokenizer:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((inputs / "tok" / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text(template)
    found = Tokenizer.from_dir(tmp_path)
    assert found is not None
    return found


def targets_of(tokenizer: Tokenizer, messages, **options) -> list[str]:
    """The runs of tokens that count, as texts."""
    ids, mask, _ = tokenizer.chat_tokens_and_targets(messages, **options)
    runs = itertools.groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1])
    return [
        tokenizer.decode([i for i, _ in run], skip_special_tokens=False) for on, run in runs if on
    ]


# --- files ---------------------------------------------------------------------------------------


def test_sources(tmp_path) -> None:
    assert Source.parse("a/b.jsonl") == Source(Path("a/b.jsonl"), 1.0)
    assert Source.parse("a.jsonl:0.5") == Source(Path("a.jsonl"), 0.5)
    assert Source.parse("C:/a.jsonl") == Source(Path("C:/a.jsonl"))
    (tmp_path / "a:2").touch()
    assert Source.parse(f"{tmp_path}/a:2").path == tmp_path / "a:2"
    for bad in ("0", "-1", "nan", "inf"):
        with pytest.raises(ValueError, match="weight must be a number above 0"):
            Source.parse(f"a.jsonl:{bad}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', r"a.jsonl:2: the line is not valid JSON"),
        ("[1]", r"a.jsonl:2: the line must be a JSON object"),
        ('{"prompt": "a"}', r'a.jsonl:2: the line must have either "text" or "messages"'),
        ('{"text": 3}', r'a.jsonl:2: "text" must be a text, not int'),
        ('{"messages": []}', r'a.jsonl:2: "messages" must be a list of objects'),
        ('{"messages": [{"role": 3}]}', r"a.jsonl:2: messages\[0\] must have a role"),
    ],
)
def test_a_bad_line_is_named(tmp_path, tokenizer, line, message) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(f'{{"text": "hello llama"}}\n{line}\n')
    with pytest.raises(ValueError, match=message):
        read_samples(file, tokenizer, Settings(32))


def test_a_torn_xz_file_is_named(tmp_path) -> None:
    whole = lzma.compress(b'{"text": "a"}\n' * 1000)
    for content in (whole[:-20], b"no xz"):
        (tmp_path / "a.jsonl.xz").write_bytes(content)
        with pytest.raises(ValueError, match=r"a.jsonl.xz is not a whole xz file"):
            list(read_jsonl(tmp_path / "a.jsonl.xz"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.xz"])
def test_reading_tells_how_much_of_the_file_is_taken(tmp_path, name) -> None:
    rng = random.Random(0)
    items = [{"text": str(rng.random())} for _ in range(20_000)]
    file, taken, half = write_jsonl(tmp_path / name, items), [], 0
    for number, _ in enumerate(read_lines(file, taken.append), start=1):
        if number == len(items) // 2:
            half = sum(taken)
    size = file.stat().st_size
    assert sum(taken) == size
    assert 0.3 * size < half < 0.7 * size


def test_xz_and_plain_are_the_same(tmp_path, tokenizer) -> None:
    items = texts(5) + conversations(5)
    a = read_samples(write_jsonl(tmp_path / "a.jsonl", items), tokenizer, Settings(64))
    b = read_samples(write_jsonl(tmp_path / "a.jsonl.xz", items), tokenizer, Settings(64))
    assert torch.equal(a.tokens_T, b.tokens_T)
    assert torch.equal(a.targets_T, b.targets_T)


# --- what counts ---------------------------------------------------------------------------------


def test_text_has_bos_and_eos_and_counts_whole(tmp_path, tokenizer) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "hello llama"}])
    samples = read_samples(file, tokenizer, Settings(32))
    ids = samples.tokens_T.tolist()
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert tokenizer.decode(ids) == "hello llama"
    assert samples.targets_T.tolist() == [False] + [True] * (len(ids) - 1)


@pytest.mark.parametrize("template", [None, GENERATION])
def test_only_the_assistant_counts(inputs, tmp_path, tokenizer, template) -> None:
    used = tokenizer if template is None else with_template(inputs, tmp_path, template)
    assert targets_of(used, CHAT) == ["the hill.<|eos|>", "one red ball<|eos|>"]
    # The tokens are those that serving sees, whatever counts of them.
    ids, _, _ = used.chat_tokens_and_targets(CHAT)
    assert ids == used.chat_tokens(CHAT, add_generation_prompt=False)
    prompt = used.chat_tokens(CHAT[:3])
    assert ids[: len(prompt)] == prompt


@pytest.mark.parametrize("template", [None, GENERATION])
@given(
    contents=st.lists(
        st.lists(st.sampled_from([*"ab <|>\nü🦙", "<|eos|>", "<|user|>"])).map("".join),
        min_size=2,
        max_size=4,
    )
)
def test_text_that_looks_like_a_control_token_ends_nothing(
    inputs, tmp_path_factory, tokenizer, template, contents
) -> None:
    used = tokenizer
    if template is not None:
        used = with_template(inputs, tmp_path_factory.mktemp("t"), template)
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]
    wanted = [f"{m['content']}<|eos|>" for m in messages if m["role"] == "assistant"]
    assert targets_of(used, messages) == wanted


def test_a_template_that_rewrites_history(inputs, tmp_path) -> None:
    """The end of a turn is then its stop token; what the last turn has besides counts, too."""
    used = with_template(inputs, tmp_path, REWRITING)
    assert targets_of(used, CHAT) == ["the hill.<|eos|>", "Hm. one red ball<|eos|>"]
    assert used.chat_tokens_and_targets(CHAT)[2] == 0


def test_turns_that_serving_would_show_otherwise_do_not_count(inputs, tmp_path, tokenizer) -> None:
    template = "{{ messages | length }}" + GENERATION.replace("{% generation %}", "").replace(
        "{% endgeneration %}", ""
    )
    used = with_template(inputs, tmp_path, template)
    _, mask, unlike = used.chat_tokens_and_targets(CHAT)
    assert (any(mask), unlike) == (False, 2)
    file = write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}])
    with pytest.raises(ValueError, match="gives no target tokens: its 1 samples have 2 assistant"):
        read_samples(file, used, Settings(64))


def test_a_template_that_closes_the_text(inputs, tmp_path) -> None:
    """What follows a turn inside the conversation begins like what closes it (`<|`)."""
    template = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    template += "{% if add_generation_prompt %}<|assistant|>{% else %}<|bos|>{% endif %}"
    used = with_template(inputs, tmp_path, template)
    assert targets_of(used, CHAT) == ["the hill.", "one red ball<|bos|>"]


def test_stop_ids_end_a_turn(inputs, tmp_path) -> None:
    template = GENERATION.replace("{{ eos_token }}", "<|user|> done")
    template = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    used = with_template(inputs, tmp_path, template)
    assert targets_of(used, CHAT[:2]) == ["the hill.<|user|> done\n"]
    stop = used.chat_tokens(CHAT[:1])[0]
    assert used.decode([stop], skip_special_tokens=False) == "<|user|>"
    assert targets_of(used, CHAT[:2], stop_ids=[stop]) == ["the hill.<|user|>"]


# --- lengths -------------------------------------------------------------------------------------


@given(length=st.integers(2, 9))
def test_pieces_predict_every_token_once(tmp_path_factory, tokenizer, length) -> None:
    path = tmp_path_factory.mktemp("p")
    text = "the little llama ran up a hill"
    ids = [*tokenizer.encode(text), tokenizer.eos_token_id]
    file = write_jsonl(path / "a.jsonl", [{"text": text}])
    samples = read_samples(file, tokenizer, Settings(length))
    predicted = []
    for i in range(len(samples)):
        a, b = samples.starts_N1[i], samples.starts_N1[i + 1]
        assert b - a <= length
        piece, mask = samples.tokens_T[a:b], samples.targets_T[a:b]
        assert not mask[0]
        predicted += piece[mask].tolist()
    assert predicted == ids[1:]
    assert samples.num_targets_N().sum() == len(ids) - 1


def test_dropped_samples_are_counted(tmp_path, tokenizer) -> None:
    items = [{"text": "hill"}, {"text": "the little llama ran up a hill " * 5}, {"text": ""}]
    file = write_jsonl(tmp_path / "a.jsonl", items)
    dropped = read_samples(file, tokenizer, Settings(16, overlong="drop"))
    split = read_samples(file, tokenizer, Settings(16))
    assert dropped.counts == {"items": 3, "dropped": 1, "split": 0, "unlike": 0}
    assert split.counts == {"items": 3, "dropped": 0, "split": 1, "unlike": 0}
    file = write_jsonl(tmp_path / "b.jsonl", items[1:2])
    with pytest.raises(ValueError, match="or only such above 4 tokens"):
        read_samples(file, tokenizer, Settings(4, overlong="drop"))
    with pytest.raises(ValueError, match="holds no samples"):
        read_samples(write_jsonl(tmp_path / "c.jsonl", []), tokenizer, Settings(4))


def test_every_token_of_a_conversation_counts_if_asked(tmp_path, tokenizer) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", conversations(20))
    every = read_samples(file, tokenizer, Settings(16, assistant_only=False))
    some = read_samples(file, tokenizer, Settings(16))
    whole = read_samples(file, tokenizer, Settings(10_000))
    # Each piece begins with the token that the one before ends with.
    assert every.num_targets_N().tolist() == [n - 1 for n in every.lengths_N().tolist()]
    assert every.num_targets_N().sum() == whole.lengths_N().sum() - len(whole)
    assert 0 < some.num_targets_N().sum() == whole.num_targets_N().sum()
    # A conversation in which nobody answers teaches only then.
    file = write_jsonl(tmp_path / "b.jsonl", [{"messages": [{"role": "user", "content": "a b"}]}])
    assert len(read_samples(file, tokenizer, Settings(16, assistant_only=False))) == 1
    with pytest.raises(ValueError, match="gives no target tokens"):
        read_samples(file, tokenizer, Settings(16))


# --- held out ------------------------------------------------------------------------------------


def test_holding_out_goes_by_content() -> None:
    items = [{"text": f"story {i}"} for i in range(4000)]
    held = {i for i, item in enumerate(items) if is_held_out(item, 0.1)}
    assert 320 < len(held) < 480
    more = {i for i, item in enumerate(items) if is_held_out({"title": "x", **item}, 0.2)}
    assert held < more  # other fields change nothing, and a larger share only adds
    assert not any(is_held_out(item, 0.0) for item in items)


def test_all_pieces_of_a_sample_are_held_out_together(tmp_path, tokenizer) -> None:
    items = [{"text": f"{i} " + "the hill " * 30} for i in range(40)]
    file = write_jsonl(tmp_path / "a.jsonl", items)
    samples = read_samples(file, tokenizer, Settings(16, holdout=0.3))
    expected = [is_held_out(item, 0.3) for item in items]
    assert 0 < sum(expected) < 40
    starts = samples.starts_N1[:-1]
    is_first = samples.tokens_T[starts] == tokenizer.bos_token_id
    sample_of_piece = is_first.cumsum(0) - 1
    assert samples.held_out_N.tolist() == [expected[i] for i in sample_of_piece]


# --- kept on disk, batches -----------------------------------------------------------------------


def test_samples_are_kept_whole_or_not_at_all(tmp_path, tokenizer) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", texts(5))
    samples = read_samples(file, tokenizer, Settings(32, holdout=0.5))
    kept = tmp_path / "kept" / "a.safetensors"
    save_samples(samples, kept)
    loaded = load_samples(kept)
    assert loaded is not None
    for name in ("tokens_T", "targets_T", "starts_N1", "held_out_N"):
        assert torch.equal(getattr(loaded, name), getattr(samples, name))
    assert loaded.counts == samples.counts
    assert [f.name for f in kept.parent.iterdir()] == ["a.safetensors"]
    kept.write_bytes(kept.read_bytes()[:-5])
    assert load_samples(kept) is None
    assert load_samples(tmp_path / "absent") is None


def test_fingerprint_follows_all_that_decides_the_samples(inputs, tmp_path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", texts(5))
    tok = tmp_path / "tok"
    tok.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tok / name).write_bytes((inputs / "tok" / name).read_bytes())

    def digest(settings: Settings = Settings(32)) -> str:  # noqa: B008
        (found,) = fingerprint([Source(file)], tok, settings)
        return found

    seen = {digest(), digest(Settings(33)), digest(Settings(32, holdout=0.1))}
    (tok / "chat_template.jinja").write_text(GENERATION)
    seen.add(digest())
    write_jsonl(file, texts(6))
    seen.add(digest())
    assert len(seen) == 5
    assert digest() == digest()


def test_a_batch_restarts_positions_and_never_crosses_samples() -> None:
    config = DecoderConfig.from_hf({**HF, "vocab_size": 97})
    tokens = [torch.tensor([5, 6, 7]), torch.tensor([8, 9]), torch.tensor([1, 2, 3])]
    on = [torch.ones(3, dtype=torch.bool), torch.ones(2, dtype=torch.bool)]
    batch = make_batch(tokens, [*on, torch.tensor([True, False, True])], config, 64)
    assert batch.positions_T.tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    assert batch.cu_seqlens_S1.tolist() == [0, 3, 5, 8, 8]
    assert batch.rows_R.tolist() == [0, 1, 3, 6]
    assert batch.targets_R.tolist() == [6, 7, 9, 3]


def test_a_corpus_numbers_the_samples_of_all_files(tmp_path, tokenizer) -> None:
    files = [
        read_samples(
            write_jsonl(tmp_path / f"{seed}.jsonl", texts(6, seed)),
            tokenizer,
            Settings(256, "split", 0.4),
        )
        for seed in (0, 1)
    ]
    corpus = Corpus.of(files)
    assert corpus.firsts.tolist() == [0, 6, 12]
    for file, samples in enumerate(files):
        for i in range(6):
            ids, mask = corpus.sample(6 * file + i)
            span = slice(int(samples.starts_N1[i]), int(samples.starts_N1[i + 1]))
            assert torch.equal(ids, samples.tokens_T[span])
            assert torch.equal(mask, samples.targets_T[span])
        both = [*corpus.ids(file, True), *corpus.ids(file, False)]
        assert sorted(both) == list(range(6 * file, 6 * file + 6))
    assert json.dumps(corpus.num_targets_N.tolist()) == json.dumps((corpus.lengths_N - 1).tolist())
