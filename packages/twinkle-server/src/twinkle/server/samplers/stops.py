"""When a sequence ends: stop tokens, stop strings, length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.types import Int64Array, SamplingParams

# A token gives at least one byte of text; a few more are decoded, since characters may straddle tokens.
_MARGIN_TOKENS = 8

# Prompt tokens that are decoded before the first sampled ones.
_TOKENS_BEFORE = 4


@dataclass(frozen=True)
class StopRule:
    """What ends a text: any of these tokens, or any of these strings in the text generated so far."""

    tokens: frozenset[int]
    strings: tuple[str, ...] = ()


def stop_rule(params: SamplingParams, eos_token_ids: tuple[int, ...], has_tokenizer: bool) -> StopRule:
    """A request's rule: without `stop`, the model's end-of-text tokens; what is given replaces them.

    Raises:
        InvalidRequest: if strings are given, but the model has no tokenizer.
    """
    stop = params.stop
    if stop is None:
        return StopRule(frozenset(eos_token_ids))
    given = [stop] if isinstance(stop, str) else list(stop)
    strings = tuple(item for item in given if isinstance(item, str))
    if strings and not has_tokenizer:
        raise InvalidRequest(
            "sampling_params.stop: this model has no tokenizer.json, so the server can't look for strings; "
            "give token ids"
        )
    return StopRule(frozenset(item for item in given if isinstance(item, int)), strings)


def load_tokenizer(directory: Path) -> Tokenizer | None:
    path = directory / "tokenizer.json"
    return Tokenizer.from_file(str(path)) if path.is_file() else None


def is_stopped(
    rule: StopRule,
    tokens: Sequence[int],
    tokenizer: Tokenizer | None,
    prompt: Sequence[int] | Int64Array = (),
) -> bool:
    """Whether the newest token completes a stop.

    Args:
        tokens: sampled so far.
        prompt: what precedes them, or its end: it is not searched for stop strings.
    """
    if tokens[-1] in rule.tokens:
        return True
    if not rule.strings or tokenizer is None:
        return False
    window = max(len(string.encode()) for string in rule.strings) + _MARGIN_TOKENS
    before = [int(token) for token in prompt[-_TOKENS_BEFORE:]]
    text = _text_after(before, list(tokens), window, tokenizer)
    return any(string in text for string in rule.strings)


def _text_after(before: list[int], tokens: list[int], window: int, tokenizer: Tokenizer) -> str:
    """The text of the latest tokens, as it reads after those before them.

    Many decoders treat their first token differently: they remove a space from it (Llama 2, Metaspace), or put none
    before it (WordPiece). So the first sampled tokens are decoded with some of the prompt.
    """
    if len(tokens) > window:
        return tokenizer.decode(tokens[-window:], skip_special_tokens=False)
    whole = tokenizer.decode([*before, *tokens], skip_special_tokens=False)
    given = tokenizer.decode(before, skip_special_tokens=False) if before else ""
    # The prompt may end in the middle of a character, which becomes another one with the rest.
    common = next((i for i, (a, b) in enumerate(zip(given, whole, strict=False)) if a != b), len(given))
    return whole[common:]
