"""Encoding of rows: they are recognised as conversations or pairs, tokenised, and the outcomes are counted.

`parallel` runs it in several processes, `cache` avoids it.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from twinkle.data_format import NOT_TRAINED, InputFeature
from twinkle.dataset.readers import Row
from twinkle.dataset.rows import apply_step
from twinkle.preprocessor import ConversationProcessor, PreferenceProcessor
from twinkle.protocol.errors import InvalidRequest
from twinkle.template import SequenceTooLong, Template
from twinkle.template.token_labels import MarkedText

logger = logging.getLogger(__name__)

PAIR = ("chosen", "rejected")
"""The columns of a preference row."""

# Tokenised together: enough for all cores, and few enough to move a progress bar.
_BATCH_ROWS = 128

_as_conversation = ConversationProcessor()
_as_pair = PreferenceProcessor()


class EncodingTask(NamedTuple):
    """A conversation to encode, and its place for error messages."""

    row: Row
    where: str


class Outcome(NamedTuple):
    """The outcome for one conversation.

    Attributes:
        feature: None if it was too long and is dropped.
        cut: whether it was truncated to `max_length`.
    """

    feature: InputFeature | None
    cut: bool


@dataclass(frozen=True)
class Tally:
    """The effect of `max_length` on a dataset's rows.

    Attributes:
        rows: before encoding.
        cut: truncated rows.
        left_out: dropped rows.
    """

    rows: int = 0
    cut: int = 0
    left_out: int = 0


@dataclass(frozen=True)
class Encoder:
    """A template with its arguments: everything that the encoding of a row depends on."""

    template: Template
    add_generation_prompt: bool = False

    def __call__(self, row: Row) -> Outcome:
        """Encode a conversation.

        Raises:
            InvalidRequest: if the template refuses it.
            SequenceTooLong: if it is longer than the template's `max_length`, and the strategy is "raise".
        """
        template = self.template
        try:
            feature = template.encode(row, self.add_generation_prompt)
        except SequenceTooLong:
            if template.truncation_strategy == "delete":
                return Outcome(None, False)
            raise
        return Outcome(feature, self._is_cut(row, len(feature["input_ids"])))

    def batch(self, tasks: Sequence[EncodingTask]) -> list[Outcome]:
        """Encode conversations; their texts are tokenised together.

        Raises:
            InvalidRequest: naming the place of the first one that fails.
        """
        template = self.template
        if type(template).encode is not Template.encode:  # a class that encodes in a way of its own
            return [apply_step(self, task.row, task.where) for task in tasks]
        texts: list[MarkedText] = []
        failure = None
        for task in tasks:
            try:
                mark = partial(template.mark, add_generation_prompt=self.add_generation_prompt)
                texts.append(apply_step(mark, task.row, task.where))
            except InvalidRequest as error:  # unless one of those before it is too long
                failure = error
                break
        features = zip(tasks, template.tokenize(texts), strict=failure is None)
        outcomes = [self._cut(feature, task.where) for task, feature in features]
        if failure is not None:
            raise failure
        return outcomes

    def _cut(self, feature: InputFeature, where: str) -> Outcome:
        try:
            cut = self.template.cut(feature)
        except SequenceTooLong as error:
            if self.template.truncation_strategy == "delete":
                return Outcome(None, False)
            raise InvalidRequest(f"{where}: {error.message}") from error
        return Outcome(cut, len(cut["input_ids"]) < len(feature["input_ids"]))

    def _is_cut(self, row: Row, length: int) -> bool:
        """Whether a feature of `length` tokens was truncated.

        Only one of exactly `max_length` tokens can be. Its text is then tokenised again, untruncated, which is cheap
        beside encoding's search for the assistant's turns.
        """
        if self.template.max_length is None or length < self.template.max_length:
            return False
        text = self.template.render(row, self.add_generation_prompt)
        return len(self.template.tokenizer.encode(text, add_special_tokens=False).ids) > length


def run_tasks(
    encoder: Encoder, tasks: Iterable[EncodingTask], done: Callable[[int], object]
) -> list[Outcome]:
    """Encode in this process; `done` is called with the number of tasks finished since the last call.

    Raises:
        InvalidRequest: naming the place of the first task that fails.
    """
    outcomes: list[Outcome] = []
    left = iter(tasks)
    while batch := list(islice(left, _BATCH_ROWS)):
        outcomes += encoder.batch(batch)
        done(len(batch))
    return outcomes


def as_conversation(row: Row) -> Row:
    """The row with `messages`, converted from any of the usual layouts.

    Raises:
        InvalidRequest: if it has none of them, or is already encoded.
    """
    if "messages" in row:
        return _as_conversation(row) if row["messages"] is None else row
    if "input_ids" in row or _is_encoded_pair(row):
        raise InvalidRequest("the row is encoded already; encode() is called once")
    return _as_conversation(row)


def as_pair(row: Row) -> Row:
    """The row with lists of messages in `chosen` and `rejected`, converted from any of the usual layouts.

    Raises:
        InvalidRequest: if it is not a preference row, or is already encoded.
    """
    if "input_ids" in row or _is_encoded_pair(row):
        raise InvalidRequest("the row is encoded already; encode_pairs() is called once")
    return _as_pair(row)


def sides(row: Row, where: str) -> list[EncodingTask]:
    """The two conversations of a row from `as_pair`."""
    tools = {"tools": row["tools"]} if "tools" in row else {}
    return [EncodingTask({"messages": row[side], **tools}, f"{where}: {side}") for side in PAIR]


class EncodedRow(NamedTuple):
    """The outcome for a row that was encoded by itself.

    Attributes:
        row: None if it was too long and is dropped.
        trained: whether it has a token to train on; for a pair, whether both conversations do.
    """

    row: Row | None
    trained: bool


def encode_row(encoder: Encoder, row: Row) -> EncodedRow:
    """One row, in any of the usual layouts, with the feature of its conversation.

    Raises:
        InvalidRequest: if it is not a conversation, or the template refuses it.
    """
    conversation = as_conversation(row)
    feature = encoder(conversation).feature
    if feature is None:
        return EncodedRow(None, False)
    return EncodedRow(with_feature(conversation, feature), trained_tokens(feature) > 0)


def encode_pair(encoder: Encoder, row: Row) -> EncodedRow:
    """One preference row, in any of the usual layouts, with the features of its two conversations.

    Raises:
        InvalidRequest: naming the side, if it is not a pair, or the template refuses it.
    """
    pair = as_pair(row)
    made: list[InputFeature] = []
    for side, task in zip(PAIR, sides(pair, ""), strict=True):
        feature = apply_step(encoder, task.row, side).feature
        if feature is None:
            return EncodedRow(None, False)
        made.append(feature)
    return EncodedRow(with_features(pair, *made), min(map(trained_tokens, made)) > 0)


def with_feature(row: Row, feature: InputFeature) -> Row:
    """The row with its feature in place of the columns it was made from."""
    return {**{key: value for key, value in row.items() if key not in ("messages", "tools")}, **feature}


def with_features(row: Row, chosen: InputFeature, rejected: InputFeature) -> Row:
    others = {key: value for key, value in row.items() if key != "tools"}
    return {**others, "chosen": chosen, "rejected": rejected}


def features_of(row: Row) -> list[InputFeature]:
    """The features of an encoded row: one, two for a pair, none if it is not encoded.

    Raises:
        InvalidRequest: if a feature has no labels, or labels of another length.
    """
    if "input_ids" in row:
        return [_as_feature(row)]
    return [_as_feature(row[side]) for side in PAIR] if _is_encoded_pair(row) else []


def trained_tokens(feature: InputFeature) -> int:
    """The number of tokens with a loss: labelled, with a nonzero weight, and not the first, which nothing predicts."""
    marked = feature["labels"][1:] != NOT_TRAINED
    weights = feature.get("loss_weights")
    return int(np.count_nonzero(marked if weights is None else marked & (weights[1:] != 0)))


def check_trained(untrained: int, rows: int, encoder: Encoder, first: str) -> None:
    """Warn of rows without a token to train on.

    Args:
        first: the place of the first such row.

    Raises:
        InvalidRequest: if no row has one.
    """
    if not untrained or encoder.add_generation_prompt:
        return
    template = encoder.template
    if untrained == rows:
        raise InvalidRequest(
            f"encode: none of {rows} rows has a token to train on. Look at three things: whether the messages hold "
            f"turns of the assistant; what the template's train_on marks (it is {template.train_on!r}); and whether "
            f"cutting took the answers away (max_length={template.max_length}, "
            f"truncation_strategy={template.truncation_strategy!r}). To sample from, encode(add_generation_prompt=True)"
        )
    logger.warning(
        "%d of %d rows have no token to train on; the first is %s: look for its assistant's turn, at train_on (%r), "
        "and whether max_length (%s) cut the answer off",
        untrained,
        rows,
        first,
        template.train_on,
        template.max_length,
    )


def check_left(rows: int, left_out: int, template: Template) -> None:
    """Warn of rows that were dropped because they are too long.

    Raises:
        InvalidRequest: if no row is left.
    """
    if left_out == rows:
        raise InvalidRequest(
            f"encode: nothing is left: all {rows} rows have over {template.max_length} tokens (max_length), and "
            "truncation_strategy='delete' leaves such rows out; raise max_length, or set 'left' or 'right' to cut"
        )
    if left_out:
        logger.warning("%d of %d rows left out: over %s tokens", left_out, rows, template.max_length)


def _as_feature(row: Row) -> InputFeature:
    """A row's feature as arrays; rows that were encoded elsewhere may hold lists."""
    lacking = [key for key in ("input_ids", "labels") if row.get(key) is None]
    if lacking:
        raise InvalidRequest(f"{', '.join(lacking)}: nothing there; an encoded row has input_ids and labels")
    feature = InputFeature(
        input_ids=np.asarray(row["input_ids"], np.int64), labels=np.asarray(row["labels"], np.int64)
    )
    if row.get("loss_weights") is not None:
        feature["loss_weights"] = np.asarray(row["loss_weights"], np.float32)
    for key, array in cast(dict[str, npt.NDArray[Any]], feature).items():
        if array.shape != (len(feature["input_ids"]),):
            raise InvalidRequest(f"{key}: {len(array)} entries for {len(feature['input_ids'])} input_ids")
    return feature


def _is_encoded_pair(row: Row) -> bool:
    return all(isinstance(row.get(side), dict) and "input_ids" in row[side] for side in PAIR)
