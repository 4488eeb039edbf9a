"""From a trajectory, whatever it was read from, to the plain data that chat templates see."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeGuard, cast

import numpy as np

from twinkle.protocol.errors import InvalidRequest

REASONING_KEYS: Final = ("reasoning_content", "thinking", "reasoning")
"""What a message's reasoning is called. Templates read the first, gpt-oss's reads the second."""


@dataclass(frozen=True)
class Conversation:
    """Messages and tools as plain JSON data; made by `read_conversation`."""

    messages: tuple[dict[str, Any], ...]
    tools: list[dict[str, Any]] | None = None

    def first(self, count: int) -> "Conversation":
        """The conversation up to, not including, message `count`."""
        return replace(self, messages=self.messages[:count])

    def with_message(self, index: int, message: dict[str, Any]) -> "Conversation":
        """The same with message `index` exchanged."""
        return replace(self, messages=(*self.messages[:index], message, *self.messages[index + 1 :]))


def read_conversation(trajectory: Mapping[str, Any]) -> Conversation:
    """A trajectory's messages and tools, copied.

    A key of a message that holds None is left out, as Transformers does: columnar files and some APIs give None for
    what is not there, and templates ask whether a key is there.

    Raises:
        InvalidRequest: if there are no messages, or something is not what a chat template can read.
    """
    messages = cast(object, trajectory.get("messages"))
    if not _is_list(messages) or len(messages) == 0:
        raise InvalidRequest(
            f"messages: expected a list of messages, got {_describe(messages)}; the columns are "
            f"{', '.join(trajectory) or 'none'}: a preprocessor (dataset.map) makes messages of others"
        )
    tools = cast(object, trajectory.get("tools"))
    if isinstance(tools, str):  # as columnar files have it, whose columns must be of one type
        tools = _parse_tools(tools)
    if tools is not None and not (_is_list(tools) and all(isinstance(tool, Mapping) for tool in tools)):
        raise InvalidRequest("tools: expected a list of JSON schemas (objects), or the same as JSON text")
    return Conversation(
        messages=tuple(
            _read_message(message, f"messages[{index}]") for index, message in enumerate(messages)
        ),
        tools=cast("list[dict[str, Any]] | None", _plain(tools, "tools")),
    )


def _read_message(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidRequest(f"{where}: expected an object with role and content, got {_describe(message)}")
    plain = cast(dict[str, Any], _plain(cast(object, message), where))
    role = plain.get("role")
    if not isinstance(role, str):
        raise InvalidRequest(f"{where}.role: expected text such as 'user', got {_describe(role)}")
    kept = {key: value for key, value in plain.items() if value is not None}
    reasoning = next((kept[key] for key in REASONING_KEYS if key in kept), None)
    if "content" in kept:
        _check_content(kept["content"], f"{where}.content")
    elif reasoning is None and not kept.get("tool_calls"):
        raise InvalidRequest(
            f"{where}.content: missing; give the text (only a message with tool_calls or reasoning goes without)"
        )
    if reasoning is None:
        return kept
    return {"thinking": reasoning, **kept, "reasoning_content": reasoning}


def _check_content(content: object, where: str) -> None:
    """Text or a list of parts is let through; which parts there are is the template's business."""
    if isinstance(content, str):
        return
    if not _is_list(content):
        raise InvalidRequest(f"{where}: expected text, got {_describe(content)}")
    if any(isinstance(part, str) for part in content):
        raise InvalidRequest(
            f'{where}: a list of plain text; join it to one text, or give parts: [{{"type": "text", "text": ...}}]'
        )
    for index, part in enumerate(content):
        if not isinstance(part, Mapping) or not isinstance(cast(Mapping[str, object], part).get("type"), str):
            raise InvalidRequest(
                f'{where}[{index}]: expected a part with a type, such as {{"type": "text", "text": ...}}, got '
                f"{'an object without type' if isinstance(part, Mapping) else _describe(part)}"
            )


def _parse_tools(text: str) -> object:
    try:
        return json.loads(text) if text.strip() else None
    except ValueError as error:
        raise InvalidRequest(f"tools: not JSON ({error})") from error


def _plain(value: object, where: str) -> object:
    """A copy in plain JSON types, so that a template can't reach a method of anything else."""
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
