"""What is said of an engine that can't start: one sentence, whatever was raised."""

import logging

import pytest

from twinkle.protocol import messages as m
from twinkle.protocol.errors import InvalidRequest, ServerFault, Unavailable
from twinkle.server.serve.deployments import EngineDeployment, _in_words


def test_what_is_meant_for_people_is_told_as_it_is() -> None:
    error = InvalidRequest("model: it is not whole")
    assert _in_words(error) is error


@pytest.mark.parametrize(
    ("error", "beginning"),
    [
        (TypeError("int() of a list\n  File x, line 1\n  ..."), "TypeError: int() of a list ("),
        (AssertionError(), "AssertionError: it says no more ("),
        (RuntimeError("x" * 10_000), "RuntimeError: xxx"),
    ],
)
def test_what_nobody_thought_of_is_one_sentence_and_its_place_is_in_the_log(
    error: Exception, beginning: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "twinkle.server"):
        told = _in_words(error)
    assert isinstance(told, ServerFault) and told.message.startswith(beginning)
    assert "\n" not in told.message and len(told.message) < 600
    [record] = caplog.records
    assert record.exc_info is not None and record.exc_info[1] is error


async def test_clients_of_an_engine_that_could_not_start_are_asked_to_wait():
    engine = EngineDeployment.__new__(EngineDeployment)
    engine._start_failure = InvalidRequest("model: there is no such directory")
    engine._is_closing = False
    answer = await engine.submit("alice", m.UnloadModelRequest(model_id="r"))
    assert isinstance(answer, Unavailable) and "there is no such directory" in answer.message
    assert await engine.start_failure() is engine._start_failure
