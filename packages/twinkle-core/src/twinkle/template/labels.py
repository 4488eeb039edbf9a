r"""Where the assistant's turns lie in a rendered conversation.

A turn reaches from the end of what the model is given (the opening of the turn, such as `<|im_start|>assistant\n`)
to the end of what it has to say, the token that ends the turn included, the line break that follows it not.

Templates say nothing about this, so it is found by rendering again:

1. Render the messages before the turn with a generation prompt, and the messages up to and including it. If the
   whole text begins with both, the turn is what the second has more than the first.
2. Some templates write a turn, or what comes before it, differently once more turns follow (Qwen3's leaves out the
   thinking of earlier turns). Then render the whole conversation with that one message exchanged for a mark: what is
   the same before and after it is not the turn.

Either way the spans are of the text as it is really rendered for the whole conversation.
"""

from dataclasses import dataclass
from typing import Any

from twinkle.template.conversation import REASONING_KEYS, Conversation
from twinkle.template.rendering import ChatTemplate, RenderingFailed, Span


def assistant_spans(
    template: ChatTemplate, conversation: Conversation, add_generation_prompt: bool = False
) -> list[Span]:
    """The assistant's turns in what `template` renders for `conversation`, first to last.

    Raises:
        RenderingFailed: if a turn can't be found.
    """
    text = template.render(conversation, add_generation_prompt)
    spans: list[Span] = []
    position = 0
    for index, message in enumerate(conversation.messages):
        if message["role"] != "assistant":
            continue
        newest = _as_newest(template, conversation, index)
        if newest is not None and text.startswith(newest.before + newest.turn):
            span = Span(len(newest.before), len(newest.before) + len(newest.turn))
        else:
            exchanged = _exchange(template, conversation, index, text, add_generation_prompt)
            opening = _generation_prompt(template, conversation)
            span = _by_exchange(text, exchanged, newest.turn if newest else None, opening, after=position)
        if not position <= span.start <= span.end:
            raise _not_found(index, "it overlaps the turn before it")
        spans.append(span)
        position = span.end
    return spans


@dataclass(frozen=True)
class _Newest:
    """A turn as the template writes it while nothing follows.

    Attributes:
        before: what the model is given.
        turn: what it has to say.
    """

    before: str
    turn: str


def _as_newest(template: ChatTemplate, conversation: Conversation, index: int) -> _Newest | None:
    """None if the template refuses the beginning of the conversation, or writes it differently once it goes on."""
    try:
        before = template.render(conversation.first(index), add_generation_prompt=True)
        through = template.render(conversation.first(index + 1))
    except RenderingFailed:
        return None
    return _Newest(before, through[len(before) :].rstrip()) if through.startswith(before) else None


@dataclass(frozen=True)
class _Exchanged:
    """The whole conversation rendered with one message exchanged for a mark.

    Attributes:
        text: with the mark in it, more than once where the message has several parts.
        turn_end: where the turn ends, counting the token that ends it.
    """

    text: str
    turn_end: int


def _exchange(
    template: ChatTemplate, conversation: Conversation, index: int, text: str, add_generation_prompt: bool
) -> _Exchanged:
    mark = next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in text)
    marked = conversation.with_message(index, _marked(conversation.messages[index], mark))
    try:
        whole = template.render(marked, add_generation_prompt)
        through = template.render(marked.first(index + 1))
    except RenderingFailed as error:
        raise _not_found(index, str(error)) from error
    if mark not in whole or mark not in through:
        raise _not_found(index, "the template does not show it")
    body_end = whole.rindex(mark) + 1
    closing = through[through.rindex(mark) + 1 :].rstrip()
    closes = whole.startswith(closing, body_end)
    return _Exchanged(whole, body_end + len(closing) if closes else body_end)


def _by_exchange(text: str, exchanged: _Exchanged, newest: str | None, opening: str, after: int) -> Span:
    """The turn by what differs between the text and its copy with the mark.

    That tells the end, but the beginning only roughly: what is the same may reach into the turn (both copies may open
    with the same empty thinking), or up to it. So it is, if one fits: where the turn begins as it was written while it
    was the `newest`; behind the last `opening`; else where the difference begins.
    """
    same_before = _common_length(text, exchanged.text)
    same_after = _common_length(text[::-1], exchanged.text[::-1])
    end = len(text) - min(len(exchanged.text) - exchanged.turn_end, same_after)
    if newest is not None and text.endswith(newest, after, end) and end - len(newest) <= same_before:
        return Span(end - len(newest), end)
    at_opening = text.rfind(opening, after, same_before) if opening else -1
    return Span(at_opening + len(opening) if at_opening >= 0 else same_before, end)


def _common_length(first: str, second: str) -> int:
    """How many characters two texts have in common at their beginnings."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _generation_prompt(template: ChatTemplate, conversation: Conversation) -> str:
    """What a generation prompt adds to the text; empty if it can't be told apart."""
    whole = template.render(conversation)
    prompted = template.render(conversation, add_generation_prompt=True)
    return prompted[len(whole) :] if prompted.startswith(whole) else ""


def _marked(message: dict[str, Any], mark: str) -> dict[str, Any]:
    """The message with `mark` in place of everything the assistant says in it, and otherwise of the same shape."""
    marked = dict(message)
    for key in REASONING_KEYS:
        if message.get(key):
            marked[key] = mark
    if isinstance(message.get("content"), list):
        marked["content"] = [{"type": "text", "text": mark}]
    elif message.get("content") or not message.get("tool_calls"):
        marked["content"] = mark
    if message.get("tool_calls"):
        marked["tool_calls"] = [_marked_call(call, mark) for call in message["tool_calls"]]
    return marked


def _marked_call(call: dict[str, Any], mark: str) -> dict[str, Any]:
    """A tool call with name and arguments exchanged; the OpenAI form keeps them under `function`."""
    if isinstance(call.get("function"), dict):
        return {**call, "function": _marked_call(call["function"], mark)}
    arguments = mark if isinstance(call.get("arguments"), str) else {mark: mark}
    return {**call, "name": mark, "arguments": arguments}


def _not_found(index: int, reason: str) -> RenderingFailed:
    return RenderingFailed(
        f"messages[{index}]: the assistant's turn can't be found in the rendered text ({reason}); train_on='all' needs "
        "no search, nor does a chat template with {% generation %} blocks (chat_template=...)"
    )
