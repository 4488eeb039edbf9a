"""Promises, and how their results are fetched."""

from typing import Literal, TypeAlias

from pydantic import Field

from twinkle.protocol.errors import Category
from twinkle.protocol.messages.base import Number, Offset
from twinkle.protocol.types import Texts, Value


class Promise(Value):
    """What the server has accepted; `RetrieveFutureRequest` fetches the result."""

    request_id: str
    model_id: str | None = None
    sample_sequence_ids: list[str] | None = None


class RetrieveFutureRequest(Value):
    """With `allow_metadata_only` a large result may be announced by its size first."""

    request_id: str
    allow_metadata_only: bool = False


class CompleteMetadata(Value):
    """The result is there, and is so large: ask for it when there is room."""

    response_payload_size: int
    status: Literal["complete_metadata"] = "complete_metadata"


class CancelFutureRequest(Value):
    """Nobody waits for this sample any more."""

    request_id: str


class SamplingSessionTarget(Value):
    """One client of a sampling session: that which made it is 0, others have the number they were given on joining."""

    sampling_session_id: str
    cloned_sampler_id: Number = 0
    type: Literal["sampling_session"] = "sampling_session"


class RetrieveFuturesRequest(Value):
    """Which samples of a client have ended since `prev_cursor`; one long poll for all of them.

    Attributes:
        prev_cursor: that of the previous reply; what came up to it has been seen.
        timeout: seconds; 0 answers at once, None waits as long as the server likes.
        retrieved_request_ids: results that have arrived at the client.
    """

    target: SamplingSessionTarget
    prev_cursor: Offset = 0
    timeout: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    retrieved_request_ids: Texts = Field(default_factory=list[str])


class Completion(Value):
    """A sample that has ended."""

    state: Literal["finished", "failed"]
    request_id: str
    response_payload_uncompressed_size: int | None = None


class RetrieveFuturesResponse(Value):
    completions: list[Completion]
    cursor: int


QueueState: TypeAlias = Literal["active", "paused_capacity", "paused_rate_limit"]


class Pending(Value):
    """Not done yet: ask again."""

    request_id: str
    queue_state: QueueState = "active"
    queue_state_reason: str | None = None
    type: Literal["try_again"] = "try_again"


class Failure(Value):
    """An accepted operation failed."""

    error: str
    category: Category
