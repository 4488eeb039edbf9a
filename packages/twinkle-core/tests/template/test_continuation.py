"""What follows a sampled turn: prompt, sampled tokens and continuation are the conversation, tokenised once."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from twinkle.protocol.errors import InvalidRequest
from twinkle.template import Template

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
SYSTEM = {"role": "system", "content": "Be brief."}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **rest: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **rest}


def result(content: str) -> dict[str, Any]:
    return {"role": "tool", "name": "get_weather", "tool_call_id": "call00001", "content": content}


def call(city: str) -> dict[str, Any]:
    return {
        "type": "function",
        "id": "call00001",
        "function": {"name": "get_weather", "arguments": {"city": city}},
    }


def ids_of(template: Template, text: str) -> list[int]:
    return template.tokenizer.encode(text, add_special_tokens=False).ids


def text_of_turn(template: Template, conversation: dict[str, Any], index: int) -> str:
    """The turn as a model would write it that has learnt the template by heart."""
    messages = conversation["messages"]
    before = template.render({**conversation, "messages": messages[:index]}, add_generation_prompt=True)
    through = template.render({**conversation, "messages": messages[: index + 1]})
    assert through.startswith(before)
    return through[len(before) :].rstrip()


def rolled_out(template: Template, conversation: dict[str, Any]) -> list[int]:
    """The conversation's tokens as a rollout gathers them: each turn sampled, read, answered, continued."""
    messages, tools = conversation["messages"], conversation.get("tools")
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    known: list[Any] = list(messages[: turns[0]])
    ids = template.encode({**conversation, "messages": known}, add_generation_prompt=True)[
        "input_ids"
    ].tolist()
    for index, following in zip(turns, [*turns[1:], len(messages)], strict=True):
        sampled = ids_of(template, text_of_turn(template, conversation, index))
        known += [template.parse(sampled, tools).message, *messages[index + 1 : following]]
        ids += sampled + template.continuation({**conversation, "messages": known}, index, sampled).tolist()
    return ids


@pytest.fixture(scope="module")
def qwen3_dir(real_tokenizers: ModuleType) -> Path:
    return real_tokenizers.qwen3_tokenizer_dir()


@pytest.fixture(scope="module")
def qwen3(qwen3_dir: Path) -> Template:
    return Template(qwen3_dir)


PLAIN = [SYSTEM, user("a"), assistant("b b"), user("c"), assistant("d 😀: 1234"), user("e")]
TOOLS = [
    user("Weather?"),
    assistant("", tool_calls=[call("Rome")], reasoning_content="I need the tool"),
    result("hot"),
    assistant("And.", tool_calls=[call("Oslo"), call("Zürich")], reasoning_content="two more"),
    result("cold\n"),
    result('{"weather": "rain"}'),
    assistant("Hot, cold, rain.", reasoning_content="all there"),
    user("Sure?"),
]


@pytest.mark.network
def test_qwen3_with_tools_is_rolled_out_to_what_transformers_renders(
    qwen3: Template, qwen3_dir: Path
) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(qwen3_dir)
    for messages in (TOOLS[:3], TOOLS[:6], [SYSTEM, *TOOLS[:6]]):
        for tools in (None, [WEATHER]):
            expected = tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=True, return_dict=False
            )
            conversation = {"messages": messages, "tools": tools}
            assert rolled_out(qwen3, conversation) == expected


@pytest.mark.network
@pytest.mark.parametrize("folder_of", ["llama31_tokenizer_dir", "smollm2_dir"])
def test_plain_turns_are_rolled_out_to_their_tokens(real_tokenizers: ModuleType, folder_of: str) -> None:
    template = Template(getattr(real_tokenizers, folder_of)())
    for messages in (PLAIN, PLAIN[:4], PLAIN[1:4], [*PLAIN[:3], result("r")]):
        expected = template.encode({"messages": messages}, add_generation_prompt=True)["input_ids"]
        assert rolled_out(template, {"messages": messages}) == expected.tolist()


@pytest.mark.network
def test_qwen3_with_thinking_off_keeps_the_empty_thinking_it_was_given(qwen3_dir: Path) -> None:
    template = Template(qwen3_dir, chat_template_kwargs={"enable_thinking": False})
    rendered = template.render({"messages": PLAIN}, add_generation_prompt=True)
    opening, given = "<|im_start|>assistant\n", "<think>\n\n</think>\n\n"
    expected = rendered.removesuffix(given).replace(opening, opening + given)
    assert rolled_out(template, {"messages": PLAIN}) == ids_of(template, expected)


@pytest.mark.network
def test_thinking_that_qwen3_would_leave_out_stays_as_sampled(qwen3: Template) -> None:
    conversation = {"messages": TOOLS, "tools": [WEATHER]}
    text = qwen3.decode(rolled_out(qwen3, conversation))
    assert "two more" not in qwen3.render(conversation)
    thinking = ["I need the tool", "two more", "all there"]
    assert [thought in text for thought in thinking] == [True] * 3
    assert text.endswith(
        "<think>\nall there\n</think>\n\nHot, cold, rain.<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.network
def test_other_tokens_of_the_same_text_are_no_matter(qwen3: Template) -> None:
    template = qwen3
    conversation = {"messages": [user("a"), assistant("bcd"), user("e")]}
    end = ids_of(template, "<|im_end|>")
    usual = template.continuation(conversation, 1, ids_of(template, "bcd") + end)
    letters = [id for letter in "bcd" for id in ids_of(template, letter)]
    assert template.continuation(conversation, 1, letters + end).tolist() == usual.tolist()
    assert template.decode(usual) == "\n<|im_start|>user\ne<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_tiny_tokenizer: Callable[..., Path]) -> Path:
    return write_tiny_tokenizer(tmp_path_factory.mktemp("tiny"))


AFTER = "\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
SHORT = {"messages": [user("a"), assistant("b"), user("c")]}


def test_chatml_is_rolled_out_to_its_tokens(folder: Path) -> None:
    template = Template(folder)
    for messages in (PLAIN, PLAIN[:4], [user("a"), assistant(""), user("")], [assistant("b"), user("c")]):
        expected = template.encode({"messages": messages}, add_generation_prompt=True)["input_ids"]
        first = next(index for index, message in enumerate(messages) if message["role"] == "assistant")
        if first:
            assert rolled_out(template, {"messages": messages}) == expected.tolist()
        sampled = ids_of(template, f"{messages[first]['content']}<|im_end|>")
        assert expected.tolist()[-len(template.continuation({"messages": messages}, first, sampled)) :] == (
            template.continuation({"messages": messages}, first, sampled).tolist()
        )


def test_a_continuation_is_int64_and_takes_arrays(folder: Path) -> None:
    template = Template(folder)
    sampled = np.array(ids_of(template, "b<|im_end|>"), dtype=np.int32)
    ids = template.continuation(SHORT, 1, sampled)
    assert ids.dtype == np.int64
    assert template.decode(ids) == AFTER


@pytest.mark.parametrize("text", ["", "b", "b<|endoftext|>", "b<|im_end|>\n", "b <|im_start|>"])
def test_a_turn_that_was_not_ended_is_ended_first(folder: Path, text: str) -> None:
    template = Template(folder)
    assert template.decode(template.continuation(SHORT, 1, ids_of(template, text))) == f"<|im_end|>{AFTER}"


def test_an_end_that_was_only_spelled_is_none(folder: Path) -> None:
    template = Template(folder)
    spelled = ids_of(template, "b<|im_") + ids_of(template, "end|>")
    assert template.decode(spelled) == "b<|im_end|>"
    assert template.decode(template.continuation(SHORT, 1, spelled)) == f"<|im_end|>{AFTER}"


def test_any_turn_can_be_continued_with_all_that_follows(folder: Path) -> None:
    template = Template(folder)
    ids = template.continuation({"messages": PLAIN}, 2, ids_of(template, "something else<|im_end|>"))
    whole = template.render({"messages": PLAIN}, add_generation_prompt=True)
    assert template.decode(ids) == whole.partition("b b<|im_end|>")[2]


def test_a_turn_with_nothing_after_it_is_followed_by_the_next(folder: Path) -> None:
    template = Template(folder)
    messages = [user("a"), assistant("b")]
    ids = template.continuation({"messages": messages}, 1, ids_of(template, "b<|im_end|>"))
    assert template.decode(ids) == "\n<|im_start|>assistant\n"


def test_an_end_of_ordinary_text_is_recognised_in_any_tokens(folder: Path) -> None:
    source = (
        "{% for m in messages %}### {{ m.role }}: {{ m.content }} ###END\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant: {% endif %}"
    )
    template = Template(folder, chat_template=source)
    after = "\n### user: c ###END\n### assistant: "
    for text, expected in (("b ###END", after), ("b ###EN", f" ###END{after}"), ("b", f" ###END{after}")):
        assert template.decode(template.continuation(SHORT, 1, ids_of(template, text))) == expected


def test_a_turn_without_any_end_goes_on_with_the_next_speaker(folder: Path) -> None:
    source = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    template = Template(folder, chat_template=source)
    assert template.decode(template.continuation(SHORT, 1, ids_of(template, "b"))) == "<user>c<assistant>"


# Calls end in a token of their own, and arguments have to be JSON text.
CALLS_AS_TEXT = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.tool_calls %}"
    '<call>{"name": "{{ m.tool_calls[0].function.name }}", "arguments": {{ "" + m.tool_calls[0].function.arguments }}}'
    "</call><|endoftext|>{% else %}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.parametrize("sampled_end", ["", "<|endoftext|>"])
def test_a_turn_with_calls_has_an_end_of_its_own(folder: Path, sampled_end: str) -> None:
    template = Template(folder, chat_template=CALLS_AS_TEXT)
    text = '<call>{"name": "get_weather", "arguments": {"city": "Zürich"}}</call>'
    sampled = ids_of(template, text + sampled_end)
    message: Any = template.parse(sampled).message
    assert message["tool_calls"][0]["function"]["arguments"] == {"city": "Zürich"}
    conversation = {"messages": [user("a"), message, result("r"), assistant("b"), user("c")]}
    after = "\n[tool]r<|im_end|>\n[assistant]b<|im_end|>\n[user]c<|im_end|>\n[assistant]"
    expected = after if sampled_end else f"<|endoftext|>{after}"
    assert template.decode(template.continuation(conversation, 1, sampled)) == expected
    assert isinstance(message["tool_calls"][0]["function"]["arguments"], dict)


# Reasoning that the prompt opens and tagged parameters, as Qwen3.5 has them; a JSON call alone, as Llama-3.1 has it.
TAGGED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "<think>\n{{ m.reasoning_content | default('') | trim }}\n</think>\n\n{{ m.content | trim }}"
    "{% for c in m.tool_calls | default([]) %}<tool_call>\n<function={{ c.function.name }}>\n"
    "{% for k, v in c.function.arguments | items %}<parameter={{ k }}>\n{{ v }}\n</parameter>\n{% endfor %}"
    "</function>\n</tool_call>{% endfor %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
WHOLE_TURN = (
    "{% for m in messages %}[{{ m.role }}]\n\n{% if m.tool_calls %}"
    '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
    "{% else %}{{ m.content | trim }}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n\n{% endif %}"
)


@pytest.mark.parametrize("source", [TAGGED, WHOLE_TURN])
def test_other_forms_of_calls_are_rolled_out_to_their_tokens(folder: Path, source: str) -> None:
    template = Template(folder, chat_template=source)
    two_calls = (
        {} if source == WHOLE_TURN else {"content": "And.", "tool_calls": [call("Oslo"), call("Bonn")]}
    )
    messages = [*TOOLS[:3], TOOLS[1] | two_calls, *TOOLS[4:]]
    expected = template.encode({"messages": messages}, add_generation_prompt=True)["input_ids"]
    assert rolled_out(template, {"messages": messages}) == expected.tolist()


PARTS = [
    *(
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_call>",
        '{"name": "f", "arguments": {}}',
        "{",
        "\n",
        " ",
        "a",
    ),
    *("<function=f>", "<parameter=x>", "</parameter>", "</function>", "<|im_end|>", "<|im_start|>user\n"),
]


@pytest.mark.parametrize("following", [user("c"), result("r")], ids=["question", "result"])
@pytest.mark.parametrize("source", [TAGGED, None], ids=["tagged", "chatml"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(st.sampled_from(PARTS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=4)))
def test_whatever_was_sampled_the_rest_is_the_same(
    folder: Path, source: str | None, following: dict[str, Any], parts: list[str]
) -> None:
    template = Template(folder, chat_template=source)
    check_the_rest_is_the_same(template, following, "".join(parts))


@pytest.mark.network
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(st.sampled_from(PARTS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=4)))
def test_whatever_qwen3_sampled_the_rest_is_the_same(qwen3: Template, parts: list[str]) -> None:
    for following in (user("c"), result("r")):
        check_the_rest_is_the_same(qwen3, following, "".join(parts))


def check_the_rest_is_the_same(template: Template, following: dict[str, Any], text: str) -> None:
    def rest(message: Any, sampled: list[int]) -> list[int]:
        return template.continuation({"messages": [user("a"), message, following]}, 1, sampled).tolist()

    sampled = ids_of(template, text)
    end = ids_of(template, "<|im_end|>")
    usual = rest(assistant("b"), ids_of(template, "b<|im_end|>"))
    expected = usual if sampled[-1:] == end else end + usual
    assert rest(template.parse(sampled).message, sampled) == expected


def test_a_message_that_is_not_the_assistants_is_refused(folder: Path) -> None:
    for index in (0, 2, 3, -2):
        with pytest.raises(InvalidRequest, match=rf"turn_index: {index} is no message.*these are: 1"):
            Template(folder).continuation(SHORT, index, [])
    with pytest.raises(InvalidRequest, match="none"):
        Template(folder).continuation({"messages": [user("a")]}, 0, [])


# What ends a turn, where it isn't what the template ends the last one with: as Phi-3, GLM-4.5 and gpt-oss have it.
ENDS_TEXT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}<|endoftext|>{% endif %}"
)
NEXT_MARK = (
    "{% for m in messages %}{{ '<|im_start|>' if m.role == 'user' else '<|endoftext|>' }}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|endoftext|>{% endif %}"
)
OTHER_END = (
    "{% for m in messages %}<|im_start|>{{ m.role }}:{{ m.content }}"
    "{{ '<|endoftext|>' if loop.last and not add_generation_prompt else '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
)


@pytest.mark.parametrize(
    ("source", "sampled", "expected"),
    [
        (ENDS_TEXT, "b<|im_end|>", AFTER),
        (ENDS_TEXT, "b<|im_end|>\n<|endoftext|>", AFTER),
        (ENDS_TEXT, "b", "<|im_end|>" + AFTER),
        (NEXT_MARK, "b<|im_start|>", "c<|endoftext|>"),
        (NEXT_MARK, "b", "<|im_start|>c<|endoftext|>"),
        (OTHER_END, "b<|endoftext|>", "<|im_start|>user:c<|im_end|><|im_start|>assistant:"),
        (OTHER_END, "b<|im_end|>", "<|im_start|>user:c<|im_end|><|im_start|>assistant:"),
        (OTHER_END, "b", "<|im_end|><|im_start|>user:c<|im_end|><|im_start|>assistant:"),
    ],
)
def test_no_turn_is_ended_twice(folder: Path, source: str, sampled: str, expected: str) -> None:
    template = Template(folder, chat_template=source)
    assert template.decode(template.continuation(SHORT, 1, ids_of(template, sampled))) == expected
