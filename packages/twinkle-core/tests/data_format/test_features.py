"""Features become datums: the shift by one, weights, and what is refused."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twinkle.data_format import NOT_TRAINED, InputFeature, to_datum
from twinkle.protocol.errors import InvalidRequest


def feature(ids: list[int], labels: list[int], weights: list[float] | None = None) -> InputFeature:
    made = InputFeature(input_ids=np.array(ids, np.int64), labels=np.array(labels, np.int64))
    if weights is not None:
        made["loss_weights"] = np.array(weights, np.float32)
    return made


def test_each_token_is_the_target_of_the_one_before_it() -> None:
    datum = to_datum(feature([5, 6, 7, 8], [-100, -100, 7, 8]))
    assert datum.model_input.to_ints() == [5, 6, 7]
    assert datum.loss_fn_inputs["target_tokens"].tolist() == [6, 7, 8]
    assert datum.loss_fn_inputs["weights"].tolist() == [0.0, 1.0, 1.0]
    assert datum.loss_fn_inputs["target_tokens"].dtype == "int64"
    assert datum.loss_fn_inputs["weights"].dtype == "float32"


def test_token_zero_is_a_token_like_others() -> None:
    datum = to_datum(feature([0, 0, 0], [-100, 0, 0]))
    assert datum.loss_fn_inputs["target_tokens"].tolist() == [0, 0]
    assert datum.loss_fn_inputs["weights"].tolist() == [1.0, 1.0]


def test_loss_weights_multiply_and_may_be_negative_or_fractional() -> None:
    datum = to_datum(feature([1, 2, 3, 4], [-100, 2, 3, -100], [9.0, 0.5, -2.0, 7.0]))
    assert datum.loss_fn_inputs["weights"].tolist() == [0.5, -2.0, 0.0]


def test_plain_lists_do_as_well_as_arrays() -> None:
    datum = to_datum({"input_ids": [1, 2], "labels": [-100, 2]})
    assert datum.model_input.to_ints() == [1]
    assert datum.loss_fn_inputs["weights"].tolist() == [1.0]


sequences = st.integers(2, 40).flatmap(
    lambda length: st.tuples(
        st.lists(st.integers(0, 30), min_size=length, max_size=length),
        st.lists(st.booleans(), min_size=length, max_size=length),
        st.none() | st.lists(st.floats(-4, 4, width=32), min_size=length, max_size=length),
    )
)


@given(sequences)
def test_the_weighted_loss_is_torchs_with_ignore_index(
    sequence: tuple[list[int], list[bool], list[float] | None],
) -> None:
    ids, trained, weights = sequence
    labels = [id if is_trained else NOT_TRAINED for id, is_trained in zip(ids, trained, strict=True)]
    datum = to_datum(feature(ids, labels, weights))
    assert datum.model_input.length == len(ids) - 1

    logits = torch.randn(len(ids), 31, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    losses = torch.nn.functional.cross_entropy(
        logits[:-1], torch.tensor(labels[1:]), ignore_index=NOT_TRAINED, reduction="none"
    )
    expected = (losses * torch.tensor(weights or [1.0] * len(ids), dtype=torch.float64)[1:]).sum()

    logprobs = logits[:-1].log_softmax(-1).numpy()
    targets = datum.loss_fn_inputs["target_tokens"].to_numpy()
    ours = -(datum.loss_fn_inputs["weights"].to_numpy() * logprobs[np.arange(len(targets)), targets]).sum()
    assert ours == pytest.approx(expected.item(), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"messages": []}, r"no 'input_ids' \(it has: messages\); call dataset.encode"),
        ({"input_ids": [1, 2]}, "no 'labels'"),
        ({"input_ids": [1], "labels": [1]}, "needs at least 2"),
        ({"input_ids": [], "labels": []}, "needs at least 2"),
        ({"input_ids": [1, 2, 3], "labels": [1, 2]}, "labels: 2 entries for 3 input_ids"),
        ({"input_ids": [[1, 2]], "labels": [1, 2]}, r"input_ids: .* got shape \[1, 2\]"),
        ({"input_ids": [[1, 2], [3]], "labels": [1, 2]}, "input_ids: expected a flat list"),
        ({"input_ids": [1.5, 2.5], "labels": [1, 2]}, "input_ids: expected whole numbers, got float64"),
        (
            {"input_ids": [5, 6, 7], "labels": [-100, 6, 45]},
            r"^labels\[2\] is 45, and input_ids\[2\] is 7; labels repeat input_ids, or are -100; .* make a Datum",
        ),
        # Moved by one already, as Transformers never has them.
        ({"input_ids": [5, 6, 7], "labels": [6, 7, -100]}, r"^labels\[0\] is 6, and input_ids\[0\] is 5"),
        ({"input_ids": [1, 2], "labels": [-1, 2]}, r"^labels\[0\] is -1"),
        ({"input_ids": [1, 2], "labels": [1, 2], "loss_weights": [1.0]}, "loss_weights: 1 entries"),
        (
            {"input_ids": [1, 2], "labels": [1, 2], "loss_weights": ["a", "b"]},
            "loss_weights: expected numbers",
        ),
    ],
)
def test_what_is_no_feature_is_refused_with_the_key_that_is_wrong(
    wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        to_datum(wrong)
