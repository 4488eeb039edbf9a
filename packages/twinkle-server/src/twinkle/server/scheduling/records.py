"""The journal's records: accepted requests and their outcomes, encoded as msgpack arrays.

The service journals what it promises before it answers: a request when it is accepted, a result before anybody gets
it. `engine.restore` reads the journal when a server starts; `engine.compaction` deletes what is no longer needed.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias, cast

import msgpack

from twinkle.protocol import codec
from twinkle.protocol import messages as m
from twinkle.protocol.codec import Encoded, decode_result, encode_result
from twinkle.protocol.endpoints import OPERATION, OPERATIONS
from twinkle.protocol.errors import Unavailable
from twinkle.server.backends.protocol import AdapterSpec
from twinkle.server.scheduling.runs import LostRun, Received, Run
from twinkle.server.store.journal import Journal

log = logging.getLogger("twinkle.server")

# Between a request's id and its engine's name.
ENGINE_MARK = "."

# As computed, or as sent.
Outcome: TypeAlias = m.Result | m.Failure | Encoded


class StepRefused(m.Failure):
    """A step refused because of its gradient, which is dropped: unlike other failures this one changed its run."""


@dataclass(frozen=True)
class Begun:
    """A run accepts requests from now on."""

    run_id: str
    tenant: str
    session_id: str
    base_model: str
    spec: AdapterSpec


@dataclass(frozen=True)
class Accepted:
    """A request that was answered with a promise.

    Attributes:
        run_id: None for a request on no run.
        seq_id: its place in the run's order.
        path: of its endpoint.
        body: as the endpoint takes it; None once only its id and result matter.
        digest: of the request, to recognize a retry; empty in records of earlier versions, and for requests on no run.
    """

    request_id: str
    tenant: str
    run_id: str | None
    seq_id: int
    tokens: int
    path: str
    body: bytes | None
    digest: bytes = b""

    def request(self) -> m.Operation:
        assert self.body is not None, "it can't be done again"
        return codec.decode(self.kind, self.body)

    @property
    def kind(self) -> type[m.Operation]:
        return _REQUESTS[self.path]


@dataclass(frozen=True)
class Rejected:
    """A refused request; its place in the run's order is used up."""

    run_id: str
    seq_id: int


@dataclass(frozen=True)
class Done:
    """The outcomes of one call, as (request id, type's name, encoded)."""

    outcomes: Sequence[tuple[str, str, bytes]]


@dataclass(frozen=True)
class Ended:
    """A run accepts no more requests."""

    run_id: str


@dataclass(frozen=True)
class Lost:
    """A lost run; requests that name it are refused with the reason."""

    run: LostRun


Record: TypeAlias = Begun | Accepted | Rejected | Done | Ended | Lost

_REQUESTS: dict[str, type[m.Operation]] = {endpoint.path: endpoint.request for endpoint in OPERATIONS}


def encode(record: Record) -> bytes:
    match record:
        case Begun():
            values: list[Any] = ["B", json.dumps(asdict(record))]
        case Accepted():
            values = ["A", *vars(record).values()]
        case Rejected(run_id, seq_id):
            values = ["R", run_id, seq_id]
        case Done(outcomes):
            values = ["D", [list(outcome) for outcome in outcomes]]
        case Ended(run_id):
            values = ["E", run_id]
        case Lost(run):
            values = ["L", run.run_id, run.tenant, run.reason]
    return cast("bytes", msgpack.packb(values))


def decode(payload: bytes) -> Record:
    tag, *fields = cast("list[Any]", msgpack.unpackb(payload))
    match tag:
        case "B":
            run: dict[str, Any] = json.loads(fields[0])
            run["spec"] = AdapterSpec(**run["spec"])
            return Begun(**run)
        case "A":
            return Accepted(*fields)
        case "R":
            return Rejected(*fields)
        case "D":
            return Done([(request_id, kind, body) for request_id, kind, body in fields[0]])
        case "E":
            return Ended(*fields)
        case "L":
            return Lost(LostRun(*fields))
        case _:
            raise ValueError(
                f"the journal has a record of an unknown kind, {tag!r}: a later version wrote it"
            )


def as_computed(outcome: Outcome) -> m.Result | m.Failure:
    return decode_result(outcome) if isinstance(outcome, Encoded) else outcome


class RunLog:
    """Writes to the journal. Single-threaded: called on one event loop. Writes nothing until a journal is opened."""

    def __init__(self, engine: str | None = None) -> None:
        """
        Args:
            engine: named in the ids of requests, where there are several.
        """
        self._suffix = "" if engine is None else f"{ENGINE_MARK}{engine}"
        self.journal: Journal | None = None
        self._is_full = False
        self._is_closed = False

    def open(self, journal: Journal) -> None:
        """Write to `journal` from now on."""
        self.journal = journal

    def begun(self, run: Run) -> None:
        """
        Raises:
            Unavailable: if it can't be written.
        """
        self.append(Begun(run.run_id, run.tenant, run.session_id, run.base_model, run.spec))

    def accepted(self, tenant: str, run: Run | None, seq_id: int, received: Received, tokens: int = 0) -> str:
        """Write a request, on a run or on none; returns its new id. The body is written as received, unless it may hold
        a key: keys are stored nowhere.

        Raises:
            Unavailable: if it can't be written; then it is not accepted.
        """
        request_id = uuid.uuid4().hex + self._suffix
        if self._is_closed:
            raise _stopping()
        if self.journal is None:
            return request_id
        request, body = received.request, received.body
        if isinstance(request, m.LoadWeightsRequest):
            # Not as received: a key may also be in a field that was sent twice, or under an escaped name.
            request, body = request.model_copy(update={"weights_access_token": None}), None
        run_id, digest = (None, b"") if run is None else (run.run_id, received.digest)
        path, body = OPERATION[type(request)].path, body or codec.encode(request)
        self.append(Accepted(request_id, tenant, run_id, seq_id, tokens, path, body, digest))
        if run is not None:
            run.note_logged(self.journal.segment, seq_id)
        return request_id

    def rejected(self, run: Run, seq_id: int) -> None:
        self._try(Rejected(run.run_id, seq_id))

    def done(self, outcomes: Sequence[tuple[str, Outcome]]) -> None:
        """The outcomes of one call; what can't be written is computed again after a crash."""
        if self.journal is not None:
            encoded = [(each, o if isinstance(o, Encoded) else encode_result(o)) for each, o in outcomes]
            self._try(Done([(each, outcome.kind, outcome.body) for each, outcome in encoded]))

    def ended(self, run: Run) -> None:
        self._try(Ended(run.run_id))

    def lost(self, run: LostRun) -> None:
        self._try(Lost(run))

    def append(self, record: Record) -> None:
        """
        Raises:
            Unavailable: if it can't be written.
        """
        if self._is_closed:
            raise _stopping()
        if self.journal is not None:
            self.journal.append(encode(record))
            self._is_full = False

    def _try(self, record: Record) -> None:
        if self._is_closed:
            return  # the next process, or another engine, does it again
        try:
            self.append(record)
        except Unavailable as error:
            if not self._is_full:  # logged once, not for every record
                log.error("%s", error.message)
            self._is_full = True

    def close(self) -> None:
        """Write nothing, and so accept nothing, from now on."""
        self._is_closed = True
        if self.journal is not None:
            self.journal.close()
            self.journal = None


def _stopping() -> Unavailable:
    return Unavailable("the engine is being stopped, and accepts nothing more; try again", 2.0)
