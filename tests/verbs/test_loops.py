"""The pieces of training loops over real clients, against Transformers and PEFT doing the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft_reference import (
    MODEL,
    VOCAB,
    peft_logprobs,
    peft_loss,
    peft_model,
    random_batch,
    trained_parameters,
)
from transformers import AutoModelForCausalLM

from twinkle.data_format import to_datum
from twinkle.distillation import teacher_data
from twinkle.metric import kl_divergence, nll
from twinkle.protocol.errors import InvalidRequest
from twinkle.rollout import sample_groups, score, to_training_data
from twinkle.template import Template
from twinkle.training import accumulate, evaluate


def features(seed: int, lengths: tuple[int, ...]) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    rows = []
    for length in lengths:
        tokens = rng.integers(0, VOCAB, length)
        labels = np.where(rng.random(length) < 0.7, tokens, -100)
        labels[-1] = tokens[-1]
        rows.append({"input_ids": tokens, "labels": labels})
    return rows


@pytest.fixture
def client(verbs):
    made = verbs.connect("loops").create_lora_training_client(MODEL, rank=4, seed=2)
    made.forward_backward(random_batch(1, (12, 9)))
    made.optim_step(learning_rate=1e-2)
    yield made
    made.unload().result()


@pytest.fixture
def reference(verbs, client, hub_root: Path):
    return peft_model(hub_root, verbs.directory(client.save_state("now", overwrite=True).path))


@pytest.fixture
def template(hub_root: Path):
    return Template(f"ms://{MODEL}")


@pytest.fixture
def conversations():
    return [{"messages": [{"role": "user", "content": text}]} for text in ("Hi", "Who?", "1+2=")]


def mean_nll(model, rows) -> float:
    data = [to_datum(row) for row in rows]
    weight = sum(float(datum.loss_fn_inputs["weights"].array.sum()) for datum in data)
    return peft_loss(model, data).item() / weight


def test_an_evaluation_is_the_mean_over_the_labelled_tokens(client, reference):
    rows = features(3, (9, 30, 5, 17, 8))
    result = evaluate(client, rows, batch_size=2)
    assert result.nll == pytest.approx(mean_nll(reference, rows), rel=1e-4)
    assert result.perplexity == pytest.approx(np.exp(result.nll))
    assert result.tokens == sum(int((row["labels"][1:] != -100).sum()) for row in rows)
    assert result.sequences == 5
    assert client.optim_step(learning_rate=0.0).metrics["grad_norm:mean"] == 0.0
    assert nll(client.forward(rows).result(), rows) == pytest.approx(result.nll, rel=1e-5)


def test_accumulated_batches_give_the_gradient_of_the_mean_over_all_tokens(client, reference):
    rows = features(4, (9, 30, 5, 17, 8))
    output = accumulate(client, [rows[:2], rows[2:3], rows[3:]])
    norm = client.optim_step(learning_rate=0.0).metrics["grad_norm:mean"]
    data = [to_datum(row) for row in rows]
    weight = sum(float(datum.loss_fn_inputs["weights"].array.sum()) for datum in data)
    loss = peft_loss(reference, data) / weight
    loss.backward()
    gradients = [p.grad for p in trained_parameters(reference).values() if p.grad is not None]
    expected = torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients])).item()
    assert output.metrics["loss:sum"] == pytest.approx(loss.item(), rel=1e-4)
    assert norm == pytest.approx(expected, rel=1e-4)
    assert len(output.loss_fn_outputs) == 5


def test_what_can_not_be_evaluated_or_accumulated_is_said(client):
    masked = [{"input_ids": np.array([1, 2, 3]), "labels": np.full(3, -100)}]
    with pytest.raises(InvalidRequest, match="there are none"):
        evaluate(client, [])
    with pytest.raises(InvalidRequest, match="no label marks a token"):
        evaluate(client, masked)
    with pytest.raises(InvalidRequest, match="no token is trained on"):
        accumulate(client, [masked])
    with pytest.raises(InvalidRequest, match=r"rows\[1\]: the feature has no 'labels'"):
        evaluate(client, [features(1, (4,))[0], {"input_ids": [1, 2]}])
    with pytest.raises(InvalidRequest, match="at most 256"):
        client.forward_backward(features(1, (300,))).result()


def test_rollouts_of_the_sampler_are_what_the_trainer_sees(client, template, conversations):
    sampling_client = client.save_weights_and_get_sampling_client()
    groups = sample_groups(sampling_client, template, conversations, 3, max_tokens=6, seed=7)
    assert [len(group) for group in groups] == [3, 3, 3]
    again = sample_groups(sampling_client, template, conversations, 3, max_tokens=6, seed=7)
    data = to_training_data(groups, np.ones((3, 3)))
    passed = client.forward_backward(data, "importance_sampling").result()
    sampled = [datum.loss_fn_inputs["logprobs"].array for datum in data]
    trained = [output["logprobs"].array for output in passed.loss_fn_outputs]
    masks = [datum.loss_fn_inputs["advantages"].array != 0 for datum in data]
    assert kl_divergence(sampled, trained, masks) < 1e-6
    for conversation, group, same in zip(conversations, groups, again, strict=True):
        prompt = template.encode(conversation, add_generation_prompt=True)["input_ids"]
        for one, other in zip(group, same, strict=True):
            np.testing.assert_array_equal(one.tokens, other.tokens)
            np.testing.assert_array_equal(one.tokens[: len(prompt)], prompt)
            assert one.num_sampled == len(one.tokens) - len(prompt) > 0
            assert [message["role"] for message in one.messages] == ["user", "assistant"]


def test_scores_are_the_log_probabilities_of_the_model(client, verbs, hub_root: Path):
    sequences = [row["input_ids"] for row in features(5, (9, 4))]
    sampling_client = verbs.connect("loops").create_sampling_client(base_model=MODEL)
    base = AutoModelForCausalLM.from_pretrained(hub_root / MODEL, dtype=torch.float32)
    for tokens, scores in zip(sequences, score(sampling_client, sequences), strict=True):
        with torch.no_grad():
            logits = base(torch.tensor(tokens[None])).logits[0, :-1]
        expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(tokens[1:, None]))[:, 0]
        np.testing.assert_allclose(scores, expected.numpy(), atol=1e-4)
    with pytest.raises(InvalidRequest, match=r"sequences\[0\]: 1 token"):
        score(sampling_client, [[1]])


def test_a_teachers_distribution_is_the_target(client, verbs, hub_root: Path):
    rows = features(6, (7, 11))
    teacher = verbs.connect("loops").create_sampling_client(base_model=MODEL)
    data = teacher_data(teacher, rows, k=4)
    base = AutoModelForCausalLM.from_pretrained(hub_root / MODEL, dtype=torch.float32)
    for row, datum in zip(rows, data, strict=True):
        with torch.no_grad():
            logits = base(torch.tensor(row["input_ids"][None])).logits[0, :-1]
        top = torch.softmax(logits, -1).topk(4)
        marked = row["labels"][1:] != -100
        targets, weights = (datum.loss_fn_inputs[name].array for name in ("target_tokens", "weights"))
        np.testing.assert_array_equal(targets[marked], top.indices.numpy()[marked])
        probabilities = top.values / top.values.sum(-1, keepdim=True)
        np.testing.assert_allclose(weights[marked], probabilities.numpy()[marked], atol=1e-4)
        assert not weights[~marked].any()
    passed = client.forward_backward(data, "cross_entropy")
    assert passed.loss_fn_outputs[0]["logprobs"].array.shape == (6, 4)


def test_logprobs_of_peft_and_of_a_rollout_agree(client, reference, template, conversations):
    [[rollout], *_] = sample_groups(
        client.save_weights_and_get_sampling_client(), template, conversations, 1, max_tokens=8, seed=1
    )
    [datum] = to_training_data([rollout], [1.0])
    expected = peft_logprobs(reference, datum).detach().numpy()
    np.testing.assert_allclose(rollout.sampled_logprobs, expected[rollout.is_sampled[1:]], atol=1e-4)
