"""Independent counterparts in plain Transformers and PEFT."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft_alone
import pytest
import torch

from twinkle.server.backends.protocol import AdapterState, Row

torch.set_num_threads(1)

PeftMaker = Callable[[Path, AdapterState], Any]
ParametersOf = Callable[[Any], dict[str, Any]]
LossOf = Callable[[Any, list[Row]], torch.Tensor]
RowMaker = Callable[..., Row]


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
