"""The pieces for reinforcement learning and preferences over the SDK's own clients and types."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tinker
from tinker import types
from tinker_sdk import now

from twinkle.data_format import to_datum
from twinkle.loss import dpo_loss, pair_data
from twinkle.metric import kl_divergence, nll
from twinkle.rollout import sample_groups, score, to_training_data
from twinkle.template import Template

pytestmark = pytest.mark.since(0, 38)

QUESTIONS = [{"messages": [{"role": "user", "content": text}]} for text in ("Hi", "1+2=")]


@pytest.fixture
def template(model_dir: Path) -> Template:
    return Template(model_dir)


def test_groups_are_sampled_and_trained_on(train, template: Template):
    client = train()
    sampler = now(client.save_weights_and_get_sampling_client())
    groups = sample_groups(sampler, template, QUESTIONS, 3, max_tokens=5, seed=1, types=types)
    data = to_training_data(groups, np.ones((2, 3)), "ppo", types=types)
    assert all(isinstance(datum, tinker.Datum) for datum in data)
    result = now(client.forward_backward(data, "ppo"))
    sampled = [datum.loss_fn_inputs["logprobs"].to_numpy() for datum in data]
    trained = [output["logprobs"].to_numpy() for output in result.loss_fn_outputs]
    masks = [datum.loss_fn_inputs["advantages"].to_numpy() != 0 for datum in data]
    assert kl_divergence(sampled, trained, masks) < 1e-6
    # Sampler and trainer agree, so every ratio is 1 and every token adds its advantage of 1.
    assert result.metrics["loss:sum"] == pytest.approx(-sum(mask.sum() for mask in masks), rel=1e-4)


def test_preferences_are_trained_by_the_same_loss(train, template: Template, base_logprobs):
    client = train()
    pair = {
        side: template.encode(
            {"messages": [*QUESTIONS[0]["messages"], {"role": "assistant", "content": text}]}
        )
        for side, text in (("chosen", "Yes!"), ("rejected", "Well, no."))
    }
    sampler = now(client.save_weights_and_get_sampling_client())
    scores = score(sampler, [pair["chosen"]["input_ids"], pair["rejected"]["input_ids"]], types=types)
    for side, own in zip(("chosen", "rejected"), scores, strict=True):
        tokens = pair[side]["input_ids"]
        expected = base_logprobs(tokens.tolist())[np.arange(len(tokens) - 1), tokens[1:]]
        np.testing.assert_allclose(own, expected, atol=1e-4)
    data = pair_data([pair], scores, types=types)
    margins = []
    for _ in range(4):
        result = now(client.forward_backward_custom(data, dpo_loss()))
        now(client.optim_step(types.AdamParams(learning_rate=1e-2)))
        margins.append(result.metrics["margin:mean"])
    assert margins[0] == pytest.approx(0.0, abs=1e-4)
    assert margins[-1] > margins[1] > 0.05


def test_features_become_the_sdks_datums(train, template: Template, base_logprobs):
    feature = template.encode(
        {"messages": [*QUESTIONS[1]["messages"], {"role": "assistant", "content": "3"}]}
    )
    datum = to_datum(feature, types)
    result = now(train().forward([datum], "cross_entropy"))
    tokens, marked = feature["input_ids"], feature["labels"][1:] != -100
    expected = base_logprobs(tokens.tolist())[np.arange(len(tokens) - 1), tokens[1:]][marked]
    assert nll(result, [datum]) == pytest.approx(-expected.mean(), rel=1e-4)
