"""Data-parallel ranks on the cores of one machine, against one rank on the same cores.

    python benchmarks/data_parallel.py [--ranks 2] [--tenants 8] [--rows 1] [--tokens 64] [--lora-rank 16] [--rounds 8]

The model has SmolLM2-135M's shape and random weights. Each rank is a process, with as many threads as the server gives
it, its share of the cores; several talk over gloo. Rounds of one rank and of several alternate, and each ratio is the
median over rounds, so that other load on the machine weighs on both alike. Prints JSON:

    seconds             of a round's pass and of its optimizer steps, medians and the best: one rank, several
    cpu_seconds         the same, as the ranks' processes used them together: other load changes that little
    speed               tokens per second of several ranks / of one, in a pass, and in a pass with its steps
    work                CPU seconds of one rank / of several, likewise
    bytes_a_round       sent by all ranks: gradients to their owners, new weights from them
    reckoned            the same, from the adapters' sizes and where their rows went

"rows anywhere" is without what the server does for fewer gradients: to send rows to the rank that owns their adapter.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from twinkle.protocol.types import AdamParams
from twinkle.server.backends.protocol import AdamStep, AdapterSpec, ModelConfig, Row
from twinkle.server.backends.shares import RankShares

VOCAB_SIZE = 49152
STEP = AdamParams(learning_rate=1e-4)

Times: TypeAlias = tuple[float, float]
"""Of a pass, and of the steps behind it."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Data-parallel ranks against one rank, on the same cores.")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tenants", type=int, default=8)
    parser.add_argument("--rows", type=int, default=1, help="rows of each tenant")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each row")
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=8)
    arguments = parser.parse_args()
    # As the server's ranks do: a thread that waits gives its core away.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with tempfile.TemporaryDirectory() as directory:
        save_model(Path(directory))
        print(json.dumps(measure(Path(directory), **vars(arguments)), indent=2))


def measure(
    model: Path, ranks: int, tenants: int, rows: int, tokens: int, lora_rank: int, rounds: int
) -> dict[str, Any]:
    names = [f"tenant-{i}" for i in range(tenants)]
    batch = [random_row(name, tokens, seed=100 * i + k) for i, name in enumerate(names) for k in range(rows)]
    groups = {
        "one": Group(model, 1),
        "several": Group(model, ranks),
        "several, rows anywhere": Group(model, ranks, by_owner=False),
    }
    for group in groups.values():
        for i, name in enumerate(names):
            group.add(name, AdapterSpec(rank=lora_rank, seed=i))
    seconds: dict[str, list[Times]] = {name: [] for name in groups}
    cpu_seconds: dict[str, list[Times]] = {name: [] for name in groups}
    for i in range(rounds + 1):
        for name, group in groups.items():
            wall, cpu = group.train(batch, names)
            if i:  # the first does not count
                seconds[name].append(wall)
                cpu_seconds[name].append(cpu)
    one, *several = groups
    found = {
        "settings": {"ranks": ranks, "tenants": tenants, "rows": rows, "tokens": tokens}
        | {"lora_rank": lora_rank, "rounds": rounds, "cores": os.cpu_count()},
        "seconds": {name: summary(of_rounds) for name, of_rounds in seconds.items()},
        "cpu_seconds": {name: summary(of_rounds) for name, of_rounds in cpu_seconds.items()},
        "speed": {name: ratios(seconds[one], seconds[name]) for name in several},
        "work": {name: ratios(cpu_seconds[one], cpu_seconds[name]) for name in several},
        "bytes_a_round": {
            name: {kind: sent // (rounds + 1) for kind, sent in groups[name].sent().items()}
            for name in several
        },
        "reckoned": {name: groups[name].reckon(batch, names) for name in several},
    }
    for group in groups.values():
        group.close()
    return found


def summary(of_rounds: Sequence[Times]) -> dict[str, Any]:
    parts = {
        "pass": [a for a, _ in of_rounds],
        "steps": [b for _, b in of_rounds],
        "round": [a + b for a, b in of_rounds],
    }
    return {
        part: {"median": round(statistics.median(values), 3), "best": round(min(values), 3)}
        for part, values in parts.items()
    }


def ratios(one: Sequence[Times], several: Sequence[Times]) -> dict[str, Any]:
    pairs = list(zip(one, several, strict=True))
    parts = {"pass": [a[0] / b[0] for a, b in pairs], "round": [sum(a) / sum(b) for a, b in pairs]}
    return {
        part: {"median": round(statistics.median(values), 3), "each": [round(value, 3) for value in values]}
        for part, values in parts.items()
    }


class Group:
    """The ranks of one model, in processes of their own; calls go to all of them at once."""

    def __init__(self, model: Path, ranks: int, by_owner: bool = True) -> None:
        """
        Args:
            by_owner: rows go to the rank that owns their adapter, where shares stay even.
        """
        context = multiprocessing.get_context("spawn")
        meeting = f"file://{tempfile.mkdtemp()}/meeting"
        config = ModelConfig(model, data_parallel_size=ranks)
        threads = max(1, (os.cpu_count() or 1) // ranks)
        self._pipes: list[Connection] = []
        self._owners: dict[str, int] = {}
        self._by_owner = by_owner
        for rank in range(ranks):
            here, there = context.Pipe()
            own = replace(config, rank=rank, rendezvous=meeting if ranks > 1 else None)
            context.Process(target=serve, args=(there, own, threads), daemon=True).start()
            self._pipes.append(here)
        [self._overhead_tokens, *_] = self._answers()

    def call(self, method: str, *args: Any) -> Any:
        return self._each([(method, args)] * len(self._pipes))[0]

    def train(self, batch: list[Row], names: list[str]) -> tuple[Times, Times]:
        """Seconds of a pass and of the optimizer steps behind it, on the clock and of CPU."""
        calls = [("forward_backward", (share,)) for share in self.shares(batch).of_ranks]
        forward, cpu_forward = self._timed(calls)
        steps = [AdamStep(name, STEP) for name in names]
        step, cpu_step = self._timed([("optim_step", (steps,))] * len(self._pipes))
        return (forward, step), (cpu_forward, cpu_step)

    def _timed(self, calls: Sequence[tuple[str, tuple[Any, ...]]]) -> tuple[float, float]:
        cpu, started = self._cpu_seconds(), time.perf_counter()
        self._each(calls)
        return time.perf_counter() - started, self._cpu_seconds() - cpu

    def _cpu_seconds(self) -> float:
        return sum(self._each([("cpu", ())] * len(self._pipes)))

    def add(self, name: str, spec: AdapterSpec) -> None:
        self.call("add_adapter", name, spec)
        if self._by_owner:
            self._owners[name] = self.call("owner_of", name)

    def shares(self, batch: list[Row]) -> RankShares:
        """As `serve.ranks.RankGroup` sends them."""
        return RankShares.of([batch], len(self._pipes), self._overhead_tokens, self._owners)

    def sent(self) -> dict[str, int]:
        """Bytes that all ranks have sent so far."""
        by_rank = self._each([("sent", ())] * len(self._pipes))
        return {kind: sum(of_rank[kind] for of_rank in by_rank) for kind in by_rank[0]}

    def reckon(self, batch: list[Row], names: list[str]) -> dict[str, int]:
        """Bytes of a round: each gradient that was not computed on its owner, each new weight on each other rank."""
        adapters: dict[str, tuple[int, int]] = self.call("adapters")  # owner, elements
        gradients = 0
        for rank, share in enumerate(self.shares(batch).of_ranks):
            computed = {row.adapter_id for rows in share for row in rows}
            gradients += sum(4 * adapters[name][1] for name in computed if adapters[name][0] != rank)
        others = len(self._pipes) - 1
        return {"gradients": gradients, "weights": sum(4 * adapters[name][1] * others for name in names)}

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)

    def _each(self, calls: Sequence[tuple[str, tuple[Any, ...]]]) -> list[Any]:
        for pipe, call in zip(self._pipes, calls, strict=True):
            pipe.send(call)
        return self._answers()

    def _answers(self) -> list[Any]:
        answers = [pipe.recv() for pipe in self._pipes]
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers


def serve(pipe: Connection, config: ModelConfig, threads: int) -> None:
    """A rank: answers calls until it is told to stop."""
    import torch

    from twinkle.server.backends.transformers import TransformersBackend

    torch.set_num_threads(threads)
    backend = TransformersBackend(config)
    pipe.send(backend.info.overhead_tokens)
    while (call := pipe.recv()) is not None:
        method, args = call
        try:
            match method:
                case "cpu":
                    pipe.send(time.process_time())
                case "sent":
                    replicas = backend._replicas
                    assert replicas is not None, "asked of several ranks"
                    pipe.send({"gradients": replicas.bytes_sent, "weights": replicas.weight_bytes_sent})
                case "adapters":
                    adapters = backend._adapters.items()
                    pipe.send({name: (found.owner, found.bank.layout.size) for name, found in adapters})
                case _:
                    pipe.send(getattr(backend, method)(*args))
        except Exception as error:
            pipe.send(error)


def save_model(directory: Path) -> None:
    """SmolLM2-135M's shape, random weights, float32."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)


def random_row(adapter: str, tokens: int, seed: int) -> Row:
    draw = np.random.default_rng(seed)
    inputs = {"target_tokens": draw.integers(0, VOCAB_SIZE, tokens), "weights": np.ones(tokens, np.float32)}
    return Row(adapter, draw.integers(0, VOCAB_SIZE, tokens), "cross_entropy", inputs)


if __name__ == "__main__":
    main()
