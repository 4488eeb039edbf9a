"""Lets Megatron-Bridge be imported without Transformer Engine, which it always imports.

It needs only names from it, for its own layers, which are not used here. If Transformer Engine is installed, nothing
is replaced.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Generator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_NAME = "transformer_engine"


@contextlib.contextmanager
def standing_in() -> Generator[None]:
    """While entered, `transformer_engine` can be imported, if only as a stand-in without any functions."""
    if importlib.util.find_spec(_NAME) is not None:
        yield
        return
    # Megatron-Core looks for Transformer Engine when it is imported, and must find that it isn't there. These are
    # the parts that Megatron-Bridge imports.
    importlib.import_module("megatron.training")
    top, below = _Absent(_NAME), _Absent(f"{_NAME}.pytorch")
    vars(top)["pytorch"] = below
    sys.modules.update({_NAME: top, below.__name__: below})
    try:
        yield
    finally:
        del sys.modules[_NAME], sys.modules[below.__name__]


class _Absent(ModuleType):
    """Has a class under any capitalized name, and a module like itself under any other."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None, is_package=True)
        vars(self)["__path__"] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        found = _Absent(f"{self.__name__}.{name}") if name.islower() else type(name, (), {})
        setattr(self, name, found)
        return found
