"""A server says that it is well, also while it works."""

import httpx
import pytest
from peft_reference import MODEL, random_batch

from twinkle_client import ServiceClient

pytestmark = pytest.mark.serve


def test_health_is_answered_while_a_long_pass_runs(live_server):
    with ServiceClient(live_server.base_url, api_key="long") as service:
        client = service.create_lora_training_client(MODEL, rank=8)
        long_pass = client.forward_backward(random_batch(1, (255,) * 300))
        answers = 0
        while not long_pass.done():
            assert httpx.get(f"{live_server.base_url}/api/v1/healthz").status_code == 200
            answers += 1
        assert answers >= 3
        assert len(long_pass.loss_fn_outputs) == 300
