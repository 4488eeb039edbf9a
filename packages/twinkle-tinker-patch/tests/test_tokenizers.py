"""Tokenizers without a hub: the real SDK and Transformers, and a server in this process that has the files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import tinker
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from twinkle_tinker_patch import init_tinker_client

if TYPE_CHECKING:
    from conftest import RecordingServer

BASE_MODEL = "twinkle-tests/not-on-any-hub"
TEXT = "to be or not to be"


@pytest.fixture(autouse=True)
def a_cache_of_ones_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def save_tokenizer(folder: Path, words: str) -> Path:
    vocabulary = {word: number for number, word in enumerate(["[UNK]", *words.split()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
    fast.chat_template = "{% for message in messages %}<{{ message['content'] }}>{% endfor %}"
    fast.save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer_dir(tmp_path: Path) -> Path:
    return save_tokenizer(tmp_path / "on-the-server", "to be or not")


@pytest.fixture
def offering(server: RecordingServer, tokenizer_dir: Path) -> RecordingServer:
    """The server, with the tokenizer's files on offer."""
    files = {path.name: path.read_bytes() for path in tokenizer_dir.iterdir()}
    server.files = {f"/files/{name}": content for name, content in files.items()}
    server.replies["/tokenizer_urls"] = {
        "urls": {name: f"{server.base_url}/files/{name}" for name in files},
        "expires": "2030-01-01T00:00:00Z",
    }
    return server


def finished(client: Any) -> Any:
    """The client itself, which comes as a future since 0.38."""
    return client.result(timeout=60) if hasattr(client, "result") else client


def sampling_client(server: RecordingServer) -> tinker.SamplingClient:
    service = tinker.ServiceClient(base_url=server.base_url, api_key="sk-any")
    return finished(service.create_sampling_client(base_model=BASE_MODEL))


def training_client(server: RecordingServer) -> tinker.TrainingClient:
    service = tinker.ServiceClient(base_url=server.base_url, api_key="sk-any")
    return finished(service.create_lora_training_client(base_model=BASE_MODEL, rank=8))


def expected(tokenizer_dir: Path) -> list[int]:
    return AutoTokenizer.from_pretrained(tokenizer_dir).encode(TEXT)


@pytest.mark.parametrize("make_client", [sampling_client, training_client])
def test_a_tokenizer_that_no_hub_has_comes_from_the_server(
    offering: RecordingServer, tokenizer_dir: Path, make_client: Any
) -> None:
    init_tinker_client()
    tokenizer = make_client(offering).get_tokenizer()
    assert tokenizer.encode(TEXT) == expected(tokenizer_dir)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "to"}], tokenize=False) == "<to>"
    asked = offering.only("/tokenizer_urls")
    assert (asked.query, asked.api_key) == ({"base_model": BASE_MODEL}, "sk-any")
    assert {request.api_key for request in offering.seen if request.path.startswith("/files/")} == {None}


def test_a_file_is_fetched_once_for_all_clients_of_a_server(offering: RecordingServer) -> None:
    init_tinker_client()
    first = sampling_client(offering)
    assert first.get_tokenizer().encode(TEXT) == first.get_tokenizer().encode(TEXT)
    sampling_client(offering).get_tokenizer()
    assert len(offering.asked("/files/tokenizer.json")) == 1


def test_two_servers_dont_share_what_they_call_by_the_same_name(
    offering: RecordingServer, tokenizer_dir: Path, tmp_path: Path
) -> None:
    init_tinker_client()
    sampling_client(offering).get_tokenizer()
    other = save_tokenizer(tmp_path / "other", "not or be to")
    offering.files = {f"/files/{path.name}": path.read_bytes() for path in other.iterdir()}
    # The same machine by another name is another address.
    service = tinker.ServiceClient(
        base_url=offering.base_url.replace("127.0.0.1", "localhost"), api_key="sk-any"
    )
    tokenizer = finished(service.create_sampling_client(base_model=BASE_MODEL)).get_tokenizer()
    assert tokenizer.encode(TEXT) == expected(other) != expected(tokenizer_dir)


@pytest.mark.parametrize("make_client", [sampling_client, training_client])
def test_the_hub_root_comes_first(
    offering: RecordingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_client: Any
) -> None:
    local = save_tokenizer(tmp_path / "hub" / BASE_MODEL, "not or be to")
    monkeypatch.setenv("TWINKLE_HUB_ROOT", str(tmp_path / "hub"))
    init_tinker_client()
    assert make_client(offering).get_tokenizer().encode(TEXT) == expected(local)
    assert not offering.asked("/tokenizer_urls")


def test_a_hub_root_without_the_model_is_passed_over(
    offering: RecordingServer, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWINKLE_HUB_ROOT", str(tmp_path))
    init_tinker_client()
    assert sampling_client(offering).get_tokenizer().encode(TEXT) == expected(tokenizer_dir)


def test_what_the_sdk_finds_by_itself_is_not_asked_of_the_server(
    offering: RecordingServer, tmp_path: Path
) -> None:
    local = str(save_tokenizer(tmp_path / "found", "not or be to"))
    offering.replies["/get_info"]["model_data"]["tokenizer_id"] = local
    init_tinker_client()
    assert training_client(offering).get_tokenizer().encode(TEXT) == expected(Path(local))
    assert not offering.asked("/tokenizer_urls")


def test_a_server_without_it_leaves_the_sdks_error_and_says_so(
    server: RecordingServer, tmp_path: Path
) -> None:
    server.statuses["/tokenizer_urls"] = 404
    init_tinker_client()
    with pytest.raises(OSError, match="couldn't connect") as caught:
        sampling_client(server).get_tokenizer()
    assert "asked for the tokenizer of twinkle-tests/not-on-any-hub" in caught.value.__notes__[0]
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "name", ["../tokenizer.json", "/etc/passwd", "a/b.json", "..", "", "a\\b", ".hidden"]
)
def test_a_file_name_that_is_a_path_is_refused(offering: RecordingServer, tmp_path: Path, name: str) -> None:
    offering.replies["/tokenizer_urls"]["urls"][name] = f"{offering.base_url}/files/tokenizer.json"
    init_tinker_client()
    with pytest.raises(OSError) as caught:
        sampling_client(offering).get_tokenizer()
    assert repr(name) in caught.value.__notes__[0]
    assert not [request for request in offering.seen if request.path.startswith("/files/")]


def test_a_broken_download_leaves_nothing_and_the_next_one_works(
    offering: RecordingServer, tokenizer_dir: Path, tmp_path: Path
) -> None:
    offering.statuses["/files/tokenizer_config.json"] = 403
    init_tinker_client()
    client = sampling_client(offering)
    with pytest.raises(OSError) as caught:
        client.get_tokenizer()
    assert "403" in caught.value.__notes__[0]
    assert not list((tmp_path / "cache" / "twinkle" / "tokenizers").iterdir())
    offering.statuses.clear()
    assert client.get_tokenizer().encode(TEXT) == expected(tokenizer_dir)
