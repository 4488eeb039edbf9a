"""How many threads a computation gets."""

from pathlib import Path

import pytest
import torch

from twinkle.server.backends.protocol import ModelConfig
from twinkle.server.backends.transformers.base_model import load_base_model
from twinkle.server.backends.transformers.threads import Threads, matrix_weights


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("model_dir", ["tiny_model_dir", "tiny_tied_model_dir"])
def test_a_second_thread_comes_with_enough_multiplications(
    model_dir: str, request: pytest.FixtureRequest, three_threads
):
    path: Path = request.getfixturevalue(model_dir)
    model = load_base_model(ModelConfig(path)).model
    # All matrices but the embedding's, into which nothing is multiplied; a tied head is one all the same.
    linears = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert matrix_weights(model) == linears + vectors
    threads = Threads(model)
    enough = -(-64_000_000 // matrix_weights(model))
    threads.fit(enough - 1)
    assert torch.get_num_threads() == 1
    threads.fit(enough)
    assert torch.get_num_threads() == 3
    threads.fit(1)
    threads.restore()
    assert torch.get_num_threads() == 3
