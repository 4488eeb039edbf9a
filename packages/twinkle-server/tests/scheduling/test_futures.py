import asyncio
from collections.abc import Sequence

import numpy as np
import pytest
from made_futures import create

from twinkle.protocol import messages as m
from twinkle.protocol.codec import encode_result
from twinkle.protocol.errors import NotFound
from twinkle.protocol.types import ForwardBackwardOutput, TensorData
from twinkle.server.backends.protocol import AdapterSpec
from twinkle.server.scheduling.futures import FutureTable, memory_of
from twinkle.server.scheduling.records import Outcome, RunLog
from twinkle.server.scheduling.runs import Run

RESULT = m.OptimStepResponse(metrics={"grad_norm:mean": 1.0})


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_a_result_wakes_its_waiter():
    futures = FutureTable(Clock(), RunLog())
    request_id = create(futures, "t")
    waiting = asyncio.create_task(futures.wait("t", request_id, timeout=60))
    await asyncio.sleep(0)
    futures.complete(request_id, m.UnloadModelResponse(model_id="x"))
    assert await waiting == m.UnloadModelResponse(model_id="x")


async def test_no_result_in_time_is_none_and_the_future_goes_on():
    futures = FutureTable(Clock(), RunLog())
    request_id = create(futures, "t")
    assert await futures.wait("t", request_id, timeout=0.01) is None
    futures.complete(request_id, m.Failure(error="no", category="user"))
    assert await futures.wait("t", request_id, timeout=0) == m.Failure(error="no", category="user")


async def test_another_tenants_future_does_not_exist():
    futures = FutureTable(Clock(), RunLog())
    request_id = create(futures, "t")
    with pytest.raises(NotFound):
        await futures.wait("other", request_id, timeout=0)


async def test_a_fetched_result_stays_a_while_and_an_unfetched_one_longer():
    clock = Clock()
    futures = FutureTable(clock, RunLog(), keep_seconds=10, unfetched_seconds=100)
    fetched, unfetched = create(futures, "t"), create(futures, "t")
    for request_id in (fetched, unfetched):
        futures.complete(request_id, m.UnloadModelResponse(model_id="x"))
    await futures.wait("t", fetched, 0)

    clock.now = 9
    await futures.wait("t", fetched, 0)  # a lost reply is asked for again, which keeps it
    clock.now = 25
    futures.complete(create(futures, "t"), m.UnloadModelResponse(model_id="y"))
    with pytest.raises(NotFound):
        await futures.wait("t", fetched, 0)
    assert await futures.wait("t", unfetched, 0) is not None


async def test_the_table_stays_small_when_results_are_fetched():
    clock = Clock()
    futures = FutureTable(clock, RunLog(), keep_seconds=10)
    for _ in range(1000):
        clock.now += 1
        request_id = create(futures, "t")
        futures.complete(request_id, m.UnloadModelResponse(model_id="x"))
        await futures.wait("t", request_id, 0)
    assert len(futures) <= 12


class KeptLog(RunLog):
    """A log that keeps in memory what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[list[tuple[str, Outcome]]] = []

    def done(self, outcomes: Sequence[tuple[str, Outcome]]) -> None:
        self.kept.append(list(outcomes))


async def test_outcomes_are_logged_before_anybody_has_them_those_of_a_call_together():
    class Watched(KeptLog):
        def done(self, outcomes: Sequence[tuple[str, Outcome]]) -> None:
            assert all(table.is_pending(request_id) for request_id, _ in outcomes)
            super().done(outcomes)

    log = Watched()
    table = FutureTable(lambda: 0.0, log)
    first, second = create(table, "t"), create(table, "t")
    table.complete_together([(first, RESULT), ("unknown", RESULT), (second, RESULT)])
    table.complete(first, m.Failure(error="too late", category="server"))
    assert log.kept == [[(first, RESULT), (second, RESULT)]]
    assert await table.wait("t", first, 0) == RESULT


async def test_what_is_completed_without_a_record_is_logged_when_it_is_recorded():
    log = KeptLog()
    table = FutureTable(lambda: 0.0, log)
    request_id = create(table, "t")
    table.complete(request_id, RESULT, record=False)
    assert await table.wait("t", request_id, 0) == RESULT
    assert log.kept == []
    table.record(request_id)
    assert log.kept == [[(request_id, RESULT)]]


async def test_logging_goes_on_after_an_outcome_that_could_not_be_set():
    log = KeptLog()
    table = FutureTable(lambda: 0.0, log, encodes=True)
    first, second = create(table, "t"), create(table, "t")
    broken: m.Result = object()  # pyright: ignore[reportAssignmentType]
    with pytest.raises(AttributeError):
        table.complete(first, broken, record=False)
    table.complete(second, RESULT)
    assert [request_id for outcomes in log.kept for request_id, _ in outcomes] == [second]


async def test_what_an_earlier_process_knew_is_fetched_under_its_id_by_its_tenant():
    log = KeptLog()
    table = FutureTable(lambda: 0.0, log)
    run = Run("run", "t", "session", "fake/model", AdapterSpec(rank=1))
    request_id = create(table, run=run)
    assert table.is_pending(request_id)
    assert table.run_of(request_id) is run
    table.restore(request_id, RESULT)
    assert table.is_known(request_id) and not table.is_pending(request_id)
    assert await table.wait("t", request_id, 0) == RESULT
    with pytest.raises(NotFound):
        await table.wait("other", request_id, 0)
    assert log.kept == []


def a_result(tokens: int) -> ForwardBackwardOutput:
    return ForwardBackwardOutput([{"logprobs": TensorData(np.zeros(tokens, np.float32))}], {})


def test_a_result_takes_the_bytes_that_are_sent():
    empty, full = encode_result(a_result(0)), encode_result(a_result(100_000))
    assert memory_of(full) - memory_of(empty) == len(full.body) - len(empty.body) > 400_000


async def test_results_that_were_fetched_are_kept_within_a_number_of_bytes():
    futures = FutureTable(Clock(), RunLog(), keep_bytes=1_000_000, encodes=True)
    ids = [create(futures, "t") for _ in range(10)]
    for request_id in ids:
        futures.complete(request_id, a_result(50_000))  # 200 kB each
        assert await futures.wait("t", request_id, 0) is not None
    futures.complete(create(futures, "t"), RESULT)
    assert [futures.is_known(request_id) for request_id in ids] == [False] * 6 + [True] * 4
    assert futures.load_of("t").unfetched_bytes == memory_of(encode_result(RESULT))


async def test_results_that_nobody_comes_for_are_kept_within_a_number_of_bytes_of_all():
    futures = FutureTable(Clock(), RunLog(), unfetched_bytes=1_000_000, encodes=True)
    ids = [create(futures, f"t{number}") for number in range(10)]
    for request_id in ids:
        futures.complete(request_id, a_result(50_000))
    assert [futures.is_known(request_id) for request_id in ids] == [False] * 6 + [True] * 4
    assert futures.load.unfetched_bytes == sum(memory_of(encode_result(a_result(50_000))) for _ in range(4))
    for number, request_id in enumerate(ids[6:], start=6):
        assert await futures.wait(f"t{number}", request_id, 0) is not None
    assert futures.load.unfetched_bytes == 0 and not futures._loads
