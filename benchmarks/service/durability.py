"""What it costs that nothing is lost, and how long a loss is felt.

    python -m service.durability journal [--rounds 9] [--steps 20] [--model tiny]
    python -m service.durability recovery [--adapters 32] [--model tiny]

`journal`: steps of 8 tenants x (4 x 128) in one process, without HTTP, on two services by turns: one that writes a
journal and copies its runs, as a server does, and one that does neither. Each has a model of its own.

`recovery`: a server with so many runs, of which each has taken steps; the process that computes is killed (SIGKILL),
and at once each run's client takes a further step. Prints how long the last of them took, beside how long the server
took to start, and how many calls failed (none should).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from service import programs
from service.clients import CLIENTS, connect, make_datum, make_run, model_of, stepper
from service.models import MODELS, make_model
from twinkle.protocol import messages as m
from twinkle.protocol.types import Datum, ModelInput
from twinkle.server.app import build_service
from twinkle.server.backends.protocol import ModelConfig
from twinkle.server.config import parse_config
from twinkle.server.engine.worker import build_worker
from twinkle.server.service.service import Service

TENANTS, SEQUENCES, TOKENS = 8, 4, 128


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="service.durability", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("journal", "recovery"))
    parser.add_argument("--model", choices=sorted(MODELS), default="tiny")
    parser.add_argument("--rounds", type=int, default=9, help="journal: turns of each service")
    parser.add_argument("--steps", type=int, default=20, help="journal: steps in a turn")
    parser.add_argument("--adapters", type=int, default=32, help="recovery: runs of as many tenants")
    parser.add_argument("--client", choices=CLIENTS, default="sdk", help="recovery")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        path = make_model(given.model, Path(directory))
        if given.what == "journal":
            figures = asyncio.run(journal(path, Path(directory), given.rounds, given.steps))
        else:
            figures = recovery(path, Path(directory), given.adapters, given.client)
    print(json.dumps(figures, indent=1))


# ---------------------------------------------------------------- the journal, on and off


async def journal(model: Path, directory: Path, rounds: int, steps: int) -> dict[str, Any]:
    kept, plain = (
        Trainer(model, directory / "kept", keeps=True),
        Trainer(model, directory / "plain", keeps=False),
    )
    for trainer in (kept, plain):
        await trainer.start()
        await trainer.train(5)
    seconds: dict[str, list[float]] = {"kept": [], "plain": []}
    for _ in range(rounds):
        seconds["kept"].append(await kept.train(steps))
        seconds["plain"].append(await plain.train(steps))
    for trainer in (kept, plain):
        await trainer.close()
    ratios = [a / b for a, b in zip(seconds["kept"], seconds["plain"], strict=True)]
    return {
        "work": f"{TENANTS} tenants x ({SEQUENCES} x {TOKENS}), {steps} steps a turn",
        "ms_a_step_kept": round(1000 * statistics.median(seconds["kept"]) / steps, 2),
        "ms_a_step_plain": round(1000 * statistics.median(seconds["plain"]) / steps, 2),
        "time_kept_by_plain_median": round(statistics.median(ratios), 4),
        "time_kept_by_plain": [round(ratio, 4) for ratio in ratios],
    }


class Trainer:
    """A service in this process, and tenants that train on it."""

    def __init__(self, model: Path, directory: Path, keeps: bool) -> None:
        config = parse_config({"model": {"model_id": str(model)}, "storage": {"root": str(directory)}})
        worker = build_worker(ModelConfig(model), "transformers", "transformers")
        self._model = str(model)
        self._service: Service = build_service(config, worker, live=directory / "live" if keeps else None)
        self._runs: list[str] = []
        self._seq_id = 1

    async def start(self) -> None:
        await self._service.start()
        for number in range(TENANTS):
            tenant = f"tenant-{number}"
            session = await self._service.ask(tenant, m.CreateSessionRequest())
            assert isinstance(session, m.CreateSessionResponse)
            request = m.CreateModelRequest(
                session_id=session.session_id, model_seq_id=0, base_model=self._model
            )
            promise = await self._service.submit(tenant, request)
            await self._service.retrieve(tenant, promise.request_id, 60.0)
            assert promise.model_id is not None
            self._runs.append(promise.model_id)

    async def train(self, steps: int) -> float:
        """Seconds that so many steps of all took."""
        began = time.perf_counter()
        for _ in range(steps):
            await asyncio.gather(*(self._step(i, run) for i, run in enumerate(self._runs)))
            self._seq_id += 2
        return time.perf_counter() - began

    async def _step(self, number: int, run: str) -> None:
        ids = np.random.default_rng(number).integers(0, 512, TOKENS)
        inputs = {"target_tokens": ids, "weights": np.ones(TOKENS, np.float32)}
        data = [Datum(ModelInput.from_ints(ids.tolist()), inputs) for _ in range(SEQUENCES)]
        tenant = f"tenant-{number}"
        requests = [
            m.ForwardBackwardRequest(run, self._seq_id, data, "cross_entropy"),
            m.OptimStepRequest(model_id=run, seq_id=self._seq_id + 1),
        ]
        promises = [await self._service.submit(tenant, request) for request in requests]
        for promise in promises:
            outcome = await self._service.retrieve(tenant, promise.request_id, 60.0)
            assert not isinstance(outcome, m.Failure | m.TryAgain), outcome

    async def close(self) -> None:
        await self._service.close()


# ---------------------------------------------------------------- recovery


def recovery(model: Path, directory: Path, adapters: int, client: str) -> dict[str, Any]:
    with programs.server(model, directory) as served:
        tenants = [connect(client, served.base_url, f"tml-{number}") for number in range(adapters)]
        name = model_of(tenants[0])
        tokens = np.random.default_rng(0).integers(0, 512, TOKENS + 1)

        def begin(number: int) -> Any:
            run = make_run(tenants[number], name, rank=8, seed=number)
            batch = [make_datum(tenants[number].types, tokens, "cross_entropy")]
            return stepper(tenants[number], run, batch, "cross_entropy")

        with ThreadPoolExecutor(adapters) as pool:
            steps = list(pool.map(begin, range(adapters)))
            for _ in range(3):
                list(pool.map(lambda step: step(), steps))
            began = time.perf_counter()
            os.kill(programs.process_of(served.pid, "ray::Rank"), signal.SIGKILL)
            failed: list[BaseException] = []
            lock = threading.Lock()

            def go_on(step: Any) -> float:
                try:
                    step()
                except BaseException as error:
                    with lock:
                        failed.append(error)
                return time.perf_counter() - began

            took = list(pool.map(go_on, steps))
            alike = time.perf_counter()
            list(pool.map(lambda step: step(), steps))
            undisturbed = time.perf_counter() - alike
        for tenant in tenants:
            tenant.close()
    return {
        "adapters": adapters,
        "client": client,
        "start_up_seconds": round(served.ready_seconds, 2),
        "first_step_after_the_kill_seconds": round(min(took), 2),
        "last_step_after_the_kill_seconds": round(max(took), 2),
        "the_same_steps_undisturbed_seconds": round(undisturbed, 2),
        "calls_that_failed": len(failed),
    }


if __name__ == "__main__":
    main()
