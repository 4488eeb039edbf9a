"""The real SmolLM2 in both engines: the same greedy tokens, and log-probabilities to a thousandth."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sampling_contract import ask
from vllm_engines import require_vllm

from twinkle.server.backends.protocol import AdapterSpec, ModelConfig
from twinkle.server.backends.transformers import TransformersBackend
from twinkle.server.samplers.transformers import TransformersEngine

require_vllm()
pytestmark = [pytest.mark.slow, pytest.mark.network]

FETCH = Path(__file__).parents[5] / "cookbook" / "fetch_smollm2.py"
QUESTIONS = [
    "What is the capital of France?",
    "Count from one to ten.",
    "Who are you?",
    "Write a line about rain.",
]


@pytest.mark.timeout(1200)
def test_greedy_tokens_are_equal_and_logprobs_within_a_thousandth():
    from transformers import AutoTokenizer

    from twinkle.server.samplers.vllm import VllmEngine

    fetched = subprocess.run([sys.executable, str(FETCH)], stdout=subprocess.PIPE, text=True, check=True)
    config = ModelConfig(Path(fetched.stdout.strip()), max_lora_rank=8, max_sampler_adapters=4)
    tokenizer: Any = AutoTokenizer.from_pretrained(config.path)
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in QUESTIONS
    ]
    backend = TransformersBackend(config)
    backend.add_adapter("a", AdapterSpec(rank=8, seed=1))
    state = backend.export_adapter("a", with_optimizer=False)
    draw = np.random.default_rng(0)
    for name, matrix in state.weights.items():
        if "lora_B" in name:
            matrix[:] = draw.normal(size=matrix.shape) * 2e-3
    engines: list[Any] = [TransformersEngine.create(config, backend), VllmEngine.create(config, None)]
    try:
        for engine in engines:
            engine.add_adapter("a", state)
        cases = [(chat, adapter) for chat in chats for adapter in (None, "a")]
        theirs, ours = (
            [
                future.result(600)
                for future in [
                    ask(engine, chat, adapter, temperature=0, max_tokens=32, prompt_logprobs=True)
                    for chat, adapter in cases
                ]
            ]
            for engine in engines
        )
    finally:
        for engine in engines:
            engine.close()
    for one, other in zip(theirs, ours, strict=True):
        assert one.sequences[0].tokens == other.sequences[0].tokens
        np.testing.assert_allclose(one.sequences[0].logprobs, other.sequences[0].logprobs, atol=1e-3)
        mine, their = (np.array(response.prompt_logprobs[1:], float) for response in (one, other))
        np.testing.assert_allclose(mine, their, atol=1e-3)
    assert "Paris" in tokenizer.decode(ours[0].sequences[0].tokens)
    assert ours[0].sequences[0].tokens != ours[1].sequences[0].tokens or (
        ours[0].sequences[0].logprobs != ours[1].sequences[0].logprobs
    )
