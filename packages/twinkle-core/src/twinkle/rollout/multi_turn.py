"""Multi-turn conversations in which the model calls tools, or an environment responds.

Sampled tokens are never tokenised again: the tokens of other messages are appended to them, so each sampled token keeps
the log-probability it was drawn with. All ongoing conversations take their next turn together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import numpy as np
from tqdm import tqdm

from twinkle.data_format import Message, Trajectory, Types
from twinkle.protocol import types as core_types
from twinkle.protocol.errors import InvalidRequest
from twinkle.rollout.groups import PROGRESS_DELAY_SECONDS, encode_prompt, require_sampler, sampled_arrays
from twinkle.rollout.protocols import Result, Sampler
from twinkle.rollout.rollouts import Rollout
from twinkle.rollout.tools import Tool, as_tools, call_tools
from twinkle.template import Template


class Respond(Protocol):
    """Responds to the model: a user simulator, an environment, a game."""

    def __call__(self, rollout: Rollout, conversation: Mapping[str, Any], /) -> Sequence[Message] | None:
        """Return the messages that follow the model's last turn; an empty list, or None, ends the conversation.

        Not called for turns that call a tool or were cut off.

        Args:
            rollout: everything so far; `rollout.messages[-1]` is the model's last turn.
            conversation: the original row.
        """
        ...


def sample_turns(
    sampling_client: Sampler,
    template: Template,
    conversations: Sequence[Trajectory | Mapping[str, Any]],
    group_size: int,
    *,
    tools: Sequence[Tool | Callable[..., Any]] = (),
    respond: Respond | None = None,
    max_turns: int = 4,
    max_tokens: int,
    max_length: int | None = None,
    temperature: float = 1.0,
    seed: int | None = None,
    types: Types = core_types,
    **sampling_params: Any,
) -> list[list[Rollout]]:
    """Sample `group_size` whole conversations from each beginning.

    A conversation ends when the model neither calls a tool nor gets a response, when a turn is cut off at `max_tokens`,
    after `max_turns` model turns, or before it would exceed `max_length`.

    Args:
        conversations: rows with `messages` that end before an assistant turn; `tools` are added to each.
        tools: functions that the model may call (see `Tool.from_function`), or Tools.
        respond: responds to turns that call no tool.
        max_tokens: of each turn.
        max_length: of a whole conversation, in tokens; default: until the server says that the context is full.
        seed, temperature, types, sampling_params: as in `sample_groups`.

    Returns:
        A list for each conversation.

    Raises:
        InvalidRequest: if a conversation can't be rendered, or a number is out of range.
    """
    for name, value in (("group_size", group_size), ("max_turns", max_turns)):
        if value < 1:
            raise InvalidRequest(f"{name}: {value}; allowed are whole numbers from 1")
    require_sampler(sampling_client)
    by_name = as_tools(tools)
    schemas = [tool.schema for tool in by_name.values()]
    groups = [_beginnings(template, row, schemas, i, group_size) for i, row in enumerate(conversations)]
    params = {"max_tokens": max_tokens, "temperature": temperature, **sampling_params}
    turns = tqdm(range(max_turns), desc="sampling", unit="turn", delay=PROGRESS_DELAY_SECONDS, leave=False)
    going_on = [state for group in groups for state in group]
    count = len(going_on)
    for turn in turns:
        if turn:
            going_on = [state for state in going_on if state.is_answered(template, by_name, respond)]
        going_on = [state for state in going_on if _has_room(state.rollout, max_tokens, max_length)]
        first = None if seed is None else seed + turn * count
        _take_turns(sampling_client, template, going_on, types, params, first)
    return [[state.rollout for state in group] for group in groups]


def _take_turns(
    sampling_client: Sampler,
    template: Template,
    states: Sequence[_State],
    types: Types,
    params: Mapping[str, Any],
    seed: int | None,
) -> None:
    """Take one more model turn in each conversation. Those with equal tokens so far, as in a new group, share a
    request.
    """
    together: dict[bytes, list[_State]] = {}
    for state in states:
        together.setdefault(state.rollout.tokens.tobytes(), []).append(state)
    pending: list[Result] = []
    for i, same in enumerate(together.values()):
        prompt = types.ModelInput.from_ints(same[0].rollout.tokens.tolist())
        drawn = types.SamplingParams(seed=None if seed is None else seed + i, **params)
        pending.append(sampling_client.sample(prompt=prompt, num_samples=len(same), sampling_params=drawn))
    for same, each in zip(together.values(), pending, strict=True):
        for state, sequence in zip(same, each.result().sequences, strict=True):
            state.take_turn(template, sequence)


@dataclass
class _State:
    """An ongoing conversation.

    Attributes:
        conversation: the original row, with tools.
        rollout: everything so far.
        sampled: the tokens of the model's last turn.
        problems: problems: parsing problems of that turn.
    """

    conversation: dict[str, Any]
    rollout: Rollout
    sampled: Sequence[int] = ()
    problems: Sequence[str] = ()

    def take_turn(self, template: Template, sequence: Any) -> None:
        before = self.rollout
        tokens, is_sampled, logprobs = sampled_arrays(before.tokens, sequence)
        known = len(before.tokens)
        is_sampled[:known], logprobs[:known] = before.is_sampled, before.logprobs
        parsed = template.parse(sequence.tokens, self.conversation.get("tools"))
        self.sampled, self.problems = sequence.tokens, parsed.problems
        self.rollout = Rollout(
            tokens,
            is_sampled,
            logprobs,
            [*before.messages, parsed.message],
            template.decode(sequence.tokens, skip_special_tokens=True).strip(),
            sequence.stop_reason,
            before.num_turns + 1,
            (*before.problems, *parsed.problems),
        )

    def is_answered(self, template: Template, tools: Mapping[str, Tool], respond: Respond | None) -> bool:
        """Append the answers to the model's last turn; False if there are none, and the conversation has ended."""
        rollout = self.rollout
        if rollout.stop_reason != "stop":
            return False
        answers = call_tools(tools, rollout.messages[-1], self.problems) if tools else []
        if not answers and respond is not None:
            answers = _responses(respond, rollout, self.conversation)
        if not answers:
            return False
        index = len(rollout.messages) - 1
        messages = [*rollout.messages, *answers]
        more = template.continuation({**self.conversation, "messages": messages}, index, self.sampled)
        others = np.zeros(len(more))
        self.rollout = replace(
            rollout,
            tokens=np.concatenate([rollout.tokens, more]),
            is_sampled=np.concatenate([rollout.is_sampled, others.astype(np.bool_)]),
            logprobs=np.concatenate([rollout.logprobs, others.astype(np.float32)]),
            messages=messages,
        )
        return True


def _beginnings(
    template: Template, row: Trajectory | Mapping[str, Any], schemas: list[dict[str, Any]], i: int, count: int
) -> list[_State]:
    """`count` copies of the same conversation."""
    conversation = {**row, "tools": schemas} if schemas else {**row}
    prompt = encode_prompt(template, conversation, i)
    rollout = Rollout(
        prompt,
        np.zeros(len(prompt), np.bool_),
        np.zeros(len(prompt), np.float32),
        list(cast(Sequence[Message], row["messages"])),
        completion="",
        stop_reason="length",
        num_turns=0,
    )
    return [_State(conversation, rollout) for _ in range(count)]


def _responses(respond: Respond, rollout: Rollout, conversation: Mapping[str, Any]) -> list[Message]:
    name = getattr(respond, "__name__", type(respond).__name__)
    try:
        answers = respond(rollout, conversation)
    except Exception as error:  # a user's function may raise anything, and the user needs to know for what
        raise InvalidRequest(
            f"respond: {name} raised {type(error).__name__}: {error}; it was asked about {rollout.completion[:80]!r}, "
            "and is called as respond(rollout, conversation)"
        ) from error
    if answers is None:
        return []
    if isinstance(answers, Mapping | str):
        raise InvalidRequest(
            f"respond: {name} returned one {type(answers).__name__}; return a list of messages"
        )
    return list(answers)


def _has_room(rollout: Rollout, max_tokens: int, max_length: int | None) -> bool:
    return max_length is None or len(rollout.tokens) + max_tokens <= max_length
