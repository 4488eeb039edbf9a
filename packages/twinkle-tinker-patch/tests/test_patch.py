"""The real SDK, against a server in this process (see conftest) that keeps what it was asked."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import tinker
from tinker.types import ParsedCheckpointTinkerPath

from twinkle.protocol.errors import InvalidRequest
from twinkle_tinker_patch import TESTED_VERSIONS, init_tinker_client, patch, unpatch

if TYPE_CHECKING:
    from conftest import RecordingServer

SAVED = {
    "path": "twinkle://session-1:train:0/weights/step-3",
    "run": "session-1:train:0",
}


def open_sampling_session(
    service: tinker.ServiceClient, model_path: str = "tinker://run/sampler_weights/last"
) -> None:
    client = service.create_sampling_client(model_path=model_path, base_model="Qwen/Qwen3.5-4B")
    if hasattr(client, "result"):  # since 0.38
        client.result(timeout=60)


def test_a_program_reaches_the_server_with_a_key_of_any_form(server: RecordingServer) -> None:
    init_tinker_client(base_url=server.base_url, api_key="sk-of-our-own")
    open_sampling_session(tinker.ServiceClient())
    assert {request.api_key for request in server.seen} == {"sk-of-our-own"}


@pytest.mark.parametrize("key", ["sk-1", "tml-2", "eyJ-not-a-token"])
def test_a_key_given_to_the_client_goes_before_the_one_given_here(server: RecordingServer, key: str) -> None:
    init_tinker_client(base_url="http://127.0.0.1:1", api_key="not-this-one")
    open_sampling_session(tinker.ServiceClient(base_url=server.base_url, api_key=key))
    assert {request.api_key for request in server.seen} == {key}


def test_without_any_key_none_is_sent(server: RecordingServer) -> None:
    init_tinker_client()
    open_sampling_session(tinker.ServiceClient(base_url=server.base_url, api_key=None))
    assert {request.api_key for request in server.seen} == {None}


def test_a_key_in_the_environment_stays(server: RecordingServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_API_KEY", "tml-from-the-shell")
    init_tinker_client(base_url=server.base_url)
    open_sampling_session(tinker.ServiceClient())
    assert {request.api_key for request in server.seen} == {"tml-from-the-shell"}


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("twinkle://my-lora-checkpoint", "tinker://my-lora-checkpoint"),
        ("twinkle://run:train:0/sampler_weights/final", "tinker://run:train:0/sampler_weights/final"),
        ("tinker://run:train:0/sampler_weights/final", "tinker://run:train:0/sampler_weights/final"),
    ],
)
def test_sampling_takes_both_schemes(server: RecordingServer, given: str, sent: str) -> None:
    init_tinker_client(base_url=server.base_url, api_key="any")
    open_sampling_session(tinker.ServiceClient(), given)
    assert server.only("/create_sampling_session").body["model_path"] == sent


def test_no_client_goes_to_tinkers_own_service_by_default() -> None:
    init_tinker_client()
    assert os.environ["TINKER_BASE_URL"] == "http://localhost:8000"


def test_the_address_is_the_one_given_then_the_sdks_variable_then_ours(
    server: RecordingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWINKLE_BASE_URL", server.base_url + "/")
    init_tinker_client()
    open_sampling_session(tinker.ServiceClient())
    assert server.seen
    unpatch()
    monkeypatch.setenv("TINKER_BASE_URL", "http://for-the-sdk:1")
    init_tinker_client()
    assert os.environ["TINKER_BASE_URL"] == "http://for-the-sdk:1"
    init_tinker_client(base_url="http://given:2")
    assert os.environ["TINKER_BASE_URL"] == "http://given:2"


def test_an_address_without_a_scheme_is_refused_and_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWINKLE_BASE_URL", "gpu-host:8000")
    before = attributes()
    with pytest.raises(InvalidRequest, match="'gpu-host:8000' must begin with http://"):
        init_tinker_client(api_key="any")
    assert attributes() == before
    assert "TINKER_API_KEY" not in os.environ


def test_twinkles_own_key_is_taken_where_the_sdk_has_none(
    server: RecordingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWINKLE_API_KEY", "sk-twinkle")
    init_tinker_client(base_url=server.base_url)
    open_sampling_session(tinker.ServiceClient())
    assert {request.api_key for request in server.seen} == {"sk-twinkle"}


def test_a_credential_command_keeps_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_CREDENTIAL_CMD", "echo a-key")
    monkeypatch.setenv("TWINKLE_API_KEY", "sk-twinkle")
    init_tinker_client()
    assert "TINKER_API_KEY" not in os.environ


@pytest.mark.filterwarnings("ignore:.*create_rest_client:FutureWarning")
def test_rest_methods_take_both_schemes(server: RecordingServer) -> None:
    init_tinker_client(base_url=server.base_url, api_key="any")
    service = tinker.ServiceClient()
    rest = service.create_rest_client()  # pyright: ignore[reportDeprecated]  # 0.30 has no other way
    rest.delete_checkpoint_from_tinker_path(SAVED["path"]).result(timeout=60)
    rest.publish_checkpoint_from_tinker_path(SAVED["path"]).result(timeout=60)
    checkpoint = f"/training_runs/{SAVED['run']}/checkpoints/weights/step-3"
    assert server.only(checkpoint).api_key == "any"
    assert server.only(checkpoint + "/publish").api_key == "any"


@pytest.mark.skipif(
    not hasattr(tinker.types.SaveWeightsResponse, "get_console_url"),
    reason="this SDK has no console addresses",
)
def test_a_saved_path_of_our_scheme_has_a_console_url() -> None:
    init_tinker_client()
    saved = tinker.types.SaveWeightsResponse(path=SAVED["path"])
    assert (
        saved.get_console_url()
        == tinker.types.SaveWeightsResponse(path=SAVED["path"].replace("twinkle", "tinker")).get_console_url()
    )


def test_the_command_line_takes_both_schemes(
    server: RecordingServer, capsys: pytest.CaptureFixture[str]
) -> None:
    init_tinker_client(base_url=server.base_url, api_key="any")
    command_line = import_module("tinker.cli.__main__").main_cli
    command_line(["checkpoint", "publish", SAVED["path"]], standalone_mode=False)
    assert server.only(f"/training_runs/{SAVED['run']}/checkpoints/weights/step-3/publish").api_key == "any"
    unpatch()
    with pytest.raises(Exception, match="Invalid checkpoint path: twinkle://"):
        command_line(["checkpoint", "publish", SAVED["path"]], standalone_mode=False)


def test_checkpoint_paths_of_both_schemes_parse_to_what_was_given() -> None:
    init_tinker_client()
    parsed = ParsedCheckpointTinkerPath.from_tinker_path("twinkle://run/weights/step-3")
    assert (parsed.training_run_id, parsed.checkpoint_type, parsed.checkpoint_id) == (
        "run",
        "training",
        "weights/step-3",
    )
    assert parsed.tinker_path == "twinkle://run/weights/step-3"
    with pytest.raises(ValueError, match="https://run/weights/step-3"):
        ParsedCheckpointTinkerPath.from_tinker_path("https://run/weights/step-3")


def attributes() -> list[object]:
    """All that the patch changes, as it is now; what a class inherits, as a name."""
    changes = patch._changes(tinker)
    return [vars(change.owner).get(change.name, "inherited") for change in changes]


def test_unpatch_puts_every_attribute_and_the_environment_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_BASE_URL", "http://before")
    before = attributes()
    init_tinker_client(base_url="http://first", api_key="first")
    once = attributes()
    init_tinker_client(base_url="http://second")
    assert (os.environ["TINKER_BASE_URL"], os.environ["TINKER_API_KEY"]) == ("http://second", "first")
    assert all(now is then for now, then in zip(attributes(), once, strict=True))
    assert not any(now is then for now, then in zip(once, before, strict=True))
    unpatch()
    assert all(now is then for now, then in zip(attributes(), before, strict=True))
    assert os.environ["TINKER_BASE_URL"] == "http://before"
    assert "TINKER_API_KEY" not in os.environ
    with pytest.raises(ValueError, match="Invalid tinker path"):
        ParsedCheckpointTinkerPath.from_tinker_path("twinkle://run/weights/step-3")


def test_a_missing_sdk_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name == "tinker" or name.startswith("tinker.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tinker", None)
    with pytest.raises(ImportError, match=r"pip install 'twinkle-tinker-patch\[sdk\]'"):
        init_tinker_client(api_key="any")
    assert "TINKER_API_KEY" not in os.environ


def test_an_sdk_of_another_make_is_refused_and_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    holder = import_module("tinker.lib.internal_client_holder").InternalClientHolder
    auth = import_module("tinker.lib._auth_token_provider").ApiKeyAuthProvider
    before: object = vars(auth)["__init__"]
    monkeypatch.delattr(holder, "_create_sampling_session")
    with pytest.raises(ImportError, match=r"_create_sampling_session.*pip install 'tinker==0\.38\.0'"):
        init_tinker_client(api_key="any")
    assert vars(auth)["__init__"] is before


@pytest.mark.parametrize("version", ["0.39.0", "1.0.0rc1", "0.16.1", "0+unknown"])
def test_a_version_out_of_range_that_has_everything_is_opened_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(tinker, "__version__", version)
    with pytest.warns(UserWarning, match=f"doesn't know version {re.escape(version)}"):
        init_tinker_client()
    assert (
        ParsedCheckpointTinkerPath.from_tinker_path("twinkle://run/weights/step-3").training_run_id == "run"
    )
    init_tinker_client()  # not again: a warning is an error in these tests


def test_the_installed_version_is_one_that_was_tested() -> None:
    assert tinker.__version__ in TESTED_VERSIONS


def test_the_readme_has_the_versions_of_the_code() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    for version, what in TESTED_VERSIONS.items():
        assert f"| {version} | {what} |" in readme


def test_core_hands_the_function_on() -> None:
    assert import_module("twinkle").init_tinker_client is init_tinker_client


def test_importing_the_package_takes_in_nothing_heavy() -> None:
    code = (
        "import sys, twinkle_tinker_patch, twinkle_tinker_patch.hook\n"
        "print(*sys.modules.keys() & {'tinker', 'torch', 'transformers', 'httpx', 'pydantic', 'numpy'})"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == ""
