"""What the rest client shows and does, over HTTP and in local mode."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from peft_reference import MODEL, random_batch
from safetensors.numpy import load_file

from twinkle.protocol.errors import InvalidRequest, NotFound
from twinkle.protocol.types import SamplingParams


@pytest.fixture
def service(verbs):
    return verbs.connect(f"rest {uuid.uuid4().hex}" if verbs.has_tenants else "a")


def test_checkpoints_are_published_timed_copied_and_downloaded(service, tmp_path: Path):
    rest = service.create_rest_client()
    client = service.create_lora_training_client(MODEL, rank=2, seed=1)
    client.forward_backward(random_batch(1, (8,)))
    client.optim_step(learning_rate=0.01)
    name = f"kept-{uuid.uuid4().hex[:8]}"
    path = client.save_state(name).path

    def shown():
        return rest.list_checkpoints(client.model_id).checkpoints[0]

    rest.publish_checkpoint(path)
    assert shown().public
    rest.unpublish_checkpoint(path)
    rest.set_checkpoint_ttl(path, 600)
    assert not shown().public and shown().expires_at is not None
    rest.set_checkpoint_ttl(path, None)
    assert shown().expires_at is None

    copy = rest.copy_weights(path, destination_project_id="elsewhere")
    files = rest.download_checkpoint(path, tmp_path / "original")
    copied = rest.download_checkpoint(copy, tmp_path / "copy")
    ours, theirs = (load_file(place / "adapter_model.safetensors") for place in (files, copied))
    assert ours and all((ours[key] == theirs[key]).all() for key in ours)
    # The class that this model's config.json names has the text model inside a larger one.
    serving = rest.download_checkpoint(path, tmp_path / "serving", layout="serving")
    theirs = load_file(serving / "adapter_model.safetensors")
    names = {key: key.replace(".model.model.layers.", ".model.model.language_model.layers.") for key in ours}
    assert theirs.keys() == set(names.values()) != ours.keys()
    assert all((theirs[names[key]] == ours[key]).all() for key in ours)
    assert len(list(serving.iterdir())) == 2
    with pytest.raises(InvalidRequest, match="layout: 'other' is not one of peft, serving, tinker"):
        rest.download_checkpoint(path, tmp_path / "serving", layout="other")
    rest.delete_checkpoint(path)
    with pytest.raises(NotFound):
        rest.get_weights_info(path)
    assert rest.get_weights_info(copy).lora_rank == 2
    with pytest.raises(InvalidRequest, match="could mean several"):
        rest.publish_checkpoint(f"twinkle://{name}")

    exported = client.save_weights_external(f"out-{uuid.uuid4().hex[:8]}").result()
    assert exported.size_bytes > 0
    assert (rest.download_checkpoint(exported.path, tmp_path / "out") / "adapter_config.json").is_file()


def test_sessions_usage_and_audit(service):
    rest = service.create_rest_client()
    client = service.create_lora_training_client(MODEL, rank=2)
    session_id = client.model_id.split(":")[0]
    assert session_id in rest.list_sessions(limit=3)
    assert client.model_id in rest.get_session(session_id).training_run_ids
    rest.assign_session_project(session_id, "the project")
    [summary] = rest.search_sessions(session_id=session_id)
    assert summary.project_id == "the project" and summary.status is not None
    assert client.model_id in [
        run.training_run_id for run in rest.list_training_runs(project_id="the project").training_runs
    ]
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)

    def tokens() -> int:
        usage = rest.get_usage(hour - timedelta(hours=1), hour + timedelta(hours=2))
        return sum(e.event_info.token_count or 0 for e in usage.data if e.session_id == session_id)

    before = tokens()
    client.forward_backward(random_batch(1, (8, 4))).result()
    assert tokens() - before == 12
    client.save_state(f"audited-{uuid.uuid4().hex[:8]}").result()
    assert any(entry.model_id == client.model_id for entry in rest.get_audit_log().entries)
    assert any(item.project_id == "the project" for item in rest.get_storage_usage().data)


def test_a_sample_that_is_given_up_stops_and_others_go_on(service):
    sampler = service.create_sampling_client(base_model=MODEL)
    long = sampler.sample([1, 2], 4, SamplingParams(max_tokens=200, stop=[]))
    short = sampler.sample([1, 2], 1, SamplingParams(max_tokens=3, stop=[], seed=1))
    assert long.cancel()
    assert len(short.sequences[0].tokens) == 3
    assert service.create_rest_client().get_sampler(sampler.sampling_session_id).base_model == MODEL


def test_prompts_are_scored_in_other_ways_too(service):
    sampler = service.create_sampling_client(base_model=MODEL)
    prompt = [10, 20, 30, 40]
    plain = sampler.compute_logprobs(prompt).result()
    result = sampler.sample(
        prompt,
        1,
        SamplingParams(max_tokens=1, seed=5),
        include_prompt_logprobs=True,
        target_prompt_logprobs=[[20, -1], [-1, -1], [40, 40]],
        prompt_alt_tokens_k=4,
        prompt_logprobs_last_n=1,
    ).result()
    assert result.prompt_logprobs is not None and result.prompt_logprobs[:3] == [None] * 3
    assert result.prompt_logprobs[3] == pytest.approx(plain[3], abs=1e-5)
    scores = result.target_prompt_logprobs.to_numpy()
    assert scores[0].tolist() == pytest.approx([plain[1], 0.0], abs=1e-5)
    assert scores[2].tolist() == pytest.approx([plain[3], plain[3]], abs=1e-5)
    assert result.prompt_alt_tokens.tokens.shape == [3, 4]
