"""Chat templates run as in Transformers, and in a sandbox."""

from datetime import datetime
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from twinkle.protocol.errors import InvalidRequest
from twinkle.template.conversation import Conversation, read_conversation
from twinkle.template.rendering import ChatTemplate, RenderingFailed, Span

MESSAGES = [
    {"role": "user", "content": "  Grüße <b>&amp;</b> 'x' \"y\" 😀\n"},
    {
        "role": "assistant",
        "content": "ok",
        "tool_calls": [{"name": "f", "arguments": {"ä": [1, 2.5, None, True]}}],
    },
]
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
]


def template(source: str, **variables: Any) -> ChatTemplate:
    return ChatTemplate({"default": source}, variables, "org/model")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content }}|{{ messages[0]['content'] | trim }}|{{ messages | length }}",
        "{% for m in messages %}\n    {% if m.tool_calls %}\n{{ m | tojson }}\n    {% endif %}\n{% endfor %}",
        "{{ tools | tojson(indent=2) }}{{ tools | tojson(separators=(',', ':'), sort_keys=true) }}",
        "{{ messages | tojson(ensure_ascii=true) }}",
        "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        "{% macro show(m) %}[{{ m.role }}]{% endmacro %}{% for m in messages %}{{ show(m) }}{% endfor %}",
        "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ documents is none }}{{ documents is defined }}",
        "{{ dict(a=1).a }}{{ range(3) | list }}{{ 'a' in {'a': 1} }}{{ add_generation_prompt }}{{ tools is none }}",
        "{% generation %}{{ messages[1].content }}{% endgeneration %}",
        "{%- for m in messages -%}\n  {{- m.role -}}\n  {#- comment -#}\n{%- endfor -%}\n",
    ],
)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_templates_render_as_in_transformers(source: str, add_generation_prompt: bool) -> None:
    variables: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>"}
    ours = template(source, **variables).render(
        read_conversation({"messages": MESSAGES, "tools": TOOLS}), add_generation_prompt
    )
    [theirs], _ = render_jinja_template(
        [MESSAGES],
        tools=TOOLS,
        chat_template=source,
        add_generation_prompt=add_generation_prompt,
        **variables,
    )
    assert ours == theirs


def test_strftime_now_is_the_date() -> None:
    assert template("{{ strftime_now('%Y') }}").render(Conversation(())) in {
        str(datetime.now().year),
        str(datetime.now().year - 1),  # where the year ended in between
    }


def test_a_template_that_refuses_is_quoted() -> None:
    refusing = template("{{ raise_exception('Only user messages!') }}")
    with pytest.raises(RenderingFailed, match="chat template of org/model refused .*Only user messages!"):
        refusing.render(read_conversation({"messages": MESSAGES}))


def test_missing_content_is_named_as_the_likely_reason() -> None:
    message = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    conversation = read_conversation({"messages": [message]})
    with pytest.raises(RenderingFailed, match="need content=''"):
        template("{{ messages[0].content + 'x' }}").render(conversation)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({}) }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ lipsum.__globals__['os'].getcwd() }}",
        "{{ cycler.__init__.__globals__ }}",
    ],
)
def test_templates_stay_in_the_sandbox(source: str) -> None:
    with pytest.raises(RenderingFailed):
        template(source).render(read_conversation({"messages": MESSAGES}))


def test_a_template_with_an_error_in_it_is_refused_at_once() -> None:
    with pytest.raises(InvalidRequest, match="chat template of org/model is not valid"):
        template("{% for m in messages %}")


def test_tool_use_is_taken_for_conversations_with_tools() -> None:
    both = ChatTemplate({"default": "plain", "tool_use": "tools"}, {}, "m")
    assert both.render(read_conversation({"messages": MESSAGES})) == "plain"
    assert both.render(read_conversation({"messages": MESSAGES, "tools": TOOLS})) == "tools"


def test_without_a_default_template_there_is_none() -> None:
    with pytest.raises(InvalidRequest, match=r"no chat template named 'default' \(it has: rag\)"):
        ChatTemplate({"rag": "x"}, {}, "m")


MARKED = "{% for m in messages %}{{ m.role }}:{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}"


def test_generation_blocks_are_reported_where_they_lie() -> None:
    conversation = Conversation(({"role": "a", "content": "xyz"}, {"role": "b", "content": ""}))
    marked = template(MARKED)
    assert marked.render(conversation) == "a:xyz;b:;"
    assert marked.generation_spans(conversation) == (marked.render(conversation), [Span(2, 5), Span(8, 8)])


def test_generation_blocks_inside_macros_are_reported() -> None:
    source = "{% macro turn(m) %}({% generation %}{{ m.content }}{% endgeneration %}){% endmacro %}"
    marked = template(source + "{% for m in messages %}{{ turn(m) }}{% endfor %}")
    conversation = Conversation(({"content": "x"}, {"content": "yz"}))
    assert marked.render(conversation) == "(x)(yz)"
    assert marked.generation_spans(conversation) == (marked.render(conversation), [Span(1, 2), Span(4, 6)])


def test_blocks_whose_text_is_worked_on_are_not_reported() -> None:
    source = (
        "{% set t %}{% generation %}{{ messages[0].content }}{% endgeneration %}{% endset %}{{ t | trim }}"
    )
    marked = template(source)
    assert marked.render(Conversation(({"content": " x"},))) == "x"
    assert marked.generation_spans(Conversation(({"content": " x"},))) is None
    assert template("no blocks").generation_spans(Conversation(())) is None
