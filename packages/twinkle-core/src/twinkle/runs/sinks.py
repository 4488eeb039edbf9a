"""Destinations of metrics: always a JSONL file, and optionally TensorBoard and Weights & Biases."""

from __future__ import annotations

import importlib
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from twinkle.protocol.errors import InvalidRequest
from twinkle.runs.records import METRICS


class Sink(Protocol):
    """Receives the metrics of each step."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """`metrics.jsonl` in the run's folder; each line is written before the next step is logged."""

    def __init__(self, directory: Path) -> None:
        self._file = (directory / METRICS).open("a", encoding="utf-8", buffering=1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        # JSON can represent neither infinities nor NaN.
        numbers = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **numbers}) + "\n")

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Event files in `tensorboard/` of the run's folder, for `tensorboard --logdir`."""

    def __init__(self, directory: Path) -> None:
        summary = _module("tensorboard.summary", "tensorboard")
        self._writer = summary.Writer(str(directory / "tensorboard"))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A Weights & Biases run. WANDB_MODE=offline keeps it in the run's folder."""

    def __init__(self, directory: Path, project: str, config: Mapping[str, Any]) -> None:
        wandb = _module("wandb", "wandb")
        # The folder's name is the id, so that a resumed run continues the same one.
        self._run = wandb.init(
            project=project,
            name=directory.name,
            id=directory.name,
            dir=str(directory),
            config=dict(config),
            resume="allow",
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


def _module(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InvalidRequest(f"{extra}: not installed; pip install 'twinkle-core[{extra}]'") from error
