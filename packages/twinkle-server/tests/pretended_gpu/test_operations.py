"""How many kernels a decode step starts: upper bounds, to be lowered as the code gets better, never raised.

On a GPU starting them is most of a short step's time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from pretended_cuda.counts import Counts
from transformers import AutoConfig

from twinkle.server.backends.protocol import AdapterSpec, ModelConfig
from twinkle.server.backends.transformers import TransformersBackend
from twinkle.server.samplers.transformers import TransformersEngine
from twinkle.server.samplers.transformers.model_runner import Prompt

ROWS = 16
# Together 256 columns: more than are multiplied at once on a CPU.
LARGE = [f"large {i}" for i in range(8)]
SMALL = [f"small {i}" for i in range(4)]


@pytest.fixture(scope="module")
def layers(tiny_model_dir: Path) -> int:
    return int(AutoConfig.from_pretrained(tiny_model_dir).num_hidden_layers)


@pytest.fixture
def engine(tiny_model_dir: Path, device_counts: Counts) -> Iterator[TransformersEngine]:
    config = ModelConfig(tiny_model_dir, "bfloat16")
    backend = TransformersBackend(config)
    engine = TransformersEngine.create(config, backend)
    for rank, names in ((32, LARGE), (4, SMALL)):
        for i, name in enumerate(names):
            backend.add_adapter(name, AdapterSpec(rank=rank, seed=i, train_unembed=False))
            engine.add_adapter(name, backend.export_adapter(name, with_optimizer=False))
    yield engine
    engine.close()


def decode_step(engine: TransformersEngine, names: list[str], counts: Counts) -> Counter[str]:
    """Operations of a step of rows that have these adapters by turns; the second step, since the first takes memory."""
    batch = engine._slot_batch()
    adapters = [engine._adapters[name] for name in names] or [None]
    with torch.no_grad():
        batch.add(
            [Prompt("t", np.arange(5 + i, 15 + i), adapters[i % len(adapters)], 1) for i in range(ROWS)]
        )
        while batch.rows < ROWS:
            batch.prefill()
        batch.step([7] * ROWS)
        with counts.of() as found:
            batch.step([8] * ROWS)
    return found.operations


def test_adapters_of_a_shape_cost_the_same_however_many(
    engine: TransformersEngine, layers: int, device_counts: Counts
) -> None:
    base = decode_step(engine, [], device_counts).total()
    two, eight = (decode_step(engine, LARGE[:n], device_counts).total() for n in (2, 8))
    assert two == eight
    # Of seven linear layers: the A's of q, k and v are one product, and so are those of gate and up.
    assert eight - base <= 15 * layers
    assert base <= 75 * layers + 40


def test_each_shape_of_adapters_adds_its_own(
    engine: TransformersEngine, layers: int, device_counts: Counts
) -> None:
    large, both = (decode_step(engine, names, device_counts).total() for names in (LARGE, [*LARGE, *SMALL]))
    assert both - large <= 15 * layers
