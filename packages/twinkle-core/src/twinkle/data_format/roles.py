"""Roles by the names that datasets use, and tool calls that are written as turns of their own."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeGuard, cast

import numpy as np

from twinkle.protocol.errors import InvalidRequest

ROLES: Final[Mapping[str, str]] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
"""Roles by their names in ShareGPT and its successors. Templates may know others."""

CALL_ROLES: Final = frozenset({"function_call", "tool_call"})
"""The role of a turn that is only a call: an assistant message without text."""


def read_calls(value: object, field: str) -> list[dict[str, Any]]:
    """A turn's function calls as a message's `tool_calls`.

    Args:
        value: `{name, arguments}`, possibly nested under `function`, or a list of these; as objects or as JSON text.

    Raises:
        InvalidRequest: naming the field, if it is anything else.
    """
    if isinstance(value, str):
        try:
            value = cast(object, json.loads(value))
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"{field}: expected the call as JSON, got other text ({error})") from error
    calls = value if _is_list(value) else [value]
    return [{"type": "function", "function": {"arguments": {}, **_function(call, field)}} for call in calls]


def _function(call: object, field: str) -> Mapping[str, Any]:
    if not isinstance(call, Mapping):
        raise InvalidRequest(
            f"{field}: expected an object with name and arguments, got "
            f"{'nothing' if call is None else type(call).__name__}"
        )
    function = cast(Mapping[str, Any], call)
    if isinstance(function.get("function"), Mapping):
        return _function(function["function"], f"{field}.function")
    name = function.get("name")
    if not isinstance(name, str):
        raise InvalidRequest(
            f"{field}.name: expected text, got {'nothing' if name is None else type(name).__name__}"
        )
    return function


def _is_list(value: object) -> TypeGuard[Sequence[object]]:
    return isinstance(value, list | tuple | np.ndarray)
