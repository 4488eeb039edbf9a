"""Nobody waits for long because of another: bounds that hold whatever the others send. Time is counted in tokens."""

from __future__ import annotations

from collections import Counter, defaultdict

from hypothesis import given, settings
from hypothesis import strategies as st
from scheduled_jobs import a_pass, a_run, a_step

from twinkle.protocol import messages as m
from twinkle.server.scheduling.runs import Run
from twinkle.server.scheduling.scheduler import Scheduler, Tick

TICK, OVERHEAD = 1000, 50


def cost(tick: Tick) -> int:
    """What it takes to run: a fixed cost, and its tokens."""
    return OVERHEAD + sum(job.tokens for job in tick.jobs)


class Flood:
    """A tenant that has work queued on all of its runs at any time."""

    def __init__(self, scheduler: Scheduler, sizes: list[int]) -> None:
        self.scheduler = scheduler
        self.sizes = sizes
        self.sent = [0] * len(sizes)
        self.runs = [a_run(f"flood-{number}", "flood") for number in range(len(sizes))]
        self.fill()

    def fill(self) -> None:
        for number, size in enumerate(self.sizes):
            run = self.runs[number]
            while self.sent[number] - run.queue.next_id < 20:
                self.scheduler.submit(a_pass(run, self.sent[number], size))
                self.sent[number] += 1


@settings(max_examples=200, deadline=None)
@given(
    own=st.integers(1, 2000),
    sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=6),
    thinks=st.lists(st.integers(1, 4000), min_size=1, max_size=30),
)
def test_beside_a_flood_a_step_takes_at_most_twice_as_long_as_alone_and_a_tick(own, sizes, thinks):
    scheduler = Scheduler(TICK, OVERHEAD)
    own_run = a_run("own", "modest")
    flood = Flood(scheduler, sizes)
    now, arrives, sent_at, latencies, floods_ticks = 0, thinks[0], 0, [], []
    steps = 0
    while len(latencies) < len(thinks):
        if arrives is not None and arrives <= now:
            sent_at, arrives = arrives, None
            scheduler.submit(a_pass(own_run, 2 * steps, own))
            scheduler.submit(a_step(own_run, 2 * steps + 1))
            steps += 1
        flood.fill()
        tick = scheduler.take_tick()
        assert tick.jobs, "there is work at any time"
        for half in tick.split_independent():
            now += cost(half)
            if any(isinstance(job.request, m.OptimStepRequest) for job in half.jobs):
                latencies.append(now - sent_at)
                arrives = now + thinks[len(latencies) - 1]
        if all(job.run.tenant == "flood" for job in tick.jobs):
            floods_ticks.append(cost(tick))
    alone = OVERHEAD + own
    assert max(latencies) <= 2 * alone + max(floods_ticks)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 3),  # tenant
            st.integers(0, 2),  # its run
            st.integers(0, 1500),  # tokens; 0 is an optimizer step
            st.integers(0, 3),  # jobs that come before the next tick
        ),
        max_size=80,
    )
)
def test_who_always_has_work_gets_as_much_as_any_other_but_for_a_bound(script):
    scheduler = Scheduler(TICK, OVERHEAD)
    counts: Counter[str] = Counter()
    runs: dict[str, Run] = {}
    biggest: Counter[str] = Counter()
    done: dict[str, list[int]] = defaultdict(list)
    record = Served(scheduler)
    for tenant, number, tokens, more in script:
        name, run_id = f"t{tenant}", f"t{tenant}-{number}"
        run = runs.setdefault(run_id, a_run(run_id, name))
        make = a_pass(run, counts[run_id], tokens) if tokens else a_step(run, counts[run_id])
        counts[run_id] += 1
        biggest[name] = max(biggest[name], tokens)
        scheduler.submit(make)
        if more == 0:
            assert record.take(biggest, done), "there is work"
    while record.take(biggest, done):
        pass
    assert done == {run: list(range(count)) for run, count in counts.items()}


class Served:
    """What each tenant was given while another had work at any time."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.since: dict[str, Counter[str]] = {}

    def take(self, biggest: Counter[str], done: dict[str, list[int]]) -> bool:
        ready = set(self.scheduler.ready_tenants)
        self.since = {tenant: self.since.get(tenant, Counter()) for tenant in ready}
        tick = self.scheduler.take_tick()
        for job in tick.jobs:
            done[job.run.run_id].append(job.seq_id)
            for counter in self.since.values():
                counter[job.run.tenant] += job.tokens
        for tenant, counter in self.since.items():
            for other in counter:
                assert counter[other] - counter[tenant] <= biggest[tenant] + biggest[other] + 2 * TICK
        return bool(tick.jobs)


def test_tenants_with_like_work_share_a_tick_and_a_much_larger_one_waits_for_its_own():
    scheduler = Scheduler(TICK, OVERHEAD)
    for number in range(4):
        scheduler.submit(a_pass(a_run(f"r{number}", f"t{number}"), 0, 100 + number))
    scheduler.submit(a_pass(a_run("large", "greedy"), 0, 900))
    assert {job.run.run_id for job in scheduler.take_tick().jobs} == {"r0", "r1", "r2"}
    assert {job.run.run_id for job in scheduler.take_tick().jobs} <= {"r3", "large"}


def test_what_waits_for_no_pass_is_done_first():
    scheduler = Scheduler(TICK, OVERHEAD)
    a, b = a_run("a", "t1"), a_run("b", "t2")
    for job in (a_pass(a, 0, 10), a_step(a, 1), a_step(b, 0)):
        scheduler.submit(job)
    halves = scheduler.take_tick().split_independent()
    assert [[job.request_id for job in half.jobs] for half in halves] == [["b-0"], ["a-0", "a-1"]]


def test_a_tenants_runs_take_turns_however_much_one_of_them_has_queued():
    scheduler = Scheduler(TICK, OVERHEAD)
    endless, single, others = a_run("endless", "t1"), a_run("single", "t1"), a_run("others", "t2")
    for seq_id in range(100):
        scheduler.submit(a_pass(endless, seq_id, 90))
        scheduler.submit(a_pass(others, seq_id, 90))
    scheduler.submit(a_pass(single, 0, 100))
    first, second = ({job.run.run_id for job in scheduler.take_tick().jobs} for _ in range(2))
    assert "single" in first | second
