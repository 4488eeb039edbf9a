"""What a tenant notices of another that floods the server.

    python -m service.fairness [--client native] [--steps 60] [--sequences 1] [--tokens 32]

A tenant takes steps one after the other: alone, then while another has more queued on each of eight runs than a tick
can take, then alone again. Prints the latency of its steps in milliseconds, and what a tick of the flood takes: its
tokens by the flood's own speed. All share the machine, so that what the flood's client takes of the processor counts
as well.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import select
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np

from service import programs
from service.clients import CLIENTS, connect, make_datum, make_run, model_of, stepper
from service.models import MODELS, make_model

FLOOD_RUNS, FLOOD_SEQUENCES, FLOOD_TOKENS, FLOOD_AHEAD = 8, 8, 128, 8


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="service.fairness", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--client", choices=CLIENTS, default="native")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--model", choices=sorted(MODELS), default="tiny")
    parser.add_argument("--flood", metavar="URL", help="be the flood of this server, until stdin is closed")
    given = parser.parse_args()
    if given.flood:
        flood(given.flood)
        return
    with tempfile.TemporaryDirectory() as directory:
        path = make_model(given.model, Path(directory))
        with programs.server(path, Path(directory)) as served:
            tenant = connect(given.client, served.base_url, "tml-modest")
            run = make_run(tenant, model_of(tenant), rank=8, seed=0)
            tokens = np.random.default_rng(0).integers(0, 512, given.tokens + 1)
            batch = [make_datum(tenant.types, tokens, "cross_entropy")] * given.sequences
            step = stepper(tenant, run, batch, "cross_entropy")
            figures = compare(step, given.steps, served.base_url)
            tenant.close()
    print(json.dumps({"work": f"{given.sequences} x {given.tokens}, {given.client}", **figures}, indent=1))


def compare(step: Callable[[], None], steps: int, base_url: str) -> dict[str, Any]:
    for _ in range(10):
        step()
    before = latencies(step, steps)
    with flooded(base_url) as flood_speed:
        beside = latencies(step, steps)
        speed = flood_speed()
    after = latencies(step, steps)
    tick_tokens = 4 * 2048  # as the service and the backend on a CPU have it
    return {
        "alone": summary(before + after),
        "beside_the_flood": summary(beside),
        "a_tick_of_the_flood": round(1000 * tick_tokens / speed, 1),
        "flood_tokens_per_second": round(speed),
    }


def latencies(step: Callable[[], None], steps: int) -> list[float]:
    taken: list[float] = []
    for _ in range(steps):
        began = time.perf_counter()
        step()
        taken.append(time.perf_counter() - began)
    return taken


def summary(seconds: list[float]) -> dict[str, float]:
    p50, p95, most = np.percentile(seconds, [50, 95, 100]) * 1000
    return {"p50": round(p50, 1), "p95": round(p95, 1), "max": round(most, 1)}


@contextlib.contextmanager
def flooded(base_url: str) -> Generator[Callable[[], float]]:
    """While another process floods the server; gives what ends the flood, and tells its tokens a second."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "service.fairness", "--flood", base_url],
        cwd=programs.BENCHMARKS,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def end() -> float:
        told, _ = process.communicate()
        return float(told)

    try:
        assert process.stdout is not None
        process.stdout.readline()  # it has begun
        yield end
    finally:
        process.kill()
        process.wait()


def flood(base_url: str) -> None:
    """Keep passes queued on each run until stdin is closed; then say how many tokens a second were computed."""
    tenant = connect("native", base_url, "tml-flood")
    name = model_of(tenant)
    tokens = np.random.default_rng(1).integers(0, 512, FLOOD_TOKENS + 1)
    batch = [make_datum(tenant.types, tokens, "cross_entropy")] * FLOOD_SEQUENCES
    runs = [make_run(tenant, name, rank=8, seed=number) for number in range(FLOOD_RUNS)]
    waiting: deque[tuple[Any, Any]] = deque()
    for _ in range(FLOOD_AHEAD):
        waiting.extend((run, run.forward_backward(batch, "cross_entropy")) for run in runs)
    waiting[-1][1].result()
    print("flooding", flush=True)
    began, done = time.perf_counter(), 0
    while not select.select([sys.stdin], [], [], 0)[0]:
        run, passed = waiting.popleft()
        passed.result()
        done += 1
        waiting.append((run, run.forward_backward(batch, "cross_entropy")))
    print(done * FLOOD_SEQUENCES * FLOOD_TOKENS / (time.perf_counter() - began))
    tenant.close()


if __name__ == "__main__":
    main()
