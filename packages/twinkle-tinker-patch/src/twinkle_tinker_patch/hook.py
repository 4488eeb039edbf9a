"""Patches the Tinker SDK when a process imports it, so that processes without it start as usual.

`startup/sitecustomize.py` installs this in every Python process of a program started by `python -m
twinkle_tinker_patch`.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING

from twinkle_tinker_patch.patch import init_tinker_client

if TYPE_CHECKING:
    from importlib.abc import Loader
else:
    # Duck-typed as a loader: importing the base class would take half as long as Python's start.
    Loader = object


def install() -> None:
    """Make each import of `tinker` end with `init_tinker_client()`. Idempotent."""
    if not any(isinstance(finder, _SdkFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _SdkFinder())


class _SdkFinder:
    """Finds the package `tinker` through the other finders, which also handle its submodules."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "tinker":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _LoadThenPatch(spec.loader)
        return spec


class _LoadThenPatch(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module keeps its original loader, for code that asks it for sources and data.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        init_tinker_client()
