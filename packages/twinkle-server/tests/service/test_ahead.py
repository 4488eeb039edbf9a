"""Ticks that are sent while the one before is computed: answers and runs are as if they had not been."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fake_service import Tenant
from mortal_worker import MortalWorker, make_mortal_service
from trained_states import a_pass, a_step, check_state

from twinkle.protocol import messages as m
from twinkle.server.engine import calls
from twinkle.server.scheduling.runs import Run
from twinkle.server.service.service import Service


@dataclass
class Held:
    """A service whose passes wait for `gate`.

    Attributes:
        began: how many passes have begun.
        failing: the run whose passes fail.
    """

    service: Service
    worker: MortalWorker
    gate: threading.Event
    began: int = 0
    failing: str = ""

    def hold(self) -> None:
        self.gate.clear()
        plain = self.worker._backend.forward_backward

        def forward_backward(micro_batches: Any) -> Any:
            self.began += 1
            self.gate.wait(30)
            if self.failing in {row.adapter_id for rows in micro_batches for row in rows}:
                raise MemoryError("too much")
            return plain(micro_batches)

        self.worker._backend.forward_backward = forward_backward  # pyright: ignore[reportAttributeAccessIssue]

    async def until(self, sent: int) -> None:
        """Until so many passes have been sent to the worker since `hold`."""
        async with asyncio.timeout(20):
            while len(self.sent) < sent:
                await asyncio.sleep(0.005)

    def run(self, run_id: str) -> Run:
        run = self.service.parts.live.get(run_id)
        assert run is not None
        return run

    @property
    def sent(self) -> list[set[str]]:
        """The runs of each training pass."""
        return [
            {row.adapter_id for rows in args[0] for row in rows} - {"warm-up"}
            for name, args in self.worker.calls
            if name == "forward_backward"
        ]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "DISPATCH_AT", 0.0)


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    gate = threading.Event()
    gate.set()
    yield gate
    gate.set()


@pytest.fixture
async def held(tmp_path: Path, gate: threading.Event) -> AsyncIterator[Held]:
    worker = MortalWorker()
    service = make_mortal_service(tmp_path, worker, snapshot_seconds=3600.0)
    await service.start()
    yield Held(service, worker, gate)
    gate.set()
    await service.close()


async def a_trained_run(held: Held, name: str) -> tuple[Tenant, str]:
    tenant = Tenant(held.service, name)
    run = await tenant.run()
    await finish([(tenant, await submit_step(tenant, run, 1))])
    return tenant, run


async def submit_step(tenant: Tenant, run: str, first_seq_id: int) -> list[m.Promise]:
    requests = (a_pass(run, first_seq_id), a_step(run, first_seq_id + 1))
    return [await tenant.service.submit(tenant.name, request) for request in requests]


async def finish(submitted: list[tuple[Tenant, list[m.Promise]]]) -> None:
    for tenant, promises in submitted:
        for promise in promises:
            assert not isinstance(await tenant.outcome(promise), (m.Failure, m.TryAgain))


async def until_taken(tenant: Tenant, promise: m.Promise) -> None:
    """Until the tick with that request has been taken, and what is sent of it at once is on its way."""
    async with asyncio.timeout(20):
        while True:
            waiting = await tenant.service.retrieve(tenant.name, promise.request_id, 0)
            assert isinstance(waiting, m.TryAgain) and waiting.queue_state_reason is not None
            if waiting.queue_state_reason.startswith("it is being computed"):
                break
            await asyncio.sleep(0.005)
    await a_few_turns()


async def a_few_turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def both_under_way(held: Held) -> tuple[list[tuple[Tenant, list[m.Promise]]], list[str]]:
    """A step of one run that is held, and one of another that was sent behind it."""
    (alice, first), (bob, second) = [await a_trained_run(held, name) for name in ("alice", "bob")]
    held.worker.calls.clear()
    held.hold()
    submitted = [(alice, await submit_step(alice, first, 3))]
    await held.until(sent=1)
    submitted.append((bob, await submit_step(bob, second, 3)))
    await held.until(sent=2)
    assert held.sent == [{first}, {second}] and held.began == 1
    return submitted, [first, second]


async def test_the_next_tick_is_sent_while_this_one_is_computed(held: Held):
    submitted, runs = await both_under_way(held)
    held.gate.set()
    await finish(submitted)
    for run in runs:
        await check_state(held.worker, run, 2)


async def test_a_tick_with_a_run_of_this_one_waits(held: Held):
    alice, run = await a_trained_run(held, "alice")
    held.worker.calls.clear()
    held.hold()
    submitted = [(alice, await submit_step(alice, run, seq_id)) for seq_id in (3, 5)]
    await held.until(sent=1)
    await until_taken(alice, submitted[1][1][0])
    assert len(held.sent) == 1
    held.gate.set()
    await finish(submitted)
    await check_state(held.worker, run, 3)


async def test_what_was_sent_ahead_is_not_lost_with_the_process(held: Held):
    submitted, runs = await both_under_way(held)
    held.worker.die()
    held.gate.set()
    await finish(submitted)
    assert held.worker.restarts == 1
    for run in runs:
        await check_state(held.worker, run, 2)


async def test_this_tick_may_fail_while_the_next_one_is_under_way(held: Held):
    [(alice, mine), (bob, theirs)], runs = await both_under_way(held)
    held.failing = runs[0]
    held.gate.set()
    outcomes = [await alice.outcome(promise) for promise in mine]
    assert [isinstance(outcome, m.Failure) for outcome in outcomes] == [True, False]
    assert outcomes[1].metrics["grad_norm:mean"] == 0
    await finish([(bob, theirs)])
    await check_state(held.worker, runs[1], 2)


async def test_no_copy_is_taken_of_a_run_that_is_ahead_of_what_is_known_of_it(held: Held):
    submitted, runs = await both_under_way(held)
    for run in runs:
        held.service.parts.snapshots.hurry(held.run(run))
    held.gate.set()
    await finish(submitted)
    before = held.worker.restarts
    held.worker.die()
    async with asyncio.timeout(20):
        while held.worker.restarts == before:
            await asyncio.sleep(0.005)
    await finish(
        [
            (tenant, await submit_step(tenant, run, 5))
            for (tenant, _), run in zip(submitted, runs, strict=True)
        ]
    )
    for run in runs:
        await check_state(held.worker, run, 3)


async def test_a_service_that_is_to_end_sends_nothing_ahead(held: Held):
    (alice, first), (bob, second) = [await a_trained_run(held, name) for name in ("alice", "bob")]
    held.worker.calls.clear()
    held.hold()
    submitted = [(alice, await submit_step(alice, first, 3))]
    await held.until(sent=1)
    stopping = asyncio.create_task(held.service.parts.engine.until_idle())
    await asyncio.sleep(0)
    submitted.append((bob, await submit_step(bob, second, 3)))
    # The engine waits for this too, and decides when it returns.
    await held.service.parts.scheduler.until_complete({held.run(first)})
    await a_few_turns()
    assert len(held.sent) == 1
    held.gate.set()
    await finish(submitted)
    await stopping
