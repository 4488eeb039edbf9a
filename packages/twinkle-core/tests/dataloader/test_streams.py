"""Batches of a stream: in its order, resumed at the exact batch, without a length."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinkle.dataloader import DataLoader
from twinkle.dataset import IterableDataset
from twinkle.protocol.errors import InvalidRequest


def stream(rows: int, buffer_size: int = 0) -> IterableDataset:
    dataset = IterableDataset.from_rows([{"n": n} for n in range(rows)])
    return dataset.shuffle(buffer_size, seed=2) if buffer_size else dataset


def numbers(batches: Any) -> list[list[int]]:
    return [[row["n"] for row in batch] for batch in batches]


def test_batches_come_in_the_order_of_the_stream() -> None:
    loader = DataLoader(stream(5), batch_size=2)
    assert numbers(loader) == numbers(loader) == [[0, 1], [2, 3], [4]]
    assert numbers(DataLoader(stream(5), batch_size=2, shuffle=False, drop_last=True)) == [[0, 1], [2, 3]]


def test_epochs_of_a_shuffled_stream_differ_and_repeat() -> None:
    first, second = DataLoader(stream(30, 10), batch_size=4), DataLoader(stream(30, 10), batch_size=4)
    epochs = [numbers(first), numbers(first)]
    assert epochs[0] != epochs[1]
    assert [sorted(sum(epoch, [])) for epoch in epochs] == [list(range(30))] * 2
    assert epochs == [numbers(second), numbers(second)]


def test_a_loop_left_early_ends_its_epoch() -> None:
    loader, reference = DataLoader(stream(30, 10)), DataLoader(stream(30, 10))
    for _ in loader:
        break
    numbers(reference)
    assert numbers(loader) == numbers(reference)


def test_the_state_after_the_last_batch_is_the_start_of_the_next_epoch() -> None:
    for rows, drop_last in ((6, False), (6, True), (7, True)):
        loader = DataLoader(stream(rows), batch_size=3, drop_last=drop_last)
        states = [loader.state_dict() for _ in loader]
        assert [(state["epoch"], state["position"]) for state in states] == [(0, 1), (1, 0)]
        assert loader.epoch == 1


@given(
    rows=st.integers(1, 20),
    batch_size=st.integers(1, 6),
    buffer_size=st.integers(0, 8),
    drop_last=st.booleans(),
    data=st.data(),
)
def test_resuming_anywhere_goes_on_exactly(
    rows: int, batch_size: int, buffer_size: int, drop_last: bool, data: st.DataObject
) -> None:
    def make() -> DataLoader[Any]:
        return DataLoader(stream(rows, buffer_size), batch_size, drop_last=drop_last)

    def run(loader: DataLoader[Any], batches: int) -> tuple[list[list[int]], str]:
        """That many batches over as many epochs as it takes, and the state then, as JSON."""
        seen: list[list[int]] = []
        while True:
            for batch in loader:
                seen += numbers([batch])
                if len(seen) == batches:
                    return seen, json.dumps(loader.state_dict())

    if drop_last and rows < batch_size:
        return
    epoch = rows // batch_size if drop_last else -(-rows // batch_size)
    cut = data.draw(st.integers(1, 3 * epoch), "cut")
    rest = data.draw(st.integers(1, 2 * epoch), "rest")
    whole, _ = run(make(), cut + rest)
    before, state = run(make(), cut)
    resumed = make()
    resumed.load_state_dict(json.loads(state))
    after, _ = run(resumed, rest)
    assert before + after == whole


def test_a_stream_is_read_one_batch_ahead_and_no_further() -> None:
    read: list[int] = []

    def rows() -> Iterator[dict[str, int]]:
        for n in range(1000):
            read.append(n)
            yield {"n": n}

    batches = iter(DataLoader(IterableDataset.from_rows(rows), batch_size=3))
    assert numbers([next(batches)]) == [[0, 1, 2]] and len(read) == 6
    assert numbers([next(batches)]) == [[3, 4, 5]] and len(read) == 9


def test_shuffling_a_stream_here_is_refused_with_the_way_to_do_it() -> None:
    with pytest.raises(InvalidRequest, match=r"shuffle: .*dataset.shuffle\(buffer_size\)"):
        DataLoader(stream(3), shuffle=True)


def test_a_stream_has_no_length() -> None:
    with pytest.raises(TypeError, match="a DataLoader over a stream has no length"):
        len(DataLoader(stream(3)))


@pytest.mark.parametrize("rows", [0, 3])
def test_a_stream_without_a_single_batch_says_so(rows: int) -> None:
    with pytest.raises(InvalidRequest, match=f"dataset: {rows} rows make no batch of 4"):
        numbers(DataLoader(stream(rows), batch_size=4, drop_last=True))


def test_a_state_of_other_data_is_refused() -> None:
    loader = DataLoader(stream(10), batch_size=2)
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    state = loader.state_dict()
    shorter = DataLoader(stream(5), batch_size=2)
    shorter.load_state_dict(state)
    with pytest.raises(InvalidRequest, match="taken after 3 batches, and the stream ends after 5 rows"):
        numbers(shorter)
    with pytest.raises(InvalidRequest, match="batch_size=2, and this loader has batch_size=5"):
        DataLoader(stream(10), batch_size=5).load_state_dict(state)
    with pytest.raises(InvalidRequest, match="taken with .*, and this loader has"):
        DataLoader(range(10), batch_size=2).load_state_dict(state)
    with pytest.raises(InvalidRequest, match="state: epoch 0, position -1$"):
        loader.load_state_dict({**state, "position": -1})
