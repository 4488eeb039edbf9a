"""What has been computed since the runs were copied, in order: to be computed again if the copies are all there is."""

from __future__ import annotations

from collections import deque
from itertools import groupby

from twinkle.server.scheduling.jobs import Job


class History:
    """Calls to the worker that changed runs, with the jobs that each was made of. Single-threaded.

    The same jobs in the same calls give the same numbers, to the bit where all of a call's runs take part again.
    """

    def __init__(self) -> None:
        self._by_run: dict[
            str, deque[tuple[int, int, Job]]
        ] = {}  # (number of the call, place in it, job), rising
        self._calls = 0

    def add(self, jobs: list[Job]) -> None:
        """One call has been computed."""
        self._calls += 1
        for place, job in enumerate(jobs):
            self._by_run.setdefault(job.run_id, deque()).append((self._calls, place, job))

    def covered(self, run_id: str, seq_id: int) -> None:
        """A copy has all of a run up to `seq_id`."""
        jobs = self._by_run.get(run_id)
        while jobs and jobs[0][2].seq_id <= seq_id:
            jobs.popleft()
        if not jobs:
            self._by_run.pop(run_id, None)

    def forget(self, run_id: str) -> None:
        self._by_run.pop(run_id, None)

    def take_all(self) -> list[list[Job]]:
        """All calls in order; nothing is left."""
        found = [item for jobs in self._by_run.values() for item in jobs]
        self._by_run = {}
        found.sort(key=lambda item: item[:2])
        return [[job for _, _, job in call] for _, call in groupby(found, key=lambda item: item[0])]
