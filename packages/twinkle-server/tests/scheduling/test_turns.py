"""Tags of tenants, by hand."""

from twinkle.server.scheduling.turns import Turns


def busy(*tenants: str) -> Turns:
    turns = Turns()
    for tenant in tenants:
        turns.activate(tenant)
    return turns


def turn(turns: Turns, tokens: int) -> str:
    """Who is first gets so many tokens."""
    [first] = turns.take_first(1)
    turns.earn(tokens, least=first)
    turns.charge(first, tokens)
    turns.put_back([first])
    return first


def test_who_was_given_least_is_next_and_of_equals_who_waited_longest() -> None:
    turns = busy("a", "b", "c")
    assert [turn(turns, tokens) for tokens in (30, 20, 10, 10, 10, 10)] == ["a", "b", "c", "c", "b", "c"]


def test_who_comes_later_begins_where_the_others_are() -> None:
    turns = busy("a", "b")
    assert [turn(turns, 10) for _ in range(20)] == ["a", "b"] * 10
    turns.activate("new")
    assert sorted(turn(turns, 10) for _ in range(30)) == ["a"] * 10 + ["b"] * 10 + ["new"] * 10


def test_who_comes_and_goes_is_given_no_more_than_those_who_stay() -> None:
    turns, given = busy("a", "b", "comes"), {"a": 0, "b": 0, "comes": 0}
    for _ in range(300):
        turns.activate("comes")
        [first] = turns.take_first(1)
        tokens = 70 if first == "comes" else 10
        turns.earn(10, least=first)
        if first == "comes":
            turns.deactivate("comes")
        turns.charge(first, tokens)
        turns.put_back([first])
        given[first] += tokens
    assert max(given.values()) - min(given.values()) <= 70
    assert sum(given.values()) > 3000


def test_nobody_is_looked_at_twice_or_after_leaving() -> None:
    turns = busy("a", "b", "c")
    turns.deactivate("b")
    taken = turns.take_first(10)
    assert taken == ["a", "c"]
    assert turns.take_first(10) == []
    turns.put_back(taken)
    turns.put_back(taken)
    assert turns.take_first(10) == ["a", "c"]
