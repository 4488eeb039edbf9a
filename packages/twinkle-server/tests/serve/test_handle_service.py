"""What a gateway's process asks the engine's, over a handle of Serve's."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from types import SimpleNamespace
from typing import Any

import pytest

from twinkle.protocol import messages as m
from twinkle.server.serve.deployments import HandleService


class Response:
    """As Serve's: who stops waiting for it leaves the call going on, unless it is cancelled by name."""

    def __init__(self) -> None:
        self.is_cancelled = False

    def __await__(self) -> Generator[Any, None, None]:
        return asyncio.sleep(60).__await__()

    def cancel(self) -> None:
        self.is_cancelled = True


class Handle:
    def __init__(self) -> None:
        self.responses: list[Response] = []

    def __getattr__(self, _name: str) -> Any:
        return SimpleNamespace(remote=self._remote)

    def _remote(self, *_args: object) -> Response:
        self.responses.append(Response())
        return self.responses[-1]


SAMPLE = m.SampleRequest.model_validate(
    {"sampling_session_id": "s", "seq_id": 0, "prompt": {"chunks": []}, "sampling_params": {}}
)


@pytest.mark.parametrize("is_poll", [True, False], ids=["a poll", "a request"])
async def test_a_poll_whose_client_hung_up_ends_in_the_engine_too_and_a_request_does_not(is_poll: bool):
    handle = Handle()
    service = HandleService(handle)  # pyright: ignore[reportArgumentType]
    asking = service.fetch("t", ["id"], 25.0) if is_poll else service.submit("t", SAMPLE)
    task = asyncio.create_task(asking)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [response.is_cancelled for response in handle.responses] == [is_poll]
