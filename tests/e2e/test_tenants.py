"""What a tenant may see of another: nothing, with the same words as for what never was."""

import httpx
import pytest
from peft_reference import MODEL, random_batch

from twinkle.protocol.errors import NotFound
from twinkle_client import ServiceClient

pytestmark = pytest.mark.serve


def test_another_key_finds_neither_run_nor_checkpoint_nor_sampler(live_server):
    with (
        ServiceClient(live_server.base_url, api_key="alice") as alice,
        ServiceClient(live_server.base_url, api_key="bob") as bob,
    ):
        run = alice.create_lora_training_client(MODEL, rank=2)
        path = run.save_state("private").path
        sampler = alice.create_sampling_client(model_path=path)

        intruder = bob.create_lora_training_client(MODEL, rank=2)
        intruder.model_id = run.model_id
        with pytest.raises(NotFound):
            intruder.forward_backward(random_batch(1, (4,))).result()
        with pytest.raises(NotFound):
            intruder.get_info()
        with pytest.raises(NotFound):
            bob.create_sampling_client(model_path=path)
        with pytest.raises(NotFound):
            bob.create_sampling_client(model_path="twinkle://private")
        with pytest.raises(NotFound):
            bob.create_training_client_from_state(path)
        with pytest.raises(NotFound):
            bob.create_rest_client().delete_checkpoint(path)
        foreign = bob.create_sampling_client(base_model=MODEL)
        foreign.sampling_session_id = sampler.sampling_session_id
        with pytest.raises(NotFound):
            foreign.sample([1, 2]).result()

        assert [c.tinker_path for c in bob.create_rest_client().list_user_checkpoints().checkpoints] == []
        listed = alice.create_rest_client().list_user_checkpoints().checkpoints
        assert [c.checkpoint_id for c in listed] == ["weights/private"]
        # ... and the owner noticed nothing.
        assert run.forward_backward(random_batch(1, (4,))).metrics["loss:sum"] != 0


def test_a_promise_is_its_tenants_own(live_server):
    def post(key: str, path: str, **body) -> httpx.Response:
        return httpx.post(
            f"{live_server.base_url}/api/v1/{path}", json=body, headers={"X-API-Key": key}, timeout=60
        )

    session = post("alice", "create_session").json()["session_id"]
    promise = post("alice", "create_model", session_id=session, model_seq_id=0, base_model=MODEL).json()
    foreign = post("bob", "retrieve_future", request_id=promise["request_id"])
    assert foreign.status_code == 404
    assert foreign.json()["category"] == "user"
    mine = post("alice", "retrieve_future", request_id=promise["request_id"])
    assert mine.json()["model_id"] == f"{session}:train:0"
