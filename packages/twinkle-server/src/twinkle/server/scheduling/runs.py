"""A training run: its requests in order of `seq_id`, and all that is known of its state.

`Run` is the only owner of that. The scheduler, snapshots, residency and the journal's compaction keep only indices over
runs: which are ready, which are due for a snapshot, which were used last.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TypeAlias

from twinkle.protocol import messages as m
from twinkle.protocol.errors import Conflict, InvalidRequest
from twinkle.protocol.uris import CheckpointUri
from twinkle.server.backends.protocol import AdapterSpec, AdapterState, CustomLoss

RunRequest: TypeAlias = m.Ordered | m.CreateModelRequest | m.UnloadModelRequest
ReadCheckpoint: TypeAlias = tuple[CheckpointUri, AdapterState]

# How many answered ids a run remembers for retries, and how far ahead of the next id a request may be.
MAX_REMEMBERED = 1024
MAX_AHEAD = 4096


@dataclass(frozen=True, eq=False)
class Received:
    """A request as it arrived. Its bytes go only to the journal.

    Attributes:
        body: the bytes it was decoded from; None if it was made in this process.
        digest: see `operations.digest`; empty if it is never retried.
    """

    request: m.Operation
    body: bytes | None = None
    digest: bytes = b""


@dataclass(frozen=True, eq=False)
class Job:
    """One accepted request on a run: typed data, never a callable, so that it can be printed, fused and journaled.

    Attributes:
        request_id: of the future that its result completes.
        seq_id: its place in the run's order; creation is 0.
        tokens: its cost for fairness: the tokens of a training pass, 0 for other jobs.
        custom_loss: the loss that a pass with the loss "custom" names by its id.
        digest: of the request; empty if unknown.
    """

    request_id: str
    run: Run
    seq_id: int
    request: RunRequest
    tokens: int = 0
    custom_loss: CustomLoss | None = None
    digest: bytes = b""


class RunQueue:
    """Jobs of one run. They may arrive out of order; a rejected id counts as consumed; a duplicate request gets the
    first one's result.
    """

    def __init__(self, first_seq_id: int = 0) -> None:
        self._next = first_seq_id
        self._waiting: dict[int, Job | None] = {}  # None: rejected
        self._seen: OrderedDict[int, tuple[str, type[RunRequest], bytes]] = OrderedDict()
        self._held: Job | None = None  # taken, to be given back
        self._back: Job | None = None  # given back

    def duplicate_of(self, seq_id: int, received: Received) -> str | None:
        """The request id under which `seq_id` was accepted before, if it was.

        Raises:
            InvalidRequest: if that was a request of another kind, with another kind of result.
            Conflict: if it was of the same kind but with other content.
        """
        if seq_id not in self._seen:
            return None
        request_id, kind, first = self._seen[seq_id]
        if not isinstance(received.request, kind):
            raise InvalidRequest(
                f"seq_id: {seq_id} was used before on this run, for {kind.__name__}; the next free one is "
                f"{self.next_free}"
            )
        if first and received.digest and received.digest != first:
            raise Conflict(
                f"seq_id: {seq_id} was used before on this run, for a {kind.__name__} that asks for something else: a "
                f"request that is sent again must be the same; the next free one is {self.next_free}"
            )
        return request_id

    def check(self, seq_id: int) -> bool:
        """Whether all others wait for this `seq_id`.

        Raises:
            InvalidRequest: if it was consumed long ago, was rejected, or is too far ahead.
        """
        if seq_id < self._next or seq_id in self._waiting:
            raise InvalidRequest(
                f"seq_id: {seq_id} was used before on this run; the next free one is {self.next_free}"
            )
        if seq_id >= self._next + MAX_AHEAD:
            raise InvalidRequest(
                f"seq_id: {seq_id} is too far ahead: this run waits for {self._next}; send that one first"
            )
        return seq_id == self._next

    @property
    def next_id(self) -> int:
        """The `seq_id` that all others wait for."""
        return self._next

    @property
    def missing(self) -> int | None:
        """The `seq_id` that has not arrived, while later ones wait for it."""
        is_waiting = self._waiting and self._held is None and self._back is None
        return self._next if is_waiting and self._next not in self._waiting else None

    @property
    def next_free(self) -> int:
        return max(self._waiting, default=self._next - 1) + 1

    def offer(self, job: Job) -> Job | None:
        """Queue a job whose id has passed `check`; returns the head."""
        self._waiting[job.seq_id] = job
        self.remember(job.seq_id, job.request_id, type(job.request), job.digest)
        return self.head

    def remember(self, seq_id: int, request_id: str, kind: type[RunRequest], digest: bytes = b"") -> None:
        """Remember a request, so that a duplicate gets its result."""
        self._seen[seq_id] = request_id, kind, digest
        while len(self._seen) > MAX_REMEMBERED:
            self._seen.popitem(last=False)

    def reject(self, seq_id: int) -> None:
        """Count a refused request's id as consumed; the client goes on with the next."""
        if self._next <= seq_id < self._next + MAX_AHEAD:
            self._waiting.setdefault(seq_id, None)
            self._skip_rejected()

    def close_gaps(self) -> list[int]:
        """Count every missing id before the last one as consumed; returns them."""
        missing = [seq_id for seq_id in range(self._next, self.next_free) if seq_id not in self._waiting]
        self._waiting.update(dict.fromkeys(missing))
        self._skip_rejected()
        return missing

    @property
    def head(self) -> Job | None:
        """The next job, if all before it were taken or rejected."""
        if self._held is not None:
            return None
        return self._back or self._waiting.get(self._next)

    def take(self, room: float) -> tuple[list[Job], Job | None]:
        """The next passes within `room` tokens, with the first other job behind them; and the head that is left."""
        taken: list[Job] = []
        while (job := self.head) is not None and job.tokens <= room:
            if self._back is not None:
                self._back = None
            else:
                del self._waiting[self._next]
                self._next += 1
                self._skip_rejected()
            taken.append(job)
            room -= job.tokens
            if not isinstance(job.request, m.ForwardBackwardRequest):
                break
        return taken, self.head

    def hold(self, job: Job) -> None:
        """Stop the queue until this job, just taken, is given back."""
        self._held = job

    def give_back(self, job: Job) -> None:
        """Make it the next job again."""
        self._held, self._back = None, job

    def why_waiting(self, request_id: str) -> str:
        """Why a request of this run has no result yet, in words."""
        if any(job is not None and job.request_id == request_id for job in (self._held, self._back)):
            return "its checkpoint is being read"
        places = [seq_id for seq_id, job in self._waiting.items() if job and job.request_id == request_id]
        if not places:
            return "it is being computed"
        before = sum(job is not None and seq_id < places[0] for seq_id, job in self._waiting.items())
        if self._next not in self._waiting:
            return f"it has seq_id {places[0]}, and seq_id {self._next} of this run has not arrived yet"
        return f"{before} requests of this run go before it"

    def drain(self) -> list[Job]:
        """Take out all jobs and forget everything: the run has ended."""
        waiting = [job for _, job in sorted(self._waiting.items())]
        jobs = [job for job in (self._held, self._back, *waiting) if job is not None]
        self._held = self._back = None
        self._waiting.clear()
        self._seen.clear()
        return jobs

    def _skip_rejected(self) -> None:
        while self._next in self._waiting and self._waiting[self._next] is None:
            del self._waiting[self._next]
            self._next += 1


class RunState(Enum):
    """A run's life cycle, drawn in docs/architecture.md."""

    CREATED = auto()
    """Accepted, but its adapter has not been made."""
    RESIDENT = auto()
    """Its adapter is on the worker."""
    EVICTED = auto()
    """All there is of it is its snapshot on disk (or its seed, if it never changed)."""
    LOST = auto()
    """Its state can't be recovered; `Run.lost` says why."""
    ENDED = auto()
    """It accepts no more requests."""


@dataclass(eq=False)
class RunSnapshot:
    """A run's newest snapshot. A state's number is the `seq_id` of the last request it includes.

    Attributes:
        held: the snapshot, until it is written.
        stored: number of the newest snapshot on disk.
        jobs_since, tokens_since: computed since the snapshot.
        seconds: how long taking the last one stopped the engine.
        writing: the task that writes what is held, or deletes everything once the run has ended.
    """

    held: tuple[int, AdapterState] | None = None
    stored: int | None = None
    jobs_since: int = 0
    tokens_since: int = 0
    seconds: float = 0.0
    writing: asyncio.Task[None] | None = None

    @property
    def number(self) -> int:
        """Of the newest snapshot, held or stored; a new adapter needs none, since its seed reproduces it."""
        return self.held[0] if self.held is not None else self.stored or 0


@dataclass(eq=False)
class Run:
    """A training run.

    Attributes:
        lost: why its state can't be recovered.
        bytes: what its adapter takes on the worker; 0 while not resident.
        changed: the newest request that changed its state; 0 for a new adapter.
        has_gradient: it has accumulated a gradient since its last step.
        unsaved: what changed it since its snapshot, ascending: (number of the call, place in the call, job).
        writes: unfinished writes of its checkpoints.
        reading: the checkpoint for its next job, a load.
        logged: by segment of the journal, the newest of its requests in it.
        waits_since: the missing `seq_id` that later ones wait for, and since when; only for runs restored from a
            journal.
    """

    run_id: str
    tenant: str
    session_id: str
    base_model: str
    spec: AdapterSpec
    queue: RunQueue = field(default_factory=RunQueue, repr=False)
    state: RunState = RunState.CREATED
    lost: str | None = None
    bytes: int = 0
    changed: int = 0
    has_gradient: bool = False
    snapshot: RunSnapshot = field(default_factory=RunSnapshot, repr=False)
    unsaved: deque[tuple[int, int, Job]] = field(default_factory=deque[tuple[int, int, Job]], repr=False)
    writes: set[asyncio.Task[None]] = field(default_factory=set[asyncio.Task[None]], repr=False)
    reading: asyncio.Task[ReadCheckpoint] | None = field(default=None, repr=False)
    logged: dict[int, int] = field(default_factory=dict[int, int], repr=False)
    waits_since: tuple[int, float] | None = None

    @property
    def has_ended(self) -> bool:
        return self.state is RunState.ENDED

    @property
    def is_ahead_of_snapshot(self) -> bool:
        """Whether it has changed since its newest snapshot."""
        return self.snapshot.number < self.changed

    def note_logged(self, segment: int, seq_id: int) -> None:
        """Note that the journal's segment has this request of the run."""
        self.logged[segment] = max(seq_id, self.logged.get(segment, 0))

    def add_write(self, task: asyncio.Task[None]) -> None:
        """Add the task that writes one of the run's checkpoints."""
        self.writes.add(task)
        task.add_done_callback(self.writes.discard)

    async def settled(self) -> None:
        """Wait for the checkpoints being written now, but not for any begun meanwhile."""
        if self.writes:
            await asyncio.wait(set(self.writes))


@dataclass(frozen=True)
class LostRun:
    """What is left of a run whose state or order can't be recovered.

    Attributes:
        reason: the error for requests that still name it.
    """

    run_id: str
    tenant: str
    reason: str

    @property
    def session_id(self) -> str:
        return self.run_id.rpartition(":train:")[0]
