"""Reading back what a run wrote, whole or not."""

from pathlib import Path

import pytest

from twinkle.protocol.errors import InvalidRequest, NotFound
from twinkle.runs import read_metrics
from twinkle.runs.records import keep_metrics_through, read_state


def test_a_torn_last_line_is_left_out(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]
    keep_metrics_through(tmp_path, 5)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 2.0}\n'


def test_later_steps_are_forgotten(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {n}}}\n' for n in range(5)))
    keep_metrics_through(tmp_path, 2)
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 2]


def test_a_broken_line_is_named(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(InvalidRequest, match=r"metrics.jsonl:2: not JSON"):
        read_metrics(path)
    path.write_text('{"loss": 1}\n')
    with pytest.raises(
        InvalidRequest, match=r"metrics.jsonl:1: expected an object with a whole number `step`"
    ):
        read_metrics(tmp_path)


def test_no_metrics_and_no_state_are_said(tmp_path: Path):
    with pytest.raises(NotFound, match="give the folder of a run"):
        read_metrics(tmp_path)
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(InvalidRequest, match="not the state of a run"):
        read_state(tmp_path)
