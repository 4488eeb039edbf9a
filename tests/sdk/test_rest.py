"""Lists, checkpoints, sessions and accounts."""

from __future__ import annotations

import io
import tarfile
import urllib.request
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import tinker
from tinker import types
from tinker_sdk import MODEL, SDK_VERSION, now


def run_of(path: str) -> str:
    return path.split("/")[2]


@pytest.fixture
def rest(sdk):
    return sdk.rest()


def test_capabilities(service):
    [model] = service.get_server_capabilities().supported_models
    assert (model.model_name, model.max_context_length) == (MODEL, 256)


def test_runs_and_checkpoints_are_listed_in_pages(train, rest, sdk):
    client = train(user_metadata={"n": 1})
    paths = [client.save_state(f"state-{i}").result().path for i in range(3)]
    sampler_path = client.save_weights_for_sampler("for-sampling").result().path
    client.save_weights_and_get_sampling_client()

    page = rest.list_training_runs(limit=1).result()
    assert [run.training_run_id for run in page.training_runs] == [client.model_id]
    assert page.cursor.total_count >= 1
    run = rest.get_training_run_by_tinker_path(sdk.path(paths[0])).result()
    assert run.last_checkpoint.tinker_path == paths[2]
    assert run.last_sampler_checkpoint.tinker_path == sampler_path
    assert run.user_metadata == {"n": "1"}, "the SDK reads texts only"

    listed = rest.list_checkpoints(client.model_id).result().checkpoints
    assert [c.tinker_path for c in listed] == [sampler_path, *reversed(paths)]
    assert [c.checkpoint_type for c in listed] == ["sampler", "training", "training", "training"]
    assert all(c.size_bytes > 0 and c.expires_at is None and not c.public for c in listed)
    first = rest.list_user_checkpoints(limit=2, offset=1).result()
    assert [c.tinker_path for c in first.checkpoints] == [paths[2], paths[1]]

    rest.delete_checkpoint_from_tinker_path(sdk.path(paths[2])).result()
    rest.delete_checkpoint(client.model_id, "weights/state-1").result()
    left = rest.list_checkpoints(client.model_id).result().checkpoints
    assert [c.tinker_path for c in left] == [sampler_path, paths[0]]
    with pytest.raises(tinker.NotFoundError):
        rest.delete_checkpoint_from_tinker_path(sdk.path(paths[2])).result()


def test_what_is_published_can_be_read_by_others_until_it_is_not(train, rest, sdk, base_url, monkeypatch):
    client = train()
    path = client.save_state("shared").result().path
    stranger: Any = tinker.ServiceClient(base_url=base_url, api_key=f"tml-{uuid.uuid4().hex}")
    with pytest.raises(tinker.NotFoundError):
        now(stranger.create_sampling_client(model_path=sdk.path(path)))
    rest.publish_checkpoint_from_tinker_path(sdk.path(path)).result()
    rest.publish_checkpoint_from_tinker_path(sdk.path(path)).result()  # once more changes nothing
    assert rest.list_checkpoints(client.model_id).result().checkpoints[0].public
    sampler = now(stranger.create_sampling_client(model_path=sdk.path(path)))
    assert sampler.sample(types.ModelInput.from_ints([1]), 1, types.SamplingParams(max_tokens=1)).result()
    other_rest = stranger.create_rest_client()
    assert other_rest.get_weights_info_by_tinker_path(path).result().base_model == MODEL
    with pytest.raises(tinker.NotFoundError, match="another tenant's"):
        other_rest.delete_checkpoint_from_tinker_path(sdk.path(path)).result()
    with pytest.raises(tinker.NotFoundError):
        other_rest.get_training_run(client.model_id).result()
    assert other_rest.get_training_run(client.model_id, access_scope="accessible").result()
    rest.unpublish_checkpoint_from_tinker_path(sdk.path(path)).result()
    with pytest.raises(tinker.NotFoundError):
        now(stranger.create_sampling_client(model_path=sdk.path(path)))


def test_a_ttl_is_set_and_taken_away(train, rest, sdk):
    client = train()
    path = client.save_state("timed").result().path
    rest.set_checkpoint_ttl_from_tinker_path(sdk.path(path), 3600).result()
    [checkpoint] = rest.list_checkpoints(client.model_id).result().checkpoints
    left = checkpoint.expires_at - datetime.now(UTC)
    assert timedelta(minutes=55) < left <= timedelta(hours=1)
    rest.set_checkpoint_ttl_from_tinker_path(sdk.path(path), None).result()
    assert rest.list_checkpoints(client.model_id).result().checkpoints[0].expires_at is None


@pytest.mark.since(0, 27)
def test_weights_are_copied(train, rest, sdk):
    service = sdk.service(project_id="project")
    client = train()
    path = client.save_state("original").result().path
    copied = service.copy_weights(sdk.path(path)).result()
    assert run_of(copied) != client.model_id and copied.endswith("/weights/original")
    resumed = now(service.create_training_client_from_state(sdk.path(copied)))
    assert resumed.get_info().lora_rank == 4
    rest.delete_checkpoint_from_tinker_path(sdk.path(path)).result()
    assert rest.get_weights_info_by_tinker_path(copied).result().lora_rank == 4
    with pytest.raises(tinker.NotFoundError):
        service.copy_weights(sdk.path(path)).result()


def test_another_tenants_checkpoint_is_loaded_with_its_token(train, base_url, sdk):
    path = train().save_state("private").result().path
    friend: Any = tinker.ServiceClient(base_url=base_url, api_key=f"tml-{uuid.uuid4().hex}")
    with pytest.raises(tinker.NotFoundError):
        now(friend.create_training_client_from_state(sdk.path(path)))
    resumed = now(friend.create_training_client_from_state(sdk.path(path), weights_access_token=sdk.api_key))
    assert resumed.get_info().lora_rank == 4


def test_sessions(sdk, rest):
    name = f"session {uuid.uuid4().hex[:8]}"
    settings: dict[str, Any] = {"user_metadata": {"team": "blue"}, "project_id": "project-1"}
    if SDK_VERSION >= (0, 34):
        settings["display_name"] = name
    client = sdk.service(**settings)
    training = now(client.create_lora_training_client(MODEL, rank=2))
    now(client.create_sampling_client(base_model=MODEL))
    session_id = training.model_id.split(":")[0]
    assert session_id in rest.list_sessions(limit=5).result().sessions
    found = rest.get_session(session_id).result()
    assert found.training_run_ids == [training.model_id]
    assert len(found.sampler_ids) == 1
    assert rest.get_sampler(found.sampler_ids[0]).result().base_model == MODEL
    assert found.user_metadata == {"team": "blue"}
    rest.assign_session_project(session_id, "project-2").result()
    runs = rest.list_training_runs(project_id="project-2").result().training_runs
    assert [run.training_run_id for run in runs][:1] == [training.model_id]
    with pytest.raises(Exception, match="records no traces"):
        rest.export_session_trace(session_id).result()
    if hasattr(client, "close"):
        client.close("errored", "it went wrong")
        assert rest.get_session(session_id).result().training_run_ids == [training.model_id]


@pytest.mark.since(0, 36)
def test_sessions_are_searched(sdk, rest):
    mark = uuid.uuid4().hex
    clients = [sdk.service(display_name=f"Search {mark} {i}", user_metadata={"i": str(i)}) for i in range(3)]
    for client in clients:
        now(client.create_sampling_client(base_model=MODEL))
    clients[0].close("interrupted", "by hand")

    def search(**conditions):
        return rest.search_sessions(types.SessionSearchRequest(**conditions)).result()

    assert len(search(display_name=f"search {mark}").sessions) == 3
    first = search(display_name=mark, limit=2)
    second = search(display_name=mark, limit=2, cursor=first.next_cursor)
    names = [s.display_name for s in (*first.sessions, *second.sessions)]
    assert names == [f"Search {mark} {i}" for i in (2, 1, 0)]
    assert second.next_cursor is None
    [finished] = search(display_name=mark, statuses=[{"type": "client_finished"}]).sessions
    assert finished.status.reason.type == "interrupted" and finished.status.detail == "by hand"
    assert len(search(display_name=mark, statuses=[{"type": "active"}]).sessions) == 2
    assert len(search(display_name=mark, user_metadata={"i": "1"}).sessions) == 1
    assert search(display_name=mark, project_ids=["none"]).sessions == []


def test_accounts(train, rest, sdk):
    client = train()
    inputs: Any = {"target_tokens": [2, 3, 4], "weights": [1.0, 1.0, 1.0]}
    data = types.Datum(model_input=types.ModelInput.from_ints([1, 2, 3]), loss_fn_inputs=inputs)
    client.forward_backward([data] * 5, "cross_entropy").result()
    client.save_state("counted").result()
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    session_id = client.model_id.split(":")[0]
    usage = rest.get_billing_usage(hour - timedelta(hours=1), hour + timedelta(hours=1)).result()
    mine = {e.event_info.type: e for e in usage.data if e.session_id == session_id}
    assert mine["training"].event_info.token_count == 15
    assert getattr(mine["training"], "estimated_cost_usd", None) is None, "nobody has set prices"
    assert mine["checkpoint"].event_info.count == 1
    assert session_id in usage.sessions
    entries = rest.get_audit_log(event_type="checkpoints").result().entries
    assert any(
        e.event == "checkpoint_create" and client.model_id in e.event_details["tinker_path"] for e in entries
    )
    assert rest.get_audit_log(event_type="teams").result().entries == []
    with pytest.raises(tinker.BadRequestError, match="on the hour"):
        rest.get_billing_usage(hour + timedelta(minutes=1), hour + timedelta(hours=1)).result()
    who = rest.whoami().result()
    assert who.user_urn.startswith("t-")


@pytest.mark.since(0, 36)
def test_storage(train, sdk):
    client = train()
    client.save_state("stored").result()
    # Without arguments it would be the process's first one, whatever the environment says by now.
    admin = tinker.AdminClient(base_url=sdk.base_url, api_key=sdk.api_key)
    usage = admin.get_current_checkpoint_storage_usage().result()
    assert sum(item.checkpoint_count for item in usage.data) >= 1
    assert all(item.size_bytes > 0 for item in usage.data)


def test_an_archive_is_a_tar_of_peft_files(train, sdk, base_url):
    """Later SDKs don't ask for it; the address stays for those before 0.36."""
    client = train(rank=2)
    path = client.save_weights_for_sampler("packed").result().path
    rest = sdk.rest()
    if hasattr(rest, "get_checkpoint_archive_url_from_tinker_path"):
        reply = rest.get_checkpoint_archive_url_from_tinker_path(sdk.path(path)).result()
        assert reply.expires > datetime.now(UTC)
        url = reply.url
    else:
        place = (
            f"{base_url}/api/v1/training_runs/{client.model_id}/checkpoints/sampler_weights/packed/archive"
        )
        url = urllib.request.Request(place, headers={"X-API-Key": sdk.api_key})
    with tarfile.open(fileobj=io.BytesIO(urllib.request.urlopen(url, timeout=30).read())) as archive:
        files = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
        assert sorted(archive.getnames()) == files
        extracted = archive.extractfile("adapter_config.json")
        assert extracted is not None and b'"r": 2' in extracted.read()
