"""How many threads a computation gets."""

from pathlib import Path

import pytest
import torch

from twinkle.server.backends.hf.base_model import load_base_model
from twinkle.server.backends.hf.threads import Threads, matrix_weights
from twinkle.server.backends.protocol import ModelConfig


@pytest.fixture(params=["tiny_model_dir", "tiny_tied_model_dir"])
def model_dir(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture
def three_threads(model_dir: Path):  # the model is made with one thread
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_a_second_thread_comes_with_enough_multiplications(model_dir: Path):
    model = load_base_model(ModelConfig(model_dir)).model
    # All matrices but the embedding's, into which nothing is multiplied; a tied head is one all the same.
    linears = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert matrix_weights(model) == linears + vectors
    threads = Threads(model)
    enough = -(-64_000_000 // matrix_weights(model))
    for tokens, count in ((1, 1), (2 * enough - 2, 1), (2 * enough, 2), (3 * enough, 3), (9 * enough, 3)):
        assert threads.worth(tokens) == count
        threads.fit(tokens)
        assert torch.get_num_threads() == count
    threads.fit(9 * enough, shared_by=2)
    assert torch.get_num_threads() == 1
    threads.restore()
    assert torch.get_num_threads() == 3
