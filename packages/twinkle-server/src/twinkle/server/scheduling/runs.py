"""One run's jobs, in the order of `seq_id` whatever order they arrive in."""

from collections import OrderedDict

from twinkle.protocol.errors import Conflict, InvalidRequest
from twinkle.server.scheduling.jobs import Job, Received, RunRequest

# How many answered ids a run remembers for retries, and how far ahead of the next id a request may be.
MAX_REMEMBERED = 1024
MAX_AHEAD = 4096


class RunQueue:
    """Jobs of one run. Chunks may arrive out of order; a rejected id counts as consumed; an id seen before is
    answered from the first request that carried it.
    """

    def __init__(self, first_seq_id: int = 0) -> None:
        self._next = first_seq_id
        self._waiting: dict[int, Job | None] = {}  # None: rejected
        self._seen: OrderedDict[int, tuple[str, type[RunRequest], bytes]] = OrderedDict()
        self._held: Job | None = None  # was taken, and is going to come back
        self._back: Job | None = None  # has come back

    def duplicate_of(self, seq_id: int, received: Received) -> str | None:
        """The request id under which `seq_id` was accepted before, if it was.

        Raises:
            InvalidRequest: if that was a request of another kind, whose result is none of this one.
            Conflict: if it was one of this kind that asked for something else.
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

    def check(self, seq_id: int) -> None:
        """
        Raises:
            InvalidRequest: if `seq_id` was consumed long ago, was rejected, or is absurdly far ahead.
        """
        if seq_id < self._next or seq_id in self._waiting:
            raise InvalidRequest(
                f"seq_id: {seq_id} was used before on this run; the next free one is {self.next_free}"
            )
        if seq_id >= self._next + MAX_AHEAD:
            raise InvalidRequest(
                f"seq_id: {seq_id} is too far ahead: this run waits for {self._next}; send that one first"
            )

    @property
    def next_id(self) -> int:
        """The `seq_id` that all others wait for."""
        return self._next

    @property
    def missing(self) -> int | None:
        """The `seq_id` that has not arrived, though later ones wait for it."""
        is_waiting = self._waiting and self._held is None and self._back is None
        return self._next if is_waiting and self._next not in self._waiting else None

    @property
    def next_free(self) -> int:
        return max(self._waiting, default=self._next - 1) + 1

    def offer(self, job: Job) -> None:
        """Queue a job whose id `check` has passed."""
        self._waiting[job.seq_id] = job
        self.remember(job.seq_id, job.request_id, type(job.request), job.digest)

    def remember(self, seq_id: int, request_id: str, kind: type[RunRequest], digest: bytes = b"") -> None:
        """Have a repeated request answered from the first."""
        self._seen[seq_id] = request_id, kind, digest
        while len(self._seen) > MAX_REMEMBERED:
            self._seen.popitem(last=False)

    def reject(self, seq_id: int) -> None:
        """Count an id as consumed: its request was refused, and the client goes on to the next."""
        if self._next <= seq_id < self._next + MAX_AHEAD:
            self._waiting.setdefault(seq_id, None)
            self._skip_rejected()

    def close_gaps(self) -> list[int]:
        """Count every id that is missing before the last one as consumed; returns them."""
        missing = [seq_id for seq_id in range(self._next, self.next_free) if seq_id not in self._waiting]
        self._waiting.update(dict.fromkeys(missing))
        self._skip_rejected()
        return missing

    def head(self) -> Job | None:
        """The next job, if all before it are done with."""
        if self._held is not None:
            return None
        return self._back or self._waiting.get(self._next)

    def pop(self) -> Job:
        if self._back is not None:
            job, self._back = self._back, None
            return job
        job = self._waiting.pop(self._next)
        assert job is not None, "head() is checked before pop()"
        self._next += 1
        self._skip_rejected()
        return job

    def hold(self, job: Job) -> None:
        """Nothing goes on until this job, which was just taken, is given back."""
        self._held = job

    def give_back(self, job: Job) -> None:
        """It is the next one again."""
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
        """All jobs, taken out: the run is gone."""
        waiting = [job for _, job in sorted(self._waiting.items())]
        jobs = [job for job in (self._held, self._back, *waiting) if job is not None]
        self._held = self._back = None
        self._waiting.clear()
        return jobs

    def _skip_rejected(self) -> None:
        while self._next in self._waiting and self._waiting[self._next] is None:
            del self._waiting[self._next]
            self._next += 1
