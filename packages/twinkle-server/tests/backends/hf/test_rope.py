"""Models whose rope depends on the length of a call: a row's numbers are Transformers' and PEFT's on that row alone."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import peft_alone
import pytest
import tiny_longrope
import torch
from tiny_longrope import ORIGINAL
from transformers import Gemma3TextConfig, LlamaConfig, Phi3Config

from twinkle.server.backends.hf.base_model import copy_sharing_weights, decoder
from twinkle.server.backends.hf.rope import by_kind, rope_boundaries
from twinkle.server.backends.protocol import AdapterSpec, ModelConfig
from twinkle.server.backends.transformers import TransformersBackend

LENGTHS = (20, 100, ORIGINAL, ORIGINAL + 1, 5, 60)


@pytest.fixture(scope="module", params=["phi3", "phimoe"])
def longrope_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_longrope.make(tmp_path_factory.mktemp(request.param), request.param)


def test_the_models_are_such_that_company_would_show(longrope_dir: Path):
    backend = TransformersBackend(ModelConfig(longrope_dir))
    tokens = torch.arange(3, 3 + 20).unsqueeze(0)
    padded = torch.cat([tokens, torch.ones(1, 80, dtype=torch.int64)], 1)
    with torch.no_grad():
        alone, beside = backend.loaded.model(tokens).logits, backend.loaded.model(padded).logits[:, :20]
    assert (alone.log_softmax(-1) - beside.log_softmax(-1)).abs().max() > 0.02


@pytest.mark.parametrize("threads", [1, 2])
def test_rows_on_both_sides_of_the_boundary_are_as_each_alone(
    longrope_dir: Path, monkeypatch: pytest.MonkeyPatch, threads: int
):
    torch.set_num_threads(threads)
    monkeypatch.setattr("twinkle.server.backends.hf.threads._ENOUGH", 1)  # a network each
    try:
        backend = TransformersBackend(ModelConfig(longrope_dir))
    finally:
        torch.set_num_threads(1)
    specs = {"ada": AdapterSpec(rank=4, alpha=8.0, seed=1), "bob": AdapterSpec(rank=4, alpha=8.0, seed=2)}
    peft: dict[str, Any] = {}
    for who, spec in specs.items():
        backend.add_adapter(who, spec)
        state = backend.export_adapter(who, with_optimizer=False)
        draw = np.random.default_rng(spec.seed)
        for matrix in state.weights.values():
            matrix += 0.05 * draw.normal(size=matrix.shape).astype(np.float32)
        backend.import_adapter(who, state)
        peft[who] = peft_alone.make(longrope_dir, state)
    rows = [
        peft_alone.random_row(who, length, 10 * i + len(who), tiny_longrope.VOCAB)
        for i, length in enumerate(LENGTHS)
        for who in specs
    ]
    results = backend.forward_backward([rows[:7], rows[7:]])
    torch.set_num_threads(1)
    for row, result in zip(rows, [*results[0], *results[1]], strict=True):
        expected = peft_alone.logprobs(peft[row.adapter_id], row)
        np.testing.assert_allclose(result.logprobs, expected.detach(), atol=1e-5)
    for who, model in peft.items():
        peft_alone.loss(model, [row for row in rows if row.adapter_id == who]).backward()
        found = backend.export_adapter(who, with_optimizer=False, with_gradients=True).gradients
        assert found is not None
        for name, parameter in peft_alone.parameters(model).items():
            error = np.linalg.norm(found[name] - parameter.grad.numpy())
            assert error <= 1e-4 * np.linalg.norm(parameter.grad.numpy()), name


def test_copies_of_a_model_compute_at_the_same_time(tmp_path: Path):
    """One on each side of the boundary: the frequencies of a call are written into a buffer of the module."""
    backend = TransformersBackend(ModelConfig(tiny_longrope.make(tmp_path, "phi3")))
    bodies = [decoder(copy_sharing_weights(backend.loaded.model)) for _ in range(2)]
    inputs = [torch.arange(3, 3 + n).unsqueeze(0) for n in (20, 100)]
    with torch.no_grad():
        alone = [body(ids).last_hidden_state for body, ids in zip(bodies, inputs, strict=True)]
    wrong: list[int] = []

    def run(i: int) -> None:
        with torch.no_grad():
            for _ in range(30):
                wrong.append(int(not torch.equal(bodies[i](inputs[i]).last_hidden_state, alone[i])))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 60 and sum(wrong) == 0
    buffers = [dict(body.named_buffers()) for body in bodies]
    assert buffers[0]["rotary_emb.inv_freq"] is not buffers[1]["rotary_emb.inv_freq"]


def test_boundaries_are_those_of_the_configuration():
    def longrope(original: int) -> dict[str, Any]:
        factors = [1.0] * 8
        return {
            "rope_type": "longrope", "rope_theta": 1e4, "short_factor": factors, "long_factor": factors,
            "original_max_position_embeddings": original,
        }  # fmt: skip

    sizes: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 2, "head_dim": 16}
    phi = Phi3Config(
        hidden_size=32, num_attention_heads=2, rope_parameters=longrope(64), original_max_position_embeddings=64,
        max_position_embeddings=256, pad_token_id=0,
    )  # fmt: skip
    assert rope_boundaries(phi, 256) == (64,)
    assert rope_boundaries(phi, 64) == ()  # nothing here is longer
    # Each type of layer with a rope of its own.
    by_layer = {"full_attention": longrope(64), "sliding_attention": longrope(32)}
    gemma = Gemma3TextConfig(**sizes, rope_parameters=by_layer)
    assert rope_boundaries(gemma, 256) == (32, 64)
    assert rope_boundaries(LlamaConfig(**sizes), 256) == ()


def test_rows_by_kind_keep_their_order():
    assert by_kind((32, 64), [5, 33, 32, 64, 65, 1]) == [[0, 2, 5], [1, 3], [4]]
    assert by_kind((), [5, 33]) == [[0, 1]]
