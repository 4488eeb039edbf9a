"""What a pass keeps for its backward pass, and the same numbers where it keeps less."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_moe
import torch
from torch.nn import functional

from twinkle.server.backends.protocol import AdapterSpec, ModelConfig, Row
from twinkle.server.backends.transformers import TransformersBackend, activations
from twinkle.server.backends.transformers.activations import SavedBytes, token_bytes
from twinkle.server.backends.transformers.passes import PassLimits

SPECS = {
    "ada": AdapterSpec(rank=4, seed=1),
    "bob": AdapterSpec(rank=4, seed=2),
    "cyd": AdapterSpec(rank=2, seed=3, train_attn=False),
}


@pytest.mark.parametrize(("layers", "factor"), [(1, 2), (4, 1.25)])
def test_a_tokens_bytes_are_what_autograd_keeps_and_a_layers_share_more(layers: int, factor: float) -> None:
    weight = torch.randn(5, 7, requires_grad=True)

    def run(tokens: torch.Tensor) -> torch.Tensor:
        return functional.embedding(tokens, weight).exp()

    # An embedding keeps its index, 8 bytes a token, and exp its result, 7 numbers of 4 bytes.
    assert token_bytes(run, layers, torch.device("cpu")) == (8 + 4 * 7) * factor


def test_what_is_kept_twice_counts_once() -> None:
    saved = SavedBytes()
    x = torch.randn(10, requires_grad=True).exp()
    with saved.hooks:
        y = x.sin() + x.cos() + x.view(2, 5).tan().view(10)
    assert saved.total == 2 * 10 * 4  # x once, and tan its result
    assert y.requires_grad


@pytest.fixture(params=["plain", "experts"])
def model_dir(request: pytest.FixtureRequest, tmp_path: Path, tiny_model_dir: Path) -> Path:
    return tiny_model_dir if request.param == "plain" else tiny_moe.save(tmp_path)


def run_all(backend: TransformersBackend, micro_batches: list[list[Row]]) -> tuple[list[Any], SavedBytes]:
    saved = SavedBytes()
    with saved.hooks:
        results = backend.forward_backward(micro_batches)
    return [result for rows in results for result in rows], saved


def test_recomputed_activations_give_the_same_numbers_from_less_memory(
    model_dir: Path, random_row: Any, add_trained: Any
) -> None:
    plain, recomputing = (TransformersBackend(ModelConfig(model_dir)) for _ in range(2))
    recomputing._limits = PassLimits(affordable_tokens=0, overhead_tokens=1)
    for backend in (plain, recomputing):
        add_trained(backend, SPECS)
    rows = [
        random_row(who, 40 + 5 * i, seed=i, vocab_size=100)
        for i, who in enumerate(("ada", "bob", "bob", "cyd"))
    ]
    expected, all_bytes = run_all(plain, [rows])
    found, fewer_bytes = run_all(recomputing, [rows])
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=1e-6, atol=1e-6)
    for who in SPECS:
        gradients, wanted = (
            backend.export_adapter(who, with_optimizer=False, with_gradients=True).gradients
            for backend in (recomputing, plain)
        )
        assert gradients is not None and wanted is not None
        for name, gradient in wanted.items():
            np.testing.assert_allclose(gradients[name], gradient, rtol=1e-5, atol=1e-6)
            assert gradient.any()
    assert fewer_bytes.total < all_bytes.total / 2


def test_a_micro_batch_over_the_budget_is_cut_and_a_row_over_it_recomputed(
    tiny_model_dir: Path, random_row: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = TransformersBackend(ModelConfig(tiny_model_dir))
    backend.add_adapter("ada", SPECS["ada"])
    backend._limits = PassLimits(affordable_tokens=20, overhead_tokens=1)
    lengths: list[int] = []
    original = activations.checkpoint

    def noting(forward: Any, hidden: torch.Tensor, **kwargs: Any) -> Any:
        lengths.append(hidden.shape[1])
        return original(forward, hidden, **kwargs)

    monkeypatch.setattr(activations, "checkpoint", noting)
    forward_only = random_row("ada", 30, 9)
    forward_only = Row("ada", forward_only.tokens, "cross_entropy", forward_only.loss_inputs, {}, True)
    backend.forward_backward(
        [
            [random_row("ada", 21, 0)],
            [random_row("ada", 10, 1), random_row("ada", 4, 2)],
            [forward_only],
            [random_row("ada", 12, 3), random_row("ada", 10, 4)],
        ]
    )
    assert lengths == [21, 21]  # two layers
