"""What is queued: typed data, never a callable, so that it can be printed, fused, journaled and replayed."""

from dataclasses import dataclass
from typing import TypeAlias

from twinkle.protocol import messages as m
from twinkle.server.backends.protocol import CustomLoss

RunRequest: TypeAlias = m.Ordered | m.CreateModelRequest | m.UnloadModelRequest


@dataclass(frozen=True, eq=False)
class Received:
    """A request as it arrived. Its bytes go to the journal, and no further.

    Attributes:
        body: as it was decoded from; None if it was made in this process.
        digest: see `operations.digest`; empty if it is never sent again.
    """

    request: m.Operation
    body: bytes | None = None
    digest: bytes = b""


@dataclass(frozen=True, eq=False)
class Job:
    """One accepted request on a run.

    Attributes:
        request_id: of the future that its result completes.
        seq_id: its place in the run's order; creation is 0.
        tokens: what it costs in fairness: tokens of a training pass, 0 for the rest.
        custom_loss: what a pass with the loss "custom" names by its id.
        digest: of the request; empty where it isn't known.
    """

    request_id: str
    tenant: str
    run_id: str
    seq_id: int
    request: RunRequest
    tokens: int = 0
    custom_loss: CustomLoss | None = None
    digest: bytes = b""


@dataclass(frozen=True)
class Tick:
    """What runs together, in this order: all passes in shared micro-batches, then all optimizer steps, then the rest
    one by one. A run is in it with any number of passes followed by at most one other job.
    """

    passes: list[Job]
    optim_steps: list[Job]
    others: list[Job]

    @property
    def jobs(self) -> list[Job]:
        return [*self.passes, *self.optim_steps, *self.others]

    def quick_first(self) -> "list[Tick]":
        """The tick in at most two: what need not wait for any of the passes, which take long, and then the others."""
        with_passes = {job.run_id for job in self.passes}
        halves = [
            Tick(
                [job for job in self.passes if is_slow],
                [job for job in self.optim_steps if (job.run_id in with_passes) == is_slow],
                [job for job in self.others if (job.run_id in with_passes) == is_slow],
            )
            for is_slow in (False, True)
        ]
        return [half for half in halves if half.jobs]
