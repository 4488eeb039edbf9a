"""One poll for many samples."""

import asyncio

from twinkle.protocol.messages import Completion
from twinkle.server.engine.completions import MAX_KEPT, CompletionLog

ME, OTHER = ("session:sample:0", 0), ("session:sample:0", 1)


def ended(name: str) -> Completion:
    return Completion(state="finished", request_id=name)


async def test_what_ended_is_told_once_it_was_acknowledged():
    log = CompletionLog()
    for name in "abc":
        log.add(ME, ended(name))
    first = await log.after(ME, 0, timeout=0)
    assert [c.request_id for c in first.completions] == ["a", "b", "c"]
    lost = await log.after(ME, 0, timeout=0)  # the reply never arrived
    assert lost == first
    log.add(ME, ended("d"))
    second = await log.after(ME, first.cursor, timeout=0)
    assert [c.request_id for c in second.completions] == ["d"]
    assert (await log.after(ME, second.cursor, timeout=0)).completions == []


async def test_a_poll_waits_for_its_own_clients_samples():
    log = CompletionLog()
    waiting = asyncio.create_task(log.after(ME, 0, timeout=5))
    await asyncio.sleep(0)
    log.add(OTHER, ended("of another"))
    await asyncio.sleep(0)
    assert not waiting.done()
    log.add(ME, ended("mine"))
    assert [c.request_id for c in (await waiting).completions] == ["mine"]


async def test_a_poll_without_news_keeps_its_cursor():
    log = CompletionLog()
    log.add(ME, ended("a"))
    seen = (await log.after(ME, 0, timeout=0)).cursor
    assert (await log.after(ME, seen, timeout=0.01)).cursor == seen


async def test_a_cursor_of_an_earlier_server_begins_anew():
    log = CompletionLog()
    log.add(ME, ended("a"))
    assert [c.request_id for c in (await log.after(ME, 500, timeout=0)).completions] == ["a"]


async def test_a_client_that_never_asks_fills_no_memory():
    log = CompletionLog()
    for i in range(MAX_KEPT + 10):
        log.add(ME, ended(str(i)))
    assert len((await log.after(ME, 0, timeout=0)).completions) == MAX_KEPT
    log.forget(ME[0])
    assert (await log.after(ME, 0, timeout=0)).completions == []
