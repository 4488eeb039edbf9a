"""A pass of ranks that hold parts of one base: in each micro-batch they gather the same layers, in the same order.

A rank with fewer micro-batches than another computes a token of no adapter instead, and one with only forward rows goes
backward where another rank does. What a rank refuses is agreed on before the first micro-batch; what a loss raises is
held back until the last one. If a layer itself fails (for want of memory, say) on one rank, the others wait for it in
vain: it is raised at once, and the ranks have to be started again.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice, zip_longest

import torch

from twinkle.server.backends.hf.rope import by_kind
from twinkle.server.backends.hf.threads import Threads
from twinkle.server.backends.lora.banks import Adapter
from twinkle.server.backends.lora.replicas import Replicas
from twinkle.server.backends.protocol import Row, RowResult
from twinkle.server.backends.transformers.network import LoraNetwork
from twinkle.server.backends.transformers.pass_memory import PassLimits, Piece
from twinkle.server.backends.transformers.passes import (
    Computed,
    Pass,
    finish,
    is_trained,
    run_micro_batch,
)


def run_sharded_pass(
    network: LoraNetwork,
    threads: Threads,
    adapters: dict[str, Adapter],
    micro_batches: Sequence[Sequence[Row]],
    limits: PassLimits,
    replicas: Replicas,
    refused: Exception | None,
) -> Pass | Exception:
    """As `run_pass`, on all ranks together.

    Args:
        micro_batches: this rank's.
        refused: why this rank refuses them.

    Returns:
        The pass, or what a loss of this rank raised.

    Raises:
        Exception: on all ranks, what the first of them refused.
    """
    pieces = [] if refused else _pieces(network, adapters, micro_batches, limits)
    by_rank = replicas.gather(refused or [is_trained(piece.rows) for _, _, piece in pieces])
    go_backward = [any(flags) for flags in zip_longest(*by_rank, fillvalue=False)]
    computed = Computed.begin(adapters, [piece.rows for _, _, piece in pieces])
    failure: Exception | None = None
    found: list[dict[int, RowResult]] = [{} for _ in micro_batches]
    try:
        for item, goes_backward in zip_longest(pieces, go_backward, fillvalue=None):
            assert goes_backward is not None, "there are as many as the rank with the most has pieces"
            if item is None or failure is not None:
                network.recomputation.is_on = False
                _idle(network, goes_backward)
                continue
            number, places, piece = item
            network.recomputation.is_on = piece.recomputes
            threads.fit(network.tokens(piece.rows))
            results = run_micro_batch(network, adapters, computed.scratches, piece.rows, goes_backward)
            if isinstance(results, Exception):
                failure = results
            else:
                found[number].update(zip(places, results, strict=True))
    finally:
        network.route.segments = []
        network.recomputation.is_on = False
        threads.restore()
    if failure is not None:
        return failure
    for rows, of_rows in zip(micro_batches, found, strict=True):
        computed.results.extend(of_rows[i] for i in range(len(rows)))
    return finish(micro_batches, [computed])


def _pieces(
    network: LoraNetwork,
    adapters: dict[str, Adapter],
    micro_batches: Sequence[Sequence[Row]],
    limits: PassLimits,
) -> list[tuple[int, list[int], Piece]]:
    """Rows that are computed at once, each with its micro-batch's number and their places in it."""
    active = {row.adapter_id: adapters[row.adapter_id] for rows in micro_batches for row in rows}.values()
    found: list[tuple[int, list[int], Piece]] = []
    for number, rows in enumerate(micro_batches):
        for kind in by_kind(network.boundaries, [len(row.tokens) for row in rows]):
            places = iter(kind)
            for piece in limits.cut([rows[i] for i in kind], adapters, active):
                found.append((number, list(islice(places, len(piece.rows))), piece))
    return found


def _idle(network: LoraNetwork, goes_backward: bool) -> None:
    """Take part in a micro-batch of the other ranks."""
    network.route.segments = []
    token = torch.zeros(1, 1, dtype=torch.int64, device=network.device)
    with torch.set_grad_enabled(goes_backward):
        logprobs = network.logprobs(token, token.unsqueeze(-1))
    if goes_backward:
        logprobs.backward(torch.zeros_like(logprobs))
