"""Encoding: layouts recognised, pairs, bad input, several processes and the cache."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from twinkle.dataset import Dataset, DatasetMeta, IterableDataset, LazyDataset
from twinkle.protocol.errors import InvalidRequest
from twinkle.template import Template

ALPACA = [{"instruction": f"question {n}", "output": "answer " * n, "id": n} for n in range(1, 6)]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> DatasetMeta:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return DatasetMeta(str(path))


def messages(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def same(first: Any, second: Any) -> bool:
    """Whether two encoded rows, or lists of them, are the same to the last type."""
    if isinstance(first, np.ndarray):
        return first.dtype == second.dtype and np.array_equal(first, second)
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


@pytest.mark.parametrize("kind", [Dataset, LazyDataset, IterableDataset])
@pytest.mark.parametrize(
    "row",
    [
        {"messages": messages("q", "a")},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"instruction": "q", "output": "a"},
        {"prompt": "q", "completion": "a"},
        {"question": "q", "answer": "a"},
        {"query": "q", "response": "a"},
    ],
)
def test_usual_layouts_are_encoded_as_they_are(
    tmp_path: Path, model: Path, kind: Any, row: dict[str, Any]
) -> None:
    dataset = (
        kind(write_rows(tmp_path / "a.jsonl", [{**row, "id": 5}])).set_template(Template(model)).encode()
    )
    [encoded] = list(dataset)
    assert set(encoded) == {"input_ids", "labels", "id"}
    expected = Template(model).encode({"messages": messages("q", "a")})
    assert same([encoded["input_ids"], encoded["labels"]], [expected["input_ids"], expected["labels"]])


@pytest.mark.parametrize("kind", [Dataset, LazyDataset, IterableDataset])
def test_a_layout_that_is_not_known_is_named_by_file_line_and_field(
    tmp_path: Path, model: Path, kind: Any
) -> None:
    good = {"query": "q", "response": "r"}
    for bad, message in (
        ({"text": "x"}, "a.jsonl:2: messages: .*the columns are text"),
        (
            {"conversations": [{"from": "human", "value": 3}]},
            r"a.jsonl:2: conversations\[0\].value: expected text",
        ),
        ({"messages": [{"content": "x"}]}, r"a.jsonl:2: messages\[0\].role"),
        (
            {"chosen": messages("q", "a"), "rejected": messages("q", "b")},
            "a.jsonl:2: chosen, rejected: .*encode_pairs",
        ),
    ):
        dataset = kind(write_rows(tmp_path / "a.jsonl", [good, bad])).set_template(Template(model))
        with pytest.raises(InvalidRequest, match=message):
            list(dataset.encode())


@pytest.mark.parametrize("kind", [Dataset, LazyDataset, IterableDataset])
def test_pairs_are_encoded_side_by_side(tmp_path: Path, model: Path, kind: Any) -> None:
    meta = write_rows(tmp_path / "a.jsonl", [{"prompt": "q", "chosen": "good", "rejected": "bad", "id": 1}])
    [row] = list(kind(meta).set_template(Template(model)).encode_pairs())
    assert set(row) == {"chosen", "rejected", "id"}
    for side, answer in (("chosen", "good"), ("rejected", "bad")):
        assert same(row[side], Template(model).encode({"messages": messages("q", answer)}))


def test_a_pair_with_one_side_too_long_is_left_out_named_or_cut(model: Path) -> None:
    rows = [
        {"prompt": "q", "chosen": "c", "rejected": "r"},
        {"prompt": "q", "chosen": "c", "rejected": "r" * 99},
    ]

    def encode(strategy: Any) -> Dataset:
        template = Template(model, max_length=80, truncation_strategy=strategy)
        return Dataset.from_rows(rows, "mine").set_template(template).encode_pairs()

    assert len(encode("delete")) == 1
    assert [len(row["rejected"]["input_ids"]) for row in encode("right")][1] == 80
    assert encode("right").describe().cut_rows == encode("delete").describe().left_out_rows == 1
    with pytest.raises(InvalidRequest, match="mine:2: rejected: messages: .* max_length is 80"):
        encode("raise")
    with pytest.raises(InvalidRequest, match="mine:1: rejected: nothing there"):
        Dataset.from_rows([{"chosen": "c"}], "mine").set_template(Template(model)).encode_pairs()
    with pytest.raises(InvalidRequest, match="encoded already"):
        encode("right").encode_pairs()


def test_an_empty_dataset_says_what_left_nothing(tmp_path: Path, model: Path) -> None:
    def empty(dataset: Any) -> str:
        with pytest.raises(InvalidRequest) as error:
            dataset.set_template(Template(model, max_length=5, truncation_strategy="delete")).encode()
        return error.value.message

    def nothing(row: dict[str, Any]) -> bool:
        return False

    assert "the dataset is empty: no rows were given to it" in empty(Dataset())
    assert "a.jsonl: no rows in it" in empty(Dataset(write_rows(tmp_path / "a.jsonl", [])))
    assert "Filtering (nothing) left none of 5 rows" in empty(Dataset.from_rows(ALPACA).filter(nothing))
    assert "Filtering (nothing) left none of 5 rows" in empty(LazyDataset.from_rows(ALPACA).filter(nothing))
    assert "Mapping (<lambda>) left none of 5 rows" in empty(Dataset.from_rows(ALPACA).map(lambda row: None))
    assert "all 5 rows have over 5 tokens" in empty(Dataset.from_rows(ALPACA))


def test_a_stream_that_holds_nothing_says_so_at_its_end(model: Path) -> None:
    template = Template(model, max_length=5, truncation_strategy="delete")
    stream = IterableDataset.from_rows(ALPACA).filter(lambda row: False).set_template(template).encode()
    with pytest.raises(InvalidRequest, match="encode: the stream is empty: .*filter, map"):
        list(stream)
    with pytest.raises(InvalidRequest, match="all 5 rows have over 5 tokens"):
        list(IterableDataset.from_rows(ALPACA).set_template(template).encode())


@pytest.mark.parametrize("kind", [Dataset, IterableDataset])
def test_rows_none_of_which_trains_anything_are_refused(model: Path, kind: Any) -> None:
    rows = [{"messages": [{"role": "user", "content": "q"}]}] * 3
    message = (
        "none of 3 rows has a token to train on.*assistant; .*train_on .*'last_assistant'.*max_length=None"
    )
    with pytest.raises(InvalidRequest, match=message):
        list(kind.from_rows(rows).set_template(Template(model, train_on="last_assistant")).encode())
    assert (
        len(list(kind.from_rows(rows).set_template(Template(model)).encode(add_generation_prompt=True))) == 3
    )
    assert len(list(kind.from_rows(rows).set_template(Template(model, train_on="all")).encode())) == 3
    # Cutting took the answers away.
    template = Template(model, max_length=6, truncation_strategy="right")
    with pytest.raises(InvalidRequest, match="max_length=6, truncation_strategy='right'"):
        list(kind.from_rows(ALPACA).set_template(template).encode())


SCRIPT = """
import sys
from twinkle.dataset import Dataset
from twinkle.protocol.errors import InvalidRequest
from twinkle.template import Template
import numpy as np

class Shouting(Template):
    def encode(self, trajectory, add_generation_prompt=False):
        shouted = [{**m, "content": m["content"].upper()} for m in trajectory["messages"]]
        return super().encode({**trajectory, "messages": shouted}, add_generation_prompt)

def encoded(num_proc, broken=()):
    rows = [{"n": n} for n in range(300)]
    dataset = Dataset.from_rows(rows, "mine")
    dataset.map(lambda row: {"query": f"what is {row['n']}", "response": "x" * (row["n"] % 90), "n": row["n"]})
    dataset.map(lambda row: {"messages": [{"content": "no role"}]} if row["n"] in broken else row)
    template = Shouting(sys.argv[1], max_length=70, truncation_strategy="delete")
    return dataset.set_template(template).encode(num_proc=num_proc)

one, two = encoded(1), encoded(2)
assert 0 < len(one) == len(two) < 300
for first, second in zip(one, two):
    assert list(first) == list(second) and first["n"] == second["n"]
    for key in ("input_ids", "labels"):
        assert np.array_equal(first[key], second[key]) and first[key].dtype == second[key].dtype
assert one.describe() == two.describe()
for num_proc in (1, None):
    try:
        encoded(num_proc, broken=(290, 140, 200))
    except InvalidRequest as error:
        print(error)
print("done")
"""


def test_processes_give_the_same_rows_and_errors_from_a_flat_script(tmp_path: Path, model: Path) -> None:
    script = tmp_path / "flat.py"
    script.write_text(SCRIPT, encoding="utf-8")
    ran = subprocess.run(
        [sys.executable, str(script), str(model)], capture_output=True, text=True, timeout=240, check=False
    )
    assert ran.returncode == 0, ran.stderr
    *errors, done = ran.stdout.splitlines()
    assert done == "done"
    # Line 141 holds row 140, the first of the broken ones, whichever process is the first to fail.
    assert len(errors) == 2 and len(set(errors)) == 1
    assert errors[0].startswith("mine:141: ")
    assert "Traceback" not in ran.stderr


def test_importing_datasets_imports_neither_processes_nor_plots() -> None:
    code = "import sys, twinkle.dataset; print([m for m in ('loky', 'matplotlib', 'pyarrow') if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout.strip() == "[]"


@pytest.mark.parametrize("num_proc", [0, -1])
def test_a_number_of_processes_out_of_range_is_refused(model: Path, num_proc: int) -> None:
    with pytest.raises(InvalidRequest, match=f"num_proc: {num_proc}"):
        Dataset.from_rows(ALPACA).set_template(Template(model)).encode(num_proc=num_proc)


@pytest.mark.parametrize("train_on", ["assistant", "last_assistant", "all"])
@pytest.mark.parametrize("strategy", ["left", "right", "delete"])
def test_rows_are_encoded_together_as_they_are_alone(model: Path, train_on: Any, strategy: Any) -> None:
    rows = [
        {"messages": messages(f"q{n} é", "ant\u0301wort 😀 " * n) + messages("  again\n", "\n ja")}
        for n in range(1, 8)
    ]
    rows[2]["messages"][1]["weight"] = 0  # pyright: ignore[reportArgumentType]
    template = Template(model, train_on=train_on, max_length=150, truncation_strategy=strategy)
    alone = [feature for row in rows for feature in template.batch_encode([row])]
    dataset = Dataset.from_rows(rows, "mine").set_template(template).encode()
    assert 0 < len(alone) <= len(rows)
    assert same(list(dataset), alone)


def test_the_first_row_at_fault_is_named_whatever_is_wrong_with_later_ones(model: Path) -> None:
    def error(*rows: Any) -> str:
        with pytest.raises(InvalidRequest) as raised:
            Dataset.from_rows(list(rows), "mine").set_template(Template(model, max_length=40)).encode()
        return raised.value.message

    fine, long = {"messages": messages("q", "a")}, {"messages": messages("q", "a" * 50)}
    broken = {"messages": [{"role": "user", "content": 5}]}
    assert error(fine, long, broken).startswith("mine:2: messages: ")
    assert error(fine, broken, long).startswith("mine:2: messages[0].content")
