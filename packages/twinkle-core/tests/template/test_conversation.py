"""What is let through to a chat template."""

import json
from typing import Any

import numpy as np
import pytest

from twinkle.protocol.errors import InvalidRequest
from twinkle.template.conversation import read_conversation


class Text(str):
    """A string with a method that no template should reach."""

    def delete_everything(self) -> None: ...


def test_messages_are_copied_into_plain_data() -> None:
    arguments = {"n": np.int64(3), "x": (1, np.float32(0.5)), "s": Text("t")}
    message = {
        "role": Text("assistant"),
        "content": "",
        "tool_calls": [{"name": "f", "arguments": arguments}],
    }
    [plain] = read_conversation({"messages": [message]}).messages
    assert plain["tool_calls"] == [{"name": "f", "arguments": {"n": 3, "x": [1, 0.5], "s": "t"}}]
    assert type(plain["role"]) is str and type(plain["tool_calls"][0]["arguments"]["n"]) is int
    plain["tool_calls"][0]["arguments"]["n"] = 4
    assert arguments["n"] == 3


def test_lists_from_columnar_files_are_arrays() -> None:
    messages = np.array([{"role": "user", "content": "a"}], dtype=object)
    assert read_conversation({"messages": messages}).messages == ({"role": "user", "content": "a"},)


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_is_read_under_all_its_names(key: str) -> None:
    [message] = read_conversation({"messages": [{"role": "assistant", "content": "b", key: "r"}]}).messages
    assert message["reasoning_content"] == message["thinking"] == "r"


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
        {"role": "assistant", "content": None, "reasoning_content": "r"},
        {"role": "moderator", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ],
)
def test_parts_are_content_and_calls_or_reasoning_need_none(message: dict[str, Any]) -> None:
    [plain] = read_conversation({"messages": [message]}).messages
    assert plain.get("content") == message.get("content")
    assert ("content" in plain) == (message.get("content") is not None)


def test_tools_may_be_json_text() -> None:
    rows = {"messages": [{"role": "user", "content": "a"}]}
    assert read_conversation({**rows, "tools": '[{"type": "function"}]'}).tools == [{"type": "function"}]
    assert read_conversation({**rows, "tools": " "}).tools is None
    assert read_conversation({**rows, "tools": None}).tools is None


ONE = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("trajectory", "message"),
    [
        ({"query": "a", "response": "b"}, "messages: .* got nothing; the columns are query, response"),
        ({"messages": []}, "messages: expected a list of messages, got an empty list"),
        ({"messages": "hi"}, "messages: expected a list of messages, got str"),
        ({"messages": ["hi"]}, r"messages\[0\]: expected an object with role and content, got str"),
        ({"messages": [*ONE, {"content": "a"}]}, r"messages\[1\].role: expected text"),
        ({"messages": [{"role": "user", "content": object()}]}, r"messages\[0\].content: object; allowed"),
        (
            {"messages": [*ONE, {"role": "assistant", "content": 5}]},
            r"messages\[1\].content: expected text, got int",
        ),
        (
            {"messages": [{"role": "user", "content": {"text": "a"}}]},
            r"messages\[0\].content: expected text, got dict",
        ),
        ({"messages": [*ONE, {"role": "assistant"}]}, r"messages\[1\].content: missing; give the text"),
        ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\].content: missing;"),
        (
            {"messages": [*ONE, {"role": "assistant", "content": None, "tool_calls": []}]},
            r"messages\[1\].content: missing;",
        ),
        (
            {"messages": [{"role": "user", "content": ["a", "b"]}]},
            r"messages\[0\].content: a list of plain text; join it to one text, or give parts: .*\"type\": \"text\"",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, 5]}]},
            r"messages\[0\].content\[1\]: expected a part with a type, .* got int",
        ),
        (
            {"messages": [{"role": "user", "content": [{"text": "a"}]}]},
            r"messages\[0\].content\[0\]: expected a part with a type, .* got an object without type",
        ),
        ({"messages": ONE, "tools": "{"}, "tools: not JSON"),
        ({"messages": ONE, "tools": '{"a": 1}'}, "tools: expected a list of JSON schemas"),
        ({"messages": ONE, "tools": [print]}, "tools: expected a list of JSON schemas"),
    ],
)
def test_what_is_no_conversation_is_refused_by_its_place(trajectory: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        read_conversation(trajectory)


def test_what_arrow_fills_structs_with_is_left_out_where_it_can_not_be_meant() -> None:
    def schema(**rest: Any) -> dict[str, Any]:
        properties = {"city": {"type": "string", **rest}}
        return {"type": "function", "function": {"name": "f", "parameters": {"properties": properties}}}

    filled = schema(enum=None, description=None)
    filled["function"]["parameters"]["properties"]["text"] = None
    filled["function"]["strict"] = None
    call = {"id": None, "function": {"name": "f", "arguments": {"city": "Rome", "text": None}}}
    row = {
        "messages": [*ONE, {"role": "assistant", "content": "", "tool_calls": [call]}],
        "tools": [filled, schema(default=None)],
    }
    conversation = read_conversation(row)
    assert conversation.tools == [schema(), schema(default=None)]
    assert conversation.messages[1]["tool_calls"] == [
        {"function": {"name": "f", "arguments": {"city": "Rome"}}}
    ]


@pytest.mark.parametrize(
    "tools", [None, [{"name": "f", "parameters": {"properties": {"unit": {"type": "string"}}}}]]
)
def test_an_argument_that_is_null_stays_null(tools: Any) -> None:
    call = {"name": "f", "arguments": {"unit": None, "deep": {"x": None}, "list": [None]}}
    row = {"messages": [*ONE, {"role": "assistant", "tool_calls": [call]}], "tools": tools}
    assert read_conversation(row).messages[1]["tool_calls"] == [call]


def test_calls_may_be_json_text() -> None:
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]
    row = {"messages": [*ONE, {"role": "assistant", "content": "", "tool_calls": json.dumps(calls)}]}
    assert read_conversation(row).messages[1]["tool_calls"] == calls
    row = {"messages": [*ONE, {"role": "assistant", "content": "a", "tool_calls": ""}]}
    assert read_conversation(row).messages[1]["tool_calls"] == []


@pytest.mark.parametrize(
    "calls", ["f()", "5", [{"function": {"arguments": {}}}], ["f"], [{"function": "f"}], {"a": 1}]
)
def test_what_is_no_call_is_refused_by_its_place(calls: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"messages\[1\].tool_calls"):
        read_conversation({"messages": [*ONE, {"role": "assistant", "content": "", "tool_calls": calls}]})
