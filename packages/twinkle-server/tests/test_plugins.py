"""Backends and engines are found by name; one that isn't there is an error that says what to install."""

from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

from twinkle.protocol.errors import InvalidRequest
from twinkle.server import plugins
from twinkle.server.config import parse_config
from twinkle.server.plan import make_plan
from twinkle.server.plugins import SAMPLING_ENGINES, TRAINING_BACKENDS


def install(monkeypatch: pytest.MonkeyPatch, *points: tuple[str, str]) -> None:
    """What the environment seems to hold: names of training backends, and where they are."""
    found = EntryPoints(EntryPoint(name, value, TRAINING_BACKENDS) for name, value in points)
    monkeypatch.setattr(plugins, "entry_points", lambda group: found.select(group=group))


def test_a_server_without_twinkle_megatron_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    install(monkeypatch, ("transformers", "a:A"), ("fake", "b:B"))
    config = parse_config({"model": {"model_id": str(tmp_path), "use_megatron": True}})
    with pytest.raises(InvalidRequest) as refused:
        make_plan(config)
    message = str(refused.value)
    assert "'megatron' is not installed (installed: fake, transformers)" in message
    assert "pip install 'twinkle-server[megatron]'" in message


def test_another_name_that_is_not_there_gets_no_such_advice(monkeypatch: pytest.MonkeyPatch):
    install(monkeypatch)
    with pytest.raises(InvalidRequest, match=r"'vllm' is not installed \(installed: none\)$"):
        plugins.look_up(SAMPLING_ENGINES, "vllm")


def test_a_name_that_two_distributions_claim_is_refused(monkeypatch: pytest.MonkeyPatch):
    install(monkeypatch, ("megatron", "one:A"), ("megatron", "two:B"))
    with pytest.raises(InvalidRequest, match=r"claimed by several distributions \(one:A, two:B\)"):
        plugins.find(TRAINING_BACKENDS, "megatron")


def test_the_built_in_ones_are_there():
    for group, name in ((TRAINING_BACKENDS, "transformers"), (SAMPLING_ENGINES, "transformers")):
        assert plugins.look_up(group, name).value.startswith("twinkle.server.")
