"""Promises, and how their results are fetched."""

from typing import Literal, TypeAlias

from pydantic import Field

from twinkle.protocol.errors import Category
from twinkle.protocol.messages.base import Acknowledged, Number, Offset, Query
from twinkle.protocol.types import Texts, Value


class Promise(Value):
    """Service to client: the operation is accepted, and `RetrieveFutureRequest` fetches its result.

    Attributes:
        sample_sequence_ids: of a sample, `num_samples` ids, which the SDK requires.
    """

    request_id: str
    model_id: str | None = None
    sample_sequence_ids: list[str] | None = None


class RetrieveFutureRequest(Value):
    """Client to gateway: a long poll for one result.

    Attributes:
        allow_metadata_only: whether a large result may be announced by its size first.
    """

    request_id: str
    allow_metadata_only: bool = False


class CompleteMetadata(Value):
    """Gateway to SDK: the result is ready; fetch it when there is room for so many bytes."""

    response_payload_size: int
    status: Literal["complete_metadata"] = "complete_metadata"


QueueState: TypeAlias = Literal["active", "paused_capacity", "paused_rate_limit"]


class TryAgain(Value):
    """Gateway to client, with status 408: not done yet, poll again.

    Attributes:
        queue_state_reason: why it waits, in words that clients log.
    """

    request_id: str
    queue_state: QueueState = "active"
    queue_state_reason: str | None = None
    type: Literal["try_again"] = "try_again"


class Failure(Value):
    """Service to client, instead of a result: an accepted operation failed."""

    error: str
    category: Category


class CancelFutureRequest(Query[Acknowledged], method="POST", path="/cancel_future"):
    """Client to service: this sample's result is no longer wanted."""

    request_id: str


class SamplingSessionTarget(Value):
    """Part of `RetrieveFuturesRequest`: one client of a sampling session.

    Attributes:
        cloned_sampler_id: 0 is the client that made the session; others are numbered when they join.
    """

    sampling_session_id: str
    cloned_sampler_id: Number = 0
    type: Literal["sampling_session"] = "sampling_session"


class Completion(Value):
    """Part of `RetrieveFuturesResponse`: a sample that has ended."""

    state: Literal["finished", "failed"]
    request_id: str
    response_payload_uncompressed_size: int | None = None


class RetrieveFuturesResponse(Value):
    """Service to SDK."""

    completions: list[Completion]
    cursor: int


class RetrieveFuturesRequest(Query[RetrieveFuturesResponse], method="POST", path="/retrieve_futures"):
    """SDK to service: which samples of this client have ended since `prev_cursor`? One long poll for all of them.

    Attributes:
        prev_cursor: from the previous reply; everything up to it has been seen.
        timeout: seconds; 0 returns at once, None waits as long as the server likes.
        retrieved_request_ids: results that the client has received.
    """

    target: SamplingSessionTarget
    prev_cursor: Offset = 0
    timeout: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    retrieved_request_ids: Texts = Field(default_factory=list[str])
