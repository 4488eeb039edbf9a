"""Who is paused for whom, on a batch of numbers only: a simulation of what the engine does with it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest

from twinkle.server.samplers.cache_usage import UNBOUNDED, CacheUsage, Limits, RowCost
from twinkle.server.samplers.preemption import NEWCOMERS_SHARE, Slot, victim, victims_for_newcomer

LIMITS = Limits(rows=16, tokens=1600)


def rows(tenant: str, count: int, length: int = 10, first: int = 0) -> list[Slot]:
    return [Slot(tenant, (first + i, 0), length) for i in range(count)]


def test_short_rows_always_have_memory_beside_long_ones():
    usage = CacheUsage.of(LIMITS, [1600])
    assert usage.fitting(100, 16, may_fill=True) == 4  # a quarter of the tokens
    assert usage.fitting(101, 1, may_fill=True) == 0


def test_one_long_row_does_not_stretch_the_short_ones():
    assert CacheUsage.of(LIMITS, [1000, *[10] * 15]).tokens == 1000
    assert CacheUsage.of(LIMITS, [1000, 200]).tokens == 2000


def test_prompts_of_their_own_are_counted_as_they_are():
    assert CacheUsage.of(Limits(8, 100, per_sequence=True), [60, 30, 5]).tokens == 95


@pytest.mark.parametrize(
    ("cost", "of_lengths"),
    [
        (RowCost(128), {0: 0, 1: 1, 1000: 1000}),
        # Half of a token's bytes are in layers that read 64 of them.
        (RowCost(128, windowed=128, window=64), {1: 1, 64: 64, 65: 65, 66: 65, 1000: 32 + 500}),
        (RowCost(0, windowed=128, window=64), {1: 1, 64: 64, 65: 64, 1000: 64}),
        # States of 30 tokens' size.
        (RowCost(128, constant=128 * 30), {0: 30, 1: 31, 1000: 1030}),
        (RowCost(0, constant=4096), {0: 1, 1: 1, 1000: 1}),
    ],
)
def test_windows_and_states_take_what_they_are(cost: RowCost, of_lengths: dict[int, int]):
    assert {length: cost.tokens(length) for length in of_lengths} == of_lengths
    for length, tokens in of_lengths.items():
        longest = cost.longest(tokens)
        assert longest >= length and cost.tokens(longest) <= tokens
        assert longest == UNBOUNDED or cost.tokens(longest + 1) > tokens
    least = cost.tokens(0)
    assert least == 0 or cost.longest(least - 1) == 0


def test_states_take_their_room_from_the_first_token_on():
    limits = Limits(rows=16, tokens=1600, cost=RowCost(10, constant=500))
    assert limits.short == 50 and limits.longest == 1550
    # A quarter of it is for short ones whatever the long ones take.
    assert CacheUsage.of(limits, [50] * 16).tokens == 1600 - 400
    assert CacheUsage.of(limits, [1550]).fitting(50, 16, may_fill=True) == 4
    assert CacheUsage.of(limits, [700]).fitting(700, 4, may_fill=True) == 1


def test_both_sides_of_a_boundary_have_rectangles_of_their_own():
    limits = Limits(rows=4, tokens=400, boundaries=(50,))
    assert [limits.rope_regime(length) for length in (1, 50, 51)] == [0, 0, 1]
    assert CacheUsage.of(limits, [50, 99, 100]).tokens == (50 + 200) - 100


def test_a_tenant_without_any_gets_up_to_a_quarter_of_the_rows():
    slots = rows("a", 16)
    assert victims_for_newcomer(slots, LIMITS, 10, 100) == [12, 13, 14, 15]
    assert victims_for_newcomer(slots, LIMITS, 10, 1) == [15]
    assert victims_for_newcomer(slots[:14], LIMITS, 10, 3) == [13]


def test_nobody_gives_more_than_it_keeps_nor_its_last_row():
    slots = [one for tenant in "abcdefgh" for one in rows(tenant, 2, first=ord(tenant))]
    [row] = victims_for_newcomer(slots, LIMITS, 10, 4)
    assert slots[row].tenant == "h"
    ones = [one for i in range(16) for one in rows(f"t{i}", 1, first=i)]
    assert victims_for_newcomer(ones, LIMITS, 10, 4) == []


def test_room_in_memory_is_made_by_who_has_most_of_it_and_only_if_it_does():
    slots = [*rows("a", 3, 500), *rows("b", 2, 20, first=10)]
    assert victims_for_newcomer(slots, LIMITS, 400, 4) == [2]
    assert victims_for_newcomer(slots, LIMITS, 1400, 1) == []


def test_what_is_being_read_is_not_paused():
    slots = [Slot("a", (i, 0), 10, can_preempt=False) for i in range(16)]
    assert victims_for_newcomer(slots, LIMITS, 10, 1) == [] and victim(slots) is None


def test_the_newest_of_who_has_most_shrinks_and_never_the_oldest():
    slots = [*rows("a", 2, 700), *rows("b", 2, 100, first=10)]
    assert victim(slots) == 1
    assert victim([*rows("a", 1, 1500), *rows("b", 1, 50, first=10)]) == 1
    assert victim(rows("a", 1, 1500)) is None


@dataclass(eq=False)
class Job:
    tenant: str
    order: tuple[int, int]
    prompt: int
    wanted: int
    done: int = 0

    @property
    def length(self) -> int:
        return self.prompt + self.done


@pytest.mark.parametrize("seed", range(8))
def test_everybody_ends_within_memory_and_nobody_waits_for_anothers_end(seed: int):
    """Any mixture of jobs that fit alone: the memory is kept, the oldest has one token a turn at least, and all end; a
    tenant of whom nothing runs comes in unless the last rows of the others leave no room.
    """
    draw = np.random.default_rng(seed)
    limits = Limits(rows=int(draw.integers(2, 12)), tokens=int(draw.integers(200, 800)))
    jobs: list[Job] = []
    for i in range(40):
        prompt = int(draw.choice([1, 5, limits.short, limits.tokens // 2]))
        wanted = int(draw.integers(1, limits.tokens - prompt + 1)) if draw.random() < 0.4 else 3
        jobs.append(Job(f"t{draw.integers(4)}", (i, 0), prompt, wanted))
    work = sum(job.wanted for job in jobs)
    waiting, running = list(jobs), list[Job]()
    turns = 0
    while waiting or running:
        turns += 1
        assert turns <= work
        _admit(limits, waiting, running)
        _shrink(limits, waiting, running)
        assert running
        oldest = min(running, key=lambda job: job.order)
        assert not CacheUsage.of(limits, [job.length for job in running]).is_too_much or len(running) == 1
        before = oldest.done
        for job in running:
            job.done += 1
        assert oldest.done == before + 1
        running[:] = [job for job in running if job.done < job.wanted]


def _held(running: list[Job]) -> list[Slot]:
    return [Slot(job.tenant, job.order, job.length) for job in running]


def _admit(limits: Limits, waiting: list[Job], running: list[Job]) -> None:
    """As the engine does, with the oldest of each tenant first."""
    waiting.sort(key=lambda job: job.order)
    for tenant in dict.fromkeys(job.tenant for job in waiting):
        if not running or tenant in {job.tenant for job in running}:
            continue
        first = next(job for job in waiting if job.tenant == tenant)
        paused = victims_for_newcomer(_held(running), limits, first.length, 1)
        lasts = {job.tenant: job.length for job in sorted(running, key=lambda job: job.order, reverse=True)}
        gone = [running[i] for i in paused]
        running[:] = [job for job in running if job not in gone]
        waiting += gone
        usage = CacheUsage.of(limits, [job.length for job in running])
        if usage.fitting(first.length, 1, may_fill=True):
            waiting.remove(first)
            running.append(first)
        else:  # beside everybody's last row there is no room
            assert not CacheUsage.of(limits, lasts.values()).fitting(first.length, 1, may_fill=True)
    for job in sorted(waiting, key=lambda job: job.order):
        usage = CacheUsage.of(limits, [one.length for one in running])
        if usage.fitting(job.length, 1, may_fill=False):
            waiting.remove(job)
            running.append(job)


def _shrink(limits: Limits, waiting: list[Job], running: list[Job]) -> None:
    while CacheUsage.of(limits, [job.length for job in running]).is_too_much:
        row = victim(_held(running))
        if row is None:
            return
        waiting.append(running.pop(row))


def test_newcomers_of_many_tenants_share_evenly():
    slots = rows("a", 16)
    for tenant in "bcd":
        for row in reversed(victims_for_newcomer(slots, LIMITS, 10, 16)):
            del slots[row]
        free = LIMITS.rows - len(slots)
        slots += rows(tenant, min(free, LIMITS.rows // NEWCOMERS_SHARE), first=100 * ord(tenant))
    assert Counter(one.tenant for one in slots) == {"a": 4, "b": 4, "c": 4, "d": 4}
