"""What becomes of a call that failed as a whole."""

import pytest
from scheduled_jobs import a_pass, a_run, a_step

from twinkle.server.engine.calls import Call


@pytest.mark.parametrize("is_repeat", [False, True], ids=["new", "repeated"])
def test_it_is_made_in_parts_which_are_repeats_if_it_was_one(is_repeat: bool):
    one, other = a_run("one"), a_run("other")
    passes = [a_pass(one, 1, tokens=1), a_pass(other, 1, tokens=1)]
    steps = [a_step(one, 2), a_step(other, 2)]
    parts = Call.of([*passes, *steps], is_repeat).smaller()
    assert [part.jobs for part in parts] == [(passes[0],), (passes[1],), tuple(steps)]
    assert {part.is_repeat for part in parts} == {is_repeat}
