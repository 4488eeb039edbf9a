"""What checks are made of: an adapter, rows, what is read of a backend, comparisons."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import TypeAlias

import numpy as np

from twinkle.protocol.types import AdamParams, Array, Float32Array
from twinkle.server.backends.lora.adapter_state import peft_names
from twinkle.server.backends.protocol import (
    AdamStep,
    AdapterSpec,
    AdapterState,
    Row,
    StepOutcome,
    TrainingBackend,
)

Factory: TypeAlias = Callable[[], TrainingBackend]
Matrices: TypeAlias = Mapping[str, Float32Array]

SPEC = AdapterSpec(rank=4, seed=1)
STEP = AdamParams(learning_rate=0.01)
# float32, and sums in another order.
TOLERANCE = 1e-5


@contextmanager
def opened(make: Factory) -> Generator[TrainingBackend]:
    backend = make()
    try:
        yield backend
    finally:
        backend.close()


def make_row(adapter_id: str, seed: int = 0, length: int = 6, weights: Float32Array | None = None) -> Row:
    """Tokens and targets below 100 and, unless given, weights around 0 from a seed."""
    draw = np.random.default_rng(seed)
    drawn = draw.normal(size=length).astype(np.float32)
    inputs: dict[str, Array] = {
        "target_tokens": draw.integers(0, 100, length),
        "weights": drawn if weights is None else weights,
    }
    return Row(adapter_id, draw.integers(0, 100, length), "cross_entropy", inputs)


def weights_of_size(size: float) -> Float32Array:
    """For a row of 6 tokens."""
    return np.array([size, -size, size, size, 0.0, size], np.float32)


def step_params(**changes: float) -> AdamParams:
    return STEP.model_copy(update=changes)


def sampled_inputs(logprobs: Float32Array) -> dict[str, Array]:
    """What a sampler whose policy is a little off would have left, with advantages of both signs and none."""
    draw = np.random.default_rng(11)
    length = len(logprobs)
    return {
        "logprobs": logprobs + 0.3 * draw.normal(size=length).astype(np.float32),
        "advantages": np.resize(np.array([1.5, -0.5, 0.0], np.float32), length),
        "sequence_ratio_mask": (np.arange(length) >= 2).astype(np.float32),
    }


def train(backend: TrainingBackend, adapter_id: str, seed: int = 100) -> None:
    """Two steps, after which neither A nor B is as it was."""
    for i in range(2):
        backend.forward_backward([[make_row(adapter_id, seed + i, length=8)]])
        backend.optim_step([AdamStep(adapter_id, STEP)])


def trained_state(backend: TrainingBackend, adapter_id: str, seed: int = 100) -> AdapterState:
    train(backend, adapter_id, seed)
    return whole_state(backend, adapter_id)


def whole_state(backend: TrainingBackend, adapter_id: str) -> AdapterState:
    return backend.export_adapter(adapter_id, with_optimizer=True, with_gradients=True)


def weights_of(backend: TrainingBackend, adapter_id: str) -> Matrices:
    return backend.export_adapter(adapter_id, with_optimizer=False).weights


def gradients_of(backend: TrainingBackend, adapter_id: str) -> Matrices:
    gradients = whole_state(backend, adapter_id).gradients
    assert gradients is not None
    return gradients


def grad_norm(outcome: StepOutcome) -> float:
    assert isinstance(outcome, dict), outcome
    return outcome["grad_norm:mean"]


def check_names(state: AdapterState) -> None:
    """Names by module, and shapes of the right rank; those of routed experts have it as often as there are experts."""
    expected = [name for module in state.target_modules for name in peft_names(module)]
    assert sorted(state.weights) == sorted(expected)
    for name, matrix in state.weights.items():
        assert matrix.dtype == np.float32
        ranks = matrix.shape[0 if name.endswith("lora_A.weight") else 1]
        assert ranks % state.spec.rank == 0 if ".experts." in name else ranks == state.spec.rank, name


def norm_of(matrices: Mapping[str, Array]) -> float:
    return math.sqrt(sum(float((matrix.astype(np.float64) ** 2).sum()) for matrix in matrices.values()))


def assert_close(
    found: Mapping[str, Array], expected: Mapping[str, Array], tolerance: float = TOLERANCE
) -> None:
    """Equal as one vector each, relative to its length."""
    assert set(found) == set(expected)
    error = norm_of({name: found[name].astype(np.float64) - expected[name] for name in expected})
    assert error <= tolerance * norm_of(expected), (
        f"relative error {error / norm_of(expected):.2e} > {tolerance:.0e}"
    )


def assert_near(found: Array, expected: Array, tolerance: float) -> None:
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def assert_same(found: Matrices, expected: Matrices) -> None:
    """Equal bit for bit."""
    assert set(found) == set(expected)
    for name, matrix in expected.items():
        assert np.array_equal(found[name], matrix), f"{name} differs"


def assert_same_state(found: AdapterState, expected: AdapterState) -> None:
    assert_same(found.weights, expected.weights)
    assert found.optimizer is not None and expected.optimizer is not None
    assert found.gradients is not None and expected.gradients is not None
    assert found.optimizer.step == expected.optimizer.step
    assert_same(found.optimizer.exp_avg, expected.optimizer.exp_avg)
    assert_same(found.optimizer.exp_avg_sq, expected.optimizer.exp_avg_sq)
    assert_same(found.gradients, expected.gradients)


def assert_raises(kind: type[Exception], call: Callable[[], object]) -> None:
    try:
        call()
    except kind:
        return
    raise AssertionError(f"expected {kind.__name__}")
