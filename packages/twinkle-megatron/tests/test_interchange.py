"""An adapter is the same adapter on every layout of ranks, and on the Transformers backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft_alone
import pytest
from rank_processes import RankProcesses
from tiny_models import VOCAB_SIZE

from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.types import AdamParams
from twinkle.server.backends.contract.parts import assert_close, assert_same, assert_same_state
from twinkle.server.backends.lora import peft_format
from twinkle.server.backends.protocol import AdamStep, AdapterSpec, AdapterState, ModelConfig
from twinkle.server.backends.transformers import TransformersBackend

SPEC = AdapterSpec(rank=4, alpha=8.0, seed=7)
STEP = AdamParams(learning_rate=1e-2, weight_decay=0.01, grad_clip_norm=1.0)
DENSE_FIRST = "qwen3_moe, first layer dense"
CASES = [
    ("qwen3", ["TP2", "PP2", "TP2xPP2", "TP2+SP", "TP1"]),
    (DENSE_FIRST, ["EP2", "TP2xEP2", "PP2xEP2", "PP2"]),
    ("qwen3_5", ["TP2", "PP2", "TP2xPP2", "TP2+SP", "TP1"]),
    ("qwen3_5_moe", ["EP2", "TP2xEP2", "PP2"]),
    # With a dense layer.
    ("qwen3_next", ["TP2xEP2", "PP2"]),
]


@pytest.fixture(
    params=CASES, ids=["dense", "mixture of experts", "hybrid", "hybrid mixture of experts", "Qwen3-Next"]
)
def backends(
    request: pytest.FixtureRequest,
    model: Callable[[str], Path],
    ranks: Callable[[Path, str], RankProcesses],
) -> list[Any]:
    """The Transformers backend, then Megatron's on layouts of all kinds."""
    family, layouts = request.param
    return [
        TransformersBackend(ModelConfig(model(family))),
        *(ranks(model(family), layout).backend() for layout in layouts),
    ]


def test_a_seed_gives_the_same_adapter_everywhere(backends: list[Any]) -> None:
    states: list[AdapterState] = []
    for backend in backends:
        backend.add_adapter("a", SPEC)
        states.append(backend.export_adapter("a", with_optimizer=False))
        assert backend.info.export == backends[0].info.export, "files are written alike"
    for state in states[1:]:
        assert state.target_modules == states[0].target_modules
        assert_same(state.weights, states[0].weights)


def test_training_goes_on_from_backend_to_backend(backends: list[Any], tmp_path: Path) -> None:
    """A step on each, handed on as files with AdamW's moments: as if it had been on one all the time."""
    alone, *_ = backends
    state = None
    for i, backend in enumerate(backends):
        backend.add_adapter("travels", SPEC)
        if state is None:
            alone.add_adapter("stays", SPEC)
        else:
            directory = tmp_path / str(i)
            directory.mkdir()
            peft_format.write(directory, state, "tiny")
            backend.import_adapter("travels", peft_format.read(directory, with_optimizer=True))
        losses: dict[str, float] = {}
        for where, who in ((backend, "travels"), (alone, "stays")):
            rows = [peft_alone.random_row(who, n, 10 * i + n, VOCAB_SIZE) for n in (5, 12, 8)]
            [results] = where.forward_backward([rows])
            losses[who] = sum(result.loss for result in results)
            where.optim_step([AdamStep(who, STEP)])
        assert losses["travels"] == pytest.approx(losses["stays"], rel=1e-5, abs=1e-5)
        state = backend.export_adapter("travels", with_optimizer=True)
    expected = alone.export_adapter("stays", with_optimizer=True)
    assert state is not None and state.optimizer is not None and expected.optimizer is not None
    assert state.optimizer.step == len(backends)
    assert_close(state.weights, expected.weights, 1e-4)
    assert_close(state.optimizer.exp_avg, expected.optimizer.exp_avg, 1e-4)


def test_a_state_with_a_gradient_is_restored_bit_for_bit(backends: list[Any]) -> None:
    source = backends[-1]
    source.add_adapter("a", SPEC)
    contract_rows = [peft_alone.random_row("a", 9, 1, VOCAB_SIZE)]
    source.forward_backward([contract_rows])
    source.optim_step([AdamStep("a", STEP)])
    source.forward_backward([contract_rows])
    state = source.export_adapter("a", with_optimizer=True, with_gradients=True)
    for backend in backends[:-1]:
        backend.add_adapter("a", replace(SPEC, seed=99))
        backend.import_adapter("a", state)
        assert_same_state(backend.export_adapter("a", with_optimizer=True, with_gradients=True), state)


def test_a_state_that_does_not_fit_is_refused_by_all_ranks(backends: list[Any]) -> None:
    for backend in backends:
        backend.add_adapter("a", SPEC)
        state = backend.export_adapter("a", with_optimizer=False)
        name = next(reversed(state.weights))
        wrong = {**state.weights, name: np.zeros((3, 3), np.float32)}
        with pytest.raises(InvalidRequest, match="shape"):
            backend.import_adapter("a", replace(state, weights=wrong))
        assert_same(backend.export_adapter("a", with_optimizer=False).weights, state.weights)
