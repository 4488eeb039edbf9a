import asyncio
import threading

import pytest

from twinkle.protocol.errors import LimitReached
from twinkle.server.scheduling.threads import TenantThreads


async def test_each_tenant_has_its_own_and_what_nobody_waits_for_still_counts():
    threads = TenantThreads("tests", threads=3, per_tenant=2, most_waiting=4)
    may_end, begun = threading.Event(), threading.Semaphore(0)

    def work() -> str:
        begun.release()
        assert may_end.wait(20)
        return "done"

    waiting = [asyncio.create_task(threads.run("a", work)) for _ in range(4)]
    for _ in range(2):
        assert await asyncio.to_thread(begun.acquire, timeout=20)
    with pytest.raises(LimitReached, match="tests: 4 requests of this tenant"):
        await threads.run("a", work)
    assert await threads.run("b", lambda: "b's") == "b's"
    # One that has begun goes on though its request is gone, and one that has not is taken out.
    waiting[0].cancel()
    waiting[3].cancel()
    await asyncio.gather(waiting[0], waiting[3], return_exceptions=True)
    assert not begun.acquire(blocking=False)
    more = asyncio.create_task(threads.run("a", work))
    await asyncio.sleep(0)
    with pytest.raises(LimitReached):
        await threads.run("a", work)
    may_end.set()
    assert await asyncio.gather(waiting[1], waiting[2], more) == ["done"] * 3
    assert await threads.run("a", lambda: "again") == "again"
    while threads._tenants:  # until the one that nobody waits for has ended too
        await asyncio.sleep(0.001)
    # Beside the two that were seen to begin: the third, and the one after. The fourth never did.
    assert [begun.acquire(blocking=False) for _ in range(3)] == [True, True, False]
    threads.close()


async def test_what_fails_in_a_thread_fails_for_who_waits():
    threads = TenantThreads("tests", threads=1, per_tenant=1)

    def fails() -> None:
        raise ValueError("no")

    for _ in range(3):
        with pytest.raises(ValueError, match="no"):
            await threads.run("a", fails)
    threads.close()
