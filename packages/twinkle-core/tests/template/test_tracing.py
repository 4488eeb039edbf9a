"""Which message each stretch of a rendered text is written for."""

from typing import Any

import pytest

from twinkle.template.conversation import read_conversation
from twinkle.template.rendering import ChatTemplate

MESSAGES = [{"role": role, "content": role[0]} for role in ("user", "assistant", "tool")]


def traced(
    source: str, messages: list[dict[str, Any]] = MESSAGES
) -> list[tuple[int | None, int | None, str]]:
    """Owner, the message within which it is written, and text of each stretch."""
    template = ChatTemplate({"default": source}, {}, "test")
    trace = template.trace(read_conversation({"messages": messages}))
    assert trace is not None
    assert "".join(trace.text[stretch.start : stretch.end] for stretch in trace.stretches) == trace.text
    return [(owner, within, trace.text[start:end]) for owner, within, start, end in trace.stretches]


def test_what_a_loop_writes_is_for_its_message_and_the_rest_for_none() -> None:
    source = "<{% for m in messages %}[{{ m.content }}]{% endfor %}>"
    assert traced(source) == [
        (None, None, "<"),
        (0, None, "[u]"),
        (1, None, "[a]"),
        (2, None, "[t]"),
        (None, None, ">"),
    ]


@pytest.mark.parametrize(
    "source",
    [
        "{% set rest = messages[1:] %}-{% for m in rest %}{{ m.content }}{% endfor %}",
        "-{% for m in messages if m.role != 'user' %}{{ m.content }}{% endfor %}",
        "-{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
        "{% macro show(m) %}{{ m.content }}{% endmacro %}-{% for m in messages[1:] %}{{ show(m) }}{% endfor %}",
        "{% macro all(of) %}{% for m in of %}{{ m.content }}{% endfor %}{% endmacro %}-{{ all(messages[1:]) }}",
        "-{% for i in [0, 1, 2] %}{% if i %}{% set m = messages[i] %}{{ m.content }}{% endif %}{% endfor %}",
        "{% for m in messages %}{% set seen = m %}{% endfor %}-{% for m in messages[1:] %}{{ m.content }}{% endfor %}",
    ],
)
def test_any_way_to_go_through_the_messages_will_do(source: str) -> None:
    assert traced(source) == [(None, None, "-"), (1, None, "a"), (2, None, "t")]


def test_what_is_written_within_another_is_told_apart() -> None:
    source = (
        "{% for m in messages %}({{ m.content }}"
        "{% for other in messages if other.role == 'tool' and m.role != 'tool' %}{{ other.content }}{% endfor %}"
        "){% endfor %}"
    )
    assert traced(source) == [
        (0, None, "(u"),
        (2, 0, "t"),
        (0, None, ")"),
        (1, None, "(a"),
        (2, 1, "t"),
        (1, None, ")"),
        (2, None, "(t)"),
    ]


def test_a_loop_over_numbers_belongs_to_the_message_around_it_until_it_takes_one() -> None:
    source = (
        "{% for m in messages[:1] %}({% for i in range(3) %}{{ i }}{% if i == 1 %}{% set o = messages[i] %}"
        "{{ o.content }}{% endif %}{% endfor %}){% endfor %}"
    )
    assert traced(source) == [(0, None, "(01"), (1, 0, "a"), (0, None, "2)")]


def test_equal_messages_are_told_apart() -> None:
    twice = [{"role": "user", "content": "u"}] * 2
    assert traced("{% for m in messages %}{{ m.content }}{% endfor %}", twice) == [
        (0, None, "u"),
        (1, None, "u"),
    ]


def test_a_text_that_the_template_works_on_is_given_up() -> None:
    template = ChatTemplate(
        {
            "default": "{% set t %}{% for m in messages %}{{ m.content }}{% endfor %}{% endset %}{{ t | length }}"
        },
        {},
        "t",
    )
    assert template.trace(read_conversation({"messages": MESSAGES})) is None


def test_text_with_the_character_of_the_marks_is_traced_all_the_same() -> None:
    text = "x\U000f0000y\U000f0000"
    source = "{% for m in messages %}({{ m.content }}){% endfor %}"
    assert traced(source, [{"role": "user", "content": text}]) == [(0, None, f"({text})")]


def test_a_text_that_is_only_held_and_written_is_traced() -> None:
    source = "{% set t %}{% for m in messages %}{{ m.content }}{% endfor %}{% endset %}<{{ t }}>"
    assert traced(source) == [
        (None, None, "<"),
        (0, None, "u"),
        (1, None, "a"),
        (2, None, "t"),
        (None, None, ">"),
    ]


LOOP = "{% for m in messages %}[{{ m.content }}]{% endfor %}"


@pytest.mark.parametrize(
    ("source", "prompt"),
    [
        (LOOP + "{% if add_generation_prompt %}{{ '<a>' }}\n{% endif %}", "<a>\n"),
        (LOOP + "{% if add_generation_prompt %}<a>{% endif %}", "<a>"),
        (LOOP + "{% if add_generation_prompt %}<{{ messages[0].content }}>{% endif %}", None),
        (LOOP + "{% if add_generation_prompt and tools %}<a>{% endif %}", None),
        (LOOP + "{% if add_generation_prompt %}<a>{% else %}<b>{% endif %}", None),
        (LOOP + ".{% if add_generation_prompt %}<a>{% endif %}", None),
        (LOOP, None),
    ],
)
def test_a_prompt_that_depends_on_nothing_is_read_from_the_template(source: str, prompt: str | None) -> None:
    template = ChatTemplate({"default": source}, {}, "test")
    conversation = read_conversation({"messages": MESSAGES})
    assert template.constant_prompt(conversation) == prompt
    if prompt is not None:
        plain, prompted = (template.render(conversation, prompts) for prompts in (False, True))
        assert prompted == plain + prompt
