from collections import Counter

from twinkle.server.samplers.waiting import QUANTUM, Waiting, WaitingLine


def add(line: WaitingLine[str], tenant: str, name: str, tokens: int = 100, samples: int = 1) -> None:
    line.add(Waiting(tenant, name, tokens, samples))


def take(line: WaitingLine[str], places: int, max_tokens: int = 10**9, running: int = 0, longest: int = 0):
    return [(waiting.item, count) for waiting, count in line.take(places, longest, running, max_tokens)]


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


def test_the_rectangle_of_rows_and_longest_stays_within_the_budget():
    line: WaitingLine[str] = WaitingLine()
    for i in range(10):
        add(line, f"t{i}", f"r{i}", tokens=300)
    assert len(take(line, 64, max_tokens=1000)) == 3
    assert take(line, 64, max_tokens=1000, running=3, longest=300) == []


def test_one_that_is_over_the_budget_alone_runs_alone_and_is_not_overtaken_for_ever():
    line: WaitingLine[str] = WaitingLine()
    add(line, "t", "huge", tokens=5000)
    for i in range(20):
        add(line, "u", f"small-{i}", tokens=500)
    rounds = [dict(take(line, 64, max_tokens=1000)) for _ in range(8)]
    assert {"huge": 1} in rounds


def test_removed_requests_are_gone():
    line: WaitingLine[str] = WaitingLine()
    for tenant, name in (("t", "a"), ("t", "b"), ("u", "c")):
        add(line, tenant, name)
    line.remove({"a", "c", "unknown"})
    assert take(line, 5) == [("b", 1)]
    assert not line
