"""A training step of many tenants through the backend, against the bare loop of a single tenant, in one process.

    python benchmarks/bare_loop.py [--threads 1 2] [--rounds 15] [--cases NAME ...]
        [--architecture qwen3.5] [--size wide]

The bare loop is Transformers and PEFT with one adapter: forward, cross entropy as a sum, backward, `torch.optim.AdamW`.
It gets all tenants' rows as one batch without padding, which is the least that this work can cost there. The backend
gets the rows of all adapters, packed under its own token budget, and a step for each adapter. LoRA is on all linear
layers and on the head, in both. Rounds are interleaved and each ratio is the median over rounds, so that other load on
the machine weighs on all alike. Prints JSON, by threads and case:

    fused_ms       all adapters' rows and steps, by the backend
    bare_loop      time of the bare loop with the same tokens / fused (above 1: the backend is faster)
    one_adapter    time of the backend with all the rows on one adapter / fused (1: company costs nothing)
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from multi_lora_step import STEP, interleaved, make_peft, random_row
from step_models import ARCHITECTURES, SIZES, VOCAB_SIZE, save_model

from twinkle.server.backends.protocol import AdamStep, AdapterSpec, ModelConfig, Row
from twinkle.server.backends.transformers import TransformersBackend


@dataclass(frozen=True)
class Case:
    """Adapters by their ranks, and what each of them trains on."""

    ranks: tuple[int, ...]
    rows: int
    tokens: int


CASES = {
    "8 x (4 x 128)": Case((8,) * 8, 4, 128),
    "8 x (1 x 128)": Case((8,) * 8, 1, 128),
    "8 x (1 x 32)": Case((8,) * 8, 1, 32),
    "1 x (1 x 1)": Case((8,), 1, 1),
    "64 x (4 x 128)": Case((8,) * 64, 4, 128),
    "8 of mixed ranks x (4 x 128)": Case((2, 4, 8, 8, 8, 16, 16, 32), 4, 128),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="The backend against a bare PEFT loop, in process.")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="qwen3")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        save_model(Path(directory), arguments.architecture, arguments.size)
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            for name in arguments.cases:
                found = measure(Path(directory), CASES[name], arguments.rounds)
                print(json.dumps({"threads": threads, "case": name, **found}), flush=True)


def measure(directory: Path, case: Case, rounds: int) -> dict[str, float]:
    backend = TransformersBackend(ModelConfig(directory))
    names = [f"adapter-{i}" for i in range(len(case.ranks))]
    for i, (name, rank) in enumerate(zip(names, case.ranks, strict=True)):
        backend.add_adapter(name, AdapterSpec(rank=rank, seed=i))
    alone = "alone"
    backend.add_adapter(alone, AdapterSpec(rank=8))
    rows = {
        name: [random_row(name, case.tokens, seed=1000 * i + k) for k in range(case.rows)]
        for i, name in enumerate(names)
    }
    together = [row for name in names for row in rows[name]]
    of_one = [random_row(alone, case.tokens, seed=i) for i in range(len(together))]
    ways = {
        "fused": backend_step(backend, together, names),
        "bare_loop": bare_step(make_peft(directory, 1, 8), len(together), case.tokens),
        "one_adapter": backend_step(backend, of_one, [alone]),
    }
    seconds = interleaved(ways, rounds)
    backend.close()
    ratios = {
        name: round(statistics.median(t / f for t, f in zip(times, seconds["fused"], strict=True)), 2)
        for name, times in seconds.items()
        if name != "fused"
    }
    return {"fused_ms": round(1000 * statistics.median(seconds["fused"]), 2), **ratios}


def backend_step(backend: TransformersBackend, rows: list[Row], names: list[str]) -> Callable[[], None]:
    a_batch = max(1, backend.info.max_batch_tokens // len(rows[0].tokens))
    micro_batches = [rows[i : i + a_batch] for i in range(0, len(rows), a_batch)]
    steps = [AdamStep(name, STEP) for name in names]

    def step() -> None:
        backend.forward_backward(micro_batches)
        backend.optim_step(steps)

    return step


def bare_step(model: Any, rows: int, tokens: int) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=STEP.learning_rate,
        betas=(STEP.beta1, STEP.beta2),
        eps=STEP.eps,
        weight_decay=STEP.weight_decay,
    )
    inputs, targets = torch.randint(VOCAB_SIZE, (2, rows, tokens)).unbind(0)

    def step() -> None:
        logits = model(input_ids=inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return step


if __name__ == "__main__":
    main()
