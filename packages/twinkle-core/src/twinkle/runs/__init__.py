"""A training run on the client's side: metrics on disk, progress, resuming, and plots.

The server has runs of its own (adapters, see `RestClient`); these are local folders.
"""

from twinkle.runs.plot import plot_runs
from twinkle.runs.records import RunState, read_metrics
from twinkle.runs.run import Run

__all__ = ["Run", "RunState", "plot_runs", "read_metrics"]
