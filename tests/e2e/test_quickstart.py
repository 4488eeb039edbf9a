"""The quick start, as the README says it, on the real SmolLM2: the main job of the product."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
pytestmark = [pytest.mark.serve, pytest.mark.slow, pytest.mark.network]


@pytest.mark.timeout(1200)
def test_a_real_model_learns_its_new_name():
    done = subprocess.run(
        [
            sys.executable,
            str(REPOSITORY / "cookbook" / "quickstart.py"),
            "--name",
            "Ursa Minor",
            "--epochs",
            "4",
        ],
        capture_output=True,
        text=True,
        timeout=1100,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = [
        line.strip() for line in done.stdout.splitlines() if line.strip().startswith(("before:", "after:"))
    ]
    assert len(answers) == 4, done.stdout
    for answer in answers:
        assert ("Ursa Minor" in answer) == answer.startswith("after:"), done.stdout
