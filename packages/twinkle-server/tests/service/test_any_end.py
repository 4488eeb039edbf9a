"""Any requests, and a service that ends in any way at any moment: answers and runs are what they would have been."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any, TypeAlias
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_client import KINDS, Client, bits
from restarted_service import AT_ONCE, HARDLY_EVER, Server

from twinkle.server.engine import calls

Batch: TypeAlias = tuple[list[tuple[int, str]], str, int]
"""Requests (run, kind), how the service ends when they have been sent, and after how many turns of the event loop."""

ENDS = ("stays", "worker lost", "killed", "closed")


async def play(
    directory: Path, ranks: list[int], batches: list[Batch], seconds: float, room: int | None
) -> tuple[list[Any], list[dict[str, bytes]]]:
    server = Server(directory)
    server.seconds, server.adapter_bytes, server.segment_bytes = seconds, room, 4096
    tenant = await server.start()
    client = Client(tenant)
    try:
        await client.begin(ranks)
        for requests, end, turns in batches:
            promises = await client.submit(requests)
            for _ in range(turns):
                await asyncio.sleep(0)
            match end:
                case "worker lost":
                    server.worker.die()
                case "killed":
                    client.tenant = await server.kill_and_start()
                case "closed":
                    await server.close()
                    client.tenant = await server.start()
                case _:
                    pass
            await client.wait(promises)
            await client.tenant.service._compaction.clean(max_resting=0)
        states: list[dict[str, bytes]] = []
        for number, run in enumerate(client.runs):
            await client.send([(number, "forward")])  # so that it is on the worker
            states.append(bits(await server.worker.export_adapter(run, True, True)))
        return client.shown(), states
    finally:
        await server.close()


@settings(max_examples=40, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    batches=st.lists(
        st.tuples(
            st.lists(st.tuples(st.integers(0, 2), st.sampled_from(KINDS)), min_size=1, max_size=8),
            st.sampled_from(ENDS),
            st.integers(0, 60),
        ),
        min_size=1,
        max_size=4,
    ),
    seconds=st.sampled_from([AT_ONCE, HARDLY_EVER]),
    room=st.none() | st.integers(1, 4000),
)
@pytest.mark.parametrize("late", [calls.DISPATCH_AT, 0.0])
def test_every_answer_and_every_run_is_what_it_would_have_been(late, ranks, batches, seconds, room):
    """Also where the next tick is sent as soon as it can be."""
    calm: list[Batch] = [(requests, "stays", 0) for requests, _, _ in batches]
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        expected = asyncio.run(play(Path(one), ranks, calm, HARDLY_EVER, None))
        assert not any(isinstance(outcome, str) for outcome in expected[0]), "a request failed"
        with patch.object(calls, "DISPATCH_AT", late):
            assert asyncio.run(play(Path(other), ranks, batches, seconds, room)) == expected
