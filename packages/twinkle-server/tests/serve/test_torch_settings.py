"""What a rank's process sets up before it imports torch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from twinkle.server.serve import torch_settings

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "OMP_WAIT_POLICY")
EXPANDABLE = "expandable_segments:True"


@pytest.mark.parametrize(
    ("device", "given", "expected"),
    [
        ("cuda", {}, [EXPANDABLE, EXPANDABLE, None]),
        ("cuda:1", {NAMES[1]: "backend:native"}, [None, "backend:native", None]),
        ("cuda", {NAMES[0]: "backend:native"}, ["backend:native", None, None]),
        ("cpu", {}, [None, None, "PASSIVE"]),
        ("cpu", {NAMES[2]: "ACTIVE"}, [None, None, "ACTIVE"]),
    ],
)
def test_what_the_user_has_set_stays(
    device: str, given: dict[str, str], expected: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    torch_settings.before_import(device)
    assert [os.environ.get(name) for name in NAMES] == expected


def test_a_ranks_modules_leave_torch_to_be_imported_after_that() -> None:
    program = (
        "import sys; from twinkle.server.serve import rank, sampler_process; print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
