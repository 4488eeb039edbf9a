"""A training run as the client sees it: its metrics on disk, its progress, where to go on, and its curves.

The server knows runs of its own (adapters, see `RestClient`); these are folders on the client's side.
"""

from twinkle.runs.plot import plot_runs
from twinkle.runs.records import RunState, read_metrics
from twinkle.runs.run import Run

__all__ = ["Run", "RunState", "plot_runs", "read_metrics"]
