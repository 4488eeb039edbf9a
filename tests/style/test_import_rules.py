"""The import rules hold, and each of them catches the import it is there for."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORE = "twinkle-core/src/twinkle"
SERVER = "twinkle-server/src/twinkle/server"

# Where -> what is planted there -> the contract that has to break.
VIOLATIONS = [
    (f"{CORE}/planted.py", "import torch", "twinkle-core needs no torch"),
    (f"{CORE}/protocol/planted.py", "def late():\n    import transformers", "twinkle-core needs no torch"),
    (f"{CORE}/planted.py", "from twinkle.server.backends import protocol", "Only twinkle-megatron builds on"),
    (f"{CORE}/planted.py", "import twinkle_client", "Neither core nor server imports a client"),
    (f"{SERVER}/planted.py", "import twinkle_megatron", "Neither core nor server imports a client"),
    ("twinkle-client/src/twinkle_client/planted.py", "import datasets", "Both clients need no torch"),
    (
        "twinkle-client/src/twinkle_client/planted.py",
        "import twinkle.server.config",
        "Both clients need no torch",
    ),
    ("twinkle-tinker-patch/src/twinkle_tinker_patch/planted.py", "import ray", "Both clients need no torch"),
    (
        f"{SERVER}/gateway/planted.py",
        "from twinkle.server.serve import deployments",
        "The gateway knows HTTP",
    ),
    (f"{SERVER}/gateway/planted.py", "import torch.nn", "The gateway knows HTTP"),
    (
        f"{SERVER}/scheduling/planted.py",
        "from twinkle.server.gateway import app",
        "Scheduling is policy alone",
    ),
    (f"{SERVER}/scheduling/planted.py", "import httpx", "Scheduling is policy alone"),
    (
        f"{SERVER}/engine/planted.py",
        "from starlette.requests import Request",
        "The engine knows neither ray nor HTTP",
    ),
    (
        f"{SERVER}/store/planted.py",
        "from ray import serve",
        "Only serve/ and the composition root import ray",
    ),
    (f"{SERVER}/engine/planted.py", "from twinkle.server.service import service", "The server's layers"),
    (f"{SERVER}/backends/planted.py", "import sqlalchemy", "Backends and samplers run without a service"),
    (
        f"{SERVER}/samplers/transformers/planted.py",
        "def late():\n    from twinkle.hub import downloads",
        "Backends and samplers run without a service",
    ),
    (f"{SERVER}/samplers/vllm/planted.py", "import vllm", "vLLM is imported by name"),
    (f"{SERVER}/store/planted.py", "from twinkle.server.scheduling import runs", "The server's layers"),
    (f"{SERVER}/planted.py", "", "The server's layers"),  # a module that has no place among them
    (
        "twinkle-megatron/src/twinkle_megatron/planted.py",
        "from twinkle.server.backends.transformers import passes",
        "A backend of one's own",
    ),
]


def lint(tree: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts/lint_imports.py"), str(tree)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_tree_keeps_every_rule() -> None:
    linted = lint(ROOT)
    assert linted.returncode == 0, linted.stdout + linted.stderr


@pytest.mark.parametrize(("where", "planted", "broken"), VIOLATIONS)
def test_a_planted_import_breaks_its_rule(tmp_path: Path, where: str, planted: str, broken: str) -> None:
    for source in ROOT.glob("packages/*/src"):
        copy = tmp_path / source.relative_to(ROOT)
        shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "packages" / where).write_text(planted + "\n")
    linted = lint(tmp_path)
    assert linted.returncode == 1, linted.stdout + linted.stderr
    assert any(broken in line and "BROKEN" in line for line in linted.stdout.splitlines()), linted.stdout
