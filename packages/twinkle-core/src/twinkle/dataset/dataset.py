"""A dataset whose rows are worked on at once: mapped, filtered, mixed, encoded, packed, described."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Self

from twinkle.data_format import InputFeature
from twinkle.dataset.cache import cache_folder, cache_key, load_outcomes, store_outcomes
from twinkle.dataset.description import Description, describe
from twinkle.dataset.encoding import (
    Encoder,
    EncodingTask,
    Outcome,
    Tally,
    as_conversation,
    as_pair,
    check_left,
    check_trained,
    features_of,
    sides,
    trained_tokens,
    with_feature,
    with_features,
)
from twinkle.dataset.meta import DatasetMeta
from twinkle.dataset.packing import assign_rows, join_features
from twinkle.dataset.parallel import encode_jobs
from twinkle.dataset.readers import Row
from twinkle.dataset.rows import LocatedRow, Step, apply_step, require_template
from twinkle.dataset.sources import DataSource, Sources, finished, progress
from twinkle.protocol.errors import InvalidRequest

logger = logging.getLogger(__name__)


class Dataset(Sources):
    """Rows from one or several sources, kept in memory in the order of their sources.

    Methods that change the rows do so in place and return the dataset itself.

    Args:
        dataset_meta: the source, or several; text or a path stands for `DatasetMeta(id)`.

    Raises:
        NotFound: if a source, or the files asked for in it, can't be found.
        InvalidRequest: naming file and line, if a file can't be read; or if it is no source.
    """

    # What `encode` met with, for `describe`.
    _tally = Tally()

    def encode(
        self,
        add_generation_prompt: bool = False,
        *,
        num_proc: int | None = 1,
        cache_dir: str | os.PathLike[str] | bool | None = None,
    ) -> Self:
        """Exchange each row's `messages` and `tools` for the `InputFeature` the template makes of them.

        Rows without `messages` are read as `ConversationProcessor` reads them. Other columns stay with the row. With
        the template's strategy "delete", rows that are too long are left out.

        Args:
            add_generation_prompt: end each with the opening of an assistant's turn, to sample what follows.
            num_proc: processes to work in; None is one a core. Each takes a second or more to start, so that several
                pay only where one would take many times as long; the result and the errors are the same.
            cache_dir: the folder in which to keep the result, and to look for one of the same rows, template and
                arguments; True is $TWINKLE_CACHE/encoded, or ~/.cache/twinkle/encoded. None keeps nothing. Files are
                never removed. The code of a template class of one's own counts as part of it, but not what that calls.

        Raises:
            InvalidRequest: naming file and line, if a row is no conversation; if no template was set; if there are no
                rows, or none is left; or if no row has a token to train on (unless `add_generation_prompt`).
        """
        encoder = self._encoder("encode", add_generation_prompt)
        rows = self._recognised(as_conversation)
        tasks = [EncodingTask(row, item.where) for row, item in zip(rows, self._items(), strict=True)]
        outcomes = _outcomes(encoder, tasks, num_proc, cache_dir)
        self._finish(
            encoder, rows, [(outcome,) for outcome in outcomes], lambda row, made: with_feature(row, *made)
        )
        return self

    def encode_pairs(
        self,
        *,
        num_proc: int | None = 1,
        cache_dir: str | os.PathLike[str] | bool | None = None,
    ) -> Self:
        """Exchange `chosen` and `rejected` of each row for the `InputFeature` of the whole conversation each.

        Rows are read as `PreferenceProcessor` reads them; `tools` holds for both conversations. Other columns stay with
        the row. With the template's strategy "delete", a pair of which either is too long is left out.

        Args:
            num_proc, cache_dir: as in `encode`.

        Raises:
            InvalidRequest: naming file, line and side, if a row is no pair; else as in `encode`.
        """
        encoder = self._encoder("encode_pairs", False)
        rows = self._recognised(as_pair)
        tasks = [
            task for row, item in zip(rows, self._items(), strict=True) for task in sides(row, item.where)
        ]
        outcomes = _outcomes(encoder, tasks, num_proc, cache_dir)
        pairs = list(zip(outcomes[::2], outcomes[1::2], strict=True))
        self._finish(encoder, rows, pairs, lambda row, made: with_features(row, *made))
        return self

    def pack(self, max_length: int) -> Self:
        """Put several short features into each row, up to `max_length` tokens. Call it after `encode`.

        A token can attend to all examples before its own in the row, not only to its own: models trained this way learn
        to pass them over, but the loss is not that of the examples by themselves. The server already puts rows of like
        lengths together and loses little to padding, so packing pays for very many very short rows only.

        The longest go first, each into the row that it fills best; the same rows are always packed the same way. The
        first label of every example but a row's first is -100, since what is before it is another example. All columns
        but the feature are dropped, and the sources become one.

        Args:
            max_length: most tokens of a row. A longer feature is cut, or left out, if the template's
                `truncation_strategy` says so.

        Raises:
            InvalidRequest: if the rows are not encoded, or are pairs, or all are left out; or naming file and line, if
                a feature is too long and is to be neither cut nor left out.
        """
        if max_length < 1:
            raise InvalidRequest(f"max_length: {max_length}; allowed are whole numbers from 1")
        self._require_rows("pack")
        strategy = "raise" if self._template is None else self._template.truncation_strategy
        features: list[InputFeature] = []
        origins: list[LocatedRow] = []
        for item in self._items():
            feature = _fitting(item, max_length, strategy)
            if feature is not None:
                features.append(feature)
                origins.append(item)
        if not features:
            raise InvalidRequest(f"pack: nothing is left: all {len(self)} rows have over {max_length} tokens")
        if len(features) < len(self):
            left_out = len(self) - len(features)
            logger.warning("%d of %d rows left out: over %s tokens", left_out, len(self), max_length)
        packed: list[LocatedRow] = []
        for numbers in assign_rows([len(feature["input_ids"]) for feature in features], max_length):
            row: Row = {**join_features([features[number] for number in numbers])}
            cut = any(origins[number].cut for number in numbers)
            packed.append(origins[numbers[0]]._replace(row=row, cut=cut))
        self._replace([DataSource(None, packed)], f"pack({max_length})")
        return self

    def split(self, fraction: float, seed: int = 0) -> tuple[Self, Self]:
        """Two datasets of these rows in a random order, one to train on and one held out; this one stays as it is.

        Both keep the template, and their rows the file and line they came from. Several sources become one. It may be
        called before or after `encode`; rows that `encode` left out count in what `describe` says of the first.

        Args:
            fraction: share of the rows to hold out, between 0 and 1; rounded to whole rows.
            seed: of the order, from 0; the same split on every machine and with every numpy.

        Returns:
            What remains, and what is held out.

        Raises:
            InvalidRequest: if a number is out of its range, there are no rows, or one of the two would have none.
        """
        rest, held_out = super().split(fraction, seed)
        for part, left_out in ((rest, self._tally.left_out), (held_out, 0)):
            cut = sum(item.cut for item in part._items())
            part._tally = Tally(len(part) + left_out, cut, left_out)
        return rest, held_out

    def describe(self) -> Description:
        """The encoded rows in numbers: lengths, how many were over the template's limit, what is trained on.

        Raises:
            InvalidRequest: if there are no rows; or naming file and line, if one is not encoded.
        """
        self._require_rows("describe")
        features: list[list[InputFeature]] = []
        for item in self._items():
            features.append(apply_step(features_of, item.row, item.where))
            if not features[-1]:
                raise InvalidRequest(f"{item.where}: describe: the row is not encoded; call encode() first")
        return describe(features, self._tally)

    def _change(self, step: Step, title: str, meta: DatasetMeta | None) -> Self:
        self._apply(lambda item: finished(item, step), title, meta)
        return self

    def _encoder(self, method: str, add_generation_prompt: bool) -> Encoder:
        template = require_template(self._template, method)
        self._require_rows(method)
        return Encoder(template, add_generation_prompt)

    def _recognised(self, recognise: Callable[[Row], Row]) -> list[Row]:
        """All rows as conversations, or as pairs."""
        return [apply_step(recognise, item.row, item.where) for item in self._items()]

    def _finish(
        self,
        encoder: Encoder,
        rows: Sequence[Row],
        outcomes: Sequence[tuple[Outcome, ...]],
        join: Callable[[Row, list[InputFeature]], Row],
    ) -> None:
        """Put what came of each row in its place, and say what there is to say about it."""
        made = [_features(each) for each in outcomes]
        kept = [features for features in made if features is not None]
        left_out = len(rows) - len(kept)
        check_left(len(rows), left_out, encoder.template)
        untrained = [
            item.where
            for item, features in zip(self._items(), made, strict=True)
            if features is not None and min(map(trained_tokens, features)) == 0
        ]
        check_trained(len(untrained), len(kept), encoder, next(iter(untrained), ""))
        cuts = [any(outcome.cut for outcome in each) for each in outcomes]
        done = iter(zip(rows, made, cuts, strict=True))
        self._sources = [
            source._replace(items=list(_joined(source.items, done, join))) for source in self._sources
        ]
        self._tally = Tally(len(rows), sum(item.cut for item in self._items()), left_out)


def _outcomes(
    encoder: Encoder,
    tasks: Sequence[EncodingTask],
    num_proc: int | None,
    cache_dir: str | os.PathLike[str] | bool | None,
) -> list[Outcome]:
    """What comes of each task, from the cache if it is there."""
    path = None
    if cache_dir is not None and cache_dir is not False:
        path = cache_folder(cache_dir) / f"{cache_key(encoder, tasks)}.npz"
        stored = load_outcomes(path, len(tasks))
        if stored is not None:
            logger.info("encoded before: %s", path)
            return stored
    with progress("Encoding", len(tasks)) as bar:
        outcomes = encode_jobs(encoder, tasks, num_proc, bar.update)
    if path is not None:
        store_outcomes(path, outcomes)
    return outcomes


def _features(outcomes: tuple[Outcome, ...]) -> list[InputFeature] | None:
    """The features of a row; None if one of them is missing."""
    features = [outcome.feature for outcome in outcomes if outcome.feature is not None]
    return features if len(features) == len(outcomes) else None


def _joined(
    items: Sequence[LocatedRow],
    done: Iterator[tuple[Row, list[InputFeature] | None, bool]],
    join: Callable[[Row, list[InputFeature]], Row],
) -> Iterator[LocatedRow]:
    """The items that are kept, with their features; takes as many of `done` as there are items."""
    # `items` first: zip takes no more from `done` once they have ended.
    for item, (row, features, cut) in zip(items, done, strict=False):
        if features is not None:
            yield item._replace(row=join(row, features), cut=cut)


def _fitting(item: LocatedRow, max_length: int, strategy: str) -> InputFeature | None:
    """The feature of an item, cut to `max_length` if need be; None if it is to be left out."""
    features = apply_step(features_of, item.row, item.where)
    if len(features) != 1:
        problem = "a pair, of which only one could train" if features else "not encoded; call encode() first"
        raise InvalidRequest(f"{item.where}: pack: the row is {problem}")
    length = len(features[0]["input_ids"])
    if length <= max_length:
        return features[0]
    if strategy == "delete":
        return None
    if strategy not in ("left", "right"):
        raise InvalidRequest(
            f"{item.where}: pack: {length} tokens, and max_length is {max_length}; raise it, or set the template's "
            "truncation_strategy to 'left' or 'right' to cut, or 'delete' to leave such rows out"
        )
    kept = slice(length - max_length, None) if strategy == "left" else slice(max_length)
    feature = InputFeature(input_ids=features[0]["input_ids"][kept], labels=features[0]["labels"][kept])
    if "loss_weights" in features[0]:
        feature["loss_weights"] = features[0]["loss_weights"][kept]
    return feature
