"""Chat templates: where they lie, and jinja2's sandbox with what templates expect in it."""

import datetime
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.runtime
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minigen.weights.errors import CheckpointError

DEFAULT = "default"
# Chosen by itself when tools are given, as transformers does.
TOOL_USE = "tool_use"
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_PRIVATE_USE = range(0xF0000, 0xFFFFE)
_DIRECTORIES = ("additional_chat_templates", "chat_templates")


# The template variable with the two characters that `{% generation %}` is to put around its text.
_MARKS = "generation_marks"


class GenerationBlock(Extension):
    """`{% generation %}` marks what an assistant writes, if asked to; else it only renders."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as an instance's

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_render", [nodes.ContextReference()])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _render(self, context: jinja2.runtime.Context, caller: Callable[[], str]) -> str:
        before, after = context.get(_MARKS) or ("", "")
        return f"{before}{caller()}{after}"


class ChatTemplates:
    """The named chat templates of one checkpoint, compiled when they are first used."""

    def __init__(self, sources: Mapping[str, str], variables: Mapping[str, Any], where: Path):
        self.sources = dict(sources)
        self._variables = dict(variables)
        self._where = where
        self._compiled: dict[str, jinja2.Template] = {}
        self._environment = _environment()

    @classmethod
    def from_dir(
        cls, path: Path, tokenizer_config: Mapping[str, Any], variables: Mapping[str, Any]
    ) -> "ChatTemplates":
        """Templates of `tokenizer_config`, then of `chat_template.jinja`, then of the directories.

        A later one replaces an earlier one of its name; an empty one is none. `variables` are the
        special tokens by their names (`bos_token`, …), which a template may use.
        """
        sources: dict[str, str] = {}
        given = tokenizer_config.get("chat_template")
        if isinstance(given, str):
            given = [{"name": DEFAULT, "template": given}]
        if isinstance(given, list):
            try:
                sources.update({e["name"]: e["template"] for e in given if e["template"].strip()})
            except (TypeError, KeyError, AttributeError):
                raise CheckpointError(
                    f"chat_template in {path / 'tokenizer_config.json'} is neither a string nor a "
                    "list of objects with a name and a template"
                ) from None
        files = {DEFAULT: path / "chat_template.jinja"}
        for directory in _DIRECTORIES:
            files.update({file.stem: file for file in sorted((path / directory).glob("*.jinja"))})
        for name, file in files.items():
            if file.exists():
                try:
                    source = file.read_text(encoding="utf-8")
                except (OSError, UnicodeError) as error:
                    raise CheckpointError(f"{file} cannot be read as text: {error}") from None
                if source.strip():
                    sources[name] = source
        return cls(sources, variables, path)

    def select(self, name: str | None = None, with_tools: bool = False) -> str:
        """The name of the template to use; ValueError if there is none of that name."""
        if not self.sources:
            raise ValueError(f"{self._where} has no chat template")
        if name is None:
            name = TOOL_USE if with_tools and TOOL_USE in self.sources else DEFAULT
            if name not in self.sources and len(self.sources) == 1:
                name = next(iter(self.sources))
        if name not in self.sources:
            known = ", ".join(sorted(self.sources))
            raise ValueError(f"{self._where} has no chat template {name!r}: it has {known}")
        return name

    def marks_generation(self, name: str) -> bool:
        """Whether the template says itself, with `{% generation %}`, what the assistant wrote."""
        return bool(_GENERATION.search(self.sources[name]))

    def generation_spans(
        self, name: str, text: str, messages: Sequence[Mapping[str, Any]], **variables: Any
    ) -> list[tuple[int, int]]:
        """[begin, end) of what `{% generation %}` blocks wrote into `text`: `messages`, rendered.

        Raises ValueError if the template renders otherwise when the blocks are marked.
        """
        free = (chr(code) for code in _PRIVATE_USE if chr(code) not in text)
        marks = next(free), next(free)
        marked = self.render(name, messages, **variables, **{_MARKS: marks})
        spans, begin, length, pieces = [], 0, 0, []
        for piece in re.split(f"([{''.join(marks)}])", marked):
            if piece == marks[0]:
                begin = length
            elif piece == marks[1]:
                spans.append((begin, length))
            else:
                pieces.append(piece)
                length += len(piece)
        if "".join(pieces) != text:
            raise ValueError(
                f"the chat template {name!r} of {self._where} reads its own generation blocks, so "
                "it cannot be told what the assistant wrote"
            )
        return spans

    def _compile(self, name: str) -> jinja2.Template:
        template = self._environment.from_string(self.sources[name])
        # jinja2 chains two dicts and goes over both, slowly, at each rendering.
        template.globals = dict(template.globals)
        return template

    def render(self, name: str, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The conversation as one text; ValueError with the template's own reason if it fails."""
        try:
            if name not in self._compiled:
                self._compiled[name] = self._compile(name)
            return self._compiled[name].render(
                messages=messages, **{**self._variables, **variables}
            )
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(
                f"the chat template {name!r} of {self._where} is no valid jinja2 (line "
                f"{error.lineno}): {error.message}"
            ) from None
        except Exception as error:  # a template is a program, it can fail in every way
            raise ValueError(
                f"the chat template {name!r} of {self._where} refuses this conversation: {error}"
            ) from error


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes <, >, & and ' for HTML, which a model was never trained on.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)
