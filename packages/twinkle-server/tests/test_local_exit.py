"""A program in local mode that ends without `close`: in order, without a word, and with what it used written down."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
from twinkle import ServiceClient
from twinkle.protocol import types
from twinkle.server.config import parse_config

model = {"model_id": sys.argv[1], "torch_dtype": "float32"}
client = ServiceClient(parse_config({"model": model, "storage": {"root": sys.argv[2]}}))
training_client = client.create_lora_training_client(base_model=sys.argv[1], rank=2)
datum = types.Datum(types.ModelInput.from_ints([1, 2, 3]), {"target_tokens": [2, 3, 4], "weights": [1.0] * 3})
passes = training_client.forward_backward([datum], "cross_entropy")
step = training_client.optim_step(types.AdamParams(learning_rate=1e-3))
if sys.argv[3] == "ended by an error":
    passes.result()
    sampling_client = training_client.save_weights_and_get_sampling_client()
    sample = sampling_client.sample(types.ModelInput.from_ints([1]), 1, types.SamplingParams(max_tokens=200))
    raise SystemExit(3)
"""


@pytest.mark.parametrize("how", ["under way", "ended by an error"])
def test_what_was_used_is_written_and_nothing_is_said(tmp_path: Path, tiny_model_dir: Path, how: str):
    program = [sys.executable, "-c", PROGRAM, str(tiny_model_dir), str(tmp_path), how]
    ended = subprocess.run(program, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == (3 if how == "ended by an error" else 0), ended.stderr
    assert "Traceback" not in ended.stderr and "twinkle:" not in ended.stderr
    with sqlite3.connect(tmp_path / "twinkle.sqlite") as database:
        used = database.execute("SELECT kind, SUM(count) FROM usage_by_model GROUP BY kind").fetchall()
    assert ("training", 3) in used
