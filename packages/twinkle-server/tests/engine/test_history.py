"""What has to be computed again, and in which calls."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from twinkle.protocol import messages as m
from twinkle.server.engine.history import History
from twinkle.server.scheduling.jobs import Job


def job(run_id: str, seq_id: int) -> Job:
    return Job(f"{run_id}{seq_id}", "t", run_id, seq_id, m.OptimStepRequest(model_id=run_id, seq_id=seq_id))


def names(calls: list[list[Job]]) -> list[list[str]]:
    return [[job.request_id for job in call] for call in calls]


def test_calls_come_in_their_order_with_the_jobs_in_theirs_once():
    history = History()
    history.add([job("b", 1), job("a", 1), job("b", 2)])
    history.add([job("a", 2)])
    assert names(history.take_all()) == [["b1", "a1", "b2"], ["a2"]]
    assert history.take_all() == []


def test_what_a_copy_has_and_runs_that_ended_are_left_out():
    history = History()
    history.add([job("a", 1), job("b", 1)])
    history.add([job("b", 2), job("a", 3), job("c", 1)])
    history.covered("a", 2)
    history.covered("b", 0)
    history.forget("c")
    assert names(history.take_all()) == [["b1"], ["b2", "a3"]]


@given(
    st.lists(
        st.lists(st.sampled_from("abc"), min_size=1, max_size=4),
        max_size=8,
    ),
    st.dictionaries(st.sampled_from("abc"), st.integers(0, 12)),
)
def test_the_rest_is_what_was_added_less_what_is_covered(calls: list[list[str]], copies: dict[str, int]):
    history, last, added = History(), dict.fromkeys("abc", 0), []
    for call in calls:
        jobs = []
        for run_id in call:
            last[run_id] += 1
            jobs.append(job(run_id, last[run_id]))
        history.add(jobs)
        added.append(jobs)
    for run_id, seq_id in copies.items():
        history.covered(run_id, seq_id)
    left = [[job for job in call if job.seq_id > copies.get(job.run_id, 0)] for call in added]
    assert history.take_all() == [call for call in left if call]
