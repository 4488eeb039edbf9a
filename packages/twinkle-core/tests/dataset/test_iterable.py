"""Rows that are read while they are used: no further than needed, in the same order every time."""

import json
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinkle.dataset import Dataset, DatasetMeta, IterableDataset
from twinkle.dataset.readers import READERS
from twinkle.protocol.errors import InvalidRequest, NotFound
from twinkle.template import Template


def numbers(rows: Any) -> list[int]:
    return [row["n"] for row in rows]


def of(rows: int) -> IterableDataset:
    return IterableDataset.from_rows([{"n": n} for n in range(rows)])


@pytest.fixture
def endless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[DatasetMeta, list[int]]:
    """A file whose reader never ends, and the numbers of the rows it was asked for."""
    read: list[int] = []

    def reader(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        for n in count():
            read.append(n)
            yield n + 1, {"n": n, "query": "q", "response": "r"}

    readers: dict[str, Callable[[Path], Iterator[tuple[int, dict[str, Any]]]]] = {**READERS, ".jsonl": reader}
    monkeypatch.setattr("twinkle.dataset.readers.READERS", readers)
    (tmp_path / "a.jsonl").write_text("", encoding="utf-8")
    return DatasetMeta(str(tmp_path / "a.jsonl")), read


def test_a_file_is_read_only_as_far_as_needed(endless: tuple[DatasetMeta, list[int]], model: Path) -> None:
    meta, read = endless
    stream = (
        IterableDataset(meta).map(lambda row: {**row, "m": row["n"] * 2}).filter(lambda row: row["n"] % 2)
    )
    stream.set_template(Template(model)).encode()
    assert read == []
    rows = iter(stream)
    assert next(rows)["m"] == 2 and read == [0, 1]
    assert next(rows)["m"] == 6 and read == [0, 1, 2, 3]
    read.clear()
    assert numbers(islice(IterableDataset(meta).shuffle(10), 3)) != [0, 1, 2]
    assert read == list(range(13))
    read.clear()
    assert numbers(IterableDataset(meta).skip(2).take(3)) == [2, 3, 4] and read == [0, 1, 2, 3, 4]
    read.clear()
    sliced = DatasetMeta(meta.dataset_id, data_slice=slice(1, 8, 3))
    assert numbers(IterableDataset(sliced)) == [1, 4, 7] and max(read) <= 7
    read.clear()
    assert numbers(IterableDataset(DatasetMeta(meta.dataset_id, data_slice=range(4)))) == [0, 1, 2, 3]
    assert read == [0, 1, 2, 3]


def test_rows_are_those_of_a_dataset(tmp_path: Path, model: Path) -> None:
    rows = [{"query": f"q{n}", "response": "a" * n, "n": n} for n in range(1, 8)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:4]), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[4:]), tmp_path / "b.parquet")
    template = Template(model, max_length=55, truncation_strategy="delete")

    def worked(dataset: Any) -> list[dict[str, Any]]:
        dataset.map(lambda row: None if row["n"] == 2 else {**row, "n": row["n"] + 10})
        return list(dataset.filter(lambda row: row["n"] != 14).set_template(template).encode())

    for metas in (
        DatasetMeta(str(tmp_path)),
        [DatasetMeta(str(tmp_path)), DatasetMeta(str(tmp_path / "a.jsonl"))],
    ):
        streamed, kept = worked(IterableDataset(metas)), worked(Dataset(metas))
        assert numbers(streamed) == numbers(kept) and len(kept) > 0
        for one, other in zip(streamed, kept, strict=True):
            assert list(one) == list(other)
            np.testing.assert_array_equal(one["labels"], other["labels"])


def test_an_error_names_file_and_line_when_it_is_reached(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n{"m": 2}\n', encoding="utf-8")
    rows = iter(IterableDataset(DatasetMeta(str(tmp_path))).map(lambda row: {"n": row["n"]}))
    assert next(rows) == {"n": 1}
    with pytest.raises(InvalidRequest, match=r"a.jsonl:2: <lambda> raised KeyError: 'n'; the columns are m"):
        next(rows)
    with pytest.raises(NotFound, match="no such folder or file"):
        IterableDataset(DatasetMeta(str(tmp_path / "none")))


@given(rows=st.integers(0, 40), size=st.integers(1, 50), seed=st.integers(0, 2**32))
def test_a_shuffled_stream_holds_every_row_once_and_none_too_early(rows: int, size: int, seed: int) -> None:
    shuffled = numbers(of(rows).shuffle(size, seed))
    assert sorted(shuffled) == list(range(rows))
    # Before row n can be given out, all but the size - 1 that are held back have been.
    assert all(n < position + size for position, n in enumerate(shuffled))
    assert shuffled == numbers(of(rows).shuffle(size, seed))


def test_epochs_differ_and_repeat() -> None:
    stream = of(50).shuffle(10, seed=3)
    epochs = [numbers(stream.epoch(number)) for number in (0, 1, 0)]
    assert epochs[0] == epochs[2] == numbers(stream) != epochs[1]
    assert numbers(of(50).shuffle(10, seed=4)) != epochs[0]
    # Written down once: a training that is resumed after an upgrade must see the order it was begun with.
    assert numbers(of(8).shuffle(4, seed=1)) == [1, 2, 0, 6, 4, 5, 7, 3]


def test_shuffling_spreads_rows_evenly() -> None:
    """Of a buffer as large as the data, each row comes first equally often."""
    stream = of(5).shuffle(5)
    firsts = [next(stream.epoch(number))["n"] for number in range(1000)]
    # Binomial: mean 200, standard deviation below 13.
    assert all(abs(firsts.count(n) - 200) < 60 for n in range(5))


def test_rows_made_elsewhere_come_from_something_that_begins_anew() -> None:
    def rows() -> Iterator[dict[str, int]]:
        yield from ({"n": n} for n in range(3))

    stream = IterableDataset.from_rows(rows, "mine")
    assert numbers(stream) == numbers(stream) == [0, 1, 2]
    with pytest.raises(InvalidRequest, match="rows: a generator can be read only once"):
        IterableDataset.from_rows(rows())
    with pytest.raises(InvalidRequest, match="mine:3: <lambda> raised ZeroDivisionError"):
        list(stream.map(lambda row: {"n": 1 // (2 - row["n"])}))


@pytest.mark.parametrize(
    "data_slice", [slice(-3, None), slice(None, -1), slice(None, None, -1), [3, 1], [1, 1], [-1]]
)
def test_a_slice_that_goes_back_is_refused(tmp_path: Path, data_slice: Any) -> None:
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n', encoding="utf-8")
    with pytest.raises(InvalidRequest, match="data_slice: .*in their order only"):
        IterableDataset(DatasetMeta(str(tmp_path), data_slice=data_slice))


def test_a_row_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n' * 3, encoding="utf-8")
    with pytest.raises(InvalidRequest, match="data_slice: there is no row 3"):
        list(IterableDataset(DatasetMeta(str(tmp_path), data_slice=[0, 2, 3, 4])))


def test_numbers_out_of_range_and_what_a_stream_has_not_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="buffer_size: 0"):
        of(1).shuffle(0)
    with pytest.raises(InvalidRequest, match="seed: -1"):
        of(1).shuffle(1, -1)
    with pytest.raises(InvalidRequest, match="count: -1"):
        of(1).take(-1)
    with pytest.raises(InvalidRequest, match="encode: no template; call dataset.set_template"):
        of(1).encode()
    with pytest.raises(InvalidRequest, match="filter: expected a function of a row, got int"):
        of(1).filter(5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError):
        len(of(1))  # pyright: ignore[reportArgumentType]


def test_a_row_that_is_no_object_is_named_when_it_is_reached() -> None:
    rows = iter(IterableDataset.from_rows([{"n": 1}, "a"], "mine"))  # pyright: ignore[reportArgumentType]
    assert next(rows) == {"n": 1}
    with pytest.raises(InvalidRequest, match="mine:2: expected a row, .*got str"):
        next(rows)
