from collections import Counter

from twinkle.server.samplers.load import Limits, Load
from twinkle.server.samplers.waiting import QUANTUM, Waiting, WaitingLine

ROWS = 64


def add(line: WaitingLine[str], tenant: str, name: str, tokens: int = 100, samples: int = 1, length: int = 1):
    line.add(Waiting(tenant, name, tokens, length, samples))


def take(line: WaitingLine[str], places: int, **more):
    load = Load(Limits(places, 10**9))
    return [(waiting.item, count) for waiting, count in line.take(load, **more)]


def test_a_tenants_requests_are_admitted_in_order():
    line: WaitingLine[str] = WaitingLine()
    for name in "abc":
        add(line, "t", name)
    assert take(line, 2) == [("a", 1), ("b", 1)]
    assert take(line, 2) == [("c", 1)]
    assert not line


def test_samples_that_find_no_place_come_later():
    line: WaitingLine[str] = WaitingLine()
    add(line, "t", "many", samples=5)
    assert take(line, 3) == [("many", 3)]
    assert take(line, 3) == [("many", 2)]


def test_a_flood_does_not_hold_up_another_tenant():
    line: WaitingLine[str] = WaitingLine()
    for i in range(500):
        add(line, "greedy", f"g{i}", tokens=QUANTUM)
    add(line, "modest", "m", tokens=QUANTUM)
    assert ("m", 1) in take(line, 4)


def test_tenants_get_like_shares_of_tokens():
    line: WaitingLine[str] = WaitingLine()
    for i in range(400):
        add(line, "long", f"long-{i}", tokens=4000)
        for j in range(8):
            add(line, "short", f"short-{i}-{j}", tokens=500)
    got: Counter[str] = Counter()
    for _ in range(60):
        for name, count in take(line, 8):
            got[name.split("-")[0]] += count * (4000 if name.startswith("long") else 500)
    assert 0.8 < got["long"] / got["short"] < 1.25


def test_what_finds_no_memory_waits_and_holds_up_nobody_else():
    line: WaitingLine[str] = WaitingLine()
    limits = Limits(rows=10, tokens=1000)
    load = Load.of(limits, [900])
    add(line, "t", "large", length=300)
    add(line, "t", "behind it", length=5)
    add(line, "u", "small", length=5)
    assert [(one.item, count) for one, count in line.take(load)] == [("small", 1)]
    assert line.wants("t") == (300, 2)
    assert [one.item for one, _ in line.take(Load(limits))] == ["large", "behind it"]


def test_what_most_may_come_to_is_not_reserved():
    line: WaitingLine[str] = WaitingLine()
    add(line, "t", "many", tokens=30_000, samples=60, length=10)
    load = Load(Limits(ROWS, 2**17))
    assert [count for _, count in line.take(load)] == [60]


def test_those_who_run_keep_something_to_grow_into():
    limits = Limits(rows=4, tokens=1600)
    load = Load.of(limits, [1450])
    assert load.fitting(600, 1, may_fill=False) == 0  # rows of 600 and 1450 are 2 x 1450
    load = Load.of(limits, [700])
    assert load.fitting(790, 1, may_fill=False) == 0 and load.fitting(790, 1, may_fill=True) == 1


def test_a_paused_one_comes_first_and_has_been_paid_for():
    line: WaitingLine[str] = WaitingLine()
    add(line, "t", "new", tokens=50_000)
    line.put_back(Waiting("t", "paused", 0, 7, 1))
    assert take(line, 1) == [("paused", 1)]


def test_one_tenants_may_be_taken_alone():
    line: WaitingLine[str] = WaitingLine()
    add(line, "t", "a")
    add(line, "u", "b", samples=9)
    assert take(line, 64, most=4, only="u") == [("b", 4)]
    assert sorted(take(line, 64)) == [("a", 1), ("b", 5)]


def test_removed_requests_are_gone():
    line: WaitingLine[str] = WaitingLine()
    for tenant, name in (("t", "a"), ("t", "b"), ("u", "c")):
        add(line, tenant, name)
    line.remove({"a", "c", "unknown"}.__contains__)
    assert take(line, 5) == [("b", 1)]
    assert not line
