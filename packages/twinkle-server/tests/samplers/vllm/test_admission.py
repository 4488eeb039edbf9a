"""Who is next in front of vLLM. No vLLM is needed."""

from __future__ import annotations

from dataclasses import dataclass

from twinkle.server.samplers.vllm.admission import Admission


@dataclass(eq=False)
class Item:
    tenant: str
    adapter_number: int | None = None
    prompt_length: int = 10
    longest: int = 50


def drain(admission: Admission[Item]) -> list[Item]:
    """All that may run now."""
    found: list[Item] = []
    while (item := admission.next()) is not None:
        found.append(item)
    return found


def test_no_more_run_than_fit_and_a_fifth_is_for_those_with_nothing_running():
    admission: Admission[Item] = Admission(sequences=10, adapters=4, tokens=10_000)
    many, one = Item("a"), Item("b")
    admission.add(many, 100)
    assert drain(admission) == [many] * 8
    admission.add(one, 5)
    assert drain(admission) == [one]  # it has something running then
    admission.ended(many)
    assert drain(admission) == []  # nine run, and eight places are everybody's
    admission.ended(many)
    assert len(drain(admission)) == 1


def test_tenants_alternate_whatever_each_has_asked_for():
    admission: Admission[Item] = Admission(sequences=5, adapters=4, tokens=10_000)
    much, little = Item("much", longest=2000), Item("little", longest=2000)
    admission.add(much, 50)
    running = drain(admission)
    admission.add(little, 3)
    order: list[str] = []
    for _ in range(12):
        if running:
            admission.ended(running.pop(0))
        began = drain(admission)
        running += began
        order += [item.tenant for item in began]
    assert order.count("little") == 3
    assert max(i for i, tenant in enumerate(order) if tenant == "little") <= 6


def test_the_next_adapter_without_a_place_holds_up_the_others_until_one_ends():
    admission: Admission[Item] = Admission(sequences=10, adapters=2, tokens=10_000)
    first, second, third = (Item(f"t{i}", adapter_number=i) for i in range(3))
    base, again = Item("base"), Item("t0", adapter_number=0)
    for item in (first, second):
        admission.add(item, 1)
    assert drain(admission) == [first, second]
    for item in (third, base, again):
        admission.add(item, 1)
    began = drain(admission)
    assert third not in began
    before = len(began)
    admission.ended(first)
    while began and began[-1] is again:  # it has the first one's adapter: then that is still in use
        admission.ended(began.pop())
    assert third in drain(admission)
    assert before <= 2


def test_what_is_forgotten_neither_runs_nor_holds_up_others():
    admission: Admission[Item] = Admission(sequences=10, adapters=1, tokens=10_000)
    first, blocked, base = Item("a", adapter_number=1), Item("b", adapter_number=2), Item("c")
    admission.add(first, 1)
    assert drain(admission) == [first]
    admission.add(blocked, 3)
    assert drain(admission) == []
    admission.add(base, 2)
    assert drain(admission) == []
    admission.forget(blocked)
    assert drain(admission) == [base, base]


def test_prompts_that_the_cache_has_no_room_for_wait():
    admission: Admission[Item] = Admission(sequences=10, adapters=1, tokens=160)
    long = Item("a", prompt_length=70)
    admission.add(long, 3)
    assert drain(admission) == [long, long]
    admission.ended(long)
    assert drain(admission) == [long]
