from importlib.metadata import entry_points
from pathlib import Path

import pytest

from twinkle.protocol.errors import InvalidRequest
from twinkle.server.backends.protocol import ModelConfig
from twinkle_megatron import MegatronBackend


def test_the_server_finds_the_backend_by_its_entry_point() -> None:
    (found,) = entry_points(group="twinkle.training_backends", name="megatron")
    assert found.load() is MegatronBackend


def test_it_refuses_to_load_a_model_and_says_what_to_use_instead() -> None:
    with pytest.raises(InvalidRequest, match="use_megatron: false") as refusal:
        MegatronBackend(ModelConfig(path=Path("/models/Qwen/Qwen3.5-72B"), tensor_parallel_size=4))
    assert refusal.value.message.startswith("model.use_megatron: ")
    assert "/models/Qwen/Qwen3.5-72B" in refusal.value.message
