"""Values and gradients of the preference losses against torch's autograd of the papers' formulas."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from twinkle.loss import ClosedFormLoss, dpo_loss, orpo_loss, pair_data, simpo_loss
from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.types import Datum, ModelInput

Formula = Callable[[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]], torch.Tensor]


def batch(seed: int, pairs: int = 3) -> tuple[list[Datum], list[np.ndarray]]:
    """Datums with prompts of weight 0, and some log-probabilities of theirs."""
    rng = np.random.default_rng(seed)
    data, logprobs = [], []
    for _ in range(2 * pairs):
        length = int(rng.integers(3, 9))
        weights = np.ones(length, np.float32)
        weights[: int(rng.integers(1, length))] = 0
        inputs = {
            "target_tokens": rng.integers(0, 50, length),
            "weights": weights,
            "reference_logprobs": -rng.exponential(1.0, length).astype(np.float32),
        }
        data.append(Datum(ModelInput.from_ints(rng.integers(0, 50, length)), inputs))
        logprobs.append(-rng.exponential(1.0, length))
    return data, logprobs


def gradients_of(tensors: list[torch.Tensor]) -> list[np.ndarray]:
    return [tensor.grad.numpy() for tensor in tensors if tensor.grad is not None]


def by_autograd(formula: Formula, data: list[Datum], logprobs: list[np.ndarray]):
    """Loss and gradients of the formula over (log-probabilities, weights, reference) of all answers."""
    tensors = [torch.tensor(each, requires_grad=True) for each in logprobs]
    weights, references = (
        [torch.tensor(datum.loss_fn_inputs[name].array).double() for datum in data]
        for name in ("weights", "reference_logprobs")
    )
    loss = formula(tensors, weights, references)
    loss.backward()
    return loss.item(), gradients_of(tensors)


def dpo(logprobs, weights, references, beta=0.3, epsilon=0.1):
    policy = torch.stack([(w * lp).sum() for w, lp in zip(weights, logprobs, strict=True)])
    reference = torch.stack([(w * lp).sum() for w, lp in zip(weights, references, strict=True)])
    log_ratios = policy - reference
    logits = beta * (log_ratios[0::2] - log_ratios[1::2])
    return (-F.logsigmoid(logits) * (1 - epsilon) - F.logsigmoid(-logits) * epsilon).mean()


def simpo(logprobs, weights, _references, beta=2.5, gamma=0.7):
    means = torch.stack([(w * lp).sum() / w.sum() for w, lp in zip(weights, logprobs, strict=True)])
    return -F.logsigmoid(beta * (means[0::2] - means[1::2]) - gamma).mean()


def orpo(logprobs, weights, _references, weight=0.4):
    means = torch.stack([(w * lp).sum() / w.sum() for w, lp in zip(weights, logprobs, strict=True)])
    log_odds = means - torch.log1p(-torch.exp(means))
    return (-means[0::2] - weight * F.logsigmoid(log_odds[0::2] - log_odds[1::2])).mean()


LOSSES: dict[str, tuple[ClosedFormLoss, Formula]] = {
    "dpo": (dpo_loss(beta=0.3, label_smoothing=0.1), dpo),
    "simpo": (simpo_loss(beta=2.5, gamma=0.7), simpo),
    "orpo": (orpo_loss(weight=0.4), orpo),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("seed", range(5))
def test_value_and_gradients_are_those_of_the_formula(name: str, seed: int):
    loss, formula = LOSSES[name]
    data, logprobs = batch(seed)
    value = loss.evaluate(data, logprobs)
    expected, gradients = by_autograd(formula, data, logprobs)
    assert value.loss == pytest.approx(expected, rel=1e-10)
    for own, other in zip(value.gradients, gradients, strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_as_a_function_of_tensors_it_has_the_same_value_and_gradients(name: str):
    loss, formula = LOSSES[name]
    data, logprobs = batch(7)
    tensors = [torch.tensor(each.astype(np.float32), requires_grad=True) for each in logprobs]
    scalar, metrics = loss(data, tensors)
    scalar.backward()
    expected, gradients = by_autograd(formula, data, logprobs)
    assert scalar.item() == pytest.approx(expected, rel=1e-5)
    for own, other in zip(gradients_of(tensors), gradients, strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-4, atol=1e-7)
    assert set(metrics) >= {"margin:mean", "accuracy:mean"}


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_log_probabilities_give_finite_numbers(name: str):
    loss, _ = LOSSES[name]
    data, logprobs = batch(1, pairs=2)
    extreme = [np.full_like(each, 0.0 if i % 2 else -1e4) for i, each in enumerate(logprobs)]
    value = loss.evaluate(data, extreme)
    assert np.isfinite(value.loss)
    assert all(np.isfinite(gradient).all() for gradient in value.gradients)


def test_metrics_of_dpo_are_the_implicit_rewards():
    data, logprobs = batch(3)
    metrics = dpo_loss(beta=0.5).evaluate(data, logprobs).metrics
    rewards = [
        0.5 * ((lp - d.loss_fn_inputs["reference_logprobs"].array) * d.loss_fn_inputs["weights"].array).sum()
        for d, lp in zip(data, logprobs, strict=True)
    ]
    margins = np.array(rewards[0::2]) - np.array(rewards[1::2])
    assert metrics["chosen_reward:mean"] == pytest.approx(np.mean(rewards[0::2]))
    assert metrics["rejected_reward:mean"] == pytest.approx(np.mean(rewards[1::2]))
    assert metrics["margin:mean"] == pytest.approx(margins.mean())
    assert metrics["accuracy:mean"] == pytest.approx((margins > 0).mean())


def feature(tokens: list[int], labels: list[int]) -> dict[str, np.ndarray]:
    return {"input_ids": np.array(tokens), "labels": np.array(labels)}


def test_pair_data_puts_chosen_before_rejected_and_keeps_their_references():
    pairs = [
        {
            "chosen": feature([1, 2, 3], [-100, 2, 3]),
            "rejected": feature([1, 4, 5, 6], [-100, 4, 5, 6]),
        }
    ]
    chosen, rejected = pair_data(pairs, [[-0.1, -0.2], [-0.3, -0.4, -0.5]])
    assert chosen.model_input.to_ints() == [1, 2]
    assert rejected.loss_fn_inputs["target_tokens"].tolist() == [4, 5, 6]
    np.testing.assert_allclose(rejected.loss_fn_inputs["reference_logprobs"].array, [-0.3, -0.4, -0.5])


def test_what_is_wrong_with_pairs_is_said():
    good = feature([1, 2], [-100, 2])
    with pytest.raises(InvalidRequest, match=r"pairs\[0\].rejected: expected a feature"):
        pair_data([{"chosen": good}])
    with pytest.raises(InvalidRequest, match=r"pairs\[0\].chosen: no token of the answer is trained on"):
        pair_data([{"chosen": feature([1, 2], [-100, -100]), "rejected": good}])
    with pytest.raises(InvalidRequest, match="1 entries for 1 pairs"):
        pair_data([{"chosen": good, "rejected": good}], [[0.0]])
    with pytest.raises(InvalidRequest, match=r"reference_logprobs\[1\]: shape \[2\]; the answer has 1"):
        pair_data([{"chosen": good, "rejected": good}], [[0.0], [0.0, 0.0]])


def test_what_is_wrong_with_a_batch_is_said():
    data, logprobs = batch(0)
    with pytest.raises(InvalidRequest, match="5 datums; dpo_loss takes pairs"):
        dpo_loss().evaluate(data[:5], logprobs[:5])
    with pytest.raises(InvalidRequest, match=r"data\[0\].loss_fn_inputs: reference_logprobs missing"):
        plain = [Datum(d.model_input, {"weights": d.loss_fn_inputs["weights"]}) for d in data]
        dpo_loss().evaluate(plain, logprobs)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dpo_loss(beta=0.0), "beta: 0.0; allowed are finite numbers above 0"),
        (lambda: dpo_loss(label_smoothing=0.5), "label_smoothing: 0.5"),
        (lambda: simpo_loss(gamma=-1.0), "gamma: -1.0"),
        (lambda: orpo_loss(weight=float("nan")), "weight: nan"),
    ],
)
def test_parameters_out_of_range_are_refused(make: Callable[[], object], message: str):
    with pytest.raises(InvalidRequest, match=message):
        make()
