"""Sampled turns read back as messages, in the forms that chat templates teach: what was put in comes out."""

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from twinkle.template import Template

# Reasoning that the prompt opens, and a tag for each parameter, as Qwen3-Coder and Qwen3.5 have them.
TAGGED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "<think>\n{{ m.reasoning_content | default('') | trim }}\n</think>\n\n{{ m.content | trim }}"
    "{% for c in m.tool_calls | default([]) %}"
    "{{ ('\n\n' if m.content | trim else '') if loop.first else '\n' }}<tool_call>\n<function={{ c.function.name }}>\n"
    "{% for k, v in c.function.arguments | items %}<parameter={{ k }}>\n"
    "{{ v if v is string else v | tojson }}\n</parameter>\n{% endfor %}</function>\n</tool_call>{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
# The same in GLM's tags, whose names end with nothing but white space.
KEYS_AND_VALUES = (
    TAGGED.replace("<function={{ c.function.name }}>", "{{ c.function.name }}")
    .replace("<parameter={{ k }}>\n", "<arg_key>{{ k }}</arg_key>\n<arg_value>")
    .replace("\n</parameter>", "</arg_value>")
    .replace("</function>\n", "")
)
# A JSON call is the whole turn, its content is not shown, and there may be one only; as Llama-3.1 has it.
WHOLE_TURN = (
    "{% for m in messages %}[{{ m.role }}]\n\n{% if m.tool_calls %}"
    "{% if m.tool_calls | length > 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
    "{% set call = m.tool_calls[0].function %}"
    '{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}'
    "{% else %}{{ m.content | trim }}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n\n{% endif %}"
)
# A list of calls with ids of nine characters, and no generation prompt; as Mistral has it.
LISTED = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]{% elif m.tool_calls %}[TOOL_CALLS] ["
    "{% for c in m.tool_calls %}{% if c.id | length != 9 %}{{ raise_exception('ids') }}{% endif %}"
    '{{ (c.function | tojson)[:-1] }}, "id": "{{ c.id }}"}{{ "]" if loop.last else ", " }}{% endfor %}<|im_end|>'
    "{% else %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
# The name before the arguments, which have to be JSON text; reasoning that only the prompt shows; as DeepSeek has them.
NAMED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<A>{{ m.content }}{% for c in m.tool_calls | default([]) %}"
    "{{ '<calls>' if loop.first else '\n' }}<call>function<sep>{{ c.function.name }}\n```json\n"
    "{{ '' + c.function.arguments }}\n```</call>{{ '</calls>' if loop.last }}{% endfor %}<|im_end|>"
    "{% else %}<U>{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<A><think>\n{% endif %}"
)
# All that `tojson` has to say about a call.
DUMPED = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% for c in m.tool_calls | default([]) %}<call>"
    "{{ c | tojson }}</call>{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
# Hermes' calls with an end of their own, and the header left to the model.
OWN_END = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% for c in m.tool_calls | default([]) %}"
    "\n<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "{{ '<|eom|>' if m.tool_calls else '<|eot|>' }}\n{% endfor %}"
)
JSON_FORMS = {"whole turn": WHOLE_TURN, "listed": LISTED, "dumped": DUMPED, "own end": OWN_END}

QUESTION = {"role": "user", "content": "q"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {
                "zip": {"type": "string"},
                "days": {"type": "integer"},
                "exact": {"type": "boolean"},
                "unit": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "place": {"type": ["object", "null"]},
            },
        },
    },
}


def call(name: str, id: str | None = None, **arguments: Any) -> dict[str, Any]:
    known = {"id": id} if id else {}
    return {"type": "function", **known, "function": {"name": name, "arguments": arguments}}


def assistant(content: str = "", *calls: dict[str, Any], reasoning: str = "") -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if reasoning:
        message["reasoning_content"] = reasoning
    return {**message, "tool_calls": list(calls)} if calls else message


def turn(template: Template, message: dict[str, Any]) -> str:
    """What the template has the assistant say after the generation prompt."""
    prompt = template.render({"messages": [QUESTION]}, add_generation_prompt=True)
    text = template.render({"messages": [QUESTION, message]})
    assert text.startswith(prompt)
    return text[len(prompt) :]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, write_tiny_tokenizer: Callable[..., Path]) -> Callable:
    folder = write_tiny_tokenizer(tmp_path_factory.mktemp("tiny"))
    made: dict[str | None, Template] = {}

    def get(source: str | None = None) -> Template:
        if source not in made:
            made[source] = Template(folder, chat_template=source)
        return made[source]

    return get


@pytest.fixture(scope="module")
def qwen3(real_tokenizers: ModuleType) -> Template:
    return Template(real_tokenizers.qwen3_tokenizer_dir())


@pytest.fixture(scope="module")
def reference(real_tokenizers: ModuleType) -> Any:
    """Qwen3's tokenizer in Transformers."""
    return AutoTokenizer.from_pretrained(real_tokenizers.qwen3_tokenizer_dir())


MESSAGES = [
    assistant("Hello there 😀."),
    assistant(""),
    assistant("", call("f", x=1)),
    assistant(
        "", call("f", a='"quoted" {', b="two\nlines\\", c=[1, {"d": [2.5, None, True]}], ü="ß</tool_call>")
    ),
    assistant("", call("f")),
]
SEVERAL = [
    assistant("", call("f", x=1), call("g", y="}"), call("f", x=1)),
    assistant("Let me look.\nAt both.", call("f", x=1), call("g")),
]
REASONED = [
    assistant("4", reasoning="two\n\nand two"),
    assistant("Let me look.", call("f", x=1), call("g"), reasoning="I need it"),
    assistant("", call("f", x=1), reasoning="I need it"),
]


@pytest.mark.network
@pytest.mark.parametrize("message", MESSAGES + SEVERAL + REASONED)
def test_qwen3_reads_what_transformers_writes(
    qwen3: Template, reference: Any, message: dict[str, Any]
) -> None:
    prompt = reference.apply_chat_template([QUESTION], add_generation_prompt=True, return_dict=False)
    whole = reference.apply_chat_template([QUESTION, message], return_dict=False)
    for sampled in (whole[len(prompt) :], np.array(whole[len(prompt) :])):
        parsed = qwen3.parse(sampled)
        assert parsed.message == message
        assert parsed.problems == ()


@pytest.mark.network
def test_qwen3_with_thinking_off_reads_turns_without_any(real_tokenizers: ModuleType) -> None:
    template = Template(
        real_tokenizers.qwen3_tokenizer_dir(), chat_template_kwargs={"enable_thinking": False}
    )
    for message in MESSAGES + SEVERAL:
        assert template.parse(turn(template, message)).message == message
    assert template.parse("<think>\nr\n</think>\n\nc").message == assistant("c", reasoning="r")


@pytest.mark.network
def test_a_template_without_tools_reads_no_calls(real_tokenizers: ModuleType) -> None:
    template = Template(real_tokenizers.llama31_tokenizer_dir())
    text = '{"name": "f", "parameters": {}}'
    for end in ("<|eot_id|>", "<|end_of_text|>", ""):
        parsed = template.parse(template.tokenizer.encode(text + end, add_special_tokens=False).ids)
        assert (parsed.message, parsed.problems) == (assistant(text), ())


def test_chatml_leaves_content_as_it_is(make: Callable[..., Template]) -> None:
    for text in (
        "",
        "  a\n",
        '<think>r</think> <tool_call>\n{"name": "f"}\n</tool_call>',
        "a<|im_end|>b",
        "]",
    ):
        parsed = make().parse(f"{text}<|im_end|>")
        assert (parsed.message, parsed.problems) == (assistant(text), ())


@pytest.mark.parametrize("source", JSON_FORMS.values(), ids=JSON_FORMS)
def test_json_calls_read_as_they_were_written(make: Callable[..., Template], source: str) -> None:
    template = make(source)
    for message in MESSAGES + ([] if source == WHOLE_TURN else SEVERAL):
        if source == LISTED:
            given = [
                {**each, "id": f"id{index:07}"} for index, each in enumerate(message.get("tool_calls", []))
            ]
            message = assistant("" if given else message["content"], *given)
        parsed = template.parse(turn(template, message))
        assert (parsed.message, parsed.problems) == (message, ())


@pytest.mark.parametrize("source", [TAGGED, KEYS_AND_VALUES])
def test_tagged_calls_read_as_they_were_written(make: Callable[..., Template], source: str) -> None:
    template = make(source)
    closing = "</parameter> in </arg_value> it"
    inside = assistant("", call("f", a="  two\n lines\n\n", b="", c=closing, d="<tool_call>"))
    for message in [*MESSAGES, *SEVERAL, *REASONED, inside]:
        parsed = template.parse(turn(template, message))
        assert (parsed.message, parsed.problems) == (message, ())


def test_a_name_before_json_arguments_reads_as_it_was_written(make: Callable[..., Template]) -> None:
    template = make(NAMED)
    calls = [("f", '{"x": "```</call>"}', {"x": "```</call>"}), ("g", "{}", {})]
    for count in (1, 2):
        written = [{"function": {"name": name, "arguments": text}} for name, text, _ in calls[:count]]
        message = {"role": "assistant", "content": "Look.", "tool_calls": written}
        text = template.render({"messages": [QUESTION, message]}).partition("<A>")[2]
        expected = assistant("Look.", *(call(name, **arguments) for name, _, arguments in calls[:count]))
        assert template.parse(f"I think\n</think>\n\n{text}").message == {
            **expected,
            "reasoning_content": "I think",
        }


@pytest.mark.parametrize(
    ("text", "tools", "expected"),
    [
        ("007", [WEATHER], {"zip": "007"}),
        ("{}", [WEATHER], {"zip": "{}"}),
        ("7", [WEATHER], {"days": 7}),
        ("seven", [WEATHER], {"days": "seven"}),
        ("True", [WEATHER], {"exact": True}),
        ("false", [WEATHER], {"exact": False}),
        ("7", [WEATHER], {"unit": "7"}),
        ("null", [WEATHER], {"unit": None}),
        ("None", [WEATHER], {"place": None}),
        ('{"a": [1]}', [WEATHER], {"place": {"a": [1]}}),
        ("7", [WEATHER["function"]], {"zip": "7"}),
        ("7", None, {"zip": 7}),
        ("[1]", [], {"zip": [1]}),
        ("null", None, {"zip": "null"}),
        ("True", None, {"zip": "True"}),
        ('"a"', None, {"zip": '"a"'}),
        ("NaN", None, {"zip": "NaN"}),
        ("7", [{"function": "broken"}, {"name": "get_weather", "parameters": []}], {"zip": 7}),
    ],
)
def test_schemas_say_what_a_tagged_value_is(
    make: Callable[..., Template], text: str, tools: Any, expected: dict[str, Any]
) -> None:
    [key] = expected
    written = turn(make(TAGGED), assistant("", call("get_weather", **{key: text})))
    message: Any = make(TAGGED).parse(written, tools).message
    [parsed] = message["tool_calls"]
    assert parsed["function"]["arguments"] == expected


def test_thinking_the_prompt_opened_ends_in_the_turn_or_not_at_all(make: Callable[..., Template]) -> None:
    parse = make(TAGGED).parse
    assert parse("r\n</think>\n\nc<|im_end|>").message == assistant("c", reasoning="r")
    assert parse("<think>\nr\n</think>\n\nc<|im_end|>").message == assistant("c", reasoning="r")
    assert parse("\n</think>\n\nc").message == assistant("c")
    assert parse("r <tool_call>").message == assistant("", reasoning="r <tool_call>")


def test_thinking_in_other_brackets_is_learnt_too(make: Callable[..., Template]) -> None:
    brackets = TAGGED.replace("<think>", "[THINK]").replace("</think>", "[/THINK]")
    for source in (brackets, brackets.replace("[THINK]\n{% endif %}", "{% endif %}")):
        parse = make(source).parse
        assert parse("[THINK]\nr\n[/THINK]\n\nc<|im_end|>").message == assistant("c", reasoning="r")
    assert make(brackets).parse("] r [/THINK] c").message == assistant("c", reasoning="] r")


@pytest.mark.network
def test_thinking_is_what_the_turn_opens_with(qwen3: Template) -> None:
    assert qwen3.parse("<think>\nr").message == assistant("", reasoning="r")
    assert qwen3.parse("<think>r</think>c").message == assistant("c", reasoning="r")
    assert qwen3.parse("c <think>\nr\n</think>").message == assistant("c <think>\nr\n</think>")


@pytest.mark.network
def test_ends_are_cut_off_however_many_there_are(qwen3: Template) -> None:
    for end in ("", "<|im_end|>", "<|im_end|>\n", "<|endoftext|>", "<|im_end|>\n<|endoftext|>"):
        assert qwen3.parse(f"c{end}").message == assistant("c")
        assert qwen3.parse(end).message == assistant("")


@pytest.mark.network
def test_white_space_and_a_missing_closing_at_the_end_do_no_harm(qwen3: Template) -> None:
    for text in (
        '<tool_call>{"name":"f","arguments":{"x":1}}</tool_call>',
        '\n <tool_call>\n\n{"arguments": {"x": 1},\n"name": "f"}\n</tool_call>\n',
        '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n',
        '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool<|im_end|>',
        '<tool_call>\n{"name": "f", "arguments": "{\\"x\\": 1}"}\n</tool_call>',
    ):
        parsed = qwen3.parse(text)
        assert (parsed.message, parsed.problems) == (assistant("", call("f", x=1)), ())


@pytest.mark.network
@pytest.mark.parametrize(
    ("inner", "problem"),
    [
        ('{"name": "f", "arguments": {"x": }}', r"not valid JSON: Expecting value at character 33;"),
        ('{"name": "f", "arguments": {"x": 1}', r"not valid JSON"),
        ("{'name': 'f'}", r"not valid JSON"),
        ("", r"not valid JSON"),
        ("[1]", r"not a JSON object"),
        ('{"arguments": {}}', r"no 'name'"),
        ('{"name": 1, "arguments": {}}', r"no 'name'"),
        ('{"name": "f"}', r"'arguments' is missing"),
        ('{"name": "f", "arguments": [1]}', r"'arguments' is missing or not a JSON object"),
        ('{"name": "f", "arguments": {}}}', r"expected '</tool_call>' after it, found '}"),
        ('{"name": "f", "arguments": {"x": NaN}}', r"NaN is no JSON number"),
        ('{"name": "f", "arguments": {"x": 1e999}}', r"1e999 is no JSON number"),
        ('{"name": "f", "arguments": {"x": "\\ud800"}}', r"not valid JSON"),
        ('{"name": "f", "arguments": ' + "[" * 100_000, r"nested too deeply|not valid JSON"),
        ('{"name": "f", "arguments": {"x": ' + "9" * 5000 + "}}", r"not valid JSON"),
    ],
)
def test_a_call_that_cant_be_read_stays_in_the_content_and_is_told(
    qwen3: Template, inner: str, problem: str
) -> None:
    broken = f"<tool_call>\n{inner}\n</tool_call>"
    parsed = qwen3.parse(f"{broken}<|im_end|>")
    assert parsed.message == assistant(broken)
    [told] = parsed.problems
    assert re.search(problem, told)
    assert told.startswith("tool call 1: ")
    assert told.endswith('write <tool_call>\n{"name": "NAME", "arguments": {...}}\n</tool_call>')


@pytest.mark.network
def test_the_calls_around_a_broken_one_are_read(qwen3: Template) -> None:
    good, broken = (
        '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>',
        "<tool_call>\nf()\n</tool_call>",
    )
    parsed = qwen3.parse(f"A\n{good}\n{broken}\nB {good} C<|im_end|>")
    assert parsed.message == assistant(f"A\n{broken}\nB\nC", call("f"), call("f"))
    assert [problem[:13] for problem in parsed.problems] == ["tool call 2: "]
    unclosed = qwen3.parse(f'<tool_call>\n{{"name": \n{good}')
    assert unclosed.message == assistant('<tool_call>\n{"name":', call("f"))


@pytest.mark.parametrize(
    ("inner", "problem"),
    [
        ("<function=>\n</function>\n", "expected a name"),
        ("<function=f>\n<parameter=x>\n1\n</function>\n", "parameter 'x' has no '</parameter>'"),
        ("<function=f>\n<parameter=x>\n1\n</parameter>\n", "expected '</function>\\n</tool_call>' after it"),
    ],
)
def test_broken_tags_are_told_and_cost_no_other_call(
    make: Callable[..., Template], inner: str, problem: str
) -> None:
    good = "<tool_call>\n<function=g>\n<parameter=y>\n2\n</parameter>\n</function>\n</tool_call>"
    parsed = make(TAGGED).parse(f"\n</think>\n\n<tool_call>\n{inner}</tool_call>\n{good}<|im_end|>")
    assert parsed.message == assistant(f"<tool_call>\n{inner}</tool_call>", call("g", y=2))
    [told] = parsed.problems
    assert problem in told
    assert told.endswith("KEY>\nVALUE\n</parameter>\n</function>\n</tool_call>")


def test_a_call_that_nothing_announces_is_alone(make: Callable[..., Template]) -> None:
    parse = make(WHOLE_TURN).parse
    written = '{"name": "f", "parameters": {"x": 1}}'
    assert parse(f"<|endoftext|>{written}<|im_end|>").message == assistant("", call("f", x=1))
    for text in ('{"x": 1}', "{", f"Like this: {written}", f"[{written}]", '{"name": "f", "arguments": {}}'):
        parsed = parse(text)
        assert (parsed.message, parsed.problems) == (assistant(text), ())
    for text, problem in ((written[:-1], "not valid JSON"), (f"{written} ok?", "text follows it")):
        parsed = parse(text)
        assert parsed.message == assistant(text)
        assert problem in parsed.problems[0]


def test_lists_of_calls_are_read_up_to_the_broken_one(make: Callable[..., Template]) -> None:
    parsed = make(LISTED).parse('[TOOL_CALLS][{"name": "f", "arguments": {}}, {"name": "g"}]<|im_end|>')
    assert parsed.message == assistant(', {"name": "g"}]', call("f"))
    assert "tool call 2: its 'arguments' is missing" in parsed.problems[0]


def test_python_calls_are_no_form_that_is_understood(make: Callable[..., Template]) -> None:
    source = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% for c in m.tool_calls | default([]) %}"
        "{{ c.function.name }}({% for k, v in c.function.arguments | items %}{{ k }}='{{ v }}', {% endfor %})"
        "{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    parsed = make(source).parse("f(x='1', )<|im_end|>")
    assert (parsed.message, parsed.problems) == (assistant("f(x='1', )"), ())


def test_a_template_that_shows_no_answer_teaches_nothing(make: Callable[..., Template]) -> None:
    for source in ("{{ messages[0].content }}", "{{ raise_exception('never') }}"):
        assert make(source).parse("<think>a<|im_end|>").message == assistant("<think>a")


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
tricky = st.sampled_from(
    ['"', "\\", "\n", "{", "}", "</tool_call>", "<|im_end|>", "</think>", "日本", "😀", "\x00"]
)
arguments = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    json_values | st.lists(tricky, max_size=6).map("".join),
    max_size=4,
)
names = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters='"\\'), min_size=1, max_size=12
)
contents = st.just("") | st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=20)
messages = st.builds(
    lambda content, reasoning, calls: assistant(
        content,
        *(call(name) | {"function": {"name": name, "arguments": given}} for name, given in calls),
        reasoning=reasoning,
    ),
    contents,
    contents,
    st.lists(st.tuples(names, arguments), max_size=3),
)


@pytest.mark.network
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(message=messages)
def test_whatever_is_called_with_whatever_is_read_as_it_was_written(
    qwen3: Template, message: dict[str, Any]
) -> None:
    parsed = qwen3.parse(turn(qwen3, message))
    assert (parsed.message, parsed.problems) == (message, ())


PARTS = [
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<function=f>", "<parameter=x>", "</parameter>"),
    *(
        "</function>",
        '{"name": "f", "arguments": {}}',
        "{",
        "}",
        '"',
        "\n",
        " ",
        ", ",
        "[",
        "]",
        "<|im_end|>",
    ),
    *(
        "[TOOL_CALLS] [",
        "<calls>",
        "<call>function<sep>f",
        "\n```json\n{}\n```",
        "</call>",
        "</calls>",
        "<arg_key>",
    ),
]
noise = st.lists(st.sampled_from(PARTS) | st.text(max_size=5), max_size=15).map("".join)


@pytest.mark.parametrize("source", [TAGGED, KEYS_AND_VALUES, NAMED, *JSON_FORMS.values()])
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=noise)
def test_no_text_is_an_error(make: Callable[..., Template], source: str, text: str) -> None:
    message: Any = make(source).parse(text, [WEATHER]).message
    assert message["role"] == "assistant"
    assert isinstance(message["content"], str)
    assert all(each["function"]["name"] for each in message.get("tool_calls", []))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tokens=st.lists(st.integers(0, 258), max_size=30))
def test_no_tokens_are_an_error(make: Callable[..., Template], tokens: list[int]) -> None:
    message: Any = make(TAGGED).parse(np.array(tokens, dtype=np.int32)).message
    assert isinstance(message["content"], str)
