"""How full two pipeline stages are when several tenants train on them, in two processes on one machine.

    python benchmarks/megatron_pipeline.py [--tenants 8] [--rows 4] [--tokens 128] [--rounds 10]

The model is a small random Qwen3 made on the fly, on the CPU with one thread a stage. A stage is idle while it neither
runs forward nor backward: Megatron-Core's own timers say when it does. Rounds of the ways below are interleaved, each
figure is the median over rounds. Prints JSON:

    idle_share        of each stage, in percent of a pass: in pieces; as one piece; tenants one after the other
    in_theory         (p - 1) / (m + p - 1) for p stages and m pieces of one size
    time              of a pass, as a ratio to that in pieces
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.multiprocessing.spawn import spawn
from transformers import AutoModelForCausalLM, Qwen3Config

from twinkle.server.backends.protocol import AdapterSpec, ModelConfig, Row

VOCAB_SIZE = 2048
STAGES = 2
WAYS = ("in pieces", "as one piece", "one tenant after the other")


def main() -> None:
    parser = argparse.ArgumentParser(description="Idle time of two pipeline stages under several tenants.")
    parser.add_argument("--tenants", type=int, default=8)
    parser.add_argument("--rows", type=int, default=4, help="rows of each tenant")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each row")
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        save_model(path)
        queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
        spawn(measure, (path, queue, vars(arguments)), nprocs=STAGES)
        stages = [found for _, found in sorted(queue.get() for _ in range(STAGES))]
    pieces = stages[0]["pieces"]
    base = stages[0]["seconds"][WAYS[0]]
    report = {
        "settings": {**vars(arguments), "stages": STAGES, "pieces": pieces},
        "idle_share": {way: [round(100 * stage["idle"][way], 1) for stage in stages] for way in WAYS},
        "in_theory": round(100 * (STAGES - 1) / (pieces + STAGES - 1), 1),
        "time": {way: round(stages[0]["seconds"][way] / base, 2) for way in WAYS},
        "pass_ms": round(1000 * base, 1),
    }
    print(json.dumps(report, indent=2))


def measure(rank: int, path: Path, queue: Any, settings: dict[str, int]) -> None:
    """One stage: all rounds; its figures go into `queue`."""
    from twinkle_megatron import pieces, stage
    from twinkle_megatron.backend import MegatronBackend

    torch.set_num_threads(1)
    config = ModelConfig(path, pipeline_parallel_size=STAGES)
    loaded = stage.load(replace(config, rank=rank, rendezvous=f"file://{path / 'meeting'}"))
    timers = Timers()
    loaded.model.config.timers = timers
    backend = MegatronBackend(config, loaded)
    rows: list[list[Row]] = []
    for i in range(settings["tenants"]):
        backend.add_adapter(str(i), AdapterSpec(rank=8, seed=i))
        rows.append(
            [random_row(str(i), settings["tokens"], seed=100 * i + k) for k in range(settings["rows"])]
        )
    together = [row for own in rows for row in own]
    default = pieces.PIECES_A_STAGE
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    idle: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(settings["rounds"] + 1):  # the first is to warm up
        for way in WAYS:
            pieces.PIECES_A_STAGE = default if way == WAYS[0] else 0
            calls = [[together]] if way != WAYS[2] else [[own] for own in rows]
            timers.busy = 0.0
            began = time.perf_counter()
            for call in calls:
                backend.forward_backward(call)
            took = time.perf_counter() - began
            seconds[way].append(took)
            idle[way].append(1 - timers.busy / took)
    count = min(default * STAGES, len(together))
    found = {
        "pieces": count,
        "seconds": {way: statistics.median(values[1:]) for way, values in seconds.items()},
        "idle": {way: statistics.median(values[1:]) for way, values in idle.items()},
    }
    queue.put((rank, found))


class Timers:
    """What Megatron-Core's schedules tell the time to."""

    def __init__(self) -> None:
        self.busy = 0.0
        self._began = 0.0

    def __call__(self, name: str, log_level: int = 0) -> Any:
        del log_level
        return self if name in ("forward-compute", "backward-compute") else _Nothing()

    def start(self, barrier: bool = False) -> None:
        del barrier
        self._began = time.perf_counter()

    def stop(self, barrier: bool = False) -> None:
        del barrier
        self.busy += time.perf_counter() - self._began


class _Nothing:
    def start(self, barrier: bool = False) -> None:
        del barrier

    def stop(self, barrier: bool = False) -> None:
        del barrier


def save_model(directory: Path) -> None:
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)


def random_row(adapter_id: str, length: int, seed: int) -> Row:
    draw = np.random.default_rng(seed)
    inputs: dict[str, Any] = {
        "target_tokens": draw.integers(0, VOCAB_SIZE, length),
        "weights": np.ones(length, np.float32),
    }
    return Row(adapter_id, draw.integers(0, VOCAB_SIZE, length), "cross_entropy", inputs)


if __name__ == "__main__":
    main()
