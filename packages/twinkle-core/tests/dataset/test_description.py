"""The numbers of an encoded dataset, against what is counted by hand."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from twinkle.dataset import Dataset, Description
from twinkle.protocol.errors import InvalidRequest
from twinkle.template import Template


def feature(length: int, trained: int, **rest: Any) -> dict[str, Any]:
    """`length` tokens, the last `trained` of them marked."""
    ids = np.arange(length)
    return {"input_ids": ids, "labels": np.where(ids >= length - trained, ids, -100), **rest}


def described(*rows: dict[str, Any]) -> Description:
    return Dataset.from_rows(rows).describe()


def test_lengths_and_shares_are_those_counted_by_hand() -> None:
    description = described(feature(2, 1), feature(4, 0), feature(4, 4), feature(10, 5))
    assert (description.rows, description.sequences, description.tokens) == (4, 4, 20)
    assert (description.min_length, description.max_length) == (2, 10)
    assert (description.mean_length, description.median_length) == (5, 4)
    # Between the third (4) and the fourth (10) of four: position 0.95 * 3 = 2.85.
    assert description.p95_length == pytest.approx(4 + 0.85 * 6)
    # Nothing predicts a first token: of the row that is marked as a whole, three count.
    assert description.trained == (1 + 0 + 3 + 5) / 20
    assert description.untrained_rows == 1
    assert description.truncated == 0
    # Bars of one number each, from 2 to 10.
    assert description.edges == tuple(range(2, 12))
    assert description.counts == (1, 0, 2, 0, 0, 0, 0, 0, 1)


def test_bars_are_of_one_width_and_count_every_sequence_once() -> None:
    lengths = [1, 5, 6, 30, 31, 100]
    description = described(*(feature(length, 1) for length in lengths))
    widths = set(np.diff(description.edges))
    assert widths == {9} and len(description.counts) == 12
    for low, high, count in zip(description.edges, description.edges[1:], description.counts, strict=False):
        assert count == sum(low <= length < high for length in lengths)
    assert sum(description.counts) == len(lengths)


def test_tokens_of_weight_zero_are_not_trained_on() -> None:
    weights = np.array([1, 1, 0, 0.5], np.float32)
    assert described(feature(4, 4, loss_weights=weights)).trained == 2 / 4


def test_a_pair_counts_as_one_row_and_two_sequences() -> None:
    description = described({"chosen": feature(4, 2), "rejected": feature(6, 0)})
    assert (description.rows, description.sequences, description.tokens) == (1, 2, 10)
    assert description.trained == 2 / 10 and description.untrained_rows == 1


@pytest.mark.parametrize("strategy", ["left", "right", "delete"])
def test_only_rows_that_lose_tokens_count_as_truncated(model: Path, strategy: Any) -> None:
    rows = [{"prompt": "q", "response": "a" * n} for n in range(1, 11)]
    whole = Dataset.from_rows(rows).set_template(Template(model)).encode()
    lengths = [len(row["input_ids"]) for row in whole]
    assert whole.describe().truncated == 0
    # One row fits exactly, three are longer.
    template = Template(model, max_length=lengths[6], truncation_strategy=strategy)
    description = Dataset.from_rows(rows).set_template(template).encode().describe()
    assert (description.cut_rows, description.left_out_rows) == ((0, 3) if strategy == "delete" else (3, 0))
    assert description.truncated == 3 / 10
    assert description.max_length == lengths[6]


def test_the_table_is_as_written() -> None:
    rows = [feature(1, 0), *[feature(2, 1)] * 4, feature(1200, 600)]
    assert str(described(*rows)) == (
        "rows            6\n"
        "tokens          1,209\n"
        "trained on      50.0% of tokens; nothing in 1 rows\n"
        "over the limit  0.0% of rows: 0 cut, 0 left out\n"
        "length          min 1, mean 201.5, median 2.0, p95 900.5, max 1,200\n"
        "    1 -   100  5  ########################################\n"
        "  101 -   200  0\n"
        "  201 -   300  0\n"
        "  301 -   400  0\n"
        "  401 -   500  0\n"
        "  501 -   600  0\n"
        "  601 -   700  0\n"
        "  701 -   800  0\n"
        "  801 -   900  0\n"
        "  901 - 1,000  0\n"
        "1,001 - 1,100  0\n"
        "1,101 - 1,200  1  ########"
    )


def test_bars_of_a_single_length_are_written_as_one_number() -> None:
    lines = str(described(feature(9, 1), feature(9, 1), feature(11, 1))).splitlines()
    assert lines[-3:] == [
        " 9  2  ########################################",
        "10  0",
        "11  1  ####################",
    ]


def test_the_table_says_what_the_sequences_of_pairs_are() -> None:
    pair = {"chosen": feature(4, 2), "rejected": feature(6, 1)}
    assert str(described(pair, pair)).splitlines()[0] == (
        "rows            2 (4 sequences: chosen and rejected)"
    )
    assert str(described(pair, feature(4, 2))).splitlines()[0] == (
        "rows            2 (3 sequences; a pair has two)"
    )


def test_a_row_that_is_not_encoded_is_named() -> None:
    with pytest.raises(InvalidRequest, match="mine:2: describe: the row is not encoded"):
        Dataset.from_rows([feature(1, 1), {"query": "q"}], "mine").describe()
    with pytest.raises(InvalidRequest, match="describe: the dataset is empty"):
        Dataset().describe()


def test_rows_that_were_encoded_elsewhere_may_hold_lists() -> None:
    assert described({"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}).trained == 2 / 3
    with pytest.raises(InvalidRequest, match="mine:1: labels: nothing there"):
        Dataset.from_rows([{"input_ids": [1]}], "mine").describe()
    with pytest.raises(InvalidRequest, match="mine:1: labels: 1 entries for 2 input_ids"):
        Dataset.from_rows([{"input_ids": [1, 2], "labels": [1]}], "mine").describe()


def test_the_picture_is_a_png_drawn_without_a_screen_and_without_pyplot(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np; from twinkle.dataset import Dataset; ids = np.arange(9); "
        "Dataset.from_rows([{'input_ids': ids, 'labels': ids}]).describe().plot(sys.argv[1]); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    path = tmp_path / "lengths.picture"
    subprocess.run(
        [sys.executable, "-c", code, str(path)], check=True, timeout=120, env={"HOME": str(tmp_path)}
    )
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_picture_that_cannot_be_drawn_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    description = described(feature(3, 2))
    with pytest.raises(InvalidRequest, match="plot: .*none/a.png can't be written"):
        description.plot(tmp_path / "none" / "a.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InvalidRequest, match=r"pip install 'twinkle-core\[plot\]'"):
        description.plot(tmp_path / "a.png")
