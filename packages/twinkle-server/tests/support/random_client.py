"""Random requests on some runs, and what came of them: the same from any service, whatever happens to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fake_service import Tenant

from twinkle.protocol import messages as m
from twinkle.protocol.types import AdamParams, Datum, ForwardBackwardOutput, ModelInput
from twinkle.server.backends.protocol import AdapterState

KINDS = ("pass", "pass", "step", "forward", "save", "load", "publish")


def a_pass(run: str, seq_id: int, tokens: tuple[int, ...] = (1, 2, 3), **more: Any):
    data = {"target_tokens": list(tokens), "weights": [1.0] * len(tokens)}
    return m.ForwardBackwardRequest(
        run, seq_id, [Datum(ModelInput.from_ints(list(tokens)), data)], "cross_entropy", **more
    )


def a_step(run: str, seq_id: int, learning_rate: float = 0.1) -> m.OptimStepRequest:
    return m.OptimStepRequest(
        model_id=run, seq_id=seq_id, adam_params=AdamParams(learning_rate=learning_rate)
    )


def bits(state: AdapterState) -> dict[str, bytes]:
    """Every number of a state; a gradient that is zero is none."""
    assert state.optimizer is not None
    kinds = {
        "weights": state.weights,
        "exp_avg": state.optimizer.exp_avg,
        "exp_avg_sq": state.optimizer.exp_avg_sq,
        "gradients": state.gradients or {},
    }
    found = {f"{kind}.{name}": a.tobytes() for kind, arrays in kinds.items() for name, a in arrays.items()}
    return {**found, "step": str(state.optimizer.step).encode()}


@dataclass
class Client:
    """Sends random requests on some runs, and remembers what came of them."""

    tenant: Tenant
    runs: list[str] = field(default_factory=list[str])
    seq_ids: list[int] = field(default_factory=list[int])
    saved: list[str] = field(default_factory=list[str])
    outcomes: list[Any] = field(default_factory=list[Any])

    async def begin(self, ranks: list[int]) -> None:
        for seed, rank in enumerate(ranks):
            self.runs.append(await self.tenant.run(rank=rank, seed=seed))
            self.seq_ids.append(0)

    async def send(self, batch: list[tuple[int, str]]) -> None:
        """All at once, so that they share ticks; then wait for all."""
        await self.wait(await self.submit(batch))

    async def submit(self, batch: list[tuple[int, str]]) -> list[m.Promise]:
        requests = [self._request(number % len(self.runs), kind) for number, kind in batch]
        return [await self.tenant.service.submit("alice", request) for request in requests]

    async def wait(self, promises: list[m.Promise]) -> None:
        self.outcomes += [await self.tenant.outcome(promise) for promise in promises]

    def _request(self, number: int, kind: str) -> Any:
        run = self.runs[number]
        self.seq_ids[number] += 1
        seq_id = self.seq_ids[number]
        match kind:
            case "step":  # small, since dozens in a row must not make the fake model overflow
                return a_step(run, seq_id, learning_rate=1e-3)
            case "forward":
                return a_pass(run, seq_id, (4, number), forward_only=True)
            case "save":
                self.saved.append(f"twinkle://{run}/weights/s{seq_id}")
                return m.SaveWeightsRequest(model_id=run, seq_id=seq_id, path=f"s{seq_id}")
            case "publish":
                return m.SaveWeightsForSamplerRequest(
                    model_id=run, seq_id=seq_id, sampling_session_seq_id=seq_id
                )
            case "load" if own := [path for path in self.saved if run in path]:
                return m.LoadWeightsRequest(model_id=run, seq_id=seq_id, path=own[-1], optimizer=True)
            case _:
                return a_pass(run, seq_id, (seq_id, 2, 3 + number))

    def shown(self) -> list[Any]:
        """The answers, without what a session's id is part of."""
        return [_shown(outcome) for outcome in self.outcomes]


def _shown(outcome: Any) -> Any:
    match outcome:
        case ForwardBackwardOutput():
            logprobs = [item["logprobs"].to_numpy().tobytes() for item in outcome.loss_fn_outputs]
            return logprobs, outcome.metrics
        case m.OptimStepResponse():
            return outcome.metrics
        case m.Failure():
            return outcome.error
        case _:
            return type(outcome)
