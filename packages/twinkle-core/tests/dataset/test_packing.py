"""Several features in a row: none lost, none too long, no example trained to predict the next."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinkle.data_format import to_datum
from twinkle.dataset import Dataset
from twinkle.dataset.packing import assign_rows
from twinkle.protocol.errors import InvalidRequest
from twinkle.template import Template


def feature(*ids: int, **rest: Any) -> dict[str, Any]:
    return {"input_ids": np.array(ids, np.int64), "labels": np.array(ids, np.int64), **rest}


def brute_force(lengths: list[int], room: int) -> list[list[int]]:
    """Best fit decreasing as it is defined, by looking at every row for every feature."""
    rows: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        left = [room - sum(lengths[n] for n in row) for row in rows]
        fitting = [row for row in range(len(rows)) if left[row] >= lengths[number]]
        if fitting:
            rows[min(fitting, key=lambda row: left[row])].append(number)
        else:
            rows.append([number])
    return sorted(sorted(row) for row in rows)


@given(st.lists(st.integers(1, 20), max_size=40))
def test_each_goes_where_it_fits_best(lengths: list[int]) -> None:
    rows = assign_rows(lengths, 20)
    assert rows == brute_force(lengths, 20)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    assert all(sum(lengths[number] for number in row) <= 20 for row in rows)


def test_examples_are_joined_and_none_predicts_the_next() -> None:
    rows = [feature(1, 2, 3), feature(4, 5, 6, 7), feature(8, 9), feature(10, id=4)]
    packed = Dataset.from_rows(rows).pack(6)
    assert [list(row["input_ids"]) for row in packed] == [[1, 2, 3, 10], [4, 5, 6, 7, 8, 9]]
    assert [list(row["labels"]) for row in packed] == [[1, 2, 3, -100], [4, 5, 6, 7, -100, 9]]
    assert all(set(row) == {"input_ids", "labels"} for row in packed)
    assert [list(row["labels"]) for row in rows] == [[1, 2, 3], [4, 5, 6, 7], [8, 9], [10]]
    # What is trained is what each would train by itself.
    alone = sum(to_datum(row).loss_fn_inputs["weights"].to_numpy().sum() for row in rows[:3])
    together = sum(to_datum(row).loss_fn_inputs["weights"].to_numpy().sum() for row in packed)
    assert alone == together == 6


def test_weights_of_the_loss_are_joined_as_well() -> None:
    weighted = feature(1, 2, loss_weights=np.array([0.5, 2], np.float32))
    [row] = Dataset.from_rows([weighted, feature(3, 4)]).pack(4)
    np.testing.assert_array_equal(row["loss_weights"], np.array([0.5, 2, 1, 1], np.float32))
    assert row["loss_weights"].dtype == np.float32


@pytest.mark.parametrize(("strategy", "kept"), [("left", [3, 4]), ("right", [1, 2]), ("delete", None)])
def test_what_is_too_long_goes_by_the_templates_strategy(
    model: Any, strategy: Any, kept: list[int] | None
) -> None:
    template = Template(model, truncation_strategy=strategy)
    dataset = Dataset.from_rows([feature(1, 2, 3, 4), feature(5)]).set_template(template).pack(2)
    assert [list(row["input_ids"]) for row in dataset] == [*([kept] if kept else []), [5]]


def test_what_cannot_be_packed_is_named() -> None:
    with pytest.raises(InvalidRequest, match="mine:2: pack: 3 tokens, and max_length is 2"):
        Dataset.from_rows([feature(1), feature(1, 2, 3)], "mine").pack(2)
    with pytest.raises(InvalidRequest, match="mine:1: pack: the row is not encoded"):
        Dataset.from_rows([{"messages": []}], "mine").pack(2)
    with pytest.raises(InvalidRequest, match="mine:1: pack: the row is a pair"):
        Dataset.from_rows([{"chosen": feature(1), "rejected": feature(2)}], "mine").pack(2)
    with pytest.raises(InvalidRequest, match="max_length: 0"):
        Dataset.from_rows([feature(1)]).pack(0)
    with pytest.raises(InvalidRequest, match="pack: the dataset is empty"):
        Dataset.from_rows([]).pack(4)


def test_a_limit_that_leaves_nothing_is_refused(model: Any) -> None:
    template = Template(model, truncation_strategy="delete")
    with pytest.raises(InvalidRequest, match="pack: nothing is left: all 2 rows have over 1 tokens"):
        Dataset.from_rows([feature(1, 2), feature(3, 4)]).set_template(template).pack(1)
