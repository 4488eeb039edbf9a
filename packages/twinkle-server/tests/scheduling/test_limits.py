import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_futures import create

from twinkle.protocol import messages as m
from twinkle.protocol.errors import LimitReached
from twinkle.server.config import LimitsSection
from twinkle.server.scheduling.futures import FutureTable
from twinkle.server.scheduling.limits import RateLimit, check_fetched, check_room
from twinkle.server.scheduling.records import RunLog

DONE = m.OptimStepResponse(metrics={})


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def take(rate: RateLimit, tenant: str, amount: float = 1) -> bool:
    try:
        rate.check(tenant)
    except LimitReached:
        return False
    rate.charge(tenant, amount)
    return True


def test_so_many_at_once_and_then_as_fast_as_they_are_earned():
    clock = Clock()
    rate = RateLimit("max_things", 10, None, 1.0, clock, burst=2.0)
    assert [take(rate, "a") for _ in range(21)] == [True] * 20 + [False]
    clock.now = 0.25  # 2.5 have been earned; the third overdraws, as the first of each pair might
    assert [take(rate, "a") for _ in range(4)] == [True] * 3 + [False]
    assert take(rate, "b"), "another tenant has its own"


def test_who_has_overdrawn_is_told_when_it_will_have_paid():
    clock = Clock()
    rate = RateLimit("max_tokens_per_minute", 600, None, 60.0, clock)
    rate.check("a")
    rate.charge("a", 700)  # owes 100, at 10 a second
    with pytest.raises(
        LimitReached, match=r"limits\.max_tokens_per_minute_per_tenant: 600 .* 10\.1 s"
    ) as told:
        rate.check("a")
    assert told.value.retry_after == pytest.approx(10.1)
    clock.now = 10.1
    rate.check("a")


def test_what_all_take_together_is_one_tenants_limit_too():
    clock = Clock()
    rate = RateLimit("max_things", None, 3, 1.0, clock)
    assert [take(rate, tenant) for tenant in "abcd"] == [True, True, True, False]
    with pytest.raises(LimitReached, match=r"limits\.max_things: 3 "):
        rate.check("e")


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 2), st.integers(1, 30)), max_size=80))
def test_nobody_gets_more_than_was_earned_and_one_request(script):
    clock = Clock()
    rate = RateLimit("max_things", 10, None, 1.0, clock)
    got = dict.fromkeys("abc", 0)
    for tenant, pause, amount in script:
        clock.now += pause
        if take(rate, tenant, amount):
            got[tenant] += amount
        assert got[tenant] <= 10 + 10 * clock.now + 30


def test_tenants_who_have_paid_are_forgotten():
    clock = Clock()
    rate = RateLimit("max_things", 10, None, 1.0, clock)
    for number in range(1000):
        clock.now += 1.0
        take(rate, f"t{number}")
    assert len(rate._tenants) <= 3


def test_room_in_the_queue_is_bounded_by_requests_and_tokens_of_each_and_of_all():
    futures = FutureTable(Clock(), RunLog())
    limits = LimitsSection(
        max_queued_requests_per_tenant=3,
        max_queued_tokens_per_tenant=100,
        max_queued_requests=4,
        max_queued_tokens=150,
    )
    check_room(limits, futures.load_of("a"), futures.load, 1000)  # the first is taken, however large
    first = create(futures, "a", tokens=90)
    with pytest.raises(LimitReached, match=r"limits\.max_queued_tokens_per_tenant: 90 .* 11 more .* 100"):
        check_room(limits, futures.load_of("a"), futures.load, 11)
    check_room(limits, futures.load_of("a"), futures.load, 10)
    create(futures, "b", tokens=60)
    with pytest.raises(LimitReached, match=r"limits\.max_queued_tokens: 150 "):
        check_room(limits, futures.load_of("b"), futures.load, 1)
    check_room(limits, futures.load_of("c"), futures.load, 1)
    create(futures, "a")
    create(futures, "a")
    with pytest.raises(
        LimitReached, match=r"limits\.max_queued_requests_per_tenant: 3 .* 3 is the most"
    ) as told:
        check_room(limits, futures.load_of("a"), futures.load, 0)
    assert told.value.retry_after > 0
    with pytest.raises(LimitReached, match=r"limits\.max_queued_requests: 4 "):
        check_room(limits, futures.load_of("b"), futures.load, 0)
    futures.complete(first, DONE)
    check_room(limits, futures.load_of("a"), futures.load, 40)
    assert (futures.load.requests, futures.load.tokens) == (3, 60)
    assert futures.load_of("a").tokens == 0


async def test_who_does_not_fetch_results_is_told_to():
    futures = FutureTable(Clock(), RunLog())
    limits = LimitsSection(max_unfetched_bytes_per_tenant=5000)
    ids = [create(futures, "a") for _ in range(3)]
    for request_id in ids:
        check_fetched(limits, futures.load_of("a"))
        futures.complete(request_id, DONE)
    with pytest.raises(LimitReached, match=r"limits\.max_unfetched_bytes_per_tenant: .* fetch them first"):
        check_fetched(limits, futures.load_of("a"))
    check_fetched(limits, futures.load_of("b"))
    await futures.wait("a", ids[0], 0)
    check_fetched(limits, futures.load_of("a"))
