"""The mission's snippets, as they are written there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
COOKBOOK = HERE.parents[1] / "cookbook"
pytestmark = pytest.mark.serve


def test_the_twinkle_client_script_and_the_sampling_script_run_as_written(
    live_server, hub_root: Path, tmp_path: Path
):
    # The sampling snippet goes on in the client's script; its `types` are those of the client in use.
    script = tmp_path / "script.py"
    script.write_text(
        (HERE / "twinkle_client_example.py").read_text()
        + "from twinkle_client import types\n"
        + (HERE / "sampling_example.py").read_text()
        + "print('TOKENS', len(result.sequences[0].tokens), result.sequences[0].stop_reason)\n"
    )
    environment = {
        k: v for k, v in os.environ.items() if k not in ("API_KEY", "TWINKLE_API_KEY", "TWINKLE_BASE_URL")
    }
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**environment, "TWINKLE_HUB_ROOT": str(hub_root)},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stderr
    count, reason = done.stdout.rpartition("TOKENS ")[2].split()
    assert 1 <= int(count) <= 128
    assert reason in ("stop", "length")


def test_a_script_finds_the_server_by_itself_as_the_mission_has_it(
    live_server, hub_root: Path, tmp_path: Path
):
    """`python cookbook/client/twinkle/self_host/self_cognition.py`, and nothing else said."""
    named = ("API_KEY", "TWINKLE_API_KEY", "TWINKLE_BASE_URL", "MODELSCOPE_BASE_URL", "MODELSCOPE_BASE_MODEL")
    environment = {name: value for name, value in os.environ.items() if name not in named}
    done = subprocess.run(
        [sys.executable, str(COOKBOOK / "client" / "twinkle" / "self_host" / "self_cognition.py")],
        cwd=tmp_path,
        env={**environment, "TWINKLE_HUB_ROOT": str(hub_root), "PYTHONUTF8": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed" not in done.stderr, done.stderr
    assert "saved twinkle://" in done.stdout
