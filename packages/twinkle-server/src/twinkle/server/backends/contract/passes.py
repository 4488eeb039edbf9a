"""Passes: log-probabilities, losses and gradients, alone and together."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.types import AdamParams, Array
from twinkle.server.backends.contract.parts import (
    SPEC,
    TOLERANCE,
    Factory,
    Matrices,
    assert_close,
    assert_near,
    assert_raises,
    assert_same_state,
    grad_norm,
    gradients_of,
    make_row,
    norm_of,
    opened,
    sampled_inputs,
    train,
    whole_state,
)
from twinkle.server.backends.lora.losses.formulas import FORMULAS
from twinkle.server.backends.protocol import CUSTOM_LOSS, AdamStep, Row


def results_come_in_the_order_of_the_rows(make: Factory) -> None:
    with opened(make) as backend:
        specs = {"b": replace(SPEC, rank=2), "a": SPEC, "c": replace(SPEC, train_unembed=False)}
        for adapter_id, spec in specs.items():
            backend.add_adapter(adapter_id, spec)
            train(backend, adapter_id)
        rows = [make_row(who, seed=i, length=i + 1) for i, who in enumerate("cabacbbac")]
        [together] = backend.forward_backward([rows])
        for row, result in zip(rows, together, strict=True):
            [[alone]] = backend.forward_backward([[row]])
            assert result.logprobs.shape == row.tokens.shape and result.logprobs.dtype == np.float32
            assert_near(result.logprobs, alone.logprobs, 10 * TOLERANCE)
        assert backend.forward_backward([]) == []
        assert backend.forward_backward([[]]) == [[]]


def the_loss_is_the_weighted_sum(make: Factory) -> None:
    weights = np.array([0.25, -1.5, 0.0, 3.0, 1.0], np.float32)
    with opened(make) as backend:
        backend.add_adapter("a", SPEC)
        [[result]] = backend.forward_backward([[make_row("a", length=5, weights=weights)]])
        assert (result.logprobs <= 0).all()
        expected = -float((weights.astype(np.float64) * result.logprobs).sum())
        assert math.isclose(result.loss, expected, rel_tol=1e-5), (result.loss, expected)


def every_loss_is_its_formula(make: Factory) -> None:
    """Value and log-probabilities, and the gradient: that of cross_entropy with weights -d loss / d logprobs."""
    with opened(make) as backend:
        backend.add_adapter("a", SPEC)
        train(backend, "a")
        plain = make_row("a", seed=5, length=8)
        [[reference]] = backend.forward_backward([[replace(plain, forward_only=True)]])
        for name, spec in backend.loss_fns.items():
            if name == CUSTOM_LOSS:
                continue
            row = replace(
                plain, loss_fn=name, loss_inputs={**plain.loss_inputs, **sampled_inputs(reference.logprobs)}
            )
            # The gradient is left out of the state, and so reset.
            backend.import_adapter("a", backend.export_adapter("a", with_optimizer=True))
            [[result]] = backend.forward_backward([[row]])
            found = gradients_of(backend, "a")
            loss, gradient = FORMULAS[name](
                reference.logprobs.astype(np.float64), row.loss_inputs, spec.config
            )
            assert math.isclose(result.loss, loss, rel_tol=1e-4, abs_tol=1e-4), (name, result.loss, loss)
            surrogate = {**plain.loss_inputs, "weights": -gradient.astype(np.float32)}
            backend.import_adapter("a", backend.export_adapter("a", with_optimizer=True))
            backend.forward_backward([[replace(plain, loss_inputs=surrogate)]])
            assert_close(found, gradients_of(backend, "a"), 1e-3)


def a_loss_takes_its_parameters(make: Factory) -> None:
    """Thresholds that leave nothing unclipped stop the gradient of every token that they clip."""
    with opened(make) as backend:
        if "ppo" not in backend.loss_fns:
            return
        backend.add_adapter("a", SPEC)
        train(backend, "a")
        plain = make_row("a", seed=5, length=8)
        [[reference]] = backend.forward_backward([[replace(plain, forward_only=True)]])
        inputs: dict[str, Array] = {
            "target_tokens": plain.loss_inputs["target_tokens"],
            "logprobs": reference.logprobs - np.float32(1.0),  # every ratio is e
            "advantages": np.ones(8, np.float32),
        }
        for high, expected in ((2.0, 2.0 * 8), (4.0, math.e * 8)):
            row = Row(
                "a", plain.tokens, "ppo", inputs, {"clip_low_threshold": 0.5, "clip_high_threshold": high}
            )
            [[result]] = backend.forward_backward([[row]])
            assert math.isclose(result.loss, -expected, rel_tol=1e-4)
            [metrics] = backend.optim_step([AdamStep("a", AdamParams(learning_rate=0.0))])
            assert (grad_norm(metrics) > 0) == (high > math.e)


def several_candidates_are_as_many_rows(make: Factory) -> None:
    """Targets [T, K] with weights [T, K]: what K rows of one candidate each give together."""
    draw = np.random.default_rng(3)
    tokens, targets = draw.integers(0, 100, 5), draw.integers(0, 100, (5, 3))
    weights = draw.normal(size=(5, 3)).astype(np.float32)
    with opened(make) as backend:
        backend.add_adapter("a", SPEC)
        train(backend, "a")
        wide = Row("a", tokens, "cross_entropy", {"target_tokens": targets, "weights": weights})
        [[together], [other]] = backend.forward_backward(
            [[wide], [replace(make_row("a", seed=8), forward_only=True)]]
        )
        assert other.logprobs.shape == (6,)
        gradients = gradients_of(backend, "a")
        backend.import_adapter("a", backend.export_adapter("a", with_optimizer=True))
        rows = [
            Row("a", tokens, "cross_entropy", {"target_tokens": targets[:, k], "weights": weights[:, k]})
            for k in range(3)
        ]
        [alone] = backend.forward_backward([rows])
        assert together.logprobs.shape == (5, 3) and together.logprobs.dtype == np.float32
        assert_near(
            together.logprobs, np.stack([result.logprobs for result in alone], axis=1), 10 * TOLERANCE
        )
        assert math.isclose(together.loss, sum(result.loss for result in alone), rel_tol=1e-4)
        assert_close(gradients, gradients_of(backend, "a"), 1e-4)


def gradients_are_those_of_the_loss(make: Factory) -> None:
    """By a central difference along the gradient itself, over weights of all signs, with token 0 as read and target."""
    tokens = np.array([0, 3, 0, 1, 2], np.int64)
    weights = np.array([1.0, -0.5, 0.75, 0.0, 2.0], np.float32)
    inputs = {"target_tokens": np.array([0, 0, 5, 1, 0], np.int64), "weights": weights}
    row = Row("a", tokens, "cross_entropy", inputs)
    with opened(make) as backend:
        backend.add_adapter("a", SPEC)
        train(backend, "a")
        backend.forward_backward([[row]])
        state = whole_state(backend, "a")
        gradients = state.gradients
        assert gradients is not None
        norm = norm_of(gradients)
        step = 1e-2 / norm

        def loss_at(distance: float) -> float:
            moved = {
                name: (matrix + distance / norm * gradients[name]).astype(np.float32)
                for name, matrix in state.weights.items()
            }
            backend.import_adapter("a", replace(state, weights=moved))
            return backend.forward_backward([[replace(row, forward_only=True)]])[0][0].loss

        slope = (loss_at(step) - loss_at(-step)) / (2 * step)
        assert math.isclose(slope, norm, rel_tol=0.02), (slope, norm)


def two_calls_add_up_to_one(make: Factory) -> None:
    first, second = [make_row("a", seed=1), make_row("a", seed=2)], [make_row("a", seed=3, length=7)]
    with opened(make) as backend:

        def gradients_after(*calls: list[list[Row]]) -> Matrices:
            backend.add_adapter("a", SPEC)
            train(backend, "a")
            for micro_batches in calls:
                backend.forward_backward(micro_batches)
            gradients = gradients_of(backend, "a")
            backend.remove_adapter("a")
            return gradients

        one_batch = gradients_after([first + second])
        assert_close(gradients_after([first, second]), one_batch)
        assert_close(gradients_after([first], [second]), one_batch)


def weights_of_zero_are_no_op(make: Factory) -> None:
    with opened(make) as backend:
        backend.add_adapter("a", SPEC)
        train(backend, "a")
        before = whole_state(backend, "a")
        [[result]] = backend.forward_backward([[make_row("a", length=6, weights=np.zeros(6, np.float32))]])
        assert result.loss == 0 and (result.logprobs < 0).all()
        assert_same_state(before, whole_state(backend, "a"))


def forward_only_rows_leave_no_gradient(make: Factory) -> None:
    with opened(make) as backend:
        backend.add_adapter("a", SPEC)
        backend.add_adapter("b", SPEC)
        train(backend, "a")
        forward = replace(make_row("a"), forward_only=True)
        [[alone]] = backend.forward_backward([[forward]])
        [[mixed, _]] = backend.forward_backward([[forward, make_row("b")]])
        assert not any(gradient.any() for gradient in gradients_of(backend, "a").values())
        [[trained]] = backend.forward_backward([[make_row("a")]])
        for result in (alone, mixed):
            assert_near(result.logprobs, trained.logprobs, TOLERANCE)
            assert math.isclose(result.loss, trained.loss, rel_tol=1e-4)


def company_changes_no_number(make: Factory) -> None:
    specs = {
        "a": SPEC,
        "b": replace(SPEC, seed=2, alpha=8.0),
        "c": replace(SPEC, rank=7, train_unembed=False),
        "d": replace(SPEC, rank=7, train_attn=False),
    }
    rows = {
        who: [make_row(who, seed=i, length=3 + 2 * i) for i in range(2 + n)] for n, who in enumerate(specs)
    }
    mixed = [row for i in range(5) for who in specs for row in rows[who][i : i + 1]]
    with opened(make) as alone, opened(make) as together:
        for who, spec in specs.items():
            for backend in (alone, together):
                backend.add_adapter(who, spec)
                train(backend, who)
        [results] = together.forward_backward([mixed])
        for who in specs:
            [expected] = alone.forward_backward([rows[who]])
            found = [result for row, result in zip(mixed, results, strict=True) if row.adapter_id == who]
            for one, other in zip(found, expected, strict=True):
                assert_near(one.logprobs, other.logprobs, TOLERANCE)
            assert_close(gradients_of(together, who), gradients_of(alone, who))


def any_adapters_may_meet_in_a_micro_batch(make: Factory) -> None:
    """With adapters of one shape in every combination, and idle ones between them."""
    meetings = ["ac", "bdd", "a", "adf", "fb"]
    rows = [
        [make_row(who, seed=10 * i + k) for k, who in enumerate(meeting)]
        for i, meeting in enumerate(meetings)
    ]
    with opened(make) as alone, opened(make) as together:
        for i, who in enumerate("abcdef"):
            for backend in (alone, together):
                backend.add_adapter(who, replace(SPEC, seed=i))
                train(backend, who)
        together.forward_backward(rows)
        for who in "abcdf":
            alone.forward_backward([[row] for meeting in rows for row in meeting if row.adapter_id == who])
            assert_close(gradients_of(together, who), gradients_of(alone, who))
        assert not any(gradient.any() for gradient in gradients_of(together, "e").values())


def a_failed_pass_changes_nothing(make: Factory) -> None:
    with opened(make) as backend:
        backend.add_adapter("a", SPEC)
        train(backend, "a")
        backend.forward_backward([[make_row("a", seed=5)]])
        before = whole_state(backend, "a")
        outside = np.full(4, backend.info.vocab_size, np.int64)
        good = make_row("a")
        for bad in (
            replace(good, loss_fn="no_such_loss"),
            replace(good, tokens=outside),
            replace(
                make_row("a", length=4),
                loss_inputs={"target_tokens": outside, "weights": np.ones(4, np.float32)},
            ),
        ):
            assert_raises(InvalidRequest, lambda bad=bad: backend.forward_backward([[good], [good, bad]]))
            assert_same_state(before, whole_state(backend, "a"))
        backend.forward_backward([[good]])
