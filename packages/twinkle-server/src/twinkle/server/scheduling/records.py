"""What is written to the journal: which requests were accepted, and what came of them. Encoded as msgpack arrays."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias, cast

import msgpack

from twinkle.hub import plain_name
from twinkle.protocol import codec
from twinkle.protocol import messages as m
from twinkle.protocol.endpoints import OPERATION, OPERATIONS
from twinkle.server.backends.protocol import AdapterSpec
from twinkle.server.engine.runs import LiveRun, LostRun
from twinkle.server.scheduling.futures import Outcome, as_encoded


@dataclass(frozen=True)
class Begun:
    """A run takes requests from now on."""

    run: LiveRun


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
        return codec.decode(self.kind, self.body)

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


def encode(record: Record) -> bytes:
    match record:
        case Begun(run):
            values: list[Any] = ["B", json.dumps(asdict(run))]
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
            return Begun(LiveRun(**run))
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
    body: bytes | None,
    tokens: int = 0,
    digest: bytes = b"",
) -> Accepted:
    """A request as it is written: its body as it was received, unless it may hold a key, which is kept nowhere.

    Args:
        body: None for requests of the server's own.
    """
    if isinstance(request, m.LoadWeightsRequest):
        # Whatever was received: a key may also stand in a field that was sent twice, or under an escaped name.
        request, body = request.model_copy(update={"weights_access_token": None}), None
    path = OPERATION[type(request)].path
    return Accepted(request_id, tenant, run_id, seq_id, tokens, path, body or codec.encode(request), digest)


def done(outcomes: Iterable[tuple[str, Outcome]]) -> Done:
    encoded = [(request_id, as_encoded(outcome)) for request_id, outcome in outcomes]
    return Done([(request_id, outcome.kind, outcome.body) for request_id, outcome in encoded])
