"""Rows of several tenants in models with linear attention: a gated delta net carries a state from token to token.

Rows are padded at the right and never packed behind each other, so each has a state and a convolution of its own, and
padding comes after all that a row computes. Expected values are PEFT's, of each tenant alone and each row by itself.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import random_models
import tiny_moe
import tiny_qwen3_5
from transformers import Qwen3NextConfig

from twinkle.server.backends.contract.parts import assert_close
from twinkle.server.backends.protocol import AdapterSpec, ModelConfig, Row
from twinkle.server.backends.transformers import TransformersBackend
from twinkle.server.backends.transformers.passes import PassLimits

VOCAB_SIZE = 128
CONTEXT_LENGTH = 256
TENANTS = {
    "ada": AdapterSpec(rank=4, alpha=16.0, seed=1),
    "bob": AdapterSpec(rank=4, alpha=4.0, seed=2),
    "cyd": AdapterSpec(rank=3, alpha=16.0, seed=3, train_unembed=False),
}
# Shorter than the convolution (4 tokens), and on both sides of a chunk of the recurrence (64) and of two.
LENGTHS = {"ada": (1, 64, 130), "bob": (3, 200), "cyd": (65, 5, 2)}


def save_qwen3_next(directory: Path) -> Path:
    # Of tiny_moe's sizes float32 itself makes more of an error than is allowed here: 2e-4 in PEFT's gradients.
    sizes: dict[str, Any] = {
        **tiny_moe.SIZES,
        "hidden_size": 64,
        "initializer_range": 0.1,
        "num_hidden_layers": 4,
    }
    sizes["max_position_embeddings"] = CONTEXT_LENGTH
    config = Qwen3NextConfig(
        **sizes,
        num_experts=4,
        num_experts_per_tok=2,
        shared_expert_intermediate_size=24,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
    )
    assert config.layer_types == ["linear_attention"] * 3 + ["full_attention"]
    return random_models.save(config, directory)


def save_qwen3_5(**kind: bool) -> Callable[[Path], Path]:
    return lambda directory: tiny_qwen3_5.save(directory, VOCAB_SIZE, 3, CONTEXT_LENGTH, **kind)


MODELS: dict[str, Callable[[Path], Path]] = {
    "Qwen3.5": save_qwen3_5(),
    "Qwen3.5, tied": save_qwen3_5(tied=True),
    "Qwen3.5, mixture": save_qwen3_5(experts=True),
    "Qwen3-Next": save_qwen3_next,
}


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save(tmp_path_factory.mktemp("hybrid")) for name, save in MODELS.items()}


@pytest.fixture
def rows(random_row: Any) -> dict[str, list[Row]]:
    return {
        who: [random_row(who, length, seed=length, vocab_size=VOCAB_SIZE) for length in lengths]
        for who, lengths in LENGTHS.items()
    }


def gradients(backend: TransformersBackend, who: str) -> dict[str, Any]:
    found = backend.export_adapter(who, with_optimizer=False, with_gradients=True).gradients
    assert found is not None
    return found


@pytest.mark.parametrize("name", MODELS)
def test_three_tenants_in_one_pass_have_the_gradients_of_peft_alone(
    name: str,
    model_dirs: dict[str, Path],
    rows: dict[str, list[Row]],
    add_trained: Any,
    make_peft: Any,
    peft_parameters: Any,
    peft_loss: Any,
) -> None:
    backend = TransformersBackend(ModelConfig(model_dirs[name]))
    add_trained(backend, TENANTS)
    # Tenants take turns, so that a row stands beside another's of any length.
    mixed = [row for k in range(3) for of_tenant in rows.values() for row in of_tenant[k : k + 1]]
    [results] = backend.forward_backward([mixed])
    for who in TENANTS:
        state = backend.export_adapter(who, with_optimizer=False)
        model = make_peft(model_dirs[name], state)
        loss = peft_loss(model, rows[who])
        own = sum(result.loss for row, result in zip(mixed, results, strict=True) if row.adapter_id == who)
        assert own == pytest.approx(loss.item(), rel=1e-5)
        loss.backward()
        expected = {name: parameter.grad.numpy() for name, parameter in peft_parameters(model).items()}
        assert_close(gradients(backend, who), expected, 1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_what_stands_beside_a_row_does_not_change_it(
    name: str, model_dirs: dict[str, Path], rows: dict[str, list[Row]], add_trained: Any
) -> None:
    backend = TransformersBackend(ModelConfig(model_dirs[name]))
    add_trained(backend, TENANTS)
    short, long = rows["ada"][0], rows["bob"][1]
    [[alone]] = backend.forward_backward([[short]])
    expected = gradients(backend, "ada")
    beside = TransformersBackend(ModelConfig(model_dirs[name]))
    add_trained(beside, TENANTS)
    [[padded, _]] = beside.forward_backward([[short, long]])
    np.testing.assert_allclose(padded.logprobs, alone.logprobs, rtol=1e-5, atol=1e-6)
    assert_close(gradients(beside, "ada"), expected, 1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_recomputed_layers_give_the_same_gradients(
    name: str, model_dirs: dict[str, Path], rows: dict[str, list[Row]], add_trained: Any
) -> None:
    """The state is begun anew when a layer is computed again for its backward pass."""
    plain, recomputing = (TransformersBackend(ModelConfig(model_dirs[name])) for _ in range(2))
    recomputing._limits = PassLimits(affordable_tokens=0, overhead_tokens=1)
    for backend in (plain, recomputing):
        add_trained(backend, TENANTS)
        backend.forward_backward([[row for of_tenant in rows.values() for row in of_tenant]])
    for who in TENANTS:
        assert_close(gradients(recomputing, who), gradients(plain, who), 1e-5)
