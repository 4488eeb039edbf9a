"""Runs and jobs for a scheduler, without a service."""

from __future__ import annotations

from twinkle.protocol import messages as m
from twinkle.protocol.types import Datum, ModelInput
from twinkle.server.backends.protocol import AdapterSpec
from twinkle.server.scheduling.runs import Job, Run


def a_run(name: str, tenant: str = "t") -> Run:
    return Run(name, tenant, "session", "fake/model", AdapterSpec(rank=1))


def a_pass(run: Run, seq_id: int, tokens: int) -> Job:
    request = m.ForwardBackwardRequest(
        run.run_id, seq_id, [Datum(ModelInput.from_ints([0]))], "cross_entropy"
    )
    return Job(f"{run.run_id}-{seq_id}", run, seq_id, request, tokens)


def a_step(run: Run, seq_id: int) -> Job:
    request = m.OptimStepRequest(model_id=run.run_id, seq_id=seq_id)
    return Job(f"{run.run_id}-{seq_id}", run, seq_id, request)
