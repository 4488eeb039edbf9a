"""Batches: each row once an epoch, another order each epoch, and resuming in the middle."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinkle.dataloader import DataLoader
from twinkle.protocol.errors import InvalidRequest


def epoch(loader: DataLoader[int]) -> list[list[int]]:
    return list(loader)


def test_every_row_comes_once_an_epoch() -> None:
    loader = DataLoader(range(10), batch_size=4)
    batches = epoch(loader)
    assert [len(batch) for batch in batches] == [4, 4, 2] and len(loader) == 3
    assert sorted(sum(batches, [])) == list(range(10))


def test_drop_last_leaves_the_smaller_batch_out() -> None:
    loader = DataLoader(range(10), batch_size=4, drop_last=True)
    assert [len(batch) for batch in epoch(loader)] == [4, 4] and len(loader) == 2


def test_unshuffled_rows_come_in_order() -> None:
    loader = DataLoader(range(5), batch_size=2, shuffle=False)
    assert epoch(loader) == [[0, 1], [2, 3], [4]]
    assert epoch(loader) == [[0, 1], [2, 3], [4]]


def test_epochs_differ_and_seeds_repeat_them() -> None:
    first, second = DataLoader(range(50), seed=3), DataLoader(range(50), seed=3)
    epochs = [epoch(first), epoch(first)]
    assert epochs[0] != epochs[1]
    assert epochs == [epoch(second), epoch(second)]
    assert epoch(DataLoader(range(50), seed=4)) != epochs[0]


def test_the_order_is_the_same_on_every_machine_and_numpy() -> None:
    # Written down once: a training resumed after an upgrade must see the order it was begun with.
    assert epoch(DataLoader(range(8), batch_size=8, seed=1)) == [[1, 6, 0, 3, 7, 4, 2, 5]]


def test_a_loop_left_early_ends_its_epoch() -> None:
    loader, reference = DataLoader(range(20), batch_size=3), DataLoader(range(20), batch_size=3)
    for _ in loader:
        break
    epoch(reference)
    assert epoch(loader) == epoch(reference)


def test_the_state_after_the_last_batch_is_the_start_of_the_next_epoch() -> None:
    loader = DataLoader(range(6), batch_size=3)
    states = [loader.state_dict() for _ in loader]
    assert [(state["epoch"], state["position"]) for state in states] == [(0, 1), (1, 0)]
    assert loader.epoch == 1


@given(
    rows=st.integers(1, 30),
    batch_size=st.integers(1, 7),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_resuming_anywhere_goes_on_exactly(
    rows: int, batch_size: int, shuffle: bool, drop_last: bool, seed: int, data: st.DataObject
) -> None:
    def make() -> DataLoader[int]:
        return DataLoader(range(rows), batch_size, shuffle, seed, drop_last)

    def run(loader: DataLoader[int], batches: int) -> tuple[list[list[int]], str]:
        """That many batches over as many epochs as it takes, and the state then, as JSON."""
        seen: list[list[int]] = []
        while True:
            for batch in loader:
                seen.append(batch)
                if len(seen) == batches:
                    return seen, json.dumps(loader.state_dict())

    if drop_last and rows < batch_size:
        return
    cut = data.draw(st.integers(1, 3 * len(make())), "cut")
    rest = data.draw(st.integers(1, 2 * len(make())), "rest")
    whole, _ = run(make(), cut + rest)
    before, state = run(make(), cut)
    resumed = make()
    resumed.load_state_dict(json.loads(state))
    after, _ = run(resumed, rest)
    assert before + after == whole


def test_a_state_of_another_order_is_refused() -> None:
    state = DataLoader(range(10), batch_size=2, seed=1).state_dict()
    for changed, message in (
        (DataLoader(range(10), batch_size=2, seed=2), "seed=1, and this loader has seed=2"),
        (DataLoader(range(10), batch_size=5, seed=1), "batch_size=2, and this loader has batch_size=5"),
        (DataLoader(range(11), batch_size=2, seed=1), "rows=10, and this loader has rows=11"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            changed.load_state_dict(state)


@pytest.mark.parametrize("change", [{"position": 9}, {"position": -1}, {"epoch": -1}])
def test_a_state_out_of_range_is_refused(change: dict[str, Any]) -> None:
    loader = DataLoader(range(10), batch_size=2)
    with pytest.raises(InvalidRequest, match="state: epoch"):
        loader.load_state_dict({**loader.state_dict(), **change})


def test_an_incomplete_state_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="position, seed"):
        DataLoader(range(10)).load_state_dict({"epoch": 1})


@pytest.mark.parametrize("rows", [0, 3])
def test_a_loader_without_a_single_batch_says_so(rows: int) -> None:
    with pytest.raises(InvalidRequest, match=f"{rows} rows make no batch of 4"):
        epoch(DataLoader(range(rows), batch_size=4, drop_last=True))


@pytest.mark.parametrize(("options", "field"), [({"batch_size": 0}, "batch_size"), ({"seed": -1}, "seed")])
def test_numbers_out_of_range_are_refused(options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest, match=field):
        DataLoader(range(3), **options)


@pytest.mark.parametrize(
    "wrong", [(n for n in range(3)), {1, 2}, {"input_ids": [1]}, "rows.jsonl", 5, None, list]
)
def test_what_has_no_numbered_rows_is_refused(wrong: Any) -> None:
    with pytest.raises(
        InvalidRequest,
        match=f"dataset: expected a Dataset, a list .*IterableDataset, got {type(wrong).__name__};",
    ):
        DataLoader(wrong)
