import pytest

from twinkle.protocol.errors import InvalidRequest
from twinkle_client import init_twinkle_client
from twinkle_client.settings import resolve


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch):
    for name in ("TWINKLE_BASE_URL", "TWINKLE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    init_twinkle_client()
    yield
    init_twinkle_client()


def test_an_address_without_a_scheme_is_said_to_lack_it():
    with pytest.raises(InvalidRequest, match="'gpu-host:8000' must begin with http"):
        resolve("gpu-host:8000", None)


def test_arguments_then_init_then_environment_then_localhost(monkeypatch: pytest.MonkeyPatch):
    assert resolve(None, None).base_url == "http://localhost:8000"
    assert resolve(None, None).api_key is None
    monkeypatch.setenv("TWINKLE_BASE_URL", "http://from-env/")
    monkeypatch.setenv("TWINKLE_API_KEY", "env-key")
    assert resolve(None, None) == resolve("http://from-env", "env-key")
    init_twinkle_client("http://from-init", "init-key")
    assert resolve(None, None) == resolve("http://from-init", "init-key")
    assert resolve("http://argument", "k").base_url == "http://argument"
