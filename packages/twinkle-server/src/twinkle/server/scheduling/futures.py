"""Results, from acceptance of a request until some time after they were fetched."""

import asyncio
import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from twinkle.protocol import messages as m
from twinkle.protocol.codec import Encoded, encode_result
from twinkle.protocol.errors import NotFound
from twinkle.protocol.types import ForwardBackwardOutput, SampleResponse, SparseTensor
from twinkle.server.scheduling.records import Outcome, RunLog
from twinkle.server.scheduling.runs import Run

Fetched: TypeAlias = Encoded | m.TryAgain | m.CompleteMetadata | NotFound
"""What a client waiting for a result gets."""


@dataclass
class Load:
    """Unfinished requests, their tokens, and the memory taken by unfetched results."""

    requests: int = 0
    tokens: int = 0
    unfetched_bytes: int = 0

    @property
    def is_nothing(self) -> bool:
        return not self.requests and not self.unfetched_bytes


@dataclass(eq=False)
class _Entry:
    tenant: str
    session_id: str
    run: Run | None
    tokens: int
    outcome: Outcome | None = None
    size: int = 0  # of the outcome, in bytes
    done: asyncio.Event = field(default_factory=asyncio.Event)


_NO_LOAD = Load()
# Results with more numbers than this are encoded in a thread.
_LARGE = 2**16
# For fetched results, which are needed again only if a reply was lost.
_KEEP_BYTES = 256 * 2**20


class FutureTable:
    """Futures by request id. Single-threaded: called on one event loop.

    A result is kept for `keep_seconds` after it was last fetched (a reply can be lost), or for `unfetched_seconds` if
    it never was. Beyond a limit of bytes the oldest are dropped earlier.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        log: RunLog,
        keep_seconds: float = 600.0,
        unfetched_seconds: float = 86_400.0,
        keep_bytes: float = _KEEP_BYTES,
        unfetched_bytes: float = math.inf,
        encodes: bool = False,
    ) -> None:
        """
        Args:
            log: gets each outcome before anybody else.
            encodes: keep outcomes encoded, so that the journal and all replies share one encoding; False in local mode,
                where nothing is sent.
        """
        self._clock = clock
        self._log = log
        self._keep_seconds = keep_seconds
        self._unfetched_seconds = unfetched_seconds
        self._keep_bytes = keep_bytes
        self._most_unfetched_bytes = unfetched_bytes
        self._fetched_bytes = 0
        self._entries: dict[str, _Entry] = {}
        self.load = Load()
        """Total over all tenants."""
        self._loads: dict[str, Load] = {}
        self._encodes = encodes
        # request id -> when it may be dropped. Each is sorted by deadline, oldest first.
        self._unfetched: OrderedDict[str, float] = OrderedDict()
        self._fetched: OrderedDict[str, float] = OrderedDict()
        self.note = ""
        """Appended to the error for an unknown future."""

    def __len__(self) -> int:
        return len(self._entries)

    def create(
        self, request_id: str, tenant: str, session_id: str, run: Run | None = None, tokens: int = 0
    ) -> None:
        """Create a future.

        Args:
            run: the run that it belongs to, if any.
            tokens: what its request adds to the tenant's load until it has an outcome.
        """
        self._entries[request_id] = _Entry(tenant, session_id, run, tokens)
        for load in (self.load, self._loads.setdefault(tenant, Load())):
            load.requests += 1
            load.tokens += tokens

    def load_of(self, tenant: str) -> Load:
        return self._loads.get(tenant, _NO_LOAD)

    def _set_outcome(self, request_id: str, outcome: Outcome) -> None:
        entry = self._entries[request_id]
        entry.outcome, entry.size = outcome, memory_of(outcome)
        entry.done.set()
        for load in (self.load, self._loads[entry.tenant]):
            load.requests -= 1
            load.tokens -= entry.tokens
            load.unfetched_bytes += entry.size
        self._unfetched[request_id] = self._clock() + self._unfetched_seconds

    def restore(self, request_id: str, outcome: Outcome) -> None:
        """Set an outcome from an earlier process."""
        self._set_outcome(request_id, *self._as_kept([outcome]))

    def _as_kept(self, outcomes: Iterable[Outcome]) -> list[Outcome]:
        encodes = self._encodes
        return [encode_result(o) if encodes and not isinstance(o, Encoded) else o for o in outcomes]

    async def encoded(self, result: ForwardBackwardOutput | SampleResponse) -> Outcome:
        """The outcome as `complete` keeps it; large ones are encoded in a thread, to keep the event loop free."""
        if _size_of(result) <= _LARGE:
            return result
        [outcome] = await asyncio.to_thread(self._as_kept, [result])
        return outcome

    def run_of(self, request_id: str) -> Run | None:
        """The run that a future belongs to, if any."""
        entry = self._entries.get(request_id)
        return entry.run if entry is not None else None

    def sessions_of(self, tenant: str, request_ids: Iterable[str]) -> set[str]:
        """The sessions of the tenant's futures among these."""
        entries = [self._entries.get(request_id) for request_id in request_ids]
        return {entry.session_id for entry in entries if entry is not None and entry.tenant == tenant}

    def is_known(self, request_id: str) -> bool:
        """Whether it can still be asked for."""
        return request_id in self._entries

    def is_pending(self, request_id: str) -> bool:
        """Whether it is known and has no outcome yet."""
        entry = self._entries.get(request_id)
        return entry is not None and entry.outcome is None

    def complete(self, request_id: str, outcome: Outcome, record: bool = True) -> None:
        """Set the outcome and wake the waiters; a second outcome is ignored.

        Args:
            record: False leaves it out of the log until `record`; another process would have to do the request again.
        """
        self.complete_together([(request_id, outcome)], record)

    def complete_together(self, outcomes: Sequence[tuple[str, Outcome]], record: bool = True) -> set[str]:
        """`complete` for the results of one call; returns those that had no outcome before."""
        pending = {request_id: outcome for request_id, outcome in outcomes if self.is_pending(request_id)}
        new = list(zip(pending, self._as_kept(pending.values()), strict=True))
        if new and record:
            self._log.done(new)
        for request_id, outcome in new:
            self._set_outcome(request_id, outcome)
        self._drop_old()
        return set(pending)

    def record(self, request_id: str) -> None:
        """Log an outcome that was set with record=False: the request need not be done again."""
        entry = self._entries.get(request_id)
        if entry is not None and entry.outcome is not None:
            self._log.done([(request_id, entry.outcome)])

    async def wait(self, tenant: str, request_id: str, timeout: float) -> Outcome | None:
        """The outcome, or None if there is none after `timeout` seconds. Counts as fetched.

        Raises:
            NotFound: no such future, or another tenant's.
        """
        [outcome] = await self.look(tenant, [request_id], timeout)
        if isinstance(outcome, NotFound):
            raise outcome
        if outcome is not None:
            self.fetched([request_id])
        return outcome

    async def look(
        self, tenant: str, request_ids: Collection[str], timeout: float
    ) -> list[Outcome | NotFound | None]:
        """As `wait`, for several: returns once all are there. Doesn't count as fetched."""
        entries = [self._entry(tenant, request_id) for request_id in request_ids]
        try:
            async with asyncio.timeout(timeout):
                for entry in entries:
                    if isinstance(entry, _Entry) and entry.outcome is None:
                        await entry.done.wait()
        except TimeoutError:
            pass
        return [entry.outcome if isinstance(entry, _Entry) else entry for entry in entries]

    def _entry(self, tenant: str, request_id: str) -> _Entry | NotFound:
        entry = self._entries.get(request_id)
        if entry is not None and entry.tenant == tenant:
            return entry
        return NotFound(
            f"request_id: {request_id[:80]!r} is not known here; results are kept for "
            f"{self._keep_seconds / 60:.0f} minutes after they were fetched, and for a day where nobody came{self.note}"
        )

    def fetched(self, request_ids: Iterable[str]) -> None:
        """Mark these outcomes as fetched."""
        for request_id in request_ids:
            entry = self._entries.get(request_id)
            if entry is None:
                continue
            if self._unfetched.pop(request_id, None) is not None:
                self._is_unfetched_no_more(entry)
                self._fetched_bytes += entry.size
            self._fetched[request_id] = self._clock() + self._keep_seconds
            self._fetched.move_to_end(request_id)

    def _is_unfetched_no_more(self, entry: _Entry) -> None:
        own = self._loads[entry.tenant]
        for load in (self.load, own):
            load.unfetched_bytes -= entry.size
        if own.is_nothing:
            del self._loads[entry.tenant]

    def _drop_old(self) -> None:
        now = self._clock()
        while self._fetched and (
            self._fetched_bytes > self._keep_bytes or next(iter(self._fetched.values())) <= now
        ):
            request_id, _ = self._fetched.popitem(last=False)
            self._fetched_bytes -= self._entries.pop(request_id).size
        while self._unfetched and (
            self.load.unfetched_bytes > self._most_unfetched_bytes
            or next(iter(self._unfetched.values())) <= now
        ):
            request_id, _ = self._unfetched.popitem(last=False)
            self._is_unfetched_no_more(self._entries.pop(request_id))


# Overhead of Python's objects for one result.
_RESULT_BYTES = 2048


def memory_of(outcome: Outcome) -> int:
    """Approximate memory of an outcome, in bytes. (An unencoded one, in local mode, is fetched at once.)"""
    return _RESULT_BYTES + (len(outcome.body) if isinstance(outcome, Encoded) else 0)


def _size_of(result: ForwardBackwardOutput | SampleResponse) -> int:
    """Approximate number of numbers in a result."""
    if isinstance(result, ForwardBackwardOutput):
        return sum(tensor.array.size for output in result.loss_fn_outputs for tensor in output.values())
    size = sum(len(sequence.tokens) for sequence in result.sequences) + len(result.prompt_logprobs or ())
    for table in (result.topk_prompt_logprobs, *(sequence.topk_logprobs for sequence in result.sequences)):
        size += len(table) * len(table[-1] or "-") if table else 0
    if (targets := result.target_prompt_logprobs) is not None:
        size += (targets.values if isinstance(targets, SparseTensor) else targets.array).size
    if result.prompt_alt_tokens is not None:
        size += result.prompt_alt_tokens.tokens.array.size
    return size
