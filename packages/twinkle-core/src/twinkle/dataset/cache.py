"""A disk cache of encoded rows, keyed by everything that the encoding depends on.

A file holds the outcomes of all conversations of one dataset as flat arrays (`.npz`, nothing pickled). Files are
replaced atomically, never modified; an unreadable file counts as missing.
"""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt

from twinkle.data_format import InputFeature
from twinkle.dataset.encoding import Encoder, EncodingTask, Outcome
from twinkle.protocol.errors import InvalidRequest
from twinkle.template import Template

logger = logging.getLogger(__name__)

# Part of every key: increase it when the file format or the encoding changes.
_FORMAT: Final = 2

_LEFT_OUT, _WHOLE, _CUT = 0, 1, 2

_DTYPES: Final = {"input_ids": np.int64, "labels": np.int64, "loss_weights": np.float32}


def cache_folder(cache_dir: str | os.PathLike[str] | bool) -> Path:
    """The cache folder: the one given; if True, $TWINKLE_CACHE/encoded, or ~/.cache/twinkle/encoded."""
    if not isinstance(cache_dir, bool):
        return Path(cache_dir)
    root = os.environ.get("TWINKLE_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "twinkle") / "encoded"


def cache_key(encoder: Encoder, tasks: Iterable[EncodingTask]) -> str:
    """SHA-256 (hex) of everything that the outcomes depend on: the rows, the template and its arguments.

    All columns of the rows count, since a custom template may read any of them; their origin does not.

    Raises:
        InvalidRequest: naming the place of a row that contains itself, or has keys that JSON can't represent.
    """
    head = [_FORMAT, _fingerprint(encoder.template), encoder.add_generation_prompt]
    digest = hashlib.sha256(json.dumps(head).encode())
    for task in tasks:
        # JSON escapes line breaks, so a row's end is unambiguous. Keys keep their order, since chat templates write
        # tools and arguments in it.
        try:
            text = json.dumps(task.row, default=_told)
        except (TypeError, ValueError) as error:
            raise InvalidRequest(
                f"{task.where}: the row can't be told from others ({error}); encode without cache_dir"
            ) from error
        digest.update(b"\n" + text.encode())
    return digest.hexdigest()


def _fingerprint(template: Template) -> str:
    kind = type(template)
    if kind is not Template and kind.fingerprint is Template.fingerprint:
        raise InvalidRequest(
            f"cache_dir: {kind.__name__} has no fingerprint of its own, so what it encodes can't be told from what "
            "Template does; define the property `fingerprint` in it, or encode without cache_dir"
        )
    return template.fingerprint


def load_outcomes(path: Path, count: int) -> list[Outcome] | None:
    """The outcomes of `count` conversations; None if the file is missing, or (with a warning) damaged."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            return _unpack({name: file[name] for name in file.files}, count)
    except Exception as error:  # numpy and zipfile raise all kinds of errors for damaged files
        logger.warning("%s is damaged and made anew: %s: %s", path, type(error).__name__, error)
        return None


def store_outcomes(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Write outcomes atomically. A failure to write is only a warning."""
    arrays = _pack(outcomes)
    if arrays is None:
        logger.warning(
            "cache_dir: features of this template are not kept: they hold more than tokens and labels"
        )
        return
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = file.name
            cast(Any, np.savez)(file, **arrays)
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        logger.warning("cache_dir: %s can't be written: %s", path, error)
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _pack(outcomes: Sequence[Outcome]) -> dict[str, npt.NDArray[Any]] | None:
    """Flat arrays of all features; None if one is not of the usual kind.

    `state` (uint8 [rows]) is each row's outcome, `offsets` (int64 [features + 1]) where each feature begins in
    `input_ids` and `labels` (int32 [tokens]); `weighted` (bool [features]) says which have `loss_weights` (float32).
    """
    features = [outcome.feature for outcome in outcomes if outcome.feature is not None]
    if not all(_is_usual(feature) for feature in features):
        return None
    lengths = [len(feature["input_ids"]) for feature in features]
    states = [
        _LEFT_OUT if outcome.feature is None else _CUT if outcome.cut else _WHOLE for outcome in outcomes
    ]
    weights = [feature["loss_weights"] for feature in features if "loss_weights" in feature]
    return {
        "state": np.array(states, np.uint8),
        "offsets": np.cumsum([0, *lengths], dtype=np.int64),
        "input_ids": _joined([feature["input_ids"] for feature in features], np.int32),
        "labels": _joined([feature["labels"] for feature in features], np.int32),
        "weighted": np.array(["loss_weights" in feature for feature in features], np.bool_),
        "loss_weights": _joined(weights, np.float32),
    }


def _unpack(arrays: dict[str, npt.NDArray[Any]], count: int) -> list[Outcome]:
    state, offsets, weighted = arrays["state"], arrays["offsets"], arrays["weighted"]
    lengths = np.diff(offsets)
    tokens = int(lengths.sum())
    sound = (
        len(state) == count
        and len(lengths) == len(weighted) == np.count_nonzero(state != _LEFT_OUT)
        and bool((lengths >= 0).all())
        and len(arrays["input_ids"]) == len(arrays["labels"]) == tokens
        and len(arrays["loss_weights"]) == int(lengths[weighted].sum())
    )
    if not sound:
        raise ValueError("its arrays do not fit together")
    at = [int(offset) for offset in offsets[1:-1]]
    ids = np.split(arrays["input_ids"].astype(np.int64), at)
    labels = np.split(arrays["labels"].astype(np.int64), at)
    weights = iter(np.split(arrays["loss_weights"], np.cumsum(lengths[weighted])[:-1]))
    features: list[InputFeature] = []
    for index in range(len(lengths)):
        feature = InputFeature(input_ids=ids[index], labels=labels[index])
        if weighted[index]:
            feature["loss_weights"] = next(weights)
        features.append(feature)
    rest = iter(features)
    return [Outcome(None if each == _LEFT_OUT else next(rest), bool(each == _CUT)) for each in state]


def _is_usual(feature: InputFeature) -> bool:
    """Whether a feature consists only of flat arrays of the usual types, and so survives the round trip."""
    length = len(feature["input_ids"])
    for key, value in cast(dict[str, object], feature).items():
        if key not in _DTYPES or not isinstance(value, np.ndarray):
            return False
        array = cast(npt.NDArray[Any], value)
        if array.dtype != _DTYPES[key] or array.shape != (length,):
            return False
    return True


def _joined(arrays: Sequence[npt.NDArray[Any]], dtype: type[np.generic]) -> npt.NDArray[Any]:
    return np.concatenate(arrays).astype(dtype) if arrays else np.zeros(0, dtype)


def _told(value: object) -> object:
    """A value that JSON can't represent, as its type and contents."""
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, np.ndarray | np.generic):
        array = cast(npt.NDArray[Any], value)
        return [kind, array.dtype.str, cast(object, array.tolist())]
    return [kind, value.hex() if isinstance(value, bytes) else repr(value)]
