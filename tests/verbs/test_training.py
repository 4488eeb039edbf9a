"""Training through the verbs against PEFT and torch's own AdamW, doing the same alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft_reference import MODEL, peft_logprobs, peft_loss, peft_model, random_batch, trained_parameters
from safetensors.numpy import load_file

from twinkle.protocol.types import Datum


def test_three_tenants_at_once_train_as_peft_does_alone(verbs, hub_root: Path):
    shapes = [
        dict(rank=4, seed=1),
        dict(rank=8, seed=2, train_unembed=False, alpha=16),
        dict(rank=4, seed=3, train_mlp=False),
    ]
    lengths = [(9, 30, 17), (40,), (5, 5, 12, 3)]
    tenants = [
        verbs.connect(f"tenant-{i}").create_lora_training_client(MODEL, **shape)
        for i, shape in enumerate(shapes)
    ]
    starts = [client.save_state("start").path for client in tenants]
    references = [peft_model(hub_root, verbs.directory(path)) for path in starts]
    optimizers = [
        torch.optim.AdamW(
            trained_parameters(m).values(), lr=1e-2, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.01
        )
        for m in references
    ]
    for step in range(5):
        batches = [random_batch(100 * i + step, lengths[i]) for i in range(3)]
        passes = [client.forward_backward(batch) for client, batch in zip(tenants, batches, strict=True)]
        steps = [client.optim_step(learning_rate=1e-2, weight_decay=0.01, eps=1e-12) for client in tenants]
        for passed, stepped, model, optimizer, batch in zip(
            passes, steps, references, optimizers, batches, strict=True
        ):
            optimizer.zero_grad()
            loss = peft_loss(model, batch)
            loss.backward()
            gradients = [p.grad for p in trained_parameters(model).values() if p.grad is not None]
            norm = torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients])).item()
            assert passed.metrics["loss:sum"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-4)
            for output, datum in zip(passed.loss_fn_outputs, batch, strict=True):
                expected = peft_logprobs(model, datum).detach().numpy()
                np.testing.assert_allclose(output["logprobs"].to_numpy(), expected, atol=1e-4)
            assert stepped.metrics["grad_norm:mean"] == pytest.approx(norm, rel=1e-4)
            optimizer.step()
    for client, model in zip(tenants, references, strict=True):
        path = client.save_state("end").path
        ours = load_file(verbs.directory(path) / "adapter_model.safetensors")
        for name, parameter in trained_parameters(model).items():
            expected = parameter.detach().numpy()
            # Adam divides each gradient by its own size, and so makes the rounding errors of small ones large.
            assert np.linalg.norm(ours[name] - expected) <= 1e-3 * max(np.linalg.norm(expected), 1e-3), name


def test_two_passes_accumulate_to_what_one_does(verbs):
    batch = random_batch(7, (12, 20, 6))
    one, two = (verbs.connect("a").create_lora_training_client(MODEL, rank=4, seed=5) for _ in range(2))
    one.forward_backward(batch)
    two.forward_backward(batch[:1])
    two.forward_backward(batch[1:])
    norms = [client.optim_step(learning_rate=0.1).metrics["grad_norm:mean"] for client in (one, two)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    after = [client.forward(batch).metrics["loss:sum"] for client in (one, two)]
    assert after[0] == pytest.approx(after[1], rel=1e-5)


def test_a_forward_pass_leaves_no_gradient(verbs):
    client = verbs.connect("a").create_lora_training_client(MODEL, rank=4)
    client.forward(random_batch(1, (8, 8)))
    assert client.optim_step().metrics["grad_norm:mean"] == 0.0


def test_no_learning_rate_moves_nothing_and_all_zero_weights_are_a_no_op(verbs):
    client = verbs.connect("a").create_lora_training_client(MODEL, rank=4)
    batch = random_batch(2, (10,))
    before = client.forward(batch).metrics["loss:sum"]
    silent = Datum(batch[0].model_input, {**batch[0].loss_fn_inputs, "weights": np.zeros(10, np.float32)})
    client.forward_backward([silent])
    client.optim_step(learning_rate=0.1)
    client.forward_backward(batch)
    client.optim_step(learning_rate=0.0)
    assert client.forward(batch).metrics["loss:sum"] == before


def test_training_goes_on_from_a_checkpoint_as_if_it_had_never_stopped(verbs):
    service = verbs.connect("a")
    batches = [random_batch(50 + i, (14, 9)) for i in range(4)]

    def train(client, some) -> None:
        for batch in some:
            client.forward_backward(batch)
            client.optim_step(learning_rate=0.02)

    undisturbed = service.create_lora_training_client(MODEL, rank=4, seed=9)
    train(undisturbed, batches[:2])
    path = undisturbed.save_state("half-way").path
    train(undisturbed, batches[2:])

    resumed = service.create_training_client_from_state_with_optimizer(path)
    train(resumed, batches[2:])
    fresh_optimizer = service.create_training_client_from_state(path)
    train(fresh_optimizer, batches[2:])
    rewound = undisturbed
    expected = undisturbed.forward(batches[0]).metrics["loss:sum"]
    assert resumed.forward(batches[0]).metrics["loss:sum"] == pytest.approx(expected, rel=1e-6)
    assert fresh_optimizer.forward(batches[0]).metrics["loss:sum"] != pytest.approx(expected, rel=1e-4)

    rewound.load_state_with_optimizer(path)
    train(rewound, batches[2:])
    assert rewound.forward(batches[0]).metrics["loss:sum"] == pytest.approx(expected, rel=1e-6)


def test_a_released_adapters_place_is_clean_for_the_next(verbs):
    service = verbs.connect("a")
    batch = random_batch(3, (16,))
    reference = service.create_lora_training_client(MODEL, rank=6, seed=11)
    expected_start = reference.forward(batch).metrics["loss:sum"]
    first = service.create_lora_training_client(MODEL, rank=6, seed=12)
    first.forward_backward(batch)
    first.optim_step(learning_rate=0.5)
    first.forward_backward(batch)  # a gradient that nobody steps with
    first.unload().result()
    second = service.create_lora_training_client(MODEL, rank=6, seed=11)
    assert second.forward(batch).metrics["loss:sum"] == expected_start
    assert second.optim_step(learning_rate=0.5).metrics["grad_norm:mean"] == 0.0
    assert second.forward(batch).metrics["loss:sum"] == expected_start


def test_a_cancelled_save_or_step_is_carried_out_and_the_run_goes_on(verbs):
    """A number of the run that was given and never sent would be waited for by all that follow."""
    client = verbs.connect("cancels").create_lora_training_client(MODEL, rank=2)
    batch = random_batch(7, (6,))
    client.forward_backward(batch)
    for pending in (client.optim_step(learning_rate=1e-2), client.save_state("cancelled")):
        pending.cancel()
    client.forward_backward(batch).result(timeout=60)
    client.optim_step(learning_rate=1e-2).result(timeout=60)
    last = client.save_state("last").path
    assert verbs.directory(last.replace("/last", "/cancelled")).is_dir(), "the save was carried out"
