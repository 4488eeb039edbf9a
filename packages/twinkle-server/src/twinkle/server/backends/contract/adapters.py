"""Adapters: how they start, and that they keep apart."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from twinkle.protocol.errors import InvalidRequest
from twinkle.server.backends.contract.parts import (
    SPEC,
    STEP,
    TOLERANCE,
    Factory,
    assert_near,
    assert_raises,
    assert_same,
    assert_same_state,
    check_names,
    grad_norm,
    make_row,
    opened,
    train,
    trained_state,
    weights_of,
    whole_state,
)
from twinkle.server.backends.protocol import AdamStep, AdapterSpec, AdapterState


def a_new_adapter_changes_nothing(make: Factory) -> None:
    with opened(make) as backend:
        backend.add_adapter("a", SPEC)
        backend.add_adapter("b", replace(SPEC, rank=2, alpha=8.0, seed=2, train_mlp=False))
        [[a, b]] = backend.forward_backward([[make_row("a"), make_row("b")]])
        assert_near(a.logprobs, b.logprobs, TOLERANCE)


def a_seed_gives_the_same_adapter_whatever_else_is_there(make: Factory) -> None:
    with opened(make) as backend, opened(make) as other:
        backend.add_adapter("a", SPEC)
        for i in range(3):
            other.add_adapter(f"other {i}", replace(SPEC, seed=i))
        train(other, "other 0")
        other.add_adapter("a", SPEC)
        other.add_adapter("b", replace(SPEC, seed=2))
        weights = weights_of(backend, "a")
        assert_same(weights, weights_of(other, "a"))
        different = weights_of(other, "b")
        a_names = [name for name in weights if name.endswith("lora_A.weight")]
        assert all(not np.array_equal(weights[name], different[name]) for name in a_names), (
            "seeds 1 and 2 agree"
        )


def a_starts_uniform_and_b_zero(make: Factory) -> None:
    with opened(make) as backend:
        backend.add_adapter("a", replace(SPEC, rank=8))
        for name, matrix in weights_of(backend, "a").items():
            if name.endswith("lora_B.weight"):
                assert not matrix.any(), f"{name} is not zero"
            else:  # Kaiming with a = sqrt 5: uniform within 1 / sqrt in_features
                bound = 1 / math.sqrt(matrix.shape[1])
                assert bound * 0.8 < np.abs(matrix).max() <= bound * (1 + 1e-6), (
                    f"{name} is not within its bound"
                )


def rank_and_flags_are_what_was_asked_for(make: Factory) -> None:
    flags = ("train_attn", "train_mlp", "train_unembed")
    with opened(make) as backend:
        backend.add_adapter("all", SPEC)
        all_modules = backend.export_adapter("all", with_optimizer=False).target_modules
        parts: list[str] = []
        for i, flag in enumerate(flags):
            only = {name: name == flag for name in flags}
            backend.add_adapter(flag, AdapterSpec(rank=i + 1, **only))
            state = backend.export_adapter(flag, with_optimizer=False)
            parts += state.target_modules
            assert state.spec.rank == i + 1
            check_names(state)
        assert sorted(parts) == sorted(all_modules), "the three flags' modules are not all modules, each once"


def alpha_scales_the_low_rank_term(make: Factory) -> None:
    with opened(make) as backend:
        backend.add_adapter("a", replace(SPEC, alpha=8.0))
        backend.add_adapter("b", replace(SPEC, alpha=32.0))
        state = trained_state(backend, "a")
        quartered = {
            name: matrix / 4 if name.endswith("lora_B.weight") else matrix
            for name, matrix in state.weights.items()
        }
        same_by_alpha = replace(state, spec=replace(SPEC, alpha=32.0), weights=quartered)
        # The second has another alpha than the adapter it is put into: an import brings its own.
        for imported in (same_by_alpha, state):
            backend.import_adapter("b", imported)
            assert backend.export_adapter("b", with_optimizer=False).spec.alpha == imported.spec.alpha
            [[a, b]] = backend.forward_backward([[make_row("a"), make_row("b")]])
            assert_near(a.logprobs, b.logprobs, TOLERANCE)


def impossible_shapes_are_refused(make: Factory) -> None:
    with opened(make) as backend:
        for rank in (0, -1, backend.info.max_lora_rank + 1):
            assert_raises(
                InvalidRequest, lambda rank=rank: backend.add_adapter("a", replace(SPEC, rank=rank))
            )
        nothing = replace(SPEC, train_attn=False, train_mlp=False, train_unembed=False)
        assert_raises(InvalidRequest, lambda: backend.add_adapter("a", nothing))
        backend.add_adapter("a", replace(SPEC, rank=backend.info.max_lora_rank))


def unknown_and_taken_ids_are_refused(make: Factory) -> None:
    with opened(make) as backend:
        backend.add_adapter("a", SPEC)
        before = whole_state(backend, "a")
        assert_raises(ValueError, lambda: backend.add_adapter("a", SPEC))
        assert_raises(KeyError, lambda: backend.remove_adapter("b"))
        assert_raises(KeyError, lambda: backend.export_adapter("b", with_optimizer=False))
        assert_raises(KeyError, lambda: backend.import_adapter("b", backend.export_adapter("a", True)))
        assert_raises(KeyError, lambda: backend.forward_backward([[make_row("a")], [make_row("b")]]))
        assert_raises(KeyError, lambda: backend.optim_step([AdamStep("a", STEP), AdamStep("b", STEP)]))
        assert_raises(ValueError, lambda: backend.optim_step([AdamStep("a", STEP), AdamStep("a", STEP)]))
        assert_same_state(before, whole_state(backend, "a"))


def a_removed_adapter_leaves_nothing_behind(make: Factory) -> None:
    with opened(make) as backend:
        backend.add_adapter("stays", SPEC)
        backend.add_adapter("a", SPEC)
        fresh = whole_state(backend, "a")
        train(backend, "a")
        backend.forward_backward([[make_row("a")]])  # a pending gradient
        backend.remove_adapter("a")
        backend.add_adapter("b", SPEC)
        assert_same_state(fresh, whole_state(backend, "b"))
        [metrics] = backend.optim_step([AdamStep("b", STEP)])
        assert grad_norm(metrics) == 0
        assert_same(fresh.weights, weights_of(backend, "b"))


def many_adapters_keep_their_values(make: Factory) -> None:
    with opened(make) as backend:
        states: dict[str, AdapterState] = {}
        for i in range(9):
            backend.add_adapter(str(i), replace(SPEC, seed=i))
            states[str(i)] = trained_state(backend, str(i), seed=i)
        for i in (3, 0, 7):
            backend.remove_adapter(str(i))
            del states[str(i)]
        for adapter_id, state in states.items():
            assert_same_state(state, whole_state(backend, adapter_id))
