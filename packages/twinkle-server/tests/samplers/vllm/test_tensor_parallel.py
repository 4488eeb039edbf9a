"""Two processes that share each layer give what one model gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from sampling_contract import ask, greedy, plain_logprobs, prompts
from vllm_engines import require_vllm

from twinkle.server.backends.protocol import ModelConfig

require_vllm()


def test_adapters_sampled_by_two_ranks_are_peft_s(model_dir: Path, states, references):
    from twinkle.server.samplers.vllm import VllmEngine

    config = ModelConfig(model_dir, max_lora_rank=16, max_sampler_adapters=4, tensor_parallel_size=2)
    engine = VllmEngine.create(config, None)
    try:
        for name, state in states.items():
            engine.add_adapter(name, state)
        cases = [(prompt, [None, *states][i % 4]) for i, prompt in enumerate(prompts(8, seed=11))]
        pending = [
            ask(engine, p, a, temperature=0, max_tokens=10, stop=[], prompt_logprobs=True) for p, a in cases
        ]
        for (prompt, adapter), future in zip(cases, pending, strict=True):
            response = future.result(120)
            assert response.sequences[0].tokens == greedy(references[adapter], prompt, 10)
            plain = plain_logprobs(references[adapter], prompt)
            own = [plain[i, token].item() for i, token in enumerate(prompt[1:])]
            np.testing.assert_allclose(np.array(response.prompt_logprobs[1:], float), own, atol=1e-4)
    finally:
        engine.close()
