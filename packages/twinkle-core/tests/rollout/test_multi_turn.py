"""Conversations that grow: what stands in them token by token, with a model that says what the test wants."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny_tokenizer import write_tiny_tokenizer

from twinkle.protocol.errors import InvalidRequest
from twinkle.rollout import sample_groups, sample_turns
from twinkle.template import Template

# ChatML, with calls as Hermes models write them.
TOOLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<call>{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}"
    "</call>{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL = '<call>{"name": "add", "arguments": {"a": 2, "b": 3}}</call>'


@dataclass
class Speaker:
    """Stands where a sampling client is: says the lines it was given, one a turn, and keeps what it was asked."""

    template: Template
    lines: list[str]
    asked: list[tuple[list[int], int, Any]] = field(default_factory=list)

    def sample(self, prompt: Any, num_samples: int, sampling_params: Any) -> Any:
        self.asked.append((prompt.to_ints(), num_samples, sampling_params))
        line = self.lines[min(len(self.asked), len(self.lines)) - 1]
        tokens = self.template.tokenizer.encode(line, add_special_tokens=False).ids
        reason = "stop" if line.endswith("<|im_end|>") else "length"
        sequence = SimpleNamespace(tokens=tokens, logprobs=[-0.5] * len(tokens), stop_reason=reason)
        return SimpleNamespace(result=lambda: SimpleNamespace(sequences=[sequence] * num_samples))


def add(a: int, b: int) -> int:
    """The sum."""
    return a + b


@pytest.fixture
def template(tmp_path: Path) -> Template:
    return Template(write_tiny_tokenizer(tmp_path / "model", TOOLS))


ROW = {"messages": [{"role": "user", "content": "2+3?"}]}


def test_what_was_sampled_stays_and_what_others_say_comes_behind_it(template: Template):
    speaker = Speaker(template, [f"{CALL}<|im_end|>", "It is 5.<|im_end|>"])
    [[rollout]] = sample_turns(speaker, template, [ROW], 1, tools=[add], max_tokens=99)
    assert [message["role"] for message in rollout.messages] == ["user", "assistant", "tool", "assistant"]
    assert rollout.messages[2].get("content") == "5"
    assert (rollout.completion, rollout.stop_reason, rollout.num_turns) == ("It is 5.", "stop", 2)
    sampled = template.decode(rollout.tokens[rollout.is_sampled])
    assert sampled == f"{CALL}<|im_end|>It is 5.<|im_end|>"
    whole = template.decode(rollout.tokens)
    assert whole == (
        f"<|im_start|>user\n2+3?<|im_end|>\n<|im_start|>assistant\n{CALL}<|im_end|>\n"
        "<|im_start|>tool\n5<|im_end|>\n<|im_start|>assistant\nIt is 5.<|im_end|>"
    )
    np.testing.assert_array_equal(rollout.logprobs, np.where(rollout.is_sampled, np.float32(-0.5), 0))
    # The second prompt is all that was said so far, the sampled tokens as they were.
    assert rollout.tokens[: len(speaker.asked[1][0])].tolist() == speaker.asked[1][0]


def test_conversations_that_stand_at_the_same_place_are_one_request(template: Template):
    speaker = Speaker(template, [f"{CALL}<|im_end|>", "5<|im_end|>"])
    other = {"messages": [{"role": "user", "content": "Hi"}]}
    groups = sample_turns(speaker, template, [ROW, other], 3, tools=[add], max_tokens=99, seed=7)
    assert [count for _, count, _ in speaker.asked] == [
        3,
        3,
        3,
    ]  # two prompts; then those that called the tool
    assert [params.seed for _, _, params in speaker.asked] == [7, 8, 13]
    assert [len(group) for group in groups] == [3, 3]


def test_a_call_that_can_not_be_read_is_told_to_the_model(template: Template):
    speaker = Speaker(template, ['<call>{"name": "add", </call><|im_end|>', "Sorry.<|im_end|>"])
    [[rollout]] = sample_turns(speaker, template, [ROW], 1, tools=[add], max_tokens=99)
    assert rollout.messages[2]["role"] == "tool"
    assert "Error: tool call 1" in str(rollout.messages[2].get("content"))
    assert len(rollout.problems) == 1


def test_it_ends_where_it_has_to(template: Template):
    cut_off = Speaker(template, ["I think"])
    [[rollout]] = sample_turns(cut_off, template, [ROW], 1, tools=[add], max_tokens=3)
    assert (rollout.stop_reason, rollout.num_turns) == ("length", 1)

    for_ever = Speaker(template, [f"{CALL}<|im_end|>"])
    [[rollout]] = sample_turns(for_ever, template, [ROW], 1, tools=[add], max_turns=3, max_tokens=99)
    assert rollout.num_turns == 3 and rollout.messages[-1]["role"] == "assistant"

    [[rollout]] = sample_turns(
        for_ever, template, [ROW], 1, tools=[add], max_turns=9, max_tokens=80, max_length=250
    )
    assert rollout.num_turns < 9 and len(rollout.tokens) <= 250


def test_somebody_else_may_respond(template: Template):
    speaker = Speaker(template, ["4<|im_end|>", "5<|im_end|>"])
    seen = []

    def correct(rollout: Any, row: Any) -> Any:
        seen.append((rollout.completion, row["answer"]))
        return [{"role": "user", "content": "No."}] if rollout.completion != row["answer"] else None

    [[rollout]] = sample_turns(speaker, template, [{**ROW, "answer": "5"}], 1, respond=correct, max_tokens=9)
    assert seen == [("4", "5"), ("5", "5")]
    assert [m.get("content") for m in rollout.messages] == ["2+3?", "4", "No.", "5"]


@pytest.mark.parametrize(
    ("respond", "message"),
    [
        (
            lambda rollout: [],
            "respond: <lambda> raised TypeError: .*called as respond.rollout, conversation.",
        ),
        (lambda rollout, row: row["nope"], "raised KeyError: 'nope'; it was asked about '4'"),
        (lambda rollout, row: {"role": "user"}, "returned one dict; return a list of messages"),
    ],
)
def test_a_response_that_fails_is_named(template: Template, respond, message: str):
    with pytest.raises(InvalidRequest, match=message):
        sample_turns(Speaker(template, ["4<|im_end|>"]), template, [ROW], 1, respond=respond, max_tokens=9)


def test_what_is_wrong_is_said(template: Template):
    speaker: Any = Speaker(template, ["4<|im_end|>"])
    with pytest.raises(InvalidRequest, match="group_size: 0"):
        sample_turns(speaker, template, [ROW], 0, max_tokens=9)
    with pytest.raises(InvalidRequest, match=r"conversations\[1\]: messages: expected a list"):
        sample_turns(speaker, template, [ROW, {"messages": "Hi"}], 1, max_tokens=9)
    with pytest.raises(InvalidRequest, match="there is no 'top_pp'; did you mean 'top_p'"):
        sample_groups(speaker, template, [ROW], 1, max_tokens=9, top_pp=0.3)
    with pytest.raises(InvalidRequest, match="object can't sample; a training client gives one that can"):
        sample_groups(object(), template, [ROW], 1, max_tokens=9)  # pyright: ignore[reportArgumentType]
