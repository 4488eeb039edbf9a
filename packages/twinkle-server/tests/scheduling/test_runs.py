import math
from dataclasses import replace

import pytest

from twinkle.protocol import messages as m
from twinkle.protocol.errors import Conflict, InvalidRequest
from twinkle.server.backends.protocol import AdapterSpec
from twinkle.server.scheduling.runs import MAX_AHEAD, Job, Received, Run, RunQueue

RUN = Run("run", "t", "session", "fake/model", AdapterSpec(rank=1))


def job(seq_id: int) -> Job:
    return Job(f"request-{seq_id}", RUN, seq_id, m.OptimStepRequest(model_id="run", seq_id=seq_id))


def drain(queue: RunQueue) -> list[int]:
    taken = []
    while queue.head is not None:
        jobs, _ = queue.take(room=math.inf)
        taken += [job.seq_id for job in jobs]
    return taken


def test_jobs_come_out_in_order_whatever_order_they_arrive_in():
    queue = RunQueue(first_seq_id=1)
    for seq_id in (2, 3):
        queue.offer(job(seq_id))
    assert queue.head is None
    queue.offer(job(1))
    assert drain(queue) == [1, 2, 3]


def test_a_rejected_id_is_consumed_wherever_it_stands():
    queue = RunQueue(first_seq_id=1)
    queue.reject(1)
    queue.offer(job(4))
    queue.offer(job(2))
    assert drain(queue) == [2]
    queue.reject(3)
    assert drain(queue) == [4]


def test_a_retry_finds_the_first_request_also_after_it_ran():
    queue = RunQueue(first_seq_id=1)
    queue.offer(job(1))
    step = Received(job(1).request)
    assert queue.duplicate_of(1, step) == "request-1"
    queue.take(room=math.inf)
    assert queue.duplicate_of(1, step) == "request-1"
    assert queue.duplicate_of(2, step) is None


def test_a_used_id_on_a_request_of_another_kind_is_no_retry():
    queue = RunQueue(first_seq_id=1)
    queue.offer(job(1))
    with pytest.raises(InvalidRequest, match="1 was used before .* OptimStepRequest; the next free one is 2"):
        queue.duplicate_of(1, Received(m.SaveWeightsRequest(model_id="run", seq_id=1, path="mine")))


def test_used_rejected_and_absurd_ids_are_refused():
    queue = RunQueue(first_seq_id=1)
    queue.reject(1)
    for seq_id in (0, 1):
        with pytest.raises(InvalidRequest, match="was used before"):
            queue.check(seq_id)
    with pytest.raises(InvalidRequest, match="waits for 2"):
        queue.check(2 + MAX_AHEAD)
    queue.check(2)


def test_closing_gaps_lets_what_waits_behind_them_through():
    queue = RunQueue(first_seq_id=1)
    queue.offer(job(3))
    queue.offer(job(6))
    queue.close_gaps()
    assert drain(queue) == [3, 6]
    assert queue.next_free == 7


def test_a_queue_says_what_a_request_waits_for():
    queue = RunQueue(first_seq_id=1)
    queue.offer(job(3))
    queue.offer(job(4))
    assert queue.why_waiting("request-4") == "it has seq_id 4, and seq_id 1 of this run has not arrived yet"
    queue.offer(job(1))
    queue.reject(2)
    assert queue.why_waiting("request-4") == "2 requests of this run go before it"
    queue.take(room=math.inf)
    assert queue.why_waiting("request-1") == "it is being computed"
    assert queue.why_waiting("request-3") == "0 requests of this run go before it"


def test_a_used_id_on_another_request_of_the_kind_is_no_retry():
    queue = RunQueue(first_seq_id=1)
    request = job(1).request
    queue.offer(replace(job(1), digest=b"of the first"))
    assert queue.duplicate_of(1, Received(request, digest=b"of the first")) == "request-1"
    with pytest.raises(Conflict, match="seq_id: 1 was used before .* OptimStepRequest .* free one is 2"):
        queue.duplicate_of(1, Received(request, digest=b"of another"))


def test_a_request_of_an_earlier_version_without_digest_is_taken_for_the_same():
    queue = RunQueue(first_seq_id=1)
    queue.remember(0, "of an earlier version", m.OptimStepRequest)
    assert (
        queue.duplicate_of(0, Received(job(0).request, digest=b"of a later one")) == "of an earlier version"
    )
