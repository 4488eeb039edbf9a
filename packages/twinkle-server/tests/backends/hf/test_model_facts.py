"""What is reckoned of a model before anything has run on it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from twinkle.server.backends.hf.base_model import load_base_model
from twinkle.server.backends.hf.model_facts import (
    affordable_tokens,
    bounded_batch_tokens,
    head_bytes,
    overhead_tokens,
)
from twinkle.server.backends.protocol import ModelConfig


def test_overhead_is_time_of_layers_in_tokens():
    # 2 layers x 6 ms x 5e10 operations a second, of which a token takes 6 a weight
    assert overhead_tokens(2, 1_000_000, torch.device("cpu")) == 100
    assert overhead_tokens(4, 1_000_000, torch.device("cpu")) == 200
    assert overhead_tokens(30, 10**11, torch.device("cpu")) == 1
    assert overhead_tokens(2, 1_000_000, torch.device("cuda")) == 150_000


@pytest.mark.parametrize("is_tied", [False, True])
def test_the_head_is_a_product_for_every_token_and_the_embedding_is_none(is_tied: bool, tmp_path: Path):
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=is_tied,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    attention = 2 * (16 * 16) + 2 * (16 * 8) + 2 * 8  # q and o, k and v, norms of q and k
    layer = attention + 3 * 16 * 32 + 2 * 16
    weights = 2 * layer + 16 + 64 * 16
    info = load_base_model(ModelConfig(tmp_path)).info
    assert info.overhead_tokens == overhead_tokens(2, weights, torch.device("cpu"))


def test_a_pass_has_room_for_its_head_and_then_for_tokens() -> None:
    cpu, head = torch.device("cpu"), 16 * 2**24  # float32 three times, and 16 bits twice
    assert head_bytes(1000, cpu) == head
    assert affordable_tokens(10.0, head + 5000, head) == 500
    assert affordable_tokens(10.0, head // 2, head) == 0
    assert [bounded_batch_tokens(tokens, cpu) for tokens in (0, 1000, 10**6)] == [512, 1000, 2048]
