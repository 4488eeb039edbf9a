from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from twinkle.server.samplers.cache_usage import CacheUsage, Limits
from twinkle.server.samplers.waiting_queue import QUANTUM, Waiting, WaitingQueue

ROWS = 64


def add(
    queue: WaitingQueue[str], tenant: str, name: str, tokens: int = 100, samples: int = 1, length: int = 1
):
    queue.add(Waiting(tenant, name, tokens, length, samples))


def take(queue: WaitingQueue[str], places: int):
    return named(queue.take(CacheUsage(Limits(places, 10**9))))


def named(taken: list[tuple[Waiting[str], int]]) -> list[tuple[str, int]]:
    return [(waiting.item, count) for waiting, count in taken]


def test_a_tenants_requests_are_admitted_in_order():
    queue: WaitingQueue[str] = WaitingQueue()
    for name in "abc":
        add(queue, "t", name)
    assert take(queue, 2) == [("a", 1), ("b", 1)]
    assert take(queue, 2) == [("c", 1)]
    assert not queue


def test_samples_that_find_no_place_come_later():
    queue: WaitingQueue[str] = WaitingQueue()
    add(queue, "t", "many", samples=5)
    assert take(queue, 3) == [("many", 3)]
    assert take(queue, 3) == [("many", 2)]


def test_a_flood_does_not_hold_up_another_tenant():
    queue: WaitingQueue[str] = WaitingQueue()
    for i in range(500):
        add(queue, "greedy", f"g{i}", tokens=QUANTUM)
    add(queue, "modest", "m", tokens=QUANTUM)
    assert ("m", 1) in take(queue, 4)


def test_tenants_get_like_shares_of_tokens():
    queue: WaitingQueue[str] = WaitingQueue()
    for i in range(400):
        add(queue, "long", f"long-{i}", tokens=4000)
        for j in range(8):
            add(queue, "short", f"short-{i}-{j}", tokens=500)
    got: Counter[str] = Counter()
    for _ in range(60):
        for name, count in take(queue, 8):
            got[name.split("-")[0]] += count * (4000 if name.startswith("long") else 500)
    assert 0.8 < got["long"] / got["short"] < 1.25


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 40_000), st.integers(1, 20)), min_size=2, max_size=4),
    places=st.lists(st.integers(1, 16), min_size=1, max_size=30),
)
def test_who_always_waits_gets_as_much_as_any_other_but_for_a_round_and_a_sample(sizes, places):
    queue: WaitingQueue[str] = WaitingQueue()
    got: Counter[str] = Counter()
    for free in places:
        for tenant, (tokens, samples) in enumerate(sizes):
            while str(tenant) not in queue.tenants() or queue.wants(str(tenant))[1] <= 16:
                add(queue, str(tenant), str(tenant), tokens, samples)
        for name, count in take(queue, free):
            got[name] += count * sizes[int(name)][0]
        for tenant in range(len(sizes)):
            for other, (tokens, _) in enumerate(sizes):
                assert got[str(other)] - got[str(tenant)] <= QUANTUM + tokens


def test_who_comes_and_goes_gets_no_more_than_who_always_waits():
    """One of two has never more than one sample waiting; it is the larger one's."""
    queue: WaitingQueue[str] = WaitingQueue()
    got: Counter[str] = Counter()
    for i in range(3000):
        add(queue, "small", f"small-{i}", tokens=500)
        if "large" not in queue.tenants():
            add(queue, "large", f"large-{i}", tokens=30_000)
        for name, count in take(queue, 1):
            tenant = name.split("-")[0]
            got[tenant] += count * (500 if tenant == "small" else 30_000)
    assert got["large"] - got["small"] <= QUANTUM + 30_000


def test_debts_end_with_the_others_work():
    queue: WaitingQueue[str] = WaitingQueue()
    for tenant in "tu":
        add(queue, tenant, tenant, tokens=10**6)
    assert take(queue, 2) == [("t", 1), ("u", 1)]
    add(queue, "t", "again", tokens=10)
    add(queue, "v", "new", tokens=10)
    assert take(queue, 1) == [("new", 1)]  # nothing is owed, but the latest turn is longer ago


def test_what_finds_no_memory_waits_and_holds_up_nobody_else():
    queue: WaitingQueue[str] = WaitingQueue()
    limits = Limits(rows=10, tokens=1000)
    usage = CacheUsage.of(limits, [900])
    add(queue, "t", "large", length=300)
    add(queue, "t", "behind it", length=5)
    add(queue, "u", "small", length=5)
    assert [(one.item, count) for one, count in queue.take(usage)] == [("small", 1)]
    assert queue.wants("t") == (300, 2)
    assert [one.item for one, _ in queue.take(CacheUsage(limits))] == ["large", "behind it"]


def test_what_most_may_come_to_is_not_reserved():
    queue: WaitingQueue[str] = WaitingQueue()
    add(queue, "t", "many", tokens=30_000, samples=60, length=10)
    usage = CacheUsage(Limits(ROWS, 2**17))
    assert [count for _, count in queue.take(usage)] == [60]


def test_those_who_run_keep_something_to_grow_into():
    limits = Limits(rows=4, tokens=1600)
    usage = CacheUsage.of(limits, [1450])
    assert usage.fitting(600, 1, may_fill=False) == 0  # rows of 600 and 1450 are 2 x 1450
    usage = CacheUsage.of(limits, [700])
    assert usage.fitting(790, 1, may_fill=False) == 0 and usage.fitting(790, 1, may_fill=True) == 1


def test_a_paused_one_comes_first_and_has_been_paid_for():
    queue: WaitingQueue[str] = WaitingQueue()
    add(queue, "t", "new", tokens=50_000)
    queue.put_back(Waiting("t", "paused", 0, 7, 1))
    assert take(queue, 1) == [("paused", 1)]


def test_one_tenants_may_be_taken_alone():
    queue: WaitingQueue[str] = WaitingQueue()
    add(queue, "t", "a")
    add(queue, "u", "b", samples=9)
    assert named(queue.take_from("u", 4, CacheUsage(Limits(64, 10**9)))) == [("b", 4)]
    assert sorted(take(queue, 64)) == [("a", 1), ("b", 5)]


def test_removed_requests_are_gone():
    queue: WaitingQueue[str] = WaitingQueue()
    for tenant, name in (("t", "a"), ("t", "b"), ("u", "c")):
        add(queue, tenant, name)
    queue.remove({"a", "c", "unknown"}.__contains__)
    assert take(queue, 5) == [("b", 1)]
    assert not queue
