"""One file at a time: what is read, and how a broken one is reported."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from twinkle.dataset.readers import read_rows
from twinkle.protocol.errors import InvalidRequest

ROWS = [{"q": "a", "n": 1}, {"q": "Ünïcödé 😀 \u2028 line", "n": None}]


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def rows(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_rows(path)]


@pytest.mark.parametrize("ensure_ascii", [True, False])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".JSONL", ".json"])
def test_json_lines_are_read(tmp_path: Path, suffix: str, line_end: str, ensure_ascii: bool) -> None:
    text = line_end.join(json.dumps(row, ensure_ascii=ensure_ascii) for row in ROWS)
    assert rows(write(tmp_path / f"a{suffix}", text)) == ROWS


def test_empty_lines_are_passed_over_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '\n{"a": 1}\n\n  \n{"a": 2}\n')
    assert list(read_rows(path)) == [(2, {"a": 1}), (5, {"a": 2})]


def test_a_byte_order_mark_is_no_data(tmp_path: Path) -> None:
    assert rows(write(tmp_path / "a.jsonl", '{"a": 1}', "utf-8-sig")) == [{"a": 1}]
    assert rows(write(tmp_path / "a.csv", "a\n1\n", "utf-8-sig")) == [{"a": "1"}]


def test_a_json_file_holds_a_list_of_rows(tmp_path: Path) -> None:
    assert rows(write(tmp_path / "a.json", json.dumps(ROWS, indent=2))) == ROWS
    assert rows(write(tmp_path / "b.json", '{"a": 1}\n')) == [{"a": 1}]
    assert rows(write(tmp_path / "c.json", "[]")) == []


def test_csv_is_read_with_quotes_line_breaks_and_long_fields(tmp_path: Path) -> None:
    long = "x" * 200_000
    path = write(tmp_path / "a.csv", f'q,r\r\n"a, ""b""\nc",d\r\n\r\n{long},ü\r\n')
    assert list(read_rows(path)) == [(3, {"q": 'a, "b"\nc', "r": "d"}), (5, {"q": long, "r": "ü"})]
    assert rows(write(tmp_path / "b.csv", "")) == []


def test_parquet_is_read_with_nested_columns(tmp_path: Path) -> None:
    messages = [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]]
    pyarrow.parquet.write_table(pyarrow.table({"messages": messages}), tmp_path / "a.parquet")
    assert list(read_rows(tmp_path / "a.parquet")) == [
        (1, {"messages": messages[0]}),
        (2, {"messages": messages[1]}),
    ]


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(InvalidRequest, match=r"a.parquet: .*pip install 'twinkle-core\[parquet\]'"):
        rows(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n', r"a.jsonl:2: not JSON \(.*column"),
        ("a.jsonl", '{"a": 1}\n[1]\n', "a.jsonl:2: expected an object, got list"),
        ("a.jsonl", "5\n", "a.jsonl:1: expected an object, got number"),
        ("a.json", '[{"a": 1},\n {"a": }]', "a.json:2: not JSON"),
        ("a.json", '{"a": 1}\n{"a": \n', "a.json:2: not JSON"),
        (
            "a.json",
            '{\n"data": []\n}',
            "a.json: expected a list of objects, or one object a line, got one object",
        ),
        ("a.json", '[{"a": 1}, null]', "a.json:2: expected an object, got null"),
        ("a.csv", "q,r\na,b\nc\n", "a.csv:3: 1 fields, and the first line has 2"),
        ("a.csv", 'q,r\n"a"b,c\n', "a.csv: not CSV"),
        ("a.txt", "x", r"a.txt: can't read .txt files; allowed are .jsonl"),
    ],
)
def test_what_is_wrong_is_named_by_file_and_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        rows(write(tmp_path / name, text))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_text_that_is_not_utf8_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{name} is not UTF-8"):
        rows(write(tmp_path / name, '{"a": "ü"}', "latin-1"))


def test_parquet_rows_are_those_of_json_lines_whatever_arrow_fills_in(tmp_path: Path) -> None:
    def call(name: str, **arguments: Any) -> dict[str, Any]:
        calls = [{"type": "function", "function": {"name": name, "arguments": arguments}}]
        return {"role": "assistant", "tool_calls": calls}

    def tool(name: str, **parameters: Any) -> dict[str, Any]:
        return {"type": "function", "function": {"name": name, "parameters": {"properties": parameters}}}

    given = [
        {
            "messages": [
                {"role": "user", "content": "q"},
                call("weather", city="Rome"),
                call("send", text="hi", to=["a"]),
            ],
            "tools": [
                tool("weather", city={"type": "string"}),
                tool("send", text={"type": "string", "default": "x"}),
            ],
        },
        {"messages": [{"role": "user", "content": "q"}, call("now", hour={"h": 1})], "tools": None},
    ]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(given), path)
    lines = write(tmp_path / "a.jsonl", "\n".join(json.dumps(row) for row in given))
    assert rows(path) == rows(lines) == given


DEEP = '{"a": ' + "[" * 50_000 + "]" * 50_000 + "}"
LONG = '{"a": ' + "1" * 5_000 + "}"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", f'{{"a": 1}}\n{DEEP}\n', "a.jsonl:2: objects and lists are nested too deeply"),
        ("a.jsonl", f'{{"a": 1}}\n\n{LONG}\n', "a.jsonl:3: a number can't be read .*4300"),
        ("a.json", f'{{"a": 1}}\n{DEEP}\n', "a.json:2: objects and lists are nested too deeply"),
        ("a.json", f'[{{"a": 1}},\n{DEEP}]\n', "a.json:2: objects and lists are nested too deeply"),
        ("a.json", f'[{{"a": 1}}, {{"a": 2}},\n\n{LONG}]\n', "a.json:3: a number can't be read"),
        ("a.json", LONG, "a.json:1: a number can't be read"),
        ("a.csv", 'q,r\nb,c\n"a\nb"x,c\n', r"a.csv: not CSV \(line 3: "),
        ("a.csv", 'q,r\nb,c\n"a', r"a.csv: not CSV \(line 3: "),
    ],
)
def test_what_python_can_not_read_is_reported_by_file_and_line(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        rows(write(tmp_path / name, text))


def test_rows_before_a_line_that_is_no_text_are_read_and_its_number_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n{"a": "\xff"}\n')
    reading = read_rows(path)
    assert next(reading) == (1, {"a": 1})
    with pytest.raises(InvalidRequest, match="a.jsonl is not UTF-8 text: line 2"):
        next(reading)


@pytest.mark.parametrize("keep", [0, 3, 100, -8])
def test_a_parquet_file_that_is_not_whole_is_refused_by_name(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"a": index} for index in range(1_000)]), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InvalidRequest, match=r"a.parquet: row 1 can't be read as Parquet"):
        rows(path)


def test_a_parquet_file_with_a_broken_page_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"a": f"text {index}"} for index in range(1_000)]),
        path,
        compression="zstd",
    )
    data = bytearray(path.read_bytes())
    data[40:400] = bytes(360)
    path.write_bytes(data)
    with pytest.raises(InvalidRequest, match=r"a.parquet: row \d+ can't be read as Parquet"):
        rows(path)
