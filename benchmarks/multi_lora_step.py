"""One training step of many adapters at once, against the same work done in other ways, in one process.

    python benchmarks/multi_lora_step.py [--adapters 8] [--rank 16] [--rows 1] [--tokens 64] [--rounds 15]
        [--architecture qwen3.5] [--size wide]

The model is a small random Qwen3 made on the fly (or a Qwen3.5: `step_models.py`), on the CPU with one thread: what is
compared is the way of computing, not the machine. All ways do the same: forward, backward, one AdamW step for each
adapter. Rounds are interleaved and each ratio is the median over rounds, so that other load on the machine weighs on
all alike. Prints JSON:

    fused_ms                  all adapters in one pass (the Transformers backend)
    one_after_the_other       time of one pass for each adapter / fused
    peft_mixed_batch          time of PEFT's mixed batch (evaluation mode, `adapter_names`) / fused
    one_adapter_same_tokens   time of a single adapter with all the rows / fused (1 is: company costs nothing)
    state_bytes_per_adapter   what an idle adapter takes: weights, two moments
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from step_models import ARCHITECTURES, LORA_LAYERS, SIZES, VOCAB_SIZE, save_model
from transformers import AutoModelForCausalLM

from twinkle.protocol.types import AdamParams
from twinkle.server.backends.protocol import AdamStep, AdapterSpec, ModelConfig, Row
from twinkle.server.backends.transformers import TransformersBackend

STEP = AdamParams(learning_rate=1e-4)


def main() -> None:
    parser = argparse.ArgumentParser(description="Fused multi-LoRA training steps, in process.")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rows", type=int, default=1, help="rows of each adapter")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each row")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="qwen3")
    parser.add_argument("--size", choices=SIZES, default="small")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(measure(**vars(arguments)), indent=2))


def measure(
    adapters: int, rank: int, rows: int, tokens: int, rounds: int, architecture: str, size: str
) -> dict[str, Any]:
    """The figures that the module's docstring names, with the settings they are of."""
    settings: dict[str, Any] = {
        "adapters": adapters,
        "rank": rank,
        "rows": rows,
        "tokens": tokens,
        "rounds": rounds,
    }
    settings |= {"architecture": architecture, "size": size}
    with tempfile.TemporaryDirectory() as directory:
        save_model(Path(directory), architecture, size)
        backend = TransformersBackend(ModelConfig(Path(directory)))
        peft = make_peft(Path(directory), adapters, rank)
    names = [f"adapter-{i}" for i in range(adapters)]
    for i, name in enumerate(names):
        backend.add_adapter(name, AdapterSpec(rank=rank, seed=i))
    batches = {
        name: [random_row(name, tokens, seed=10 * i + k) for k in range(rows)] for i, name in enumerate(names)
    }
    everything = [row for batch in batches.values() for row in batch]
    single = [replace(row, adapter_id=names[0]) for row in everything]
    peft_step = make_peft_step(peft, names, everything)

    def fused() -> None:
        backend.forward_backward([everything])
        backend.optim_step([AdamStep(name, STEP) for name in names])

    def one_after_the_other() -> None:
        for name in names:
            backend.forward_backward([batches[name]])
            backend.optim_step([AdamStep(name, STEP)])

    def one_adapter_same_tokens() -> None:
        backend.forward_backward([single])
        backend.optim_step([AdamStep(names[0], STEP)])

    ways = {
        "fused": fused,
        "one_after_the_other": one_after_the_other,
        "peft_mixed_batch": peft_step,
        "one_adapter_same_tokens": one_adapter_same_tokens,
    }
    seconds = interleaved(ways, rounds)
    ratios = {
        name: round(statistics.median(t / f for t, f in zip(times, seconds["fused"], strict=True)), 2)
        for name, times in seconds.items()
        if name != "fused"
    }
    state = backend.export_adapter(names[0], with_optimizer=False)
    return {
        "settings": settings,
        "fused_ms": round(1000 * statistics.median(seconds["fused"]), 1),
        **ratios,
        "state_bytes_per_adapter": 3 * sum(matrix.nbytes for matrix in state.weights.values()),
    }


def interleaved(ways: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round, after two rounds that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(rounds + 2):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if i >= 2:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def random_row(adapter: str, tokens: int, seed: int) -> Row:
    draw = np.random.default_rng(seed)
    inputs = {"target_tokens": draw.integers(0, VOCAB_SIZE, tokens), "weights": np.ones(tokens, np.float32)}
    return Row(adapter, draw.integers(0, VOCAB_SIZE, tokens), "cross_entropy", inputs)


def make_peft(directory: Path, adapters: int, rank: int) -> Any:
    """A PEFT model with as many adapters, in evaluation mode, where it takes mixed batches; all of them trainable."""
    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    config = LoraConfig(r=rank, lora_alpha=32, target_modules=LORA_LAYERS)
    model = get_peft_model(base, config, adapter_name="adapter-0")
    for i in range(1, adapters):
        model.add_adapter(f"adapter-{i}", config)
    model.eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


def make_peft_step(model: Any, names: list[str], rows: list[Row]) -> Callable[[], None]:
    tokens = torch.from_numpy(np.stack([row.tokens for row in rows]))
    targets = torch.from_numpy(np.stack([row.loss_inputs["target_tokens"] for row in rows]))
    weights = torch.from_numpy(np.stack([row.loss_inputs["weights"] for row in rows]))
    row_adapters = [row.adapter_id for row in rows]
    optimizers = [
        torch.optim.AdamW(
            [p for parameter_name, p in model.named_parameters() if f".{name}." in parameter_name],
            lr=STEP.learning_rate,
            betas=(STEP.beta1, STEP.beta2),
            eps=STEP.eps,
            weight_decay=STEP.weight_decay,
        )
        for name in names
    ]

    def step() -> None:
        logits = model(input_ids=tokens, use_cache=False, adapter_names=row_adapters).logits
        logprobs = torch.log_softmax(logits, -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        (-(weights * logprobs).sum()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
