"""Cuts the engine's micro-batches into the pieces that follow each other through the stages, and shares out each
piece's rows among ranks with copies of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from twinkle.server.backends.protocol import Row
from twinkle_megatron.groups import Groups
from twinkle_megatron.stage import Stage

# With p stages and m pieces of one size a stage is idle for (p - 1) / (m + p - 1) of a pass: a ninth, for 4 p pieces of
# two stages.
PIECES_A_STAGE = 4
# A piece with fewer tokens costs more in launches and messages than it saves in idling stages.
MIN_PIECE_TOKENS_CPU = 64
MIN_PIECE_TOKENS_GPU = 2048


@dataclass(frozen=True, eq=False)
class Piece:
    """Rows that are computed together, those of one adapter next to each other.

    Attributes:
        rows: all of them.
        own_rows: those of this rank; may be none.
        own_places: for each of these (micro-batch, row), in the engine's numbering.
    """

    rows: list[Row]
    own_rows: list[Row]
    own_places: list[tuple[int, int]]

    def length(self, stage: Stage) -> int:
        """Tokens of the longest row, rounded up to what the tensor group can share out."""
        longest = max((len(row.tokens) for row in self.own_rows), default=1)
        ranks = stage.groups.tensor.size if stage.architecture.config.sequence_parallel else 1
        return -(-longest // ranks) * ranks


def tokens_at_once(pieces: Sequence[Piece], groups: Groups) -> int:
    """Most tokens whose activations a stage has to keep at the same time, on any of its ranks: 1F1B has as many pieces
    under way as there are stages from it on.
    """
    share = groups.data.size
    sizes = [-(-len(piece.rows) // share) * max(len(row.tokens) for row in piece.rows) for piece in pieces]
    return sum(sorted(sizes, reverse=True)[: groups.pipeline.size - groups.pipeline.index])


def cut(
    batches: Sequence[tuple[int, Sequence[Row]]], place: Callable[[Row], tuple[int, int]], groups: Groups
) -> list[Piece]:
    """
    Args:
        batches: micro-batches with their numbers; none is empty.
        place: where a row's adapter is, (bank, slot): rows are sorted by this.
    """
    minimum = MIN_PIECE_TOKENS_CPU if groups.device.type == "cpu" else MIN_PIECE_TOKENS_GPU
    wanted = PIECES_A_STAGE * groups.pipeline.size if groups.pipeline.size > 1 else 1
    a_batch = -(-wanted // max(1, len(batches)))
    pieces: list[Piece] = []
    for number, rows in batches:
        order = sorted(range(len(rows)), key=lambda i: place(rows[i]))
        tokens = len(rows) * max(len(row.tokens) for row in rows)
        count = max(1, min(a_batch, len(rows), tokens // minimum))
        for i in range(count):
            together = order[i * len(rows) // count : (i + 1) * len(rows) // count]
            own = together[groups.data.index :: groups.data.size]
            pieces.append(
                Piece([rows[k] for k in together], [rows[k] for k in own], [(number, k) for k in own])
            )
    return pieces
