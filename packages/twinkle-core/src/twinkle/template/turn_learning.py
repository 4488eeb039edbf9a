r"""Infers how a model writes its turns from its chat template.

The model's name plays no role: a message whose parts are unique words is rendered, and the text around each word is the
format of that part. Three formats of calls are understood:

- a JSON object, alone or in a wrapper: `<tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>` (Hermes, Qwen3),
  `{"name": ..., "parameters": {...}}` as the whole turn (Llama-3.1), `[TOOL_CALLS] [{...}, {...}]` (Mistral);
- a name, then its arguments as a JSON object (DeepSeek);
- a name, then each parameter in tags of its own: `<function=NAME>\n<parameter=KEY>\nVALUE\n</parameter>` (Qwen3-Coder).
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

from twinkle.data_format import Message
from twinkle.data_format.messages import FunctionCall, ToolCall
from twinkle.template.conversation import read_conversation
from twinkle.template.labels import assistant_turns
from twinkle.template.rendering import ChatTemplate, RenderingFailed
from twinkle.template.strict_json import DECODER, decoded
from twinkle.template.turn_forms import (
    CallBody,
    CallForm,
    JsonBody,
    Marker,
    NamedBody,
    ReasoningForm,
    Strip,
    TaggedBody,
    TurnForm,
)


@dataclass(frozen=True)
class _SampleCall:
    """A call made of words that no template holds. Ids have nine characters, as Mistral's templates demand."""

    id: str
    name: str
    arguments: tuple[tuple[str, str], tuple[str, str]]

    def as_message(self, arguments_as_text: bool) -> ToolCall:
        arguments = dict(self.arguments)
        return ToolCall(
            type="function",
            id=self.id,
            function=FunctionCall(
                name=self.name, arguments=json.dumps(arguments) if arguments_as_text else arguments
            ),
        )

    def is_arguments(self, value: object) -> bool:
        return (decoded(value) if isinstance(value, str) else value) == dict(self.arguments)


_CONTENT: Final = "zqcontentqz"
_REASONING: Final = "zqreasonqz"
_CALLS: Final = (
    _SampleCall("zqcall001", "zqfirstqz", (("zqkeyaqz", "zqvalueaqz"), ("zqkeybqz", "zqvaluebqz"))),
    _SampleCall("zqcall002", "zqsecondqz", (("zqkeycqz", "zqvaluecqz"), ("zqkeydqz", "zqvaluedqz"))),
)
_QUESTION: Final = Message(role="user", content="zqquestionqz")

# Markers are compared in these units (whole tags, the beginning of a tag, white space, single characters), since `</a>`
# and `</b>` share their first two characters and yet are unrelated. Mistral's tags are in square brackets and capitals.
_PIECES: Final = re.compile(r"<[^<>]*>|<[^<>\s]*|\[/?[A-Z_]+\]|\s+|[^<\s]")


def learn_turn_form(template: ChatTemplate, special_tokens: Sequence[str] = ()) -> TurnForm:
    """How the model of `template` writes a turn.

    A part that the template does not render, or refuses, counts as unsupported.

    Args:
        special_tokens: of the tokenizer; those that no part of a turn uses are cut off a turn's end.
    """
    special_tokens = [token for token in special_tokens if token]
    plain = _turn(template, content=_CONTENT)
    opening, shown, content_end = plain.partition(_CONTENT)
    if not shown:
        return TurnForm("", "", "", tuple(special_tokens), Strip(), None, None)
    reasoning = _learn_reasoning(template)
    calls, calls_end = _learn_calls(template, content_end) or (None, content_end)
    written = "".join(marker.text for marker in _markers(reasoning, calls))
    special = [token for token in special_tokens if token not in written]
    ends = {end for end in (content_end, content_end.strip(), calls_end, calls_end.strip(), *special) if end}
    if reasoning is not None and (reasoning.open.text in opening or reasoning.close.text in opening):
        opening = ""
    return TurnForm(
        opening=opening,
        content_end=content_end,
        calls_end=calls_end,
        ends=tuple(sorted(ends, key=len, reverse=True)),
        strip=_learn_strip(template, "content", _CONTENT),
        reasoning=reasoning,
        calls=calls,
    )


def _markers(reasoning: ReasoningForm | None, calls: CallForm | None) -> list[Marker]:
    markers = [reasoning.open, reasoning.close] if reasoning is not None else []
    if calls is not None:
        markers += [calls.section_open, calls.open, calls.close, calls.separator, calls.section_close]
        if isinstance(calls.body, NamedBody):
            markers += [calls.body.between]
        elif isinstance(calls.body, TaggedBody):
            markers += [calls.body.name_end, calls.body.open, calls.body.key_end, calls.body.close]
    return markers


def _turn(template: ChatTemplate, **message: Any) -> str:
    """The turn as the template writes it after a question; empty if the template refuses it, or the turn can't be
    found.
    """
    functions = [
        {
            "type": "function",
            "function": {
                "name": call.name,
                "description": "",
                "parameters": {
                    "type": "object",
                    "properties": {key: {"type": "string"} for key, _ in call.arguments},
                },
            },
        }
        for call in _CALLS
    ]
    said = {"role": "assistant", **message}
    conversation = read_conversation({"messages": [_QUESTION, said], "tools": functions})
    try:
        [turn] = assistant_turns(template, conversation)
        text = template.render(conversation)
        return "".join(text[span.start : span.end] for span in turn.spans)
    except RenderingFailed:
        return ""


def _render(template: ChatTemplate, *messages: Mapping[str, Any], prompt: bool = False) -> str:
    try:
        return template.render(read_conversation({"messages": [_QUESTION, *messages]}), prompt)
    except RenderingFailed:
        return ""


def _learn_reasoning(template: ChatTemplate) -> ReasoningForm | None:
    # If the prompt opens the thinking, the turn does not contain the opening, so use the whole text.
    said = {"role": "assistant", "content": _CONTENT, "reasoning_content": _REASONING}
    question, prompt = _render(template), _render(template, prompt=True)
    text = _after(question, _render(template, said))
    generation = _after(question, prompt)
    head, shown, rest = text.partition(_REASONING)
    between, answered, _ = rest.partition(_CONTENT)
    if not shown or not answered:
        return _learn_given_reasoning(template, question, generation)
    own = head[len(_common_prefix(head, generation)) :].strip() or _PIECES.findall(head.strip() or " ")[-1]
    close = _marker(between)
    if not own.strip() or not close.text:
        return None
    return ReasoningForm(
        open=Marker(own, after=_marker(head).after),
        close=close,
        given=prompt.rstrip().endswith(own),
        strip=_learn_strip(template, "reasoning_content", _REASONING, content=_CONTENT),
    )


def _learn_given_reasoning(template: ChatTemplate, question: str, generation: str) -> ReasoningForm | None:
    """For templates that never render reasoning although their generation prompt opens it (DeepSeek-R1's).

    The template doesn't say how such a model ends it, so only a tag, which implies its closing tag, is understood.
    """
    text = _after(question, _render(template, {"role": "assistant", "content": _CONTENT}))
    head, shown, _ = text.partition(_CONTENT)
    tag = re.fullmatch(r"<(\w+)>", generation[len(_common_prefix(head, generation)) :].strip())
    if not shown or tag is None:
        return None
    close = Marker(f"</{tag[1]}>", before="\n", after="\n\n")
    return ReasoningForm(Marker(tag[0], after="\n"), close, given=True, strip=Strip(None, None))


def _learn_strip(template: ChatTemplate, key: str, word: str, **rest: Any) -> Strip:
    """The characters stripped from the part `key`, found by trying each kind of white space around the word."""
    left, _, right = _turn(template, **rest, **{key: word}).partition(word)
    kinds = " \n\t"
    stripped_left = stripped_right = ""
    for kind in kinds:
        before, shown, after = _turn(template, **rest, **{key: f"{kind}{word}{kind}"}).partition(word)
        stripped_left += kind if shown and before == left else ""
        stripped_right += kind if shown and after == right else ""
    return Strip(
        None if stripped_left == kinds else stripped_left, None if stripped_right == kinds else stripped_right
    )


def _learn_calls(template: ChatTemplate, content_end: str) -> tuple[CallForm, str] | None:
    """The form of calls, and the end of a turn with calls."""
    first, second = _CALLS
    for content in (_CONTENT, ""):
        for as_text in (False, True):
            calls = [call.as_message(as_text) for call in _CALLS]
            single = _turn(template, content=content, tool_calls=calls[:1])
            found = _find_call(single, first)
            if found is None:
                continue
            start, end, body = found
            if content and content not in single[:start]:
                break  # it renders calls without the content beside them
            before = _before_calls(template, single[:start], content, content_end)
            rest, calls_end = _split_end(single[end:], content_end)
            double = _turn(template, content=content, tool_calls=calls)
            one, two = _find_call(double, first), _find_call(double, second)
            gap = double[one[1] : two[0]] if one and two else None
            return _call_form(before, body, rest, gap, as_text), calls_end
    return None


def _call_form(before: str, body: CallBody, rest: str, gap: str | None, as_text: bool) -> CallForm:
    """The form of calls.

    Args:
        before: the text before the first call.
        body: the form of a call.
        rest: the text after the last call, without the turn's end.
        gap: the text between two calls; None if the template allows only one.
    """
    close = rest if gap is None else _common_prefix(gap, rest)
    between = "" if gap is None else gap[len(close) :]
    opening = before if gap is None else _common_suffix(before, between)
    # White space before the first call separates it from the content, even if calls have no opening.
    return CallForm(
        section_open=_marker(before[: len(before) - len(opening)]),
        open=_marker(opening),
        body=body,
        close=_marker(close),
        separator=_marker(between[: len(between) - len(opening)]),
        section_close=_marker(rest[len(close) :]),
        arguments_as_text=as_text,
    )


def _before_calls(template: ChatTemplate, before: str, content: str, content_end: str) -> str:
    """The part of the text before the first call that belongs to the calls: not content, nor any turn's beginning."""
    if content:
        return before.rpartition(content)[2]
    empty = _turn(template, content="").removesuffix(content_end)
    return before[len(_common_prefix(before, empty)) :]


def _split_end(after: str, content_end: str) -> tuple[str, str]:
    """The text after the last call, without the turn's end, and that end.

    If a turn with calls ends differently from others, its end is a token of its own: the last piece.
    """
    if content_end and after.endswith(content_end):
        return after.removesuffix(content_end), content_end
    last = re.search(r"<[^<>]+>$", after) if content_end else None
    return (after[: last.start()], last[0]) if last else (after, "")


def _find_call(text: str, call: _SampleCall) -> tuple[int, int, CallBody] | None:
    """The beginning, end and form of a call's body."""
    return _find_json(text, call) or _find_tagged(text, call)


def _find_json(text: str, call: _SampleCall) -> tuple[int, int, CallBody] | None:
    key_at = text.find(call.arguments[0][0])
    for match in re.finditer(r"\{", text[: max(key_at, 0)]):
        start = match.start()
        try:
            value, end = DECODER.raw_decode(text, start)
        except ValueError:
            continue
        if call.is_arguments(value):
            name_at = text.rfind(call.name, 0, start)
            if name_at <= 0:
                return None
            return name_at, end, NamedBody(_marker(text[name_at + len(call.name) : start]))
        body = _json_body(value, call)
        if body is not None:
            return start, end, body
    return None


def _json_body(value: Mapping[str, Any], call: _SampleCall, path: tuple[str, ...] = ()) -> JsonBody | None:
    name = next((key for key, item in value.items() if item == call.name), None)
    arguments = next((key for key, item in value.items() if call.is_arguments(item)), None)
    id = next((key for key, item in value.items() if item == call.id), None)
    if name is not None and arguments is not None:
        return JsonBody(path, name, arguments, id)
    for key, item in value.items():
        if isinstance(item, dict):
            inner = _json_body(cast(dict[str, Any], item), call, (*path, key))
            if inner is not None:
                return JsonBody(inner.path, inner.name, inner.arguments, id)
    return None


def _find_tagged(text: str, call: _SampleCall) -> tuple[int, int, CallBody] | None:
    words = [call.name, *(word for argument in call.arguments for word in argument)]
    starts: list[int] = []
    for word in words:
        starts.append(text.find(word, starts[-1] if starts else 0))
        if starts[-1] < 0:
            return None
    ends = [start + len(word) for start, word in zip(starts, words, strict=True)]
    after_name, after_key, after_value = (text[ends[i] : starts[i + 1]] for i in range(3))
    opening = _common_suffix(after_name, after_value)
    close = _common_prefix(after_value, text[ends[4] :])
    body = TaggedBody(
        name_end=_marker(after_name[: len(after_name) - len(opening)]),
        open=_marker(opening),
        key_end=_marker(after_key),
        close=_marker(close),
    )
    # Without tags, as in f(x="y"), calls can't be recognised reliably.
    if not all("<" in marker.text for marker in (body.open, body.close)) or not body.key_end.text:
        return None
    return starts[0], ends[4] + len(close), body


def _after(beginning: str, text: str) -> str:
    """`text` without the prefix that it shares with `beginning`."""
    return text[len(beginning if text.startswith(beginning) else _common_prefix(beginning, text)) :]


def _marker(text: str) -> Marker:
    stripped = text.strip()
    if not stripped:
        return Marker("", before=text)
    at = text.index(stripped)
    return Marker(stripped, text[:at], text[at + len(stripped) :])


def _common_prefix(first: str, second: str) -> str:
    return "".join(_common(_PIECES.findall(first), _PIECES.findall(second)))


def _common_suffix(first: str, second: str) -> str:
    return "".join(_common(_PIECES.findall(first)[::-1], _PIECES.findall(second)[::-1])[::-1])


def _common(first: list[str], second: list[str]) -> list[str]:
    pairs = zip(first, second, strict=False)
    differ = next((index for index, (one, two) in enumerate(pairs) if one != two), None)
    return first[: min(len(first), len(second)) if differ is None else differ]
