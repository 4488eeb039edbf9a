"""In which order what was computed is computed again."""

from __future__ import annotations

from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from twinkle.protocol import messages as m
from twinkle.server.backends.protocol import AdapterSpec
from twinkle.server.engine.restore import in_order
from twinkle.server.scheduling.runs import Job, Run

RUNS = {name: Run(name, "t", "session", "fake/model", AdapterSpec(rank=1)) for name in "abc"}


def job(name: str) -> Job:
    run_id, seq_id = name[0], int(name[1:])
    return Job(name, RUNS[run_id], seq_id, m.OptimStepRequest(model_id=run_id, seq_id=seq_id))


def ordered(calls: list[list[str]], *runs: list[str]) -> list[list[str]]:
    again = {RUNS[names[0][0]]: deque(job(name) for name in names) for names in runs}
    return [[job.request_id for job in call] for call in in_order(calls, again)]


def test_calls_stay_together_and_in_order():
    assert ordered([["a1", "b1", "a2"], ["b2"]], ["a1", "a2"], ["b1", "b2"]) == [["a1", "b1", "a2"], ["b2"]]


def test_what_was_written_late_or_never_goes_alone_where_it_stood():
    assert ordered([["a1"], ["a3", "b1"], ["a2"]], ["a1", "a2", "a3"], ["b1"]) == [
        ["a1"],
        ["a2"],
        ["a3", "b1"],
    ]
    assert ordered([["a2"]], ["a1", "a2", "a3"]) == [["a1"], ["a2"], ["a3"]]


def test_what_a_copy_has_is_left_out():
    assert ordered([["a1", "b1"], ["a2", "b2"]], ["a2"], ["b1", "b2"]) == [["b1"], ["a2", "b2"]]


@given(st.lists(st.sampled_from("abc"), max_size=12), st.data())
def test_each_job_comes_once_and_each_run_in_order_however_outcomes_were_written(runs: list[str], data):
    names = [f"{run_id}{runs[:i].count(run_id)}" for i, run_id in enumerate(runs)]
    written = data.draw(st.permutations([name for name in names if data.draw(st.booleans())]))
    again = {RUNS[run_id]: deque(job(name) for name in names if name[0] == run_id) for run_id in set(runs)}
    found = [name for call in in_order([[name] for name in written], again) for name in call]
    assert sorted(job.request_id for job in found) == sorted(names)
    for run_id in set(runs):
        seq_ids = [job.seq_id for job in found if job.run.run_id == run_id]
        assert seq_ids == sorted(seq_ids)
