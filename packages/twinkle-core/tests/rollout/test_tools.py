"""Tools from functions, and what a model is shown of its calls."""

import json
from typing import Any, Literal

import pytest

from twinkle.protocol.errors import InvalidRequest
from twinkle.rollout import Tool, call_tools
from twinkle.rollout.tools import as_tools


def add(a: int, b: int = 1) -> int:
    """The sum of two
    whole numbers.

    Not told to the model.
    """
    return a + b


def look_up(names: list[str], unit: Literal["m", "km"], near: float | None = None) -> dict[str, float]:
    return {name: len(name) * (1.0 if unit == "m" else 0.001) for name in names}


def call(name: str, arguments: object, **more: str) -> Any:
    return {"function": {"name": name, "arguments": arguments}, **more}


def answers_to(functions: list[Any], message: Any, problems: list[str] | None = None) -> list[Any]:
    return list(call_tools(as_tools(functions), message, problems or []))


def test_a_schema_is_made_of_the_annotations_and_the_docstring():
    assert Tool.from_function(add).schema == {
        "type": "function",
        "function": {
            "name": "add",
            "description": "The sum of two whole numbers.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
                "required": ["a"],
            },
        },
    }
    assert Tool.from_function(look_up).schema["function"]["parameters"]["properties"] == {
        "names": {"type": "array", "items": {"type": "string"}},
        "unit": {"type": "string", "enum": ["m", "km"]},
        "near": {"type": "number"},
    }


def test_a_function_that_json_can_not_describe_is_refused():
    def untyped(a) -> int:  # pyright: ignore
        return a

    def odd(a: complex) -> complex:
        return a

    def many(*numbers: int) -> int:
        return sum(numbers)

    for function, message in (
        (untyped, "has no annotation"),
        (odd, "complex"),
        (many, "can't be given by name"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            Tool.from_function(function)
    with pytest.raises(InvalidRequest, match="two are called 'add'"):
        as_tools([add, Tool.from_function(add)])


def test_calls_are_answered_in_their_order():
    message = {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            call("add", {"a": 2, "b": 3}, id="x1"),
            call("look_up", {"names": ["ab"], "unit": "km"}),
        ],
    }
    first, second = answers_to([add, look_up], message)
    assert first == {"role": "tool", "name": "add", "content": "5", "tool_call_id": "x1"}
    assert json.loads(second["content"]) == {"ab": 0.002}
    assert answers_to([add], {"role": "assistant", "content": "Done."}) == []


def test_whatever_goes_wrong_is_told_to_the_model():
    def divide(a: int, b: int) -> float:
        return a / b

    calls = [
        call("subtract", {}),
        call("add", {"b": 2}),
        call("add", {"a": 1, "c": 2}),
        call("divide", {"a": 1, "b": 0}),
        call("add", "1 + 2"),
        call("add", {"a": 1, "b": "x"}),
    ]
    message = {"role": "assistant", "tool_calls": calls}
    answers = answers_to([add, divide], message, ["the second call is no JSON"])
    assert [answer["content"] for answer in answers] == [
        "Error: there is no tool 'subtract'; there are add, divide",
        "Error: add: a missing; it takes a, b",
        "Error: add: there is no c; it takes a, b",
        "Error: divide: ZeroDivisionError: division by zero",
        "Error: add: the arguments must be an object",
        "Error: add: TypeError: unsupported operand type(s) for +: 'int' and 'str'",
        "Error: the second call is no JSON",
    ]
