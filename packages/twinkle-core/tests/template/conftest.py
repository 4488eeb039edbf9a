"""Tokenizers for the template's tests: a tiny one made on the fly, and three real models'."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

_SUPPORT = Path(__file__).parents[4] / "tests" / "support"


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, _SUPPORT / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def real_tokenizers() -> ModuleType:
    """`tests/support/real_tokenizers.py`."""
    return _load("real_tokenizers")


@pytest.fixture(scope="session")
def chat_templates() -> dict[str, str]:
    """Real models' chat templates by name, from `tests/support/chat_templates.py`."""
    return _load("chat_templates").sources()


@pytest.fixture(scope="session")
def write_tiny_tokenizer() -> Callable[..., Path]:
    """`tests/support/tiny_tokenizer.py`'s function: (folder, chat_template) -> folder."""
    return _load("tiny_tokenizer").write_tiny_tokenizer


@pytest.fixture(scope="session")
def chatml() -> str:
    return _load("tiny_tokenizer").CHATML
