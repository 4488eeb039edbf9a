"""A conversation, in the dictionaries that chat templates and JSON files share.

The types are `TypedDict`s: `Message(role="user", content="Hi")` is a plain dict, and so is a row read from a
file, which is why neither has to be converted into the other. Nothing here checks or renders them.
"""

from typing import Any, Literal, NotRequired, TypedDict


class TextPart(TypedDict):
    """One part of a message whose content is a list, for the templates that want it so."""

    type: Literal["text"]
    text: str


class FunctionCall(TypedDict):
    """A function the assistant asks for.

    Keys:
        name: of the function.
        arguments: by name; or, as the OpenAI API has it, the same as JSON text.
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
        role: "system", "user", "assistant", "tool", or whatever else the model's template knows.
        content: the text; None or absent only beside tool_calls or reasoning, where the template allows it.
        reasoning_content: what the assistant thought before it answered ("thinking", "reasoning" are read too).
        tool_calls: the functions an assistant asks for.
        tool_call_id, name: which call, or function, a "tool" message answers.
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
