"""Rows that are mapped and encoded when they are asked for."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from twinkle.dataloader import DataLoader
from twinkle.dataset import Dataset, DatasetMeta, LazyDataset
from twinkle.protocol.errors import InvalidRequest
from twinkle.template import Template

ROWS = [{"query": f"q{n}", "response": "a" * n} for n in range(1, 6)]


def write(path: Path, rows: list[dict[str, Any]]) -> DatasetMeta:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return DatasetMeta(str(path))


def test_rows_are_those_of_a_dataset_and_made_when_they_are_asked_for(tmp_path: Path, model: Path) -> None:
    mapped: list[str] = []

    def upper(row: dict[str, Any]) -> dict[str, Any]:
        mapped.append(row["query"])
        return {**row, "response": row["response"].upper()}

    meta = write(tmp_path / "a.jsonl", ROWS)
    lazy = LazyDataset(meta).map(upper).set_template(Template(model)).encode()
    assert len(lazy) == 5 and mapped == []
    last = lazy[-1]
    assert mapped == ["q5"]
    eager = Dataset(meta).map(upper).set_template(Template(model)).encode()
    np.testing.assert_array_equal(last["labels"], eager[4]["labels"])
    assert [list(row["input_ids"]) for row in lazy] == [list(row["input_ids"]) for row in eager]
    assert mapped == ["q5", *["q1", "q2", "q3", "q4", "q5"] * 2]
    batches = list(DataLoader(lazy, batch_size=2))
    assert sorted(len(row["input_ids"]) for batch in batches for row in batch) == sorted(
        len(row["input_ids"]) for row in eager
    )


def test_a_failing_row_is_named_when_it_is_asked_for(tmp_path: Path, model: Path) -> None:
    meta = write(tmp_path / "a.jsonl", [*ROWS[:2], {"query": 3, "response": "a"}])
    lazy = LazyDataset(meta).set_template(Template(model)).encode()
    assert len(lazy[1]["input_ids"]) > 0
    with pytest.raises(InvalidRequest, match=r"a.jsonl:3: query: expected text, got int"):
        lazy[2]
    with pytest.raises(
        InvalidRequest, match="a.jsonl:1: <lambda> raised KeyError: 'x'; the columns are query, resp"
    ):
        LazyDataset(meta).map(lambda row: row["x"])[0]


def test_filter_looks_at_once_and_at_what_was_mapped(tmp_path: Path) -> None:
    x, y = write(tmp_path / "x.jsonl", ROWS), write(tmp_path / "y.jsonl", ROWS)
    lazy = LazyDataset([x, y]).map(lambda row: {"n": len(row["response"])}, dataset_meta=x)
    lazy.filter(lambda row: row["n"] % 2, dataset_meta=x).map(lambda row: {**row, "seen": True})
    assert len(lazy) == 8
    assert [row.get("n") for row in lazy] == [1, 3, 5, *[None] * 5]
    assert all(row["seen"] for row in lazy)
    with pytest.raises(
        InvalidRequest, match="x.jsonl:1: <lambda> raised KeyError: 'none'; the columns are n"
    ):
        lazy.filter(lambda row: row["none"])
    mixed = lazy.mix_dataset()
    assert [row.get("n") for row in mixed] == [1, None, 3, None, 5, None, None, None]


def test_what_would_leave_rows_out_later_is_refused(model: Path) -> None:
    with pytest.raises(InvalidRequest, match="rows:2: map returned None, .*filter"):
        list(LazyDataset.from_rows(ROWS).map(lambda row: row if row["query"] == "q1" else None))
    template = Template(model, max_length=60, truncation_strategy="delete")
    with pytest.raises(InvalidRequest, match="encode: truncation_strategy='delete' leaves rows out"):
        LazyDataset.from_rows(ROWS).set_template(template).encode()


def test_encoding_needs_a_template_and_rows(model: Path) -> None:
    with pytest.raises(InvalidRequest, match="encode: no template; call dataset.set_template"):
        LazyDataset.from_rows(ROWS).encode()
    with pytest.raises(InvalidRequest, match="encode: the dataset is empty"):
        LazyDataset().set_template(Template(model)).encode()
    twice = LazyDataset.from_rows(ROWS).set_template(Template(model)).encode().encode()
    with pytest.raises(InvalidRequest, match="rows:1: the row is encoded already"):
        twice[0]


def test_a_split_is_worked_on_when_rows_are_asked_for(tmp_path: Path, model: Path) -> None:
    lazy = LazyDataset(tmp_path / write(tmp_path / "a.jsonl", ROWS).dataset_id)
    rest, held_out = lazy.set_template(Template(model)).encode().split(0.4)
    assert (len(rest), len(held_out)) == (3, 2)
    lengths = [len(row["input_ids"]) for row in [*rest[:], *held_out[:]]]
    assert sorted(lengths) == sorted(len(row["input_ids"]) for row in lazy)
