"""The main loop: train, sample, save, resume, as the SDK's users write it."""

from __future__ import annotations

import numpy as np
import pytest
import tinker
from tinker import types
from tinker_sdk import MODEL, now


def a_datum() -> types.Datum:
    return types.Datum(
        model_input=types.ModelInput.from_ints([1, 2, 3, 4]),
        loss_fn_inputs={
            "target_tokens": types.TensorData.from_numpy(np.array([2, 3, 4, 5])),
            "weights": types.TensorData.from_numpy(np.array([1.0, 1.0, 0.0, 0.5], np.float32)),
        },
    )


def test_a_tinker_loop_trains_saves_and_samples(service: tinker.ServiceClient):
    client = now(service.create_lora_training_client(MODEL, rank=4, seed=1))
    losses = []
    for _ in range(5):
        passed = client.forward_backward([a_datum()] * 3, "cross_entropy")
        client.optim_step(types.AdamParams(learning_rate=0.02))
        losses.append(passed.result().metrics["loss:sum"])
    assert losses[-1] < 0.7 * losses[0]
    [output] = client.forward([a_datum()], "cross_entropy").result().loss_fn_outputs
    trained = output["logprobs"].tolist()

    sampler = now(client.save_weights_and_get_sampling_client())
    prompt = types.ModelInput.from_ints([1, 2, 3, 4, 5])
    assert sampler.compute_logprobs(prompt).result()[1:] == pytest.approx(trained, abs=1e-4)
    greedy = types.SamplingParams(max_tokens=3, temperature=0.0, stop=[])
    samples = sampler.sample(types.ModelInput.from_ints([1]), 2, greedy).result().sequences
    assert [len(sequence.tokens) for sequence in samples] == [3, 3]

    path = client.save_state("from-the-sdk").result().path
    resumed = now(service.create_training_client_from_state_with_optimizer(path))
    [again] = resumed.forward([a_datum()], "cross_entropy").result().loss_fn_outputs
    assert again["logprobs"].tolist() == pytest.approx(trained, abs=1e-5)


def test_the_server_says_what_was_wrong_and_the_run_goes_on(service: tinker.ServiceClient):
    client = now(service.create_lora_training_client(MODEL, rank=2))
    with pytest.raises(
        tinker.BadRequestError, match="'nonsense' is not known here; use one of cispo, cross_entropy"
    ):
        client.forward_backward([a_datum()], "nonsense").result()  # pyright: ignore[reportArgumentType]
    assert client.forward_backward([a_datum()], "cross_entropy").result().metrics["loss:sum"] > 0
