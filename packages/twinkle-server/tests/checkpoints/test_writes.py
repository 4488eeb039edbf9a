"""Who waits for what is being written: those whom it concerns, and nobody else."""

from __future__ import annotations

import asyncio

from twinkle.protocol.uris import CheckpointUri
from twinkle.server.backends.protocol import AdapterSpec
from twinkle.server.checkpoints.writes import Writes
from twinkle.server.scheduling.runs import Run

MINE, OTHER = CheckpointUri("name", "a:train:0", "weights"), CheckpointUri("name", "b:train:0", "weights")


async def is_done(task: asyncio.Task[object], turns: int = 20) -> bool:
    for _ in range(turns):
        await asyncio.sleep(0)
    return task.done()


def a_run(run_id: str, tenant: str) -> Run:
    return Run(run_id, tenant, "session", "fake/model", AdapterSpec(rank=1))


async def test_each_waits_for_its_own_alone():
    writes, held, order = Writes(), asyncio.Event(), []

    async def write(what: str) -> None:
        order.append(f"begin {what}")
        await held.wait()
        order.append(f"end {what}")

    theirs = writes.begin(OTHER, "bob", write("theirs"))
    our_run, their_run = a_run("a:train:0", "alice"), a_run("b:train:0", "bob")
    their_run.add_write(theirs)
    not_concerned = [
        asyncio.create_task(work)
        for work in (
            our_run.settled(),
            writes.of(MINE, "alice"),
            writes.of(CheckpointUri("name"), "alice"),
            writes.of(OTHER, "alice"),
        )
    ]
    concerned = [
        asyncio.create_task(work)
        for work in (
            their_run.settled(),
            writes.of(OTHER, "bob"),
            writes.of(CheckpointUri("name"), "bob"),
            writes.of_exactly(OTHER),
            writes.all(),
        )
    ]
    assert [await is_done(task) for task in not_concerned] == [True] * 4
    assert [await is_done(task) for task in concerned] == [False] * 5
    again = writes.begin(OTHER, "bob", write("theirs again"))
    assert not await is_done(again) and order == ["begin theirs"]
    held.set()
    await asyncio.gather(theirs, again, *concerned)
    assert order == ["begin theirs", "end theirs", "begin theirs again", "end theirs again"]
    assert not await writes.of_exactly(OTHER)


async def test_a_run_that_writes_without_pause_is_waited_for_once():
    writes, steps = Writes(), [asyncio.Event() for _ in range(2)]
    run = a_run("a:train:0", "alice")
    run.add_write(writes.begin(MINE, "alice", steps[0].wait()))  # pyright: ignore[reportArgumentType]
    waiting = asyncio.create_task(run.settled())
    await asyncio.sleep(0)
    later = writes.begin(MINE, "alice", steps[1].wait())  # pyright: ignore[reportArgumentType]
    run.add_write(later)
    steps[0].set()
    assert await is_done(waiting)
    assert not later.done()
    steps[1].set()
    await later


async def test_one_that_fails_holds_nobody_up():
    writes = Writes()

    async def fails() -> None:
        raise OSError("no space left")

    first = writes.begin(MINE, "alice", fails())
    run = a_run("a:train:0", "alice")
    run.add_write(first)
    await run.settled()
    assert not run.writes
    assert isinstance(first.exception(), OSError)
    second = writes.begin(MINE, "alice", asyncio.sleep(0))
    await second
    await writes.all()
