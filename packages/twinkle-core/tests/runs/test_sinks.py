"""TensorBoard and Weights & Biases get what is logged, by their own packages."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from twinkle.protocol.errors import InvalidRequest
from twinkle.runs import Run


def test_tensorboard_reads_the_same_numbers(tmp_path: Path):
    with Run("board", root=tmp_path, tensorboard=True) as run:
        run.log(loss=2.0, reward=0.25)
        run.log(loss=1.0)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(run.directory / "tensorboard"))
    events.Reload()
    read = {
        tag: [float(make_ndarray(event.tensor_proto)) for event in events.Tensors(tag)]
        for tag in ("loss", "reward")
    }
    assert read == {"loss": [2.0, 1.0], "reward": [0.25]}


def test_wandb_gets_a_run_of_its_own(tmp_path: Path):
    # In a process of its own: wandb starts a service and keeps global state.
    program = """
import sys
from twinkle.runs import Run
with Run("bees", root=sys.argv[1], wandb="project", config={"rank": 8}) as run:
    run.log(loss=2.0)
print(run.directory)
"""
    environment = {
        **os.environ,
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_CACHE_DIR": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    directory = Path(done.stdout.splitlines()[-1])
    [kept] = directory.glob("wandb/offline-run-*/*.wandb")
    assert directory.name in kept.name
    content = kept.read_bytes()
    assert b"loss" in content and b"rank" in content
    assert json.loads((directory / "metrics.jsonl").read_text())["loss"] == 2.0


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tensorboard.summary", None)
    with pytest.raises(InvalidRequest, match=r"pip install 'twinkle-core\[tensorboard\]'"):
        Run("board", root=tmp_path, tensorboard=True)
