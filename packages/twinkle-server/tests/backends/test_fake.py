from pathlib import Path

import numpy as np
import pytest

from twinkle.protocol.errors import InvalidRequest
from twinkle.server.backends.fake import VOCAB_SIZE, FakeBackend
from twinkle.server.backends.protocol import AdapterSpec, ModelConfig, Row


def test_the_probabilities_of_all_tokens_sum_to_one() -> None:
    backend = FakeBackend(ModelConfig(Path("fake")))
    backend.add_adapter("a", AdapterSpec(rank=2))
    targets = np.arange(64)
    inputs = {"target_tokens": targets, "weights": np.ones(64, np.float32)}
    [[result]] = backend.forward_backward([[Row("a", np.full(64, 5), "cross_entropy", inputs)]])
    assert np.exp(result.logprobs.astype(np.float64)).sum() * VOCAB_SIZE / 64 == pytest.approx(1, rel=1e-6)


def test_the_configuration_is_kept() -> None:
    info = FakeBackend(ModelConfig(Path("fake"), max_lora_rank=4, max_context_length=17)).info
    assert (info.max_lora_rank, info.max_context_length) == (4, 17)


def test_tokens_outside_of_the_vocabulary_are_refused() -> None:
    backend = FakeBackend(ModelConfig(Path("fake")))
    backend.add_adapter("a", AdapterSpec(rank=2))
    inputs = {"target_tokens": np.array([-1]), "weights": np.ones(1, np.float32)}
    with pytest.raises(InvalidRequest, match="between 0 and"):
        backend.forward_backward([[Row("a", np.array([1]), "cross_entropy", inputs)]])
