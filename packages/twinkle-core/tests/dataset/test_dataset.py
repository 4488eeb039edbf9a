"""From files to encoded rows, as a training script does it."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from twinkle.data_format import NOT_TRAINED, to_datum
from twinkle.dataloader import DataLoader
from twinkle.dataset import Dataset, DatasetMeta, IterableDataset, LazyDataset
from twinkle.preprocessor import SelfCognitionProcessor
from twinkle.protocol.errors import InvalidRequest, NotFound
from twinkle.template import Template

COGNITION = [
    {"query": "Who are you?", "response": "I am {{NAME}}, by {{AUTHOR}}.", "tag": "en"},
    {"query": "你是谁?", "response": "我是{{NAME}}。", "tag": "zh"},
    {"query": "Your name?", "response": "{{NAME}}", "tag": "en"},
]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def numbered(path: Path, count: int, source: str) -> DatasetMeta:
    return DatasetMeta(str(write_rows(path, [{"n": n, "from": source} for n in range(count)])))


def numbers(dataset: Dataset) -> list[str]:
    return [f"{row['from']}{row['n']}" for row in dataset]


def conversation(content: str, **rest: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": content}],
        **rest,
    }


def test_the_way_of_the_first_training_script(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "swift" / "self-cognition" / "self_cognition.jsonl", COGNITION)
    (tmp_path / "Qwen").mkdir()
    (tmp_path / "Qwen" / "Qwen3.5-4B").symlink_to(model)
    monkeypatch.setenv("TWINKLE_HUB_ROOT", str(tmp_path))

    dataset = Dataset(dataset_meta=DatasetMeta("ms://swift/self-cognition"))
    dataset.set_template("Template", model_id="ms://Qwen/Qwen3.5-4B")
    dataset.map(SelfCognitionProcessor("My Model", "My Team"))
    dataset.encode()
    dataloader = DataLoader(dataset=dataset, batch_size=2)

    template = Template(model_id="ms://Qwen/Qwen3.5-4B")
    for _ in range(2):
        answers: list[str] = []
        for batch in dataloader:
            for feature in batch:
                labels = feature["labels"]
                answers.append(template.decode(labels[labels != NOT_TRAINED]))
                assert to_datum(feature).loss_fn_inputs["weights"].to_numpy().sum() > 0
        expected = ["I am My Model, by My Team.", "我是My Model。", "My Model"]
        assert sorted(answers) == sorted(f"{answer}<|im_end|>" for answer in expected)


def test_encoding_exchanges_messages_for_a_feature_and_keeps_other_columns(model: Path) -> None:
    rows = [conversation("b", tools=None, answer=42)]
    dataset = Dataset.from_rows(rows).set_template(Template(model)).encode()
    assert set(dataset[0]) == {"input_ids", "labels", "answer"}
    expected = Template(model).encode(rows[0])
    np.testing.assert_array_equal(dataset[0]["input_ids"], expected["input_ids"])
    np.testing.assert_array_equal(dataset[0]["labels"], expected["labels"])


def test_prompts_to_sample_from_end_with_the_opening_of_a_turn(model: Path) -> None:
    template = Template(model)
    dataset = Dataset.from_rows([{"messages": [{"role": "user", "content": "q"}]}]).set_template(template)
    dataset.encode(add_generation_prompt=True)
    assert template.decode(dataset[0]["input_ids"]).endswith("<|im_start|>assistant\n")


def test_subset_split_and_slice_choose_the_rows(tmp_path: Path) -> None:
    for subset in ("a", "b"):
        for split in ("train", "test"):
            numbered(tmp_path / subset / f"{split}.jsonl", 5, f"{subset}-{split}-")
    assert len(Dataset(DatasetMeta(str(tmp_path)))) == 20
    train = DatasetMeta(str(tmp_path), subset="b", split="train", data_slice=slice(3))
    assert numbers(Dataset(train)) == ["b-train-0", "b-train-1", "b-train-2"]
    assert numbers(Dataset(DatasetMeta(str(tmp_path), "a", "test", range(1, 5, 2)))) == [
        "a-test-1",
        "a-test-3",
    ]
    assert numbers(Dataset(DatasetMeta(str(tmp_path), "a", "test", [4, -5]))) == ["a-test-4", "a-test-0"]
    with pytest.raises(InvalidRequest, match="data_slice: row 5 of 5"):
        Dataset(DatasetMeta(str(tmp_path), "a", "test", range(6)))


def test_a_dataset_that_is_nowhere_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no such folder or file"):
        Dataset(DatasetMeta(str(tmp_path / "none")))


def test_rows_are_numbered_over_all_sources(tmp_path: Path) -> None:
    dataset = Dataset([numbered(tmp_path / "x.jsonl", 2, "x"), numbered(tmp_path / "y.jsonl", 3, "y")])
    assert numbers(dataset) == ["x0", "x1", "y0", "y1", "y2"]
    assert [dataset[i]["from"] for i in (0, 1, 2, -1, -5)] == ["x", "x", "y", "y", "x"]
    for index in (5, -6):
        with pytest.raises(IndexError, match=f"row {index} of 5"):
            dataset[index]


def test_sources_are_mixed_in_turn_or_one_after_the_other(tmp_path: Path) -> None:
    def make() -> Dataset:
        dataset = Dataset(numbered(tmp_path / "x.jsonl", 1, "x"))
        return dataset.add_dataset(numbered(tmp_path / "y.jsonl", 3, "y"))

    assert numbers(make().mix_dataset()) == ["x0", "y0", "y1", "y2"]
    three = make().add_dataset(numbered(tmp_path / "z.jsonl", 2, "z")).mix_dataset()
    assert numbers(three) == ["x0", "y0", "z0", "y1", "z1", "y2"]
    assert numbers(make().mix_dataset(interleave=False)) == ["x0", "y0", "y1", "y2"]


def test_one_source_can_be_mapped_and_filtered_alone(tmp_path: Path) -> None:
    x, y = numbered(tmp_path / "x.jsonl", 2, "x"), numbered(tmp_path / "y.jsonl", 2, "y")
    dataset = Dataset([x, y])
    dataset.map(lambda row: {**row, "from": "X"}, dataset_meta=x).filter(lambda row: row["n"], dataset_meta=y)
    assert numbers(dataset) == ["X0", "X1", "y1"]
    with pytest.raises(InvalidRequest, match="none of the sources"):
        dataset.mix_dataset().map(lambda row: row, dataset_meta=x)


def test_map_drops_rows_for_none_and_leaves_the_old_rows_alone() -> None:
    rows = [{"n": 1}, {"n": 2}]

    def odd(row: dict[str, Any]) -> dict[str, Any] | None:
        row["n"] += 10
        return row if row["n"] % 2 else None

    dataset = Dataset.from_rows(rows).map(odd)
    assert list(dataset) == [{"n": 11}]
    assert rows == [{"n": 1}, {"n": 2}]


def test_a_failing_row_is_named_and_nothing_is_changed(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [*COGNITION[:2], {"question": "?"}])
    dataset = Dataset(DatasetMeta(str(path)))
    with pytest.raises(InvalidRequest, match=r"a.jsonl:3: query: expected text.*columns are question"):
        dataset.map(SelfCognitionProcessor("A", "B"))
    assert list(dataset)[0] == COGNITION[0]
    with pytest.raises(
        InvalidRequest, match=r"a.jsonl:3: <lambda> raised KeyError: 'query'; the columns are quest"
    ):
        dataset.filter(lambda row: row["query"])
    with pytest.raises(InvalidRequest, match=r"a.jsonl:1: .*must return a row or None, not int"):
        dataset.map(len)  # pyright: ignore[reportArgumentType]
    assert len(dataset) == 3


def test_a_row_that_is_no_conversation_is_named_on_encoding(model: Path) -> None:
    dataset = Dataset.from_rows([conversation("b"), {"query": "a"}], name="mine").set_template(
        Template(model)
    )
    with pytest.raises(
        InvalidRequest, match="mine:2: messages: expected .*columns are query: a preprocessor"
    ):
        dataset.encode()


def test_rows_over_the_limit_are_left_out_cut_or_refused(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [conversation("b"), conversation("b" * 100)]

    def encode(strategy: Any) -> Dataset:
        template = Template(model, max_length=80, truncation_strategy=strategy)
        return Dataset.from_rows(rows).set_template(template).encode()

    with caplog.at_level(logging.WARNING):
        assert len(encode("delete")) == 1
    assert "1 of 2 rows left out: over 80 tokens" in caplog.text
    assert [len(row["input_ids"]) for row in encode("right")][1] == 80
    with pytest.raises(InvalidRequest, match="rows:2: messages: .* max_length is 80"):
        encode("raise")


def test_rows_with_nothing_to_train_on_are_counted(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    silent = {"messages": [{"role": "user", "content": "q"}]}
    rows = [conversation("b"), silent, silent]
    for kind in (Dataset, IterableDataset):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            list(kind.from_rows(rows, "mine").set_template(Template(model, max_length=70)).encode())
        assert "2 of 3 rows have no token to train on; the first is mine:2: look for" in caplog.text
        assert "train_on ('assistant'), and whether max_length (70)" in caplog.text


def test_encoding_twice_or_without_a_template_says_what_to_do(model: Path) -> None:
    dataset = Dataset.from_rows([conversation("b")])
    with pytest.raises(InvalidRequest, match="call dataset.set_template"):
        dataset.encode()
    dataset.set_template("Template", model_id=str(model)).encode()
    with pytest.raises(InvalidRequest, match="encoded already"):
        dataset.encode()


@pytest.mark.parametrize(
    ("template", "options", "message"),
    [
        ("Qwen", {"model_id": "x"}, "'Qwen' is unknown"),
        ("Template", {}, "missing a required argument: 'model_id'"),
        ("Template", {"model_id": "x", "max_len": 5}, "unexpected keyword argument 'max_len'"),
    ],
)
def test_a_template_that_does_not_exist_is_refused(
    template: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        Dataset().set_template(template, **options)


def test_what_is_no_function_of_a_row_is_refused(model: Path) -> None:
    dataset = Dataset.from_rows([{"a": 1}])
    with pytest.raises(InvalidRequest, match=r"map: SelfCognitionProcessor is a class; give an instance"):
        dataset.map(SelfCognitionProcessor)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidRequest, match="filter: expected a function of a row, got int"):
        dataset.filter(5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidRequest, match="a finished template takes no arguments"):
        dataset.set_template(Template(model), max_length=5)


@pytest.mark.parametrize("kind", [Dataset, LazyDataset, IterableDataset])
def test_a_string_or_a_path_stands_for_a_meta(tmp_path: Path, kind: Any) -> None:
    x, y = numbered(tmp_path / "x.jsonl", 2, "x"), numbered(tmp_path / "y.jsonl", 1, "y")
    assert numbers(kind(x.dataset_id)) == numbers(kind(tmp_path / "x.jsonl")) == ["x0", "x1"]
    assert numbers(kind([x.dataset_id, tmp_path / "y.jsonl", y])) == ["x0", "x1", "y0", "y0"]
    if kind is not IterableDataset:
        both = kind(x).add_dataset(tmp_path / "y.jsonl")
        assert numbers(both.filter(lambda row: row["n"], dataset_meta=x.dataset_id)) == ["x1", "y0"]


@pytest.mark.parametrize("kind", [Dataset, LazyDataset, IterableDataset])
def test_what_is_no_source_is_refused(kind: Any) -> None:
    for wrong, message in (
        (5, "dataset_meta: expected a DatasetMeta, or an id or a path, got int"),
        (None, "dataset_meta: expected a DatasetMeta, .* got NoneType"),
        ({"n": 1}, "dataset_meta: .* got dict; rows that are in memory go to from_rows"),
        ([{"n": 1}], r"dataset_meta\[0\]: .* got dict; rows that are in memory go to from_rows"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            kind(wrong)
    if kind is not IterableDataset:
        with pytest.raises(InvalidRequest, match="dataset_meta: .* got list"):
            kind().add_dataset([])


def test_slices_are_lists_of_rows_over_all_sources(tmp_path: Path) -> None:
    dataset = Dataset([numbered(tmp_path / "x.jsonl", 2, "x"), numbered(tmp_path / "y.jsonl", 3, "y")])
    rows = list(dataset)
    for taken in (slice(1, 3), slice(-2, None), slice(None, None, -1), slice(9, 12), slice(None)):
        assert dataset[taken] == rows[taken]
    assert dataset[np.int64(3)] == rows[3]
    for wrong in ("n", 1.0):
        with pytest.raises(TypeError, match="rows are taken by a whole number or a slice, not by"):
            dataset[wrong]  # pyright: ignore[reportCallIssue, reportArgumentType]


def test_rows_that_are_no_objects_are_named_by_their_number() -> None:
    with pytest.raises(InvalidRequest, match="rows:2: expected a row, an object with columns .*got str"):
        Dataset.from_rows([{"n": 1}, "a"])  # pyright: ignore[reportArgumentType]


def test_a_split_holds_every_row_once_in_an_order_of_its_seed() -> None:
    dataset = Dataset.from_rows([{"n": n} for n in range(10)])
    rest, held_out = dataset.split(0.3, seed=1)
    assert (len(rest), len(held_out), len(dataset)) == (7, 3, 10)
    both = [row["n"] for row in [*held_out, *rest]]
    assert sorted(both) == list(range(10)) == [row["n"] for row in dataset]
    # Legacy seeding by hand, whose streams numpy has promised to keep.
    random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([1])))
    assert both == random.permutation(10).tolist()
    assert [row["n"] for row in dataset.split(0.3, seed=1)[1]] == both[:3]
    assert [row["n"] for row in dataset.split(0.3, seed=2)[1]] != both[:3]
    rest.map(lambda row: {"n": -1})
    assert [row["n"] for row in dataset] == list(range(10))


def test_a_split_keeps_places_and_what_is_known_of_encoding(tmp_path: Path, model: Path) -> None:
    rows = [conversation("b" * n, n=n) for n in range(1, 11)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    before, _ = Dataset(path).set_template(Template(model)).split(0.5)
    assert len(before.encode()[0]["input_ids"]) > 0
    with pytest.raises(InvalidRequest, match=rf"a.jsonl:{before[0]['n']}: <lambda> raised KeyError"):
        before.map(lambda row: row["none"], dataset_meta=path)
    whole = Dataset(path).set_template(Template(model)).encode()
    limit = len(whole[6]["input_ids"])
    cut = Dataset(path).set_template(Template(model, max_length=limit, truncation_strategy="right"))
    parts = cut.encode().split(0.4)
    for part in parts:
        expected = sum(row["n"] > 7 for row in part)
        assert part.describe().cut_rows == expected
        assert part.describe().truncated == expected / len(part)
    assert sum(part.describe().cut_rows for part in parts) == 3
    shorter = Dataset(path).set_template(Template(model, max_length=limit, truncation_strategy="delete"))
    rest, held_out = (part.describe() for part in shorter.encode().split(0.4))
    assert (rest.rows, held_out.rows) == (4, 3)
    assert (rest.left_out_rows, rest.truncated) == (3, 3 / 7)
    assert (held_out.left_out_rows, held_out.truncated) == (0, 0)


@pytest.mark.parametrize(
    ("rows", "fraction", "seed", "message"),
    [
        (4, 0, 0, "fraction: 0; allowed are numbers between 0 and 1"),
        (4, 1.0, 0, "fraction: 1.0; allowed"),
        (4, float("nan"), 0, "fraction: nan; allowed"),
        (4, "0.1", 0, "fraction: '0.1'; allowed"),
        (4, 0.5, -1, "seed: -1; allowed are whole numbers from 0"),
        (4, 0.1, 0, "split: 0.1 of 4 rows is 0 rows to hold out, and each part needs at least one"),
        (4, 0.9, 0, "split: 0.9 of 4 rows is 4 rows to hold out"),
        (0, 0.5, 0, "split: the dataset is empty"),
    ],
)
def test_a_split_that_leaves_a_part_empty_is_refused(
    rows: int, fraction: Any, seed: int, message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        Dataset.from_rows([{"n": n} for n in range(rows)]).split(fraction, seed)


def test_rows_of_hugging_faces_datasets_are_read_as_those_of_a_parquet_file() -> None:
    # Their library is no dependency of these tests; a row of it holds null for every field that another row has.
    class Foreign(list[dict[str, Any]]):
        __module__ = "datasets.arrow_dataset"

    filled = {"messages": [{"role": "user", "content": "q", "tool_calls": None}], "label": None}
    expected = {"messages": [{"role": "user", "content": "q"}], "label": None}
    assert list(Dataset.from_rows(Foreign([filled]))) == [expected]
