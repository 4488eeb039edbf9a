"""Stop strings under decoders that treat the first token in another way than the others."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from twinkle.server.samplers.stops import StopRule, is_stopped

WORDS = [
    "<s>",
    "▁Hello",
    "▁world",
    "lo",
    "▁",
    "<0xC3>",
    "<0xA9>",
    "!",
    "hello",
    "##ing",
    "world",
    ".",
    "Ġworld",
]
ID = {word: i for i, word in enumerate(WORDS)}


def tokenizer(decoder: object) -> Tokenizer:
    made = Tokenizer(models.WordLevel(ID, unk_token="<s>"))
    made.decoder = decoder  # pyright: ignore[reportAttributeAccessIssue]
    return made


def llama_2() -> Tokenizer:
    """As Llama 2's tokenizer.json has it."""
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return tokenizer(decoders.Sequence(parts))


def metaspace(scheme: str) -> Tokenizer:
    return tokenizer(decoders.Metaspace(prepend_scheme=scheme))


def word_piece() -> Tokenizer:
    return tokenizer(decoders.WordPiece(prefix="##"))


def byte_level() -> Tokenizer:
    made = tokenizer(decoders.ByteLevel())
    made.pre_tokenizer = pre_tokenizers.ByteLevel()
    return made


def first_stop(made: Tokenizer, prompt: list[str], sampled: list[str], stop: str) -> int | None:
    """How many tokens are sampled until the text stops."""
    rule = StopRule(frozenset(), (stop,))
    tokens = [ID[word] for word in sampled]
    before = [ID[word] for word in prompt]
    found = (n for n in range(1, len(tokens) + 1) if is_stopped(rule, tokens[:n], made, before))
    return next(found, None)


@pytest.mark.parametrize(
    "made", [llama_2(), metaspace("always"), metaspace("first"), metaspace("never")], ids=str
)
def test_a_space_at_the_start_of_what_is_sampled_is_part_of_it(made: Tokenizer):
    assert first_stop(made, ["<s>", "▁world"], ["▁Hello", "!"], " Hello") == 1
    assert first_stop(made, ["<s>"], ["▁Hello", "!"], " Hello") == 1
    assert first_stop(made, ["▁world"], ["▁Hello", "▁world", "!"], " Hello world") == 2
    assert first_stop(made, ["▁world"], ["lo", "▁Hello"], " lo") is None
    assert first_stop(made, ["▁world", "▁"], ["▁Hello"], "  Hello") is None  # one of the two is the prompt's


def test_a_space_is_found_far_from_the_start_too():
    assert first_stop(llama_2(), ["▁world"], ["!"] * 40 + ["▁Hello"], " Hello") == 41
    assert first_stop(llama_2(), ["▁world"], ["!"] * 40 + ["▁Hello"], "  Hello") is None


def test_words_that_a_decoder_puts_spaces_between():
    assert first_stop(word_piece(), ["world"], ["hello", "##ing"], " hello") == 1
    assert first_stop(word_piece(), ["hello"], ["##ing", "world"], "ing world") == 2
    assert first_stop(word_piece(), ["hello"], ["##ing"], " ##ing") is None


def test_what_the_prompt_has_is_no_stop():
    assert first_stop(llama_2(), ["▁Hello"], ["▁world"], "Hello") is None
    assert first_stop(llama_2(), ["▁Hello"], ["▁world"], "Hello world") is None
    assert first_stop(byte_level(), ["hello"], ["Ġworld", "!"], "world!") == 2
    assert first_stop(byte_level(), ["hello"], ["Ġworld", "!"], " world") == 1


def test_a_character_that_the_prompt_begins():
    assert first_stop(llama_2(), ["▁Hello", "<0xC3>"], ["<0xA9>", "!"], "é") == 1
    assert first_stop(llama_2(), ["▁Hello", "<0xC3>"], ["<0xA9>", "!"], "!") == 2


def test_without_a_prompt_the_text_is_what_it_is_alone():
    assert is_stopped(StopRule(frozenset(), ("Hello",)), [ID["▁Hello"]], llama_2())
