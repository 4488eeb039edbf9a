"""The usual layouts of conversation and preference datasets, recognised by their columns.

`turns` reads the turns themselves.
"""

from collections.abc import Mapping
from typing import Any, Final, NamedTuple, cast

from twinkle.preprocessor.base import Preprocessor
from twinkle.preprocessor.turns import (
    describe,
    is_blank,
    is_list,
    read_history,
    read_message,
    read_messages,
    read_text,
)
from twinkle.protocol.errors import InvalidRequest

_TURNS: Final = ("conversations", "conversation")


class _Layout(NamedTuple):
    """Columns of a question and its answer."""

    question: str
    answer: str


_LAYOUTS: Final = (
    _Layout("instruction", "output"),
    _Layout("prompt", "completion"),
    _Layout("prompt", "response"),
    _Layout("question", "answer"),
    _Layout("query", "response"),
)
_QUESTIONS: Final = tuple(dict.fromkeys(layout.question for layout in _LAYOUTS))

# Columns that may accompany any of them.
_BESIDE: Final = ("system", "history")

_KNOWN: Final = (
    "messages; conversations or conversation (ShareGPT); instruction, input, output (Alpaca); "
    "prompt with completion or response; question, answer; query, response; each with system and history where needed"
)


class ConversationProcessor(Preprocessor):
    """Converts a row in any of the usual layouts to messages. `Dataset.encode` does this automatically.

    `tools` and columns that are not read are kept. The layouts are:

    - `messages`, OpenAI's: the row stays as it is.
    - `conversations` or `conversation`, ShareGPT's: turns as `{from, value}` or `{role, content}`. A `function_call`
      holds `{name, arguments}` as JSON. The column `system` is put first unless the turns begin with one already.
    - `instruction` and `output`, Alpaca's; what `input` holds follows the instruction on a line of its own.
    - `prompt` with `completion` or `response`; `question` with `answer`; `query` with `response`. The two columns
      `prompt` and `completion` may hold lists of messages instead of text.

    `system` (text) comes first in all but the first layout; in the last two, `history` (a list of
    `[question, answer]`) comes before the question.
    """

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row with `messages` in place of the columns that were read.

        Raises:
            InvalidRequest: naming the row's columns, if they match no layout; or naming the field, if a value has the
                wrong type; or if it is a preference row.
        """
        if row.get("messages") is not None:
            return dict(row)
        if row.get("chosen") is not None and row.get("rejected") is not None:
            raise InvalidRequest(
                "chosen, rejected: a row of preferences, not one conversation; encode_pairs() encodes such rows, "
                "PreferenceProcessor reads them"
            )
        # Columnar files give every row all columns, so one with a value takes precedence over an empty one.
        held = [column for column in row if row[column] is not None]
        for columns in (held, list(row)):
            turns = next((column for column in _TURNS if column in columns), None)
            if turns is not None:
                messages = read_messages(row[turns], turns)
                return _with_messages(row, _with_system(messages, row), {turns, "system"})
            for layout in _LAYOUTS:
                if layout.question in columns and layout.answer in columns:
                    return _question_and_answer(row, layout)
        raise InvalidRequest(
            f"messages: expected them, or columns they can be made of; the columns are {', '.join(row) or 'none'}: a "
            f"preprocessor (dataset.map) makes messages of others. Known by themselves are {_KNOWN}"
        )


class PreferenceProcessor(Preprocessor):
    """Converts a row to two conversations, `chosen` (preferred) and `rejected`, for DPO and reward models.

    `chosen` and `rejected` each hold either the answer (text, or messages that begin with the assistant's) to `prompt`,
    `question`, `query`, `instruction` or `conversations`, with `system` and `history` as for `ConversationProcessor`;
    or a whole conversation, which does not begin with an assistant message. `Dataset.encode_pairs` does this
    automatically.
    """

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row with lists of messages in `chosen` and `rejected`, without the columns that were read.

        Raises:
            InvalidRequest: naming the field, if a column is missing or has the wrong type.
        """
        for side in ("chosen", "rejected"):
            if row.get(side) is None:
                raise InvalidRequest(
                    f"{side}: nothing there; a row of preferences has chosen and rejected, and prompt unless both are "
                    f"whole conversations; the columns are {', '.join(row) or 'none'}"
                )
        prompt, read = _prompt(row)
        pair = {side: _side(row[side], side, prompt) for side in ("chosen", "rejected")}
        return {**{column: value for column, value in row.items() if column not in read}, **pair}


def _question_and_answer(row: Mapping[str, Any], layout: _Layout) -> dict[str, Any]:
    asked, read = _asked(row, layout.question)
    answer = row[layout.answer]
    if layout.answer == "completion" and is_list(answer):
        messages = [*asked, *read_messages(answer, layout.answer)]
    else:
        messages = [*asked, {"role": "assistant", "content": read_text(answer, layout.answer)}]
    return _with_messages(row, messages, {*read, layout.answer})


def _prompt(row: Mapping[str, Any]) -> tuple[list[dict[str, Any]], set[str]]:
    """The prompt of a pair, as messages, and the columns it was read from; both may be empty."""
    turns = next((column for column in _TURNS if not is_blank(row.get(column))), None)
    if turns is not None:
        return _with_system(read_messages(row[turns], turns), row), {turns, "system"}
    question = next((column for column in _QUESTIONS if not is_blank(row.get(column))), None)
    return ([], set()) if question is None else _asked(row, question)


def _asked(row: Mapping[str, Any], column: str) -> tuple[list[dict[str, Any]], set[str]]:
    """System prompt, history and question as messages, and the columns they were read from."""
    question = row[column]
    if column == "prompt" and is_list(question):
        messages = read_messages(question, column)
    else:
        text = read_text(question, column)
        if column == "instruction" and not is_blank(row.get("input")):
            text = f"{text}\n{read_text(row['input'], 'input')}" if text else read_text(row["input"], "input")
        messages = [{"role": "user", "content": text}]
    messages = [*read_history(row.get("history"), "history"), *messages]
    read = {column, *_BESIDE, *(("input",) if column == "instruction" else ())}
    return _with_system(messages, row), read


def _side(value: object, side: str, prompt: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One conversation of a pair: the prompt with the answer, or the column itself if it holds a whole conversation."""
    if isinstance(value, str):
        if not prompt:
            raise InvalidRequest(
                f"{side}: an answer without its question; give a prompt (one of {', '.join(_QUESTIONS)}) beside it, "
                "or whole conversations as lists of messages"
            )
        return [*prompt, {"role": "assistant", "content": value}]
    if not (is_list(value) or isinstance(value, Mapping)):
        raise InvalidRequest(f"{side}: expected text or a list of messages, got {describe(value)}")
    one = cast(object, value)
    messages = read_messages(one, side) if is_list(one) else [read_message(one, side)]
    last = messages[-1]["role"]
    if last != "assistant":
        raise InvalidRequest(f"{side}: the last message is the {last}'s; it has to be the assistant's answer")
    if messages[0]["role"] != "assistant":
        return messages
    if not prompt:
        raise InvalidRequest(f"{side}: begins with the answer, and no column holds its question (prompt)")
    return [*prompt, *messages]


def _with_system(messages: list[dict[str, Any]], row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages after the row's system prompt, unless they have their own."""
    system = row.get("system")
    if is_blank(system) or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": read_text(system, "system")}, *messages]


def _with_messages(row: Mapping[str, Any], messages: list[dict[str, Any]], read: set[str]) -> dict[str, Any]:
    others = {column: value for column, value in row.items() if column not in {*read, "messages"}}
    return {"messages": messages, **others}
