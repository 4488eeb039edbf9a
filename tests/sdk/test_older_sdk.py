"""The same suite under an older SDK, in a process of its own, against the same server.

What it sends is the same whether it is patched or not, once a key is taken and the scheme of a path is read. So the
whole suite runs patched; unpatched run the loop (train, save, sample), the command line, and what knows no patch.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tinker_sdk import SDK_VERSION

OLDER = "0.30.0"
WHAT = "not unpatched or test_loop or test_cli"

pytestmark = [
    pytest.mark.network,
    pytest.mark.skipif(SDK_VERSION < (0, 38), reason="this is the process that runs under the older SDK"),
]


@pytest.mark.timeout(900)
def test_the_suite_passes_under_an_older_sdk(base_url: str, model_dir: Path, tmp_path: Path):
    # Ahead of this environment's own on the path; what it needs besides is here already.
    older = tmp_path / "older-sdk"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(older)]
    subprocess.run([*command, f"tinker=={OLDER}"], check=True, timeout=300)
    suite = ["-q", "-p", "no:cacheprovider", "-k", WHAT, str(Path(__file__).parent)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *suite],
        env={
            **os.environ,
            "PYTHONPATH": str(older),
            "TWINKLE_TEST_BASE_URL": base_url,
            "TWINKLE_TEST_MODEL": str(model_dir),
        },
        capture_output=True,
        text=True,
        timeout=850,
    )
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stdout[-6000:]}{done.stderr[-4000:]}"
    assert "failed" not in done.stdout.splitlines()[-1]
    assert " passed" in done.stdout.splitlines()[-1]
