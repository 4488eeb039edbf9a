"""Tokens with labels, and their conversion to datums.

Labels are aligned with their own tokens here; the shift by one (the output at position t predicts token t+1) happens in
one place only, `to_datum`. Templates make the labels.
"""

from collections.abc import Mapping
from typing import Any, Final, NotRequired, Protocol, TypedDict, cast

import numpy as np
import numpy.typing as npt

from twinkle.protocol import types as core_types
from twinkle.protocol.errors import InvalidRequest

NOT_TRAINED: Final = -100
"""The label of a token that is not trained on (the `ignore_index` of PyTorch and Transformers)."""


class InputFeature(TypedDict):
    """One sequence of tokens, ready for a model.

    Keys:
        input_ids: int64 [T].
        labels: int64 [T], not shifted: the token's own id if it is trained on, else -100.
        loss_weights: float32 [T], optional: the weight of each token, aligned with `input_ids`.
    """

    input_ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    loss_weights: NotRequired[npt.NDArray[np.float32]]


class Types(Protocol):
    """A client's module of types. `twinkle_client.types` and `tinker.types` have classes of the same names, with the
    same constructors.
    """

    ModelInput: Any
    Datum: Any
    TensorData: Any
    SamplingParams: Any


def make_datum(types: Types, tokens: npt.ArrayLike, inputs: Mapping[str, npt.NDArray[Any]]) -> Any:
    """A datum with `tokens`, int [T], as model input, and loss inputs with one row per token."""
    return types.Datum(
        model_input=types.ModelInput.from_ints(np.asarray(tokens).tolist()),
        loss_fn_inputs=dict(inputs),
    )


def to_datum(feature: InputFeature | Mapping[str, Any], types: Types = core_types) -> Any:
    """The datum for `cross_entropy` that trains on the feature's labelled tokens.

    With T tokens: model input = input_ids[:-1], target_tokens = input_ids[1:] (int64 [T-1]),
    weights = (labels[1:] != -100) * loss_weights[1:] (float32 [T-1]).

    Args:
        types: the client's module of types; `tinker.types` gives a datum of Tinker's SDK.

    Raises:
        InvalidRequest: if a key is missing, is not a flat list of numbers, or differs in length from `input_ids`; if a
            label is neither -100 nor the token's own id; or if there are fewer than two tokens (one to read and one to
            predict).
    """
    input_ids = _integers(feature, "input_ids")
    labels = _integers(feature, "labels")
    length = len(input_ids)
    if length < 2:
        raise InvalidRequest(
            f"input_ids: {length} token(s); training needs at least 2, one to read and one to predict"
        )
    _require_length("labels", len(labels), length)
    _require_own("labels", labels, input_ids)
    weights = (labels[1:] != NOT_TRAINED).astype(np.float32)
    if feature.get("loss_weights") is not None:
        loss_weights = _flat_array(feature, "loss_weights")
        if loss_weights.dtype.kind not in "iuf":
            raise InvalidRequest(f"loss_weights: expected numbers, got {loss_weights.dtype}")
        _require_length("loss_weights", len(loss_weights), length)
        weights = weights * loss_weights[1:].astype(np.float32)
    return make_datum(types, input_ids[:-1], {"target_tokens": input_ids[1:], "weights": weights})


def _integers(feature: InputFeature | Mapping[str, Any], key: str) -> npt.NDArray[np.int64]:
    array = _flat_array(feature, key)
    if array.size and array.dtype.kind not in "iu":
        raise InvalidRequest(f"{key}: expected whole numbers, got {array.dtype}")
    return array.astype(np.int64)


def _flat_array(feature: InputFeature | Mapping[str, Any], key: str) -> npt.NDArray[Any]:
    if feature.get(key) is None:
        hint = (
            "; call dataset.encode(), or template.encode(trajectory), first" if "messages" in feature else ""
        )
        raise InvalidRequest(f"the feature has no {key!r} (it has: {', '.join(feature) or 'nothing'}){hint}")
    try:
        array: npt.NDArray[Any] = np.asarray(cast(object, feature[key]))
    except ValueError as error:
        raise InvalidRequest(f"{key}: expected a flat list of numbers ({error})") from error
    if array.ndim != 1:
        raise InvalidRequest(f"{key}: expected a flat list of numbers, got shape {list(array.shape)}")
    return array


def _require_own(key: str, labels: npt.NDArray[np.int64], input_ids: npt.NDArray[np.int64]) -> None:
    """Refuse other labels, which would be lost silently since the targets are taken from `input_ids`."""
    others = np.flatnonzero((labels != NOT_TRAINED) & (labels != input_ids))
    if others.size:
        at = int(others[0])
        raise InvalidRequest(
            f"{key}[{at}] is {labels[at]}, and input_ids[{at}] is {input_ids[at]}; labels repeat input_ids, or are "
            f"{NOT_TRAINED}; for other targets make a Datum"
        )


def _require_length(key: str, length: int, expected: int) -> None:
    if length != expected:
        raise InvalidRequest(f"{key}: {length} entries for {expected} input_ids; there must be one for each")
