"""What a server does before it says that it is ready, on a real backend."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from twinkle.server.backends.protocol import ModelConfig
from twinkle.server.engine.warm_up import warm_up
from twinkle.server.engine.worker import build_worker


async def test_a_model_whose_padding_has_an_embedding_of_zeros_can_be_served(tmp_path: Path):
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=24,
        initializer_range=0.5,
        num_attention_heads=2,
        num_key_value_heads=1,
        rms_norm_eps=1e-5,
        pad_token_id=0,  # transformers initialises its embedding with zeros
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    padding = torch.zeros(1, 2, dtype=torch.long)
    model(input_ids=padding, labels=padding).loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert not all(bool(torch.isfinite(gradient).all()) for gradient in gradients), (
        "so it can't be warmed up by"
    )
    worker = build_worker(ModelConfig(tmp_path), "transformers", "transformers")
    try:
        assert 0 < await warm_up(worker) < 60
    finally:
        await worker.close()
