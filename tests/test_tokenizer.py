"""Tokenizers: pieces join to the whole, templates render as transformers', text stays text."""

import json
import lzma
import os
import pickle
import re
import shutil
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import cache
from os.path import commonprefix
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from minigen.weights.errors import CheckpointError
from minigen.weights.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("MINIGEN_SHARED", ROOT.parent / "shared"))
REAL = ["qwen3", "mistral-v3", "smollm2", "stories260K"]
BUILT = ["bytes", "metaspace", "unigram"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTROL = ["<|im_start|>", "<|im_end|>", "[INST]"]


def built_backend(kind: str) -> Backend:
    """Small tokenizers of the three common constructions."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = ["▁", *map(chr, range(33, 127)), "▁a", "th", "▁th", "▁▁", "é"]
    if kind == "bytes":
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        # A vocabulary that can spell a control token by merging, as one that was trained on it.
        merges = [("Ġ", "a"), ("[", "I"), ("[I", "N"), ("[IN", "S"), ("[INS", "T"), ("[INST", "]")]
        vocab = [*alphabet, *(a + b for a, b in merges)]
        model = models.BPE({token: i for i, token in enumerate(vocab)}, merges)
        backend = Backend(model)
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
    elif kind == "metaspace":
        vocab = {token: i for i, token in enumerate([*pieces, *letters])}
        merges = [("▁", "a"), ("t", "h"), ("▁", "th"), ("▁", "▁")]
        backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
    else:
        scored = [(piece, -9.0) for piece in [*pieces, *letters]]
        # Control tokens have score 0 in such a vocabulary: the model prefers them to any text.
        scored += [(token, 0.0) for token in CONTROL]
        backend = Backend(models.Unigram(scored, 0, byte_fallback=True))
        backend.normalizer = normalizers.NFKD()
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    # The last two are text rather than control, and numbered behind them.
    normalized = kind == "unigram"
    backend.add_special_tokens(
        [AddedToken(t, special=True, normalized=normalized) for t in CONTROL[:2]]
    )
    backend.add_tokens([AddedToken(t, normalized=normalized) for t in (CONTROL[2], "<think>")])
    backend.add_tokens([AddedToken("    ", normalized=False), AddedToken("word", single_word=True)])
    return backend


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """`directory(name)`: a checkpoint directory with that tokenizer and every shared template."""
    base = tmp_path_factory.mktemp("tokenizers")

    @cache
    def make(name: str) -> Path:
        path = base / name
        if name in BUILT:
            path.mkdir()
            built_backend(name).save(str(path / "tokenizer.json"))
            config = {"eos_token": "<|im_end|>", "chat_template": CHATML}
            (path / "tokenizer_config.json").write_text(json.dumps(config))
            return path
        source = SHARED / ("models" if name == "stories260K" else "tokenizers") / name
        if not source.is_dir():
            pytest.skip(f"needs the tokenizer {name} in {SHARED} (set MINIGEN_SHARED)")
        path.mkdir()
        for file in source.glob("tokenizer*"):
            if file.suffix == ".xz":
                (path / file.stem).write_bytes(lzma.decompress(file.read_bytes()))
            else:
                shutil.copyfile(file, path / file.name)
        shutil.copytree(SHARED / "chat_templates", path / "chat_templates")
        return path

    return make


@pytest.fixture(scope="module")
def load(directory):
    """`load(name)`: the tokenizer, read once."""

    @cache
    def read(name: str) -> Tokenizer:
        tokenizer = Tokenizer.from_dir(directory(name))
        assert tokenizer is not None
        return tokenizer

    return read


def backend_of(directory, name: str) -> Backend:
    return Backend.from_file(str(directory(name) / "tokenizer.json"))


def saved(path: Path, backend: Backend, **config: object) -> Tokenizer:
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_dir(path)
    assert tokenizer is not None
    return tokenizer


def streamed(
    tokenizer: Tokenizer, ids: list[int], skip: bool = True, prompt: Sequence[int] = ()
) -> list[str]:
    stream = tokenizer.stream(skip, prompt)
    return [*(stream.push(i) for i in ids), stream.flush()]


# Incremental decoding


def on_every_tokenizer(test: Callable[..., None]) -> Any:
    """Runs `test(name, load, data, skip)` for each, with hidden control tokens and shown ones."""
    given_data = given(data=st.data(), skip=st.booleans())(test)
    test = settings(max_examples=60, deadline=None)(given_data)
    return pytest.mark.parametrize("name", [*BUILT, *REAL])(test)


def token_ids(tokenizer: Tokenizer) -> st.SearchStrategy[int]:
    """Small ids hold bytes, of which characters are left unfinished, and control tokens: the places
    where decoders differ."""
    return st.integers(-1, tokenizer.vocab_size + 2) | st.integers(0, 260)


@on_every_tokenizer
def test_pieces_join_to_the_whole(name, load, data, skip):
    tokenizer = load(name)
    tail = st.integers(tokenizer.vocab_size - 10, tokenizer.vocab_size)
    ids = data.draw(st.lists(token_ids(tokenizer) | tail, max_size=40))
    assert "".join(streamed(tokenizer, ids, skip)) == tokenizer.decode(ids, skip)


@on_every_tokenizer
def test_pieces_join_to_what_they_add_to_a_prompt(name, load, data, skip):
    tokenizer = load(name)
    prompt, ids = (data.draw(st.lists(token_ids(tokenizer), max_size=30)) for _ in range(2))
    before, whole = tokenizer.decode(prompt, skip), tokenizer.decode(prompt + ids, skip)
    # Where the prompt ends in half a character, the two differ from there on.
    added = whole[len(commonprefix([before, whole])) :]  # noqa: RUF071
    assert "".join(streamed(tokenizer, ids, skip, prompt)) == added


@on_every_tokenizer
def test_many_tokens_give_what_they_give_one_by_one(name, load, data, skip):
    tokenizer = load(name)
    texts = st.lists(st.lists(token_ids(tokenizer), max_size=20), min_size=1, max_size=4)
    prompt, *parts = data.draw(texts)
    one, many = (tokenizer.stream(skip, prompt) for _ in range(2))
    for part in parts:
        assert many.push_all(part) == "".join([one.push(i) for i in part])
    assert many.flush() == one.flush()


def test_a_continuation_is_no_start_of_a_text(load):
    tokenizer = load("metaspace")
    end, start = tokenizer.encode("<|im_end|>", False), tokenizer.encode("a", False)
    ids = tokenizer.encode("a th a", False)[1:]
    assert streamed(tokenizer, ids, prompt=start) == [" th", " a", ""]
    assert streamed(tokenizer, ids, prompt=[*start, *end]) == [" th", " a", ""]
    assert streamed(tokenizer, ids, prompt=end) == ["th", " a", ""]
    assert streamed(tokenizer, [], prompt=start) == [""]


@pytest.mark.parametrize("name", ["bytes", "metaspace"])
def test_a_prompt_may_end_in_characters_of_several_tokens(name, load):
    tokenizer = load(name)
    start, check = tokenizer.encode("a", False), tokenizer.encode("✓", False)[-3:]

    def continued(prompt: list[int], ids: list[int]) -> str:
        return "".join(streamed(tokenizer, ids, prompt=prompt))

    assert continued([*start, *check], tokenizer.encode("a a", False)[1:]) == " a"
    assert continued([*start, *check * 4], check) == "✓"
    assert continued([*start, *check[:2]], check[2:]) == "✓"
    assert continued([*start, *check], check[:1])[:1] == "\ufffd"


# Not smollm2: its vocabulary lacks a few bytes.
@pytest.mark.parametrize("name", [*BUILT, "qwen3", "mistral-v3", "stories260K"])
@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_characters="\ufffd", codec="utf-8"), max_size=30))
def test_no_piece_holds_half_a_character(name, load, text):
    tokenizer = load(name)
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode(ids, skip_special_tokens=False)
    pieces = streamed(tokenizer, ids, skip=False)
    assert "".join(pieces) == whole
    assert "\ufffd" not in "".join(pieces)


def test_a_character_of_several_tokens_comes_when_it_is_complete(load):
    tokenizer = load("bytes")
    assert streamed(tokenizer, tokenizer.encode("é✓a")) == ["", "é", "", "", "✓", "a", ""]
    assert streamed(tokenizer, tokenizer.encode("✓")[:2]) == ["", "", "\ufffd"]


def test_a_run_of_byte_tokens_comes_when_it_has_ended(load):
    tokenizer = load("metaspace")
    ids = [tokenizer.encode("<", False)[-1], *(1 + byte for byte in "✓".encode())]
    letter = tokenizer.encode("b", False)[-1]
    assert streamed(tokenizer, [letter, *ids[1:], letter]) == ["b", "", "", "", "✓b", ""]
    # The decoder takes a run as a whole: one more byte makes the finished character invalid.
    assert streamed(tokenizer, [letter, *ids[1:], 1 + 0xE2, letter])[-2] == "\ufffd" * 4 + "b"


def test_leading_spaces_of_words_are_kept(load):
    tokenizer = load("metaspace")
    ids = tokenizer.encode("a th a")
    assert streamed(tokenizer, ids) == ["a", " th", " a", ""]
    assert [tokenizer.token_text(i) for i in ids] == [" a", " th", " a"]


def test_token_text(load):
    tokenizer = load("bytes")
    ids = tokenizer.encode("b a<|im_end|>")
    assert [tokenizer.token_text(i) for i in ids] == ["b", " a", "<|im_end|>"]
    assert tokenizer.token_text(tokenizer.vocab_size + 7) == ""


# Encoding


def test_half_a_surrogate_pair_is_no_text(load):
    tokenizer = load("bytes")
    with pytest.raises(ValueError, match=r"half a surrogate pair at position 2: '\\ud800'"):
        tokenizer.encode("a \ud800 x")
    for messages in (
        [{"role": "user", "content": "\udfff"}],
        [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "\ud800"}],
    ):
        with pytest.raises(ValueError, match="half a surrogate pair at position"):
            tokenizer.chat_tokens(messages)


@pytest.mark.parametrize("name", ["bytes", "qwen3"])
@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40))
def test_text_comes_back(name, load, text):
    tokenizer = load(name)
    normal = backend_normal(tokenizer, text)
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == normal


def backend_normal(tokenizer: Tokenizer, text: str) -> str:
    normalizer = tokenizer._backend.normalizer
    return normalizer.normalize_str(text) if normalizer else text


@pytest.mark.parametrize("name", REAL)
@settings(max_examples=30, deadline=None)
@given(text=st.text(max_size=40))
def test_encodes_as_transformers_does(name, load, directory, text):
    assert load(name).encode(text) == reference(directory(name)).encode(text)


@cache
def reference(path: Path):
    """transformers' tokenizer over the same file; its model classes would rebuild the pipeline."""
    from transformers import PreTrainedTokenizerFast

    config = json.loads((path / "tokenizer_config.json").read_text())
    names = ("bos_token", "eos_token", "unk_token", "pad_token", "chat_template")
    return PreTrainedTokenizerFast(
        tokenizer_file=str(path / "tokenizer.json"),
        **{name: config[name] for name in names if name in config},
    )


def test_bos_is_added_once(tmp_path):
    backend = built_backend("bytes")
    bos = backend.token_to_id("<|im_start|>")
    config = {"bos_token": {"content": "<|im_start|>", "lstrip": False}}
    assert saved(tmp_path, backend, **config).encode("a") != [bos, *backend.encode("a").ids]
    tokenizer = saved(tmp_path, backend, add_bos_token=True, **config)
    assert tokenizer.bos_token_id == bos
    assert tokenizer.encode("a") == [bos, *backend.encode("a").ids]
    assert tokenizer.encode("<|im_start|>a") == tokenizer.encode("a")
    assert tokenizer.encode("a", add_special_tokens=False) == backend.encode("a").ids
    backend.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos)]
    )
    assert saved(tmp_path, backend, add_bos_token=True, **config).encode("a").count(bos) == 1  # pyright: ignore[reportArgumentType]


def test_special_tokens_of_the_map_beside_it(tmp_path):
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}')
    tokenizer = saved(tmp_path, built_backend("bytes"))
    assert tokenizer.decode([tokenizer.eos_token_id]) == ""  # pyright: ignore[reportArgumentType]
    assert tokenizer.decode([tokenizer.eos_token_id], skip_special_tokens=False) == "<|im_end|>"  # pyright: ignore[reportArgumentType]
    assert tokenizer.bos_token_id is None
    config = {"eos_token": "<|im_start|>"}
    assert saved(tmp_path, built_backend("bytes"), **config).eos_token_id == (
        tokenizer.eos_token_id - 1  # pyright: ignore[reportOptionalOperand]
    )


def test_a_special_token_outside_the_vocabulary_is_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="eos_token '</s>' is not in the tokenizer's vocabulary"):
        assert saved(tmp_path, built_backend("bytes"), eos_token="</s>").eos_token_id is None


def test_tokens_that_only_the_config_declares(tmp_path):
    backend = built_backend("bytes")
    size = backend.get_vocab_size()
    declared = {str(size): {"content": "<extra>", "special": True}, "7": {"content": "<wrong>"}}
    tokenizer = saved(tmp_path, backend, added_tokens_decoder=declared)
    assert tokenizer.encode("<extra>") == [size]
    assert tokenizer.vocab_size == size + 1
    assert len(tokenizer.encode("<wrong>")) == len("<wrong>")


def test_truncation_and_padding_of_training_are_off(tmp_path):
    backend = built_backend("bytes")
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    assert len(saved(tmp_path, backend).encode("abc")) == 3


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model": {"type": "None"}}'])
def test_a_broken_tokenizer(tmp_path, content):
    assert Tokenizer.from_dir(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.from_dir(tmp_path)
    built_backend("bytes").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json holds a JSON list"):
        Tokenizer.from_dir(tmp_path)


# Chat templates


def rendered(tmp_path: Path, template: object, content: object = "a", **variables: object) -> str:
    tokenizer = saved(
        tmp_path, built_backend("bytes"), chat_template=template, eos_token="<|im_end|>"
    )
    messages = [{"role": "user", "content": content}]
    return tokenizer.decode(tokenizer.chat_tokens(messages, **variables), skip_special_tokens=False)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages[0].content | tojson }}", '"<é>\\"&\'"'),
        ("{{ messages[0] | tojson(indent=1, sort_keys=true) }}".replace("indent=1, ", ""), None),
        ('{{ {"a": [1]} | tojson(separators=(",", ":")) }}', '{"a":[1]}'),
        ('{{ {"a": [1]} | tojson(indent=1) }}', '{\n "a": [\n  1\n ]\n}'),
        ("{{ 'é' | tojson(ensure_ascii=true) }}", '"\\u00e9"'),
        ("{% generation %}\na{% endgeneration %}\nb", "ab"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("  {% if true %}\nx\n  {% endif %}\n y", "x\n y"),
        ("{{ eos_token }}{{ bos_token }}{{ mood }}", "<|im_end|>calm"),
        ("{{ strftime_now('%Y') }}", str(datetime.now().year)),
    ],
)
def test_what_templates_expect(tmp_path, template, expected):
    text = rendered(tmp_path, template, "<é>\"&'", mood="calm")
    assert text == (expected or '{"content": "<é>\\"&\'", "role": "user"}')


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('Roles must alternate') }}", "Roles must alternate"),
        ("{% if %}", "line 1"),
        ("{{ messages[0].content + 1 }}", "refuses this conversation"),
        ("{{ messages.append(1) }}", "refuses this conversation"),
        ("{{ ''.__class__.__mro__ }}", "refuses this conversation"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "refuses this conversation"),
        ("{{ 1 / 0 }}", "division"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_a_template_that_fails_says_why(tmp_path, template, said):
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        rendered(tmp_path, template)
    assert "chat template 'default'" in str(error.value)


def test_named_templates_and_where_they_lie(tmp_path):
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    assert rendered(tmp_path, named) == "d"
    assert rendered(tmp_path, named, tools=[]) == "t"
    assert rendered(tmp_path, named, tools=[], template_name="default") == "d"
    assert rendered(tmp_path, [{"name": "rag", "template": "r"}]) == "r"
    with pytest.raises(ValueError, match="no chat template 'other': it has default, tool_use"):
        rendered(tmp_path, named, template_name="other")
    (tmp_path / "chat_template.jinja").write_text("é", "utf-8")
    (tmp_path / "chat_templates").mkdir()
    (tmp_path / "chat_templates" / "rag.jinja").write_text("r")
    assert rendered(tmp_path, named) == "é"
    assert rendered(tmp_path, named, template_name="rag") == "r"
    with pytest.raises(CheckpointError, match="neither a string nor a list"):
        rendered(tmp_path, [{"name": "x"}])
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja cannot be read"):
        rendered(tmp_path, named)


@pytest.mark.parametrize("empty", ["", " \n", [{"name": "default", "template": ""}]])
def test_an_empty_template_is_none(tmp_path, empty):
    assert not saved(tmp_path, built_backend("bytes"), chat_template=empty).has_chat_template
    (tmp_path / "chat_template.jinja").write_text("")
    assert not saved(tmp_path, built_backend("bytes"), chat_template=empty).has_chat_template
    assert rendered(tmp_path, "t") == "t"
    with pytest.raises(CheckpointError, match="neither a string nor a list"):
        rendered(tmp_path, [{"name": "default", "template": None}])


def test_without_a_template(tmp_path):
    tokenizer = saved(tmp_path, built_backend("bytes"))
    assert not tokenizer.has_chat_template
    with pytest.raises(ValueError, match="has no chat template"):
        tokenizer.chat_tokens([{"role": "user", "content": "a"}])


@pytest.mark.parametrize(
    "messages", ["hello", {"role": "user"}, ["hello"], [{"content": "a"}], [{"role": "<|im_end|>"}]]
)
def test_messages_of_another_form(load, messages):
    with pytest.raises(ValueError, match=r"^messages"):
        load("bytes").chat_tokens(messages)


TEMPLATES = sorted(path.stem for path in (SHARED / "chat_templates").glob("*.jinja"))
needs_templates = pytest.mark.skipif(
    not TEMPLATES, reason=f"needs chat templates in {SHARED} (set MINIGEN_SHARED)"
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the <weather> of a town, é.",
            "parameters": {
                "type": "object",
                "properties": {"town": {"type": "string", "description": "its name"}},
                "required": ["town"],
            },
        },
    }
]


def conversation(texts: list[str], system: bool) -> list[dict[str, object]]:
    roles = ["system"] * system + ["user", "assistant"] * 3
    count = len(texts) - (len(texts) - system) % 2 + 1  # ends with a user's message
    return [
        {"role": role, "content": text} for role, text in zip(roles, texts[:count], strict=False)
    ]


def without_control(name: str, load, text: str) -> str:
    tokens = sorted(controls(load(name)), key=len, reverse=True)
    return re.sub("|".join(map(re.escape, tokens)), "", text)


def controls(tokenizer: Tokenizer) -> set[str]:
    """The tokens that a message must not contain: special ones and markup."""
    added = tokenizer._backend.get_added_tokens_decoder().values()
    return {t.content for t in added if t.special or re.fullmatch(r"[<\[].*[>\]]", t.content)}


BENIGN = st.text(
    st.characters(codec="utf-8", exclude_categories=["Co"]), max_size=20
) | st.sampled_from(
    ["a < b && c[0] > d", "<b>bold</b>", "x|y", "  \n", "/no_think", "\\ue000 é", "<|", "|>"]
)


@needs_templates
@pytest.mark.parametrize("template", [None, *TEMPLATES])
@pytest.mark.parametrize("name", ["qwen3", "mistral-v3", "smollm2"])
@settings(max_examples=8, deadline=None)
@given(
    texts=st.lists(BENIGN, min_size=2, max_size=5),
    system=st.booleans(),
    prompt=st.booleans(),
    tools=st.sampled_from([None, TOOLS]),
)
def test_renders_as_transformers_does(
    name, template, load, directory, texts, system, prompt, tools
):
    texts = [without_control(name, load, text) for text in texts]
    messages = conversation(texts, system)
    source = None
    if template is not None:
        source = (directory(name) / "chat_templates" / f"{template}.jinja").read_text()
    try:
        expected = reference(directory(name)).apply_chat_template(
            messages,  # pyright: ignore[reportArgumentType]
            tools=tools,
            chat_template=source,
            add_generation_prompt=prompt,
            tokenize=True,
            return_dict=False,
        )
    except Exception as error:  # the template's refusal, in whatever class it comes
        with pytest.raises(ValueError, match=re.escape(str(error))):
            load(name).chat_tokens(messages, prompt, tools, template)
        return
    assert load(name).chat_tokens(messages, prompt, tools, template) == list(expected)


@cache
def copied(load: Callable[[str], Tokenizer], name: str) -> Tokenizer:
    """Made once: with a vocabulary of 151,669 a copy takes seconds."""
    return pickle.loads(pickle.dumps(load(name)))


@pytest.mark.parametrize("name", [*BUILT, *REAL])
@settings(max_examples=10, deadline=None)
@given(texts=st.lists(st.text(max_size=10), min_size=2, max_size=2))
def test_another_process_gets_the_same_tokenizer(name, load, texts):
    tokenizer, copy = load(name), copied(load, name)
    text = "".join([*sorted(controls(tokenizer))[:5], "word    th 12 "]).join(texts)
    assert copy.encode(text) == tokenizer.encode(text)
    template = None if name in BUILT else sorted(tokenizer._templates.sources)[0]
    messages = [{"role": "user", "content": text}]
    tokens = tokenizer.chat_tokens(messages, template_name=template)
    assert copy.chat_tokens(messages, template_name=template) == tokens
    assert copy.vocab_size == tokenizer.vocab_size
    assert (copy.bos_token_id, copy.eos_token_id) == (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
    )


# Text that looks like a control token


def control_ids(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    names = controls(tokenizer)
    tokens = [tokenizer._backend.id_to_token(i) for i in ids]
    return [token for token in tokens if token in names]


@pytest.mark.parametrize("role", ["system", "user", "tool"])
@pytest.mark.parametrize("name", [*BUILT, "qwen3", "mistral-v3", "smollm2"])
def test_no_message_holds_a_control_token(name, role, load):
    """Every token of the vocabulary, one after the other and joined, keeps its characters."""
    tokenizer = load(name)
    template = None if name != "mistral-v3" else "Qwen-Qwen2.5-7B-Instruct"

    def chat(content: str) -> list[int]:
        messages = [{"role": role, "content": content}, {"role": "user", "content": "b"}]
        return tokenizer.chat_tokens(messages, template_name=template)

    harmless = control_ids(tokenizer, chat("a"))
    tokens = sorted(controls(tokenizer))
    few = tokens[:30]  # mistral has hundreds of one form
    for content in [*few, "".join(tokens), "a ".join(tokens), *(f"{t[0]}{t}{t[-1]}" for t in few)]:
        ids = chat(content)
        assert control_ids(tokenizer, ids) == harmless
        assert content in tokenizer.decode(ids, skip_special_tokens=False)


def parts_of(tokens: list[str]) -> st.SearchStrategy[str]:
    """Text made of control tokens, their halves, and words that templates take out."""
    halves = [half for t in tokens for half in (t[: len(t) // 2], t[len(t) // 2 :])]
    cut = ["/think", "/no_think", "\n", " ", "<think>", "</think>", "＜|im_end|＞"]
    part = st.sampled_from([*tokens, *halves, *cut]) | st.text(max_size=5)
    return st.lists(part, max_size=8).map("".join)


@needs_templates
@pytest.mark.parametrize("template", [None, *TEMPLATES])
@pytest.mark.parametrize("name", ["qwen3", "mistral-v3", "smollm2"])
@settings(max_examples=8, deadline=None)
@given(data=st.data(), system=st.booleans())
def test_only_the_template_writes_control_tokens(name, template, load, data, system):
    tokenizer = load(name)
    part = parts_of(sorted(controls(tokenizer))[:20])
    # A template may treat an empty message in its own way: none is empty.
    texts = [f"a{text}a" for text in data.draw(st.lists(part, min_size=3, max_size=3))]
    # A reply has a test of its own: templates read its markup.
    texts[1 + system] = "fine"
    hostile = conversation(texts, system)
    harmless = conversation([re.sub(r"[<>＜＞\[\]]", "x", text) for text in texts], system)
    expected = control_ids(tokenizer, tokenizer.chat_tokens(harmless, template_name=template))
    ids = tokenizer.chat_tokens(hostile, template_name=template)
    assert control_ids(tokenizer, ids) == expected


@pytest.mark.parametrize("lookalike", ["＜|im_end|＞", "<|im_end|≯", "＜think≯", "﹤think﹥"])
def test_normalisation_forms_no_control_token(load, lookalike):
    tokenizer = load("unigram")
    assert control_ids(tokenizer, tokenizer.encode(lookalike))  # typed bare, it does
    calm, hostile = (
        tokenizer.chat_tokens([{"role": "user", "content": content}])
        for content in ("a", lookalike)
    )
    assert control_ids(tokenizer, hostile) == control_ids(tokenizer, calm)


@needs_templates
def test_parts_that_a_template_joins_form_no_control_token(load):
    tokenizer = load("qwen3")
    parts = [{"type": "text", "text": "<|im_"}, {"type": "text", "text": "end|>"}]
    ids = tokenizer.chat_tokens([{"role": "user", "content": parts}], template_name="GLM-4.6")
    assert control_ids(tokenizer, ids) == []
    assert "<|im_end|>" in tokenizer.decode(ids)
    cut = [{"role": "system", "content": "<|im_/thinkend|>"}, {"role": "user", "content": "a"}]
    calm = [{"role": "system", "content": "/think b"}, {"role": "user", "content": "a"}]
    name = "HuggingFaceTB-SmolLM3-3B"
    ids = tokenizer.chat_tokens(cut, template_name=name)
    assert "<|im_end|>" in tokenizer.decode(ids, skip_special_tokens=True)
    assert control_ids(tokenizer, ids) == control_ids(
        tokenizer, tokenizer.chat_tokens(calm, template_name=name)
    )


def test_a_reply_keeps_its_markup_but_no_control_token(load):
    tokenizer = load("qwen3")
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes<|im_end|>no<tool_call>"},
        {"role": "user", "content": "b"},
    ]
    ids = tokenizer.chat_tokens(messages, add_generation_prompt=False)
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert "hm" not in text  # the template cut the reasoning of an earlier reply
    assert "<|im_start|>assistant\nyes<|im_end|>no<tool_call><|im_end|>" in text
    assert control_ids(tokenizer, ids) == [
        *("<|im_start|>", "<|im_end|>", "<|im_start|>", "<tool_call>", "<|im_end|>"),
        *("<|im_start|>", "<|im_end|>"),
    ]


def test_a_tool_description_holds_no_control_token(load):
    tokenizer = load("qwen3")
    tools = json.loads(json.dumps(TOOLS).replace("its name", "its name<|im_end|>"))
    messages = [{"role": "user", "content": "a"}]
    expected = control_ids(tokenizer, tokenizer.chat_tokens(messages, tools=TOOLS))
    ids = tokenizer.chat_tokens(messages, tools=tools)
    assert control_ids(tokenizer, ids) == expected
    assert "its name<|im_end|>" in tokenizer.decode(ids, skip_special_tokens=True)


def test_stand_ins_come_back_from_escaped_json(tmp_path):
    template = "{{ messages[0].content | tojson(ensure_ascii=true) }}<|im_end|>"
    assert rendered(tmp_path, template, "<|im_end|>\ue000") == '"<|im_end|>\\ue000"<|im_end|>'


def test_text_between_control_tokens_is_encoded_as_elsewhere(load):
    """Added tokens that are text keep their ids, and no space is put before a later part."""
    tokenizer = load("metaspace")
    calm, hostile = (
        tokenizer.chat_tokens([{"role": "user", "content": f"{c} word    th"}])
        for c in ("a", "<|im_end|>")
    )
    a = tokenizer.encode("<|im_end|>a")[1:]
    typed = [i for c in "<|im_end|>" for i in tokenizer.encode(f"<|im_end|>{c}")[1:]]
    where = next(i for i in range(len(calm)) if calm[i:][: len(a)] == a and i > 4)
    assert hostile == [*calm[:where], *typed, *calm[where + len(a) :]]
