"""A model folder for the dataset's tests."""

import importlib.util
from pathlib import Path

import pytest

_TINY_TOKENIZER = Path(__file__).parents[4] / "tests" / "support" / "tiny_tokenizer.py"


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of one token a byte and ChatML's template."""
    spec = importlib.util.spec_from_file_location("tiny_tokenizer", _TINY_TOKENIZER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.write_tiny_tokenizer(tmp_path_factory.mktemp("model"))
