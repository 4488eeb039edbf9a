"""Rows in the forms that files and APIs give them: shown to a template as it wants them, or refused, never left out.

What is expected is what Transformers makes of the same row in the form that the template was written for; where a small
template stands for a real one's habit, its text is written out.
"""

import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from twinkle.data_format import NOT_TRAINED
from twinkle.protocol.errors import InvalidRequest
from twinkle.template import Template

Write = Callable[..., Path]

# Habits of real templates. Qwen2.5, Llama-3.1 and Mistral write arguments as JSON, Qwen3.5 and GLM one by one, DeepSeek
# as the text they are; Qwen3 asks which they are.
_TURNS = (
    "{% for m in messages %}{% if m.role in ('system', 'user', 'tool') %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "<|im_end|>\n{% elif m.role == 'assistant' %}<|im_start|>assistant\n{{ m.content or '' }}CALLS<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_EACH = "{% for c in m.tool_calls or [] %}{% set f = c.function or c %}[{{ f.name }} ARGUMENTS]{% endfor %}"
NO_CALLS = _TURNS.replace("CALLS", "")


def template_of(arguments: str) -> str:
    return _TURNS.replace("CALLS", _EACH.replace("ARGUMENTS", arguments))


AS_JSON = template_of("{{ f.arguments | tojson }}")
ONE_BY_ONE = template_of("{% for k, v in f.arguments | items %}<{{ k }}>{{ v }}{% endfor %}")
AS_TEXT = template_of("{{ '' ~ f.arguments }}")
EITHER = template_of(
    "{% if f.arguments is string %}{{ f.arguments }}{% else %}{{ f.arguments | tojson }}{% endif %}"
)


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **rest: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **rest}


def nested(arguments: Any) -> dict[str, Any]:
    return {"type": "function", "id": "call00001", "function": {"name": "f", "arguments": arguments}}


def flat(arguments: Any) -> dict[str, Any]:
    return {"name": "f", "arguments": arguments}


def called(call: dict[str, Any], content: Any = "") -> dict[str, Any]:
    return {"messages": [user("q"), assistant(content, tool_calls=[call])]}


@pytest.fixture
def make(write_tiny_tokenizer: Write, tmp_path: Path) -> Callable[..., Template]:
    def made(source: str, **options: Any) -> Template:
        return Template(write_tiny_tokenizer(tmp_path / "model"), chat_template=source, **options)

    return made


@pytest.mark.parametrize(
    ("source", "written"),
    [
        (AS_JSON, '[f {"city": "Zürich", "days": 3}]'),
        (ONE_BY_ONE, "[f <city>Zürich<days>3]"),
        (AS_TEXT, '[f {"city": "Zürich", "days": 3}]'),
        (EITHER, '[f {"city": "Zürich", "days": 3}]'),
    ],
)
@pytest.mark.parametrize("shape", [nested, flat])
@pytest.mark.parametrize("as_text", [False, True])
def test_arguments_are_written_once_whatever_form_they_came_in(
    make: Callable[..., Template],
    source: str,
    written: str,
    shape: Callable[[Any], dict[str, Any]],
    as_text: bool,
) -> None:
    template = make(source)
    arguments = {"city": "Zürich", "days": 3}
    given = json.dumps(arguments, ensure_ascii=False) if as_text else arguments
    row = called(shape(given))
    expected = f"<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n{written}<|im_end|>\n"
    assert template.render(row) == expected
    assert template.decode(template.encode(row)["input_ids"]) == expected
    assert pickle.loads(pickle.dumps(template)).render(row) == expected


def test_a_call_goes_on_after_it_was_sampled_whatever_form_it_came_in(make: Callable[..., Template]) -> None:
    template = make(AS_JSON)
    sampled = template.tokenizer.encode('[f {"a": 1}]<|im_end|>', add_special_tokens=False).ids
    for given in ({"a": 1}, '{"a": 1}'):
        row = called(nested(given))
        row["messages"].append({"role": "tool", "content": "r"})
        ids = template.continuation(row, 1, sampled)
        assert template.decode(ids) == "\n<|im_start|>tool\nr<|im_end|>\n<|im_start|>assistant\n"


def test_text_that_a_template_takes_as_it_is_stays_as_it_is(make: Callable[..., Template]) -> None:
    text = '{"b":1.0,"a":"\\u00fc"}'
    assert f"[f {text}]" in make(EITHER).render(called(nested(text)))
    assert f"[f {text}]" in make(AS_TEXT).render(called(nested(text)))


@pytest.mark.parametrize("source", [AS_JSON, EITHER, ONE_BY_ONE, AS_TEXT])
@pytest.mark.parametrize("nothing", [{}, "{}", "", None])
def test_no_arguments_are_an_empty_object(make: Callable[..., Template], source: str, nothing: Any) -> None:
    assert make(source).render(called(nested(nothing))) == make(source).render(called(nested({})))


@pytest.mark.parametrize("arguments", ["city: Paris", "[1]", '"x"', '{"a": NaN}', "{" * 20_000, [1], 5])
@pytest.mark.parametrize("source", [AS_JSON, EITHER])
def test_arguments_that_are_no_object_are_refused_by_their_place(
    make: Callable[..., Template], source: str, arguments: Any
) -> None:
    with pytest.raises(
        InvalidRequest, match=r"messages\[1\].tool_calls\[0\].function.arguments: expected an object"
    ):
        make(source).encode(called(nested(arguments)))


# As DeepSeek-R1's templates: a call is written only where the content is null, and then as text.
NULL_CONTENT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and m['content'] is none %}"
    "{% for c in m.tool_calls %}{{ c.function.name + ' ' + c.function.arguments }}{% endfor %}"
    "{% else %}{{ '' + m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
)


@pytest.mark.parametrize("content", ["", None])
def test_the_content_beside_a_call_is_what_shows_the_call(
    make: Callable[..., Template], content: Any
) -> None:
    text = make(NULL_CONTENT).render(called(nested({"a": 1}), content))
    assert text == '<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nf {"a": 1}<|im_end|>\n'


def test_a_turn_of_calls_as_datasets_name_it_is_an_assistants(make: Callable[..., Template]) -> None:
    said = {"role": "tool_call", "content": '{"name": "f", "arguments": {"a": 1}}'}
    row = {"messages": [user("q"), said, {"role": "tool_response", "content": "r"}]}
    as_assistant = called(nested({"a": 1}))["messages"]
    expected = make(AS_JSON).encode({"messages": [*as_assistant, {"role": "tool", "content": "r"}]})
    feature = make(AS_JSON).encode(row)
    assert feature["input_ids"].tolist() == expected["input_ids"].tolist()
    assert feature["labels"].tolist() == expected["labels"].tolist()


def test_a_call_under_its_older_name_is_one(make: Callable[..., Template]) -> None:
    said = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": 1}'}}
    row = {"messages": [user("q"), said]}
    assert make(AS_JSON).render(row) == make(AS_JSON).render(called(nested({"a": 1})))


@pytest.mark.parametrize("source", [AS_JSON, AS_JSON.replace("m.content or ''", "m.content")])
def test_an_empty_list_of_parts_is_no_words(make: Callable[..., Template], source: str) -> None:
    row = called(nested({"a": 1}), [])
    assert make(source).render(row) == make(source).render(called(nested({"a": 1}), ""))


# As Llama-3.1 and Mistral: tools are asked for by `is not none`.
TOOLS_IF_GIVEN = "{% if tools is not none %}Tools: {{ tools | tojson }}\n{% endif %}" + NO_CALLS


@pytest.mark.parametrize("nothing", [[], "", "[]", "null", np.array([]), float("nan"), None])
def test_no_tools_are_none_however_that_is_said(make: Callable[..., Template], nothing: Any) -> None:
    template, row = make(TOOLS_IF_GIVEN), {"messages": [user("q"), assistant("a")]}
    assert template.render({**row, "tools": nothing}) == template.render(row)


TEXT_ONLY = NO_CALLS  # Llama-3: a list would be written as Python has it
TEXT_OR_NOTHING = NO_CALLS.replace(
    "{{ m.content }}", "{% if m.content is string %}{{ m.content }}{% endif %}"
).replace("{{ m.content or '' }}", "{% if m.content is string %}{{ m.content }}{% endif %}")  # Qwen3
AS_LIST_IN_JSON = NO_CALLS.replace(
    "{{ m.content }}", "{{ m.content if m.content is string else m.content | tojson }}"
)
PARTS_ONLY = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)  # Idefics3
FIRST_PART_ONLY = PARTS_ONLY.replace("in m.content %}", "in [m.content[0]] %}")  # LLaVA-NeXT
EITHER_CONTENT = PARTS_ONLY.replace(
    "{% for p in", "{% if m.content is string %}{{ m.content }}{% else %}{% for p in"
).replace("{% endfor %}<|im_end|>", "{% endfor %}{% endif %}<|im_end|>")


@pytest.mark.parametrize(
    "source", [TEXT_ONLY, TEXT_OR_NOTHING, AS_LIST_IN_JSON, PARTS_ONLY, FIRST_PART_ONLY, EITHER_CONTENT]
)
@pytest.mark.parametrize("as_parts", [False, True])
def test_content_is_shown_as_text_and_as_a_list_of_parts(
    make: Callable[..., Template], source: str, as_parts: bool
) -> None:
    def content(*texts: str) -> Any:
        parts = [{"type": "text", "text": text, "image_url": None} for text in texts]
        return parts if as_parts else "".join(texts)

    row = {
        "messages": [
            {"role": "system", "content": content("s")},
            user(content("q ", "q")),
            assistant(content("a", "b")),
        ]
    }
    expected = "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq q<|im_end|>\n<|im_start|>assistant\nab<|im_end|>\n"
    template = make(source)
    assert template.render(row) == expected
    feature = template.encode(row)
    assert template.decode(feature["labels"][feature["labels"] != NOT_TRAINED]) == "ab<|im_end|>"


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            {"type": "image_url", "image_url": {"url": "x"}},
            r"content\[0\]: a part of type 'image_url'; only text",
        ),
        ({"type": "image"}, r"content\[0\]: a part of type 'image'; only text"),
        ({"type": "text", "text": None}, r"content\[0\].text: expected text, got nothing"),
        ({"type": "text", "text": ["a"]}, r"content\[0\].text: expected text, got list"),
    ],
)
def test_parts_that_are_no_text_are_refused_by_name(
    make: Callable[..., Template], part: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        make(EITHER_CONTENT).encode({"messages": [user([part]), assistant("a")]})


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("human", "user"),
        ("gpt", "assistant"),
        ("model", "assistant"),
        ("observation", "tool"),
        ("tool_response", "tool"),
    ],
)
def test_roles_go_by_their_usual_names(make: Callable[..., Template], name: str, role: str) -> None:
    rows = [
        {"messages": [user("q"), {"role": who, "content": "xyz"}, assistant("a")]} for who in (name, role)
    ]
    assert make(AS_JSON).render(rows[0]) == make(AS_JSON).render(rows[1])


@pytest.mark.parametrize("role", ["developer", "User", "function", "critic"])
def test_a_role_that_the_template_leaves_out_is_refused_by_its_place(
    make: Callable[..., Template], role: str
) -> None:
    template = make(AS_JSON)
    row = {"messages": [user("q"), {"role": role, "content": "a"}, assistant("a a")]}
    for method in (template.encode, template.render):
        with pytest.raises(
            InvalidRequest, match=rf"messages\[1\].role: .* shows nothing of this message .* '{role}'"
        ):
            method(row)
    shown = make("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    assert shown.render(row) == f"user: q\n{role}: a\nassistant: a a\n"


def test_a_place_that_the_template_leaves_out_is_refused(make: Callable[..., Template]) -> None:
    first_only = NO_CALLS.replace(
        "{% for m in messages %}", "{% for m in messages if m.role != 'system' or loop.index0 == 0 %}", 1
    ).replace("loop.index0 == 0", "m == messages[0]")
    system = {"role": "system", "content": "s"}
    later = {"role": "system", "content": "t"}
    make(first_only).encode({"messages": [system, user("q"), assistant("a")]})
    with pytest.raises(InvalidRequest, match=r"messages\[2\].role: .* at this place"):
        make(first_only).encode({"messages": [system, user("q"), later, assistant("a")]})


@pytest.mark.parametrize("content", ["", "let me see"])
def test_calls_under_a_template_that_knows_none_are_refused(
    make: Callable[..., Template], content: str
) -> None:
    with pytest.raises(InvalidRequest, match=r"messages\[1\].tool_calls: .* shows nothing of the calls"):
        make(NO_CALLS).encode(called(nested({"a": 1}), content))


def test_a_second_call_under_a_template_that_shows_one_is_refused(make: Callable[..., Template]) -> None:
    # gpt-oss's
    one = AS_JSON.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")
    both = [nested({"a": 1}), nested({"a": 2})]
    with pytest.raises(InvalidRequest, match=r"messages\[1\].tool_calls\[1\]: .* shows nothing of this call"):
        make(one).encode({"messages": [user("q"), assistant("", tool_calls=both)]})


# What templates do on purpose: fold the system prompt into the question, strip, leave out earlier reasoning, drop the
# words beside a call.
FOLDING = (
    "{% if messages[0].role == 'system' %}{% set first = messages[0].content ~ '\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}<|im_start|>{{ m.role }}\n"
    "{{ (first if loop.first else '') }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% else %}"
    "{% if m.reasoning_content and loop.last %}{{ m.reasoning_content }}|{% endif %}{{ m.content | trim }}{% endif %}"
    "<|im_end|>\n{% endfor %}"
)


def test_what_a_template_folds_strips_and_leaves_out_on_purpose_is_let_through(
    make: Callable[..., Template],
) -> None:
    messages = [
        {"role": "system", "content": " be brief "},
        user(" q "),
        assistant("", reasoning_content="early"),
        user("   "),
        assistant("words", tool_calls=[nested({"a": 1})]),
        {"role": "tool", "content": ""},
        assistant("", reasoning_content="late"),
    ]
    text = make(FOLDING).render({"messages": messages})
    assert " be brief \nq<" in text and "early" not in text and "words" not in text and "late|" in text


def test_what_a_template_writes_in_capitals_is_shown(make: Callable[..., Template]) -> None:
    row = {"messages": [user("q"), assistant("a")]}
    assert make("{% for m in messages %}[{{ m.content | upper }}]{% endfor %}").render(row) == "[Q][A]"


# Mistral's: the system prompt stands in the last question, where that is the last message.
SYSTEM_AT_THE_END = (
    "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}[{{ messages[0].content ~ ': ' if loop.last "
    "and messages[0].role == 'system' else '' }}{{ m.content }}]{% else %}{{ m.content }}<|im_end|>{% endif %}"
    "{% endfor %}"
)


def test_a_system_prompt_that_is_for_sampling_only_is_warned_of_once(
    make: Callable[..., Template], caplog: pytest.LogCaptureFixture
) -> None:
    template = make(SYSTEM_AT_THE_END)
    row = {"messages": [{"role": "system", "content": "s"}, user("q"), assistant("a")]}
    with caplog.at_level(logging.WARNING):
        assert template.render(row) == "[q]a<|im_end|>"
        template.encode({"messages": [*row["messages"], user("r"), assistant("b")]})
    assert [record.message for record in caplog.records if "before an answer only" in record.message]
    assert len(caplog.records) == 1


def trained(template: Template, messages: list[dict[str, Any]]) -> str:
    labels = template.encode({"messages": messages})["labels"]
    return template.decode(labels[labels != NOT_TRAINED])


MARKED = NO_CALLS.replace("{{ m.content or '' }}", "{% generation %}{{ m.content }}").replace(
    "<|im_end|>\n{% endif %}{% endfor %}", "<|im_end|>{% endgeneration %}\n{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("source", [NO_CALLS, MARKED])
@pytest.mark.parametrize(
    "mark",
    [{"weight": 0}, {"loss": False}, {"trainable": False}, {"train": np.bool_(False)}, {"loss_scale": 0.0}],
)
def test_a_message_that_is_marked_is_not_trained_on(
    make: Callable[..., Template], source: str, mark: dict[str, Any]
) -> None:
    messages = [user("p"), assistant("a"), user("q"), assistant("b", **mark), user("r"), assistant("c")]
    assert trained(make(source), messages) == "a<|im_end|>c<|im_end|>"
    assert trained(make(source), [*messages[:-1], assistant("c", **mark)]) == "a<|im_end|>"
    last = make(source, train_on="last_assistant")
    assert trained(last, messages) == "c<|im_end|>" and trained(last, messages[:4]) == ""
    ids = make(source).encode({"messages": messages})["input_ids"]
    unmarked = [{"role": message["role"], "content": message["content"]} for message in messages]
    assert ids.tolist() == make(source).encode({"messages": unmarked})["input_ids"].tolist()


def test_where_all_is_trained_on_a_marked_answer_is_not(make: Callable[..., Template]) -> None:
    template = make(NO_CALLS, train_on="all")
    messages = [user("p"), assistant("a", weight=0), user("q"), assistant("b", weight=1)]
    everything = template.render({"messages": messages})
    assert trained(template, messages) == everything.replace("a<|im_end|>", "", 1)
    with pytest.raises(
        InvalidRequest, match=r"messages\[0\]: marked as not to be trained on, and train_on='all'"
    ):
        template.encode({"messages": [user("p") | {"loss": False}, assistant("a")]})


@pytest.mark.parametrize(
    "mark", [{"weight": 1}, {"loss": True}, {"trainable": None}, {"train": True, "weight": 1.0}]
)
def test_marks_that_say_yes_change_nothing(make: Callable[..., Template], mark: dict[str, Any]) -> None:
    assert trained(make(NO_CALLS), [user("p") | {"loss": False}, assistant("a", **mark)]) == "a<|im_end|>"


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ({"weight": 0.5}, r"messages\[1\].weight: 0.5; allowed are 0 or false"),
        ({"loss": "no"}, r"messages\[1\].loss: 'no'; allowed are 0 or false"),
        ({"weight": -1}, r"messages\[1\].weight: -1; allowed"),
        ({"weight": 0, "loss": True}, r"messages\[1\]: weight=0, loss=True contradict each other"),
    ],
)
def test_marks_that_are_neither_yes_nor_no_are_refused_by_name(
    make: Callable[..., Template], mark: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        make(NO_CALLS).encode({"messages": [user("p"), assistant("a", **mark)]})


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "w",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@pytest.mark.network
def test_qwen3_gets_calls_in_all_forms_as_transformers_would_have_them(real_tokenizers: ModuleType) -> None:
    folder = real_tokenizers.qwen3_tokenizer_dir()
    template, tokenizer = Template(folder), AutoTokenizer.from_pretrained(folder)

    def messages(call: dict[str, Any]) -> list[dict[str, Any]]:
        result = {"role": "tool", "content": "sun", "tool_call_id": "call00001"}
        return [user("Weather?"), assistant("", tool_calls=[call]), result, assistant("It is sunny.")]

    expected = tokenizer.apply_chat_template(
        messages(nested({"city": "Zürich"})), tools=[WEATHER], return_dict=False
    )
    for shape in (nested, flat):
        for arguments in ({"city": "Zürich"}, '{"city": "Zürich"}'):
            row = {"messages": messages(shape(arguments)), "tools": [WEATHER]}
            assert template.encode(row)["input_ids"].tolist() == expected


@pytest.mark.network
@pytest.mark.parametrize("model", ["qwen3", "llama31", "smollm2"])
def test_real_templates_get_parts_roles_and_no_tools_as_transformers_would_have_them(
    real_tokenizers: ModuleType, model: str
) -> None:
    folders = {
        "qwen3": real_tokenizers.qwen3_tokenizer_dir,
        "llama31": real_tokenizers.llama31_tokenizer_dir,
        "smollm2": real_tokenizers.smollm2_dir,
    }
    folder = folders[model]()
    template, tokenizer = Template(folder), AutoTokenizer.from_pretrained(folder)
    usual = [user("Who are you?"), assistant("I am My Model.")]
    expected = tokenizer.apply_chat_template(usual, return_dict=False)
    parts = [{"type": "text", "text": "I am "}, {"type": "text", "text": "My Model."}]
    row = {"messages": [{"role": "human", "content": "Who are you?"}, assistant(parts)], "tools": []}
    feature = template.encode(row)
    assert feature["input_ids"].tolist() == expected
    assert feature["labels"].tolist() == template.encode({"messages": usual})["labels"].tolist()
    if model == "qwen3":  # the others show any role by its name
        with pytest.raises(InvalidRequest, match="shows nothing of this message"):
            template.encode({"messages": [{"role": "User", "content": "q"}, *usual]})
    else:
        with pytest.raises(InvalidRequest, match="shows nothing of the calls"):
            template.encode(called(nested({"a": 1})))
