"""Many tenants at once on one base model: each one's numbers are those of PEFT on its data alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.types import AdamParams
from twinkle.server.backends.contract.parts import train
from twinkle.server.backends.hf.base_model import load_base_model
from twinkle.server.backends.protocol import AdamStep, AdapterSpec, ModelConfig, Row
from twinkle.server.backends.transformers import TransformersBackend

TENANTS = {
    "ada": AdapterSpec(rank=8, alpha=32.0, seed=1),
    "bob": AdapterSpec(rank=8, alpha=4.0, seed=2),
    "cyd": AdapterSpec(rank=3, alpha=16.0, seed=3, train_unembed=False),
    "dee": AdapterSpec(rank=3, alpha=16.0, seed=4, train_attn=False, train_mlp=False),
}


def relative_error(found: dict[str, Any], expected: dict[str, Any]) -> float:
    assert set(found) == set(expected)
    names = sorted(expected)
    one = np.concatenate([np.asarray(found[name], np.float64).ravel() for name in names])
    other = np.concatenate([np.asarray(expected[name], np.float64).ravel() for name in names])
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def peft_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    named = {name.replace(".default.", "."): p for name, p in model.named_parameters()}
    return {name: parameter for name, parameter in named.items() if "lora_" in name}


@pytest.mark.parametrize("model_fixture", ["tiny_model_dir", "tiny_tied_model_dir"])
def test_tenants_training_at_once_equal_peft_alone(
    model_fixture: str, request: pytest.FixtureRequest, make_peft: Any, peft_loss: Any, random_row: Any
) -> None:
    model_dir: Path = request.getfixturevalue(model_fixture)
    backend = TransformersBackend(ModelConfig(model_dir))
    counts = {"ada": 3, "bob": 1, "cyd": 2, "dee": 2}
    for who, spec in TENANTS.items():
        backend.add_adapter(who, spec)
    peft = {who: make_peft(model_dir, backend.export_adapter(who, with_optimizer=False)) for who in TENANTS}
    step = AdamParams(learning_rate=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.01)
    optimizers = {
        who: torch.optim.AdamW(
            peft_parameters(model).values(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01
        )
        for who, model in peft.items()
    }
    for i in range(5):
        rows = {
            who: [
                random_row(who, 4 + 3 * k, 100 * i + 10 * k + len(who) + counts[who])
                for k in range(counts[who])
            ]
            for who in TENANTS
        }
        mixed = [row for k in range(3) for who in rows for row in rows[who][k : k + 1]]
        backend.forward_backward([mixed[:5], mixed[5:]])
        for who, model in peft.items():
            optimizers[who].zero_grad()
            peft_loss(model, rows[who]).backward()
            expected = {name: parameter.grad for name, parameter in peft_parameters(model).items()}
            found = backend.export_adapter(who, with_optimizer=False, with_gradients=True).gradients
            assert found is not None
            assert relative_error(found, expected) < 1e-5, (i, who)
            optimizers[who].step()
        backend.optim_step([AdamStep(who, step) for who in TENANTS])
    for who, model in peft.items():
        expected = {name: parameter.detach() for name, parameter in peft_parameters(model).items()}
        assert relative_error(backend.export_adapter(who, with_optimizer=False).weights, expected) < 1e-4, who


def test_logprobs_equal_the_plain_model_for_a_new_adapter(tiny_model_dir: Path, random_row: Any) -> None:
    backend = TransformersBackend(ModelConfig(tiny_model_dir))
    backend.add_adapter("ada", TENANTS["ada"])
    row = random_row("ada", 40, 0)
    [[_, result]] = backend.forward_backward([[random_row("ada", 60, 1), row]])
    loaded = load_base_model(ModelConfig(tiny_model_dir))
    with torch.no_grad():
        logits = loaded.model(torch.from_numpy(row.tokens)[None].to(loaded.device)).logits[0].cpu()
    expected = torch.log_softmax(logits, -1)[
        torch.arange(40), torch.from_numpy(row.loss_inputs["target_tokens"])
    ]
    np.testing.assert_allclose(result.logprobs, expected, atol=2e-5)


def test_padding_changes_nothing(tiny_model_dir: Path, random_row: Any) -> None:
    backend = TransformersBackend(ModelConfig(tiny_model_dir))
    for who in ("ada", "bob"):
        backend.add_adapter(who, TENANTS["ada"])
        backend.forward_backward([[random_row(who, 9, 0)]])
        backend.optim_step([AdamStep(who, AdamParams(learning_rate=1e-2))])
    [[alone]] = backend.forward_backward([[random_row("ada", 5, 7)]])
    [[padded, _]] = backend.forward_backward([[random_row("bob", 5, 7), random_row("bob", 200, 8)]])
    np.testing.assert_allclose(padded.logprobs, alone.logprobs, rtol=1e-5, atol=1e-5)


def test_attention_is_causal_without_a_mask(
    tiny_model_dir: Path, random_row: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = TransformersBackend(ModelConfig(tiny_model_dir))
    backend.add_adapter("ada", TENANTS["ada"])
    attention = torch.nn.functional.scaled_dot_product_attention
    seen: list[tuple[Any, Any]] = []

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append((kwargs.get("attn_mask"), kwargs.get("is_causal")))
        return attention(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    backend.forward_backward([[random_row("ada", 7, 0), random_row("ada", 9, 1)]])
    assert seen == [(None, True), (None, True)]


def test_the_shared_base_model_stays_as_it_was_loaded(tiny_model_dir: Path, random_row: Any) -> None:
    loaded = load_base_model(ModelConfig(tiny_model_dir))
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    one = TransformersBackend(ModelConfig(tiny_model_dir), loaded)
    two = TransformersBackend(ModelConfig(tiny_model_dir, max_lora_rank=4), loaded)
    assert one.loaded is loaded and one.info.max_lora_rank == 128 and two.info.max_lora_rank == 4
    one.add_adapter("ada", TENANTS["ada"])
    for _ in range(2):
        one.forward_backward([[random_row("ada", 9, 0)]])
        one.optim_step([AdamStep("ada", AdamParams(learning_rate=1e-2))])
    after = loaded.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(parameter.grad is None for parameter in loaded.model.parameters())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_small_loss_has_the_gradient_of_a_large_one_in_small(
    tiny_model_dir: Path, random_row: Any, dtype: str
) -> None:
    """To the bit, but for what sums of float32 lose, if all weights are a power of two smaller."""
    backend = TransformersBackend(ModelConfig(tiny_model_dir, torch_dtype=dtype))
    backend.add_adapter("a", AdapterSpec(rank=4, seed=1))
    train(backend, "a")
    norms: list[float] = []
    for scale in (1.0, 2.0**-20, 2.0**-40):
        row = random_row("a", 12, 3)
        weights = (row.loss_inputs["weights"] * scale).astype(np.float32)
        backend.forward_backward([[replace(row, loss_inputs={**row.loss_inputs, "weights": weights})]])
        [metrics] = backend.optim_step([AdamStep("a", AdamParams(learning_rate=0.0))])
        assert isinstance(metrics, dict)
        norms.append(metrics["grad_norm:mean"] / scale)
    assert norms[0] > 0 and norms[1:] == pytest.approx([norms[0]] * 2, rel=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_half_precision_models_train_with_float32_adapters(
    dtype: str, tiny_model_dir: Path, random_row: Any
) -> None:
    exact = TransformersBackend(ModelConfig(tiny_model_dir))
    half = TransformersBackend(ModelConfig(tiny_model_dir, torch_dtype=dtype))
    losses: list[float] = []
    for backend in (exact, half):
        for who, spec in TENANTS.items():
            backend.add_adapter(who, spec)
        rows = [random_row(who, 6 + i, i) for i, who in enumerate(TENANTS)]
        backend.forward_backward([rows])
        backend.optim_step([AdamStep(who, AdamParams(learning_rate=1e-2)) for who in TENANTS])
        [results] = backend.forward_backward([rows])
        losses.append(sum(result.loss for result in results))
        state = backend.export_adapter("ada", with_optimizer=True)
        assert all(np.isfinite(matrix).all() for matrix in state.weights.values())
        assert {matrix.dtype for matrix in state.weights.values()} == {np.dtype(np.float32)}
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


def test_bad_rows_are_named(tiny_model_dir: Path, random_row: Any) -> None:
    backend = TransformersBackend(ModelConfig(tiny_model_dir))
    backend.add_adapter("ada", TENANTS["ada"])
    row: Row = random_row("ada", 5, 0)
    targets, weights = row.loss_inputs["target_tokens"], row.loss_inputs["weights"]
    for loss_fn, inputs, message in (
        ("nonsense", row.loss_inputs, "'nonsense' is not known here; use one of cispo, cross_entropy"),
        ("cross_entropy", {"target_tokens": targets}, "weights: cross_entropy needs it"),
        (
            "cross_entropy",
            {"target_tokens": targets, "weights": weights[:4]},
            r"in the shape of target_tokens, \[5\]",
        ),
        ("cross_entropy", {"target_tokens": targets - 600, "weights": weights}, "between 0 and 511"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            backend.forward_backward([[Row("ada", row.tokens, loss_fn, inputs)]])


def test_a_bank_goes_with_its_last_adapter(tiny_model_dir: Path) -> None:
    backend = TransformersBackend(ModelConfig(tiny_model_dir))
    for who, spec in TENANTS.items():
        backend.add_adapter(who, spec)
    assert len(backend._banks) == 3
    for who in TENANTS:
        backend.remove_adapter(who)
    assert not backend._banks


def test_seeds_of_any_size_are_taken(tiny_model_dir: Path) -> None:
    backend = TransformersBackend(ModelConfig(tiny_model_dir))
    for seed in (-1, 2**64, 2**31):
        backend.add_adapter(str(seed), AdapterSpec(rank=1, seed=seed))
