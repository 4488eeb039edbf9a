"""What a small step costs, in CPU time and wake-ups of each process: figures that other load hardly changes.

    python -m service.cost [--client sdk native] [--tenants 1 8] [--tokens 1] [--steps 200]

For each process that takes part (Linux): CPU milliseconds of a tenant's step, and how often one of its threads went to
sleep for it, which is how often something was waited for. The last row is an empty request to uvicorn and its client,
in one process.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.bare import request
from service.clients import CLIENTS, connect, make_run, model_of, stepper
from service.load import in_parallel, random_batch
from service.models import make_model
from service.programs import process_of, server

# What Ray calls the processes of an engine and of a rank.
PROCESSES = {"engine": "ServeReplica", "rank": "ray::Rank"}


@dataclass(frozen=True)
class Spent:
    """
    Attributes:
        cpu: seconds.
        sleeps: how often a thread gave the processor up by itself.
    """

    cpu: float
    sleeps: float

    def __sub__(self, earlier: Spent) -> Spent:
        return Spent(self.cpu - earlier.cpu, self.sleeps - earlier.sleeps)


def spent(pid: int) -> dict[str, Spent]:
    """Of a process so far, by its threads' names."""
    cpu: Counter[str] = Counter()
    sleeps: Counter[str] = Counter()
    for task in Path(f"/proc/{pid}/task").iterdir():
        name = (task / "comm").read_text(encoding="utf-8").strip()
        cpu[name] += int((task / "schedstat").read_text(encoding="utf-8").split()[0])
        for line in (task / "status").read_text(encoding="utf-8").splitlines():
            if line.startswith("voluntary_ctxt_switches"):
                sleeps[name] += int(line.split()[1])
    return {name: Spent(cpu[name] / 1e9, sleeps[name]) for name in cpu}


def together(by_thread: dict[str, Spent]) -> Spent:
    return Spent(sum(s.cpu for s in by_thread.values()), sum(s.sleeps for s in by_thread.values()))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="service.cost", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--client", choices=CLIENTS, nargs="+", default=list(CLIENTS))
    parser.add_argument("--tenants", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", action="store_true", help="a row for each name of a thread")
    arguments = parser.parse_args()
    os.environ["TINKER_TELEMETRY"] = "0"
    print("| client | tenants | process | CPU ms a step | sleeps a step |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        model = make_model("tiny", Path(directory))
        with server(model, Path(directory)) as served:
            pids = {name: process_of(served.pid, command) for name, command in PROCESSES.items()}
            pids["client"] = os.getpid()
            for client in arguments.client:
                for tenants in arguments.tenants:
                    rows = measure(
                        served.base_url,
                        pids,
                        client,
                        tenants,
                        arguments.sequences,
                        arguments.tokens,
                        arguments.steps,
                    )
                    for name, by_thread in rows.items():
                        shown = {name: together(by_thread)}
                        if arguments.threads:
                            shown |= {
                                f"{name}: {thread}": s for thread, s in sorted(by_thread.items()) if s.sleeps
                            }
                        for what, cost in shown.items():
                            print(
                                f"| {client} | {tenants} | {what} | {1000 * cost.cpu:.2f} | {cost.sleeps:.1f} |",
                                flush=True,
                            )
    count = 2000
    before = time.process_time()
    request(count)
    print(f"| httpx | 1 | uvicorn's empty request | {1000 * (time.process_time() - before) / count:.2f} | |")


def measure(
    base_url: str, pids: dict[str, int], client: str, tenants: int, sequences: int, tokens: int, steps: int
) -> dict[str, dict[str, Spent]]:
    """By process and thread, a tenant's step."""
    everyone = in_parallel(tenants, lambda i: connect(client, base_url, f"tml-cost-{i}"))
    model = model_of(everyone[0])
    runs = in_parallel(tenants, lambda i: make_run(everyone[i], model, 8, seed=i))
    steppers = [
        stepper(t, run, random_batch(t, i, sequences, tokens, False, 512, "cross_entropy"), "cross_entropy")
        for i, (t, run) in enumerate(zip(everyone, runs, strict=True))
    ]

    def repeat(count: int) -> Callable[[int], Any]:
        return lambda i: [steppers[i]() for _ in range(count)]

    in_parallel(tenants, repeat(5))
    before = {name: spent(pid) for name, pid in pids.items()}
    in_parallel(tenants, repeat(steps))
    after = {name: spent(pid) for name, pid in pids.items()}
    in_parallel(tenants, lambda i: everyone[i].close())
    nothing = Spent(0.0, 0)
    steps *= tenants
    costs: dict[str, dict[str, Spent]] = {}
    for name in pids:
        costs[name] = {}
        for thread, spent_there in after[name].items():
            made = spent_there - before[name].get(thread, nothing)
            costs[name][thread] = Spent(made.cpu / steps, made.sleeps / steps)
    return costs


if __name__ == "__main__":
    main()
