"""Every loss through the SDK, against its formula on the log-probabilities of the plain model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tinker
from tinker import TensorData, types

TOKENS = [3, 14, 15, 92, 65, 35]
TARGETS = [14, 15, 92, 65, 35, 89]
MASK = np.array([0, 0, 1, 1, 1, 1], np.float32)


def tensor(values: object) -> TensorData:
    return TensorData.from_numpy(np.asarray(values))


def datum(**inputs: object) -> types.Datum:
    tensors = {"target_tokens": tensor(TARGETS), **{name: tensor(x) for name, x in inputs.items()}}
    return types.Datum(model_input=types.ModelInput.from_ints(TOKENS), loss_fn_inputs=tensors)


@pytest.fixture
def logprobs(base_logprobs) -> np.ndarray:
    return base_logprobs(TOKENS)[np.arange(len(TARGETS)), TARGETS].astype(np.float64)


def rl_inputs(logprobs: np.ndarray) -> dict[str, np.ndarray]:
    sampled = logprobs + np.array([0, 0, 0.5, -0.5, 0.1, -2.0])
    return {
        "logprobs": (sampled * MASK).astype(np.float32),
        "advantages": np.array([0, 0, 1.0, 1.0, -0.5, 2.0], np.float32),
    }


def surrogate(name: str, p: np.ndarray, q: np.ndarray, a: np.ndarray, config: dict[str, float]) -> float:
    ratio = np.exp(p - q)
    low, high = config.get("clip_low_threshold"), config.get("clip_high_threshold")
    match name:
        case "importance_sampling":
            return -(ratio * a).sum()
        case "ppo":
            return -np.minimum(ratio * a, np.clip(ratio, low, high) * a).sum()
        case "cispo":
            return -(np.clip(ratio, low, high) * a * p).sum()
        case "dro":
            return -(p * a - 0.5 * config["beta"] * (p - q) ** 2).sum()
        case "gspo":
            s = np.exp((p - q)[MASK > 0].mean())
            return -np.minimum(s * a, np.clip(s, low, high) * a).sum()
        case _:
            raise AssertionError(name)


@pytest.mark.parametrize(
    ("name", "given", "config"),
    [
        ("importance_sampling", {}, {}),
        ("ppo", {}, {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}),
        ("ppo", {"clip_low_threshold": 0.5, "clip_high_threshold": 2.0}, None),
        ("cispo", {}, {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0}),
        ("cispo", {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}, None),
        ("dro", {}, {"beta": 0.05}),
        ("dro", {"beta": 0.7}, None),
        ("gspo", {}, {"clip_low_threshold": 1 - 3e-4, "clip_high_threshold": 1 + 4e-4}),
    ],
)
def test_policy_losses_are_their_formulas(
    train, logprobs: np.ndarray, name: str, given: dict[str, float], config: dict[str, float] | None
):
    inputs = rl_inputs(logprobs)
    p, q, a = logprobs, inputs["logprobs"].astype(np.float64), inputs["advantages"].astype(np.float64)
    if name == "gspo":
        inputs["sequence_ratio_mask"] = MASK
    client = train()
    passed = client.forward_backward([datum(**inputs)] * 2, name, given or None)
    stepped = client.optim_step(types.AdamParams(learning_rate=1e-5))
    result = passed.result()
    expected = 2 * surrogate(name, p, q, a, config if config is not None else given)
    assert result.metrics["loss:sum"] == pytest.approx(expected, rel=1e-4)
    for output in result.loss_fn_outputs:
        np.testing.assert_allclose(output["logprobs"].to_numpy(), p, atol=1e-4)
    assert stepped.result().metrics["grad_norm:mean"] > 0
    after = client.forward([datum(**inputs)], name, given or None).result().metrics["loss:sum"]
    assert after < expected / 2  # of one datum; the step is small enough to follow the gradient


def test_several_candidates_at_each_position_dense_and_sparse(train, base_logprobs):
    torch = pytest.importorskip("torch")
    all_logprobs = base_logprobs(TOKENS)
    targets = np.array([[14, 20, 30, 40, 50], *([x, 0, 0, 0, 0] for x in TARGETS[1:])])
    weights = np.where(targets > 0, 0.25, 0.0).astype(np.float32)
    rows = np.arange(len(TOKENS))[:, None]
    expected = -(weights * all_logprobs[rows, targets]).sum()
    sparse = {
        "target_tokens": TensorData.from_torch_sparse(torch.tensor(targets)),
        "weights": TensorData.from_torch_sparse(torch.tensor(weights)),
    }
    assert sparse["target_tokens"].sparse_crow_indices is not None
    dense = {"target_tokens": tensor(targets), "weights": tensor(weights)}
    client = train()
    for inputs in (dense, sparse):
        data = [types.Datum(model_input=types.ModelInput.from_ints(TOKENS), loss_fn_inputs=inputs)]
        result = client.forward_backward(data, "cross_entropy").result()
        assert result.metrics["loss:sum"] == pytest.approx(float(expected), rel=1e-4)
        [output] = result.loss_fn_outputs
        assert list(output["logprobs"].shape) == [6, 5]
        np.testing.assert_allclose(output["logprobs"].to_numpy(), all_logprobs[rows, targets], atol=1e-4)


def test_weights_of_any_sign_and_size(train, logprobs: np.ndarray):
    weights = np.array([0.0, 0.5, -1.0, 2.5, 0.0, 1e-3], np.float32)
    result = train().forward_backward([datum(weights=weights)], "cross_entropy").result()
    assert result.metrics["loss:sum"] == pytest.approx(float(-(weights * logprobs).sum()), rel=1e-4)


def quadratic(data: Any, logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
    loss: Any = sum(((lp + 3.0) ** 2).sum() for lp in logprobs)
    return loss, {"distance": float(loss.detach())}


def test_a_custom_loss_that_runs_at_the_client(train, logprobs: np.ndarray):
    pytest.importorskip("torch")
    weights = np.ones(len(TARGETS), np.float32)
    client = train()
    custom = client.forward_backward_custom([datum(weights=weights)] * 2, quadratic).result()
    expected = 2 * float(((logprobs + 3) ** 2).sum())
    assert custom.metrics["distance"] == pytest.approx(expected, rel=1e-4)
    norm = client.optim_step(types.AdamParams(learning_rate=0.0)).result().metrics["grad_norm:mean"]
    # Its gradient is that of cross_entropy with weights -d loss / d logprobs.
    by_hand = (-2 * (logprobs + 3)).astype(np.float32)
    client.forward_backward([datum(weights=by_hand)] * 2, "cross_entropy").result()
    again = client.optim_step(types.AdamParams(learning_rate=0.0)).result().metrics["grad_norm:mean"]
    assert norm == pytest.approx(again, rel=1e-3)


@pytest.mark.since(0, 36)
def test_a_custom_loss_that_runs_on_the_server(service, train, logprobs: np.ndarray):
    torch = pytest.importorskip("torch")

    def clipped(logprobs, sampled, advantages):
        ratio = torch.exp(logprobs - sampled)
        bounded = torch.clamp(ratio, 0.8, 1.2)
        loss = -torch.minimum(ratio * advantages, bounded * advantages).sum()
        return loss, {
            "custom/ratio:mean": ratio.mean(),
            "custom/clipped:sum": (ratio != bounded).float().sum(),
        }

    inputs = rl_inputs(logprobs)
    handle = service.create_custom_loss(clipped, {"logprobs": 1, "sampled": 1, "advantages": 1}).result()
    assert handle.loss_id is not None, "the server runs it"
    data = [datum(sampled=inputs["logprobs"], advantages=inputs["advantages"])]
    client = train()
    result = client.forward_backward_custom(data, handle).result()
    ratio = np.exp(logprobs - inputs["logprobs"])
    expected = surrogate(
        "ppo",
        logprobs,
        inputs["logprobs"].astype(np.float64),
        inputs["advantages"].astype(np.float64),
        {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
    )
    assert result.metrics["loss:sum"] == pytest.approx(expected, rel=1e-4)
    assert result.metrics["custom/ratio:mean"] == pytest.approx(ratio.mean(), rel=1e-4)
    assert result.metrics["custom/clipped:sum"] == float(((ratio < 0.8) | (ratio > 1.2)).sum())
    norm = client.optim_step(types.AdamParams(learning_rate=0.0)).result().metrics["grad_norm:mean"]
    client.forward_backward([datum(**inputs)], "ppo").result()
    again = client.optim_step(types.AdamParams(learning_rate=0.0)).result().metrics["grad_norm:mean"]
    assert norm == pytest.approx(again, rel=1e-4)


def test_what_a_loss_lacks_or_does_not_know_is_said_and_the_run_goes_on(train, logprobs: np.ndarray):
    client = train()
    inputs = rl_inputs(logprobs)
    for data, name, config, message in (
        ([datum(advantages=inputs["advantages"])], "ppo", None, "logprobs missing"),
        ([datum(**inputs)], "ppo", {"epsilon": 0.2}, "ppo has no such parameter; it takes clip_high"),
        ([datum(**inputs)], "gspo", None, "sequence_ratio_mask missing"),
        ([datum(**inputs)], "cispo", {"clip_low_threshold": 5.0}, "is above clip_high_threshold"),
        ([datum(**inputs)], "stable_reinforce", None, "records none"),
        ([datum(**inputs)], "custom", {"loss_id": "nonsense"}, "no custom loss of this session"),
    ):
        with pytest.raises(tinker.BadRequestError, match=message):
            client.forward_backward(data, name, config).result()
    weights = np.ones(len(TARGETS), np.float32)
    assert client.forward_backward([datum(weights=weights)], "cross_entropy").result().metrics["loss:sum"] > 0
