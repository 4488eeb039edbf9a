"""DPO, SimPO and ORPO through the client: gradients against autograd of the formulas on a PEFT model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft_reference import MODEL, VOCAB, peft_logprobs, peft_model, random_batch, trained_parameters
from safetensors.numpy import load_file

from twinkle.loss import dpo_loss, orpo_loss, pair_data, simpo_loss
from twinkle.rollout import score

# With eps far above every gradient, the first step of Adam is RATE / EPS times the gradient.
EPS, RATE = 1e4, 1e6


def pairs(seed: int, count: int = 3) -> list[dict[str, Any]]:
    """Prompts of four tokens, each with two answers of some tokens."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        prompt = rng.integers(0, VOCAB, 4)
        pair = {}
        for side in ("chosen", "rejected"):
            tokens = np.concatenate([prompt, rng.integers(0, VOCAB, rng.integers(2, 9))])
            labels = tokens.copy()
            labels[:4] = -100
            pair[side] = {"input_ids": tokens, "labels": labels}
        made.append(pair)
    return made


def sums(logprobs: list[torch.Tensor], data: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum over each answer's tokens, and their number."""
    weights = [torch.tensor(datum.loss_fn_inputs["weights"].array) for datum in data]
    total = torch.stack([(w * lp).sum() for w, lp in zip(weights, logprobs, strict=True)])
    return total, torch.stack([w.sum() for w in weights])


def dpo(policy, reference, _lengths):
    ratios = policy - reference
    return -F.logsigmoid(0.3 * (ratios[0::2] - ratios[1::2])).mean()


def simpo(policy, _reference, lengths):
    means = policy / lengths
    return -F.logsigmoid(2.0 * (means[0::2] - means[1::2]) - 1.0).mean()


def orpo(policy, _reference, lengths):
    means = policy / lengths
    odds = torch.log(torch.exp(means) / (1 - torch.exp(means)))
    return (-means[0::2] - 0.1 * F.logsigmoid(odds[0::2] - odds[1::2])).mean()


@pytest.mark.parametrize(
    ("loss", "formula"),
    [(dpo_loss(beta=0.3), dpo), (simpo_loss(), simpo), (orpo_loss(), orpo)],
    ids=["dpo", "simpo", "orpo"],
)
def test_the_gradient_is_the_one_of_the_formula_on_a_peft_model(verbs, hub_root: Path, loss, formula):
    service = verbs.connect("preference")
    made = service.create_lora_training_client(MODEL, rank=4, seed=3)
    made.forward_backward(random_batch(1, (12, 9)))
    made.optim_step(learning_rate=1e-2)  # so that neither factor of the adapter is zero
    start = made.save_state("start", overwrite=True).path
    client = service.create_training_client_from_state(start)

    batch = pairs(5)
    sequences = [pair[side]["input_ids"] for pair in batch for side in ("chosen", "rejected")]
    base = service.create_sampling_client(base_model=MODEL)
    data = pair_data(batch, score(base, sequences))
    passed = client.forward_backward_custom(data, loss)
    client.optim_step(learning_rate=RATE, eps=EPS)
    end = client.save_state("end", overwrite=True).path

    model = peft_model(hub_root, verbs.directory(start))
    with torch.no_grad(), model.disable_adapter():
        reference, _ = sums([peft_logprobs(model, datum) for datum in data], data)
    policy, lengths = sums([peft_logprobs(model, datum) for datum in data], data)
    expected = formula(policy, reference, lengths)
    expected.backward()

    assert passed.metrics["loss:sum"] == pytest.approx(expected.item(), rel=1e-4)
    before, after = (load_file(verbs.directory(p) / "adapter_model.safetensors") for p in (start, end))
    for name, parameter in trained_parameters(model).items():
        assert parameter.grad is not None
        gradient = parameter.grad.numpy()
        moved = (before[name] - after[name]) * (EPS / RATE)
        assert np.linalg.norm(moved - gradient) <= 1e-3 * np.linalg.norm(gradient) + 1e-6, name
    client.unload().result()
    made.unload().result()


def test_the_margin_of_dpo_grows(verbs):
    service = verbs.connect("preference")
    client = service.create_lora_training_client(MODEL, rank=4, seed=3)
    batch = pairs(6, count=4)
    sequences = [pair[side]["input_ids"] for pair in batch for side in ("chosen", "rejected")]
    data = pair_data(batch, score(service.create_sampling_client(base_model=MODEL), sequences))
    passes = []
    for _ in range(6):
        passes.append(client.forward_backward_custom(data, dpo_loss()))
        client.optim_step(learning_rate=1e-2)
    margins = [passed.metrics["margin:mean"] for passed in passes]
    assert margins[0] == pytest.approx(0.0, abs=1e-4)  # a new adapter is the reference
    assert all(later > earlier for earlier, later in zip(margins, margins[1:], strict=False))
    assert passes[-1].metrics["accuracy:mean"] == 1.0
    client.unload().result()
