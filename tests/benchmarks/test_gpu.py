"""`benchmarks/gpu.py` in toy size on the CPU, where none of what a service needs can be imported; and its parts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
FORBIDDEN = ("fastapi", "modelscope_hub", "ray", "sqlalchemy", "starlette", "uvicorn")
# Imported by each Python that has its folder on the path.
SITE = f"""
import sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {FORBIDDEN!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Finder())
"""


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """An environment in which the forbidden modules can't be imported."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE, encoding="utf-8")
    inherited = os.environ.get("PYTHONPATH", "")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), inherited])}


@pytest.mark.parametrize("module", FORBIDDEN)
def test_what_a_service_needs_cannot_be_imported_there(bare: dict[str, str], module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import {module}"], env=bare, capture_output=True, text=True
    )
    assert f"No module named '{module}'" in done.stderr


@pytest.mark.timeout(600)  # half a minute of one core that is free
def test_a_toy_run(bare: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--toy", "--minutes", "9.5", "--out", str(out)]
    bare = {**bare, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=bare, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    whole = json.loads((out / "report.json").read_text(encoding="utf-8"))
    found = {part["name"]: part for part in whole["parts"]}
    skipped = {name: part["notes"] for name, part in found.items() if part["status"] != "passed"}
    assert skipped == {
        "waits for the device": ["only a GPU is waited for"],
        "out of memory": ["a CPU's memory has no such limit"],
    }
    assert found["contract, float32"]["rows"] == []  # it lists those that have not passed
    for name in ("Qwen3-0.6B", "Qwen3-4B", "Qwen3.5-4B"):
        steps = found[f"{name}: training"]["rows"] + found[f"{name}: training, many tenants"]["rows"]
        assert [row["result"] for row in steps] == ["measured"] * 4
        assert all(row["tokens/s"] > 0 and row["TFLOP/s"] > 0 for row in steps)
        shares = [row["share"] for row in found[f"{name}: training, time by kernel"]["rows"]]
        assert sum(shares) == pytest.approx(1)
        lines = found[f"{name}: decoding"]["rows"]
        assert [(row["sequences"], row["adapters"]) for row in lines] == [(8, 1), (8, 8), (16, 1), (16, 8)]
        assert found[f"{name}: hand-over"]["rows"][0]["first token, ms"] > 0
    page = (out / "report.md").read_text(encoding="utf-8")
    assert all(f"## {name}: {part['status']}" in page for name, part in found.items())
