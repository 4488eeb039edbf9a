"""Real models' chat templates for tests, as TRL, Axolotl and Unsloth bring them along in their wheels.

They are fetched once from the package index, without what these packages need, and kept beside the tokenizers
(`real_tokenizers`). TRL has some of them twice: as a model has it, and with `{% generation %}` blocks around what the
assistant says (`NAME_training`).
"""

import ast
import subprocess
import sys
import tempfile
import zipfile
from functools import cache
from pathlib import Path

import pytest
from real_tokenizers import cache_dir

# Held to one release each: what tests expect was looked at for these.
PACKAGES = {"trl": "trl==1.16.0", "axolotl": "axolotl==0.19.0", "unsloth": "unsloth==2026.10.9"}

_FOLDERS = {"trl": "trl/chat_templates/", "axolotl": "axolotl/utils/chat_templates/templates/"}
_UNSLOTH = "unsloth/chat_templates.py"


@cache
def sources() -> dict[str, str]:
    """Jinja source by name, such as "trl/qwen3"; skips the test where the package index has not got the packages."""
    found: dict[str, str] = {}
    for package, requirement in PACKAGES.items():
        with zipfile.ZipFile(_wheel(package, requirement)) as wheel:
            if package == "unsloth":
                found |= _unsloth(wheel.read(_UNSLOTH).decode())
                continue
            for name in wheel.namelist():
                if name.startswith(_FOLDERS[package]) and name.endswith(".jinja"):
                    found[f"{package}/{Path(name).stem}"] = wheel.read(name).decode()
    return found


def _wheel(package: str, requirement: str) -> Path:
    folder = cache_dir() / "chat-templates"
    name = requirement.replace("==", "-")
    known = next(folder.glob(f"{name}-*.whl"), None)
    if known is not None:
        return known
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetched-", dir=folder) as work:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        fetched = subprocess.run([*command, "--dest", work, requirement], capture_output=True, text=True)
        if fetched.returncode != 0:
            pytest.skip(f"{requirement} can't be fetched here: {fetched.stderr.strip()[-200:]}")
        [wheel] = Path(work).glob("*.whl")
        return wheel.replace(folder / wheel.name)


def _unsloth(module: str) -> dict[str, str]:
    """The texts named `..._template` in Unsloth's module, which is read, not run."""
    texts: dict[str, str] = {}
    for node in ast.parse(module).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            value = _text(node.value, texts)
            if value is not None and node.targets[0].id.endswith("_template"):
                texts[node.targets[0].id] = value
    return {f"unsloth/{name.removesuffix('_template')}": text for name, text in texts.items() if "{%" in text}


def _text(node: ast.expr, known: dict[str, str]) -> str | None:
    """The value of literals, names and sums of these."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _text(node.left, known), _text(node.right, known)
        return left + right if left is not None and right is not None else None
    return None
