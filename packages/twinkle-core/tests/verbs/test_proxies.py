"""The proxy that is named is the one that httpx takes."""

import httpx
import pytest

from twinkle.verbs.proxies import proxy_of, through

VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize(
    ("variables", "url", "proxy"),
    [
        ({}, "http://gpu:8000", None),
        ({"http_proxy": "http://p:3128"}, "http://gpu:8000", "http://p:3128"),
        ({"HTTP_PROXY": "p:3128"}, "http://gpu:8000", "http://p:3128"),
        ({"HTTP_PROXY": "http://p:3128"}, "https://gpu", None),
        ({"HTTPS_PROXY": "http://p:3128"}, "https://gpu", "http://p:3128"),
        ({"ALL_PROXY": "http://p:3128"}, "http://gpu:8000", "http://p:3128"),
        ({"ALL_PROXY": "http://p:1", "HTTP_PROXY": "http://q:2"}, "http://gpu:8000", "http://q:2"),
        ({"HTTP_PROXY": "http://me:secret@p:3128"}, "http://gpu:8000", "http://p:3128"),
        ({"HTTP_PROXY": "http://p:3128", "NO_PROXY": "localhost, gpu"}, "http://gpu:8000", None),
        ({"HTTP_PROXY": "http://p:3128", "NO_PROXY": ".lab"}, "http://gpu.lab", None),
        ({"HTTP_PROXY": "http://p:3128", "NO_PROXY": "*"}, "http://gpu:8000", None),
        ({"HTTP_PROXY": "http://p:3128", "NO_PROXY": "127.0.0.1"}, "http://127.0.0.1:8000", None),
        ({"HTTP_PROXY": "http://p:3128", "NO_PROXY": "pu"}, "http://gpu:8000", "http://p:3128"),
    ],
)
def test_it_is_the_one_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], url: str, proxy: str | None
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert proxy_of(url) == proxy
    named = through(url)
    assert named.startswith(f" through the proxy {proxy} ") if proxy else named == ""
    assert "secret" not in named
    with httpx.Client() as client:  # what httpx itself does
        transport = client._transport_for_url(httpx.URL(url))
        taken = getattr(transport, "_pool", None)
    target = getattr(taken, "_proxy_url", None)
    assert (target is None) == (proxy is None)
    if target is not None and proxy is not None:
        assert f"{target.scheme.decode()}://{target.host.decode()}:{target.port}" == proxy
