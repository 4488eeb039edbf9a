"""Adapters as files, which is how vLLM loads them: in memory where there is `/dev/shm`, readable by this user alone.

The files stay as long as the adapter: vLLM keeps many adapters, not all, and reads one again that it has put away. What
a process leaves behind that is killed is deleted by the next one: a lock says whose process still runs.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from twinkle import layouts
from twinkle.protocol.errors import InvalidRequest
from twinkle.server.backends.lora import peft_format
from twinkle.server.backends.lora.module_groups import is_expert_parameter
from twinkle.server.backends.protocol import AdapterState
from twinkle.server.samplers.vllm.served import ServedModel

_SHARED_MEMORY = Path("/dev/shm")
# `/dev/shm` is only used where this many times an adapter's bytes are free: in containers it is often tiny.
_ROOM = 4
_PREFIX = "twinkle-adapters-"
_LOCK = "lock"
# A directory this young may not have been locked yet by the process that made it.
_YOUNG_SECONDS = 60.0


@dataclass(frozen=True)
class AdapterFiles:
    """Directories of adapters, each in a root that is this engine's alone (mode 0700).

    Attributes:
        roots: the preferred one first.
        locks: open files, locked as long as this process runs.
    """

    roots: tuple[Path, ...]
    locks: tuple[int, ...]

    @classmethod
    def make(cls) -> AdapterFiles:
        places = [place for place in (_SHARED_MEMORY, Path(tempfile.gettempdir())) if place.is_dir()]
        roots: list[Path] = []
        locks: list[int] = []
        for place in places:
            _sweep(place)
            roots.append(Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place)))
            locks.append(os.open(roots[-1] / _LOCK, os.O_CREAT | os.O_RDWR, 0o600))
            fcntl.flock(locks[-1], fcntl.LOCK_EX)
        return cls(tuple(roots), tuple(locks))

    def write(self, number: int, state: AdapterState, model: ServedModel, base: Path) -> Path:
        """A new directory with the adapter, under the names that vLLM knows.

        Raises:
            OSError: if there is no room.
        """
        directory = self._root(state.nbytes) / str(number)
        directory.mkdir()
        try:
            weights_alone = AdapterState(state.spec, state.target_modules, state.weights)
            peft_format.write(directory, weights_alone, str(base), model.export)
            if model.export.renamed:
                layouts.convert(directory, directory / "serving", "serving")
                return directory / "serving"
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        return directory

    def remove(self, number: int) -> None:
        for root in self.roots:
            shutil.rmtree(root / str(number), ignore_errors=True)

    def remove_all(self) -> None:
        for root, lock in zip(self.roots, self.locks, strict=True):
            shutil.rmtree(root, ignore_errors=True)
            os.close(lock)

    def _root(self, nbytes: int) -> Path:
        return next((r for r in self.roots if shutil.disk_usage(r).free >= _ROOM * nbytes), self.roots[-1])


def _sweep(place: Path) -> None:
    """Delete what processes have left that no longer run."""
    for root in place.glob(f"{_PREFIX}*"):
        try:
            if time.time() - root.stat().st_mtime < _YOUNG_SECONDS:
                continue
            lock = os.open(root / _LOCK, os.O_RDWR)
        except OSError:  # another user's, or it is gone
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(root, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(lock)


def check(state: AdapterState, model: ServedModel, max_rank: int) -> None:
    """
    Raises:
        InvalidRequest: if vLLM could not serve the adapter, or would leave out a part of it.
    """
    if state.spec.rank > max_rank:
        raise InvalidRequest(
            f"rank: the adapter has rank {state.spec.rank}, and the sampler takes up to {max_rank}: raise "
            "model.max_lora_rank and start the server again"
        )
    for name in state.target_modules:
        if is_expert_parameter(name):
            raise InvalidRequest(
                f"adapter: it acts on routed experts ({name}), which the vllm engine doesn't serve; train with "
                "train_mlp=False, or let the server sample with sampler.engine: transformers"
            )
        if name not in model.layers:
            raise InvalidRequest(
                f"adapter: it acts on {name}, which this model doesn't have; adapters of it act on "
                f"{', '.join(model.layer_kinds)}"
            )
        # vLLM loads what has other shapes too, as far as it goes.
        inputs, outputs = model.layers[name]
        shapes = {"lora_A": (state.spec.rank, inputs), "lora_B": (outputs, state.spec.rank)}
        for matrix, wanted in shapes.items():
            found = state.weights[f"base_model.model.{name}.{matrix}.weight"].shape
            if found != wanted:
                raise InvalidRequest(
                    f"adapter: {matrix} of {name} has shape {list(found)}, and on this model it is {list(wanted)}"
                )


def is_finite(state: AdapterState) -> bool:
    return all(bool(np.isfinite(matrix).all()) for matrix in state.weights.values())
