"""Converts the turns of datasets' conversations to messages; `formats` knows which columns hold them."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard, cast

import numpy as np

from twinkle.data_format.roles import CALL_ROLES, ROLES, read_calls
from twinkle.protocol.errors import InvalidRequest


def read_text(value: object, field: str) -> str:
    """Return the value, which must be text.

    Raises:
        InvalidRequest: naming the field, if it is not.
    """
    if not isinstance(value, str):
        raise InvalidRequest(f"{field}: expected text, got {describe(value)}")
    return value


def read_messages(value: object, field: str) -> list[dict[str, Any]]:
    """A list of `{from, value}` or `{role, content}` turns as messages; further keys are kept.

    Raises:
        InvalidRequest: naming the turn and its key, if one has another form.
    """
    if not is_list(value) or len(value) == 0:
        raise InvalidRequest(f"{field}: expected a list of turns, got {describe(value)}")
    return [read_message(turn, f"{field}[{index}]") for index, turn in enumerate(value)]


def read_message(turn: object, field: str) -> dict[str, Any]:
    """One turn as a message; see `read_messages`."""
    if not isinstance(turn, Mapping):
        raise InvalidRequest(
            f"{field}: expected an object with from and value, or role and content, got {describe(turn)}"
        )
    keys = cast(Mapping[str, Any], turn)
    if keys.get("role") is not None:
        role = read_text(keys["role"], f"{field}.role")
        content = keys.get("content", keys.get("value"))
        # OpenAI's content may be a list of parts, or missing beside tool calls.
        if not (content is None or isinstance(content, str) or is_list(content)):
            raise InvalidRequest(f"{field}.content: expected text, got {describe(content)}")
        others = {key: item for key, item in keys.items() if key not in ("role", "content", "value")}
        if role in CALL_ROLES and others.get("tool_calls") is None:
            return _call_turn(content, f"{field}.content", others)
        # Templates know more roles, such as "developer", so roles that are no alias are kept.
        return {"role": ROLES.get(role, role), "content": content, **others}
    for key, other in (("from", "role"), ("value", "content")):
        if key not in keys and other not in keys:
            raise InvalidRequest(f"{field}.{key} is missing; a turn has from and value, or role and content")
    name = read_text(keys.get("from"), f"{field}.from")
    others = {key: item for key, item in keys.items() if key not in ("from", "value", "role", "content")}
    value = keys.get("value", keys.get("content"))
    if name in CALL_ROLES:
        return _call_turn(value, f"{field}.value", others)
    if name not in ROLES:
        raise InvalidRequest(f"{field}.from: {name!r}; known are {', '.join(sorted({*ROLES, *CALL_ROLES}))}")
    return {"role": ROLES[name], "content": read_text(value, f"{field}.value"), **others}


def read_history(value: object, field: str) -> list[dict[str, Any]]:
    """Earlier questions and answers, a list of `[question, answer]`, as messages; may be empty.

    Raises:
        InvalidRequest: naming the pair, if one has another form.
    """
    if is_blank(value):
        return []
    if not is_list(value):
        raise InvalidRequest(f"{field}: expected a list of [question, answer], got {describe(value)}")
    messages: list[dict[str, Any]] = []
    for index, pair in enumerate(value):
        if not is_list(pair) or len(pair) != 2:
            raise InvalidRequest(f"{field}[{index}]: expected [question, answer], got {describe(pair)}")
        question, answer = (
            read_text(text, f"{field}[{index}][{position}]") for position, text in enumerate(pair)
        )
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def is_blank(value: object) -> bool:
    """Whether a column is empty: None, blank text (as in CSV files) or an empty list."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (is_list(value) and len(value) == 0)


def is_list(value: object) -> TypeGuard[Sequence[object]]:
    """Whether a value is a list, as from JSON, Python or a columnar file."""
    return isinstance(value, list | tuple | np.ndarray)


def describe(value: object) -> str:
    """A description of a value, for error messages."""
    if value is None:
        return "nothing"
    if is_list(value):
        return "an empty list" if len(value) == 0 else f"a list of {len(value)}"
    return type(value).__name__


def _call_turn(value: object, field: str, others: Mapping[str, Any]) -> dict[str, Any]:
    return {**others, "role": "assistant", "tool_calls": read_calls(value, field)}
