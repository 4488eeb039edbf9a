import asyncio
from collections import deque
from concurrent.futures import Future

import pytest

from twinkle.protocol.errors import InvalidRequest
from twinkle.verbs.futures import Pending, chain, first_failure


def done(value: object) -> Future:
    future: Future = Future()
    future.set_result(value)
    return future


def failed() -> Future:
    future: Future = Future()
    future.set_exception(InvalidRequest("no"))
    return future


def test_a_pending_is_its_result_once_it_is_looked_at():
    assert Pending(done("abc"), "x").upper() == "ABC"
    assert Pending(done("abc"), "x").result() == "abc"
    assert list(Pending(done([None, -1.0]), "x")) == [None, -1.0]
    assert (len(Pending(done([3, 4]), "x")), Pending(done([3, 4]), "x")[1]) == (2, 4)
    assert Pending(Future(), "x")  # asking for its truth does not wait


async def test_it_can_be_awaited():
    future: Future = Future()
    asyncio.get_running_loop().call_later(0.01, future.set_result, 5)
    assert await Pending(future, "x") == 5


def test_a_wait_that_is_too_long_says_so_and_the_operation_goes_on():
    future: Future = Future()
    pending = Pending(future, "slow thing")
    with pytest.raises(TimeoutError):
        pending.result(timeout=0.01)
    future.set_result(1)
    assert pending.result() == 1


def test_a_failure_is_unseen_until_somebody_looks_through_any_view_of_it():
    pending = Pending(failed(), "x")
    view = pending.then(lambda value: value)
    with pytest.raises(InvalidRequest):
        view.result()
    assert pending.unseen_failure() is None

    unseen = Pending(failed(), "x")
    assert isinstance(unseen.unseen_failure(), InvalidRequest)
    assert unseen.unseen_failure() is None


def test_a_chain_waits_for_all_and_keeps_their_order():
    first, second = Future(), Future()
    combined = chain([first, second], list)
    second.set_result(2)
    assert not combined.done()
    first.set_result(1)
    assert combined.result() == [1, 2]


def test_a_chain_fails_as_soon_as_one_of_its_parts_has():
    combined = chain([Future(), failed()], list)
    assert isinstance(combined.exception(), InvalidRequest)


def test_what_jupyter_and_debuggers_probe_for_waits_for_nothing():
    pending = Pending(Future(), "sample")  # under way for ever
    probes = [
        "_repr_html_",
        "_repr_mimebundle_",
        "_repr_png_",
        "_ipython_display_",
        "__wrapped__",
        "__dataclass_fields__",
    ]
    probes += [
        "_ipython_canary_method_should_not_exist_",
        "_repr_pretty_",
        "__rich_repr__",
        "__html__",
        "__array__",
    ]
    assert [name for name in probes if hasattr(pending, name)] == []
    assert repr(pending) == "<sample: under way>"


def test_a_failure_between_two_looks_is_not_missed():
    class EndsWhenLookedAt(Pending[int]):
        """Fails just after it has been found under way."""

        def done(self) -> bool:
            was_done = super().done()
            if not was_done:
                self._future.set_exception(RuntimeError("late"))
            return was_done

    pending = EndsWhenLookedAt(Future(), "work")
    failure, under_way = first_failure([pending])
    assert failure is None and list(under_way) == [pending]
    failure, under_way = first_failure(under_way)
    assert str(failure) == "late" and not under_way
    assert first_failure([pending]) == (None, deque())
