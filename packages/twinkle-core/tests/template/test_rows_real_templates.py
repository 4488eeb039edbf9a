"""The same row in several forms under the chat templates of many real models: the same text, or a refusal.

What is expected is the template's own text for the row in the form that it was written for.
"""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from twinkle.protocol.errors import InvalidRequest
from twinkle.template.conversation import Conversation, read_conversation
from twinkle.template.fitting import fitted
from twinkle.template.habits import Habits
from twinkle.template.rendering import ChatTemplate, RenderingFailed
from twinkle.template.shown import ShownMessages

pytestmark = pytest.mark.network

_SUPPORT = Path(__file__).parents[4] / "tests" / "support" / "chat_templates.py"

VARIABLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "the weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "where"}},
            "required": ["city"],
        },
    },
}
ARGUMENTS = {"city": "Zürich 'x' \"y\""}


class Asked:
    """One model's template, as `Template` asks it."""

    def __init__(self, name: str, source: str) -> None:
        self.chat = ChatTemplate({"default": source}, VARIABLES, name)
        self._habits = Habits(self.chat)
        self._shown = ShownMessages(self.chat)

    def text(self, messages: list[dict[str, Any]], tools: Any = None) -> str | None:
        """None if it is refused."""
        try:
            conversation = fitted(read_conversation({"messages": messages, "tools": tools}), self._habits)
            self._shown.check(conversation)
            return self.chat.render(conversation)
        except InvalidRequest:
            return None

    def own_text(self, messages: list[dict[str, Any]], tools: Any = None) -> str | None:
        """What the template itself makes of the messages as they are."""
        try:
            return self.chat.render(Conversation(tuple(messages), tools))
        except RenderingFailed:
            return None


@pytest.fixture(scope="module")
def templates() -> dict[str, Asked]:
    if not _SUPPORT.is_file():
        pytest.skip(f"{_SUPPORT.name} is not there")
    spec = importlib.util.spec_from_file_location(_SUPPORT.stem, _SUPPORT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {name: Asked(name, source) for name, source in module.sources().items()}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **rest: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **rest}


def calls(nested: bool, as_text: bool) -> list[dict[str, Any]]:
    arguments: Any = json.dumps(ARGUMENTS, ensure_ascii=False) if as_text else ARGUMENTS
    function = {"name": "get_weather", "arguments": arguments}
    start = {"type": "function", "id": "call00001"}
    return [{**start, "function": function} if nested else {**start, **function}]


def with_call(tool_calls: list[dict[str, Any]], content: dict[str, Any]) -> list[dict[str, Any]]:
    result = {"role": "tool", "content": "sunny", "tool_call_id": "call00001", "name": "get_weather"}
    said = {"role": "assistant", **content, "tool_calls": tool_calls}
    return [user("Weather?"), said, result, assistant("It is sunny.")]


def forms() -> Iterator[list[dict[str, Any]]]:
    for nested in (True, False):
        for as_text in (False, True):
            for content in ({"content": ""}, {}, {"content": None}):
                yield with_call(calls(nested, as_text), content)


def is_right(text: str) -> bool:
    """Whether a call stands in a text once, neither as Python has it nor encoded twice."""
    return text.count("Zürich") == 1 and '\\"city' not in text and "'city':" not in text


def test_a_call_in_any_form_is_the_same_text_or_refused(templates: dict[str, Asked]) -> None:
    known = 0
    for name, asked in templates.items():
        texts = {asked.text(messages, [TOOL]) for messages in forms()}
        assert len({"".join((text or "").split()) for text in texts}) == 1, name
        own = [text for messages in forms() if (text := asked.own_text(messages, [TOOL])) and is_right(text)]
        for text in texts - {None}:
            assert text is not None and is_right(text), name
            known += 1
            # DeepSeek's text is whatever JSON text it was given; white space is all that may differ.
            assert "".join(text.split()) in {"".join(one.split()) for one in own}, name
    assert known > 20


def test_parts_of_text_are_the_text(templates: dict[str, Asked]) -> None:
    def row(as_parts: bool) -> list[dict[str, Any]]:
        def content(*texts: str) -> Any:
            return [{"type": "text", "text": text} for text in texts] if as_parts else "".join(texts)

        return [user(content("Who ", "are you?")), assistant(content("My ", "Model."))]

    compared = 0
    for name, asked in templates.items():
        text, parts = asked.text(row(as_parts=False)), asked.text(row(as_parts=True))
        assert text is not None and "Who are you?" in text and "My Model." in text, name
        assert "".join((parts or "").split()) == "".join(text.split()), name
        own = asked.own_text(row(as_parts=False))
        if own is not None and "Who are you?" in own:
            assert own == text, name
            compared += 1
    assert compared > 20


def test_no_tools_in_a_list_are_no_tools(templates: dict[str, Asked]) -> None:
    row = [user("Who are you?"), assistant("My Model.")]
    for name, asked in templates.items():
        assert asked.text(row, []) == asked.text(row, None), name


@pytest.mark.parametrize("role", ["developer", "User", "critic"])
def test_a_role_is_shown_or_refused(templates: dict[str, Asked], role: str) -> None:
    texts = {
        name: asked.text([user("q"), {"role": role, "content": "zebra crossing"}, assistant("a")])
        for name, asked in templates.items()
    }
    shown = [name for name, text in texts.items() if text is not None and "zebra crossing" in text]
    refused = [name for name, text in texts.items() if text is None]
    assert sorted(shown + refused) == sorted(texts)
    assert shown and refused


def test_what_templates_show_of_usual_conversations_is_let_through(templates: dict[str, Asked]) -> None:
    system = {"role": "system", "content": "Be brief."}
    turns = [user("q one"), assistant("a one"), user("q two"), assistant("a two")]
    thoughts = [{"reasoning_content": text, "thinking": text} for text in ("r", "s")]
    reasoned = [user("q"), assistant("a", **thoughts[0]), user("p"), assistant("b", **thoughts[1])]
    compared = 0
    for name, asked in templates.items():
        for row in (
            turns,
            [system, *turns],
            [system, *turns, user("q")],
            reasoned,
            turns[1:],
            [user("q"), assistant("")],
        ):
            own = asked.own_text(row)
            if own is not None and all(m["content"] in own for m in row if m is not system):
                assert asked.text(row) == own, name
                compared += 1
    assert compared > 3 * len(templates)
