"""Three real models' templates, token for token against Transformers, and labels against a scan of the tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from twinkle.data_format import NOT_TRAINED
from twinkle.template import Template

pytestmark = pytest.mark.network

MODELS = ["smollm2", "qwen3", "llama31"]


@dataclass(frozen=True)
class Real:
    """A real model's template and its tokenizer in Transformers."""

    name: str
    folder: Path
    template: Template
    tokenizer: Any

    def reference_ids(self, conversation: dict[str, Any], **options: Any) -> list[int]:
        return self.tokenizer.apply_chat_template(
            conversation["messages"], tools=conversation.get("tools"), return_dict=False, **options
        )

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def scanned_labels(self, ids: list[int], empty_thinking_is_given: bool = False) -> list[int]:
        """Labels by reading the tokens alone: from the header of each assistant's turn to its end token.

        Right wherever no message holds such tokens itself, and for templates that write turns as these do.
        """
        llama = self.name == "llama31"
        opening = self.ids(
            "<|start_header_id|>assistant<|end_header_id|>" if llama else "<|im_start|>assistant"
        )
        line_break = self.ids("\n\n" if llama else "\n")
        thinking = self.ids("<think>\n\n</think>\n\n")
        [end] = self.ids("<|eot_id|>" if llama else "<|im_end|>")
        labels = [NOT_TRAINED] * len(ids)
        position = 0
        while position < len(ids):
            if ids[position : position + len(opening)] != opening:
                position += 1
                continue
            position += len(opening)
            # Otherwise it is one token with the white space that the answer begins with.
            if ids[position : position + 1] == line_break:
                position += 1
            if empty_thinking_is_given and ids[position : position + len(thinking)] == thinking:
                position += len(thinking)
            while position < len(ids):
                labels[position] = ids[position]
                position += 1
                if ids[position - 1] == end:
                    break
        return labels


@pytest.fixture(scope="module")
def load(real_tokenizers: ModuleType) -> Callable[[str], Real]:
    folders = {
        "smollm2": real_tokenizers.smollm2_dir,
        "qwen3": real_tokenizers.qwen3_tokenizer_dir,
        "llama31": real_tokenizers.llama31_tokenizer_dir,
    }
    loaded: dict[str, Real] = {}

    def get(name: str) -> Real:
        if name not in loaded:
            folder = folders[name]()
            loaded[name] = Real(name, folder, Template(folder), AutoTokenizer.from_pretrained(folder))
        return loaded[name]

    return get


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Wetter für «Städte» <b>",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **rest: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **rest}


def call(**arguments: Any) -> dict[str, Any]:
    return {
        "id": "call_0001",
        "type": "function",
        "function": {"name": "get_weather", "arguments": arguments},
    }


PLAIN: dict[str, dict[str, Any]] = {
    "one turn": {"messages": [user("Who are you?"), assistant("I am My Model.")]},
    "system prompt": {
        "messages": [{"role": "system", "content": "Be brief."}, user("Hi"), assistant("Hello there!")]
    },
    "several turns": {
        "messages": [
            user("a"),
            assistant("b b"),
            user("c\n\n"),
            assistant("d: 1234567"),
            user("e"),
            assistant("f"),
        ]
    },
    "unanswered": {"messages": [user("a"), assistant("b"), user("c")]},
    "other scripts and emoji": {
        "messages": [user("你好,世界 — naïve café 👩‍👩‍👧 e\u0301"), assistant("¡Olé! 😀 日本語 \u200b עברית")]
    },
    "empty answers": {"messages": [user("a"), assistant(""), user("b"), assistant("")]},
    "white space": {"messages": [user("  a  "), assistant("    indented\n\n\n\tcode\n")]},
    "answers in a row": {"messages": [user("a"), assistant("b"), assistant("c")]},
    "looks like a turn": {
        "messages": [user("a"), assistant("assistant\nuser\n\nassistant"), user("assistant\n")]
    },
    "keys of None": {
        "messages": [user("a"), assistant("b", tool_calls=None, name=None, reasoning_content=None), user("c")]
    },
    "reasoning": {
        "messages": [
            user("1+1?"),
            assistant("2", reasoning_content="one and one"),
            user("2+2?"),
            assistant("4", reasoning_content="two\n\nand two"),
        ]
    },
}

QWEN3_ONLY: dict[str, dict[str, Any]] = {
    "thinking in the content": {
        "messages": [
            user("1+1?"),
            assistant("<think>\none and one\n</think>\n\n2"),
            user("2+2?"),
            assistant("<think>\ntwo and two\n</think>\n\n4"),
        ]
    },
    "tools": {
        "tools": [WEATHER],
        "messages": [
            user("Weather in Zürich and Paris?"),
            assistant("Let me look.", tool_calls=[call(city="Zürich"), call(city="Paris")]),
            {"role": "tool", "content": "rain", "tool_call_id": "call_0001"},
            {"role": "tool", "content": "sun", "tool_call_id": "call_0001"},
            assistant("Rain and sun."),
        ],
    },
    "tools, then another question": {
        "tools": [WEATHER],
        "messages": [
            user("Weather?"),
            assistant("", tool_calls=[call(city="Rome")], reasoning_content="I need the tool"),
            {"role": "tool", "content": "hot"},
            assistant("", tool_calls=[{"name": "get_weather", "arguments": '{"city": "Oslo"}'}]),
            {"role": "tool", "content": "cold"},
            assistant("Hot and cold.", reasoning_content="both are there"),
            user("Thanks"),
            assistant("You are welcome."),
        ],
    },
}

CASES = [(model, name) for model in MODELS for name in PLAIN] + [("qwen3", name) for name in QWEN3_ONLY]


@pytest.mark.parametrize(("model", "name"), CASES)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_ids_are_apply_chat_templates_and_labels_those_of_the_assistants_turns(
    load: Callable[[str], Real], model: str, name: str, add_generation_prompt: bool
) -> None:
    real = load(model)
    conversation = {**PLAIN, **QWEN3_ONLY}[name]
    feature = real.template.encode(conversation, add_generation_prompt=add_generation_prompt)
    expected = real.reference_ids(conversation, add_generation_prompt=add_generation_prompt)
    assert feature["input_ids"].tolist() == expected
    assert feature["labels"].tolist() == real.scanned_labels(expected)


@pytest.mark.parametrize("name", [*PLAIN, *QWEN3_ONLY])
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_with_thinking_off_the_empty_thinking_belongs_to_the_prompt(
    load: Callable[[str], Real], name: str, add_generation_prompt: bool
) -> None:
    real = load("qwen3")
    template = Template(real.folder, chat_template_kwargs={"enable_thinking": False})
    conversation = {**PLAIN, **QWEN3_ONLY}[name]
    feature = template.encode(conversation, add_generation_prompt=add_generation_prompt)
    expected = real.reference_ids(
        conversation, add_generation_prompt=add_generation_prompt, enable_thinking=False
    )
    assert feature["input_ids"].tolist() == expected
    # Reasoning in the data contradicts the prompt that is asked for; what is trained on then is left open.
    if (
        not any("reasoning_content" in message for message in conversation["messages"])
        and "think" not in name
    ):
        assert feature["labels"].tolist() == real.scanned_labels(expected, empty_thinking_is_given=True)


@pytest.mark.parametrize("model", MODELS)
def test_what_is_trained_on_reads_as_the_answers(load: Callable[[str], Real], model: str) -> None:
    real = load(model)
    conversation = {"messages": [user("Who?"), assistant("I am 小明 😀."), user("Sure?"), assistant("Yes.")]}
    labels = real.template.encode(conversation)["labels"]
    text = real.template.decode(labels[labels != NOT_TRAINED])
    end = "<|eot_id|>" if model == "llama31" else "<|im_end|>"
    thinking = "<think>\n\n</think>\n\n" if model == "qwen3" else ""
    assert text == f"I am 小明 😀.{end}{thinking}Yes.{end}"


def test_qwen3_trains_on_the_thinking_of_the_last_turn_only(load: Callable[[str], Real]) -> None:
    real = load("qwen3")
    labels = real.template.encode(PLAIN["reasoning"])["labels"]
    text = real.template.decode(labels[labels != NOT_TRAINED])
    assert text == "2<|im_end|><think>\ntwo\n\nand two\n</think>\n\n4<|im_end|>"


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("skip_special_tokens", [False, True])
def test_decode_is_transformers(load: Callable[[str], Real], model: str, skip_special_tokens: bool) -> None:
    real = load(model)
    for conversation in PLAIN.values():
        ids = real.template.encode(conversation)["input_ids"]
        expected = real.tokenizer.decode(ids.tolist(), skip_special_tokens=skip_special_tokens)
        assert real.template.decode(ids, skip_special_tokens=skip_special_tokens) == expected
        assert real.template.decode(ids.tolist(), skip_special_tokens=skip_special_tokens) == expected


# Text of all kinds but lone surrogates, which are no text, and the angle brackets that special tokens are made of.
words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<>"), max_size=20)
conversations = st.builds(
    lambda system, turns, last: (
        ([{"role": "system", "content": system}] if system is not None else [])
        + [message for question, answer in turns for message in (user(question), assistant(answer))]
        + ([user(last or "")] if last is not None or not turns else [])
    ),
    st.none() | words,
    st.lists(st.tuples(words, words), max_size=4),
    st.none() | words,
)


@pytest.mark.parametrize("model", MODELS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=conversations, add_generation_prompt=st.booleans())
def test_any_conversation_is_encoded_as_transformers_does(
    load: Callable[[str], Real], model: str, messages: list[dict[str, Any]], add_generation_prompt: bool
) -> None:
    real = load(model)
    feature = real.template.encode({"messages": messages}, add_generation_prompt=add_generation_prompt)
    expected = real.reference_ids({"messages": messages}, add_generation_prompt=add_generation_prompt)
    assert feature["input_ids"].tolist() == expected
    assert feature["labels"].tolist() == real.scanned_labels(expected)


MARKED_CHATML = (
    "{% for message in messages %}{% if message.role == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}\n{% else %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("name", list(PLAIN))
def test_generation_marks_give_transformers_assistant_mask(load: Callable[[str], Real], name: str) -> None:
    real = load("smollm2")
    template = Template(real.folder, chat_template=MARKED_CHATML)
    feature = template.encode(PLAIN[name])
    reference = real.tokenizer.apply_chat_template(
        PLAIN[name]["messages"],
        chat_template=MARKED_CHATML,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert feature["input_ids"].tolist() == reference["input_ids"]
    assert (feature["labels"] != NOT_TRAINED).astype(int).tolist() == reference["assistant_masks"]
