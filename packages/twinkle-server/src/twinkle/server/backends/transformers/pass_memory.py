"""What a training pass takes of its part of the memory, and what is done where that is not enough.

Beside activations a pass holds, for each number of an adapter that takes part: its gradient (float32), its weight in a
stack (float32), and a copy of that in the dtype of the arithmetic for the backward pass.

Micro-batches that would take more are cut; a row that would take more alone has its activations recomputed. If memory
runs out all the same, the pass begins again with smaller pieces, and at last with all activations recomputed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from twinkle.protocol.errors import InvalidRequest, ServerFault, TwinkleError
from twinkle.server.backends.lora.banks import Adapter, Bank
from twinkle.server.backends.protocol import Row
from twinkle.server.backends.shares import micro_batch_tokens

log = logging.getLogger("twinkle.backend")

_FLOAT32 = 4
# After so many passes without a lack of memory a little more is tried again.
_PASSES_BEFORE_MORE = 64
_UNBOUNDED = 2**62


@dataclass(frozen=True, eq=False)
class Piece:
    """Rows that are computed at once.

    Attributes:
        recomputes: whether their activations are computed again in the backward pass.
    """

    rows: Sequence[Row]
    recomputes: bool


@dataclass(eq=False)
class PassLimits:
    """What one pass may take. Changed by the thread that computes, when memory has run out.

    Attributes:
        affordable_tokens: activations of so many tokens (as `micro_batch_tokens`) fit, if no adapter took any memory.
        overhead_tokens: a micro-batch's fixed cost, in tokens. Smaller pieces are only made if memory runs out.
        token_bytes: of activations; 0: adapters are not reckoned with.
        recomputed_token_bytes: the same where they are recomputed.
        head_bytes: that the output head takes.
        packs: whether rows are packed.
        itemsize: bytes of a number in the arithmetic's dtype.
        most_tokens: no piece of several rows is larger; found when memory ran out.
        always_recomputes: found likewise.
    """

    affordable_tokens: int
    overhead_tokens: int
    token_bytes: float = 0.0
    recomputed_token_bytes: float = 0.0
    head_bytes: int = 0
    packs: bool = False
    itemsize: int = _FLOAT32
    most_tokens: int = _UNBOUNDED
    always_recomputes: bool = False
    _good_passes: int = 0

    def cut(
        self,
        rows: Sequence[Row],
        adapters: Mapping[str, Adapter],
        active: Iterable[Adapter],
        shares: int = 1,
    ) -> list[Piece]:
        """Cut a micro-batch into pieces that fit, in order.

        Args:
            active: all adapters that take part in the pass.
            shares: how many pieces are computed at the same time.
        """
        if not rows:
            return []
        goes_backward = any(not row.forward_only for row in rows)
        affordable = self._affordable(rows, adapters, active) // shares if goes_backward else _UNBOUNDED
        size = micro_batch_tokens(rows, self.packs)
        is_worth_it = size > affordable >= self.overhead_tokens
        if len(rows) > 1 and (is_worth_it or size > self.most_tokens):
            half = len(rows) // 2
            parts = (rows[:half], rows[half:])
            return [piece for part in parts for piece in self.cut(part, adapters, active, shares)]
        return [Piece(rows, self.always_recomputes or size > affordable)]

    def _affordable(
        self, rows: Sequence[Row], adapters: Mapping[str, Adapter], active: Iterable[Adapter]
    ) -> int:
        """Tokens whose activations fit beside what the pass holds of its adapters."""
        if not self.token_bytes:
            return self.affordable_tokens
        by_bank: dict[Bank, list[int]] = {}
        for row in rows:
            adapter = adapters[row.adapter_id]
            by_bank.setdefault(adapter.bank, []).append(adapter.slot)
        held, a_token = gradient_bytes(active), self.token_bytes
        for bank, slots in by_bank.items():
            held += stack_bytes(bank, slots, self.itemsize)
            a_token += bank.layout.rank * len(bank.layout.a) * self.itemsize
        return max(0, int((self.affordable_tokens * self.token_bytes - held) / a_token))

    # ------------------------------------------------------------ running out

    def tighten(self, pieces: Iterable[Piece]) -> bool:
        """Memory ran out in a pass of these pieces: returns whether a smaller one is possible, and sets it."""
        pieces = list(pieces)
        self._good_passes = 0
        largest = max(
            (micro_batch_tokens(piece.rows, self.packs) for piece in pieces if len(piece.rows) > 1), default=0
        )
        recomputes = all(piece.recomputes for piece in pieces)
        if largest > self.overhead_tokens or (largest and recomputes):
            self.most_tokens = min(self.most_tokens, largest) // 2
        elif not recomputes:
            self.always_recomputes = True
        else:
            return False
        log.warning(
            "memory ran out in a training pass: it is computed again, with at most %d tokens at once%s",
            self.most_tokens,
            " and recomputed activations" if self.always_recomputes else "",
        )
        return True

    def worked(self) -> None:
        """A pass has fitted: after some of them a little more is tried."""
        if self.most_tokens == _UNBOUNDED and not self.always_recomputes:
            return
        self._good_passes += 1
        if self._good_passes < _PASSES_BEFORE_MORE:
            return
        self._good_passes = 0
        if self.always_recomputes:
            self.always_recomputes = False
        elif 2 * self.most_tokens <= self.affordable_tokens:
            self.most_tokens *= 2
        else:
            self.most_tokens = _UNBOUNDED

    def lack(self, micro_batches: Sequence[Sequence[Row]], adapters: Mapping[str, Adapter]) -> TwinkleError:
        """The error of a pass for which memory ran out with single rows and recomputed activations: the client's
        mistake if its longest row can't fit into a pass's part of the memory.
        """
        rows = [row for rows in micro_batches for row in rows]
        longest = max(rows, key=lambda row: len(row.tokens))
        adapter = adapters[longest.adapter_id]
        held = gradient_bytes([adapter]) + stack_bytes(adapter.bank, [adapter.slot], self.itemsize)
        needed = self.head_bytes + held + len(longest.tokens) * self.recomputed_token_bytes
        there = self.head_bytes + self.affordable_tokens * self.token_bytes
        if self.token_bytes and needed > there:
            return InvalidRequest(
                f"a sequence of {len(longest.tokens)} tokens with an adapter of rank {adapter.spec.rank} takes about "
                f"{needed / 2**30:.1f} GiB in a training pass, and the server has {there / 2**30:.1f} GiB for it: send "
                "shorter sequences; nothing was changed"
            )
        return ServerFault(
            "the server's memory ran out in a training pass that it should have room for, and nothing was changed: "
            "send the request again; if it happens again, the server's log says what was tried"
        )


def gradient_bytes(active: Iterable[Adapter]) -> int:
    """What a pass holds of each adapter from its beginning to its end."""
    return sum(_FLOAT32 * adapter.bank.layout.size for adapter in active)


def stack_bytes(bank: Bank, slots: Sequence[int], itemsize: int) -> int:
    """What a micro-batch holds of the adapters of one bank.

    Args:
        slots: each row's.
    """
    return (_FLOAT32 + itemsize) * len(set(slots)) * bank.layout.size
