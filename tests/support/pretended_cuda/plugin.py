"""`pytest --pretend-cuda`: models without a device of their own are loaded onto a pretended GPU."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import gettempdir

import pytest

from pretended_cuda import guard
from pretended_cuda.counts import COUNTS, Counts

_OPTION = "--pretend-cuda"
_no_guard: list[str] = []  # why there is none, if there is none


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    parser.addoption(_OPTION, action="store_true", help="run tests on a GPU that isn't there")
    # Conftests that are loaded after this import torch and the server, so this can't wait for `pytest_configure`.
    config = pluginmanager.get_plugin("pytestconfig")
    assert isinstance(config, pytest.Config)
    if _is_asked_for(config):
        try:
            _pretend()
        except guard.NoGuard as error:
            _no_guard.append(str(error))


def _is_asked_for(config: pytest.Config) -> bool:
    """On the command line, or in the options that a process of pytest-xdist is given."""
    return _OPTION in config.invocation_params.args or getattr(config.option, "pretend_cuda", False)


def _pretend() -> None:
    directory = Path(gettempdir()) / f"pretended-cuda-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    guard.load(directory)
    from pretended_cuda import runtime

    runtime.install()
    from twinkle.server.backends.protocol import ModelConfig

    # What tests don't say is "cpu" else.
    defaults = ModelConfig.__init__.__defaults__
    assert defaults is not None
    ModelConfig.__init__.__defaults__ = tuple("cuda" if value == "cpu" else value for value in defaults)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption(_OPTION) and not _is_asked_for(config):
        raise pytest.UsageError(f"{_OPTION} is looked for on the command line alone: give it there")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    is_pretended = config.getoption(_OPTION)
    for item in items:
        needs_it = "device_counts" in getattr(item, "fixturenames", ())
        if not is_pretended and needs_it:
            item.add_marker(pytest.mark.skip(reason=f"needs pytest {_OPTION}"))
        elif is_pretended and _no_guard:
            item.add_marker(pytest.mark.skip(reason=_no_guard[0]))


@pytest.fixture
def device_counts() -> Counts:
    """What happens on the pretended GPU; without it the test is skipped."""
    COUNTS.reset()
    return COUNTS
