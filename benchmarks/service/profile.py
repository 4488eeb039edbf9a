"""Where the time of a small step goes: the whole way of a request in one process, with a clock at each stop.

    python -m service.profile [--tenants 1] [--sequences 1] [--tokens 32] [--steps 50]

Gateway, service and worker are the server's own, without the sockets between its processes. Prints the milliseconds of
a step of all tenants by stop; what a stop does on behalf of another one is counted there. A pass has one network, so
that its stops follow one another.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

from service.models import MODELS, make_model
from twinkle.protocol import codec, operations
from twinkle.protocol import messages as m
from twinkle.protocol.endpoints import PREFIX
from twinkle.protocol.operations import ENDPOINTS, Posted
from twinkle.protocol.types import Datum, ModelInput
from twinkle.server.app import build_service
from twinkle.server.backends.protocol import ModelConfig
from twinkle.server.backends.transformers import passes
from twinkle.server.config import LimitsSection, parse_config
from twinkle.server.engine import engine
from twinkle.server.engine.worker import build_worker
from twinkle.server.gateway import http as gateway_http
from twinkle.server.gateway.app import create_app
from twinkle.server.scheduling import futures
from twinkle.server.scheduling.scheduler import Scheduler
from twinkle.server.tokens import Signer


class Clocks:
    """Seconds by stop; a stop within another one is taken off that one."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._inner: defaultdict[int, list[float]] = defaultdict(lambda: [0.0])  # by thread

    def around(self, stop: str, owner: Any, name: str) -> None:
        """Count the time of `owner.name` (a plain function or method) under `stop`."""
        plain: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            inner = self._inner[threading.get_ident()]
            began = time.perf_counter()
            inner.append(0.0)
            try:
                return plain(*args, **kwargs)
            finally:
                took = time.perf_counter() - began
                self.seconds[stop] += took - inner.pop()
                inner[-1] += took

        setattr(owner, name, timed)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="service.profile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tenants", type=int, default=1)
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--model", choices=sorted(MODELS), default="tiny")
    asyncio.run(profile(**vars(parser.parse_args())))


async def profile(tenants: int, sequences: int, tokens: int, steps: int, model: str) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        path = make_model(model, Path(directory))
        config = parse_config({"model": {"model_id": str(path)}, "storage": {"root": directory}})
        worker = build_worker(ModelConfig(path), "transformers", "transformers")
        service = build_service(config, worker, live=Path(directory) / "live")
        await service.start()
        clocks = put_clocks()
        transport = httpx.ASGITransport(create_app(service, LimitsSection(), Signer("benchmark")))
        async with httpx.AsyncClient(transport=transport, base_url="http://server" + PREFIX) as http:
            runs = [await new_run(http, str(path), i) for i in range(tenants)]
            numbers = iter(range(1, 1_000_000, 2))
            for _ in range(5):
                await step_of_all(http, runs, next(numbers), sequences, tokens)
            clocks.seconds.clear()
            began = time.perf_counter()
            for _ in range(steps):
                await step_of_all(http, runs, next(numbers), sequences, tokens)
            whole = time.perf_counter() - began
        await service.close()
    print(f"{tenants} tenants x ({sequences} x {tokens}), model {model}\n")
    print("| stop | ms a step of all |\n|---|---|")
    for stop, seconds in sorted(clocks.seconds.items(), key=lambda item: -item[1]):
        print(f"| {stop} | {1000 * seconds / steps:.2f} |")
    rest = whole - sum(clocks.seconds.values())
    print(f"| the rest: HTTP, event loop, threads, this program's client | {1000 * rest / steps:.2f} |")
    print(f"| together | {1000 * whole / steps:.2f} |")


def put_clocks() -> Clocks:
    clocks = Clocks()
    clocks.around("decode", gateway_http, "_decode")
    clocks.around("queue", Scheduler, "submit")
    clocks.around("tick", Scheduler, "take_tick")
    clocks.around("pack", engine, "pack")
    clocks.around("unpack", engine, "unpack")
    clocks.around("pass: rows to tensors, banks, results", passes, "run_pass")
    clocks.around("forward", passes.LoraNetwork, "logprobs")
    clocks.around("backward", torch.Tensor, "backward")
    clocks.around("encode the result", futures, "encode_result")
    from twinkle.server.backends import transformers as backend

    clocks.around("optimizer", backend.TransformersBackend, "optim_step")
    clocks.around("pass: rows to tensors, banks, results", backend, "run_pass")
    return clocks


async def new_run(http: httpx.AsyncClient, model: str, number: int) -> str:
    session = (await http.post("/create_session", json={})).json()["session_id"]
    request = m.CreateModelRequest(session_id=session, model_seq_id=number, base_model=model)
    promise = (await http.post("/create_model", content=codec.encode_json(request))).json()
    result = await http.post("/retrieve_future", json={"request_id": promise["request_id"]})
    return str(result.json()["model_id"])


async def step_of_all(
    http: httpx.AsyncClient, runs: list[str], seq_id: int, sequences: int, tokens: int
) -> None:
    await asyncio.gather(
        *(http.post(operations.PATH, content=step_body(run, seq_id, sequences, tokens)) for run in runs)
    )


def step_body(run: str, seq_id: int, sequences: int, tokens: int) -> bytes:
    ids = np.arange(tokens) % 512
    inputs = {"target_tokens": ids, "weights": np.ones(tokens, np.float32)}
    data = [Datum(ModelInput.from_ints(ids.tolist()), inputs) for _ in range(sequences)]
    passed = codec.encode_forward_backward(m.ForwardBackwardRequest(run, seq_id, data, "cross_entropy"))
    stepped = codec.encode_json(m.OptimStepRequest(model_id=run, seq_id=seq_id + 1))
    return operations.encode_request(
        [Posted(ENDPOINTS["/forward_backward"], passed), Posted(ENDPOINTS["/optim_step"], stepped)]
    )


if __name__ == "__main__":
    main()
