"""Grades whole batches, and reports where an error occurred."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from tqdm import tqdm

from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.types import Float32Array
from twinkle.reward.base import Reward, reward_name, score

# A bar that appears for a moment would only be noise.
_PROGRESS_DELAY_SECONDS = 1.0

# Characters of a completion shown in error messages.
_SHOWN_CHARACTERS = 60


def grade(
    reward: Reward, completions: Sequence[str], rows: Sequence[Mapping[str, Any]], num_threads: int = 1
) -> Float32Array:
    """The reward of each completion.

    Args:
        reward: a function of (completion, row).
        completions: N texts.
        rows: N dataset rows, one per completion.
        num_threads: how many completions are graded at once: for rewards that wait, such as for a judge model, and for
            `MathReward`. With several threads, the reward must be thread-safe.

    Returns:
        float32 [N].

    Raises:
        InvalidRequest: naming completion and reward, if the reward raises or does not return a finite number; or if
            there is not one row per completion.
    """
    texts = _texts("completions", completions)
    if len(rows) != len(texts):
        raise InvalidRequest(
            f"rows: {len(rows)} rows for {len(texts)} completions; there must be one for each"
        )
    return _scores(reward, texts, list(rows), lambda i: f"completion {i}", num_threads)


def grade_groups(
    reward: Reward, groups: Sequence[Sequence[str]], rows: Sequence[Mapping[str, Any]], num_threads: int = 1
) -> Float32Array:
    """The reward of each completion of each prompt, for `grpo_advantages`.

    Args:
        reward: a function of (completion, row).
        groups: the G completions of each of P prompts.
        rows: P dataset rows, one per prompt.
        num_threads: as for `grade`.

    Returns:
        float32 [P, G].

    Raises:
        InvalidRequest: naming prompt, sample and reward, if the reward raises or does not return a finite number; or if
            groups differ in size, or there is not one row per prompt.
    """
    if len(rows) != len(groups):
        raise InvalidRequest(
            f"rows: {len(rows)} rows for {len(groups)} groups; there must be one for each prompt"
        )
    parts = [_texts(f"groups[{i}]", group) for i, group in enumerate(groups)]
    size = len(parts[0]) if parts else 0
    for i, part in enumerate(parts):
        if len(part) != size:
            raise InvalidRequest(
                f"groups[{i}]: {len(part)} completions, where groups[0] has {size}; sample every prompt with the same "
                "num_samples, or grade groups one by one"
            )
    texts = [text for part in parts for text in part]
    repeated = [row for row in rows for _ in range(size)]
    scores = _scores(reward, texts, repeated, lambda i: f"prompt {i // size}, sample {i % size}", num_threads)
    return scores.reshape(len(parts), size)


def _scores(
    reward: Reward,
    texts: list[str],
    rows: list[Mapping[str, Any]],
    place: Callable[[int], str],
    num_threads: int,
) -> Float32Array:
    if not callable(reward):
        raise InvalidRequest(f"reward: {type(reward).__name__} is no function of (completion, row)")
    if isinstance(reward, type):
        raise InvalidRequest(
            f"reward: {reward.__name__} is a class; give an instance: {reward.__name__}(...)"
        )
    if num_threads < 1:
        raise InvalidRequest(f"num_threads: {num_threads}; at least 1")

    def score_at(i: int) -> float:
        try:
            return score(reward, texts[i], rows[i])
        except InvalidRequest as error:
            shown = repr(texts[i][:_SHOWN_CHARACTERS]) + ("..." if len(texts[i]) > _SHOWN_CHARACTERS else "")
            raise InvalidRequest(f"{place(i)} ({shown}): {error.message}") from error.__cause__ or error

    def collected(scores: Iterable[float]) -> Float32Array:
        title = f"Grading ({reward_name(reward)})"
        bar = tqdm(scores, total=len(texts), desc=title, unit="completion", delay=_PROGRESS_DELAY_SECONDS)
        return np.fromiter(bar, np.float32, len(texts))

    if num_threads == 1:
        return collected(map(score_at, range(len(texts))))
    with ThreadPoolExecutor(num_threads, "grading") as pool:
        return collected(pool.map(score_at, range(len(texts))))


def _texts(name: str, texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str):
        raise InvalidRequest(f"{name}: one text; expected a list of texts")
    for i, text in enumerate(texts):
        if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidRequest(
                f"{name}[{i}]: {type(text).__name__}; expected text: decode the tokens of a sequence first"
            )
    return list(texts)
