"""Plots the metrics of runs with matplotlib (`twinkle-core[plot]`)."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from twinkle.protocol.errors import InvalidRequest
from twinkle.runs.records import read_metrics

_NOT_METRICS = ("step", "time")
_COLUMNS = 2


def plot_runs(
    directories: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
    path: str | os.PathLike[str] = "runs.png",
    *,
    metrics: Sequence[str] | None = None,
    smoothing: float = 0.0,
) -> Path:
    """Draw a panel for each metric, with a line for each run.

    Args:
        directories: folders of runs, or one.
        path: of the image; the suffix determines its format.
        metrics: default: all that any of the runs has.
        smoothing: 0 draws the logged values; above 0, also their exponential moving average with this weight of the
            past, over the pale logged values.

    Returns:
        `path`.

    Raises:
        NotFound: if a folder has no metrics.
        InvalidRequest: if no run has the metric, a number is out of range, or matplotlib is not installed.
    """
    if not 0 <= smoothing < 1:
        raise InvalidRequest(f"smoothing: {smoothing}; allowed are numbers from 0 up to, not including, 1")
    folders = [directories] if isinstance(directories, str | os.PathLike) else list(directories)
    runs = {Path(folder).name: read_metrics(folder) for folder in folders}
    known = [name for rows in runs.values() for row in rows for name in row if name not in _NOT_METRICS]
    wanted = list(dict.fromkeys(known if metrics is None else metrics))
    missing = [name for name in wanted if name not in known]
    if missing or not wanted:
        raise InvalidRequest(
            f"metrics: {', '.join(missing) or 'none'}: no run logged that; they have "
            f"{', '.join(sorted(set(known))) or 'nothing'}"
        )
    figure = _new_figure(len(wanted))
    for position, name in enumerate(wanted, start=1):
        axes = figure.add_subplot(-(-len(wanted) // _COLUMNS), min(len(wanted), _COLUMNS), position)
        _draw(axes, name, runs, smoothing)
    figure.savefig(path)
    return Path(path)


def smoothed(values: Sequence[float], smoothing: float) -> list[float]:
    """Exponential moving average, bias-corrected (Kingma & Ba 2015, arXiv:1412.6980, section 3)."""
    averages: list[float] = []
    average = 0.0
    for count, value in enumerate(values, start=1):
        average = smoothing * average + (1 - smoothing) * value
        averages.append(average / (1 - smoothing**count))
    return averages


def _new_figure(panels: int) -> Any:
    try:
        module = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise InvalidRequest("plotting needs matplotlib: pip install 'twinkle-core[plot]'") from error
    rows = -(-panels // _COLUMNS)
    # Without pyplot: no global state, no window.
    return module.Figure(figsize=(5.5 * min(panels, _COLUMNS), 3.4 * rows), layout="constrained", dpi=120)


def _draw(axes: Any, name: str, runs: Mapping[str, list[dict[str, Any]]], smoothing: float) -> None:
    for number, (run, rows) in enumerate(runs.items()):
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        colour = f"C{number % 10}"
        # A single value is drawn as a point, since a line would be invisible.
        style = {"color": colour, "marker": "o" if len(points) == 1 else None}
        if smoothing:
            axes.plot(steps, values, color=colour, alpha=0.25)
        axes.plot(steps, smoothed(values, smoothing) if smoothing else values, label=run, **style)
    axes.set_title(name)
    axes.set_xlabel("step")
    axes.locator_params(axis="x", integer=True)
    axes.grid(alpha=0.3)
    if len(runs) > 1:
        axes.legend(fontsize="small")
