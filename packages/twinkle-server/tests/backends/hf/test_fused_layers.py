"""Compiled norms, rotary embeddings and activations: the same numbers, in training and in a sampler's copy.

By a backend of `torch.compile` that makes no kernels: what is captured is looked at, not what a GPU makes of it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_qwen3_5
import torch

from twinkle.server.backends.hf import fused_layers
from twinkle.server.backends.hf.base_model import copy_sharing_weights, load_base_model
from twinkle.server.backends.protocol import ModelConfig

CPU = torch.device("cpu")


def numbers_of(model: Any) -> list[torch.Tensor]:
    """Logits, and the gradient of the embedded tokens."""
    ids = torch.arange(24).view(2, 12) * 5 % 128
    hidden = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=hidden).logits
    logits.square().mean().backward()
    return [logits.detach(), hidden.grad]


@pytest.fixture(params=["qwen3", "qwen3.5", "experts"])
def model(request: pytest.FixtureRequest, tmp_path: Path, tiny_model_dir: Path) -> Any:
    directory = tiny_model_dir
    if request.param != "qwen3":
        directory = tiny_qwen3_5.save(tmp_path, 128, 3, 64, experts=request.param == "experts", layers=2)
    return load_base_model(ModelConfig(directory)).model


@pytest.fixture(autouse=True)
def _rotary_as_before() -> Any:
    """They are replaced for the whole process."""
    from transformers.models.qwen3 import modeling_qwen3
    from transformers.models.qwen3_5 import modeling_qwen3_5
    from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe

    homes: list[Any] = [modeling_qwen3, modeling_qwen3_5, modeling_qwen3_5_moe]
    before = [home.apply_rotary_pos_emb for home in homes]
    yield
    for home, function in zip(homes, before, strict=True):
        home.apply_rotary_pos_emb = function


def test_the_numbers_stay(model: Any) -> None:
    expected = numbers_of(model)
    [note] = fused_layers.fuse_layers(model, CPU, backend="aot_eager")
    assert "torch.compile fuses" in note
    replaced = [module for module in model.modules() if "forward" in vars(module)]
    assert {"RMSNorm" in type(module).__name__ for module in replaced} == {True, False}
    for compared in (model, copy_sharing_weights(model)):
        for found, wanted in zip(numbers_of(compared), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        own = {id(module) for module in compared.modules()}
        methods: list[Any] = [
            vars(module)["forward"] for module in compared.modules() if "forward" in vars(module)
        ]
        assert len(methods) == len(replaced) and all(id(method.__self__) in own for method in methods)


def fails(_function: Callable[..., Any], _backend: str) -> Callable[..., Any]:
    def compiled(*_arguments: Any) -> Any:
        raise RuntimeError("no C compiler")

    return compiled


def scales(function: Callable[..., Any], _backend: str) -> Callable[..., Any]:
    return lambda *arguments: 1.1 * function(*arguments)


@pytest.mark.parametrize("compiled", [fails, scales])
def test_where_it_fails_or_gives_other_numbers_nothing_is_changed(
    model: Any,
    monkeypatch: pytest.MonkeyPatch,
    compiled: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = numbers_of(model)
    monkeypatch.setattr(fused_layers, "_compiled", compiled)
    [note] = fused_layers.fuse_layers(model, CPU, backend="aot_eager")
    assert note.startswith("WARNING: ")
    assert "no C compiler" in caplog.text or "other numbers" in caplog.text
    assert not [module for module in model.modules() if "forward" in vars(module)]
    for found, wanted in zip(numbers_of(model), expected, strict=True):
        assert torch.equal(found, wanted)


def test_on_a_cpu_nothing_is_done(model: Any) -> None:
    assert fused_layers.fuse_layers(model, CPU) == ()
    assert not [module for module in model.modules() if "forward" in vars(module)]
