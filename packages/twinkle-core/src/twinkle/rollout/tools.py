"""Functions that a model may call: their JSON schemas, and the results of calls.

Errors of a call are returned to the model as the call's result, so that it can learn from its mistakes.
"""

from __future__ import annotations

import inspect
import json
import types as python_types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from twinkle.data_format import Message
from twinkle.protocol.errors import InvalidRequest

_JSON_TYPES: dict[object, str] = {
    int: "integer",
    float: "number",
    str: "string",
    bool: "boolean",
    list: "array",
    tuple: "array",
    dict: "object",
}


@dataclass(frozen=True)
class Tool:
    """A function and its schema for the model.

    Attributes:
        schema: as for chat templates, `{"type": "function", "function": {name, description, parameters}}`.
        function: called with keyword arguments; the model sees its result as text or JSON.
    """

    schema: dict[str, Any]
    function: Callable[..., Any]

    @property
    def name(self) -> str:
        """The name by which the model calls it."""
        return self.schema["function"]["name"]

    @classmethod
    def from_function(cls, function: Callable[..., Any]) -> Tool:
        """Create a tool from a function's name, annotations and the first paragraph of its docstring.

        Raises:
            InvalidRequest: if a parameter has no annotation, or one without a JSON type.
        """
        name = getattr(function, "__name__", type(function).__name__)
        hints = get_type_hints(function)
        properties: dict[str, Any] = {}
        required: list[str] = []
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
                raise InvalidRequest(f"tool {name}: {parameter} can't be given by name; name all parameters")
            properties[parameter.name] = _schema_of(
                hints.get(parameter.name), f"tool {name}: {parameter.name}"
            )
            if parameter.default is parameter.empty:
                required.append(parameter.name)
        description = (inspect.getdoc(function) or "").split("\n\n")[0].replace("\n", " ")
        parameters = {"type": "object", "properties": properties, "required": required}
        return cls(
            {
                "type": "function",
                "function": {"name": name, "description": description, "parameters": parameters},
            },
            function,
        )

    def call(self, arguments: Mapping[str, Any]) -> str:
        """The text for the model: the result, or the error."""
        wanted = self.schema["function"]["parameters"]
        missing = [name for name in wanted.get("required", []) if name not in arguments]
        unknown = [name for name in arguments if name not in wanted["properties"]]
        if missing or unknown:
            wrong = [f"{', '.join(missing)} missing"] * bool(missing) + [
                f"there is no {', '.join(unknown)}"
            ] * bool(unknown)
            return f"Error: {self.name}: {'; '.join(wrong)}; it takes {', '.join(wanted['properties'])}"
        try:
            result = self.function(**arguments)
        except Exception as error:  # a user's function, called with arguments that a model made up
            return f"Error: {self.name}: {type(error).__name__}: {error}"
        return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)


def as_tools(tools: Sequence[Tool | Callable[..., Any]]) -> dict[str, Tool]:
    """Tools by name.

    Raises:
        InvalidRequest: if two tools have the same name.
    """
    by_name: dict[str, Tool] = {}
    for each in tools:
        tool = each if isinstance(each, Tool) else Tool.from_function(each)
        if tool.name in by_name:
            raise InvalidRequest(f"tools: two are called {tool.name!r}; give each a name of its own")
        by_name[tool.name] = tool
    return by_name


def call_tools(tools: Mapping[str, Tool], message: Message, problems: Sequence[str] = ()) -> list[Message]:
    """The answers to all calls of an assistant message, in order; empty if there are none.

    Args:
        problems: parsing problems of the message, which are reported to the model.
    """
    answers: list[Message] = []
    for call in message.get("tool_calls") or []:
        function = call["function"]
        tool = tools.get(function["name"])
        if tool is None:
            text = f"Error: there is no tool {function['name']!r}; there are {', '.join(tools) or 'none'}"
        elif not isinstance(function["arguments"], dict):
            text = f"Error: {tool.name}: the arguments must be an object"
        else:
            text = tool.call(function["arguments"])
        answer = Message(role="tool", name=function["name"], content=text)
        if "id" in call:
            answer["tool_call_id"] = call["id"]
        answers.append(answer)
    answers.extend(Message(role="tool", name="error", content=f"Error: {problem}") for problem in problems)
    return answers


def _schema_of(annotation: Any, where: str) -> dict[str, Any]:
    if annotation is None:
        raise InvalidRequest(f"{where}: has no annotation; say its type, such as `a: int`")
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, python_types.UnionType):
        some = [each for each in inner if each is not type(None)]
        if len(some) == 1:
            return _schema_of(some[0], where)
        return {"anyOf": [_schema_of(each, where) for each in some]}
    if origin is Literal:
        return {"type": _JSON_TYPES.get(cast(object, type(inner[0])), "string"), "enum": list(inner)}
    kind = _JSON_TYPES.get(origin or annotation)
    if kind is None:
        raise InvalidRequest(
            f"{where}: {annotation!r} has no type in JSON; use int, float, str, bool, list, dict or Literal, or make "
            "the Tool with a schema of your own"
        )
    if kind == "array" and inner:
        return {"type": kind, "items": _schema_of(inner[0], where)}
    return {"type": kind}
