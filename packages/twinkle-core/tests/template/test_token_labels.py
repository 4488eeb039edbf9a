"""Texts tokenised together have the tokens and labels that each has alone, by the tokenizer's own offsets."""

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from twinkle.template.rendering import Span
from twinkle.template.token_labels import MarkedText, TokenLabels

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [("a", "b"), ("ab", "c"), ("Ġ", "a"), ("!", "Ċ"), ("Ã", "©")]
VOCABULARY = [*ALPHABET, *("".join(merge) for merge in MERGES)]

TEXTS = [
    "<|im_start|>user\nabc ab!\nabc<|im_end|>",
    "é😀 abc\n\n<|im_end|>\n é",
    "",
    "a\u0301bc",  # NFC makes one character of two
    "abc <mask>  abc",  # the token takes the white space before it along
]


def tokenizer(normalizes: bool) -> Tokenizer:
    made = Tokenizer(models.BPE({token: id for id, token in enumerate(VOCABULARY)}, MERGES))
    if normalizes:
        made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    made.decoder = decoders.ByteLevel()
    return with_added_tokens(made)


def with_added_tokens(made: Tokenizer) -> Tokenizer:
    made.add_special_tokens(["<|im_start|>", "<|im_end|>", AddedToken("<mask>", lstrip=True)])
    return made


def by_words() -> Tokenizer:
    """One whose tokens aren't made of bytes."""
    words = ["▁abc", "▁ab", "a", "b", "c", "▁", "!", "<unk>"]
    made = Tokenizer(models.BPE({word: id for id, word in enumerate(words)}, [], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    return with_added_tokens(made)


@pytest.mark.parametrize("made", [tokenizer(False), tokenizer(True), by_words()])
@pytest.mark.parametrize("trains_spans", [True, False])
def test_together_as_alone_whatever_is_marked(made: Tokenizer, trains_spans: bool) -> None:
    labels = TokenLabels(made)
    texts = [
        MarkedText(text, [Span(start, end)], trains_spans)
        for text in TEXTS
        for start in range(len(text) + 1)
        for end in range(start, len(text) + 1, 3)
    ]
    for marked, together in zip(texts, labels.several(texts), strict=True):
        alone = labels.one(marked)
        assert together["input_ids"].tolist() == alone["input_ids"].tolist()
        assert together["labels"].tolist() == alone["labels"].tolist(), marked


def test_texts_of_byte_tokens_are_tokenised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = TokenLabels(tokenizer(True))
    again: list[str] = []
    alone = labels.one

    def counted(marked: MarkedText):
        again.append(marked.text)
        return alone(marked)

    monkeypatch.setattr(labels, "one", counted)
    labels.several([MarkedText(text, [Span(0, len(text))]) for text in TEXTS])
    assert again == TEXTS[3:]
