"""Which files and functions a request passes through, from client to backend and back.

    scripts/hatch run python scripts/trace_request.py [--files]

Everything is the project's own but the model, which is the fake one: client and gateway over HTTP, the service with its
journal, the process border over its socket, all in one process and each on threads of its own. Prints, for a training
step (`forward_backward` and `optim_step` sent together) and for a sample, how many files and functions were entered,
how many calls were made, and how many of them went from one file to another. Threads take turns as they like, so the
moves vary by a few from run to run: each is traced several times, and the shortest trace is printed.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, cast

import numpy as np

from twinkle.server.app import build_service, build_signer
from twinkle.server.backends.fake import FakeBackend
from twinkle.server.backends.protocol import ModelConfig
from twinkle.server.config import ModelSection, ServerConfig, StorageSection
from twinkle.server.engine.worker import LocalWorker
from twinkle.server.gateway.app import create_app
from twinkle.server.plan import Plan
from twinkle.server.sampler_plan import SamplerPlan
from twinkle.server.samplers.fake import FakeEngine
from twinkle.server.serve.http import HttpServer
from twinkle.server.serve.ranks import Incarnation, RankGroup
from twinkle.server.serve.rpc import Connection, Server
from twinkle_client import ServiceClient
from twinkle_client import types as T

ROUNDS = 5


@dataclass
class Trace:
    """Calls of functions of the packages, in order: (file, function)."""

    calls: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])

    @property
    def files(self) -> list[str]:
        """In the order in which they were entered first."""
        return list(dict.fromkeys(file for file, _ in self.calls))

    @property
    def functions(self) -> int:
        return len(set(self.calls))

    @property
    def moves(self) -> int:
        files = [file for file, _ in self.calls]
        return sum(one != other for one, other in zip(files, files[1:], strict=False))

    def entered(self, file: str) -> list[str]:
        return list(dict.fromkeys(name for each, name in self.calls if each == file))


class Tracer:
    """Notes calls on all threads that were started after it was made, while it is recording."""

    def __init__(self) -> None:
        self._trace: Trace | None = None
        threading.setprofile(self._on_event)
        sys.setprofile(self._on_event)

    def _on_event(self, frame: FrameType, event: str, _arg: Any) -> None:
        if self._trace is not None and event == "call":
            path = frame.f_code.co_filename
            if "/packages/" in path:
                self._trace.calls.append((path.split("/src/")[1], frame.f_code.co_qualname))

    @contextmanager
    def recording(self) -> Generator[Trace]:
        trace = self._trace = Trace()
        try:
            yield trace
        finally:
            self._trace = None


async def _serve(root: Path, port: int, ready: threading.Event, stop: threading.Event) -> None:
    model = ModelConfig(root)
    backend = FakeBackend(model)
    # What a rank does once its model is loaded; Ray would have started its process.
    loaded = asyncio.get_running_loop().create_future()
    loaded.set_result(LocalWorker(backend, FakeEngine.create(model, backend)))
    address = await Server(loaded).listen(None)
    connection = await Connection.connect(address, heartbeat_seconds=60)
    config = ServerConfig(model=ModelSection(model_id="org/fake"), storage=StorageSection(root=root))
    plan = Plan(config, model, "fake", SamplerPlan("fake", 0, model, 0, None, 0, 32), gpus_per_rank=0)
    group = RankGroup(
        plan, cast(Any, None), Incarnation([connection], [], None), backend.info, backend.loss_fns
    )
    signer = build_signer(config)
    service = build_service(config, group, signer=signer, live=root / "live")
    await service.start()
    http = await HttpServer.start(create_app(service, config.limits, signer), "127.0.0.1", port)
    ready.set()
    while not stop.is_set():
        await asyncio.sleep(0.05)
    await http.close()
    await service.close()
    connection.close()
    await asyncio.sleep(0.1)  # the other end notices


def least(tracer: Tracer, work: Callable[[], object]) -> Trace:
    """The shortest of several traces: the others have what happened beside the request."""
    traces: list[Trace] = []
    for _ in range(ROUNDS):
        with tracer.recording() as trace:
            work()
        traces.append(trace)
        time.sleep(0.2)
    return min(traces, key=lambda trace: (len(trace.files), trace.moves))


def show(name: str, trace: Trace, with_files: bool) -> None:
    print(
        f"{name}: {len(trace.files)} files, {trace.functions} functions, {len(trace.calls)} calls, "
        f"{trace.moves} moves from file to file"
    )
    if with_files:
        for file in trace.files:
            print(f"    {file}: {', '.join(trace.entered(file))}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--files", action="store_true", help="print each file with the functions that were entered"
    )
    with_files: bool = parser.parse_args().files
    logging.disable(logging.WARNING)
    tracer = Tracer()
    ready, stop = threading.Event(), threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as directory:
        serving = threading.Thread(target=lambda: asyncio.run(_serve(Path(directory), port, ready, stop)))
        serving.start()
        ready.wait(60)
        client = ServiceClient(base_url=f"http://127.0.0.1:{port}", api_key="key")
        training = client.create_lora_training_client(base_model="org/fake", rank=4)
        rows = [
            {"input_ids": np.array([1, 2, 3, 4, 5]), "labels": np.array([-100, 2, 3, 4, 5])} for _ in range(2)
        ]

        def step() -> None:
            results = training.forward_backward(rows), training.optim_step()
            for result in results:
                result.result()

        step()
        sampler = training.save_weights_and_get_sampling_client()

        def sample() -> None:
            sampler.sample([1, 2, 3], sampling_params=T.SamplingParams(max_tokens=4)).result()

        sample()
        show("forward_backward and optim_step", least(tracer, step), with_files)
        show("sample", least(tracer, sample), with_files)
        client.close()
        stop.set()
        serving.join()


if __name__ == "__main__":
    main()
