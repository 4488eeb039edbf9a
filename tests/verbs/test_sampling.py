"""Sampling through the verbs against Transformers and PEFT."""

import json
import os
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from peft_reference import MODEL, VOCAB, peft_model, random_batch

from twinkle.protocol.errors import NotFound
from twinkle.protocol.types import SamplingParams


def trained(verbs, seed: int, steps: int = 3):
    client = verbs.connect("sampling").create_lora_training_client(MODEL, rank=4, seed=seed)
    for step in range(steps):
        client.forward_backward(random_batch(seed + step, (20, 25)))
        client.optim_step(learning_rate=0.02)
    return client


def test_greedy_samples_equal_generate_with_the_peft_adapter(verbs, hub_root: Path):
    client = trained(verbs, seed=21)
    path = client.save_state("greedy").path
    model = peft_model(hub_root, verbs.directory(path))
    sampler = verbs.connect("sampling").create_sampling_client(model_path=path)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCAB, n).tolist() for n in (3, 11, 30)]
    pending = [sampler.sample(p, 1, SamplingParams(max_tokens=24, temperature=0)) for p in prompts]
    for prompt, sampled in zip(prompts, pending, strict=True):
        with torch.no_grad():
            tokens = torch.tensor([prompt])
            mask = torch.ones_like(tokens)  # it would take the pad token's id for padding
            expected = model.generate(tokens, attention_mask=mask, max_new_tokens=24, do_sample=False)[
                0, len(prompt) :
            ]
        assert sampled.sequences[0].tokens == expected.tolist()
        assert len(sampled.sequences[0].logprobs) == len(sampled.sequences[0].tokens)


def test_the_sampler_agrees_with_the_trainer(verbs):
    client = trained(verbs, seed=31)
    [datum] = random_batch(5, (40,))
    tokens = [*datum.model_input.to_ints(), int(datum.loss_fn_inputs["target_tokens"].array[-1])]
    # forward's targets are the next tokens only if the datum says so
    shifted = type(datum)(
        datum.model_input, {"target_tokens": np.array(tokens[1:]), "weights": np.ones(40, np.float32)}
    )
    expected = client.forward([shifted]).loss_fn_outputs[0]["logprobs"].to_numpy()
    logprobs = client.save_weights_and_get_sampling_client().compute_logprobs(tokens).result()
    assert logprobs[0] is None
    np.testing.assert_allclose(logprobs[1:], expected, atol=1e-4)


def test_a_snapshot_is_immutable_and_sampling_it_leaves_the_training_weights_alone(verbs):
    client = trained(verbs, seed=41)
    [datum] = random_batch(6, (30,))
    tokens = datum.model_input.to_ints()
    old = client.save_weights_and_get_sampling_client()
    before = old.compute_logprobs(tokens).result()
    client.forward_backward(random_batch(42, (30,)))
    client.optim_step(learning_rate=0.1)
    training = client.forward([datum]).metrics["loss:sum"]
    assert old.compute_logprobs(tokens).result() == before
    new = client.save_weights_and_get_sampling_client().compute_logprobs(tokens).result()
    assert not np.allclose(new[1:], before[1:], atol=1e-3)
    assert client.forward([datum]).metrics["loss:sum"] == training


def test_a_seed_reproduces_and_its_samples_differ(verbs):
    sampler = verbs.connect("sampling").create_sampling_client(base_model=MODEL)
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=7, stop=[])
    first = sampler.sample([1, 2, 3], 4, params)
    again = sampler.sample([1, 2, 3], 4, params)
    assert [s.tokens for s in first.sequences] == [s.tokens for s in again.sequences]
    assert len({tuple(s.tokens) for s in first.sequences}) == 4
    assert all(s.stop_reason == "length" and len(s.tokens) == 20 for s in first.sequences)


def test_a_checkpoint_is_found_by_its_bare_name_also_right_after_an_unawaited_save(verbs):
    client = trained(verbs, seed=51, steps=1)
    client.save_state("bare-name", overwrite=True)
    sampler = verbs.connect("sampling").create_sampling_client(
        model_path="twinkle://bare-name", base_model=MODEL
    )
    assert sampler.sample([5], 1, SamplingParams(max_tokens=2)).sequences[0].tokens


def test_a_checkpoint_that_is_not_there_is_said_to_be_missing(verbs):
    with pytest.raises(NotFound, match="no checkpoint 'twinkle://never-saved'"):
        verbs.connect("sampling").create_sampling_client(model_path="twinkle://never-saved", base_model=MODEL)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks on this system")
def test_a_forked_process_samples_too_or_is_told_why_not(verbs):
    sampler = verbs.connect("sampling").create_sampling_client(base_model=MODEL)
    greedy = SamplingParams(max_tokens=8, temperature=0)
    prompts = [[1, 2, 3], [4, 5, 6]]
    expected = [sampler.sample(prompt, 1, greedy).sequences[0].tokens for prompt in prompts]
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # Python 3.12 warns of forks where there are threads
        child = os.fork()
    if child == 0:
        try:
            answer = sampler.sample(prompts[0], 1, greedy).sequences[0].tokens
        except BaseException as error:
            answer = str(error)
        os.write(writing, json.dumps(answer).encode())
        os._exit(0)
    os.close(writing)
    # The parent goes on meanwhile, with the number that the child's sample would have had.
    assert sampler.sample(prompts[1], 1, greedy).sequences[0].tokens == expected[1]
    with os.fdopen(reading, "rb") as said:
        answer = json.loads(said.read())
    os.waitpid(child, 0)
    if verbs.has_tenants:
        assert answer == expected[0]
        assert (
            pickle.loads(pickle.dumps(sampler)).sample(prompts[1], 1, greedy).sequences[0].tokens
            == expected[1]
        )
    else:
        assert "runs in the process that forked" in answer
        with pytest.raises(TypeError, match="clients of local mode can't be pickled"):
            pickle.dumps(sampler)
