"""The contract suite: what every training backend must do, as functions that raise `AssertionError` where it doesn't.

    @pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__)
    def test_contract(check):
        check(lambda: MyBackend(config))

Each check makes backends of its own by the factory, in float32; a factory may share what is costly (the base model).
Expected values are closed forms, or the same thing done in another way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeAlias

import numpy as np

from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.types import AdamParams, Array, Float32Array
from twinkle.server.backends.lora.losses.formulas import FORMULAS
from twinkle.server.backends.protocol import (
    CUSTOM_LOSS,
    AdamStep,
    AdapterSpec,
    AdapterState,
    Row,
    StepOutcome,
    TrainingBackend,
)

Factory: TypeAlias = Callable[[], TrainingBackend]
Check: TypeAlias = Callable[[Factory], None]
Matrices: TypeAlias = Mapping[str, Float32Array]

SPEC = AdapterSpec(rank=4, seed=1)
STEP = AdamParams(learning_rate=0.01)
# float32, and sums in another order.
TOLERANCE = 1e-5

# ---------------------------------------------------------------- adapters


def a_new_adapter_changes_nothing(make: Factory) -> None:
    with _backend(make) as backend:
        backend.add_adapter("a", SPEC)
        backend.add_adapter("b", replace(SPEC, rank=2, alpha=8.0, seed=2, train_mlp=False))
        [[a, b]] = backend.forward_backward([[_row("a"), _row("b")]])
        _equal(a.logprobs, b.logprobs, TOLERANCE)


def a_seed_gives_the_same_adapter_whatever_else_is_there(make: Factory) -> None:
    with _backend(make) as backend, _backend(make) as other:
        backend.add_adapter("a", SPEC)
        for i in range(3):
            other.add_adapter(f"other {i}", replace(SPEC, seed=i))
        _train(other, "other 0")
        other.add_adapter("a", SPEC)
        other.add_adapter("b", replace(SPEC, seed=2))
        weights = _weights(backend, "a")
        _same(weights, _weights(other, "a"))
        different = _weights(other, "b")
        a_names = [name for name in weights if name.endswith("lora_A.weight")]
        assert all(not np.array_equal(weights[name], different[name]) for name in a_names), (
            "seeds 1 and 2 agree"
        )


def a_starts_uniform_and_b_zero(make: Factory) -> None:
    with _backend(make) as backend:
        backend.add_adapter("a", replace(SPEC, rank=8))
        for name, matrix in _weights(backend, "a").items():
            if name.endswith("lora_B.weight"):
                assert not matrix.any(), f"{name} is not zero"
            else:  # Kaiming with a = sqrt 5: uniform within 1 / sqrt in_features
                bound = 1 / math.sqrt(matrix.shape[1])
                assert bound * 0.8 < np.abs(matrix).max() <= bound * (1 + 1e-6), (
                    f"{name} is not within its bound"
                )


def rank_and_flags_are_what_was_asked_for(make: Factory) -> None:
    flags = ("train_attn", "train_mlp", "train_unembed")
    with _backend(make) as backend:
        backend.add_adapter("all", SPEC)
        all_modules = backend.export_adapter("all", with_optimizer=False).target_modules
        parts: list[str] = []
        for i, flag in enumerate(flags):
            only = {name: name == flag for name in flags}
            backend.add_adapter(flag, AdapterSpec(rank=i + 1, **only))
            state = backend.export_adapter(flag, with_optimizer=False)
            parts += state.target_modules
            assert state.spec.rank == i + 1
            _check_names(state)
        assert sorted(parts) == sorted(all_modules), "the three flags' modules are not all modules, each once"


def alpha_scales_the_low_rank_term(make: Factory) -> None:
    with _backend(make) as backend:
        backend.add_adapter("a", replace(SPEC, alpha=8.0))
        backend.add_adapter("b", replace(SPEC, alpha=32.0))
        state = _trained_state(backend, "a")
        quartered = {
            name: matrix / 4 if name.endswith("lora_B.weight") else matrix
            for name, matrix in state.weights.items()
        }
        same_by_alpha = replace(state, spec=replace(SPEC, alpha=32.0), weights=quartered)
        # The second has another alpha than the adapter it is put into: an import brings its own.
        for imported in (same_by_alpha, state):
            backend.import_adapter("b", imported)
            assert backend.export_adapter("b", with_optimizer=False).spec.alpha == imported.spec.alpha
            [[a, b]] = backend.forward_backward([[_row("a"), _row("b")]])
            _equal(a.logprobs, b.logprobs, TOLERANCE)


def impossible_shapes_are_refused(make: Factory) -> None:
    with _backend(make) as backend:
        for rank in (0, -1, backend.info.max_lora_rank + 1):
            _raises(InvalidRequest, lambda rank=rank: backend.add_adapter("a", replace(SPEC, rank=rank)))
        nothing = replace(SPEC, train_attn=False, train_mlp=False, train_unembed=False)
        _raises(InvalidRequest, lambda: backend.add_adapter("a", nothing))
        backend.add_adapter("a", replace(SPEC, rank=backend.info.max_lora_rank))


def unknown_and_taken_ids_are_refused(make: Factory) -> None:
    with _backend(make) as backend:
        backend.add_adapter("a", SPEC)
        before = _everything(backend, "a")
        _raises(ValueError, lambda: backend.add_adapter("a", SPEC))
        _raises(KeyError, lambda: backend.remove_adapter("b"))
        _raises(KeyError, lambda: backend.export_adapter("b", with_optimizer=False))
        _raises(KeyError, lambda: backend.import_adapter("b", backend.export_adapter("a", True)))
        _raises(KeyError, lambda: backend.forward_backward([[_row("a")], [_row("b")]]))
        _raises(KeyError, lambda: backend.optim_step([AdamStep("a", STEP), AdamStep("b", STEP)]))
        _raises(ValueError, lambda: backend.optim_step([AdamStep("a", STEP), AdamStep("a", STEP)]))
        _same_state(before, _everything(backend, "a"))


def a_removed_adapter_leaves_nothing_behind(make: Factory) -> None:
    with _backend(make) as backend:
        backend.add_adapter("stays", SPEC)
        backend.add_adapter("a", SPEC)
        fresh = _everything(backend, "a")
        _train(backend, "a")
        backend.forward_backward([[_row("a")]])  # a pending gradient
        backend.remove_adapter("a")
        backend.add_adapter("b", SPEC)
        _same_state(fresh, _everything(backend, "b"))
        [metrics] = backend.optim_step([AdamStep("b", STEP)])
        assert _grad_norm(metrics) == 0
        _same(fresh.weights, _weights(backend, "b"))


def many_adapters_keep_their_values(make: Factory) -> None:
    with _backend(make) as backend:
        states: dict[str, AdapterState] = {}
        for i in range(9):
            backend.add_adapter(str(i), replace(SPEC, seed=i))
            states[str(i)] = _trained_state(backend, str(i), seed=i)
        for i in (3, 0, 7):
            backend.remove_adapter(str(i))
            del states[str(i)]
        for adapter_id, state in states.items():
            _same_state(state, _everything(backend, adapter_id))


# ---------------------------------------------------------------- passes


def results_come_in_the_order_of_the_rows(make: Factory) -> None:
    with _backend(make) as backend:
        specs = {"b": replace(SPEC, rank=2), "a": SPEC, "c": replace(SPEC, train_unembed=False)}
        for adapter_id, spec in specs.items():
            backend.add_adapter(adapter_id, spec)
            _train(backend, adapter_id)
        rows = [_row(who, seed=i, length=i + 1) for i, who in enumerate("cabacbbac")]
        [together] = backend.forward_backward([rows])
        for row, result in zip(rows, together, strict=True):
            [[alone]] = backend.forward_backward([[row]])
            assert result.logprobs.shape == row.tokens.shape and result.logprobs.dtype == np.float32
            _equal(result.logprobs, alone.logprobs, 10 * TOLERANCE)
        assert backend.forward_backward([]) == []
        assert backend.forward_backward([[]]) == [[]]


def the_loss_is_the_weighted_sum(make: Factory) -> None:
    weights = np.array([0.25, -1.5, 0.0, 3.0, 1.0], np.float32)
    with _backend(make) as backend:
        backend.add_adapter("a", SPEC)
        [[result]] = backend.forward_backward([[_row("a", length=5, weights=weights)]])
        assert (result.logprobs <= 0).all()
        expected = -float((weights.astype(np.float64) * result.logprobs).sum())
        assert math.isclose(result.loss, expected, rel_tol=1e-5), (result.loss, expected)


def every_loss_is_its_formula(make: Factory) -> None:
    """Value and log-probabilities, and the gradient: that of cross_entropy with weights -d loss / d logprobs."""
    with _backend(make) as backend:
        backend.add_adapter("a", SPEC)
        _train(backend, "a")
        plain = _row("a", seed=5, length=8)
        [[reference]] = backend.forward_backward([[replace(plain, forward_only=True)]])
        for name, spec in backend.loss_fns.items():
            if name == CUSTOM_LOSS:
                continue
            row = replace(
                plain, loss_fn=name, loss_inputs={**plain.loss_inputs, **_sampled(reference.logprobs)}
            )
            backend.import_adapter(
                "a", backend.export_adapter("a", with_optimizer=True)
            )  # no gradient is left
            [[result]] = backend.forward_backward([[row]])
            found = _gradients(backend, "a")
            loss, gradient = FORMULAS[name](
                reference.logprobs.astype(np.float64), row.loss_inputs, spec.config
            )
            assert math.isclose(result.loss, loss, rel_tol=1e-4, abs_tol=1e-4), (name, result.loss, loss)
            surrogate = {**plain.loss_inputs, "weights": -gradient.astype(np.float32)}
            backend.import_adapter("a", backend.export_adapter("a", with_optimizer=True))
            backend.forward_backward([[replace(plain, loss_inputs=surrogate)]])
            _close(found, _gradients(backend, "a"), 1e-3)


def a_loss_takes_its_parameters(make: Factory) -> None:
    """Thresholds that leave nothing unclipped stop the gradient of every token that they clip."""
    with _backend(make) as backend:
        if "ppo" not in backend.loss_fns:
            return
        backend.add_adapter("a", SPEC)
        _train(backend, "a")
        plain = _row("a", seed=5, length=8)
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
            assert (_grad_norm(metrics) > 0) == (high > math.e)


def several_candidates_are_as_many_rows(make: Factory) -> None:
    """Targets [T, K] with weights [T, K]: what K rows of one candidate each give together."""
    draw = np.random.default_rng(3)
    tokens, targets = draw.integers(0, 100, 5), draw.integers(0, 100, (5, 3))
    weights = draw.normal(size=(5, 3)).astype(np.float32)
    with _backend(make) as backend:
        backend.add_adapter("a", SPEC)
        _train(backend, "a")
        wide = Row("a", tokens, "cross_entropy", {"target_tokens": targets, "weights": weights})
        [[together], [other]] = backend.forward_backward(
            [[wide], [replace(_row("a", seed=8), forward_only=True)]]
        )
        assert other.logprobs.shape == (6,)
        gradients = _gradients(backend, "a")
        backend.import_adapter("a", backend.export_adapter("a", with_optimizer=True))
        rows = [
            Row("a", tokens, "cross_entropy", {"target_tokens": targets[:, k], "weights": weights[:, k]})
            for k in range(3)
        ]
        [alone] = backend.forward_backward([rows])
        assert together.logprobs.shape == (5, 3) and together.logprobs.dtype == np.float32
        _equal(together.logprobs, np.stack([result.logprobs for result in alone], axis=1), 10 * TOLERANCE)
        assert math.isclose(together.loss, sum(result.loss for result in alone), rel_tol=1e-4)
        _close(gradients, _gradients(backend, "a"), 1e-4)


def gradients_are_those_of_the_loss(make: Factory) -> None:
    """By a central difference along the gradient itself, over weights of all signs, with token 0 as read and target."""
    tokens = np.array([0, 3, 0, 1, 2], np.int64)
    weights = np.array([1.0, -0.5, 0.75, 0.0, 2.0], np.float32)
    inputs = {"target_tokens": np.array([0, 0, 5, 1, 0], np.int64), "weights": weights}
    row = Row("a", tokens, "cross_entropy", inputs)
    with _backend(make) as backend:
        backend.add_adapter("a", SPEC)
        _train(backend, "a")
        backend.forward_backward([[row]])
        state = _everything(backend, "a")
        gradients = state.gradients
        assert gradients is not None
        norm = _norm(gradients)
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
    first, second = [_row("a", seed=1), _row("a", seed=2)], [_row("a", seed=3, length=7)]
    with _backend(make) as backend:

        def gradients_after(*calls: list[list[Row]]) -> Matrices:
            backend.add_adapter("a", SPEC)
            _train(backend, "a")
            for micro_batches in calls:
                backend.forward_backward(micro_batches)
            gradients = _gradients(backend, "a")
            backend.remove_adapter("a")
            return gradients

        one_batch = gradients_after([first + second])
        _close(gradients_after([first, second]), one_batch)
        _close(gradients_after([first], [second]), one_batch)


def weights_of_zero_are_no_op(make: Factory) -> None:
    with _backend(make) as backend:
        backend.add_adapter("a", SPEC)
        _train(backend, "a")
        before = _everything(backend, "a")
        [[result]] = backend.forward_backward([[_row("a", length=6, weights=np.zeros(6, np.float32))]])
        assert result.loss == 0 and (result.logprobs < 0).all()
        _same_state(before, _everything(backend, "a"))


def forward_only_rows_leave_no_gradient(make: Factory) -> None:
    with _backend(make) as backend:
        backend.add_adapter("a", SPEC)
        backend.add_adapter("b", SPEC)
        _train(backend, "a")
        forward = replace(_row("a"), forward_only=True)
        [[alone]] = backend.forward_backward([[forward]])
        [[mixed, _]] = backend.forward_backward([[forward, _row("b")]])
        assert not any(gradient.any() for gradient in _gradients(backend, "a").values())
        [[trained]] = backend.forward_backward([[_row("a")]])
        for result in (alone, mixed):
            _equal(result.logprobs, trained.logprobs, TOLERANCE)
            assert math.isclose(result.loss, trained.loss, rel_tol=1e-4)


def company_changes_no_number(make: Factory) -> None:
    specs = {
        "a": SPEC,
        "b": replace(SPEC, seed=2, alpha=8.0),
        "c": replace(SPEC, rank=7, train_unembed=False),
        "d": replace(SPEC, rank=7, train_attn=False),
    }
    rows = {who: [_row(who, seed=i, length=3 + 2 * i) for i in range(2 + n)] for n, who in enumerate(specs)}
    mixed = [row for i in range(5) for who in specs for row in rows[who][i : i + 1]]
    with _backend(make) as alone, _backend(make) as together:
        for who, spec in specs.items():
            for backend in (alone, together):
                backend.add_adapter(who, spec)
                _train(backend, who)
        [results] = together.forward_backward([mixed])
        for who in specs:
            [expected] = alone.forward_backward([rows[who]])
            found = [result for row, result in zip(mixed, results, strict=True) if row.adapter_id == who]
            for one, other in zip(found, expected, strict=True):
                _equal(one.logprobs, other.logprobs, TOLERANCE)
            _close(_gradients(together, who), _gradients(alone, who))


def any_adapters_may_meet_in_a_micro_batch(make: Factory) -> None:
    """With adapters of one shape in every combination, and idle ones between them."""
    meetings = ["ac", "bdd", "a", "adf", "fb"]
    rows = [
        [_row(who, seed=10 * i + k) for k, who in enumerate(meeting)] for i, meeting in enumerate(meetings)
    ]
    with _backend(make) as alone, _backend(make) as together:
        for i, who in enumerate("abcdef"):
            for backend in (alone, together):
                backend.add_adapter(who, replace(SPEC, seed=i))
                _train(backend, who)
        together.forward_backward(rows)
        for who in "abcdf":
            alone.forward_backward([[row] for meeting in rows for row in meeting if row.adapter_id == who])
            _close(_gradients(together, who), _gradients(alone, who))
        assert not any(gradient.any() for gradient in _gradients(together, "e").values())


def a_failed_pass_changes_nothing(make: Factory) -> None:
    with _backend(make) as backend:
        backend.add_adapter("a", SPEC)
        _train(backend, "a")
        backend.forward_backward([[_row("a", seed=5)]])
        before = _everything(backend, "a")
        outside = np.full(4, backend.info.vocab_size, np.int64)
        good = _row("a")
        for bad in (
            replace(good, loss_fn="no_such_loss"),
            replace(good, tokens=outside),
            replace(
                _row("a", length=4), loss_inputs={"target_tokens": outside, "weights": np.ones(4, np.float32)}
            ),
        ):
            _raises(InvalidRequest, lambda bad=bad: backend.forward_backward([[good], [good, bad]]))
            _same_state(before, _everything(backend, "a"))
        backend.forward_backward([[good]])


# ---------------------------------------------------------------- optimizer


def steps_are_adamw(make: Factory) -> None:
    """Against the formula, in float64, from the gradients as exported."""
    settings = [
        AdamParams(learning_rate=0.01),
        AdamParams(learning_rate=0.02, beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.1),
        AdamParams(learning_rate=0.01, grad_clip_norm=0.05, weight_decay=0.01),
    ]
    with _backend(make) as backend:
        backend.add_adapter("a", SPEC)
        p = {name: matrix.astype(np.float64) for name, matrix in _weights(backend, "a").items()}
        m = {name: np.zeros_like(matrix) for name, matrix in p.items()}
        v = {name: np.zeros_like(matrix) for name, matrix in p.items()}
        for t, s in enumerate(settings, start=1):
            backend.forward_backward([[_row("a", seed=t)]])
            gradients = _gradients(backend, "a")
            norm = _norm(gradients)
            [metrics] = backend.optim_step([AdamStep("a", s)])
            assert math.isclose(_grad_norm(metrics), norm, rel_tol=1e-4)
            clip = min(1.0, s.grad_clip_norm / norm) if s.grad_clip_norm else 1.0
            for name, gradient in gradients.items():
                g = gradient * clip
                m[name] = s.beta1 * m[name] + (1 - s.beta1) * g
                v[name] = s.beta2 * v[name] + (1 - s.beta2) * g**2
                root = np.sqrt(v[name] / (1 - s.beta2**t)) + s.eps
                p[name] = p[name] * (1 - s.learning_rate * s.weight_decay)
                p[name] -= s.learning_rate * m[name] / (1 - s.beta1**t) / root
            _close(_weights(backend, "a"), p, 1e-4)
            state = _everything(backend, "a")
            assert state.optimizer is not None and state.optimizer.step == t
            _close(state.optimizer.exp_avg, m, 1e-4)
            _close(state.optimizer.exp_avg_sq, v, 1e-4)
            assert state.gradients is not None and not any(g.any() for g in state.gradients.values())


def a_learning_rate_of_zero_moves_nothing(make: Factory) -> None:
    with _backend(make) as backend:
        backend.add_adapter("a", SPEC)
        _train(backend, "a")
        backend.forward_backward([[_row("a")]])
        before = _weights(backend, "a")
        backend.optim_step([AdamStep("a", AdamParams(learning_rate=0.0, weight_decay=0.5))])
        _same(before, _weights(backend, "a"))


def a_step_without_gradient_is_one_with_zero_gradient(make: Factory) -> None:
    with _backend(make) as backend:
        backend.add_adapter("a", SPEC)
        _train(backend, "a")
        before = _everything(backend, "a")
        [metrics] = backend.optim_step(
            [AdamStep("a", AdamParams(learning_rate=0.0, beta1=0.5, beta2=0.75, eps=0.0))]
        )
        after = _everything(backend, "a")
        assert _grad_norm(metrics) == 0
        assert before.optimizer is not None and after.optimizer is not None
        assert after.optimizer.step == before.optimizer.step + 1
        _close(after.optimizer.exp_avg, {k: x / 2 for k, x in before.optimizer.exp_avg.items()})
        _close(after.optimizer.exp_avg_sq, {k: 3 * x / 4 for k, x in before.optimizer.exp_avg_sq.items()})
        backend.add_adapter("b", SPEC)
        backend.optim_step([AdamStep("b", AdamParams(learning_rate=0.1, eps=0.0))])
        assert all(np.isfinite(matrix).all() for matrix in _weights(backend, "b").values())


def idle_adapters_are_not_moved(make: Factory) -> None:
    with _backend(make) as backend:
        for i, who in enumerate(("idle", "a", "b")):
            backend.add_adapter(who, replace(SPEC, seed=i))
            _train(backend, who)
        backend.forward_backward([[_row("idle", seed=9)]])
        before = _everything(backend, "idle")
        backend.forward_backward([[_row("a"), _row("b")]])
        decay = AdamParams(learning_rate=0.1, weight_decay=0.5)
        backend.optim_step([AdamStep("a", decay), AdamStep("b", STEP)])
        _same_state(before, _everything(backend, "idle"))


def steps_together_are_steps_alone(make: Factory) -> None:
    settings = {
        "a": STEP,
        "b": AdamParams(learning_rate=0.05, weight_decay=0.2, grad_clip_norm=0.1),
        "c": AdamParams(learning_rate=0.0),
        "d": AdamParams(learning_rate=0.02, beta1=0.5, beta2=0.5, eps=0.1),
    }
    with _backend(make) as alone, _backend(make) as together:
        for i, who in enumerate(settings):
            for backend in (alone, together):
                backend.add_adapter(who, replace(SPEC, seed=i, rank=4 if i < 3 else 2))
        for seed in range(2):
            for who in settings:
                for backend in (alone, together):
                    backend.forward_backward([[_row(who, seed=seed)]])
            expected = [alone.optim_step([AdamStep(who, params)])[0] for who, params in settings.items()]
            metrics = together.optim_step(
                [AdamStep(who, params) for who, params in reversed(settings.items())]
            )
            for who, one, other in zip(settings, expected, reversed(metrics), strict=True):
                assert math.isclose(_grad_norm(one), _grad_norm(other), rel_tol=1e-4)
                _close(_weights(together, who), _weights(alone, who))


def a_step_that_would_not_be_finite_is_refused_alone(make: Factory) -> None:
    """Others in the call step as if alone; the refused run goes on as if the passes before had not been."""
    with _backend(make) as alone, _backend(make) as together:
        for backend in (alone, together):
            for i, who in enumerate(("bad", "good")):
                backend.add_adapter(who, replace(SPEC, seed=i))
                _train(backend, who)
        before = _everything(alone, "bad")
        for size, params in (
            (3e38, STEP),  # no number is what comes of it
            (3e38, _params(grad_clip_norm=1.0)),  # nor can it be scaled down
            (1e25, STEP),  # finite, but not as a square
            (1.0, _params(learning_rate=1e39)),
            (1.0, _params(learning_rate=1e20, weight_decay=1e20)),
        ):
            together.forward_backward([[_row("good", seed=3), _row("bad", weights=_weights_of(size))]])
            refused, made = together.optim_step([AdamStep("bad", params), AdamStep("good", STEP)])
            assert isinstance(refused, InvalidRequest) and "gradient is dropped" in refused.message, refused
            alone.forward_backward([[_row("good", seed=3)]])
            [expected] = alone.optim_step([AdamStep("good", STEP)])
            assert math.isclose(_grad_norm(made), _grad_norm(expected), rel_tol=1e-4)
            _close(_weights(together, "good"), _weights(alone, "good"))
            _same_state(before, _everything(together, "bad"))
        for backend in (alone, together):
            backend.forward_backward([[_row("bad", seed=4)]])
            backend.optim_step([AdamStep("bad", STEP)])
        _close(_weights(together, "bad"), _weights(alone, "bad"))


def a_gradient_that_is_finite_has_a_finite_norm(make: Factory) -> None:
    """Also where its squares are no numbers of float32; clipping it is then what clipping a smaller one is."""
    with _backend(make) as backend:
        backend.add_adapter("a", SPEC)
        before = _trained_state(backend, "a")
        weights: list[Matrices] = []
        for size in (1.0, 1e25, 1e-25):
            backend.import_adapter("a", before)
            backend.forward_backward([[_row("a", weights=_weights_of(size))]])
            norm = _norm(_gradients(backend, "a"))
            step = _params(grad_clip_norm=1e-3, eps=1e-30)
            [metrics] = backend.optim_step([AdamStep("a", step)])
            assert norm > 0, (size, norm)
            assert math.isclose(_grad_norm(metrics), norm, rel_tol=1e-4)
            weights.append(_weights(backend, "a"))
        _close(weights[1], weights[0], 1e-3)


# ---------------------------------------------------------------- state


def an_export_is_a_copy(make: Factory) -> None:
    with _backend(make) as backend:
        backend.add_adapter("a", SPEC)
        state = _trained_state(backend, "a")
        kept = {name: matrix.copy() for name, matrix in state.weights.items()}
        _train(backend, "a")
        _same(kept, state.weights)
        for matrix in state.weights.values():
            matrix[:] = 7
        assert not any((matrix == 7).any() for matrix in _weights(backend, "a").values())
        assert backend.export_adapter("a", with_optimizer=False).optimizer is None
        assert backend.export_adapter("a", with_optimizer=True).gradients is None
        _check_names(state)


def an_import_restores_everything(make: Factory) -> None:
    with _backend(make) as backend, _backend(make) as other:
        backend.add_adapter("a", SPEC)
        _train(backend, "a")
        backend.forward_backward([[_row("a", seed=3)]])
        state = _everything(backend, "a")
        other.add_adapter("elsewhere", replace(SPEC, seed=8))
        _train(other, "elsewhere")
        other.import_adapter("elsewhere", state)
        _same_state(state, _everything(other, "elsewhere"))
        for who, where in (("a", backend), ("elsewhere", other)):
            where.forward_backward([[_row(who, seed=4)]])
            where.optim_step([AdamStep(who, STEP)])
        _close(_weights(other, "elsewhere"), _weights(backend, "a"))


def what_a_state_leaves_out_is_reset(make: Factory) -> None:
    with _backend(make) as backend:
        backend.add_adapter("a", SPEC)
        weights = _trained_state(backend, "a").weights
        backend.forward_backward([[_row("a")]])
        backend.import_adapter("a", backend.export_adapter("a", with_optimizer=False))
        state = _everything(backend, "a")
        assert state.optimizer is not None and state.gradients is not None and state.optimizer.step == 0
        for matrices in (state.optimizer.exp_avg, state.optimizer.exp_avg_sq, state.gradients):
            assert not any(matrix.any() for matrix in matrices.values())
        _same(weights, state.weights)


def a_state_that_does_not_fit_is_refused(make: Factory) -> None:
    with _backend(make) as backend:
        backend.add_adapter("a", SPEC)
        backend.add_adapter("rank", replace(SPEC, rank=5))
        backend.add_adapter("modules", replace(SPEC, train_mlp=False))
        _train(backend, "a")
        backend.forward_backward([[_row("a")]])
        before = _everything(backend, "a")
        name = next(iter(before.weights))
        assert before.optimizer is not None
        missing = {other: matrix for other, matrix in before.weights.items() if other != name}
        longer = {**before.weights, name: np.zeros((4, 1000), np.float32)}
        for wrong in (
            _everything(backend, "rank"),
            _everything(backend, "modules"),
            replace(before, weights=missing),
            replace(before, weights=longer),
            replace(before, gradients=missing),
            replace(before, optimizer=replace(before.optimizer, exp_avg=longer)),
            replace(before, optimizer=replace(before.optimizer, exp_avg_sq=missing)),
        ):
            _raises(InvalidRequest, lambda wrong=wrong: backend.import_adapter("a", wrong))
            _same_state(before, _everything(backend, "a"))


def a_state_that_is_not_finite_is_refused(make: Factory) -> None:
    """A gradient may be: the step looks at it."""
    with _backend(make) as backend:
        backend.add_adapter("a", SPEC)
        before = _trained_state(backend, "a")
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
                _raises(InvalidRequest, lambda wrong=wrong: backend.import_adapter("a", wrong))
                _same_state(before, _everything(backend, "a"))
        negative = replace(moments, exp_avg_sq=with_one(moments.exp_avg_sq, -1e-9))  # its root is no number
        _raises(InvalidRequest, lambda: backend.import_adapter("a", replace(before, optimizer=negative)))
        gradients = before.gradients
        assert gradients is not None
        backend.import_adapter("a", replace(before, gradients=with_one(gradients, math.inf)))
        [outcome] = backend.optim_step([AdamStep("a", STEP)])
        assert isinstance(outcome, InvalidRequest)
        _same_state(before, _everything(backend, "a"))


CHECKS: tuple[Check, ...] = (
    a_new_adapter_changes_nothing,
    a_seed_gives_the_same_adapter_whatever_else_is_there,
    a_starts_uniform_and_b_zero,
    rank_and_flags_are_what_was_asked_for,
    alpha_scales_the_low_rank_term,
    impossible_shapes_are_refused,
    unknown_and_taken_ids_are_refused,
    a_removed_adapter_leaves_nothing_behind,
    many_adapters_keep_their_values,
    results_come_in_the_order_of_the_rows,
    the_loss_is_the_weighted_sum,
    every_loss_is_its_formula,
    a_loss_takes_its_parameters,
    several_candidates_are_as_many_rows,
    gradients_are_those_of_the_loss,
    two_calls_add_up_to_one,
    weights_of_zero_are_no_op,
    forward_only_rows_leave_no_gradient,
    company_changes_no_number,
    any_adapters_may_meet_in_a_micro_batch,
    a_failed_pass_changes_nothing,
    steps_are_adamw,
    a_learning_rate_of_zero_moves_nothing,
    a_step_without_gradient_is_one_with_zero_gradient,
    idle_adapters_are_not_moved,
    steps_together_are_steps_alone,
    a_step_that_would_not_be_finite_is_refused_alone,
    a_gradient_that_is_finite_has_a_finite_norm,
    an_export_is_a_copy,
    an_import_restores_everything,
    what_a_state_leaves_out_is_reset,
    a_state_that_does_not_fit_is_refused,
    a_state_that_is_not_finite_is_refused,
)

# ---------------------------------------------------------------- parts of checks


@contextmanager
def _backend(make: Factory) -> Generator[TrainingBackend]:
    backend = make()
    try:
        yield backend
    finally:
        backend.close()


def _row(adapter_id: str, seed: int = 0, length: int = 6, weights: Float32Array | None = None) -> Row:
    """Tokens and targets below 100 and, unless given, weights around 0 from a seed."""
    draw = np.random.default_rng(seed)
    drawn = draw.normal(size=length).astype(np.float32)
    inputs: dict[str, Array] = {
        "target_tokens": draw.integers(0, 100, length),
        "weights": drawn if weights is None else weights,
    }
    return Row(adapter_id, draw.integers(0, 100, length), "cross_entropy", inputs)


def _weights_of(size: float) -> Float32Array:
    """For a row of 6 tokens."""
    return np.array([size, -size, size, size, 0.0, size], np.float32)


def _params(**changes: float) -> AdamParams:
    return STEP.model_copy(update=changes)


def _sampled(logprobs: Float32Array) -> dict[str, Array]:
    """What a sampler whose policy is a little off would have left, with advantages of both signs and none."""
    draw = np.random.default_rng(11)
    length = len(logprobs)
    return {
        "logprobs": logprobs + 0.3 * draw.normal(size=length).astype(np.float32),
        "advantages": np.resize(np.array([1.5, -0.5, 0.0], np.float32), length),
        "sequence_ratio_mask": (np.arange(length) >= 2).astype(np.float32),
    }


def _train(backend: TrainingBackend, adapter_id: str, seed: int = 100) -> None:
    """Two steps, after which neither A nor B is as it was."""
    for i in range(2):
        backend.forward_backward([[_row(adapter_id, seed + i, length=8)]])
        backend.optim_step([AdamStep(adapter_id, STEP)])


def _trained_state(backend: TrainingBackend, adapter_id: str, seed: int = 100) -> AdapterState:
    _train(backend, adapter_id, seed)
    return _everything(backend, adapter_id)


def _everything(backend: TrainingBackend, adapter_id: str) -> AdapterState:
    return backend.export_adapter(adapter_id, with_optimizer=True, with_gradients=True)


def _weights(backend: TrainingBackend, adapter_id: str) -> Matrices:
    return backend.export_adapter(adapter_id, with_optimizer=False).weights


def _gradients(backend: TrainingBackend, adapter_id: str) -> Matrices:
    gradients = _everything(backend, adapter_id).gradients
    assert gradients is not None
    return gradients


def _grad_norm(outcome: StepOutcome) -> float:
    assert isinstance(outcome, dict), outcome
    return outcome["grad_norm:mean"]


def _check_names(state: AdapterState) -> None:
    """Names by module, and shapes of the right rank; those of routed experts have it as often as there are experts."""
    expected = [
        f"base_model.model.{module}.lora_{matrix}.weight"
        for module in state.target_modules
        for matrix in "AB"
    ]
    assert sorted(state.weights) == sorted(expected)
    for name, matrix in state.weights.items():
        assert matrix.dtype == np.float32
        ranks = matrix.shape[0 if name.endswith("lora_A.weight") else 1]
        assert ranks % state.spec.rank == 0 if ".experts." in name else ranks == state.spec.rank, name


def _norm(matrices: Mapping[str, Array]) -> float:
    return math.sqrt(sum(float((matrix.astype(np.float64) ** 2).sum()) for matrix in matrices.values()))


def _close(found: Mapping[str, Array], expected: Mapping[str, Array], tolerance: float = TOLERANCE) -> None:
    """Equal as one vector each, relative to its length."""
    assert set(found) == set(expected)
    error = _norm({name: found[name].astype(np.float64) - expected[name] for name in expected})
    assert error <= tolerance * _norm(expected), (
        f"relative error {error / _norm(expected):.2e} > {tolerance:.0e}"
    )


def _equal(found: Array, expected: Array, tolerance: float) -> None:
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def _same(found: Matrices, expected: Matrices) -> None:
    """Equal bit for bit."""
    assert set(found) == set(expected)
    for name, matrix in expected.items():
        assert np.array_equal(found[name], matrix), f"{name} differs"


def _same_state(found: AdapterState, expected: AdapterState) -> None:
    _same(found.weights, expected.weights)
    assert found.optimizer is not None and expected.optimizer is not None
    assert found.gradients is not None and expected.gradients is not None
    assert found.optimizer.step == expected.optimizer.step
    _same(found.optimizer.exp_avg, expected.optimizer.exp_avg)
    _same(found.optimizer.exp_avg_sq, expected.optimizer.exp_avg_sq)
    _same(found.gradients, expected.gradients)


def _raises(kind: type[Exception], call: Callable[[], object]) -> None:
    try:
        call()
    except kind:
        return
    raise AssertionError(f"expected {kind.__name__}")
