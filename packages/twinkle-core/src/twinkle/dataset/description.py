"""Statistics of an encoded dataset, as a table and as a plot."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt

from twinkle.data_format import InputFeature
from twinkle.dataset.encoding import Tally, trained_tokens
from twinkle.protocol.errors import InvalidRequest

_MOST_BARS: Final = 12
_BAR_WIDTH: Final = 40


@dataclass(frozen=True)
class Description:
    """Statistics of an encoded dataset. `print` shows a table, `plot` draws the lengths.

    A row of a pair (`Dataset.encode_pairs`) counts as one row and two sequences.

    Attributes:
        rows: in the dataset.
        sequences: of tokens, in these rows.
        tokens: in all of them.
        min_length, mean_length, median_length, p95_length, max_length: of the sequences, in tokens; p95 is the 95th
            percentile, linearly interpolated.
        edges: of the histogram of lengths, integers: bar i counts lengths from edges[i] to edges[i+1] - 1.
        counts: sequences in each bar.
        cut_rows: rows that encoding truncated to the template's `max_length`.
        left_out_rows: rows that encoding dropped because of it; not included in the other numbers.
        truncated: share of those two in all rows before encoding, 0 to 1.
        trained: share of tokens with a loss, 0 to 1.
        untrained_rows: rows without any such token (of a pair: in one of its sequences).
    """

    rows: int
    sequences: int
    tokens: int
    min_length: int
    mean_length: float
    median_length: float
    p95_length: float
    max_length: int
    edges: tuple[int, ...]
    counts: tuple[int, ...]
    cut_rows: int
    left_out_rows: int
    truncated: float
    trained: float
    untrained_rows: int

    def __str__(self) -> str:
        lengths = (
            f"min {self.min_length:,}, mean {self.mean_length:,.1f}, median {self.median_length:,.1f}, "
            f"p95 {self.p95_length:,.1f}, max {self.max_length:,}"
        )
        pairs = ""
        if self.sequences != self.rows:
            sides = ": chosen and rejected" if self.sequences == 2 * self.rows else "; a pair has two"
            pairs = f" ({self.sequences:,} sequences{sides})"
        table = [
            ("rows", f"{self.rows:,}{pairs}"),
            ("tokens", f"{self.tokens:,}"),
            ("trained on", f"{self.trained:.1%} of tokens; nothing in {self.untrained_rows:,} rows"),
            (
                "over the limit",
                f"{self.truncated:.1%} of rows: {self.cut_rows:,} cut, {self.left_out_rows:,} left out",
            ),
            ("length", lengths),
        ]
        return "\n".join([*(f"{name:<16}{value}" for name, value in table), *self._bars()])

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the histogram of lengths as a PNG file.

        Raises:
            InvalidRequest: if matplotlib is missing (twinkle-core[plot]), or the file can't be written.
        """
        try:
            # Not pyplot, which picks a window system and keeps every figure for the life of the process.
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise InvalidRequest("plot: needs matplotlib: pip install 'twinkle-core[plot]'") from error
        figure = cast(Any, Figure)(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot()
        widths = np.diff(self.edges)
        axes.bar(self.edges[:-1], self.counts, width=widths, align="edge", edgecolor="white")
        for value, name, style in (
            (self.median_length, "median", "-"),
            (self.p95_length, "95th percentile", "--"),
        ):
            axes.axvline(value, color="black", linestyle=style, linewidth=1, label=f"{name}: {value:,.1f}")
        axes.set_xlabel("length in tokens")
        axes.set_ylabel("sequences")
        axes.set_title(f"{self.sequences:,} sequences, {self.tokens:,} tokens")
        axes.legend()
        try:
            cast(Any, FigureCanvasAgg)(figure).print_figure(os.fspath(path), format="png")
        except OSError as error:
            raise InvalidRequest(f"plot: {os.fspath(path)} can't be written: {error}") from error

    def _bars(self) -> list[str]:
        """The histogram, one line per bar; any nonzero count is visible."""
        width = len(f"{self.edges[-1] - 1:,}")
        most = max(self.counts)
        digits = max(len(f"{count:,}") for count in self.counts)
        bars: list[str] = []
        for low, end, count in zip(self.edges, self.edges[1:], self.counts, strict=False):
            # All bars have the same width: if that is 1, one number is enough.
            lengths = f"{low:>{width},}" if end == low + 1 else f"{low:>{width},} - {end - 1:>{width},}"
            bars.append(f"{lengths}  {count:>{digits},}  {'#' * -(-count * _BAR_WIDTH // most)}".rstrip())
        return bars


def describe(rows: Sequence[Sequence[InputFeature]], tally: Tally) -> Description:
    """The statistics of a dataset's rows, each with one feature, or two if it is a pair.

    Args:
        rows: at least one.
        tally: what `max_length` did to them.
    """
    features = [feature for row in rows for feature in row]
    lengths = np.array([len(feature["input_ids"]) for feature in features], np.int64)
    trained = [[trained_tokens(feature) for feature in row] for row in rows]
    tokens = int(lengths.sum())
    median, p95 = (float(value) for value in np.percentile(lengths, [50, 95]))
    edges, counts = _histogram(lengths)
    return Description(
        rows=len(rows),
        sequences=len(features),
        tokens=tokens,
        min_length=int(lengths.min()),
        mean_length=tokens / len(features),
        median_length=median,
        p95_length=p95,
        max_length=int(lengths.max()),
        edges=edges,
        counts=counts,
        cut_rows=tally.cut,
        left_out_rows=tally.left_out,
        truncated=(tally.cut + tally.left_out) / max(1, tally.rows),
        trained=sum(map(sum, trained)) / max(1, tokens),
        untrained_rows=sum(min(row) == 0 for row in trained),
    )


def _histogram(lengths: npt.NDArray[np.int64]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Edges and counts of bars of equal integer width."""
    low, high = int(lengths.min()), int(lengths.max())
    width = -(-(high - low + 1) // _MOST_BARS)
    bars = -(-(high - low + 1) // width)
    counts = np.bincount((lengths - low) // width, minlength=bars)
    return tuple(low + width * bar for bar in range(bars + 1)), tuple(int(count) for count in counts)
