"""What is written to the journal: which requests were accepted, and what came of them. Encoded as msgpack arrays.

The service writes down what it answers for before it answers: a request when it is accepted, a result before anybody
has it. `engine.restore` reads it when a server starts; `engine.compaction` deletes what is no longer needed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias, cast

import msgpack
from pydantic import BaseModel

from twinkle.hub import plain_name
from twinkle.protocol import codec
from twinkle.protocol import messages as m
from twinkle.protocol.endpoints import OPERATION, OPERATIONS
from twinkle.protocol.errors import Unavailable
from twinkle.protocol.results import Encoded, encode_result
from twinkle.protocol.types import ForwardBackwardOutput, SampleResponse
from twinkle.server.backends.protocol import AdapterSpec
from twinkle.server.scheduling.runs import Job, LostRun, Run, RunQueue
from twinkle.server.store.journal import Journal

log = logging.getLogger("twinkle.server")

# As it was computed, or as it travels.
Outcome: TypeAlias = m.Result | m.Failure | Encoded


class StepRefused(m.Failure):
    """A step that was not made because of its gradient, which is gone: unlike other failures it has changed its run."""


@dataclass(frozen=True)
class Begun:
    """A run takes requests from now on."""

    run_id: str
    tenant: str
    session_id: str
    base_model: str
    spec: AdapterSpec

    def make_run(self, first_seq_id: int = 0) -> Run:
        return Run(
            self.run_id, self.tenant, self.session_id, self.base_model, self.spec, RunQueue(first_seq_id)
        )


@dataclass(frozen=True)
class Accepted:
    """A request that was answered with a promise.

    Attributes:
        run_id: None for those on no run.
        seq_id: its place in the run's order.
        path: of its endpoint.
        body: as the endpoint takes it; None once nothing but its id and its result matter.
        digest: of the request, by which it is known again; empty in what earlier versions wrote, and on no run.
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
        kind = _REQUESTS[self.path]
        if kind is m.ForwardBackwardRequest:
            return codec.decode_forward_backward(self.body)
        return cast("m.Operation", codec.decode_json(cast("Any", kind), self.body))

    @property
    def kind(self) -> type[m.Operation]:
        return _REQUESTS[self.path]


@dataclass(frozen=True)
class Rejected:
    """A request that was refused; its place in the run's order is taken."""

    run_id: str
    seq_id: int


@dataclass(frozen=True)
class Done:
    """What came of one call: (request id, type's name, encoded) each."""

    outcomes: Sequence[tuple[str, str, bytes]]


@dataclass(frozen=True)
class Ended:
    """A run takes no more requests."""

    run_id: str


@dataclass(frozen=True)
class Lost:
    """A run can't go on; who asks for it is told so."""

    run: LostRun


Record: TypeAlias = Begun | Accepted | Rejected | Done | Ended | Lost

_REQUESTS: dict[str, type[m.Operation]] = {endpoint.path: endpoint.request for endpoint in OPERATIONS}
_JSON_OUTCOMES: dict[str, Any] = {
    kind.__name__: kind
    for kind in (m.Failure, StepRefused, *(endpoint.result for endpoint in OPERATIONS))
    if kind not in (ForwardBackwardOutput, SampleResponse)
}


def encode(record: Record) -> bytes:
    match record:
        case Begun():
            values: list[Any] = ["B", json.dumps(asdict(record))]
        case Accepted():
            values = [
                "A",
                record.request_id,
                record.tenant,
                record.run_id,
                record.seq_id,
                record.tokens,
                record.path,
                record.body,
                record.digest,
            ]
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
            # Earlier versions noted the model as their configuration spelled it.
            run |= {"spec": AdapterSpec(**run["spec"]), "base_model": plain_name(run["base_model"])}
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


def accepted(
    request_id: str,
    tenant: str,
    run_id: str | None,
    seq_id: int,
    request: m.Operation,
    tokens: int = 0,
    digest: bytes = b"",
) -> Accepted:
    """A request as it is written: without keys, which are kept nowhere."""
    if isinstance(request, m.LoadWeightsRequest) and request.weights_access_token is not None:
        request = request.model_copy(update={"weights_access_token": None})
    body = (
        codec.encode_forward_backward(request)
        if isinstance(request, m.ForwardBackwardRequest)
        else codec.encode_json(request)
    )
    return Accepted(request_id, tenant, run_id, seq_id, tokens, OPERATION[type(request)].path, body, digest)


def encoded(outcome: Outcome) -> Outcome:
    """As it travels, where that is protobuf."""
    return encode_result(outcome) if isinstance(outcome, ForwardBackwardOutput | SampleResponse) else outcome


def encode_outcome(request_id: str, outcome: Outcome) -> tuple[str, str, bytes]:
    outcome = encoded(outcome)
    if isinstance(outcome, Encoded):
        return request_id, outcome.kind, outcome.body
    return request_id, type(outcome).__name__, codec.encode_json(cast("BaseModel", outcome))


def decode_outcome(kind: str, body: bytes) -> Outcome:
    """As it is kept: what travels as protobuf stays so."""
    if kind == "ForwardBackwardOutput" or kind == "SampleResponse":
        return Encoded(kind, body)
    return cast("Outcome", codec.decode_json(_JSON_OUTCOMES[kind], body))


class RunLog:
    """Writes to the journal. Single-threaded: called on one event loop. Until there is a journal nothing is written."""

    def __init__(self) -> None:
        self.journal: Journal | None = None
        self._is_full = False

    def open(self, journal: Journal) -> None:
        """Write to `journal` from now on."""
        self.journal = journal

    def begun(self, run: Run) -> None:
        """
        Raises:
            Unavailable: if it can't be written.
        """
        self.append(Begun(run.run_id, run.tenant, run.session_id, run.base_model, run.spec))

    def accepted(self, job: Job) -> None:
        """
        Raises:
            Unavailable: if it can't be written; then it is not accepted.
        """
        if self.journal is not None:
            run = job.run
            self.append(
                accepted(
                    job.request_id, run.tenant, run.run_id, job.seq_id, job.request, job.tokens, job.digest
                )
            )
            run.note_logged(self.journal.segment, job.seq_id)

    def accepted_on_no_run(self, request_id: str, tenant: str, seq_id: int, request: m.Operation) -> None:
        """
        Raises:
            Unavailable: as `accepted`.
        """
        if self.journal is not None:
            self.append(accepted(request_id, tenant, None, seq_id, request))

    def rejected(self, run: Run, seq_id: int) -> None:
        self._try(Rejected(run.run_id, seq_id))

    def done(self, outcomes: Sequence[tuple[str, Outcome]]) -> None:
        """What came of one call; if it can't be written it is computed again after a crash."""
        if self.journal is not None:
            self._try(Done([encode_outcome(*outcome) for outcome in outcomes]))

    def ended(self, run: Run) -> None:
        self._try(Ended(run.run_id))

    def lost(self, run: LostRun) -> None:
        self._try(Lost(run))

    async def wait_durable(self) -> None:
        """Wait until what was accepted is as durable as `storage.journal_flush` promises."""
        if self.journal is not None:
            await self.journal.wait_durable()

    def append(self, record: Record) -> None:
        """
        Raises:
            Unavailable: if it can't be written.
        """
        if self.journal is not None:
            self.journal.append(encode(record))
            self._is_full = False

    def _try(self, record: Record) -> None:
        try:
            self.append(record)
        except Unavailable as error:
            if not self._is_full:  # said once, not for every record
                log.error("%s", error.message)
            self._is_full = True

    def close(self) -> None:
        """Write nothing from now on."""
        if self.journal is not None:
            self.journal.close()
            self.journal = None
