"""A file system that checkpoints and snapshots are kept on, for tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from twinkle.server.store.files import Files


@dataclass(frozen=True)
class Disk:
    """A file system, and its content as a test without the code under test sees and changes it.

    Attributes:
        open: the same files, as another process has them.
    """

    kind: str
    open: Callable[[], Files]
    system: Any  # of fsspec
    root: str

    @property
    def files(self) -> Files:
        return self.open()

    def paths(self) -> dict[str, str]:
        """What there is, by path; those of generations are shown without the generation."""
        found = [path.removeprefix(f"{self.root}/") for path in self.system.find(self.root)]
        return {
            "/".join(part for part in path.split("/") if len(part) != 32): f"{self.root}/{path}"
            for path in found
        }

    def content(self, place: str) -> bytes:
        return self.system.cat_file(self.paths()[place])

    def change(self, place: str, content: bytes | None) -> None:
        """Write, or delete."""
        path = self.paths()[place]
        if content is None:
            self.system.rm_file(path)
        else:
            self.system.pipe_file(path, content)
