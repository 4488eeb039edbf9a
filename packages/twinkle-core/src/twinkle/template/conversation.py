"""Converts trajectories from any source to the plain data that chat templates see."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeGuard, cast

import numpy as np

from twinkle.data_format.roles import CALL_ROLES, ROLES, read_calls
from twinkle.protocol.errors import InvalidRequest
from twinkle.template.marks import is_left_out

REASONING_KEYS: Final = ("reasoning_content", "thinking", "reasoning")
"""Keys of a message's reasoning. Templates read the first, gpt-oss's reads the second."""


@dataclass(frozen=True)
class Conversation:
    """Messages and tools as plain JSON data, from `read_conversation`.

    Attributes:
        tools: None if there are none; never an empty list, which some templates write as if there were some.
        left_out: indices of messages marked as not to be trained on.
    """

    messages: tuple[dict[str, Any], ...]
    tools: list[dict[str, Any]] | None = None
    left_out: frozenset[int] = frozenset()

    def first(self, count: int) -> "Conversation":
        return replace(self, messages=self.messages[:count])

    def with_message(self, index: int, message: dict[str, Any]) -> "Conversation":
        return replace(self, messages=(*self.messages[:index], message, *self.messages[index + 1 :]))


def read_conversation(trajectory: Mapping[str, Any]) -> Conversation:
    """A trajectory's messages and tools, copied.

    Keys of a message that hold None are dropped, as in Transformers: columnar files and some APIs use None for missing
    keys, and templates test whether a key exists. For the same reason they are dropped from a tool's schema wherever
    null has no meaning, and from the arguments of a call whose schema has no such parameter. Roles get their usual
    names ("human" becomes "user"), and a turn of the role "tool_call" becomes an assistant's call.

    Raises:
        InvalidRequest: if there are no messages, or a chat template couldn't read something.
    """
    messages = cast(object, trajectory.get("messages"))
    if not _is_list(messages) or len(messages) == 0:
        raise InvalidRequest(
            f"messages: expected a list of messages, got {_describe(messages)}; the columns are "
            f"{', '.join(trajectory) or 'none'}: a preprocessor (dataset.map) makes messages of others"
        )
    tools = _read_tools(cast(object, trajectory.get("tools")))
    read = [_read_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    left_out = frozenset(
        index for index, message in enumerate(read) if is_left_out(message, f"messages[{index}]")
    )
    return Conversation(tuple(_without_unknown_nulls(message, tools) for message in read), tools, left_out)


def _read_tools(tools: object) -> list[dict[str, Any]] | None:
    """The tools' schemas; None if there are none, however that is written."""
    if isinstance(tools, str):  # as in columnar files, where a column has one type
        tools = _parse_json(tools, "tools")
    if tools is None or (
        isinstance(tools, float) and math.isnan(tools)
    ):  # pandas uses NaN for missing values
        return None
    if not (_is_list(tools) and all(isinstance(tool, Mapping) for tool in tools)):
        raise InvalidRequest("tools: expected a list of JSON schemas (objects), or the same as JSON text")
    return cast("list[dict[str, Any]]", _without_nulls(_plain(tools, "tools"))) or None


# These hold a parameter's value, which may be null, and are not part of the schema itself.
_VALUES: Final = frozenset({"default", "const", "example"})


def _without_nulls(schema: object, by_name: bool = False) -> object:
    """A JSON schema without the meaningless nulls with which columnar files fill structs.

    Args:
        by_name: whether the keys are parameter names, not JSON schema keywords.
    """
    if isinstance(schema, dict):
        items = cast("dict[str, object]", schema).items()
        return {
            key: _without_nulls(value, by_name=key == "properties" and not by_name)
            if by_name or key not in _VALUES
            else value
            for key, value in items
            if value is not None or (not by_name and key in _VALUES)
        }
    return [_without_nulls(item) for item in schema] if _is_list(schema) else schema


def _without_unknown_nulls(message: dict[str, Any], tools: list[dict[str, Any]] | None) -> dict[str, Any]:
    """The message without null arguments that are not in the function's schema."""
    if not tools or not message.get("tool_calls"):
        return message
    known = {function.get("name"): _parameters(function) for function in map(_function_of, tools)}

    def cleaned(call: dict[str, Any]) -> dict[str, Any]:
        if isinstance(call.get("function"), dict):
            return {**call, "function": cleaned(call["function"])}
        arguments, parameters = call.get("arguments"), known.get(call.get("name"))
        if not isinstance(arguments, dict) or not parameters:
            return call
        items = cast("dict[str, object]", arguments).items()
        kept = {key: value for key, value in items if value is not None or key in parameters}
        return {**call, "arguments": kept}

    return {**message, "tool_calls": [cleaned(call) for call in message["tool_calls"]]}


def _function_of(tool: dict[str, Any]) -> dict[str, Any]:
    function = tool.get("function")
    return cast("dict[str, Any]", function) if isinstance(function, dict) else tool


def _parameters(function: dict[str, Any]) -> set[str]:
    """The names of a function's parameters; none if the schema leaves them open."""
    parameters: object = function.get("parameters")
    if not isinstance(parameters, dict):
        return set()
    properties = cast("dict[str, object]", parameters).get("properties")
    return set(cast("dict[str, object]", properties)) if isinstance(properties, dict) else set()


def _read_message(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidRequest(f"{where}: expected an object with role and content, got {_describe(message)}")
    plain = cast(dict[str, Any], _plain(cast(object, message), where))
    role = plain.get("role")
    if not isinstance(role, str):
        raise InvalidRequest(f"{where}.role: expected text such as 'user', got {_describe(role)}")
    kept = {key: value for key, value in plain.items() if value is not None}
    if role in CALL_ROLES and "tool_calls" not in kept:
        kept["tool_calls"] = read_calls(kept.pop("content", None), f"{where}.content")
        role = "assistant"
    if (
        "function_call" in kept and "tool_calls" not in kept
    ):  # the OpenAI API's form before it had several calls
        kept["tool_calls"] = read_calls(kept.pop("function_call"), f"{where}.function_call")
    kept["role"] = ROLES.get(role, role)
    if "tool_calls" in kept:
        kept["tool_calls"] = _read_calls(kept["tool_calls"], f"{where}.tool_calls")
    # Drop empty reasoning: gpt-oss's template would write it as a message of its own.
    reasoning = next((kept[key] for key in REASONING_KEYS if kept.get(key)), None)
    if "content" in kept:
        _check_content(kept["content"], f"{where}.content")
    elif reasoning is None and not kept.get("tool_calls"):
        raise InvalidRequest(
            f"{where}.content: missing; give the text (only a message with tool_calls or reasoning goes without)"
        )
    if reasoning is None:
        return kept
    return {"thinking": reasoning, **kept, "reasoning_content": reasoning}


def _read_calls(calls: object, where: str) -> list[dict[str, Any]]:
    """The calls of a message, each with a name, which the OpenAI form keeps under `function`."""
    if isinstance(calls, str):
        calls = _parse_json(calls, where) or []
    if not _is_list(calls):
        raise InvalidRequest(f"{where}: expected a list of calls, got {_describe(calls)}")
    for index, call in enumerate(calls):
        if not isinstance(call, dict) or not isinstance(
            _function_of(cast("dict[str, Any]", call)).get("name"), str
        ):
            raise InvalidRequest(
                f"{where}[{index}]: expected a call, an object with a function's name and arguments: "
                '{"type": "function", "function": {"name": ..., "arguments": {...}}}'
            )
    return [_without_none(cast("dict[str, Any]", call)) for call in calls]


def _without_none(call: dict[str, Any]) -> dict[str, Any]:
    """A call without keys that hold None; its arguments are unchanged."""
    kept = {key: value for key, value in call.items() if value is not None}
    return (
        {**kept, "function": _without_none(kept["function"])}
        if isinstance(kept.get("function"), dict)
        else kept
    )


def _check_content(content: object, where: str) -> None:
    """Accept text or a list of parts; the template decides which parts are valid."""
    if isinstance(content, str):
        return
    if not _is_list(content):
        raise InvalidRequest(f"{where}: expected text, got {_describe(content)}")
    if any(isinstance(part, str) for part in content):
        raise InvalidRequest(
            f'{where}: a list of plain text; join it to one text, or give parts: [{{"type": "text", "text": ...}}]'
        )
    for index, part in enumerate(content):
        kind = cast(Mapping[str, object], part).get("type") if isinstance(part, Mapping) else None
        if not isinstance(part, Mapping) or not isinstance(kind, str):
            raise InvalidRequest(
                f'{where}[{index}]: expected a part with a type, such as {{"type": "text", "text": ...}}, got '
                f"{'an object without type' if isinstance(part, Mapping) else _describe(part)}"
            )
        if kind != "text":
            raise InvalidRequest(
                f"{where}[{index}]: a part of type {kind!r}; only text can be trained on and sampled from: "
                '{"type": "text", "text": ...}'
            )
        text = cast(Mapping[str, object], part).get("text")
        if not isinstance(text, str):
            raise InvalidRequest(f"{where}[{index}].text: expected text, got {_describe(text)}")


def _parse_json(text: str, where: str) -> object:
    """The value of JSON text; None for blank text."""
    try:
        return json.loads(text) if text.strip() else None
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{where}: not JSON ({error})") from error


def _plain(value: object, where: str) -> object:
    """A copy in plain JSON types, so that a template can't reach other objects' methods."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, np.generic):
        return _plain(cast(object, value.item()), where)
    if isinstance(value, Mapping):
        items = cast(Mapping[object, object], value).items()
        return {str(key): _plain(item, f"{where}.{key}") for key, item in items}
    if _is_list(value):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise InvalidRequest(f"{where}: {_describe(value)}; allowed are text, numbers, lists and objects")


def _is_list(value: object) -> TypeGuard[Sequence[object]]:
    return isinstance(value, list | tuple | np.ndarray)


def _describe(value: object) -> str:
    if value is None:
        return "nothing"
    return "an empty list" if _is_list(value) and len(value) == 0 else type(value).__name__
