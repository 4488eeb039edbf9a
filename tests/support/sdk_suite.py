"""The SDK's suite against a server that a test has started."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_SUITE = Path(__file__).parents[1] / "sdk"
# Where the SDK as it comes is enough, not opened by the patch.
UNPATCHED = "unpatched or not patched"
SAMPLING = ("test_sampling.py", "test_rollouts.py")


def run(base_url: str, model: Path, tests: str, files: Sequence[str] = ("",), seconds: float = 1100) -> None:
    """
    Args:
        model: directory of the model that the server has under the mission's name.
        tests: as pytest's -k; empty is all.
        files: of the suite; default: all of it, but for older SDKs.
        seconds: most that it may take.

    Raises:
        AssertionError: if a test fails, or there is none.
    """
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *(str(_SUITE / file) for file in files),
            *("-k", tests, "--ignore", str(_SUITE / "test_older_sdk.py")),
        ],
        env={**os.environ, "TWINKLE_TEST_BASE_URL": base_url, "TWINKLE_TEST_MODEL": str(model)},
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout.splitlines()[-1]
