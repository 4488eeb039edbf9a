"""Many tenants on the real scheduler and engine, in virtual time: nothing is computed, a cost model says what it takes.

    python benchmarks/simulate_scheduler.py [--tenants 10000] [--zipf 0.5] [--load 1.5] [--steps 40] [--recorded FILE]

Scheduler, fair queue, live runs, packing and the engine's loop are those of the server; the worker is a sum: a fixed
time for each call, one for each micro-batch, and the tokens at a rate. A tenant's training steps (a pass and an
optimizer step) arrive at random moments, at a rate that falls by Zipf's law from tenant to tenant. Its client keeps so
many steps at the server (`--ahead`) and the rest to itself.

Recorded arrivals are a file of JSON lines, `{"seconds": 1.5, "tenant": "a", "tokens": [512, 300]}`, in order of time;
`tokens` are the lengths of a step's sequences. `--write FILE` writes the ones that were used.

Prints JSON:

    utilisation       tokens that were trained / those that the worker could have trained in the time, without fixed
                      costs, padding or a moment's rest
    worst_share       the least, over tenants, of the tokens that it got / those of its fair share: what it would have
                      got if at each moment the tenants with work had shared the same throughput equally (processor
                      sharing, which is max-min fair)
    jain_index        Jain's index of these ratios; 1 is: all are the same
    wait_p50, wait_p99    how long a step took of a tenant that asked for less than its share, in virtual seconds
    operations        passes and optimizer steps that were done
    scheduling_us     this process's CPU time inside the scheduler, for each operation, in microseconds
    engine_us         and all of it: scheduler, engine, packing, futures and simulated clients
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import json
import math
import selectors
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from twinkle.protocol import messages as m
from twinkle.protocol.types import Datum, ModelInput
from twinkle.server.app import build_parts
from twinkle.server.backends.protocol import (
    AdamStep,
    AdapterSpec,
    AdapterState,
    BaseModelInfo,
    Row,
    RowResult,
)
from twinkle.server.config import ServerConfig, parse_config
from twinkle.server.engine.worker import Trained, WorkerLost
from twinkle.server.scheduling.runs import Received, Run
from twinkle.server.scheduling.scheduler import Scheduler
from twinkle.server.service.parts import Parts
from twinkle.server.store.run_files import RunFiles

FOREVER = 1e9
MAX_ROW_TOKENS = 1024


class Arrival(NamedTuple):
    """A tenant's client has a training step to do: sequences of these lengths, in tokens."""

    seconds: float
    tenant: str
    tokens: tuple[int, ...]

    @property
    def total(self) -> int:
        return sum(self.tokens)


@dataclass(frozen=True)
class CostModel:
    """How long the worker takes, in seconds, and what it says of itself.

    Attributes:
        tokens_per_second: of padded tokens.
        call_seconds: fixed cost of a call.
        batch_tokens: most tokens in a micro-batch.
        overhead_tokens: fixed cost of a micro-batch, in tokens.
    """

    tokens_per_second: float = 20_000.0
    call_seconds: float = 0.005
    batch_tokens: int = 16_384
    overhead_tokens: int = 100

    def seconds(self, micro_batches: Sequence[Sequence[Row]]) -> float:
        padded = sum(len(rows) * max(len(row.tokens) for row in rows) for rows in micro_batches)
        padded += len(micro_batches) * self.overhead_tokens
        return self.call_seconds + padded / self.tokens_per_second


# ------------------------------------------------------------ arrivals


def zipf_arrivals(
    tenants: int, exponent: float, load: float, steps: int, tokens_per_second: float, seed: int = 0
) -> list[Arrival]:
    """Poisson arrivals of `tenants` tenants, the n-th at a rate proportional to n ** -exponent.

    Each tenant has its own typical size of a step, 256 to 4,096 tokens, which has nothing to do with its rate.

    Args:
        load: tokens that arrive in a second / tokens_per_second.
        steps: what the rarest tenant brings, about, until the last arrival.
    """
    draw = np.random.default_rng(seed)
    counts = draw.poisson(steps * (tenants / np.arange(1, tenants + 1)) ** exponent)
    typical = 2 ** draw.uniform(8, 12, tenants)
    arrivals: list[Arrival] = []
    for i in range(tenants):
        sizes = np.maximum(1, typical[i] * draw.uniform(0.75, 1.25, counts[i])).astype(int)
        moments = draw.uniform(0, 1, counts[i])
        arrivals += [Arrival(at, f"tenant-{i}", _rows(n)) for at, n in zip(moments, sizes, strict=True)]
    seconds = sum(arrival.total for arrival in arrivals) / (load * tokens_per_second)
    return sorted(arrival._replace(seconds=float(arrival.seconds * seconds)) for arrival in arrivals)


def _rows(tokens: int) -> tuple[int, ...]:
    """About equal sequences."""
    count = math.ceil(tokens / MAX_ROW_TOKENS)
    return tuple(int((i + 1) * tokens // count - i * tokens // count) for i in range(count))


def read_arrivals(path: Path) -> list[Arrival]:
    with path.open(encoding="utf-8") as lines:
        read = (json.loads(line) for line in lines if line.strip())
        return [Arrival(float(one["seconds"]), str(one["tenant"]), tuple(one["tokens"])) for one in read]


def write_arrivals(path: Path, arrivals: Sequence[Arrival]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(arrival._asdict()) + "\n" for arrival in arrivals)


def fair_shares(arrivals: Sequence[Arrival], throughput: float, until: float) -> dict[str, float]:
    """Tokens by tenant until then, if at any moment all tenants with work shared the throughput equally.

    Processor sharing by its virtual time (Parekh & Gallager, IEEE/ACM ToN 1993): what one tenant with work has got
    since the beginning. A tenant's work ends at the virtual time at which it became busy plus its tokens.

    Args:
        throughput: in tokens a second.
    """
    virtual, now = 0.0, 0.0
    ends: dict[str, float] = {}  # tenants with work
    arrived: Counter[str] = Counter()
    heap: list[tuple[float, str]] = []

    def advance(to: float) -> None:
        nonlocal virtual, now
        while heap:
            end, tenant = heap[0]
            if ends.get(tenant) != end:
                heapq.heappop(heap)  # more has arrived since
                continue
            needed = (end - virtual) * len(ends) / throughput
            if now + needed > to:
                break
            virtual, now = end, now + needed
            heapq.heappop(heap)
            del ends[tenant]
        if ends:
            virtual += (to - now) * throughput / len(ends)
        now = to

    for arrival in arrivals:
        if arrival.seconds > until:
            break
        advance(arrival.seconds)
        arrived[arrival.tenant] += arrival.total
        ends[arrival.tenant] = ends.get(arrival.tenant, virtual) + arrival.total
        heapq.heappush(heap, (ends[arrival.tenant], arrival.tenant))
    advance(until)
    return {tenant: total - max(0.0, ends.get(tenant, 0.0) - virtual) for tenant, total in arrived.items()}


# ------------------------------------------------------------ virtual time


class _NobodyIsWaitedFor(selectors.SelectSelector):
    """Instead of waiting for input, lets the clock jump to the next timer."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("the simulation stands still: nothing is ready, and no timer is set")
        self.now += max(0.0, timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock stands still while there is something to do, and then jumps. Knows no threads."""

    def __init__(self) -> None:
        self._clock = _NobodyIsWaitedFor()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now


class SimulatedWorker:
    """A `WorkerPort` that takes the cost model's time for its training calls, one at a time, and no other."""

    loss_fns: Mapping[str, Any] = {}

    def __init__(self, costs: CostModel) -> None:
        self.costs = costs
        self.info = BaseModelInfo(
            vocab_size=1,
            max_context_length=MAX_ROW_TOKENS,
            max_lora_rank=1,
            max_batch_tokens=costs.batch_tokens,
            eos_token_ids=(),
            architecture="simulated",
            overhead_tokens=costs.overhead_tokens,
        )
        self._turn = asyncio.Lock()
        self.calls = 0

    async def train(self, micro_batches: Sequence[Sequence[Row]], steps: Sequence[AdamStep]) -> Trained:
        async with self._turn:
            self.calls += 1
            await asyncio.sleep(self.costs.seconds(micro_batches))
        results = [
            [RowResult(np.zeros(len(row.tokens), np.float32), 0.0) for row in rows] for rows in micro_batches
        ]
        return results, [{} for _ in steps]

    async def forward_backward(self, micro_batches: Sequence[Sequence[Row]]) -> list[list[RowResult]]:
        return (await self.train(micro_batches, []))[0]

    async def optim_step(self, steps: Sequence[AdamStep]) -> list[dict[str, float]]:
        async with self._turn:
            await asyncio.sleep(self.costs.call_seconds)
        return [{} for _ in steps]

    async def add_adapter(self, adapter_id: str, spec: AdapterSpec) -> None: ...

    async def remove_adapter(self, adapter_id: str) -> None: ...

    async def export_adapter(
        self, adapter_id: str, with_optimizer: bool, with_gradients: bool = False
    ) -> AdapterState:
        return AdapterState(AdapterSpec(rank=1), [], {})

    async def lost(self) -> WorkerLost:
        await asyncio.Event().wait()
        raise AssertionError("unreachable")


# ------------------------------------------------------------ tenants


@dataclass
class Client:
    """A tenant's client: has its steps done in order, several of them at the server at any time.

    Attributes:
        steps: that the server does not have yet.
        done: tokens of the steps that are done.
        waits: seconds from a step's arrival to its end.
    """

    run: Run
    steps: deque[Arrival] = field(default_factory=deque[Arrival])
    woken: asyncio.Event = field(default_factory=asyncio.Event)
    sent: deque[tuple[Arrival, list[str]]] = field(default_factory=deque[tuple[Arrival, list[str]]])
    seq_id: int = 0
    done: int = 0
    waits: list[float] = field(default_factory=list[float])

    async def work(self, parts: Parts, ahead: int, datums: Callable[[int], Datum]) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while self.steps and len(self.sent) < ahead:
                self._send(parts, datums)
            if not self.sent:
                self.woken.clear()
                await self.woken.wait()
                continue
            step, requests = self.sent[0]
            await parts.futures.look(self.run.tenant, requests, FOREVER)
            parts.futures.fetched(requests)
            self.sent.popleft()
            self.done += step.total
            self.waits.append(loop.time() - step.seconds)

    def _send(self, parts: Parts, datums: Callable[[int], Datum]) -> None:
        step = self.steps.popleft()
        run_id, seq_id = self.run.run_id, self.seq_id
        data = [datums(tokens) for tokens in step.tokens]
        work = m.ForwardBackwardRequest(run_id, seq_id + 1, data, "cross_entropy")
        update = m.OptimStepRequest(model_id=run_id, seq_id=seq_id + 2)
        promises = [
            parts.live.enqueue(self.run, seq_id + 1, Received(work), step.total),
            parts.live.enqueue(self.run, seq_id + 2, Received(update)),
        ]
        self.seq_id += 2
        self.sent.append((step, [promise.request_id for promise in promises]))


class Datums:
    """A sequence of each length, made once: the scheduler only looks at lengths."""

    def __init__(self) -> None:
        self._made: dict[int, Datum] = {}

    def __call__(self, tokens: int) -> Datum:
        if tokens not in self._made:
            zeros = np.zeros(tokens, np.int64)
            self._made[tokens] = Datum(ModelInput.from_ints(zeros.tolist()), {"target_tokens": zeros})
        return self._made[tokens]


class Meter:
    """CPU time inside the scheduler's methods that others call."""

    METHODS = ("submit", "take_tick")

    def __init__(self, scheduler: Scheduler) -> None:
        self.seconds = 0.0
        for name in self.METHODS:
            setattr(scheduler, name, self._metered(getattr(scheduler, name)))

    def _metered(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            began = time.thread_time()
            try:
                return method(*args)
            finally:
                self.seconds += time.thread_time() - began

        return call


# ------------------------------------------------------------ the simulation


@dataclass(frozen=True)
class Outcome:
    """What came of it: the figures of the module's docstring, and each tenant's tokens."""

    figures: dict[str, float]
    done: dict[str, int]
    fair: dict[str, float]


def simulate(arrivals: Sequence[Arrival], costs: CostModel, ahead: int = 2) -> Outcome:
    """Run until the last arrival, and count what has been done by then."""
    with tempfile.TemporaryDirectory() as directory:
        loop = VirtualLoop()
        try:
            return loop.run_until_complete(_simulate(arrivals, costs, ahead, Path(directory)))
        finally:
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()


async def _simulate(arrivals: Sequence[Arrival], costs: CostModel, ahead: int, directory: Path) -> Outcome:
    loop = asyncio.get_running_loop()
    worker = SimulatedWorker(costs)
    parts = build_parts(_config(directory), worker, RunFiles(directory / "runs"), encodes=False)  # pyright: ignore[reportArgumentType]
    parts.scheduler.set_batching_window(costs.call_seconds, costs.batch_tokens)
    engine = asyncio.create_task(parts.engine.run())
    clients = await _begin(parts, sorted({arrival.tenant for arrival in arrivals}))
    meter = Meter(parts.scheduler)
    datums = Datums()
    began, cpu_began = loop.time(), time.process_time()
    tasks = [asyncio.create_task(client.work(parts, ahead, datums)) for client in clients.values()]
    for arrival in arrivals:
        at = began + arrival.seconds
        if at > loop.time():
            await asyncio.sleep(at - loop.time())
        client = clients[arrival.tenant]
        client.steps.append(arrival._replace(seconds=at))
        client.woken.set()
    seconds, cpu = loop.time() - began, time.process_time() - cpu_began
    if engine.done():
        engine.result()  # raises
    done = {tenant: client.done for tenant, client in clients.items()}
    for task in (engine, *tasks):
        task.cancel()
    await asyncio.gather(engine, *tasks, return_exceptions=True)
    fair = fair_shares(arrivals, sum(done.values()) / seconds, seconds)
    figures = _figures(clients, done, fair, seconds, costs)
    operations = sum(2 * len(client.waits) for client in clients.values())
    figures |= {
        "calls": worker.calls,
        "operations": operations,
        "scheduling_us": round(1e6 * meter.seconds / operations, 2),
        "engine_us": round(1e6 * cpu / operations, 1),
    }
    return Outcome(figures, done, fair)


def _config(directory: Path) -> ServerConfig:
    return parse_config({"model": {"model_id": "simulated"}, "storage": {"root": str(directory)}})


async def _begin(parts: Parts, tenants: Sequence[str]) -> dict[str, Client]:
    """A run for each tenant."""
    clients: dict[str, Client] = {}
    for tenant in tenants:
        run = Run(f"{tenant}:train:0", tenant, tenant, "simulated", AdapterSpec(rank=1))
        request = m.CreateModelRequest(session_id=tenant, model_seq_id=0, base_model="simulated")
        promise = parts.live.begin(run, Received(request))
        await parts.futures.wait(tenant, promise.request_id, FOREVER)
        clients[tenant] = Client(run)
    return clients


def _figures(
    clients: Mapping[str, Client],
    done: Mapping[str, int],
    fair: Mapping[str, float],
    seconds: float,
    costs: CostModel,
) -> dict[str, float]:
    ratios = {tenant: done[tenant] / share for tenant, share in fair.items() if share > 0}
    all_ratios = np.array(list(ratios.values()))
    # A tenant whose client keeps steps back asks for more than its share.
    modest = [client for client in clients.values() if not client.steps]
    waits = np.array([wait for client in modest for wait in client.waits] or [math.nan])
    return {
        "tenants": len(clients),
        "seconds": round(seconds, 1),
        "utilisation": round(sum(done.values()) / costs.tokens_per_second / seconds, 4),
        "worst_share": round(float(all_ratios.min()), 4),
        "share_p1": round(float(np.percentile(all_ratios, 1)), 4),
        "jain_index": round(float(all_ratios.sum() ** 2 / len(all_ratios) / (all_ratios**2).sum()), 5),
        "within_their_share": len(modest),
        "wait_p50": round(float(np.percentile(waits, 50)), 2),
        "wait_p99": round(float(np.percentile(waits, 99)), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="The scheduler with many tenants, in virtual time.")
    parser.add_argument(
        "--tenants", type=int, nargs="+", default=[100, 1000, 10_000], help="one simulation for each"
    )
    parser.add_argument(
        "--zipf", type=float, default=0.5, help="the n-th tenant's rate is proportional to n ** -ZIPF"
    )
    parser.add_argument(
        "--load", type=float, default=1.5, help="tokens that arrive / those that can be trained"
    )
    parser.add_argument("--steps", type=int, default=40, help="steps that the rarest tenant brings, about")
    parser.add_argument("--ahead", type=int, default=2, help="steps that a client has at the server")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens-per-second", type=float, default=CostModel.tokens_per_second)
    parser.add_argument(
        "--call-seconds", type=float, default=CostModel.call_seconds, help="fixed cost of a call"
    )
    parser.add_argument(
        "--batch-tokens", type=int, default=CostModel.batch_tokens, help="of a micro-batch, at most"
    )
    parser.add_argument(
        "--overhead-tokens", type=int, default=CostModel.overhead_tokens, help="of a micro-batch"
    )
    parser.add_argument(
        "--recorded", type=Path, help="arrivals to use instead: JSON lines, as the docstring says"
    )
    parser.add_argument(
        "--write", type=Path, help="write the arrivals (of the last simulation) as JSON lines"
    )
    given = parser.parse_args()
    costs = CostModel(given.tokens_per_second, given.call_seconds, given.batch_tokens, given.overhead_tokens)
    arrivals: list[Arrival] = []
    for arrivals in _loads(given):
        print(json.dumps(simulate(arrivals, costs, given.ahead).figures), flush=True)
    if given.write is not None:
        write_arrivals(given.write, arrivals)


def _loads(given: argparse.Namespace) -> Iterator[list[Arrival]]:
    if given.recorded is not None:
        yield read_arrivals(given.recorded)
        return
    for tenants in given.tenants:
        yield zipf_arrivals(tenants, given.zipf, given.load, given.steps, given.tokens_per_second, given.seed)


if __name__ == "__main__":
    sys.exit(main())
