"""A dataset that processes its rows at once: maps, filters, mixes, encodes, packs and describes them."""

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
        dataset_meta: the source, or several; a string or path means `DatasetMeta(id)`.

    Raises:
        NotFound: if a source, or the requested files in it, can't be found.
        InvalidRequest: naming file and line, if a file can't be read; or if the argument is not a source.
    """

    # What `encode` cut and left out, for `describe`.
    _tally = Tally()

    def encode(
        self,
        add_generation_prompt: bool = False,
        *,
        num_proc: int | None = 1,
        cache_dir: str | os.PathLike[str] | bool | None = None,
    ) -> Self:
        """Replace each row's `messages` and `tools` by the template's `InputFeature`.

        Rows without `messages` are read by `ConversationProcessor`. Other columns are kept. With the template's
        strategy "delete", rows that are too long are dropped.

        Args:
            add_generation_prompt: end each sequence with the opening of an assistant turn, to sample from.
            num_proc: number of processes; None is one per core. Each takes a second or more to start, so several pay
                off only where one would take many times as long; results and errors are the same.
            cache_dir: folder to cache results in, by rows, template and arguments; True is $TWINKLE_CACHE/encoded, or
                ~/.cache/twinkle/encoded; default: no cache. Files are never removed. The key includes the code of a
                custom template class, but not of what it calls.

        Raises:
            InvalidRequest: naming file and line, if a row is not a conversation; if no template was set; if there are
                no rows, or none is left; or if no row has a token to train on (unless `add_generation_prompt`).
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
        """Replace `chosen` and `rejected` of each row by the `InputFeature`s of the two conversations.

        Rows are read by `PreferenceProcessor`; `tools` applies to both conversations. Other columns are kept. With the
        template's strategy "delete", a pair is dropped if either conversation is too long.

        Args:
            num_proc, cache_dir: as in `encode`.

        Raises:
            InvalidRequest: naming file, line and side, if a row is not a pair; else as in `encode`.
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

        Tokens attend to all earlier examples in the row: models trained this way learn to ignore them, but the loss is
        not that of the separate examples. The server already batches rows of similar length and wastes little on
        padding, so packing pays off only for very many very short rows.

        Packing is best-fit decreasing, and deterministic. The first label of every example but a row's first is -100,
        since its predecessor is another example. All columns but the feature are dropped, and the sources become one.

        Args:
            max_length: most tokens of a row. Longer features are cut or dropped if the template's `truncation_strategy`
                says so.

        Raises:
            InvalidRequest: if the rows are not encoded, are pairs, or are all dropped; or naming file and line, if a
                feature is too long and may be neither cut nor dropped.
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
        """As for every dataset; rows that `encode` dropped count in what `describe` says of the first of the two."""
        rest, held_out = super().split(fraction, seed)
        for part, left_out in ((rest, self._tally.left_out), (held_out, 0)):
            cut = sum(item.cut for item in part._items())
            part._tally = Tally(len(part) + left_out, cut, left_out)
        return rest, held_out

    def describe(self) -> Description:
        """Statistics of the encoded rows: lengths, how many exceeded the template's limit, what is trained on.

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
        """Replace the rows by their outcomes, and warn of what was cut, dropped, or trains nothing."""
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
    """The outcome of each task, from the cache if possible."""
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
    """The kept items with their features; consumes as many of `done` as there are items."""
    # `items` first: once it ends, zip takes nothing more from `done`.
    for item, (row, features, cut) in zip(items, done, strict=False):
        if features is not None:
            yield item._replace(row=join(row, features), cut=cut)


def _fitting(item: LocatedRow, max_length: int, strategy: str) -> InputFeature | None:
    """The feature of an item, cut to `max_length` if needed; None if it is dropped."""
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
