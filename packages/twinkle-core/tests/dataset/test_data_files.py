"""Which files are read for a subset and a split."""

from pathlib import Path

import pytest

from twinkle.dataset.data_files import find_files
from twinkle.protocol.errors import InvalidRequest, NotFound


def folder(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}", encoding="utf-8")
    return root


def found(root: Path, subset: str | None = None, split: str | None = None) -> list[str]:
    return [path.relative_to(root).as_posix() for path in find_files(root, subset, split)]


def test_all_data_files_are_read_where_none_is_named(tmp_path: Path) -> None:
    root = folder(tmp_path, "b/x.csv", "a.jsonl", "README.md", "c.parquet", "d.json", "e.ndjson")
    assert found(root) == ["a.jsonl", "b/x.csv", "c.parquet", "d.json", "e.ndjson"]


def test_hidden_files_and_descriptions_are_no_data(tmp_path: Path) -> None:
    root = folder(
        tmp_path,
        "a.jsonl",
        ".cache/b.jsonl",
        ".c.json",
        "__pycache__/d.json",
        "dataset_infos.json",
        "config.json",
    )
    assert found(root) == ["a.jsonl"]


def test_of_a_file_in_several_formats_one_is_read(tmp_path: Path) -> None:
    root = folder(tmp_path, "a.parquet", "a.jsonl", "a.csv", "b.parquet", "b.csv", "x/a.parquet")
    assert found(root) == ["a.jsonl", "b.csv", "x/a.parquet"]


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"]),
        ("test", ["data/test2.jsonl"]),
        ("validation", ["data/dev.jsonl"]),
        ("extra", ["data/the_extra_rows.jsonl"]),
    ],
)
def test_a_split_is_the_files_named_for_it(tmp_path: Path, split: str, expected: list[str]) -> None:
    names = ["dev", "test2", "the_extra_rows", "train-00000-of-00002", "train-00001-of-00002", "trainer"]
    root = folder(tmp_path, *(f"data/{name}.jsonl" for name in names))
    assert found(root, split=split) == expected


def test_a_split_may_be_a_folder(tmp_path: Path) -> None:
    root = folder(tmp_path, "train/0.jsonl", "test/0.jsonl")
    assert found(root, split="test") == ["test/0.jsonl"]


def test_files_named_for_no_split_are_train(tmp_path: Path) -> None:
    root = folder(tmp_path, "self_cognition.jsonl", "self_cognition_test.jsonl")
    assert found(root, split="train") == ["self_cognition.jsonl"]


def test_a_subset_is_a_folder_or_else_part_of_the_name(tmp_path: Path) -> None:
    root = folder(
        tmp_path, "main/train.jsonl", "main/test.jsonl", "socratic/train.jsonl", "socratic-main.jsonl"
    )
    assert found(root, subset="main") == ["main/test.jsonl", "main/train.jsonl"]
    assert found(root, subset="main", split="test") == ["main/test.jsonl"]
    by_name = folder(tmp_path / "other", "main_train.jsonl", "maintenance.jsonl", "hard-main.jsonl")
    assert found(by_name, subset="main") == ["hard-main.jsonl", "main_train.jsonl"]
    assert found(by_name, subset="main", split="train") == ["hard-main.jsonl", "main_train.jsonl"][1:]


def test_a_subset_may_be_a_path_of_folders(tmp_path: Path) -> None:
    root = folder(tmp_path, "a/b/x.jsonl", "a/c/x.jsonl")
    assert found(root, subset="a/b") == ["a/b/x.jsonl"]


def test_what_is_not_there_is_answered_with_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="holds no data files"):
        find_files(tmp_path)
    root = folder(tmp_path, "a/train.jsonl")
    with pytest.raises(NotFound, match="subset: .*'b'; it holds a/train.jsonl"):
        find_files(root, subset="b")
    with pytest.raises(NotFound, match="split: .*'test'; it holds a/train.jsonl"):
        find_files(root, split="test")


def test_a_single_file_is_taken_as_it_is(tmp_path: Path) -> None:
    file = folder(tmp_path, "a.jsonl") / "a.jsonl"
    assert find_files(file) == [file]
    with pytest.raises(InvalidRequest, match="single file"):
        find_files(file, split="train")
