"""The sampling engine against a padded `generate`, in one process and one run, as JSON.

32 requests are in flight at a time. The engine mixes four adapters and the base model and takes prompts of different
lengths as they come; `generate` has one padded batch of the base model alone.

    python benchmarks/sampling_engine.py [--threads 1] [--requests 64] [--tokens 64]
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from twinkle.protocol.types import SamplingParams
from twinkle.server.backends.protocol import AdapterSpec, ModelConfig
from twinkle.server.backends.transformers import TransformersBackend
from twinkle.server.samplers.protocol import GenerateRequest
from twinkle.server.samplers.transformers import TransformersEngine

IN_FLIGHT = 32
VOCAB = 2048


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as directory:
        figures = measure(small_model(Path(directory)), args.requests, args.tokens)
    print(
        json.dumps(
            {**figures, "threads": args.threads, "machine": platform.processor() or platform.machine()},
            indent=2,
        )
    )


def small_model(directory: Path) -> Path:
    """A random Qwen3 of 1.3 million parameters."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        eos_token_id=None,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def measure(path: Path, requests: int, tokens: int) -> dict[str, float]:
    config = ModelConfig(path)
    backend = TransformersBackend(config)
    engine = TransformersEngine(backend.loaded, config, max_rows=IN_FLIGHT)
    for i in range(4):
        backend.add_adapter(f"adapter-{i}", AdapterSpec(rank=8, seed=i))
        engine.add_adapter(f"adapter-{i}", backend.export_adapter(f"adapter-{i}", with_optimizer=False))
    prompts = [np.random.default_rng(i).integers(0, VOCAB, 8 + i % 40) for i in range(requests)]
    run_engine(engine, prompts[:8], 8, [None])  # warm up
    mixed = run_engine(engine, prompts, tokens, ["adapter-0", "adapter-1", "adapter-2", "adapter-3", None])
    base = run_engine(engine, prompts, tokens, [None])
    engine.close()
    padded = run_generate(path, requests, tokens)
    return {
        "engine_mixed_adapters_tokens_per_second": round(mixed, 1),
        "engine_base_tokens_per_second": round(base, 1),
        "padded_generate_base_tokens_per_second": round(padded, 1),
        "mixed_over_generate": round(mixed / padded, 3),
        "base_over_generate": round(base / padded, 3),
    }


def run_engine(
    engine: TransformersEngine, prompts: list[np.ndarray], tokens: int, adapters: list[str | None]
) -> float:
    params = SamplingParams(max_tokens=tokens, temperature=1.0, stop=[])
    began = time.perf_counter()
    futures = [
        engine.generate(GenerateRequest("t", adapters[i % len(adapters)], prompt, params))
        for i, prompt in enumerate(prompts)
    ]
    generated = sum(len(future.result().sequences[0].tokens) for future in futures)
    return generated / (time.perf_counter() - began)


def run_generate(path: Path, requests: int, tokens: int) -> float:
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    batch = torch.randint(0, VOCAB, (IN_FLIGHT, 28))
    began = time.perf_counter()
    for _ in range(requests // IN_FLIGHT):
        model.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=True,
        )
    return requests // IN_FLIGHT * IN_FLIGHT * tokens / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
