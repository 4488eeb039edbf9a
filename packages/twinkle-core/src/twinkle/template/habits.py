"""Detects which forms of messages a chat template wants, by rendering marker words in each form.

Templates differ in the form of a call (arguments as an object or as JSON text, the name under `function` or not, the
content beside it) and of content (text, or a list of parts). A template seldom refuses a form that it was not written
for: it drops the words, or writes them as Python or JSON literals. Nothing is changed here; `fitting` does that.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from twinkle.template.conversation import Conversation
from twinkle.template.rendering import ChatTemplate, RenderingFailed

Beside: TypeAlias = Literal["text", "empty", "absent", "null"]
"""The content of a message with calls: text, empty text, no such key, or that key with null."""

ContentForm: TypeAlias = Literal["text", "part", "parts", "either"]
"""The form of content: text, a list of one text part, a list of such parts, or either text or a list."""

_NAME: Final = "zqnameqz"
_KEY: Final = "zqkeyqz"
_VALUE: Final = "zqvalueqz"
_WORDS: Final = ("zqoneqz", "zqtwoqz")
_QUESTION: Final = {"role": "user", "content": "zqquestionqz"}
# Not the function that is called, so that its words can't be mistaken for the call's.
_TOOL: Final = {
    "type": "function",
    "function": {
        "name": "zqtoolqz",
        "description": "",
        "parameters": {"type": "object", "properties": {"zqparameterqz": {"type": "string"}}},
    },
}


class CallShape(NamedTuple):
    """A form in which a message holds calls.

    Attributes:
        as_text: whether arguments are JSON text.
        nested: whether name and arguments are nested under `function`.
        beside: the form of the content.
    """

    as_text: bool
    nested: bool
    beside: Beside


class Habits:
    """The forms that one chat template wants; each is detected once."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._calls: dict[tuple[CallShape, bool], str] = {}
        self._wanted_calls: dict[tuple[CallShape, bool], CallShape | None] = {}
        self._contents: dict[tuple[str, bool], ContentForm] = {}

    def call_form(self, given: CallShape, with_tools: bool) -> CallShape | None:
        """The form, preferably `given`, in which the template renders calls; None if it renders none.

        Args:
            with_tools: whether the conversation has tools, for which a model may have a separate template.
        """
        key = given, with_tools
        if key not in self._wanted_calls:
            self._wanted_calls[key] = next(
                (form for form in _by_likeness(given) if self._shows_call(form, with_tools)), None
            )
        return self._wanted_calls[key]

    def content_form(self, role: str, with_tools: bool) -> ContentForm:
        """The form in which the template renders the content of messages of that role."""
        key = role, with_tools
        if key not in self._contents:
            self._contents[key] = self._find_content_form(role, with_tools)
        return self._contents[key]

    def _shows_call(self, form: CallShape, with_tools: bool) -> bool:
        text = self._call_text(form, with_tools)
        if not _is_call(text):
            return False
        if not form.as_text:
            return True
        # Text in place of an object's entries is rendered too, but differently from the object.
        other = self._call_text(form._replace(as_text=False), with_tools)
        return not _is_call(other) or _squashed(other) == _squashed(text)

    def _call_text(self, form: CallShape, with_tools: bool) -> str:
        """A rendered conversation with a call of that form; empty if the template refuses it."""
        key = form, with_tools
        if key not in self._calls:
            self._calls[key] = self._render(with_tools, _QUESTION, _call_message(form))
        return self._calls[key]

    def _find_content_form(self, role: str, with_tools: bool) -> ContentForm:
        first, second = _WORDS
        text = self._render_as(role, first + second, with_tools)
        parts = self._render_as(role, [_part(first), _part(second)], with_tools)
        if first + second in text:
            return "either" if _squashed(parts) == _squashed(text) else "text"
        if first in parts and second in parts and not re.search(rf"text['\"]:\s*['\"]{first}", parts):
            return "parts"
        # If nothing is rendered in any form, the conversation may be the wrong one for that role.
        return "part" if first in parts else "text"

    def _render_as(self, role: str, content: object, with_tools: bool) -> str:
        message = {"role": role, "content": content}
        if role == "user":
            return self._render(with_tools, message)
        question = _QUESTION
        if self.content_form("user", with_tools) in ("parts", "part"):
            question = {"role": "user", "content": [_part(_QUESTION["content"])]}
        if role == "system":
            return self._render(with_tools, message, question)
        if role == "assistant":
            return self._render(with_tools, question, message)
        if role == "tool":
            form = self.call_form(CallShape(False, True, "empty"), with_tools) or CallShape(
                False, True, "empty"
            )
            id_and_name = {"tool_call_id": "zqcall001", "name": _NAME}
            return self._render(with_tools, question, _call_message(form), {**message, **id_and_name})
        return self._render(with_tools, message, question)

    def _render(self, with_tools: bool, *messages: Mapping[str, Any]) -> str:
        conversation = Conversation(
            tuple(dict(message) for message in messages), [_TOOL] if with_tools else None
        )
        try:
            return self._template.render(conversation)
        except RenderingFailed:
            return ""


def _by_likeness(given: CallShape) -> Iterator[CallShape]:
    """All forms that calls can be converted to, the most similar to the given one first."""
    besides: tuple[Beside, ...] = (given.beside,) if given.beside == "text" else ("empty", "absent", "null")
    forms = [
        CallShape(as_text, nested, beside)
        for beside in besides
        for nested in (True, False)
        for as_text in (False, True)
    ]
    # False sorts before True; ties keep the order above.
    yield from sorted(
        forms,
        key=lambda form: (
            (form.beside != given.beside) + (form.nested != given.nested) + (form.as_text != given.as_text),
            form.beside != given.beside,
            form.nested != given.nested,
        ),
    )


def _call_message(form: CallShape) -> dict[str, Any]:
    arguments = {_KEY: _VALUE}
    function = {"name": _NAME, "arguments": json.dumps(arguments) if form.as_text else arguments}
    # Mistral's templates require ids of nine characters.
    start = {"type": "function", "id": "zqcall001"}
    call = {**start, "function": function} if form.nested else {**start, **function}
    content = {
        "text": {"content": _WORDS[0]},
        "empty": {"content": ""},
        "absent": {},
        "null": {"content": None},
    }
    return {"role": "assistant", **content[form.beside], "tool_calls": [call]}


def _is_call(text: str) -> bool:
    """Whether the call is rendered, and neither as a Python literal nor as JSON inside a JSON string."""
    at = text.find(_KEY)
    return at >= 0 and _NAME in text and _VALUE in text[at:] and not text[:at].endswith(('\\"', "{'"))


def _part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _squashed(text: str) -> str:
    return "".join(text.split())
