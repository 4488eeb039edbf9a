"""What a training client does, besides its losses."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import tinker
from tinker import types
from tinker_sdk import MODEL, now


def datum(seed: int = 0, length: int = 6) -> types.Datum:
    draw = np.random.default_rng(seed)
    return types.Datum(
        model_input=types.ModelInput.from_ints(draw.integers(1, 400, length).tolist()),
        loss_fn_inputs={
            "target_tokens": types.TensorData.from_numpy(draw.integers(1, 400, length)),
            "weights": types.TensorData.from_numpy(np.ones(length, np.float32)),
        },
    )


def loss(client, data) -> float:
    return client.forward(data, "cross_entropy").result().metrics["loss:sum"]


def learn(client, steps: int = 2, seed: int = 0) -> None:
    for _ in range(steps):
        client.forward_backward([datum(seed)], "cross_entropy").result()
        client.optim_step(types.AdamParams(learning_rate=0.02)).result()


def test_a_batch_of_many_chunks_keeps_its_order(train, base_logprobs):
    """The SDK cuts at 1024 datums, and sends the first chunk last."""
    data = [datum(seed, length=2) for seed in range(7)]
    many = [data[i % 7] for i in range(2100)]
    client = train()
    result = client.forward_backward(many, "cross_entropy").result()
    assert len(result.loss_fn_outputs) == 2100
    singles = client.forward(data, "cross_entropy").result().loss_fn_outputs
    for i, output in enumerate(result.loss_fn_outputs):
        np.testing.assert_allclose(
            output["logprobs"].tolist(), singles[i % 7]["logprobs"].tolist(), atol=1e-4
        )
    tokens, targets = data[0].model_input.to_ints(), data[0].loss_fn_inputs["target_tokens"].tolist()
    np.testing.assert_allclose(
        singles[0]["logprobs"].tolist(), base_logprobs(tokens)[[0, 1], targets], atol=1e-4
    )


def test_lora_settings_are_kept(service, sdk, train):
    client = train(rank=3, train_mlp=False, train_unembed=False, user_metadata={"purpose": "test"})
    info = client.get_info()
    assert (info.lora_rank, info.model_name, info.is_lora) == (3, MODEL, True)
    assert client.model_id.count(":train:") == 1
    path = client.save_state("settings").result().path
    weights = sdk.rest().get_weights_info_by_tinker_path(path).result()
    assert (weights.lora_rank, weights.train_mlp, weights.train_attn, weights.train_unembed) == (
        3,
        False,
        True,
        False,
    )
    run = sdk.rest().get_training_run(client.model_id).result()
    assert run.user_metadata == {"purpose": "test"}


def test_the_same_seed_begins_the_same(train):
    one, two, other = train(seed=5), train(seed=5), train(seed=6)
    for client in (one, two, other):
        learn(client, steps=1)
    assert loss(one, [datum(1)]) == loss(two, [datum(1)])
    assert loss(one, [datum(1)]) != loss(other, [datum(1)])


def test_a_clipped_gradient_moves_less_and_dimuon_is_refused(train):
    client = train()
    client.forward_backward([datum()], "cross_entropy")
    metrics = client.optim_step(types.AdamParams(learning_rate=0.0, grad_clip_norm=1e-3)).result().metrics
    assert metrics["grad_norm:mean"] > 1e-3
    if hasattr(types, "DimuonParams"):
        with pytest.raises(tinker.BadRequestError, match="'dimuon' is not available"):
            client.optim_step(types.DimuonParams(learning_rate=0.1)).result()
    learn(client)


def test_a_step_with_a_gradient_that_is_not_finite_fails_with_a_sentence_and_the_next_one_is_made(train):
    client, other = train(), train()
    too_large = datum()
    too_large.loss_fn_inputs["weights"] = types.TensorData.from_numpy(np.full(6, 3e38, np.float32))
    sent = client.forward_backward([too_large], "cross_entropy").result()
    assert not np.isfinite(sent.metrics["loss:sum"])
    with pytest.raises(tinker.RequestFailedError, match="the gradient is not finite"):
        client.optim_step(types.AdamParams(learning_rate=0.02)).result()
    for one in (client, other):
        learn(one)
    assert loss(client, [datum()]) == pytest.approx(loss(other, [datum()]), rel=1e-6)


def test_saved_states_resume(service, sdk, train):
    client = train()
    learn(client)
    path = client.save_state("resume", user_metadata={"step": "2"}).result().path
    expected = loss(client, [datum(9)])
    learn(client, seed=3)
    assert loss(client, [datum(9)]) != pytest.approx(expected, rel=1e-3)

    plain = now(service.create_training_client_from_state(sdk.path(path)))
    whole = now(service.create_training_client_from_state_with_optimizer(sdk.path(path)))
    assert loss(plain, [datum(9)]) == pytest.approx(expected, rel=1e-5)
    for resumed in (plain, whole):
        learn(resumed, steps=1, seed=3)
    client.load_state_with_optimizer(sdk.path(path)).result()
    learn(client, steps=1, seed=3)
    assert loss(whole, [datum(9)]) == pytest.approx(loss(client, [datum(9)]), rel=1e-5)
    assert loss(plain, [datum(9)]) != pytest.approx(loss(client, [datum(9)]), rel=1e-5)
    client.load_state(sdk.path(path)).result()
    assert loss(client, [datum(9)]) == pytest.approx(expected, rel=1e-5)


def test_a_name_is_taken_until_it_is_overwritten(train):
    client = train()
    client.save_state("name").result()
    with pytest.raises(tinker.RequestFailedError, match="already has a checkpoint 'name'"):
        client.save_state("name").result()
    assert client.save_state("name", overwrite=True).result().path.endswith("/weights/name")
    with pytest.raises(tinker.BadRequestError, match="can't name a checkpoint"):
        client.save_state("../name").result()


def test_a_checkpoint_with_a_ttl_goes_when_its_time_is_over(train, sdk):
    client = train()
    client.save_state("brief", ttl_seconds=1).result()
    rest = sdk.rest()
    deadline = time.monotonic() + 20
    while rest.list_checkpoints(client.model_id).result().checkpoints and time.monotonic() < deadline:
        time.sleep(0.2)
    assert rest.list_checkpoints(client.model_id).result().checkpoints == []
    client.save_state("brief").result()  # the name is free again


def chained(tokens: list[int]) -> types.Datum:
    """Each target is the next token of the prompt, so that a sampler scores the same."""
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": types.TensorData.from_numpy(np.array(tokens[1:])),
            "weights": types.TensorData.from_numpy(np.zeros(len(tokens) - 1, np.float32)),
        },
    )


def test_named_sampler_weights_are_fixed(service, sdk, train):
    client = train()
    learn(client)
    tokens = [5, 6, 7, 8, 9, 10]

    def trained() -> list[float]:
        [output] = client.forward([chained(tokens)], "cross_entropy").result().loss_fn_outputs
        return output["logprobs"].tolist()

    path, expected = client.save_weights_for_sampler("fixed").result().path, trained()
    learn(client, seed=8)
    assert trained() != pytest.approx(expected, abs=1e-3)
    sampler = now(service.create_sampling_client(model_path=sdk.path(path)))
    scored = sampler.compute_logprobs(types.ModelInput.from_ints(tokens)).result()
    assert scored[1:] == pytest.approx(expected, abs=1e-4)


@pytest.mark.since(0, 29)
def test_external_weights_are_peft_files_behind_signed_addresses(sdk, train, tmp_path: Path, model_dir: Path):
    client = train(rank=2)
    learn(client)
    saved = client.save_weights_external("export").result()
    assert "/external_weights/export" in saved.path
    reply = sdk.rest().get_external_weights_urls(sdk.path(saved.path)).result()
    assert set(reply.urls) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    for name, url in reply.urls.items():
        (tmp_path / name).write_bytes(urllib.request.urlopen(url, timeout=30).read())
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 2
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(reply.urls["adapter_config.json"].replace("/download/ey", "/download/ex"))

    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), tmp_path)
    d = datum(2)
    tokens = d.model_input.to_ints()
    with torch.no_grad():
        logprobs = torch.log_softmax(model(torch.tensor([tokens])).logits[0].float(), -1)
    targets = d.loss_fn_inputs["target_tokens"].tolist()
    expected = logprobs[range(len(targets)), targets].tolist()
    [output] = client.forward([d], "cross_entropy").result().loss_fn_outputs
    assert output["logprobs"].tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.since(0, 36)
def test_keys_that_are_none_of_ages_are_refused_by_name(train):
    with pytest.raises(tinker.BadRequestError, match="age_encryption_recipients"):
        train().save_weights_external("x", age_encryption_recipients=["age1abc"]).result()
