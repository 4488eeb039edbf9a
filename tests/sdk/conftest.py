"""The real Tinker SDK, as it comes and opened by the patch, against a real server.

The same tests run under an older SDK too (`test_older_sdk.py`), in another environment, against the server of this one:
TWINKLE_TEST_BASE_URL names it then.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tinker_sdk import MODEL, SDK_VERSION, Sdk, now


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.serve)
            since = item.get_closest_marker("since")
            if since is not None and since.args > SDK_VERSION:
                item.add_marker(pytest.mark.skip(f"SDK {'.'.join(map(str, SDK_VERSION))} has no such thing"))


@pytest.fixture(scope="session")
def base_url(request: pytest.FixtureRequest) -> str:
    given = os.environ.get("TWINKLE_TEST_BASE_URL")
    return given or request.getfixturevalue("live_server").base_url


@pytest.fixture(params=["unpatched", "patched"])
def sdk(request: pytest.FixtureRequest, base_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sdk]:
    """Unpatched: two environment variables. Patched: any key, and twinkle:// paths."""
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    for name in ("TINKER_CREDENTIAL_CMD", "TINKER_PROJECT_ID", "TINKER_TAGS"):
        monkeypatch.delenv(name, raising=False)
    if request.param == "unpatched":
        monkeypatch.setenv("TINKER_BASE_URL", base_url)
        sdk = Sdk(False, base_url)
        monkeypatch.setenv("TINKER_API_KEY", sdk.api_key)
        yield sdk
        return
    import twinkle_tinker_patch

    for name in ("TINKER_BASE_URL", "TINKER_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    sdk = Sdk(True, base_url)
    twinkle_tinker_patch.init_tinker_client(base_url, sdk.api_key)
    yield sdk
    twinkle_tinker_patch.unpatch()


@pytest.fixture
def service(sdk: Sdk) -> Iterator[Any]:
    client = sdk.service()
    yield client
    if hasattr(client, "close"):
        client.close("success")


@pytest.fixture
def train(service: Any) -> Callable[..., Any]:
    """Makes training clients."""

    def make(**settings: Any) -> Any:
        return now(service.create_lora_training_client(MODEL, **{"rank": 4, "seed": 1, **settings}))

    return make


@pytest.fixture(scope="session")
def model_dir(request: pytest.FixtureRequest) -> Path:
    """The base model that the server holds."""
    given = os.environ.get("TWINKLE_TEST_MODEL")
    return Path(given) if given else request.getfixturevalue("mission_model_dir")


@pytest.fixture(scope="session")
def base_logprobs(model_dir: Path) -> Callable[..., np.ndarray]:
    """Log-softmax of the plain Transformers model, float32 [T, vocabulary] for T tokens: row t is of the token after t.

    A new adapter changes nothing, so these are also those of a new training client.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)

    def compute(tokens: list[int], temperature: float = 1.0) -> np.ndarray:
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0]
        return torch.log_softmax(logits / temperature, dim=-1).numpy()

    return compute
