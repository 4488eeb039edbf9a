"""Who is paused for whom, on a batch of numbers only: a simulation of what the engine does with it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest

from twinkle.server.samplers.cache_usage import Limits, Load
from twinkle.server.samplers.preemption import FOR_NEWCOMERS, Held, to_make_room, to_shrink

LIMITS = Limits(rows=16, tokens=1600)


def rows(tenant: str, count: int, length: int = 10, first: int = 0) -> list[Held]:
    return [Held(tenant, (first + i, 0), length) for i in range(count)]


def test_short_rows_always_have_memory_beside_long_ones():
    load = Load.of(LIMITS, [1600])
    assert load.fitting(100, 16, may_fill=True) == 4  # a quarter of the tokens
    assert load.fitting(101, 1, may_fill=True) == 0


def test_one_long_row_does_not_stretch_the_short_ones():
    assert Load.of(LIMITS, [1000, *[10] * 15]).tokens == 1000
    assert Load.of(LIMITS, [1000, 200]).tokens == 2000


def test_prompts_of_their_own_are_counted_as_they_are():
    assert Load.of(Limits(8, 100, are_apart=True), [60, 30, 5]).tokens == 95


def test_both_sides_of_a_boundary_have_rectangles_of_their_own():
    limits = Limits(rows=4, tokens=400, boundaries=(50,))
    assert [limits.kind(length) for length in (1, 50, 51)] == [0, 0, 1]
    assert Load.of(limits, [50, 99, 100]).tokens == (50 + 200) - 100


def test_a_tenant_without_any_gets_up_to_a_quarter_of_the_rows():
    held = rows("a", 16)
    assert to_make_room(held, LIMITS, 10, 100) == [12, 13, 14, 15]
    assert to_make_room(held, LIMITS, 10, 1) == [15]
    assert to_make_room(held[:14], LIMITS, 10, 3) == [13]


def test_nobody_gives_more_than_it_keeps_nor_its_last_row():
    held = [one for tenant in "abcdefgh" for one in rows(tenant, 2, first=ord(tenant))]
    [row] = to_make_room(held, LIMITS, 10, 4)
    assert held[row].tenant == "h"
    ones = [one for i in range(16) for one in rows(f"t{i}", 1, first=i)]
    assert to_make_room(ones, LIMITS, 10, 4) == []


def test_room_in_memory_is_made_by_who_has_most_of_it_and_only_if_it_does():
    held = [*rows("a", 3, 500), *rows("b", 2, 20, first=10)]
    assert to_make_room(held, LIMITS, 400, 4) == [2]
    assert to_make_room(held, LIMITS, 1400, 1) == []


def test_what_is_being_read_is_not_paused():
    held = [Held("a", (i, 0), 10, can_pause=False) for i in range(16)]
    assert to_make_room(held, LIMITS, 10, 1) == [] and to_shrink(held) is None


def test_the_newest_of_who_has_most_shrinks_and_never_the_oldest():
    held = [*rows("a", 2, 700), *rows("b", 2, 100, first=10)]
    assert to_shrink(held) == 1
    assert to_shrink([*rows("a", 1, 1500), *rows("b", 1, 50, first=10)]) == 1
    assert to_shrink(rows("a", 1, 1500)) is None


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
        assert not Load.of(limits, [job.length for job in running]).is_too_much or len(running) == 1
        before = oldest.done
        for job in running:
            job.done += 1
        assert oldest.done == before + 1
        running[:] = [job for job in running if job.done < job.wanted]


def _held(running: list[Job]) -> list[Held]:
    return [Held(job.tenant, job.order, job.length) for job in running]


def _admit(limits: Limits, waiting: list[Job], running: list[Job]) -> None:
    """As the engine does, with the oldest of each tenant first."""
    waiting.sort(key=lambda job: job.order)
    for tenant in dict.fromkeys(job.tenant for job in waiting):
        if not running or tenant in {job.tenant for job in running}:
            continue
        first = next(job for job in waiting if job.tenant == tenant)
        paused = to_make_room(_held(running), limits, first.length, 1)
        lasts = {job.tenant: job.length for job in sorted(running, key=lambda job: job.order, reverse=True)}
        gone = [running[i] for i in paused]
        running[:] = [job for job in running if job not in gone]
        waiting += gone
        load = Load.of(limits, [job.length for job in running])
        if load.fitting(first.length, 1, may_fill=True):
            waiting.remove(first)
            running.append(first)
        else:  # beside everybody's last row there is no room
            assert not Load.of(limits, lasts.values()).fitting(first.length, 1, may_fill=True)
    for job in sorted(waiting, key=lambda job: job.order):
        load = Load.of(limits, [one.length for one in running])
        if load.fitting(job.length, 1, may_fill=False):
            waiting.remove(job)
            running.append(job)


def _shrink(limits: Limits, waiting: list[Job], running: list[Job]) -> None:
    while Load.of(limits, [job.length for job in running]).is_too_much:
        row = to_shrink(_held(running))
        if row is None:
            return
        waiting.append(running.pop(row))


def test_newcomers_of_many_tenants_share_evenly():
    held = rows("a", 16)
    for tenant in "bcd":
        for row in reversed(to_make_room(held, LIMITS, 10, 16)):
            del held[row]
        free = LIMITS.rows - len(held)
        held += rows(tenant, min(free, LIMITS.rows // FOR_NEWCOMERS), first=100 * ord(tenant))
    assert Counter(one.tenant for one in held) == {"a": 4, "b": 4, "c": 4, "d": 4}
