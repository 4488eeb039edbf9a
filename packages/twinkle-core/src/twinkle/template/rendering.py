"""Renders a conversation with a Jinja chat template, as Transformers does.

Chat templates come from model repositories, so they run in Jinja's sandbox and see only plain JSON data. `labels`
decides which text is trained on; this module reports `{% generation %}` blocks, with which some templates mark the
assistant's words.
"""

import json
import re
from collections.abc import Mapping
from datetime import datetime
from types import MappingProxyType
from typing import Any, Final, NamedTuple, cast

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from twinkle.protocol.errors import InvalidRequest
from twinkle.template.conversation import Conversation
from twinkle.template.tracing import Stretch, Trace, constant_prompt, instrument, writes_directly

# Two private-use code points that enclose the text of a `{% generation %}` block.
_OPEN: Final = "\U0010fff0"
_CLOSE: Final = "\U0010fff1"

# The first of the private-use code points that mark which message text is written for.
_FIRST_MARK: Final = 0xF0000

_GENERATION_TAG: Final = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Span(NamedTuple):
    """A stretch of text: from character `start` up to, not including, `end`."""

    start: int
    end: int


class Traced(NamedTuple):
    """A rendered conversation and its stretches."""

    text: str
    stretches: list[Stretch]


class _Tracing(NamedTuple):
    """A template that writes marks.

    Attributes:
        is_direct: whether none of them is ever in a variable of the template.
        prompt: the generation prompt, if it is the same for all conversations.
    """

    template: jinja2.Template
    is_direct: bool
    prompt: str | None


class RenderingFailed(InvalidRequest):
    """A chat template fails on, or refuses, a conversation."""


class ChatTemplate:
    """A model's chat templates, compiled.

    Args:
        sources: Jinja source by name; "tool_use", if present, is for conversations with tools, "default" for all
            others.
        variables: further variables for the templates, such as `bos_token` or `enable_thinking`.
        owner: the model's name, for error messages.
    """

    def __init__(self, sources: Mapping[str, str], variables: Mapping[str, Any], owner: str) -> None:
        if "default" not in sources:
            raise InvalidRequest(
                f"{owner} has no chat template named 'default' (it has: {', '.join(sources) or 'none'}); pass one as "
                "chat_template=..., or take the model's instruct version"
            )
        self.sources = dict(sources)
        self.variables = dict(variables)
        self._owner = owner
        self._templates = {name: self._compile(source, _Generation) for name, source in sources.items()}
        self._marking = {
            name: self._compile(source, _MarkedGeneration)
            for name, source in sources.items()
            if _GENERATION_TAG.search(source)
        }
        self._tracing: dict[str, _Tracing] = {}  # compiled on first use

    def __reduce__(self) -> tuple[Any, ...]:
        # Compiled templates can't be pickled; the receiving process compiles them again.
        return type(self), (self.sources, self.variables, self._owner)

    @property
    def owner(self) -> str:
        return self._owner

    def render(self, conversation: Conversation, add_generation_prompt: bool = False) -> str:
        """The conversation as text, optionally ending with the opening of an assistant turn.

        Raises:
            RenderingFailed: if the template refuses, or fails on, the conversation.
        """
        return self._run(self._templates[self._name_for(conversation)], conversation, add_generation_prompt)

    def generation_spans(
        self, conversation: Conversation, add_generation_prompt: bool = False
    ) -> tuple[str, list[Span]] | None:
        """The output of `render`, and the spans of its `{% generation %}` blocks; None if these are unknown.

        They are unknown if the template has none, or if the marks put around a block's text change the output.
        """
        marking = self._marking.get(self._name_for(conversation))
        if marking is None:
            return None
        pieces = re.split(f"([{_OPEN}{_CLOSE}])", self._run(marking, conversation, add_generation_prompt))
        spans: list[Span] = []
        position = start = 0
        for piece in pieces:
            if piece == _OPEN:
                start = position
            elif piece == _CLOSE:
                spans.append(Span(start, position))
            else:
                position += len(piece)
        unmarked = "".join(piece for piece in pieces if piece not in (_OPEN, _CLOSE))
        is_text = unmarked == self.render(conversation, add_generation_prompt)
        return (unmarked, spans) if is_text else None

    def trace(self, conversation: Conversation, add_generation_prompt: bool = False) -> Traced | None:
        """The output of `render`, and which message each stretch of it was written for; None if that is unknown.

        It is unknown if the marks put into the text change the output.

        Raises:
            RenderingFailed: like `render`.
        """
        tracing = self._tracing_of(conversation)
        if tracing.is_direct:
            # What the template writes can't depend on the marks: one rendering is enough.
            trace = Trace(conversation.messages, chr(_FIRST_MARK))
            marked = self._run_traced(tracing.template, conversation, add_generation_prompt, trace)
            if marked is not None and trace.has_all_marks_of(marked):
                return Traced(*trace.read(marked))
        text = self.render(conversation, add_generation_prompt)
        mark = next(chr(code) for code in range(_FIRST_MARK, 0xFFFFE) if chr(code) not in text)
        trace = Trace(conversation.messages, mark)
        marked = self._run_traced(tracing.template, conversation, add_generation_prompt, trace)
        if marked is None:
            return None
        unmarked, stretches = trace.read(marked)
        return Traced(text, stretches) if unmarked == text else None

    def constant_prompt(self, conversation: Conversation) -> str | None:
        """The generation prompt, if the template writes the same one behind any conversation of this kind."""
        return self._tracing_of(conversation).prompt

    def _tracing_of(self, conversation: Conversation) -> _Tracing:
        name = self._name_for(conversation)
        if name not in self._tracing:
            environment = _environment(_Generation)
            tree = environment.parse(self.sources[name])
            prompt = constant_prompt(tree)
            instrument(tree)
            self._tracing[name] = _Tracing(environment.from_string(tree), writes_directly(tree), prompt)
        return self._tracing[name]

    def _run_traced(
        self, template: jinja2.Template, conversation: Conversation, add_generation_prompt: bool, trace: Trace
    ) -> str | None:
        """The output with marks; None if the template fails."""
        try:
            return self._run(template, conversation, add_generation_prompt, trace.variables)
        except RenderingFailed:
            return None

    def _name_for(self, conversation: Conversation) -> str:
        return "tool_use" if conversation.tools is not None and "tool_use" in self._templates else "default"

    def _compile(self, source: str, generation: type[jinja2.ext.Extension]) -> jinja2.Template:
        try:
            return _environment(generation).from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise InvalidRequest(f"the chat template of {self._owner} is not valid: {error}") from error

    def _run(
        self,
        template: jinja2.Template,
        conversation: Conversation,
        add_generation_prompt: bool,
        more: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        try:
            return template.render(
                {
                    **self.variables,
                    **more,
                    "messages": list(conversation.messages),
                    "tools": conversation.tools,
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        # The template is a foreign program: anything it raises counts as a refusal.
        except Exception as error:
            hint = ""
            if any(message.get("content") is None for message in conversation.messages):
                hint = " (a message without content is in it; some templates need content='' there)"
            raise RenderingFailed(
                f"messages: the chat template of {self._owner} refused the conversation: {error}{hint}"
            ) from error


def _environment(generation: type[jinja2.ext.Extension]) -> ImmutableSandboxedEnvironment:
    """Jinja, set up as in Transformers (`utils/chat_template_utils.py`)."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    # Jinja's type for `globals` lists only its own entries.
    variables = cast(dict[str, Any], environment.globals)
    variables["raise_exception"] = _raise_exception
    variables["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON; Jinja's own filter escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: the text in between, unchanged."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("wrap"), [], [], body).set_lineno(line)

    def wrap(self, caller: jinja2.runtime.Macro) -> str:
        return caller()


class _MarkedGeneration(_Generation):
    """The same, with a mark at either end."""

    def wrap(self, caller: jinja2.runtime.Macro) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"
