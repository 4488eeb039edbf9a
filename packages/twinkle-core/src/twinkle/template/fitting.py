"""Converts a conversation to the forms that its chat template wants, and refuses what the template would silently drop.

`habits` detects these forms; the messages' information stays the same.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from twinkle.protocol.errors import InvalidRequest
from twinkle.template.conversation import Conversation
from twinkle.template.habits import Beside, CallShape, ContentForm, Habits
from twinkle.template.strict_json import decoded


def fitted(conversation: Conversation, habits: Habits) -> Conversation:
    """The conversation with calls and content in forms that the template renders properly.

    Forms that it renders are kept, such as arguments as text if it takes both.

    Raises:
        InvalidRequest: if a call's arguments are not a JSON object.
    """
    with_tools = conversation.tools is not None
    messages = tuple(
        _fitted_message(message, f"messages[{index}]", habits, with_tools)
        for index, message in enumerate(conversation.messages)
    )
    return replace(conversation, messages=messages)


def _fitted_message(message: dict[str, Any], where: str, habits: Habits, with_tools: bool) -> dict[str, Any]:
    content = cast("str | list[dict[str, str]] | None", message.get("content"))
    if content is not None and content != "":
        form = habits.content_form(message["role"], with_tools)
        message = {**message, "content": _fitted_content(content, form)}
    return _with_fitted_calls(message, where, habits, with_tools) if message.get("tool_calls") else message


def _fitted_content(content: str | list[dict[str, str]], form: ContentForm) -> str | list[dict[str, str]]:
    if isinstance(content, str):
        return content if form in ("text", "either") else [{"type": "text", "text": content}]
    if form in ("parts", "either"):
        return content
    # Joined as templates that take parts write them: one after the other.
    text = "".join(part["text"] for part in content)
    return text if form == "text" else [{"type": "text", "text": text}]


def _with_fitted_calls(
    message: dict[str, Any], where: str, habits: Habits, with_tools: bool
) -> dict[str, Any]:
    calls = [
        _checked_call(call, f"{where}.tool_calls[{index}]")
        for index, call in enumerate(cast("list[dict[str, Any]]", message["tool_calls"]))
    ]
    beside = _beside(message)
    wanted = habits.call_form(_form_of(calls[0], beside), with_tools)
    if wanted is None:
        return {**message, "tool_calls": calls}
    message = {**message, "tool_calls": [_reformed_call(call, wanted) for call in calls]}
    if wanted.beside != beside:
        message.pop("content", None)
        message |= {"empty": {"content": ""}, "null": {"content": None}}.get(wanted.beside, {})
    return message


def _beside(message: Mapping[str, Any]) -> Beside:
    content = message.get("content")
    if content is None:
        return "null" if "content" in message else "absent"
    return "text" if content else "empty"


def _form_of(call: dict[str, Any], beside: Beside) -> CallShape:
    nested = isinstance(call.get("function"), dict)
    function = call["function"] if nested else call
    return CallShape(isinstance(function["arguments"], str), nested, beside)


def _checked_call(call: dict[str, Any], where: str) -> dict[str, Any]:
    """The call with arguments as an object or as JSON text of one; missing arguments become an empty object."""
    if isinstance(call.get("function"), dict):
        return {**call, "function": _checked_call(call["function"], f"{where}.function")}
    arguments = call.get("arguments")
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        return {**call, "arguments": {}}
    if not isinstance(decoded(arguments) if isinstance(arguments, str) else arguments, dict):
        raise InvalidRequest(
            f"{where}.arguments: expected an object of arguments by name, or the same as JSON text, got "
            f"{arguments!r:.80}"
        )
    return call


def _reformed_call(call: dict[str, Any], wanted: CallShape) -> dict[str, Any]:
    function: dict[str, Any] = call["function"] if isinstance(call.get("function"), dict) else call
    arguments = function["arguments"]
    if isinstance(arguments, str) and not wanted.as_text:
        arguments = decoded(arguments)
    elif wanted.as_text and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    if wanted.nested == (function is not call):
        return (
            {**call, "function": {**function, "arguments": arguments}}
            if wanted.nested
            else {**call, "arguments": arguments}
        )
    others = {key: value for key, value in call.items() if key not in ("function", "name", "arguments")}
    own = {"name": function["name"], "arguments": arguments}
    return {"type": "function", **others, **({"function": own} if wanted.nested else own)}
