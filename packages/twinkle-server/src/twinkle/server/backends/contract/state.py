"""State: what goes out and comes in, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.types import Float32Array
from twinkle.server.backends.contract.parts import (
    SPEC,
    STEP,
    Factory,
    Matrices,
    assert_close,
    assert_raises,
    assert_same,
    assert_same_state,
    check_names,
    make_row,
    opened,
    train,
    trained_state,
    weights_of,
    whole_state,
)
from twinkle.server.backends.protocol import AdamStep


def an_export_is_a_copy(make: Factory) -> None:
    with opened(make) as backend:
        backend.add_adapter("a", SPEC)
        state = trained_state(backend, "a")
        kept = {name: matrix.copy() for name, matrix in state.weights.items()}
        train(backend, "a")
        assert_same(kept, state.weights)
        for matrix in state.weights.values():
            matrix[:] = 7
        assert not any((matrix == 7).any() for matrix in weights_of(backend, "a").values())
        assert backend.export_adapter("a", with_optimizer=False).optimizer is None
        assert backend.export_adapter("a", with_optimizer=True).gradients is None
        check_names(state)


def an_import_restores_everything(make: Factory) -> None:
    with opened(make) as backend, opened(make) as other:
        backend.add_adapter("a", SPEC)
        train(backend, "a")
        backend.forward_backward([[make_row("a", seed=3)]])
        state = whole_state(backend, "a")
        other.add_adapter("elsewhere", replace(SPEC, seed=8))
        train(other, "elsewhere")
        other.import_adapter("elsewhere", state)
        assert_same_state(state, whole_state(other, "elsewhere"))
        for who, where in (("a", backend), ("elsewhere", other)):
            where.forward_backward([[make_row(who, seed=4)]])
            where.optim_step([AdamStep(who, STEP)])
        assert_close(weights_of(other, "elsewhere"), weights_of(backend, "a"))


def what_a_state_leaves_out_is_reset(make: Factory) -> None:
    with opened(make) as backend:
        backend.add_adapter("a", SPEC)
        weights = trained_state(backend, "a").weights
        backend.forward_backward([[make_row("a")]])
        backend.import_adapter("a", backend.export_adapter("a", with_optimizer=False))
        state = whole_state(backend, "a")
        assert state.optimizer is not None and state.gradients is not None and state.optimizer.step == 0
        for matrices in (state.optimizer.exp_avg, state.optimizer.exp_avg_sq, state.gradients):
            assert not any(matrix.any() for matrix in matrices.values())
        assert_same(weights, state.weights)


def a_state_that_does_not_fit_is_refused(make: Factory) -> None:
    with opened(make) as backend:
        backend.add_adapter("a", SPEC)
        backend.add_adapter("rank", replace(SPEC, rank=5))
        backend.add_adapter("modules", replace(SPEC, train_mlp=False))
        train(backend, "a")
        backend.forward_backward([[make_row("a")]])
        before = whole_state(backend, "a")
        name = next(iter(before.weights))
        assert before.optimizer is not None
        missing = {other: matrix for other, matrix in before.weights.items() if other != name}
        longer = {**before.weights, name: np.zeros((4, 1000), np.float32)}
        for wrong in (
            whole_state(backend, "rank"),
            whole_state(backend, "modules"),
            replace(before, weights=missing),
            replace(before, weights=longer),
            replace(before, gradients=missing),
            replace(before, optimizer=replace(before.optimizer, exp_avg=longer)),
            replace(before, optimizer=replace(before.optimizer, exp_avg_sq=missing)),
        ):
            assert_raises(InvalidRequest, lambda wrong=wrong: backend.import_adapter("a", wrong))
            assert_same_state(before, whole_state(backend, "a"))


def a_state_that_is_not_finite_is_refused(make: Factory) -> None:
    """A gradient may be: the step looks at it."""
    with opened(make) as backend:
        backend.add_adapter("a", SPEC)
        before = trained_state(backend, "a")
        name = next(iter(before.weights))
        moments = before.optimizer
        assert moments is not None

        def with_one(matrices: Matrices, value: float) -> dict[str, Float32Array]:
            changed = matrices[name].copy()
            changed[-1, -1] = value
            return {**matrices, name: changed}

        for value in (math.nan, math.inf, -math.inf):
            for wrong in (
                replace(before, weights=with_one(before.weights, value)),
                replace(before, optimizer=replace(moments, exp_avg=with_one(moments.exp_avg, value))),
                replace(before, optimizer=replace(moments, exp_avg_sq=with_one(moments.exp_avg_sq, value))),
            ):
                assert_raises(InvalidRequest, lambda wrong=wrong: backend.import_adapter("a", wrong))
                assert_same_state(before, whole_state(backend, "a"))
        negative = replace(moments, exp_avg_sq=with_one(moments.exp_avg_sq, -1e-9))  # its root is no number
        assert_raises(
            InvalidRequest, lambda: backend.import_adapter("a", replace(before, optimizer=negative))
        )
        gradients = before.gradients
        assert gradients is not None
        backend.import_adapter("a", replace(before, gradients=with_one(gradients, math.inf)))
        [outcome] = backend.optim_step([AdamStep("a", STEP)])
        assert isinstance(outcome, InvalidRequest)
        assert_same_state(before, whole_state(backend, "a"))
