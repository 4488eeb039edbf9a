r"""Finds the assistant's turns in a rendered conversation.

A turn begins after what the model is given (the opening of the turn, such as `<|im_start|>assistant\n`) and ends with
the token that ends it, excluding the line break that follows.

Templates don't mark this. So the text written for each message is traced (`tracing`), and the part of an assistant
message's text that the model is given is

- the generation prompt, if the text has it there;
- else what all turns of this template begin with (`turn_bounds`): an earlier turn of Qwen3.5 has no `<think>`, though
  its generation prompt does.

Other messages written inside it are not part of the turn (Gemma 4 writes tool results within the turn that called
them). If a template has no token that ends a turn, the next role's marker stops the model (GLM-4.5's `<|user|>`), and
is the end of the turn.
"""

import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from twinkle.template.conversation import Conversation
from twinkle.template.rendering import ChatTemplate, RenderingFailed, Span, Traced
from twinkle.template.turn_bounds import (
    TurnBounds,
    common_beginning,
    first_piece,
    generation_prompt,
    turn_bounds,
)

_TAG: Final = re.compile(r"\s*(<[^<>\s]+>)")

# Most generation prompts rendered for turns of one kind in a conversation. They hardly ever differ, and each costs a
# rendering, so the time would grow with the square of the number of turns.
_MOST_PROMPTS: Final = 4


@dataclass(frozen=True)
class Turn:
    """An assistant turn.

    Attributes:
        message: index of the message.
        spans: the model's own text, one span unless another message is written in between.
        end: the text that ends the turn, if known: the last characters of the spans.
    """

    message: int
    spans: tuple[Span, ...]
    end: str


def assistant_turns(
    template: ChatTemplate, conversation: Conversation, add_generation_prompt: bool = False
) -> list[Turn]:
    """The assistant's turns, in order, in what `template` renders for `conversation`.

    Raises:
        RenderingFailed: if a turn can't be found.
    """
    return render_turns(template, conversation, add_generation_prompt)[1]


def render_turns(
    template: ChatTemplate, conversation: Conversation, add_generation_prompt: bool = False
) -> tuple[str, list[Turn]]:
    """What `template` renders for `conversation`, and the assistant's turns in it, in order.

    Raises:
        RenderingFailed: if the template refuses the conversation, or a turn can't be found.
    """
    turns = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    if not turns:
        return template.render(conversation, add_generation_prompt), []
    traced = template.trace(conversation, add_generation_prompt)
    if traced is None:
        text = template.render(conversation, add_generation_prompt)
        return text, [_as_it_was_new(template, conversation, text, index) for index in turns]
    finder = _Finder(template, conversation, traced, add_generation_prompt)
    return traced.text, [finder.turn(index) for index in turns]


class _Finder:
    def __init__(
        self, template: ChatTemplate, conversation: Conversation, traced: Traced, prompted: bool
    ) -> None:
        self._template = template
        self._conversation = conversation
        self._text = traced.text
        self._prompted = prompted
        self._stretches = traced.stretches
        self._starts = [stretch.start for stretch in traced.stretches]
        self._written = _by_message(traced)
        self._first_written = min((s.start for s in traced.stretches if s.owner is not None), default=0)
        self._bounds: TurnBounds = turn_bounds(template, conversation.tools is not None)
        self._prompts: dict[object, list[str]] = {}

    def turn(self, index: int) -> Turn:
        """The turn of message `index`, which is the assistant's.

        Raises:
            RenderingFailed: if the template writes nothing for it.
        """
        written = self._written.get(index)
        if not written:
            raise _not_found(index, "the template does not show it")
        start = self._said_from(index, written[0])
        first = Span(start, max(start, written[0].end))
        spans, stop = self._cut([first, *written[1:]], index)
        if stop is None:
            last = self._text[spans[-1].start : spans[-1].end]
            stop = next((end for end in self._bounds.ends if last.endswith(end)), "")
        return Turn(index, tuple(spans), stop)

    def _said_from(self, index: int, written: Span) -> int:
        """The position in `written` where the model's own text begins."""
        here = self._text[written.start : written.end]
        begins = self._begins(here, first=written.start == self._first_written)
        for prompt in self._possible_prompts(index, here):
            for at, opening in ((0, prompt), (begins, prompt.lstrip())):
                if opening and here.startswith(opening, at):
                    return written.start + at + len(opening)
        given = common_beginning(here[begins:], self._bounds.opening.lstrip())
        return written.start + (begins + len(given) if given else 0)

    def _begins(self, here: str, first: bool) -> int:
        """The position in a message's text where its turn's opening begins: after white space, and, for the first
        message, after what the template begins every conversation with (Qwen2.5-VL's system prompt).
        """
        opening = self._bounds.opening.strip()
        if first and opening in here:
            return here.index(opening)
        return len(here) - len(here.lstrip())

    def _possible_prompts(self, index: int, here: str) -> Iterator[str]:
        """Possible generation prompts: those of turns of the same kind, then this turn's own.

        Its own costs a rendering, so it is skipped if it could not match either: if the text after the turn's opening
        differs from all the others there.
        """
        before = self._conversation.messages[index - 1] if index else {}
        kind = (before.get("role"), bool(before.get("tool_calls")), index == 0)
        known = self._prompts.setdefault(kind, [])
        yield from known
        opening = self._bounds.opening
        goes_on = first_piece(here, len(opening)) if here.startswith(opening) else None
        if known and goes_on not in (None, *(first_piece(prompt, len(opening)) for prompt in known)):
            return
        if len(known) < _MOST_PROMPTS:
            prompt = generation_prompt(self._template, self._conversation.first(index))
            if prompt is None:  # some templates require a question first
                prompt = generation_prompt(self._template, self._conversation) or ""
            known.append(prompt)
            yield prompt

    def _cut(self, spans: list[Span], index: int) -> tuple[list[Span], str | None]:
        """The spans up to where the model stops, and the other role's marker that stops it, if any."""
        kept: list[Span] = []
        stop: str | None = None
        for number, span in enumerate(spans):
            last = number + 1 == len(spans)
            if last and index + 1 == len(self._conversation.messages) and self._ends_text(span.end):
                span = Span(span.start, len(self._text))
            end = span.start + len(self._text[span.start : span.end].rstrip())
            stop = self._stop_behind(end, index)
            if stop is not None:
                end = self._text.index(stop, end) + len(stop)
            if end > span.start or number == 0:
                kept.append(Span(span.start, end))
        return kept, stop

    def _ends_text(self, end: int) -> bool:
        """Whether the text after the last message ends its turn, rather than begin another."""
        opening, rest = self._bounds.opening.strip(), self._text[end:].strip()
        asks = bool(opening) and rest.startswith(opening)
        # Command A's template begins another turn unasked; Jamba's opening begins with the end of the last.
        begins_another = bool(rest) and opening.startswith(rest) and rest not in self._bounds.ends
        return not self._prompted and not asks and not begins_another

    def _stop_behind(self, end: int, index: int) -> str | None:
        """Another message's marker, if it directly follows `end` and is a token at which the model stops."""
        tag = _TAG.match(self._text, end)
        if tag is None:
            return None
        owner = self._stretches[bisect_right(self._starts, tag.start(1)) - 1].owner
        if owner is None or owner == index or self._conversation.messages[owner]["role"] == "assistant":
            return None
        if not self._bounds.ends_turns:
            return tag[1]
        stop = self._bounds.calls_stop
        return stop if tag[1] == stop and not self._text.endswith(stop, 0, end) else None


def _by_message(traced: Traced) -> dict[int, list[Span]]:
    """The spans of each message's own text; contiguous text is one span."""
    written: dict[int, list[Span]] = {}
    for owner, within, start, end in traced.stretches:
        if owner is None or within is not None:
            continue
        spans = written.setdefault(owner, [])
        if spans and spans[-1].end == start:
            spans[-1] = Span(spans[-1].start, end)
        else:
            spans.append(Span(start, end))
    return written


def _as_it_was_new(template: ChatTemplate, conversation: Conversation, text: str, index: int) -> Turn:
    """A turn of a template that can't be traced, if its text is the same as without the messages after it."""
    try:
        before = template.render(conversation.first(index), add_generation_prompt=True)
        through = template.render(conversation.first(index + 1)).rstrip()
    except RenderingFailed as error:
        raise _not_found(index, str(error)) from error
    if not (through.startswith(before) and text.startswith(through)):
        raise _not_found(index, "it is not written as it was before others followed")
    return Turn(index, (Span(len(before), len(through)),), "")


def _not_found(index: int, reason: str) -> RenderingFailed:
    return RenderingFailed(
        f"messages[{index}]: the assistant's turn can't be found in the rendered text ({reason}); train_on='all' needs "
        "no search, nor does a chat template with {% generation %} blocks (chat_template=...)"
    )
