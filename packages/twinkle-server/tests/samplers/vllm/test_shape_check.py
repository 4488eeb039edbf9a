"""A new shape of adapters, computed by a real trainer and by vLLM."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sampling_contract import VOCAB
from vllm_engines import require_vllm

from twinkle.protocol.errors import ServerFault
from twinkle.server.backends.protocol import AdapterSpec, AdapterState
from twinkle.server.engine.shape_check import AdapterShape, ProvenShapes
from twinkle.server.engine.worker import LocalWorker

require_vllm()


@pytest.fixture
def worker(backend, shared_engine) -> Any:
    return LocalWorker(backend, shared_engine)


@pytest.mark.parametrize("train_unembed", [True, False])
async def test_vllm_computes_a_shape_as_the_trainer_does_and_without_its_adapter_is_found_out(
    worker, backend, random_state, train_unembed: bool
):
    spec = AdapterSpec(rank=8, seed=50, train_unembed=train_unembed)
    state = random_state(spec)
    backend.add_adapter("run", spec)
    backend.import_adapter("run", state)
    shapes, shape = ProvenShapes("float32", VOCAB), AdapterShape.of(state)
    nothing = {name: matrix * ("lora_A" in name) for name, matrix in state.weights.items()}
    half = {name: matrix * ("mlp" not in name) for name, matrix in state.weights.items()}
    published = {"whole": state.weights, "nothing": nothing, "half": half}
    try:
        for name, weights in published.items():
            weights = {key: matrix.astype(np.float32) for key, matrix in weights.items()}
            await worker.add_sampler_adapter(name, AdapterState(spec, state.target_modules, weights))
        with pytest.raises(ServerFault, match="it computes the base model"):
            await shapes.check(shape, worker, "run", worker, "nothing")
        with pytest.raises(ServerFault, match="as the trainer does"):
            await shapes.check(shape, worker, "run", worker, "half")
        await shapes.check(shape, worker, "run", worker, "whole")
        assert shapes.has(shape)
    finally:
        backend.remove_adapter("run")
        for name in published:
            await worker.remove_sampler_adapter(name)
