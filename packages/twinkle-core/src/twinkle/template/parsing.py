"""Parses one sampled turn into a message: reasoning, content and tool calls.

A `TurnForm` says how the model writes these; white space around its markers is optional. Parsing never fails: a call
that can't be read stays in the content, and the problem is reported beside the message.

For what follows a turn, see `continuation`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeGuard, cast

from twinkle.data_format import Message
from twinkle.data_format.messages import FunctionCall, ToolCall
from twinkle.template.strict_json import DECODER, decoded
from twinkle.template.turn_forms import CallForm, JsonBody, NamedBody, ReasoningForm, TaggedBody, TurnForm


@dataclass(frozen=True)
class ParsedTurn:
    """A parsed assistant turn.

    Attributes:
        message: role "assistant" and `content`; `reasoning_content` and `tool_calls` if there are any. Arguments of
            calls are objects.
        problems: one sentence for each call that could not be read, suitable for showing to the model; such a call's
            text is in the content.
    """

    message: Message
    problems: tuple[str, ...] = ()


def parse_turn(text: str, form: TurnForm, tools: Sequence[Mapping[str, Any]] | None = None) -> ParsedTurn:
    """Parse one assistant turn.

    Args:
        text: as sampled, special tokens included.
        form: how the model writes a turn.
        tools: JSON schemas of the functions, which say which parameters are text if calls write all of them as text;
            without one, text that is a valid JSON number, boolean, list or object becomes that.
    """
    text = _without_ends(text, form.ends)
    text = text.removeprefix(form.opening)
    reasoning, text = _split_reasoning(text, form.reasoning)
    calls: list[ToolCall] = []
    problems: list[str] = []
    if form.calls is not None:
        text, calls, problems = _split_calls(text, form.calls, form.ends, tools)
    message = Message(role="assistant", content=form.strip.apply(text))
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    return ParsedTurn(message, tuple(problems))


def _without_ends(text: str, ends: Sequence[str]) -> str:
    """The text without any trailing turn ends and white space."""
    while True:
        stripped = text.rstrip()
        end = next((end for end in ends if stripped.endswith(end)), None)
        if end is None:
            return text
        text = stripped.removesuffix(end)


def _split_reasoning(text: str, form: ReasoningForm | None) -> tuple[str, str]:
    """The reasoning and the rest; without an end marker, all is reasoning."""
    if form is None:
        return "", text
    opened = re.match(rf"\s*{form.open.pattern}", text)
    if opened is not None:
        text = _cut_start(text[opened.end() :], form.open.after)
    elif not form.given:
        return "", text
    closed = re.search(form.close.pattern, text)
    if closed is None:
        return form.strip.apply(text), ""
    reasoning = form.strip.apply(_cut_end(text[: closed.start()], form.close.before))
    return reasoning, _cut_start(text[closed.end() :], form.close.after)


def _cut_start(text: str, space: str) -> str:
    """The text without as much of `space` as it starts with."""
    while space and not text.startswith(space):
        space = space[:-1]
    return text[len(space) :]


def _cut_end(text: str, space: str) -> str:
    """The text without as much of `space` as it ends with."""
    while space and not text.endswith(space):
        space = space[1:]
    return text[: len(text) - len(space)]


class _Unreadable(Exception):
    """A call that can't be read; the message is the end of a sentence that says why."""


def _split_calls(
    text: str, form: CallForm, ends: Sequence[str], tools: Sequence[Mapping[str, Any]] | None
) -> tuple[str, list[ToolCall], list[str]]:
    """Content, calls, and the problems of unreadable calls."""
    if not form.open.text and not form.section_open.text:
        return _whole_turn_call(text, form, ends, tools)
    starts = _start_pattern(form)
    separator = re.compile(rf"\s*{form.separator.pattern}\s*{form.open.pattern}")
    content: list[str] = []
    calls: list[ToolCall] = []
    problems: list[str] = []
    position = 0
    start = starts.search(text)
    while start is not None:
        content.append(text[position : start.start()])
        try:
            call, position = _read_call(text, start.end(), form, tools)
        except _Unreadable as unreadable:
            problems.append(f"tool call {len(calls) + len(problems) + 1}: {unreadable}; write {form.example}")
            position = _end_of_unreadable(text, start.end(), form)
            content.append(text[start.start() : position])
        else:
            calls.append(call)
            following = separator.match(text, position) if form.separator.text else None
            if following is not None:
                start, position = following, following.start()
                continue
            closed = re.compile(rf"\s*{form.section_close.pattern}").match(text, position)
            position = closed.end() if closed and form.section_close.text else position
        start = starts.search(text, position)
    content.append(text[position:])
    return _joined(content, form, had_calls=bool(calls)), calls, problems


def _start_pattern(form: CallForm) -> re.Pattern[str]:
    if not form.open.text:
        return re.compile(form.section_open.pattern)
    section = rf"(?:{form.section_open.pattern}\s*)?" if form.section_open.text else ""
    return re.compile(section + form.open.pattern)


def _joined(content: Sequence[str], form: CallForm, had_calls: bool) -> str:
    """The content around calls, without the white space that separates it from them."""
    if not had_calls:
        return "".join(content)
    space = (
        form.section_open.before if form.section_open.text else form.section_open.before + form.open.before
    )
    first = _cut_end(content[0], space)
    rest = [piece.strip() for piece in content[1:]]
    return "\n".join(piece for piece in (first, *rest) if piece.strip())


def _end_of_unreadable(text: str, position: int, form: CallForm) -> int:
    """The end of an unreadable call: after its closing, or at the beginning of the next."""
    following = _start_pattern(form).search(text, position)
    limit = following.start() if following else len(text)
    closed = re.compile(form.close.pattern).search(text, position, limit) if form.close.text else None
    return closed.end() if closed else limit


def _whole_turn_call(
    text: str, form: CallForm, ends: Sequence[str], tools: Sequence[Mapping[str, Any]] | None
) -> tuple[str, list[ToolCall], list[str]]:
    """For calls without an opening marker: a call is the whole turn, or there is none.

    Without a marker, an answer in JSON looks much like a call, so JSON without a name is content, not an error.
    """
    # Llama-3.1 often writes a special token before a call, which its template does not.
    bare = text.lstrip()
    for end in ends:
        bare = bare.removeprefix(end).lstrip()
    if not isinstance(form.body, JsonBody) or not bare.startswith("{"):
        return text, [], []
    try:
        call, end = _read_call(bare, 0, form, tools)
        if bare[end:].strip():
            raise _Unreadable("text follows it, and a call has to be alone")
    except _Unreadable as unreadable:
        name, arguments = json.dumps(form.body.name), json.dumps(form.body.arguments)
        if not (name in bare and arguments in bare):
            return text, [], []
        return text, [], [f"tool call 1: {unreadable}; write {form.example} and nothing else"]
    return "", [call], []


def _read_call(
    text: str, position: int, form: CallForm, tools: Sequence[Mapping[str, Any]] | None
) -> tuple[ToolCall, int]:
    """A call whose body begins at `position`, and the end of its closing.

    Raises:
        _Unreadable: if it can't be read.
    """
    position = _skip_space(text, position)
    if isinstance(form.body, JsonBody):
        call, position = _read_json_call(text, position, form.body)
    elif isinstance(form.body, NamedBody):
        call, position = _read_named_call(text, position, form.body)
    else:
        call, position = _read_tagged_call(text, position, form, form.body, tools)
    closed = re.compile(rf"\s*{form.close.pattern}").match(text, position) if form.close.text else None
    if closed is not None:
        return call, closed.end()
    # A stop string or the token limit may have cut the closing off; the call is complete.
    rest = "".join(text[position:].split())
    if form.close.text and not "".join(form.close.text.split()).startswith(rest):
        raise _Unreadable(f"expected {form.close.text!r} after it, found {text[position:][:20]!r}")
    return call, len(text) if form.close.text else position


def _read_json_call(text: str, position: int, body: JsonBody) -> tuple[ToolCall, int]:
    outer, end = _read_object(text, position, "the call")
    fields = outer
    for key in body.path:
        inner: object = fields.get(key)
        fields = cast(dict[str, Any], inner) if isinstance(inner, dict) else {}
    id = outer.get(body.id) if body.id is not None else None
    return _tool_call(fields.get(body.name), fields.get(body.arguments), body.name, body.arguments, id), end


def _read_named_call(text: str, position: int, body: NamedBody) -> tuple[ToolCall, int]:
    name = re.compile(rf"([^\s<>{{}}\"]+)\s*{body.between.pattern}\s*").match(text, position)
    if name is None:
        raise _Unreadable(f"expected a name and {body.between.text!r}")
    arguments, end = _read_object(text, name.end(), "the arguments")
    return _tool_call(name[1], arguments, "name", "arguments"), end


def _read_tagged_call(
    text: str, position: int, form: CallForm, body: TaggedBody, tools: Sequence[Mapping[str, Any]] | None
) -> tuple[ToolCall, int]:
    name = re.compile(rf"([^\s<>{{}}\"]+)\s*{body.name_end.pattern}").match(text, position)
    if name is None:
        raise _Unreadable(f"expected a name, then {body.name_end.text or body.open.text!r}")
    schemas = _parameter_schemas(tools, name[1])
    opening = re.compile(rf"\s*{body.open.pattern}\s*([^\n<>]+?)\s*{body.key_end.pattern}")
    arguments: dict[str, Any] = {}
    position = name.end()
    while (opened := opening.match(text, position)) is not None:
        key = opened[1]
        closed = _closing_of_value(text, opened.end(), form, body)
        if closed is None:
            raise _Unreadable(f"parameter {key!r} has no {body.close.text!r}")
        value = _cut_start(text[opened.end() : closed.start()], body.key_end.after)
        arguments[key] = _typed(_cut_end(value, body.close.before), schemas.get(key))
        position = closed.end()
    return _tool_call(name[1], arguments, "name", "arguments"), position


def _closing_of_value(text: str, position: int, form: CallForm, body: TaggedBody) -> re.Match[str] | None:
    """The end of the value that begins at `position`.

    A value may contain the closing tag itself, and even the opening of a call. In order of preference: a closing with
    valid text after it before the next call begins, any closing before that, a closing with valid text after it
    anywhere, unless this call ends before.
    """
    following = _start_pattern(form).search(text, position)
    limit = following.start() if following else len(text)
    behind = "|".join(marker.pattern for marker in (body.open, form.close) if marker.text)
    in_order = re.compile(rf"{body.close.pattern}(?=\s*(?:{behind}|\Z))")
    closed = in_order.search(text, position, limit) or re.compile(body.close.pattern).search(
        text, position, limit
    )
    if closed is not None or re.compile(form.close.pattern).search(text, position, limit):
        return closed
    return in_order.search(text, position)


def _read_object(text: str, position: int, what: str) -> tuple[dict[str, Any], int]:
    try:
        value, end = DECODER.raw_decode(text, position)
        json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise _Unreadable(
            f"{what} is not valid JSON: {error.msg} at character {error.pos - position}"
        ) from error
    except RecursionError as error:
        raise _Unreadable(f"{what} is nested too deeply") from error
    except ValueError as error:  # NaN, infinities and lone surrogates
        raise _Unreadable(f"{what} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise _Unreadable(f"{what} is not a JSON object")
    return cast(dict[str, Any], value), end


def _tool_call(
    name: object, arguments: object, name_key: str, arguments_key: str, id: object = None
) -> ToolCall:
    if not isinstance(name, str) or not name:
        raise _Unreadable(f"it has no {name_key!r}")
    if isinstance(arguments, str):  # the OpenAI API's form
        arguments = decoded(arguments)
    if not isinstance(arguments, dict):
        raise _Unreadable(f"its {arguments_key!r} is missing or not a JSON object")
    function = FunctionCall(name=name, arguments=cast(dict[str, Any], arguments))
    if isinstance(id, str):
        return ToolCall(type="function", id=id, function=function)
    return ToolCall(type="function", function=function)


# Some templates write a non-text parameter as a Python literal, and models have learnt it from them.
_PYTHON_WORDS: Final[dict[str, object]] = {"True": True, "False": False, "None": None}
_JSON_TYPES: Final[dict[type, set[str]]] = {
    bool: {"boolean"},
    int: {"integer", "number"},
    float: {"number"},
    list: {"array"},
    dict: {"object"},
    type(None): {"null"},
}


def _typed(text: str, schema: object) -> object:
    """A parameter's value, given as text, in its schema's type: text unless the schema allows something else."""
    word = text.strip()
    value = _PYTHON_WORDS[word] if word in _PYTHON_WORDS else decoded(text)
    is_none = value is None and word in ("null", "None")
    if isinstance(value, str) or (value is None and not is_none):
        return text
    allowed = _allowed_types(schema)
    if not allowed:
        return text if is_none or word in _PYTHON_WORDS else value
    return value if _JSON_TYPES[type(value)] & allowed or "string" not in allowed else text


def _allowed_types(schema: object) -> set[str]:
    """The JSON types that a schema allows; empty if it leaves them open."""
    if not isinstance(schema, Mapping):
        return set()
    described = cast(Mapping[str, object], schema)
    kinds = described.get("type")
    allowed = {kind for kind in (kinds if _is_list(kinds) else [kinds]) if isinstance(kind, str)}
    for key in ("anyOf", "oneOf"):
        options = described.get(key)
        for option in options if _is_list(options) else []:
            allowed |= _allowed_types(option)
    return allowed


def _is_list(value: object) -> TypeGuard[list[object]]:
    return isinstance(value, list)


def _parameter_schemas(tools: Sequence[Mapping[str, Any]] | None, name: str) -> dict[str, Any]:
    """The schema of each parameter of a function; empty if there is no such function."""
    for tool in tools or ():
        function: object = tool.get("function", tool)
        if not isinstance(function, Mapping):
            continue
        described = cast(Mapping[str, Any], function)
        parameters: object = described.get("parameters")
        if described.get("name") != name or not isinstance(parameters, Mapping):
            continue
        properties: object = cast(Mapping[str, Any], parameters).get("properties")
        return dict(cast(Mapping[str, Any], properties)) if isinstance(properties, Mapping) else {}
    return {}


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position
