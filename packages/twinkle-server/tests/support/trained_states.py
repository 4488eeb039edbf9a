"""Passes and steps of a run as `Tenant.run` makes it, and the state that an undisturbed one has after some."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from mortal_worker import MortalWorker

from twinkle.protocol import messages as m
from twinkle.protocol.types import AdamParams, Datum, ModelInput
from twinkle.server.backends.fake import FakeBackend
from twinkle.server.backends.protocol import (
    AdamStep,
    AdapterSpec,
    AdapterState,
    ModelConfig,
    OptimizerState,
    Row,
)

TOKENS = np.array([1, 2, 3])


def a_pass(run: str, seq_id: int, tokens: tuple[int, ...] = (1, 2, 3), **more: Any):
    data = {"target_tokens": list(tokens), "weights": [1.0] * len(tokens)}
    return m.ForwardBackwardRequest(
        run, seq_id, [Datum(ModelInput.from_ints(list(tokens)), data)], "cross_entropy", **more
    )


def a_step(run: str, seq_id: int) -> m.OptimStepRequest:
    return m.OptimStepRequest(model_id=run, seq_id=seq_id, adam_params=AdamParams(learning_rate=0.1))


def expected_state(steps: int) -> AdapterState:
    """What an undisturbed backend has after so many steps of a run as `Tenant.run` makes it."""
    backend = FakeBackend(ModelConfig(Path("fake")))
    backend.add_adapter("a", AdapterSpec(rank=2, seed=0))
    row = Row("a", TOKENS, "cross_entropy", {"target_tokens": TOKENS, "weights": np.ones(3, np.float32)})
    for _ in range(steps):
        backend.forward_backward([[row]])
        backend.optim_step([AdamStep("a", AdamParams(learning_rate=0.1))])
    return backend.export_adapter("a", with_optimizer=True, with_gradients=True)


async def check_state(worker: MortalWorker, run: str, steps: int) -> None:
    """Weights and moments on the worker are exactly those of `steps` undisturbed steps."""
    state, expected = await worker.export_adapter(run, with_optimizer=True), expected_state(steps)
    assert isinstance(state.optimizer, OptimizerState) and isinstance(expected.optimizer, OptimizerState)
    assert state.optimizer.step == expected.optimizer.step == steps
    for mine, theirs in (
        (state.weights, expected.weights),
        (state.optimizer.exp_avg, expected.optimizer.exp_avg),
        (state.optimizer.exp_avg_sq, expected.optimizer.exp_avg_sq),
    ):
        assert mine.keys() == theirs.keys()
        for name in theirs:
            np.testing.assert_array_equal(mine[name], theirs[name])
