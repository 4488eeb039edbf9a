"""The comparison of sampler and trainer: on numbers made for it, and on a real model whose sampler is given less."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from twinkle.protocol.errors import ServerFault
from twinkle.protocol.types import AdamParams, SampleResponse
from twinkle.server.backends.protocol import AdamStep, AdapterSpec, AdapterState, ModelConfig, Row, RowResult
from twinkle.server.backends.transformers import TransformersBackend
from twinkle.server.engine.shape_check import AdapterShape, ProvenShapes, compare, probe_tokens
from twinkle.server.engine.worker import LocalWorker
from twinkle.server.samplers.protocol import GenerateRequest
from twinkle.server.samplers.transformers import TransformersEngine

SHAPE = AdapterShape(4, frozenset({"model.layers.0.self_attn.q_proj", "lm_head"}))
BASE = np.linspace(-3, -1, 32).astype(np.float32)


@dataclass
class MadeNumbers:
    """A trainer and a sampler whose log-probabilities are given: 32 of the base model, and what each adds to them."""

    trained: float
    sampled: float
    asked: list[str | None] = field(default_factory=list[str | None])

    async def forward_backward(self, micro_batches: Sequence[Sequence[Row]]) -> list[list[RowResult]]:
        [[row]] = micro_batches
        assert row.forward_only and row.adapter_id == "run" and len(row.tokens) == 32
        assert row.loss_inputs["target_tokens"][:-1].tolist() == row.tokens[1:].tolist()
        return [[RowResult(BASE + np.float32(self.trained), 0.0)]]

    async def generate(self, request: GenerateRequest) -> SampleResponse:
        assert request.prompt_logprobs and len(request.prompt) == 33
        self.asked.append(request.adapter_id)
        added = 0.0 if request.adapter_id is None else self.sampled
        return SampleResponse([], prompt_logprobs=[None, *(BASE + np.float32(added)).tolist()])


def check(shapes: ProvenShapes, numbers: MadeNumbers, shape: AdapterShape = SHAPE) -> bool:
    """Whether the shape is proven afterwards."""
    asyncio.run(shapes.check(shape, numbers, "run", numbers, "copy"))
    return shapes.has(shape)


def test_a_shape_that_agrees_is_proven_once_and_not_looked_at_again():
    shapes, numbers = ProvenShapes("float32", 100), MadeNumbers(0.5, 0.5002)
    assert check(shapes, numbers) and sorted(map(str, numbers.asked)) == ["None", "copy"]
    numbers.asked.clear()
    assert check(shapes, numbers) and numbers.asked == []
    # Another rank, or other layers, is another shape.
    assert check(shapes, numbers, replace(SHAPE, rank=8)) and len(numbers.asked) == 2
    assert not shapes.has(AdapterShape(4, frozenset({"lm_head"})))


def test_an_adapter_without_effect_proves_nothing_and_the_next_one_is_checked():
    shapes = ProvenShapes("float32", 100)
    assert not check(shapes, MadeNumbers(0.0, 0.0))
    assert not check(shapes, MadeNumbers(0.003, 0.0035))  # within rounding, but too little to tell
    with pytest.raises(ServerFault, match="rank 4 on lm_head, q_proj .*: it computes the base model"):
        check(shapes, MadeNumbers(0.2, 0.0))
    assert not shapes.has(SHAPE)
    assert check(shapes, MadeNumbers(0.2, 0.2))


@pytest.mark.parametrize(
    ("dtype", "trained", "sampled", "agrees"),
    [
        ("float32", 0.5, 0.503, False),
        ("bfloat16", 2.0, 1.8, True),
        ("bfloat16", 2.0, 1.2, False),
        ("bfloat16", 0.5, 0.0, False),
        ("float32", 0.5, float("nan"), False),
    ],
)
def test_what_is_rounding_depends_on_the_dtype(dtype: str, trained: float, sampled: float, agrees: bool):
    shapes = ProvenShapes(dtype, 100)
    if agrees:
        assert check(shapes, MadeNumbers(trained, sampled))
    else:
        with pytest.raises(ServerFault, match="not compute adapters"):
            check(shapes, MadeNumbers(trained, sampled))


@pytest.fixture
def worker(tiny_model_dir: Path):
    config = ModelConfig(tiny_model_dir)
    backend = TransformersBackend(config)
    backend.add_adapter("run", AdapterSpec(rank=4, seed=3))
    worker = LocalWorker(backend, TransformersEngine.create(config, backend))
    yield worker
    asyncio.run(worker.close())


async def train(worker: LocalWorker, steps: int) -> AdapterState:
    tokens = np.arange(1, 30)
    inputs = {"target_tokens": tokens + 1, "weights": np.ones(29, np.float32)}
    for _ in range(steps):
        await worker.forward_backward([[Row("run", tokens, "cross_entropy", inputs)]])
        await worker.optim_step([AdamStep("run", AdamParams(learning_rate=1e-2))])
    return await worker.export_adapter("run", with_optimizer=False)


async def test_a_real_sampler_agrees_with_its_trainer_and_one_that_leaves_out_a_kind_of_layer_does_not(
    worker,
):
    shapes = ProvenShapes("float32", 512)
    fresh = await train(worker, 0)
    shape = AdapterShape.of(fresh)
    await worker.add_sampler_adapter("fresh", fresh)
    await shapes.check(shape, worker, "run", worker, "fresh")
    assert not shapes.has(shape)
    state = await train(worker, 3)
    for kind in ("q_proj", "down_proj", "lm_head"):
        weights = {
            name: np.zeros_like(matrix) if kind in name else matrix for name, matrix in state.weights.items()
        }
        await worker.add_sampler_adapter(kind, AdapterState(state.spec, state.target_modules, weights))
        with pytest.raises(ServerFault, match="as the trainer does"):
            await shapes.check(shape, worker, "run", worker, kind)
    await worker.add_sampler_adapter("whole", state)
    await shapes.check(shape, worker, "run", worker, "whole")
    assert shapes.has(shape)
    found = await compare(worker, "run", worker, "whole", probe_tokens(512))
    assert found.difference < 1e-4 < 0.1 < found.effect
