"""The scheduler's promises, on data alone: no clock, no backend."""

import asyncio
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from twinkle.protocol import messages as m
from twinkle.protocol.types import Datum, ModelInput
from twinkle.server.scheduling.jobs import Job, Tick
from twinkle.server.scheduling.scheduler import Scheduler


def a_pass(tenant: str, run: str, seq_id: int, tokens: int) -> Job:
    request = m.ForwardBackwardRequest(run, seq_id, [Datum(ModelInput.from_ints([0]))], "cross_entropy")
    return Job(f"{run}-{seq_id}", tenant, run, seq_id, request, tokens)


def a_step(tenant: str, run: str, seq_id: int) -> Job:
    return Job(f"{run}-{seq_id}", tenant, run, seq_id, m.OptimStepRequest(model_id=run, seq_id=seq_id))


def ids(tick: Tick) -> list[str]:
    return [job.request_id for job in tick.jobs]


def new_scheduler(*runs: str, tick_tokens: int = 1000) -> Scheduler:
    scheduler = Scheduler(tick_tokens)
    for run in runs:
        scheduler.add_run(run)
    return scheduler


def test_one_tick_fuses_the_passes_of_all_tenants_and_then_steps_them():
    scheduler = new_scheduler("a", "b")
    for tenant, run in (("t1", "a"), ("t2", "b")):
        scheduler.submit(a_pass(tenant, run, 0, 100))
        scheduler.submit(a_pass(tenant, run, 1, 100))
        scheduler.submit(a_step(tenant, run, 2))
    tick = scheduler.take_tick()
    assert sorted(job.request_id for job in tick.passes) == ["a-0", "a-1", "b-0", "b-1"]
    assert sorted(job.request_id for job in tick.optim_steps) == ["a-2", "b-2"]


async def test_a_tick_waits_for_half_of_the_runs_that_have_been_coming():
    runs = ["a", "b", "c", "d"]
    scheduler = new_scheduler(*runs)
    for run in runs:
        scheduler.submit(a_pass("t", run, 0, 10))
    assert len((await scheduler.next_tick()).passes) == 4
    scheduler.wait_for_company(60.0, enough_tokens=1000)
    scheduler.submit(a_pass("t", "a", 1, 10))
    tick = asyncio.create_task(scheduler.next_tick())
    await asyncio.sleep(0.02)
    assert not tick.done()
    scheduler.submit(a_pass("t", "b", 1, 10))
    assert ids(await asyncio.wait_for(tick, 10)) == ["a-1", "b-1"]


async def test_a_tick_does_not_wait_in_vain_for_long_nor_with_enough_to_do_nor_for_runs_that_stay_away():
    scheduler = new_scheduler("a", "b", "c")
    for run in ("a", "b", "c"):
        scheduler.submit(a_pass("t", run, 0, 10))
    scheduler.take_tick()
    scheduler.wait_for_company(0.01, enough_tokens=500)
    scheduler.submit(a_pass("t", "a", 1, 10))
    assert ids(await asyncio.wait_for(scheduler.next_tick(), 10)) == ["a-1"]
    scheduler.wait_for_company(3600.0, enough_tokens=500)
    scheduler.submit(a_pass("t", "a", 2, 500))
    assert ids(await asyncio.wait_for(scheduler.next_tick(), 10)) == ["a-2"]
    scheduler.wait_for_company(0.0, enough_tokens=500)
    for seq_id in range(3, 19):
        scheduler.submit(a_pass("t", "a", seq_id, 10))
        await scheduler.next_tick()
    scheduler.wait_for_company(3600.0, enough_tokens=500)
    scheduler.submit(a_pass("t", "a", 19, 10))
    assert ids(await asyncio.wait_for(scheduler.next_tick(), 10)) == ["a-19"]


async def test_the_next_tick_is_complete_when_all_others_are_there_or_it_is_full():
    runs = ["a", "b", "c", "d"]
    scheduler = new_scheduler(*runs, tick_tokens=100)
    for run in runs:
        scheduler.submit(a_pass("t", run, 0, 10))
    scheduler.take_tick()

    async def is_complete() -> bool:
        complete = asyncio.create_task(scheduler.complete_beside({"a", "b"}))
        await asyncio.sleep(0.02)
        done = complete.done()
        complete.cancel()
        return done

    assert not await is_complete()
    scheduler.submit(a_pass("t", "c", 1, 10))
    assert not await is_complete(), "d may come"
    scheduler.submit(a_pass("t", "d", 1, 10))
    assert await is_complete()
    assert len(scheduler.take_tick().passes) == 2
    scheduler.submit(a_pass("t", "c", 2, 99))
    assert not await is_complete()
    scheduler.submit(a_pass("t", "c", 3, 1))
    assert await is_complete(), "there is no room for d"


async def test_what_was_queued_by_a_run_that_is_gone_counts_no_more():
    scheduler = new_scheduler("a", "b", "c", "d", "gone")
    for run in ("a", "b", "c", "d"):
        scheduler.submit(a_pass("t", run, 0, 10))
    scheduler.take_tick()
    scheduler.submit(a_pass("t", "gone", 0, 1000))
    scheduler.remove_run("gone", "t")
    scheduler.wait_for_company(3600.0, enough_tokens=500)
    scheduler.submit(a_pass("t", "a", 1, 10))
    tick = asyncio.create_task(scheduler.next_tick())
    await asyncio.sleep(0.02)
    assert not tick.done()
    scheduler.submit(a_pass("t", "b", 1, 10))
    assert len((await asyncio.wait_for(tick, 10)).passes) == 2


def test_an_optimizer_step_is_a_barrier_within_its_run():
    scheduler = new_scheduler("a")
    for job in (a_pass("t", "a", 0, 10), a_step("t", "a", 1), a_pass("t", "a", 2, 10), a_step("t", "a", 3)):
        scheduler.submit(job)
    assert ids(scheduler.take_tick()) == ["a-0", "a-1"]
    assert ids(scheduler.take_tick()) == ["a-2", "a-3"]
    assert ids(scheduler.take_tick()) == []


def test_a_flood_of_large_jobs_does_not_hold_up_a_small_one():
    scheduler = new_scheduler("flood", "small")
    for seq_id in range(100):
        scheduler.submit(a_pass("greedy", "flood", seq_id, 900))
    scheduler.take_tick()
    scheduler.submit(a_pass("modest", "small", 0, 50))
    assert "small-0" in ids(scheduler.take_tick()) + ids(scheduler.take_tick())


def test_tenants_get_equal_tokens_however_many_runs_they_have_and_however_large_their_jobs_are():
    scheduler = new_scheduler("x0", "x1", "x2", "x3", "y")
    for seq_id in range(400):
        for run in ("x0", "x1", "x2", "x3"):
            scheduler.submit(a_pass("many", run, seq_id, 300))
        scheduler.submit(a_pass("one", "y", seq_id, 70))
    got: Counter[str] = Counter()
    for _ in range(40):
        for job in scheduler.take_tick().passes:
            got[job.tenant] += job.tokens
    assert abs(got["many"] - got["one"]) <= 0.1 * got["one"]


def test_a_job_larger_than_a_tick_is_taken_alone():
    scheduler = new_scheduler("big", tick_tokens=100)
    scheduler.submit(a_pass("t", "big", 0, 5000))
    scheduler.submit(a_pass("t", "big", 1, 10))
    assert ids(scheduler.take_tick()) == ["big-0"]
    assert ids(scheduler.take_tick()) == ["big-1"]


def test_idle_runs_are_not_looked_at():
    scheduler = new_scheduler(*(f"idle-{i}" for i in range(1000)), "a")
    scheduler.submit(a_step("t", "a", 0))
    assert list(scheduler._ready) == ["t"]
    scheduler.take_tick()
    assert not scheduler._ready


async def test_waiting_for_a_tick_ends_with_the_first_job():
    scheduler = new_scheduler("a")
    waiting = asyncio.create_task(scheduler.next_tick())
    await asyncio.sleep(0)
    assert not waiting.done()
    scheduler.submit(a_step("t", "a", 0))
    assert ids(await waiting) == ["a-0"]


def test_a_removed_run_gives_back_what_it_had_queued():
    scheduler = new_scheduler("a", "b")
    scheduler.submit(a_step("t", "a", 0))
    scheduler.submit(a_step("t", "a", 5))
    scheduler.submit(a_step("t", "b", 0))
    assert [job.seq_id for job in scheduler.remove_run("a", "t")] == [0, 5]
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
    tenants = {"a": "t1", "b": "t1", "c": "t2", "d": "t3"}
    scheduler = new_scheduler(*tenants)
    jobs, counts = [], Counter()
    for run, kind, tokens in script:
        make = (
            a_pass(tenants[run], run, counts[run], tokens)
            if kind == "pass"
            else a_step(tenants[run], run, counts[run])
        )
        counts[run] += 1
        jobs.append(make)
    random.shuffle(jobs)
    for job in jobs:
        scheduler.submit(job)
    done: dict[str, list[int]] = {run: [] for run in tenants}
    while tick := scheduler.take_tick().jobs:
        for job in tick:
            done[job.run_id].append(job.seq_id)
    assert done == {run: list(range(counts[run])) for run in tenants}
