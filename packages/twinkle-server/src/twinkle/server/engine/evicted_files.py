"""A run's whole state as one file, while its adapter is not on the worker.

    ROOT/RUN.safetensors    `weights.{name}`, `exp_avg.{name}`, `exp_avg_sq.{name}`, `gradients.{name}`, by PEFT name,
                            float32; what else there is to an `AdapterState` is JSON in the metadata

A file is written under a temporary name and renamed, so one that can be seen is whole. Nothing is flushed to the disk
itself: runs end with this process, so nobody reads a file after the machine has gone down.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors import numpy as safetensors_numpy

from twinkle.protocol.errors import ServerFault
from twinkle.protocol.types import Array, Float32Array
from twinkle.server.backends.protocol import AdapterSpec, AdapterState, OptimizerState


class EvictedFiles:
    """The directory that these files are in. Run ids are the server's own: none of them is a path."""

    def __init__(self, root: Path) -> None:
        """What an earlier process left in `root` is deleted: its runs ended with it."""
        shutil.rmtree(root, ignore_errors=True)
        self._root = root

    def write(self, run_id: str, state: AdapterState) -> None:
        """
        Raises:
            OSError, SafetensorError: if the file can't be written; then there is none.
        """
        self._root.mkdir(parents=True, exist_ok=True)
        partial = self._root / f".{run_id}.partial"
        kinds = _kinds(state)
        rest = {
            "spec": asdict(state.spec),
            "target_modules": state.target_modules,
            "step": None if state.optimizer is None else state.optimizer.step,
            "names": list(state.weights),  # in their order: sums over all matrices are to come out the same
            "kinds": list(kinds),
        }
        # safetensors writes an array's memory as it lies, so it has to lie in order.
        arrays = {
            f"{kind}.{name}": cast("Array", np.ascontiguousarray(matrix))
            for kind, matrices in kinds.items()
            for name, matrix in matrices.items()
        }
        try:
            safetensors_numpy.save_file(arrays, partial, metadata={"state": json.dumps(rest)})
            os.replace(partial, self._path(run_id))
        finally:
            partial.unlink(missing_ok=True)

    def read(self, run_id: str) -> AdapterState:
        """What was written, to the bit.

        Raises:
            ServerFault: if the file can't be read.
        """
        try:
            with cast("Any", safe_open)(self._path(run_id), framework="numpy") as file:
                rest = cast("dict[str, Any]", json.loads(file.metadata()["state"]))
                kinds = {
                    kind: {
                        name: cast("Float32Array", file.get_tensor(f"{kind}.{name}"))
                        for name in rest["names"]
                    }
                    for kind in rest["kinds"]
                }
        except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
            raise ServerFault(
                f"the state of run {run_id}, which had made room for others, can't be read from the disk ({error}); "
                "begin a new run from its last checkpoint"
            ) from error
        optimizer = None
        if rest["step"] is not None:
            optimizer = OptimizerState(rest["step"], kinds["exp_avg"], kinds["exp_avg_sq"])
        return AdapterState(
            AdapterSpec(**rest["spec"]),
            rest["target_modules"],
            kinds["weights"],
            optimizer,
            kinds.get("gradients"),
        )

    def delete(self, run_id: str) -> None:
        with contextlib.suppress(OSError):  # it is overwritten, or deleted with the rest
            self._path(run_id).unlink()

    def delete_all(self) -> None:
        shutil.rmtree(self._root, ignore_errors=True)

    def _path(self, run_id: str) -> Path:
        return self._root / f"{run_id}.safetensors"


def _kinds(state: AdapterState) -> dict[str, dict[str, Float32Array]]:
    """What there is of a state's matrices; each kind has the same names."""
    kinds = {"weights": state.weights}
    if state.optimizer is not None:
        kinds |= {"exp_avg": state.optimizer.exp_avg, "exp_avg_sq": state.optimizer.exp_avg_sq}
    if state.gradients is not None:
        kinds["gradients"] = state.gradients
    return kinds
