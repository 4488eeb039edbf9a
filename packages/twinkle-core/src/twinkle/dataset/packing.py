"""Packing: which features share a row, and how they are joined."""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from twinkle.data_format import NOT_TRAINED, InputFeature


def assign_rows(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Best-fit decreasing: the longest first, each into the row that it leaves the least room in.

    Args:
        lengths: of the features, each from 0 to `room`.
        room: capacity of a row.

    Returns:
        The features' indices, row by row: sorted within each row, and rows sorted by their first.
    """
    rows: list[list[int]] = []
    # (room left, row), sorted: the first with enough room is the fullest, and among equals the oldest.
    spaces: list[tuple[int, int]] = []
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        length = lengths[number]
        at = bisect_left(spaces, (length, 0))
        if at == len(spaces):
            rows.append([number])
            insort(spaces, (room - length, len(rows) - 1))
            continue
        space, row = spaces.pop(at)
        rows[row].append(number)
        insort(spaces, (space - length, row))
    return sorted(sorted(row) for row in rows)


def join_features(features: Sequence[InputFeature]) -> InputFeature:
    """Concatenate several features into one.

    The last token of one would predict the first token of the next, which does not continue it, so the first label of
    each but the first is -100. If any has `loss_weights`, those of the others are 1.

    Returns:
        input_ids, labels: int64 [sum of T]; loss_weights: float32 [sum of T], if any feature has them.
    """
    labels: list[np.ndarray] = []
    for position, feature in enumerate(features):
        own = feature["labels"].copy()
        if position > 0:
            own[:1] = NOT_TRAINED
        labels.append(own)
    joined = InputFeature(
        input_ids=np.concatenate([feature["input_ids"] for feature in features]),
        labels=np.concatenate(labels),
    )
    if any("loss_weights" in feature for feature in features):
        ones = [np.ones(len(feature["input_ids"]), np.float32) for feature in features]
        joined["loss_weights"] = np.concatenate(
            [feature.get("loss_weights", one) for feature, one in zip(features, ones, strict=True)]
        )
    return joined
