"""The sampling engine against a padded `generate`, in one process, as JSON: ratios of tokens a second.

32 requests are in flight at a time, with prompts of 8 to 39 tokens and draws at temperature 1. `generate` has one
padded batch of 32 rows of the base model alone; the engine has the base model, one adapter, or eight adapters mixed. In
each round all of them take their turn, and a figure is the median of the rounds' ratios, so that what else a machine
does falls on all alike.

With another architecture, an engine with a Qwen3 of equal size takes its turns too, and `over_qwen3` says how many of
its tokens a second with eight adapters mixed the other one reaches.

    python benchmarks/sampling_engine.py [--threads 1] [--rounds 7] [--tokens 64] [--model small]
                                         [--architecture qwen3_5]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
)

from twinkle.protocol.types import SamplingParams
from twinkle.server.backends.protocol import AdapterSpec, ModelConfig
from twinkle.server.backends.transformers import TransformersBackend
from twinkle.server.samplers.protocol import GenerateRequest
from twinkle.server.samplers.transformers import TransformersEngine

IN_FLIGHT = 32
ADAPTERS = [f"adapter-{i}" for i in range(8)]
VOCAB = 2048
PAD = 0

SIZES: dict[str, dict[str, int]] = {
    "tiny": {
        "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    },
    "small": {
        "num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 384,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    },
}  # fmt: skip


def _qwen3_5(size: dict[str, int], **more: Any) -> dict[str, Any]:
    """One layer in four has full attention, as published; of two layers one."""
    layers, dim = size["num_hidden_layers"], size["head_dim"]
    kinds = ["full_attention" if i % 4 == 3 or i == layers - 1 else "linear_attention" for i in range(layers)]
    return {
        "layer_types": kinds,
        "linear_num_key_heads": size["num_key_value_heads"],
        "linear_num_value_heads": size["num_attention_heads"],
        "linear_key_head_dim": dim,
        "linear_value_head_dim": dim,
        **more,
    }


def _experts(size: dict[str, int]) -> dict[str, int]:
    width = size["intermediate_size"] // 4
    return {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": width,
    }


# By name: the configuration's class, and what it takes besides the sizes.
ARCHITECTURES: dict[str, tuple[type[PreTrainedConfig], Callable[[dict[str, int]], dict[str, Any]]]] = {
    "qwen3": (Qwen3Config, lambda _: {}),
    "qwen3_5": (Qwen3_5TextConfig, _qwen3_5),
    "qwen3_5_moe": (Qwen3_5MoeTextConfig, lambda size: _qwen3_5(size, **_experts(size))),
    "gemma3": (Gemma3TextConfig, lambda _: {"sliding_window": 32}),
    "mistral": (MistralConfig, lambda _: {"sliding_window": 32}),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=64, help="that each request generates")
    parser.add_argument("--model", choices=sorted(SIZES), help="both if left out")
    parser.add_argument("--architecture", choices=sorted(ARCHITECTURES), default="qwen3")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    figures: dict[str, Any] = {}
    for name in [args.model] if args.model else sorted(SIZES):
        with tempfile.TemporaryDirectory() as directory:
            paths = [random_model(Path(directory) / "measured", name, args.architecture)]
            if args.architecture != "qwen3":
                paths.append(random_model(Path(directory) / "qwen3", name, "qwen3"))
            figures[name] = measure(paths, args.rounds, args.tokens)
    machine = platform.processor() or platform.machine()
    print(
        json.dumps(
            {"architecture": args.architecture, **figures, "threads": args.threads, "machine": machine},
            indent=2,
        )
    )


def random_model(directory: Path, size: str, architecture: str) -> Path:
    """A random model: a Qwen3 has 0.2 ("tiny") or 1.3 ("small") million parameters."""
    torch.manual_seed(0)
    kind, more = cast("Any", ARCHITECTURES[architecture])
    config = kind(
        vocab_size=VOCAB,
        max_position_embeddings=1024,
        eos_token_id=None,
        pad_token_id=PAD,
        **SIZES[size],
        **more(SIZES[size]),
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def measure(paths: list[Path], rounds: int, tokens: int) -> dict[str, float]:
    """
    Args:
        paths: of the model, and of one to compare it with, if any.
    """
    engines = [make_engine(path) for path in paths]
    engine = engines[0]
    model: Any = AutoModelForCausalLM.from_pretrained(paths[0], dtype=torch.float32).eval()
    draw = np.random.default_rng(0)

    def seconds_of_round() -> dict[str, float]:
        """Each with prompts that nobody has seen: the engine doesn't read a known beginning twice."""

        def prompts() -> list[np.ndarray]:
            return [draw.integers(1, VOCAB, 8 + i % 32) for i in range(IN_FLIGHT)]

        return {
            "generate": timed(lambda: run_generate(model, *pad(prompts()), tokens)),
            "base": timed(lambda: run_engine(engine, prompts(), tokens, [None])),
            "one": timed(lambda: run_engine(engine, prompts(), tokens, ADAPTERS[:1])),
            "mixed": timed(lambda: run_engine(engine, prompts(), tokens, ADAPTERS)),
            "other": timed(lambda: run_engine(engines[-1], prompts(), tokens, ADAPTERS)),
        }

    seconds_of_round()  # warm up
    seconds = [seconds_of_round() for _ in range(rounds)]
    for one in engines:
        one.close()

    def ratio(faster: str, slower: str) -> float:
        """Tokens a second of the first over those of the second."""
        return round(statistics.median(row[slower] / row[faster] for row in seconds), 3)

    figures = {
        "mixed_over_generate": ratio("mixed", "generate"),
        "one_adapter_over_mixed": ratio("one", "mixed"),
        "base_over_generate": ratio("base", "generate"),
        "mixed_tokens_per_second": round(
            IN_FLIGHT * tokens / statistics.median(row["mixed"] for row in seconds)
        ),
    }
    return figures | ({"over_qwen3": ratio("mixed", "other")} if len(engines) > 1 else {})


def make_engine(path: Path) -> TransformersEngine:
    """One with all adapters, whose terms are not zero."""
    config = ModelConfig(path)
    backend = TransformersBackend(config)
    engine = TransformersEngine(backend.loaded, config, max_rows=IN_FLIGHT)
    for i, name in enumerate(ADAPTERS):
        backend.add_adapter(name, AdapterSpec(rank=8, seed=i))
        state = backend.export_adapter(name, with_optimizer=False)
        draw = np.random.default_rng(i)
        for key, matrix in state.weights.items():
            if "lora_B" in key:
                matrix[:] = draw.normal(size=matrix.shape) * 0.02
        engine.add_adapter(name, state)
    return engine


def pad(prompts: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and mask [prompts, longest], padded at the left, as `generate` wants them."""
    longest = max(len(prompt) for prompt in prompts)
    tokens = torch.full((len(prompts), longest), PAD)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[longest - len(prompt) :] = torch.from_numpy(prompt)
    return tokens, (tokens != PAD).long()


def run_engine(
    engine: TransformersEngine, prompts: list[np.ndarray], tokens: int, adapters: list[Any]
) -> None:
    params = SamplingParams(max_tokens=tokens, temperature=1.0, stop=[])
    futures = [
        engine.generate(GenerateRequest("t", adapters[i % len(adapters)], prompt, params))
        for i, prompt in enumerate(prompts)
    ]
    assert all(len(future.result().sequences[0].tokens) == tokens for future in futures)


def run_generate(model: Any, padded: torch.Tensor, mask: torch.Tensor, tokens: int) -> None:
    model.generate(
        padded, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=True, top_k=0
    )


def timed(run: Callable[[], None]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
