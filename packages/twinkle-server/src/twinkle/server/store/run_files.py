"""Snapshots of live runs: what a run is restored from when its adapter is no longer on the worker.

    RUN/N.safetensors         the state after the run's request N: `weights.{name}`, `exp_avg.{name}`,
                              `exp_avg_sq.{name}`, `gradients.{name}`, by PEFT name, float32; the rest of an
                              `AdapterState` is JSON in the metadata, as is the SHA-256 of everything

A visible file was written whole (`files`); the checksum tells whether it still is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from dataclasses import asdict
from typing import Any, cast

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors import numpy as safetensors_numpy

from twinkle.protocol.errors import ServerFault, words_of
from twinkle.protocol.types import Array, Float32Array
from twinkle.server.backends.protocol import AdapterSpec, AdapterState, OptimizerState
from twinkle.server.store.files import Files
from twinkle.server.store.retry import FilesAway

log = logging.getLogger("twinkle.server")

_SUFFIX = ".safetensors"


class RunFiles:
    """Run snapshots. Run ids are the server's own: none of them is a path. Each method raises `FilesAway` if the files
    can't be reached.
    """

    def __init__(self, files: Files) -> None:
        self._files = files

    def write(self, run_id: str, number: int, state: AdapterState) -> None:
        """
        Raises:
            OSError, SafetensorError: if the file can't be written; then there is none.
        """
        kinds = _kinds(state)
        rest = {
            "spec": asdict(state.spec),
            "target_modules": state.target_modules,
            "step": None if state.optimizer is None else state.optimizer.step,
            "names": list(state.weights),  # in order, so that sums over all matrices come out the same
            "kinds": list(kinds),
        }
        # safetensors writes an array's memory as it is, so it must be contiguous.
        arrays = {
            f"{kind}.{name}": cast("Array", np.ascontiguousarray(matrix))
            for kind, matrices in kinds.items()
            for name, matrix in matrices.items()
        }
        text = json.dumps(rest)
        metadata = {"state": text, "sha256": _checksum(text, kinds)}
        with self._files.new_file(_place(run_id, number)) as path:
            safetensors_numpy.save_file(arrays, path, metadata=metadata)

    def read(self, run_id: str, number: int) -> AdapterState:
        """What was written, bit for bit.

        Raises:
            ServerFault: if the file can't be read, or isn't what was written.
        """
        try:
            with (
                self._files.file(_place(run_id, number)) as path,
                cast("Any", safe_open)(path, framework="numpy") as file,
            ):
                metadata = file.metadata()
                rest = cast("dict[str, Any]", json.loads(metadata["state"]))
                kinds = {
                    kind: {
                        name: cast("Float32Array", file.get_tensor(f"{kind}.{name}"))
                        for name in rest["names"]
                    }
                    for kind in rest["kinds"]
                }
            # Files of earlier versions have no checksum.
            if metadata.get("sha256", checksum := _checksum(metadata["state"], kinds)) != checksum:
                raise ValueError("it differs from its checksum: the disk has changed it")
        except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
            raise ServerFault(
                f"the state of run {run_id} can't be read from the disk ({words_of(error)}); begin a new run from "
                "its last checkpoint"
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

    def is_whole(self, run_id: str, number: int) -> bool:
        """Whether a file is what was written."""
        try:
            self.read(run_id, number)
        except ServerFault as error:
            log.error("%s", error.message)
            return False
        return True

    def delete(self, run_id: str, number: int) -> None:
        self._files.delete_file(_place(run_id, number))

    def numbers(self, run_id: str) -> list[int]:
        """Of a run's files, ascending."""
        names = self._files.names(run_id)
        return sorted(int(name.removesuffix(_SUFFIX)) for name in names if name.endswith(_SUFFIX))

    def delete_older(self, run_id: str, number: int) -> None:
        with contextlib.suppress(FilesAway):  # they are deleted with the next, or with the run
            for older in self.numbers(run_id):
                if older < number:
                    with contextlib.suppress(OSError):  # so is this one
                        self.delete(run_id, older)

    def delete_run(self, run_id: str) -> None:
        try:
            self._files.delete(run_id)
        except FilesAway:
            log.warning("snapshots of run %s, which has ended, stay until the server starts again", run_id)

    def delete_all_but(self, run_ids: set[str]) -> None:
        """Delete what an earlier process left of other runs."""
        for name in self._files.names(""):
            if name not in run_ids:
                self._files.delete(name)


def _place(run_id: str, number: int) -> str:
    return f"{run_id}/{number}{_SUFFIX}"


def _checksum(state: str, kinds: dict[str, dict[str, Float32Array]]) -> str:
    """Checksum of the metadata and of all matrices in order, each with its name and shape."""
    digest = hashlib.sha256(state.encode())
    for kind, matrices in kinds.items():
        for name, matrix in matrices.items():
            digest.update(f"{kind}.{name}{matrix.shape}{matrix.dtype}".encode())
            digest.update(np.ascontiguousarray(matrix).data)
    return digest.hexdigest()


def _kinds(state: AdapterState) -> dict[str, dict[str, Float32Array]]:
    """A state's matrices by kind; each kind has the same names."""
    kinds = {"weights": state.weights}
    if state.optimizer is not None:
        kinds |= {"exp_avg": state.optimizer.exp_avg, "exp_avg_sq": state.optimizer.exp_avg_sq}
    if state.gradients is not None:
        kinds["gradients"] = state.gradients
    return kinds
