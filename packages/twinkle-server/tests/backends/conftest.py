"""Independent counterparts in plain Transformers and PEFT."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft_alone
import pytest
import torch

from twinkle.server.backends.protocol import AdapterSpec, AdapterState, Row
from twinkle.server.backends.transformers import TransformersBackend

torch.set_num_threads(1)

PeftMaker = Callable[[Path, AdapterState], Any]
ParametersOf = Callable[[Any], dict[str, Any]]
LossOf = Callable[[Any, list[Row]], torch.Tensor]
RowMaker = Callable[..., Row]
AdapterMaker = Callable[[TransformersBackend, Mapping[str, AdapterSpec]], None]


@pytest.fixture
def peft_parameters() -> ParametersOf:
    return peft_alone.parameters


@pytest.fixture
def make_peft() -> PeftMaker:
    return peft_alone.make


@pytest.fixture
def peft_loss() -> LossOf:
    return peft_alone.loss


@pytest.fixture
def random_row() -> RowMaker:
    return peft_alone.random_row


@pytest.fixture
def add_trained() -> AdapterMaker:
    """Adds adapters whose B is not zero, so that A's gradient isn't either; the same ones to every backend."""

    def add(backend: TransformersBackend, specs: Mapping[str, AdapterSpec]) -> None:
        for who, spec in specs.items():
            backend.add_adapter(who, spec)
            state = backend.export_adapter(who, with_optimizer=False)
            draw = np.random.default_rng(spec.seed)
            for matrix in state.weights.values():
                matrix += 0.02 * draw.normal(size=matrix.shape).astype(np.float32)
            backend.import_adapter(who, state)

    return add
