"""The assistant's turns in real models' chat templates: trained on is what the assistant says, and nothing else.

Every word that somebody says stands for who says it: w0 and r0 are words and reasoning of the assistant, q0 a
question, o0 the output of a tool, c0 what the assistant calls a tool with.
"""

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest

from twinkle.template.conversation import Conversation, read_conversation
from twinkle.template.labels import Turn, assistant_turns
from twinkle.template.rendering import ChatTemplate, RenderingFailed

pytestmark = pytest.mark.network

WORD = re.compile(r"[wrqoc]\d(?!\d)|\bsys\b")
GIVEN = re.compile(
    r"</?think>|<\|start\|>assistant|<｜Assistant｜>|<｜tool▁outputs▁end｜>|<\|tool_response>|\s+"
)


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **rest: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **rest}


def call(city: str, name: str = "get_weather", id: str = "call00001") -> dict[str, Any]:
    return {"type": "function", "id": id, "function": {"name": name, "arguments": {"city": city}}}


def calls(*made: dict[str, Any], content: str = "", **rest: Any) -> dict[str, Any]:
    return assistant(content, tool_calls=list(made), **rest)


def output(content: str, name: str = "get_weather", id: str = "call00001") -> dict[str, Any]:
    return {"role": "tool", "name": name, "tool_call_id": id, "content": content}


SYSTEM = {"role": "system", "content": "sys"}
SECOND = call("c2", "get_time", "call00002")
SECOND_OUTPUT = output("o2", "get_time", "call00002")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "d",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "d"}},
                "required": ["city"],
            },
        },
    }
    for name in ("get_weather", "get_time")
]

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one turn": [user("q1"), assistant("w1")],
    "three turns": [user("q1"), assistant("w1"), user("q2"), assistant("w2"), user("q3"), assistant("w3")],
    "system prompt": [SYSTEM, user("q1"), assistant("w1"), user("q2"), assistant("w2")],
    "unanswered": [user("q1"), assistant("w1"), user("q2")],
    "assistant first": [assistant("w0"), user("q1"), assistant("w1")],
    "assistant first, unanswered": [assistant("w0"), user("q1")],
    "answers in a row": [user("q1"), assistant("w1"), assistant("w2"), user("q2"), assistant("w3")],
    "reasoning": [
        user("q1"),
        assistant("w1", reasoning_content="r1"),
        user("q2"),
        assistant("w2", reasoning_content="r2"),
    ],
    "reasoning at last": [user("q1"), assistant("w1"), user("q2"), assistant("w2", reasoning_content="r2")],
    "reasoning at first": [user("q1"), assistant("w1", reasoning_content="r1"), user("q2"), assistant("w2")],
    "reasoning in the content": [
        user("q1"),
        assistant("<think>\nr1\n</think>\n\nw1"),
        user("q2"),
        assistant("<think>\nr2\n</think>\n\nw2"),
    ],
    "call at last": [user("q1"), calls(call("c1"))],
    "call and output": [user("q1"), calls(call("c1")), output("o1")],
    "call before the last question": [
        user("q1"),
        calls(call("c1")),
        output("o1"),
        assistant("w1"),
        user("q2"),
        assistant("w2"),
    ],
    "call with words": [
        user("q1"),
        calls(call("c1"), content="w0"),
        output("o1"),
        assistant("w1"),
        user("q2"),
        assistant("w2"),
    ],
    "call with reasoning before the last question": [
        user("q1"),
        calls(call("c1"), reasoning_content="r0"),
        output("o1"),
        assistant("w1", reasoning_content="r1"),
        user("q2"),
        assistant("w2", reasoning_content="r2"),
    ],
    "call with reasoning": [
        user("q1"),
        calls(call("c1"), reasoning_content="r0"),
        output("o1"),
        assistant("w1", reasoning_content="r1"),
    ],
    "call with reasoning, unanswered": [
        user("q1"),
        calls(call("c1"), reasoning_content="r0"),
        output("o1"),
    ],
    "parallel calls": [
        user("q1"),
        calls(call("c1"), SECOND),
        output("o1"),
        SECOND_OUTPUT,
        assistant("w1"),
    ],
    "parallel calls before the last question": [
        user("q1"),
        calls(call("c1"), SECOND),
        output("o1"),
        SECOND_OUTPUT,
        assistant("w1"),
        user("q2"),
        assistant("w2"),
    ],
    "calls in a row": [
        user("q1"),
        calls(call("c1")),
        output("o1"),
        calls(SECOND),
        SECOND_OUTPUT,
        assistant("w1"),
    ],
    "calls in a row before the last question": [
        user("q1"),
        calls(call("c1")),
        output("o1"),
        calls(SECOND),
        SECOND_OUTPUT,
        assistant("w1"),
        user("q2"),
        assistant("w2"),
    ],
    "output answered by the user": [user("q1"), calls(call("c1")), output("o1"), user("q2"), assistant("w2")],
    "empty answers": [user("q1"), assistant(""), user("q2"), assistant("")],
    "white space": [user("q1"), assistant("  w1\n\n"), user("q2"), assistant("\tw2 \n")],
    "two questions with calls": [
        SYSTEM,
        user("q1"),
        calls(call("c1")),
        output("o1"),
        assistant("w1"),
        user("q2"),
        calls(call("c3")),
        output("o3"),
        assistant("w3"),
    ],
}


@cache
def compiled(name: str, source: str, enable_thinking: bool | None = None) -> ChatTemplate:
    thinking = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
    return ChatTemplate({"default": source}, {"bos_token": "<s>", "eos_token": "</s>", **thinking}, name)


def conversation(name: str) -> Conversation:
    messages = CONVERSATIONS[name]
    tools = TOOLS if any("tool_calls" in message for message in messages) else None
    return read_conversation({"messages": messages, "tools": tools})


def said(text: str, turn: Turn) -> str:
    return "".join(text[span.start : span.end] for span in turn.spans)


def words_of(message: Mapping[str, Any]) -> set[str]:
    made = [call["function"]["arguments"]["city"] for call in message.get("tool_calls", [])]
    texts = [message.get("content", ""), message.get("reasoning_content", ""), *made]
    return {word for text in texts for word in WORD.findall(text)}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_assistants_words_are_trained_on_and_nobody_elses(
    chat_templates: dict[str, str], name: str
) -> None:
    talk = conversation(name)
    tried = 0
    for owner, source in chat_templates.items():
        off = [(False, False)] if "enable_thinking" in source else []
        for thinking, prompt in [(None, False), (None, True), *off]:
            template = compiled(owner, source, thinking)
            try:
                text = template.render(talk, prompt)
            except RenderingFailed:
                continue  # what the template itself refuses
            shown = set(WORD.findall(text))
            for turn in assistant_turns(template, talk, prompt):
                mine = words_of(talk.messages[turn.message]) & shown
                found = WORD.findall(said(text, turn))
                assert set(found) == mine, (owner, thinking, prompt, turn.message, said(text, turn))
            tried += 1
    assert tried > 60


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_turns_are_those_of_trls_generation_blocks(chat_templates: dict[str, str], name: str) -> None:
    """Wherever TRL's copy of a template renders the same text.

    The two differ, on purpose, at either end of a turn. Some of TRL's blocks take in what the model is given: line
    breaks, an opening `<think>`, the header of DeepSeek's and gpt-oss's turns. And Gemma's turn that calls ends, here,
    with the token that its model stops at.
    """
    talk = conversation(name)
    compared = 0
    for owner, source in chat_templates.items():
        marked = chat_templates.get(f"{owner}_training")
        if marked is None:
            continue
        template, reference = compiled(owner, source), compiled(f"{owner}_training", marked)
        try:
            text, same = template.render(talk), reference.render(talk)
        except RenderingFailed:
            continue
        blocks = reference.generation_spans(talk)
        if text != same or blocks is None:
            continue
        expected = "".join(text[block.start : block.end] for block in blocks[1])
        ours = "".join(said(text, turn) for turn in assistant_turns(template, talk))
        assert GIVEN.sub("", ours) == GIVEN.sub("", expected), owner
        compared += 1
    assert compared or name.startswith(("call with", "calls", "output", "parallel", "two questions"))


def turns(templates: dict[str, str], owner: str, name: str, **options: Any) -> list[str]:
    template, talk = compiled(owner, templates[owner], **options), conversation(name)
    text = template.render(talk)
    return [said(text, turn) for turn in assistant_turns(template, talk)]


def test_a_call_before_the_last_question_is_trained_whole(chat_templates: dict[str, str]) -> None:
    called = "<function=get_weather>\n<parameter=city>\nc1\n</parameter>\n</function>"
    written = f"<tool_call>\n{called}\n</tool_call><|im_end|>"
    for owner in ("trl/qwen3_5_think", "trl/qwen3_5_nothink", "trl/qwen3_6"):
        assert turns(chat_templates, owner, "call before the last question")[:2] == [written, "w1<|im_end|>"]


def test_reasoning_is_trained_whole_though_thinking_is_off(chat_templates: dict[str, str]) -> None:
    found = turns(chat_templates, "trl/qwen3", "reasoning", enable_thinking=False)
    assert found == ["w1<|im_end|>", "<think>\nr2\n</think>\n\nw2<|im_end|>"]


def test_no_turn_begins_within_its_generation_prompt(chat_templates: dict[str, str]) -> None:
    for name in (
        "call and output",
        "two questions with calls",
        "three turns",
        "call before the last question",
    ):
        talk = conversation(name)
        for owner, source in chat_templates.items():
            template = compiled(owner, source)
            try:
                text = template.render(talk)
                prompts = {i: template.render(talk.first(i), True) for i in range(1, len(talk.messages))}
            except RenderingFailed:
                continue
            for turn in assistant_turns(template, talk):
                if text.startswith(prompt := prompts[turn.message]):
                    assert turn.spans[0].start >= len(prompt), (owner, name, turn.message)


def test_the_header_of_llamas_turns_is_not_trained_though_there_are_tools(
    chat_templates: dict[str, str],
) -> None:
    # They write the first question, with the tools, outside the loop over the messages.
    called = '{"name": "get_weather", "parameters": {"city": "c1"}}'
    for owner in ("trl/llama3_1", "trl/llama3_2", "unsloth/llama31", "axolotl/llama3_2_vision"):
        assert turns(chat_templates, owner, "call before the last question") == [
            f"{called}<|eot_id|>",
            "w1<|eot_id|>",
            "w2<|eot_id|>",
        ]


def test_an_opening_that_the_template_always_adds_is_not_trained(chat_templates: dict[str, str]) -> None:
    end = "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"
    assert turns(chat_templates, "axolotl/command_a", "system prompt") == [f"w1{end}", f"w2{end}"]
    # Jamba's opening begins with what ends the turn before.
    assert turns(chat_templates, "axolotl/jamba", "system prompt") == [" w1<|eom|>", " w2<|eom|>"]


def test_empty_reasoning_is_none(chat_templates: dict[str, str]) -> None:
    for owner in ("trl/gptoss", "trl/lfm2_2_5", "trl/qwen3_6"):
        template = compiled(owner, chat_templates[owner])
        plain = template.render(read_conversation({"messages": [user("q1"), assistant("w1")]}))
        row = {"messages": [user("q1"), assistant("w1", reasoning_content="")]}
        assert template.render(read_conversation(row)) == plain


def test_every_turn_of_phi_3_ends(chat_templates: dict[str, str]) -> None:
    for owner in ("trl/phi3", "trl/phi3_5"):
        assert turns(chat_templates, owner, "three turns") == ["w1<|end|>", "w2<|end|>", "w3<|end|>\n</s>"]


def test_turns_of_gpt_oss_have_channel_and_end(chat_templates: dict[str, str]) -> None:
    assert turns(chat_templates, "trl/gptoss", "three turns") == [
        "<|channel|>final<|message|>w1<|end|>",
        "<|channel|>final<|message|>w2<|end|>",
        "<|channel|>final<|message|>w3<|return|>",
    ]
    assert turns(chat_templates, "trl/gptoss", "call with reasoning, unanswered") == [
        "<|channel|>analysis<|message|>r0<|end|><|start|>assistant to=functions.get_weather<|channel|>commentary json"
        '<|message|>{"city": "c1"}<|call|>'
    ]


def test_gemmas_calls_are_trained_without_the_tools_words(chat_templates: dict[str, str]) -> None:
    one, two = (
        f'<|tool_call>call:{name}{{city:<|"|>{city}<|"|>}}<tool_call|>'
        for name, city in (
            ("get_weather", "c1"),
            ("get_time", "c2"),
        )
    )
    for owner in ("trl/gemma4", "trl/gemma4_v4", "trl/gemma4_v5"):
        found = turns(chat_templates, owner, "parallel calls")
        assert found == [f"{one}{two}<|tool_response>", "w1<turn|>"]


def test_glms_turns_reach_to_the_mark_that_stops_it(chat_templates: dict[str, str]) -> None:
    assert turns(chat_templates, "trl/glm4moe", "call before the last question") == [
        "\n<think></think>\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>c1</arg_value>\n</tool_call>"
        "<|observation|>",
        "\n<think></think>\nw1<|user|>",
        "\n<think></think>\nw2",
    ]


def test_a_conversation_that_begins_with_the_assistant_is_read(chat_templates: dict[str, str]) -> None:
    for owner in ("trl/qwen3_5_think", "trl/qwen3_6", "trl/llama3", "trl/qwen2_5_vl"):
        end = "<|eot_id|>" if "llama" in owner else "<|im_end|>"
        assert turns(chat_templates, owner, "assistant first, unanswered") == [f"w0{end}"]
