"""Checks that a chat template renders every message, since it would drop one silently.

A template is a program, and its output for a message depends on those around it. So the whole conversation is rendered
again with a unique word in place of each message's content and each call's name, and the words are searched for. The
result depends only on the conversation's shape, and datasets have few shapes.
"""

import logging
from collections.abc import Mapping
from typing import Any, Final, NamedTuple, cast

from twinkle.protocol.errors import InvalidRequest
from twinkle.template.conversation import REASONING_KEYS, Conversation
from twinkle.template.rendering import ChatTemplate, RenderingFailed

logger = logging.getLogger(__name__)

_MOST_SHAPES: Final = 10_000


class _Shape(NamedTuple):
    """What determines whether a message is rendered: its keys, its role, and which of its parts are not empty."""

    role: str
    keys: tuple[str, ...]
    content: str
    calls: int


class ShownMessages:
    """The shapes of conversations that one template renders completely."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        # A template whose output doesn't depend on the conversation is not expected to show anything.
        self._reads_messages = any("messages" in source for source in template.sources.values())
        self._has_warned = False
        self._whole: set[tuple[object, ...]] = set()

    def check(self, conversation: Conversation) -> None:
        """Raise if the template drops a message or a call.

        It may drop reasoning, which templates render only for the last turn, and the text beside a call.

        Raises:
            InvalidRequest: naming the message.
        """
        shape = (conversation.tools is not None, *map(_shape_of, conversation.messages))
        if shape in self._whole or not self._reads_messages:
            return
        marked = tuple(_marked(message, index) for index, message in enumerate(conversation.messages))
        try:
            # In lower case, like the words: a template may write them in capitals.
            text = self._template.render(Conversation(marked, conversation.tools)).lower()
        except RenderingFailed:
            return  # the real conversation is rendered next, and is refused with the template's own message
        marked_conversation = Conversation(marked, conversation.tools)
        for index, message in enumerate(conversation.messages):
            self._check_calls(message, index, text)
            if (
                not message.get("tool_calls")
                and _has_words(message.get("content"))
                and _word(index) not in text
            ):
                self._check_is_elsewhere(marked_conversation, index)
        if len(self._whole) < _MOST_SHAPES:
            self._whole.add(shape)

    def _check_calls(self, message: Mapping[str, Any], index: int, text: str) -> None:
        calls = len(message.get("tool_calls") or ())
        hidden = [number for number in range(calls) if _call_word(index, number) not in text]
        if hidden and len(hidden) == calls:
            raise InvalidRequest(
                f"messages[{index}].tool_calls: the chat template of {self._template.owner} shows nothing of the calls "
                "in this message, and would leave them out without a word; write them into the content, or take a "
                "template that knows calls (chat_template=...)"
            )
        if hidden:
            raise InvalidRequest(
                f"messages[{index}].tool_calls[{hidden[0]}]: the chat template of {self._template.owner} shows nothing "
                "of this call, and would leave it out without a word; give each call a message of its own"
            )

    def _check_is_elsewhere(self, marked: Conversation, index: int) -> None:
        """Raise unless the template renders message `index` before the next question.

        Mistral's writes the system prompt into the last question if that is the last message: when sampling, but not in
        an answered conversation. The model was trained that way, so it is not an error.
        """
        end = next(
            (at + 1 for at in range(index, len(marked.messages)) if marked.messages[at]["role"] == "user"),
            None,
        )
        role = marked.messages[index]["role"]
        try:
            elsewhere = (
                "" if end is None or role == "user" else self._template.render(marked.first(end)).lower()
            )
        except RenderingFailed:
            elsewhere = ""
        if _word(index) not in elsewhere:
            raise InvalidRequest(
                f"messages[{index}].role: the chat template of {self._template.owner} shows nothing of this message of "
                f"the role {role!r}, and would leave it out without a word; give it a role that the template knows at "
                "this place (most know system, user, assistant and tool), or take the message out"
            )
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "messages[%d]: the chat template of %s shows a message of the role %r before an answer only, not in a "
                "conversation with the answer; put its text into the question for the model to be trained with it",
                index,
                self._template.owner,
                role,
            )


def _shape_of(message: Mapping[str, Any]) -> _Shape:
    content: object = message.get("content")
    words = ("list" if isinstance(content, list) else "text") if _has_words(content) else ""
    return _Shape(message["role"], tuple(message), words, len(message.get("tool_calls") or ()))


def _has_words(content: object) -> bool:
    if isinstance(content, list):
        return any(part["text"].strip() for part in cast("list[dict[str, str]]", content))
    return isinstance(content, str) and bool(content.strip())


def _word(index: int) -> str:
    return f"zqword{index}qz"


def _call_word(index: int, number: int) -> str:
    return f"zqcall{index}x{number}qz"


def _marked(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    marked = dict(message)
    content = message.get("content")
    if _has_words(content):
        marked["content"] = (
            [{"type": "text", "text": _word(index)}] if isinstance(content, list) else _word(index)
        )
    for key in REASONING_KEYS:
        if message.get(key):
            marked[key] = "zqreasonqz"
    if message.get("tool_calls"):
        calls = enumerate(cast("list[dict[str, Any]]", message["tool_calls"]))
        marked["tool_calls"] = [_renamed(call, _call_word(index, number)) for number, call in calls]
    return marked


def _renamed(call: dict[str, Any], name: str) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return {**call, "function": {**call["function"], "name": name}}
    return {**call, "name": name}
