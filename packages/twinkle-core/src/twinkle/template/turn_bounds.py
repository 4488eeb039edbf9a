"""Infers what all turns of a chat template have in common, from conversations made of marker words."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from twinkle.template.conversation import Conversation, read_conversation
from twinkle.template.rendering import ChatTemplate, RenderingFailed

# The units by which texts are compared: whole tags (`<|end|>` and `<|endoftext|>` have nothing in common), whole white
# space, and otherwise characters.
_PIECES: Final = re.compile(r"<[^<>\s]*>|\s+|.", re.DOTALL)
_LAST_TAG: Final = re.compile(r"<[^<>\s]+>\s*$")

_WORD: Final = "zqwordqz"
_REASONING: Final = "zqreasonqz"
_QUESTION: Final = {"role": "user", "content": "zqquestionqz"}
_CALL: Final = {
    "type": "function",
    "id": "zqcall001",
    "function": {"name": "zqnameqz", "arguments": {"zqkeyqz": "zqvalueqz"}},
}
_TOOL: Final = {
    "type": "function",
    "function": {
        "name": "zqnameqz",
        "description": "",
        "parameters": {"type": "object", "properties": {"zqkeyqz": {"type": "string"}}},
    },
}


@dataclass(frozen=True)
class TurnBounds:
    """What the turns of a template have in common.

    Attributes:
        opening: the common beginning of the generation prompt and all turns; may be empty.
        ends: the texts that end a turn without calls, longest first; the end may differ if nothing follows.
        ends_turns: whether a turn, or at least the last, has an end of its own.
        calls_stop: the marker that ends a turn of calls without a following result, if any.
    """

    opening: str
    ends: tuple[str, ...]
    ends_turns: bool
    calls_stop: str


@lru_cache(maxsize=32)
def turn_bounds(template: ChatTemplate, with_tools: bool) -> TurnBounds:
    """What the turns of `template` have in common, ignoring conversations that it refuses."""
    tools = [_TOOL] if with_tools else None
    said = {"role": "assistant", "content": _WORD}
    plain = _written(template, tools, [_QUESTION, said, _QUESTION, said])
    reasoned = _written(template, tools, [_QUESTION, {**said, "reasoning_content": _REASONING}])
    called = _written(
        template, tools, [_QUESTION, {"role": "assistant", "content": "", "tool_calls": [_CALL]}]
    )
    behind = [turn.partition(_WORD)[2].rstrip() for turn in plain if _WORD in turn]
    tag = _LAST_TAG.search(called[0]) if called and "zqnameqz" in called[0] else None
    return TurnBounds(
        opening=_opening(template, tools, plain, reasoned, called),
        ends=tuple(sorted({end for end in behind if end}, key=len, reverse=True)),
        ends_turns=any(behind) or not behind,
        calls_stop=tag[0].strip() if tag else "",
    )


def _opening(template: ChatTemplate, tools: list[dict[str, Any]] | None, *turns: list[str]) -> str:
    prompt = generation_prompt(template, _conversation(tools, [_QUESTION]))
    opening = prompt or ""
    for turn in (turn for kind in turns for turn in kind):
        opening = common_beginning(opening, turn)
        # The opening of the reasoning belongs to the turn, although the prompt and some turns have it.
        before = turn.partition(_REASONING)[0] if _REASONING in turn else ""
        tag = _LAST_TAG.search(before)
        if tag is not None and tag.start() < len(opening):
            opening = opening[: tag.start()]
    return opening


def _written(
    template: ChatTemplate, tools: list[dict[str, Any]] | None, messages: list[dict[str, Any]]
) -> list[str]:
    """The text of each assistant message, and the text after the last message."""
    try:
        traced = template.trace(_conversation(tools, messages))
    except RenderingFailed:
        return []
    if traced is None:
        return []
    ends = max((stretch.end for stretch in traced.stretches if stretch.owner is not None), default=0)
    texts = {index: "" for index, message in enumerate(messages) if message["role"] == "assistant"}
    for owner, within, start, end in traced.stretches:
        if owner in texts and within is None:
            texts[owner] += traced.text[start:end]
    if texts and max(texts) == len(messages) - 1:
        texts[max(texts)] += traced.text[ends:]
    return [text for text in texts.values() if text]


def generation_prompt(template: ChatTemplate, conversation: Conversation) -> str | None:
    """The text that the template adds for the model to continue; None if it refuses the conversation, or can't be
    traced.
    """
    if (constant := template.constant_prompt(conversation)) is not None:
        return constant
    try:
        prompted = template.trace(conversation, add_generation_prompt=True)
        if prompted is None:
            return None
        last = len(conversation.messages) - 1
        ends = max((stretch.end for stretch in prompted.stretches if stretch.owner == last), default=None)
        if ends is not None and prompted.text[ends:].strip():
            return prompted.text[ends:]
        # Most write it after all messages, some with the last message. And some write a message outside their loop
        # (Llama-3.1's the first question, with the tools), so its end is unknown.
        plain = template.render(conversation)
    except RenderingFailed:
        return None
    return prompted.text[len(common_beginning(plain, prompted.text)) :]


def common_beginning(first: str, second: str) -> str:
    """The common prefix of two texts, in whole tags and white space."""
    length = min(len(first), len(second))
    same = 0
    for one, two in zip(_PIECES.finditer(first), _PIECES.finditer(second), strict=False):
        if one[0] != two[0] or one.end() > length:
            break
        same = one.end()
    return first[:same]


def first_piece(text: str, start: int) -> str:
    """The tag, white space or character at `start`; empty at the end."""
    piece = _PIECES.match(text, start)
    return piece[0] if piece else ""


def _conversation(tools: list[dict[str, Any]] | None, messages: Iterable[dict[str, Any]]) -> Conversation:
    return read_conversation({"messages": list(messages), **({"tools": tools} if tools else {})})
