"""Several operations in one request: what is written is what is read, and nothing else is let in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinkle.protocol import operations
from twinkle.protocol import twinkle_pb2 as pb
from twinkle.protocol.errors import InvalidRequest, TooLarge
from twinkle.protocol.operations import ENDPOINTS, MAX_OPERATIONS, Posted, Reply

OPERATIONS = st.builds(Posted, st.sampled_from(list(ENDPOINTS.values())), st.binary(max_size=200))
REPLIES = st.builds(Reply, st.text(), st.integers(200, 599), st.text(), st.binary(max_size=200))


@given(st.lists(OPERATIONS, max_size=MAX_OPERATIONS))
def test_a_request_is_read_as_it_was_written(posted: list[Posted]):
    assert operations.decode_request(operations.encode_request(posted)) == posted


@given(st.lists(REPLIES, max_size=MAX_OPERATIONS))
def test_a_reply_is_read_as_it_was_written(replies: list[Reply]):
    assert operations.decode_reply(operations.encode_reply(replies)) == replies


def test_only_what_a_run_does_in_order_and_samples_can_stand_in_it():
    assert set(ENDPOINTS) == {
        "/forward_backward",
        "/optim_step",
        "/save_weights",
        "/save_weights_for_sampler",
        "/save_weights_external",
        "/load_weights",
        "/asample",
    }
    with pytest.raises(InvalidRequest, match="'/create_model' can't stand here"):
        operations.decode_request(
            pb.OperationsRequest(operations=[pb.Operation(path="/create_model")]).SerializeToString()
        )


def test_too_many_are_refused():
    one = Posted(ENDPOINTS["/optim_step"], b"")
    with pytest.raises(TooLarge, match=f"more than {MAX_OPERATIONS}"):
        operations.decode_request(operations.encode_request([one] * (MAX_OPERATIONS + 1)))
