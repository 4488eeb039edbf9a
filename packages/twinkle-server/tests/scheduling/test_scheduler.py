"""The scheduler's promises, on data alone: no clock, no backend."""

import asyncio
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st
from scheduled_jobs import a_pass, a_run, a_step

from twinkle.server.scheduling.scheduler import Scheduler, Tick


def ids(tick: Tick) -> list[str]:
    return [job.request_id for job in tick.jobs]


def test_one_tick_fuses_the_passes_of_all_tenants_and_then_steps_them():
    scheduler = Scheduler(1000)
    for run in (a_run("a", "t1"), a_run("b", "t2")):
        scheduler.submit(a_pass(run, 0, 100))
        scheduler.submit(a_pass(run, 1, 100))
        scheduler.submit(a_step(run, 2))
    tick = scheduler.take_tick()
    assert sorted(job.request_id for job in tick.passes) == ["a-0", "a-1", "b-0", "b-1"]
    assert sorted(job.request_id for job in tick.optim_steps) == ["a-2", "b-2"]


async def test_a_tick_waits_for_half_of_the_runs_that_have_been_coming():
    runs = a, b, _, _ = [a_run(name) for name in "abcd"]
    scheduler = Scheduler(1000)
    for run in runs:
        scheduler.submit(a_pass(run, 0, 10))
    assert len((await scheduler.next_tick()).passes) == 4
    scheduler.set_batching_window(60.0, enough_tokens=1000)
    scheduler.submit(a_pass(a, 1, 10))
    tick = asyncio.create_task(scheduler.next_tick())
    await asyncio.sleep(0.02)
    assert not tick.done()
    scheduler.submit(a_pass(b, 1, 10))
    assert ids(await asyncio.wait_for(tick, 10)) == ["a-1", "b-1"]


async def test_a_tick_does_not_wait_in_vain_for_long_nor_with_enough_to_do_nor_for_runs_that_stay_away():
    a, b, c = [a_run(name) for name in "abc"]
    scheduler = Scheduler(1000)
    for run in (a, b, c):
        scheduler.submit(a_pass(run, 0, 10))
    scheduler.take_tick()
    scheduler.set_batching_window(0.01, enough_tokens=500)
    scheduler.submit(a_pass(a, 1, 10))
    assert ids(await asyncio.wait_for(scheduler.next_tick(), 10)) == ["a-1"]
    scheduler.set_batching_window(3600.0, enough_tokens=500)
    scheduler.submit(a_pass(a, 2, 500))
    assert ids(await asyncio.wait_for(scheduler.next_tick(), 10)) == ["a-2"]
    scheduler.set_batching_window(0.0, enough_tokens=500)
    for seq_id in range(3, 19):
        scheduler.submit(a_pass(a, seq_id, 10))
        await scheduler.next_tick()
    scheduler.set_batching_window(3600.0, enough_tokens=500)
    scheduler.submit(a_pass(a, 19, 10))
    assert ids(await asyncio.wait_for(scheduler.next_tick(), 10)) == ["a-19"]


async def test_the_next_tick_is_complete_when_all_others_are_there_or_it_is_full():
    runs = a, b, c, d = [a_run(name) for name in "abcd"]
    scheduler = Scheduler(100)
    for run in runs:
        scheduler.submit(a_pass(run, 0, 10))
    scheduler.take_tick()

    async def is_complete() -> bool:
        complete = asyncio.create_task(scheduler.until_complete({a, b}))
        await asyncio.sleep(0.02)
        done = complete.done()
        complete.cancel()
        return done

    assert not await is_complete()
    scheduler.submit(a_pass(c, 1, 10))
    assert not await is_complete(), "d may come"
    scheduler.submit(a_pass(d, 1, 10))
    assert await is_complete()
    assert len(scheduler.take_tick().passes) == 2
    scheduler.submit(a_pass(c, 2, 99))
    assert not await is_complete()
    scheduler.submit(a_pass(c, 3, 1))
    assert await is_complete(), "there is no room for d"


async def test_what_was_queued_by_a_run_that_is_gone_counts_no_more():
    runs = a, b, _, _ = [a_run(name) for name in "abcd"]
    gone = a_run("gone")
    scheduler = Scheduler(1000)
    for run in runs:
        scheduler.submit(a_pass(run, 0, 10))
    scheduler.take_tick()
    scheduler.submit(a_pass(gone, 0, 1000))
    scheduler.remove(gone)
    scheduler.set_batching_window(3600.0, enough_tokens=500)
    scheduler.submit(a_pass(a, 1, 10))
    tick = asyncio.create_task(scheduler.next_tick())
    await asyncio.sleep(0.02)
    assert not tick.done()
    scheduler.submit(a_pass(b, 1, 10))
    assert len((await asyncio.wait_for(tick, 10)).passes) == 2


def test_what_waited_behind_a_gap_that_is_closed_is_taken():
    scheduler, a = Scheduler(1000), a_run("a")
    scheduler.submit(a_pass(a, 2, 10))
    assert not scheduler.ready_tenants
    assert scheduler.close_gaps(a) == [0, 1]
    assert ids(scheduler.take_tick()) == ["a-2"]


def test_an_optimizer_step_is_a_barrier_within_its_run():
    scheduler, a = Scheduler(1000), a_run("a")
    for job in (a_pass(a, 0, 10), a_step(a, 1), a_pass(a, 2, 10), a_step(a, 3)):
        scheduler.submit(job)
    assert ids(scheduler.take_tick()) == ["a-0", "a-1"]
    assert ids(scheduler.take_tick()) == ["a-2", "a-3"]
    assert ids(scheduler.take_tick()) == []


def test_a_flood_of_large_jobs_does_not_hold_up_a_small_one():
    scheduler, flood, small = Scheduler(1000), a_run("flood", "greedy"), a_run("small", "modest")
    for seq_id in range(100):
        scheduler.submit(a_pass(flood, seq_id, 900))
    scheduler.take_tick()
    scheduler.submit(a_pass(small, 0, 50))
    assert "small-0" in ids(scheduler.take_tick()) + ids(scheduler.take_tick())


def test_tenants_get_equal_tokens_however_many_runs_they_have_and_however_large_their_jobs_are():
    scheduler, y = Scheduler(1000), a_run("y", "one")
    runs = [a_run(f"x{number}", "many") for number in range(4)]
    for seq_id in range(400):
        for run in runs:
            scheduler.submit(a_pass(run, seq_id, 300))
        scheduler.submit(a_pass(y, seq_id, 70))
    got: Counter[str] = Counter()
    for _ in range(40):
        for job in scheduler.take_tick().passes:
            got[job.run.tenant] += job.tokens
    assert abs(got["many"] - got["one"]) <= 0.1 * got["one"]


def test_a_job_larger_than_a_tick_is_taken_alone():
    scheduler, big = Scheduler(100), a_run("big")
    scheduler.submit(a_pass(big, 0, 5000))
    scheduler.submit(a_pass(big, 1, 10))
    assert ids(scheduler.take_tick()) == ["big-0"]
    assert ids(scheduler.take_tick()) == ["big-1"]


def test_idle_runs_are_not_looked_at():
    scheduler = Scheduler(1000)
    for number in range(1000):
        scheduler.submit(a_step(a_run(f"idle-{number}", f"t{number}"), 1))  # 0 has not arrived
    scheduler.submit(a_step(a_run("a"), 0))
    assert list(scheduler.ready_tenants) == ["t"]
    scheduler.take_tick()
    assert not scheduler.ready_tenants


async def test_waiting_for_a_tick_ends_with_the_first_job():
    scheduler, a = Scheduler(1000), a_run("a")
    waiting = asyncio.create_task(scheduler.next_tick())
    await asyncio.sleep(0)
    assert not waiting.done()
    scheduler.submit(a_step(a, 0))
    assert ids(await waiting) == ["a-0"]


def test_a_removed_run_gives_back_what_it_had_queued():
    scheduler, a, b = Scheduler(1000), a_run("a"), a_run("b")
    scheduler.submit(a_step(a, 0))
    scheduler.submit(a_step(a, 5))
    scheduler.submit(a_step(b, 0))
    assert [job.seq_id for job in scheduler.remove(a)] == [0, 5]
    assert ids(scheduler.take_tick()) == ["b-0"]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b", "c", "d"]), st.sampled_from(["pass", "step"]), st.integers(0, 3000)
        ),
        max_size=60,
    ),
    st.randoms(use_true_random=False),
)
def test_everything_runs_once_and_in_order_within_its_run(script, random):
    runs = {
        name: a_run(name, tenant) for name, tenant in {"a": "t1", "b": "t1", "c": "t2", "d": "t3"}.items()
    }
    scheduler = Scheduler(1000)
    jobs, counts = [], Counter()
    for run, kind, tokens in script:
        is_pass = kind == "pass"
        jobs.append(a_pass(runs[run], counts[run], tokens) if is_pass else a_step(runs[run], counts[run]))
        counts[run] += 1
    random.shuffle(jobs)
    for job in jobs:
        scheduler.submit(job)
    done: dict[str, list[int]] = {run: [] for run in runs}
    while tick := scheduler.take_tick().jobs:
        for job in tick:
            done[job.run.run_id].append(job.seq_id)
    assert done == {run: list(range(counts[run])) for run in runs}
