"""Conversations, as the dictionaries that chat templates and JSON files share.

The types are `TypedDict`s: `Message(role="user", content="Hi")` is a plain dict, and so is a row read from a file, so
no conversion is needed. Nothing here checks or renders them.
"""

from typing import Any, Literal, NotRequired, TypedDict


class TextPart(TypedDict):
    """One part of a message's content, for templates that take lists of parts."""

    type: Literal["text"]
    text: str


class FunctionCall(TypedDict):
    """A function call by the assistant.

    Keys:
        name: of the function.
        arguments: by name; or as JSON text, as in the OpenAI API.
    """

    name: str
    arguments: dict[str, Any] | str


class ToolCall(TypedDict):
    """One entry of a message's `tool_calls`."""

    function: FunctionCall
    type: NotRequired[Literal["function"]]
    id: NotRequired[str]


class Message(TypedDict):
    """One turn of a conversation.

    Keys:
        role: "system", "user", "assistant", "tool", or another role of the model's template.
        content: the text; None or absent only with tool_calls or reasoning, if the template allows it.
        reasoning_content: the assistant's reasoning before its answer (also read from "thinking" and "reasoning").
        tool_calls: the assistant's function calls.
        tool_call_id, name: the call, or function, that a "tool" message answers.
    """

    role: str
    content: NotRequired[str | list[TextPart] | None]
    reasoning_content: NotRequired[str | None]
    tool_calls: NotRequired[list[ToolCall] | None]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]


class Trajectory(TypedDict):
    """A whole conversation.

    Keys:
        messages: the turns, first to last.
        tools: JSON schemas of the functions the assistant may call.
    """

    messages: list[Message]
    tools: NotRequired[list[dict[str, Any]] | None]
