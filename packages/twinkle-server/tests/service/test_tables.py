"""Whatever the protocol offers is answered by exactly one handler."""

from twinkle.protocol import endpoints
from twinkle.protocol import messages as m
from twinkle.server.service import accounts, checkpoint_queries, queries, sampling, session_queries, training
from twinkle.server.service.service import OPERATIONS, QUERIES


def test_each_operation_of_the_protocol_has_a_handler():
    assert set(OPERATIONS) == set(endpoints.OPERATION)


def test_each_query_of_the_protocol_has_a_handler():
    # An archive is asked for at a route of its own, since it is answered with a redirection.
    assert set(QUERIES) == set(endpoints.QUERIES) | {m.GetCheckpointArchive}


def test_no_request_has_two_handlers():
    modules = (queries, session_queries, sampling, checkpoint_queries, accounts)
    assert sum(len(module.QUERIES) for module in modules) == len(QUERIES)
    assert len(training.OPERATIONS) + len(sampling.OPERATIONS) == len(OPERATIONS)
