from __future__ import annotations

import socket

import grpc
import pytest

from twinkle.server.serve.loopback import keep_grpc_local


@pytest.mark.parametrize("address", ["[::]:0", "0.0.0.0:0", "127.0.0.1:0"])
async def test_a_grpc_server_listens_for_this_machine_alone(address: str):
    keep_grpc_local()
    keep_grpc_local()
    server = grpc.aio.server()
    port = server.add_insecure_port(address)
    await server.start()
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
        for family, other in ((socket.AF_INET, "127.0.0.2"), (socket.AF_INET6, "::1")):
            with socket.socket(family) as probe, pytest.raises(OSError):
                probe.connect((other, port))
    finally:
        await server.stop(None)
