"""Optimizer steps: AdamW, each adapter for itself, and the steps that are refused."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.types import AdamParams
from twinkle.server.backends.contract.parts import (
    SPEC,
    STEP,
    Factory,
    Matrices,
    assert_close,
    assert_same,
    assert_same_state,
    grad_norm,
    gradients_of,
    make_row,
    norm_of,
    opened,
    step_params,
    train,
    trained_state,
    weights_of,
    weights_of_size,
    whole_state,
)
from twinkle.server.backends.protocol import AdamStep


def steps_are_adamw(make: Factory) -> None:
    """Against the formula, in float64, from the gradients as exported."""
    settings = [
        AdamParams(learning_rate=0.01),
        AdamParams(learning_rate=0.02, beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.1),
        AdamParams(learning_rate=0.01, grad_clip_norm=0.05, weight_decay=0.01),
    ]
    with opened(make) as backend:
        backend.add_adapter("a", SPEC)
        p = {name: matrix.astype(np.float64) for name, matrix in weights_of(backend, "a").items()}
        m = {name: np.zeros_like(matrix) for name, matrix in p.items()}
        v = {name: np.zeros_like(matrix) for name, matrix in p.items()}
        for t, s in enumerate(settings, start=1):
            backend.forward_backward([[make_row("a", seed=t)]])
            gradients = gradients_of(backend, "a")
            norm = norm_of(gradients)
            [metrics] = backend.optim_step([AdamStep("a", s)])
            assert math.isclose(grad_norm(metrics), norm, rel_tol=1e-4)
            clip = min(1.0, s.grad_clip_norm / norm) if s.grad_clip_norm else 1.0
            for name, gradient in gradients.items():
                g = gradient * clip
                m[name] = s.beta1 * m[name] + (1 - s.beta1) * g
                v[name] = s.beta2 * v[name] + (1 - s.beta2) * g**2
                root = np.sqrt(v[name] / (1 - s.beta2**t)) + s.eps
                p[name] = p[name] * (1 - s.learning_rate * s.weight_decay)
                p[name] -= s.learning_rate * m[name] / (1 - s.beta1**t) / root
            assert_close(weights_of(backend, "a"), p, 1e-4)
            state = whole_state(backend, "a")
            assert state.optimizer is not None and state.optimizer.step == t
            assert_close(state.optimizer.exp_avg, m, 1e-4)
            assert_close(state.optimizer.exp_avg_sq, v, 1e-4)
            assert state.gradients is not None and not any(g.any() for g in state.gradients.values())


def a_learning_rate_of_zero_moves_nothing(make: Factory) -> None:
    with opened(make) as backend:
        backend.add_adapter("a", SPEC)
        train(backend, "a")
        backend.forward_backward([[make_row("a")]])
        before = weights_of(backend, "a")
        backend.optim_step([AdamStep("a", AdamParams(learning_rate=0.0, weight_decay=0.5))])
        assert_same(before, weights_of(backend, "a"))


def a_step_without_gradient_is_one_with_zero_gradient(make: Factory) -> None:
    with opened(make) as backend:
        backend.add_adapter("a", SPEC)
        train(backend, "a")
        before = whole_state(backend, "a")
        [metrics] = backend.optim_step(
            [AdamStep("a", AdamParams(learning_rate=0.0, beta1=0.5, beta2=0.75, eps=0.0))]
        )
        after = whole_state(backend, "a")
        assert grad_norm(metrics) == 0
        assert before.optimizer is not None and after.optimizer is not None
        assert after.optimizer.step == before.optimizer.step + 1
        assert_close(after.optimizer.exp_avg, {k: x / 2 for k, x in before.optimizer.exp_avg.items()})
        assert_close(
            after.optimizer.exp_avg_sq, {k: 3 * x / 4 for k, x in before.optimizer.exp_avg_sq.items()}
        )
        backend.add_adapter("b", SPEC)
        backend.optim_step([AdamStep("b", AdamParams(learning_rate=0.1, eps=0.0))])
        assert all(np.isfinite(matrix).all() for matrix in weights_of(backend, "b").values())


def idle_adapters_are_not_moved(make: Factory) -> None:
    with opened(make) as backend:
        for i, who in enumerate(("idle", "a", "b")):
            backend.add_adapter(who, replace(SPEC, seed=i))
            train(backend, who)
        backend.forward_backward([[make_row("idle", seed=9)]])
        before = whole_state(backend, "idle")
        backend.forward_backward([[make_row("a"), make_row("b")]])
        decay = AdamParams(learning_rate=0.1, weight_decay=0.5)
        backend.optim_step([AdamStep("a", decay), AdamStep("b", STEP)])
        assert_same_state(before, whole_state(backend, "idle"))


def steps_together_are_steps_alone(make: Factory) -> None:
    settings = {
        "a": STEP,
        "b": AdamParams(learning_rate=0.05, weight_decay=0.2, grad_clip_norm=0.1),
        "c": AdamParams(learning_rate=0.0),
        "d": AdamParams(learning_rate=0.02, beta1=0.5, beta2=0.5, eps=0.1),
    }
    with opened(make) as alone, opened(make) as together:
        for i, who in enumerate(settings):
            for backend in (alone, together):
                backend.add_adapter(who, replace(SPEC, seed=i, rank=4 if i < 3 else 2))
        for seed in range(2):
            for who in settings:
                for backend in (alone, together):
                    backend.forward_backward([[make_row(who, seed=seed)]])
            expected = [alone.optim_step([AdamStep(who, params)])[0] for who, params in settings.items()]
            metrics = together.optim_step(
                [AdamStep(who, params) for who, params in reversed(settings.items())]
            )
            for who, one, other in zip(settings, expected, reversed(metrics), strict=True):
                assert math.isclose(grad_norm(one), grad_norm(other), rel_tol=1e-4)
                assert_close(weights_of(together, who), weights_of(alone, who))


def a_step_that_would_not_be_finite_is_refused_alone(make: Factory) -> None:
    """Others in the call step as if alone; the refused run goes on as if the passes before had not been."""
    with opened(make) as alone, opened(make) as together:
        for backend in (alone, together):
            for i, who in enumerate(("bad", "good")):
                backend.add_adapter(who, replace(SPEC, seed=i))
                train(backend, who)
        before = whole_state(alone, "bad")
        for size, params in (
            (3e38, STEP),  # no number is what comes of it
            (3e38, step_params(grad_clip_norm=1.0)),  # nor can it be scaled down
            (1e25, STEP),  # finite, but not as a square
            (1.0, step_params(learning_rate=1e39)),
            (1.0, step_params(learning_rate=1e20, weight_decay=1e20)),
        ):
            together.forward_backward(
                [[make_row("good", seed=3), make_row("bad", weights=weights_of_size(size))]]
            )
            refused, made = together.optim_step([AdamStep("bad", params), AdamStep("good", STEP)])
            assert isinstance(refused, InvalidRequest) and "gradient is dropped" in refused.message, refused
            alone.forward_backward([[make_row("good", seed=3)]])
            [expected] = alone.optim_step([AdamStep("good", STEP)])
            assert math.isclose(grad_norm(made), grad_norm(expected), rel_tol=1e-4)
            assert_close(weights_of(together, "good"), weights_of(alone, "good"))
            assert_same_state(before, whole_state(together, "bad"))
        for backend in (alone, together):
            backend.forward_backward([[make_row("bad", seed=4)]])
            backend.optim_step([AdamStep("bad", STEP)])
        assert_close(weights_of(together, "bad"), weights_of(alone, "bad"))


def a_gradient_that_is_finite_has_a_finite_norm(make: Factory) -> None:
    """Also where its squares are no numbers of float32; clipping it is then what clipping a smaller one is."""
    with opened(make) as backend:
        backend.add_adapter("a", SPEC)
        before = trained_state(backend, "a")
        weights: list[Matrices] = []
        for size in (1.0, 1e25, 1e-25):
            backend.import_adapter("a", before)
            backend.forward_backward([[make_row("a", weights=weights_of_size(size))]])
            norm = norm_of(gradients_of(backend, "a"))
            step = step_params(grad_clip_norm=1e-3, eps=1e-30)
            [metrics] = backend.optim_step([AdamStep("a", step)])
            assert norm > 0, (size, norm)
            assert math.isclose(grad_norm(metrics), norm, rel_tol=1e-4)
            weights.append(weights_of(backend, "a"))
        assert_close(weights[1], weights[0], 1e-3)
