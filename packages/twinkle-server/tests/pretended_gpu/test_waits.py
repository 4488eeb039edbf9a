"""How often the host waits for a GPU: upper bounds, to be lowered as the code gets better, never raised.

Trainer and sampler share a stream, so whoever waits, waits for all that the other has queued. The aims were 2 for a
micro-batch, 1 for a decode step, 1 for a sequence that begins, 2 for an adapter's way from the trainer to the sampler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pretended_cuda.counts import Counts

from twinkle.protocol.types import AdamParams, SamplingParams
from twinkle.server.backends.lora.losses.formulas import LOSS_SPECS
from twinkle.server.backends.protocol import AdamStep, AdapterSpec, ModelConfig, Row
from twinkle.server.backends.transformers import TransformersBackend
from twinkle.server.samplers.protocol import GenerateRequest
from twinkle.server.samplers.transformers import TransformersEngine

ADAPTERS = [f"adapter {i}" for i in range(10)]


@pytest.fixture(scope="module")
def config(tiny_model_dir: Path) -> ModelConfig:
    return ModelConfig(tiny_model_dir, "bfloat16")


@pytest.fixture(scope="module")
def loaded(config: ModelConfig) -> TransformersBackend:
    return TransformersBackend(config)


@pytest.fixture
def backend(loaded: TransformersBackend, config: ModelConfig, device_counts: Counts) -> TransformersBackend:
    backend = TransformersBackend(config, loaded.loaded)
    for i, adapter_id in enumerate(ADAPTERS):
        backend.add_adapter(adapter_id, AdapterSpec(rank=4 if i < 8 else 16, seed=i, train_unembed=False))
    return backend


@pytest.fixture
def engine(backend: TransformersBackend, config: ModelConfig) -> Iterator[TransformersEngine]:
    engine = TransformersEngine.create(config, backend)
    for adapter_id in ADAPTERS:
        engine.add_adapter(adapter_id, backend.export_adapter(adapter_id, with_optimizer=False))
    yield engine
    engine.close()


def row(adapter_id: str, loss: str = "cross_entropy", forward_only: bool = False) -> Row:
    tokens, ones = np.arange(1, 17), np.ones(16, np.float32)
    inputs = {"target_tokens": tokens, "weights": ones, "logprobs": -ones, "advantages": ones}
    wanted = {"target_tokens", *LOSS_SPECS[loss].inputs}
    return Row(
        adapter_id,
        tokens,
        loss,
        {name: array for name, array in inputs.items() if name in wanted},
        forward_only=forward_only,
    )


# Of each micro-batch Transformers asks whether rows are packed (its `find_packed_sequence_indices`); the other wait is
# for the results.
MICRO_BATCH = 2
OPTIMIZER_STEP = 1  # for the gradients' norms, of all adapters of a rank
HAND_OVER = 2
DECODE_STEP = 1
FILTER = 1  # whether top_p is reached among the likeliest tokens
BEGIN = 1  # for the first tokens of all sequences that begin together


def alternating(i: int) -> str:
    return ("cross_entropy", "importance_sampling")[i % 2]


@pytest.mark.parametrize(
    ("adapters", "loss_of", "forward_only"),
    [
        ((0, 1, 2, 3), lambda _: "cross_entropy", 0),
        ((0, 0, 1, 2), lambda _: "cross_entropy", 0),
        ((0, 2, 8, 9, 9), alternating, 2),
    ],
    ids=["even", "uneven", "of two ranks, two losses, some not trained"],
)
def test_micro_batches(
    backend: TransformersBackend,
    device_counts: Counts,
    adapters: tuple[int, ...],
    loss_of: Callable[[int], str],
    forward_only: int,
) -> None:
    batch = [row(ADAPTERS[k], loss_of(i), i < forward_only) for i, k in enumerate(adapters)]
    with device_counts.of() as found:
        backend.forward_backward([batch] * 3)
    assert found.waits.total() <= 3 * MICRO_BATCH, found.waits


def test_an_optimizer_step_of_many_adapters(backend: TransformersBackend, device_counts: Counts) -> None:
    backend.forward_backward([[row(adapter_id) for adapter_id in ADAPTERS]])
    with device_counts.of() as found:
        backend.optim_step([AdamStep(who, AdamParams(learning_rate=1e-3)) for who in ADAPTERS])
    assert found.waits.total() <= 2 * OPTIMIZER_STEP, found.waits  # two ranks


def test_an_adapters_way_to_the_sampler(
    backend: TransformersBackend, engine: TransformersEngine, device_counts: Counts
) -> None:
    with device_counts.of() as found:
        engine.add_adapter("published", backend.export_adapter(ADAPTERS[0], with_optimizer=False))
    assert found.waits.total() <= HAND_OVER, found.waits


@dataclass(frozen=True)
class Turn:
    """What the sampler's thread did: sequences that began, and waits."""

    begun: int
    waits: Any


def turns(engine: TransformersEngine, counts: Counts, sequences: int, **params: Any) -> list[Turn]:
    """The turns in which sequences of all adapters begin together, and end together."""
    loop, found = engine._loop, list[Turn]()
    original = loop._turn

    def counted(messages: Any) -> None:
        before = len(loop.running.sequences)
        with counts.of() as own:
            original(messages)
        found.append(Turn(len(loop.running.sequences) - before, own.waits))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop, "_turn", counted)
        with engine._inbox.lock:  # so that one turn receives them all
            futures = [
                engine.generate(
                    GenerateRequest(
                        "tenant",
                        ADAPTERS[i % len(ADAPTERS)],
                        np.arange(5 + i, 15 + i),
                        SamplingParams(max_tokens=6, stop=[], seed=i, **params),
                    )
                )
                for i in range(sequences)
            ]
        for future in futures:
            future.result(100)
    return found


@pytest.mark.parametrize(
    ("params", "draw"),
    [({}, 0), ({"temperature": 0.0}, 0), ({"temperature": 0.7, "top_p": 0.9}, FILTER)],
    ids=["plain", "greedy", "filtered"],
)
def test_decode_steps_and_sequences_that_begin(
    engine: TransformersEngine, device_counts: Counts, params: dict[str, Any], draw: int
) -> None:
    turns(engine, device_counts, 20, **params)  # stacks of adapters are made
    first, *others = turns(engine, device_counts, 20, **params)
    assert first.begun == 20
    # They have their first token, and the second.
    assert first.waits.total() <= BEGIN + draw + DECODE_STEP + draw, first.waits
    steps = [turn for turn in others if turn.begun == 0]
    assert len(steps) >= 3
    for step in steps:
        assert step.waits.total() <= DECODE_STEP + draw, step.waits


def test_prompts_of_one_token_begin_on_the_device(engine: TransformersEngine) -> None:
    """In a pass as narrow as a decode step's."""
    params = SamplingParams(max_tokens=2, stop=[], temperature=0.0)
    request = GenerateRequest("tenant", None, np.array([7]), params)
    assert len(engine.generate(request).result(60).sequences[0].tokens) == 2
