"""The contract of sampling engines, by the Transformers engine."""

from pathlib import Path

import pytest
from sampling_contract import *  # noqa: F403


@pytest.fixture
def model_dir(tiny_model_dir: Path) -> Path:
    return tiny_model_dir
