"""From rendered conversations to tokens and labels.

A tokenizer spends a third of its time on the places of its tokens in the text. Several texts are tokenised without
them, all in one call. Where the bytes of a text's tokens, put together, are the text, they say the places; so it is for
tokenizers of bytes (Qwen's, Llama's, GPT's) unless they change the text. Other texts are tokenised once more.
"""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from twinkle.data_format import NOT_TRAINED, InputFeature
from twinkle.template.rendering import Span


class MarkedText(NamedTuple):
    """A rendered conversation.

    Attributes:
        spans: stretches of the text, in order.
        trains_spans: whether the spans are trained on; if not, everything else is.
    """

    text: str
    spans: list[Span]
    trains_spans: bool = True


class TokenLabels:
    """Tokenises marked texts."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._bytes = _TokenBytes(tokenizer)

    def one(self, marked: MarkedText) -> InputFeature:
        """The tokens of a text, each with its own id as label if it is trained on: if it overlaps a span, or none."""
        encoding = self.tokenizer.encode(marked.text, add_special_tokens=False)
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        inside = np.zeros(len(offsets), np.bool_)
        for span in marked.spans:
            inside |= (offsets[:, 0] < span.end) & (offsets[:, 1] > span.start)
        return _feature(encoding.ids, inside, marked)

    def several(self, texts: Sequence[MarkedText]) -> list[InputFeature]:
        """`one` for each of these texts."""
        encodings = self.tokenizer.encode_batch_fast(
            [marked.text for marked in texts], add_special_tokens=False
        )
        features: list[InputFeature] = []
        for marked, encoding in zip(texts, encodings, strict=True):
            ids = encoding.ids
            inside = self._inside(ids, marked)
            features.append(self.one(marked) if inside is None else _feature(ids, inside, marked))
        return features

    def _inside(self, ids: list[int], marked: MarkedText) -> npt.NDArray[np.bool_] | None:
        """Which tokens are in a span, bool [T]; None if their bytes don't say so for sure."""
        text, pieces = marked.text, list(map(self._bytes.__getitem__, ids))
        encoded = text.encode()
        if b"".join(pieces) != encoded:
            return None
        sizes = np.fromiter(map(len, pieces), np.int64, len(pieces))
        ends = np.cumsum(sizes)
        starts = ends - sizes
        inside = np.zeros(len(ids), np.bool_)
        for span in marked.spans:
            start, end = span
            if len(encoded) > len(text):
                start, end = len(text[:start].encode()), len(text[:end].encode())
            inside[ends.searchsorted(start, side="right") : starts.searchsorted(end)] = True
        return inside


def _feature(ids: list[int], inside: npt.NDArray[np.bool_], marked: MarkedText) -> InputFeature:
    input_ids = np.array(ids, dtype=np.int64)
    trained = inside if marked.trains_spans else ~inside
    return InputFeature(input_ids=input_ids, labels=np.where(trained, input_ids, NOT_TRAINED))


def _byte_alphabet() -> dict[str, int]:
    """The characters by which tokenizers of bytes write bytes, as GPT-2 began it: printable ones for themselves, the
    others as those from U+0100 on.
    """
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_ALPHABET: Final = _byte_alphabet()


class _TokenBytes(dict[int, bytes]):
    """What each token stands for, filled in as they are met; empty if that is unknown."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._added = {id: token.content for id, token in tokenizer.get_added_tokens_decoder().items()}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._tokenizer,)

    def __missing__(self, id: int) -> bytes:
        if id in self._added:
            found = self._added[id].encode()
        else:
            characters = self._tokenizer.id_to_token(id) or ""
            is_known = all(character in _ALPHABET for character in characters)
            found = bytes(_ALPHABET[character] for character in characters) if is_known else b""
        self[id] = found
        return found
