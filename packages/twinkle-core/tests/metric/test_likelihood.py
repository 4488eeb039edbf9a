"""Negative log-likelihood, entropy and divergence, from what the verbs return."""

import math
from typing import Any

import numpy as np
import pytest
import tinker
from hypothesis import given
from hypothesis import strategies as st

from twinkle.data_format import Datum, to_datum
from twinkle.metric import entropy, kl_divergence, nll, perplexity, policy_metrics
from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.types import ForwardBackwardOutput, ModelInput, TensorData

FEATURES = [
    {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]},
    {"input_ids": [1, 2, 3], "labels": [-100, 2, -100], "loss_weights": [0.0, 3.0, 1.0]},
]
# Of the tokens 6, 7, 8 and 2, 3.
LOGPROBS = [[-9.0, -1.0, -2.0], [-0.5, -7.0]]
# (1 * 1 + 1 * 2 + 3 * 0.5) / 5
EXPECTED = 0.9


def output(rows: list[Any]) -> ForwardBackwardOutput:
    return ForwardBackwardOutput(
        [{"logprobs": TensorData.from_numpy(np.array(row, np.float32))} for row in rows], {}
    )


def test_nll_is_the_weighted_mean_over_trained_tokens() -> None:
    assert nll(output(LOGPROBS), FEATURES) == pytest.approx(EXPECTED)
    assert nll(output(LOGPROBS), [to_datum(feature) for feature in FEATURES]) == pytest.approx(EXPECTED)
    assert perplexity(output(LOGPROBS), FEATURES) == pytest.approx(math.exp(EXPECTED))


def test_nll_reads_the_objects_of_the_tinker_sdk() -> None:
    data = [
        tinker.Datum(
            model_input=tinker.ModelInput.from_ints(datum.model_input.to_ints()),
            loss_fn_inputs={
                name: tinker.TensorData.from_numpy(tensor.to_numpy())
                for name, tensor in datum.loss_fn_inputs.items()
            },
        )
        for datum in map(to_datum, FEATURES)
    ]
    theirs = tinker.ForwardBackwardOutput(
        loss_fn_output_type="ArrayRecord",
        loss_fn_outputs=[
            {"logprobs": tinker.TensorData.from_numpy(np.array(row, np.float32))} for row in LOGPROBS
        ],
        metrics={},
    )
    assert nll(theirs, data) == pytest.approx(EXPECTED)
    assert nll(theirs, FEATURES) == pytest.approx(EXPECTED)


def test_several_candidates_a_position_count_each_by_its_weight() -> None:
    datum = Datum(
        ModelInput.from_ints([1, 2]),
        {"target_tokens": [[3, 4], [5, 6]], "weights": [[0.5, 0.5], [1.0, 0.0]]},
    )
    assert nll(output([[[-1.0, -3.0], [-2.0, -50.0]]]), [datum]) == pytest.approx((0.5 + 1.5 + 2.0) / 2)


def test_an_impossible_token_counts_only_where_it_is_trained() -> None:
    assert nll(output([[-math.inf, -1.0, -2.0], [-0.5, -7.0]]), FEATURES) == pytest.approx(EXPECTED)
    assert nll(output([[-9.0, -math.inf, -2.0], [-0.5, -7.0]]), FEATURES) == math.inf
    assert perplexity(output([[-9.0, -5000.0, -2.0], [-0.5, -7.0]]), FEATURES) == math.inf


@pytest.mark.parametrize(
    ("rows", "data", "message"),
    [
        (LOGPROBS, FEATURES[:1], "data: 1 datums for 2 outputs"),
        (LOGPROBS[::-1], FEATURES, r"data\[0\]: 3 weights for 2 log-probabilities"),
        ([[-1.0]], [{"input_ids": [1, 2], "labels": [1, -100]}], "all weights together are 0"),
        ([], [], "all weights together are 0"),
        (
            [[-1.0]],
            [Datum(ModelInput.from_ints([1]), {"target_tokens": [2]})],
            r"data\[0\].loss_fn_inputs: no 'weights' \(it has: target_tokens\)",
        ),
    ],
)
def test_output_and_data_that_do_not_belong_together_are_refused(
    rows: list[Any], data: list[Any], message: str
) -> None:
    for metric in (nll, perplexity):
        with pytest.raises(InvalidRequest, match=message):
            metric(output(rows), data)


def test_an_output_without_logprobs_is_refused() -> None:
    with pytest.raises(
        InvalidRequest, match=r"output.loss_fn_outputs\[0\]: no 'logprobs' \(it has: nothing\)"
    ):
        nll(ForwardBackwardOutput([{}], {}), FEATURES[:1])


def test_entropy_of_uniform_draws_is_that_of_the_uniform_distribution() -> None:
    assert entropy([[-math.log(4)] * 3, [-math.log(4)]]) == pytest.approx(math.log(4))


def test_a_mask_leaves_tokens_out() -> None:
    assert entropy([[-1.0, -5.0], [None, -3.0]], mask=[[1, 0], [False, True]]) == pytest.approx(2.0)
    assert (
        kl_divergence([[-1.0, -9.0]], [[-2.0, -1.0]], mask=[np.array([True, False])], estimator="k1") == 1.0
    )


PROBABILITIES = st.lists(st.integers(1, 20), min_size=4, max_size=4).map(
    lambda parts: np.array(parts) / sum(parts)
)


@given(PROBABILITIES, PROBABILITIES)
def test_k1_and_k3_are_unbiased_and_k2_is_near(sampler: np.ndarray, trainer: np.ndarray) -> None:
    # The expectation, exactly: each of the four tokens, as often as the sampler draws it.
    log_sampler, log_trainer = np.log(sampler), np.log(trainer)

    def expected(estimator: Any) -> float:
        each = [
            kl_divergence([[q]], [[p]], estimator=estimator)
            for q, p in zip(log_sampler, log_trainer, strict=True)
        ]
        return float(sampler @ np.array(each))

    true = float(sampler @ (log_sampler - log_trainer))
    assert expected("k1") == pytest.approx(true, abs=1e-12)
    assert expected("k3") == pytest.approx(true, abs=1e-12)
    assert expected("k2") == pytest.approx(float(sampler @ (log_sampler - log_trainer) ** 2) / 2, abs=1e-12)
    assert kl_divergence([log_sampler], [log_trainer]) >= 0  # k3, whatever was drawn


def test_equal_logprobs_are_no_divergence() -> None:
    for estimator in ("k1", "k2", "k3"):
        assert kl_divergence([[-1.0, -2.0], []], [[-1.0, -2.0], []], estimator=estimator) == 0


@pytest.mark.parametrize(
    ("sampler", "trainer", "options", "message"),
    [
        ([None], [[-1.0]], {}, r"sampler_logprobs\[0\]: None; ask for log-probabilities when you sample"),
        ([[-1.0]], [None], {}, r"trainer_logprobs\[0\]: None"),
        ([[-1.0], [-1.0]], [[-1.0]], {}, "trainer_logprobs: 1 sequences for 2 of the sampler"),
        ([[-1.0], [-1.0, -2.0]], [[-1.0], [-1.0]], {}, r"trainer_logprobs\[1\]: 1 entries for 2"),
        ([[-1.0, None]], [[-1.0, -1.0]], {}, r"sampler_logprobs\[0\]\[1\] is NoneType"),
        ([[-1.0]], [[float("nan")]], {}, r"trainer_logprobs\[0\]\[0\]: nan"),
        (
            [[-1.0]],
            [[-1.0]],
            {"mask": [[True, True]]},
            r"sampler_logprobs\[0\]: 1 entries, and its mask has 2",
        ),
        ([[-1.0]], [[-1.0]], {"mask": [[0.5]]}, r"mask\[0\]\[0\]: 0.5; a mask holds"),
        ([[-1.0]], [[-1.0]], {"mask": []}, "mask: 0 masks for 1 sequences"),
        ([[-1.0]], [[-1.0]], {"mask": [[False]]}, "sampler_logprobs: no token to average over"),
        ([], [], {}, "sampler_logprobs: no token"),
        ([[-1.0]], [[-1.0]], {"estimator": "k4"}, "estimator: 'k4'; allowed are 'k1', 'k2' and 'k3'"),
    ],
)
def test_divergence_names_what_does_not_fit(
    sampler: list[Any], trainer: list[Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        kl_divergence(sampler, trainer, **options)


def test_policy_metrics_count_the_tokens_with_an_advantage_alone():
    sampled, trained = np.log([0.5, 0.5, 0.25]), np.log([0.5, 0.25, 0.3])
    inputs = {
        "logprobs": TensorData.from_numpy(np.array([0.0, *sampled])),
        "advantages": TensorData.from_numpy(np.array([0.0, 1.0, -1.0, 1.0])),
    }
    data = [Datum(ModelInput.from_ints([1, 2, 3, 4]), inputs)]
    output = ForwardBackwardOutput([{"logprobs": TensorData.from_numpy(np.array([-9.0, *trained]))}], {})
    metrics = policy_metrics(output, data, clip_low_threshold=0.8, clip_high_threshold=1.1)
    ratios = np.exp(trained - sampled)  # 1, 0.5, 1.2
    assert metrics["kl"] == pytest.approx(np.mean(ratios - 1 - np.log(ratios)), rel=1e-5)
    assert metrics["entropy"] == pytest.approx(-sampled.mean(), rel=1e-5)
    assert metrics["clipped"] == pytest.approx(2 / 3)
    assert set(policy_metrics(output, data)) == {"kl", "entropy"}
    with pytest.raises(InvalidRequest, match="2 datums for 1 outputs"):
        policy_metrics(output, data * 2)


@pytest.mark.parametrize(
    ("loss_fn", "expected"),
    [
        # ratios 1.3, 1.3, 0.7, 0.7, 1.0 with advantages +, -, +, -, +: the gradient is 0 at the first and the fourth
        ("ppo", [1, 0, 0, 1, 0]),
        # the weight is bounded wherever the ratio is outside
        ("cispo", [1, 1, 1, 1, 0]),
    ],
)
def test_clipped_counts_the_tokens_that_the_loss_clips(loss_fn: Any, expected: list[int]) -> None:
    ratios, advantages = np.array([1.3, 1.3, 0.7, 0.7, 1.0]), np.array([1.0, -1.0, 1.0, -1.0, 1.0])
    sampled = np.log(np.full(5, 0.5))
    trained = sampled + np.log(ratios)
    inputs = {"logprobs": TensorData.from_numpy(sampled), "advantages": TensorData.from_numpy(advantages)}
    data = [Datum(ModelInput.from_ints([1, 2, 3, 4, 5]), inputs)]
    output = ForwardBackwardOutput([{"logprobs": TensorData.from_numpy(trained)}], {})
    metrics = policy_metrics(output, data, 0.8, 1.2, loss_fn)
    assert metrics["clipped"] == pytest.approx(np.mean(expected))
    if loss_fn == "ppo":  # by the definition: where another log-probability gives the same objective
        objective = lambda ratio: np.minimum(ratio * advantages, np.clip(ratio, 0.8, 1.2) * advantages)  # noqa: E731
        assert (objective(ratios) == objective(ratios + 1e-6)).tolist() == [bool(one) for one in expected]
        assert policy_metrics(output, data, 0.8, 1.2) == metrics
        assert policy_metrics(output, data, clip_high_threshold=1.2)["clipped"] == pytest.approx(0.2)


def test_clipped_of_gspo_is_by_the_ratio_of_the_sequence() -> None:
    data: list[Datum] = []
    outputs: list[dict[str, TensorData]] = []
    # Geometric means of the marked ratios: sqrt(1.5 * 1.5) = 1.5 with advantage +, and 1 with -.
    for ratios, advantage in (([9.0, 1.5, 1.5], 1.0), ([9.0, 2.0, 0.5], -1.0)):
        sampled = np.log(np.full(3, 0.1))
        inputs = {
            "logprobs": TensorData.from_numpy(sampled),
            "advantages": TensorData.from_numpy(np.array([0.0, advantage, advantage])),
            "sequence_ratio_mask": TensorData.from_numpy(np.array([0.0, 1.0, 1.0])),
        }
        data.append(Datum(ModelInput.from_ints([1, 2, 3]), inputs))
        outputs.append({"logprobs": TensorData.from_numpy(sampled + np.log(ratios))})
    output = ForwardBackwardOutput(outputs, {})
    assert policy_metrics(output, data, 0.8, 1.2, "gspo")["clipped"] == pytest.approx(0.5)
    with pytest.raises(InvalidRequest, match="loss_fn: 'dro'; allowed are ppo, cispo, gspo"):
        policy_metrics(output, data, 0.8, 1.2, "dro")  # pyright: ignore[reportArgumentType]
