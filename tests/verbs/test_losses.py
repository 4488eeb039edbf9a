"""Losses through the native client: those of the server, and one's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from peft_reference import MODEL, random_batch

from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.types import Datum, ModelInput
from twinkle.server.backends.lora.losses.formulas import FORMULAS, LOSS_SPECS

BATCH = random_batch(3, (9, 6))


@pytest.fixture
def client(verbs):
    made = verbs.connect("losses").create_lora_training_client(MODEL, rank=4, seed=2)
    yield made
    made.unload().result()


def logprobs_of(client) -> list[np.ndarray]:
    return [output["logprobs"].array for output in client.forward(BATCH).loss_fn_outputs]


@pytest.mark.parametrize("name", FORMULAS)
def test_a_loss_is_its_formula(client, name: str):
    draw = np.random.default_rng(0)
    expected, data = 0.0, []
    for datum, logprobs in zip(BATCH, logprobs_of(client), strict=True):
        inputs = {
            "target_tokens": datum.loss_fn_inputs["target_tokens"].array,
            "weights": draw.normal(size=len(logprobs)).astype(np.float32),
            "logprobs": logprobs + 0.2 * draw.normal(size=len(logprobs)).astype(np.float32),
            "advantages": draw.normal(size=len(logprobs)).astype(np.float32),
            "sequence_ratio_mask": np.ones(len(logprobs), np.float32),
        }
        expected += FORMULAS[name](logprobs.astype(np.float64), inputs, LOSS_SPECS[name].config)[0]
        data.append(Datum(datum.model_input, inputs))
    assert client.forward_backward(data, name).metrics["loss:sum"] == pytest.approx(expected, rel=1e-4)
    assert client.optim_step(learning_rate=0.0).metrics["grad_norm:mean"] > 0


def distances(data: Any, logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    loss = sum(((lp + 2.0) ** 2).sum() for lp in logprobs)
    assert isinstance(loss, torch.Tensor)
    return loss, {"datums:sum": float(len(data))}


def distance(logprobs, scale):
    loss = (torch.pow(logprobs + 2.0, 2) * scale).sum()
    return loss, {"custom/mean:mean": logprobs.mean()}


def test_a_custom_loss_here_and_on_the_server_give_the_same(verbs):
    service = verbs.connect("custom")
    client = service.create_lora_training_client(MODEL, rank=4, seed=2)
    expected = sum(float(((lp.astype(np.float64) + 2) ** 2).sum()) for lp in logprobs_of(client))
    here = client.forward_backward_custom(BATCH, distances)
    assert here.metrics["loss:sum"] == pytest.approx(expected, rel=1e-4)
    assert here.metrics["datums:sum"] == 2.0
    norm = client.optim_step(learning_rate=0.0).metrics["grad_norm:mean"]

    handle = service.create_custom_loss(distance, {"logprobs": 1, "scale": 0})
    data = [Datum(d.model_input, {**d.loss_fn_inputs, "scale": np.float32(1.0)}) for d in BATCH]
    there = client.forward_backward_custom(data, handle)
    assert there.metrics["loss:sum"] == pytest.approx(expected, rel=1e-4)
    means = [float(lp.mean()) for lp in logprobs_of(client)]
    assert there.metrics["custom/mean:mean"] == pytest.approx(sum(means) / 2, rel=1e-4)
    assert client.optim_step(learning_rate=0.0).metrics["grad_norm:mean"] == pytest.approx(norm, rel=1e-4)
    client.unload().result()


def test_losses_that_cannot_be_are_said_so(verbs, client):
    with pytest.raises(InvalidRequest, match="scalar tensor computed from the log-probabilities"):
        client.forward_backward_custom(BATCH, lambda data, logprobs: (torch.tensor(1.0), {}))
    with pytest.raises(InvalidRequest, match=r"does not depend on the log-probabilities of data\[1\]"):
        client.forward_backward_custom(BATCH, lambda data, logprobs: (logprobs[0].sum(), {}))
    service = verbs.connect("custom")
    with pytest.raises(InvalidRequest, match="torch.fx can't trace it"):
        service.create_custom_loss(
            lambda logprobs: (logprobs if logprobs.sum() > 0 else 1, {}), {"logprobs": 1}
        )
    with pytest.raises(InvalidRequest, match=r"torch\.randn_like.*not allowed"):
        service.create_custom_loss(
            lambda logprobs: ((logprobs * torch.randn_like(logprobs)).sum(), {}), {"logprobs": 1}
        )
    assert client.forward(BATCH).metrics["loss:sum"] != 0


def test_several_candidates_at_each_position(client):
    tokens = [5, 6, 7]
    targets = np.array([[6, 1], [7, 2], [8, 3]])
    weights = np.array([[0.5, 0.5], [1.0, 0.0], [0.25, 0.75]], np.float32)
    datum = Datum(ModelInput.from_ints(tokens), {"target_tokens": targets, "weights": weights})
    [output] = client.forward_backward([datum]).loss_fn_outputs
    singles = [
        client.forward([Datum(datum.model_input, {"target_tokens": targets[:, k], "weights": weights[:, k]})])
        for k in range(2)
    ]
    columns = [single.loss_fn_outputs[0]["logprobs"].array for single in singles]
    np.testing.assert_allclose(output["logprobs"].array, np.stack(columns, axis=1), atol=1e-5)
