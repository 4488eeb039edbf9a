"""The tokens that follow a sampled turn, to append to the sampled ones.

A continued conversation is not tokenised again: its text may tokenise to other tokens than those sampled, and chat
templates write earlier turns differently (Qwen3's drops their thinking). Training needs the tokens that were actually
sampled, so only what follows them is rendered.
"""

from collections.abc import Sequence

from tokenizers import Tokenizer

from twinkle.protocol.errors import InvalidRequest
from twinkle.template.conversation import Conversation
from twinkle.template.labels import Turn, assistant_turns
from twinkle.template.rendering import ChatTemplate
from twinkle.template.turn_forms import TurnForm


def continuation_ids(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    form: TurnForm,
    conversation: Conversation,
    turn_index: int,
    sampled: Sequence[int],
) -> list[int]:
    """The tokens from the end of a sampled turn through the opening of the assistant's next.

    Args:
        form: how the model writes a turn.
        conversation: with the turn as message `turn_index`, and the messages after it.
        sampled: the turn's tokens.

    Raises:
        InvalidRequest: if that message is not the assistant's, or the template refuses the conversation.
    """
    messages = conversation.messages
    if not 0 <= turn_index < len(messages) or messages[turn_index]["role"] != "assistant":
        turns = [str(index) for index, message in enumerate(messages) if message["role"] == "assistant"]
        raise InvalidRequest(
            f"turn_index: {turn_index} is no message of the assistant; these are: {', '.join(turns) or 'none'}"
        )
    text = template.render(conversation, add_generation_prompt=True)
    turns = assistant_turns(template, conversation, add_generation_prompt=True)
    turn = next(turn for turn in turns if turn.message == turn_index)
    end = _end_of(text, turn, form, has_calls=bool(messages[turn_index].get("tool_calls")))
    ends = (form.content_end, form.calls_end)
    return _ids_after(tokenizer, sampled, end, _rest(text, turn), ends)


def _end_of(text: str, turn: Turn, form: TurnForm, has_calls: bool) -> str:
    """The text with which the template ends this turn; may be empty."""
    said = text[turn.spans[0].start : turn.spans[0].end]
    ends = (form.calls_end, turn.end) if has_calls else (turn.end, form.content_end, form.calls_end)
    return next((end for end in ends if end and said.endswith(end)), "")


def _rest(text: str, turn: Turn) -> str:
    """The text after the turn, for templates that write another message inside it.

    The whole turn was sampled before that message, so later parts of it are dropped, except its end.
    """
    rest = ""
    position = turn.spans[0].end
    for span in turn.spans[1:]:
        rest += text[position : span.start]
        position = span.end - (len(turn.end) if text.endswith(turn.end, span.start, span.end) else 0)
    return rest + text[position:]


def _ids_after(
    tokenizer: Tokenizer, sampled: Sequence[int], end: str, rest: str, ends: Sequence[str]
) -> list[int]:
    """The tokens of `rest`, preceded by those of the turn's `end` unless one of the `ends` was sampled."""
    end_ids = _encode(tokenizer, end)
    if _ends_with(sampled, end_ids):
        # Tokenised after the end, not alone: some tokenizers treat the beginning of a text specially.
        ids = _encode(tokenizer, end + rest)
        return ids[len(end_ids) :] if ids[: len(end_ids)] == end_ids else _encode(tokenizer, rest)
    # A model may end a turn differently than the template ends an earlier one (gpt-oss: <|return|> and <|end|>).
    others = [_encode(tokenizer, other) for other in ends]
    if any(_ends_with(sampled, ids) and _special(tokenizer, ids) for ids in others):
        return _encode(tokenizer, rest)
    # An end of ordinary text may have been sampled as other tokens.
    if end and not _special(tokenizer, end_ids) and tokenizer.decode(list(sampled)).endswith(end):
        return _encode(tokenizer, rest)
    return _encode(tokenizer, end + rest)


def _ends_with(sampled: Sequence[int], ids: Sequence[int]) -> bool:
    return bool(ids) and list(sampled[-len(ids) :]) == list(ids)


def _special(tokenizer: Tokenizer, ids: Sequence[int]) -> bool:
    added = tokenizer.get_added_tokens_decoder()
    return any(id in added for id in ids)


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids
