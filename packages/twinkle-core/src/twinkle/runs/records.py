"""The files of a run's folder.

- metrics.jsonl: one object a step with `step`, `time` (seconds since 1970) and the metrics that were logged; null where
  a number was infinite or none.
- config.json: the hyperparameters, as they were given.
- state.json: where to go on; there while the run is not finished and has been saved at least once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, cast

from twinkle.protocol.errors import InvalidRequest, NotFound

METRICS: Final = "metrics.jsonl"
CONFIG: Final = "config.json"
STATE: Final = "state.json"


@dataclass(frozen=True)
class RunState:
    """Where a run can resume.

    Attributes:
        step: steps contained in the checkpoint.
        checkpoint: `twinkle://` path of weights and optimizer.
        dataloader: its `state_dict()` after the last of those steps.
    """

    step: int
    checkpoint: str
    dataloader: dict[str, Any]


def read_metrics(directory: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The metrics that a run has logged, one dict per step, in order.

    An incomplete last line, as after a crash, is ignored.

    Args:
        directory: the run's folder, or its metrics.jsonl.

    Raises:
        NotFound: if there are no metrics.
        InvalidRequest: naming the line that is not a JSON object with a step.
    """
    path = Path(directory)
    path = path / METRICS if path.is_dir() else path
    if not path.is_file():
        raise NotFound(f"{path}: no such file; give the folder of a run, such as runs/NAME")
    lines = path.read_text("utf-8").splitlines(keepends=True)
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line.endswith("\n"):
            break
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InvalidRequest(f"{path}:{number}: not JSON ({error})") from error
        if not isinstance(row, dict) or not isinstance(cast(dict[str, Any], row).get("step"), int):
            raise InvalidRequest(f"{path}:{number}: expected an object with a whole number `step`")
        rows.append(cast(dict[str, Any], row))
    return rows


def keep_metrics_through(directory: Path, step: int) -> None:
    """Remove the metrics of later steps, which will be repeated."""
    if (directory / METRICS).is_file():
        rows = [row for row in read_metrics(directory) if row["step"] <= step]
        write_whole(directory / METRICS, "".join(json.dumps(row) + "\n" for row in rows))


def read_state(directory: Path) -> RunState:
    """
    Raises:
        NotFound: if the run has no state to resume from.
        InvalidRequest: if it can't be read.
    """
    path = directory / STATE
    if not path.is_file():
        reason = "it is finished, or was never saved" if (directory / CONFIG).is_file() else "there is no run"
        raise NotFound(f"{directory}: nothing to resume from ({reason}); begin a new run")
    try:
        return RunState(**json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise InvalidRequest(f"{path}: not the state of a run ({error}); begin a new run") from error


def write_state(directory: Path, state: RunState) -> None:
    write_whole(directory / STATE, json.dumps(asdict(state), indent=1) + "\n")


def as_json(config: Mapping[str, Any]) -> dict[str, Any]:
    """Hyperparameters as JSON values; anything else becomes text."""
    return json.loads(json.dumps(dict(config), default=str))


def write_config(directory: Path, config: Mapping[str, Any]) -> None:
    write_whole(directory / CONFIG, json.dumps(as_json(config), indent=1) + "\n")


def read_config(directory: Path) -> dict[str, Any]:
    """The saved hyperparameters; empty if there are none, or they can't be read."""
    try:
        return dict(json.loads((directory / CONFIG).read_text("utf-8")))
    except (OSError, ValueError):
        return {}


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically: under another name, then renamed."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
