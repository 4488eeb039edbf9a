"""Groups of answers to prompts, and the log-probabilities of given sequences.

All requests are sent before any result is awaited, so that the server processes them together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from twinkle.data_format import Message, Trajectory, Types
from twinkle.protocol import types as core_types
from twinkle.protocol.errors import InvalidRequest
from twinkle.rollout.protocols import Sampler, Scorer
from twinkle.rollout.rollouts import Rollout
from twinkle.template import Template

# A bar that appears for a moment would only be noise.
PROGRESS_DELAY_SECONDS = 2.0


def sample_groups(
    sampling_client: Sampler,
    template: Template,
    conversations: Sequence[Trajectory | Mapping[str, Any]],
    group_size: int,
    *,
    max_tokens: int,
    temperature: float = 1.0,
    seed: int | None = None,
    types: Types = core_types,
    **sampling_params: Any,
) -> list[list[Rollout]]:
    """Sample `group_size` answers to each conversation.

    Args:
        sampling_client: of either SDK.
        template: the model's.
        conversations: rows with `messages` (and `tools`) that end before an assistant turn.
        max_tokens: of each answer.
        temperature: 0 is greedy. Leave it at 1 for training: log-probabilities are those of the tempered distribution,
            unlike the trainer's.
        seed: the same seed uses the same random numbers, with a separate stream for each conversation; for when that
            gives the same answers, see `SamplingParams`.
        types: the client's module of types; `tinker.types` for Tinker's SDK.
        sampling_params: top_k, top_p, stop, as in SamplingParams.

    Returns:
        A list for each conversation.

    Raises:
        InvalidRequest: if a conversation can't be rendered, or the group size is below 1.
    """
    if group_size < 1:
        raise InvalidRequest(f"group_size: {group_size}; sample at least one answer a prompt")
    require_sampler(sampling_client)
    prompts = [encode_prompt(template, conversation, i) for i, conversation in enumerate(conversations)]
    # All are sent before any is waited for: samples in flight together are generated together.
    pending = [
        sampling_client.sample(
            prompt=types.ModelInput.from_ints(prompt.tolist()),
            num_samples=group_size,
            sampling_params=types.SamplingParams(
                max_tokens=max_tokens,
                temperature=temperature,
                seed=None if seed is None else seed + i,
                **sampling_params,
            ),
        )
        for i, prompt in enumerate(prompts)
    ]
    groups: list[list[Rollout]] = []
    bar = tqdm(pending, desc="sampling", unit="prompt", delay=PROGRESS_DELAY_SECONDS, leave=False)
    for conversation, prompt, each in zip(conversations, prompts, bar, strict=True):
        sequences = each.result().sequences
        groups.append([_single_turn(template, conversation, prompt, sequence) for sequence in sequences])
    return groups


def score(
    sampling_client: Scorer,
    sequences: Sequence[npt.ArrayLike],
    types: Types = core_types,
) -> list[npt.NDArray[np.float32]]:
    """The log-probability of each sequence's tokens after the first, given those before.

    Args:
        sampling_client: of the base model or checkpoint that scores, of either SDK.
        sequences: token ids, int [T_i], at least two each.
        types: the client's.

    Returns:
        Log-probabilities, float32 [T_i - 1] each.
    """
    require_sampler(sampling_client)
    inputs: list[list[int]] = []
    for i, sequence in enumerate(sequences):
        array = np.asarray(sequence)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise InvalidRequest(
                f"sequences[{i}]: expected token ids, a flat list of whole numbers; encode text first"
            )
        inputs.append(array.tolist())
    for i, tokens in enumerate(inputs):
        if len(tokens) < 2:
            raise InvalidRequest(f"sequences[{i}]: {len(tokens)} token(s); scoring needs at least 2")
    pending = [sampling_client.compute_logprobs(types.ModelInput.from_ints(tokens)) for tokens in inputs]
    bar = tqdm(pending, desc="scoring", unit="sequence", delay=PROGRESS_DELAY_SECONDS, leave=False)
    return [np.array(list(each.result())[1:], np.float32) for each in bar]


def require_sampler(client: object) -> None:
    """
    Raises:
        InvalidRequest: if it is not a sampling client.
    """
    if not callable(getattr(client, "sample", None)):
        raise InvalidRequest(
            f"sampling_client: {type(client).__name__} can't sample; a training client gives one that can, by "
            "save_weights_and_get_sampling_client()"
        )


def encode_prompt(
    template: Template, conversation: Trajectory | Mapping[str, Any], i: int
) -> npt.NDArray[np.int64]:
    """The conversation and the opening of an assistant turn as tokens; errors name the conversation."""
    try:
        return template.encode(conversation, add_generation_prompt=True)["input_ids"]
    except InvalidRequest as error:
        raise InvalidRequest(f"conversations[{i}]: {error.message}") from error


def sampled_arrays(
    prompt: npt.NDArray[np.int64], sequence: Any
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_], npt.NDArray[np.float32]]:
    """`tokens`, `is_sampled` and `logprobs` of a Rollout: the prompt followed by a sampled sequence."""
    tokens = np.array(sequence.tokens, np.int64)
    logprobs = np.array(sequence.logprobs, np.float32)
    return (
        np.concatenate([prompt, tokens]),
        np.concatenate([np.zeros(len(prompt), np.bool_), np.ones(len(tokens), np.bool_)]),
        np.concatenate([np.zeros(len(prompt), np.float32), logprobs]),
    )


def _single_turn(
    template: Template,
    conversation: Trajectory | Mapping[str, Any],
    prompt: npt.NDArray[np.int64],
    sequence: Any,
) -> Rollout:
    tokens, is_sampled, logprobs = sampled_arrays(prompt, sequence)
    parsed = template.parse(sequence.tokens, conversation.get("tools"))
    messages: list[Message] = [*conversation["messages"], parsed.message]
    return Rollout(
        tokens,
        is_sampled,
        logprobs,
        messages,
        template.decode(sequence.tokens, skip_special_tokens=True).strip(),
        sequence.stop_reason,
        problems=tuple(parsed.problems),
    )
