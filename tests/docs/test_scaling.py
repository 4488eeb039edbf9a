"""docs/scaling.md says what its arithmetic says, and the arithmetic what can be reckoned by hand."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "scaling.md"


@pytest.fixture(scope="module")
def reckoned() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reckon_scaling", ROOT / "benchmarks" / "reckon_scaling.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_tables_as_they_are_reckoned(reckoned: ModuleType) -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert sorted(reckoned.places(page)) == sorted(reckoned.TABLES)
    assert reckoned.filled(page) == page, "python benchmarks/reckon_scaling.py --write docs/scaling.md"


def test_a_72b_base_and_its_adapter_by_hand(reckoned: ModuleType) -> None:
    attention = 2 * (8192 + 8192) + 2 * (8192 + 1024)
    feed_forward = 3 * (8192 + 29568)
    assert reckoned.QWEN_72B.adapter(32) == 32 * (80 * (attention + feed_forward) + 8192 + 152064)
    # What its makers say: 72.7 billion parameters, 70.0 without embeddings.
    assert reckoned.QWEN_72B.parameters() / 1e9 == pytest.approx(72.7, rel=1e-3)
    without_embeddings = reckoned.QWEN_72B.parameters() - 2 * 8192 * 152064
    assert without_embeddings / 1e9 == pytest.approx(70.2, rel=3e-3)


def test_the_journal_takes_what_a_token_is_encoded_in(reckoned: ModuleType) -> None:
    short, long = reckoned.journal_bytes(1000), reckoned.journal_bytes(2000)
    # Ids, targets and weights take 16 bytes, log-probabilities 4.
    assert (long.accepted - short.accepted) / 1000 == pytest.approx(16, abs=0.1)
    assert (long.done - short.done) / 1000 == pytest.approx(4, abs=0.1)


def test_adapters_that_fit_by_hand(reckoned: ModuleType) -> None:
    """64 copies of 8.2 billion parameters in bfloat16: (80 - 16.4) / 2 GB for 4 + 12 / 64 bytes of 92.3 million."""
    found = reckoned.resident_adapters(reckoned.QWEN_8B, 1, 64, reckoned.Assumed())
    assert found == pytest.approx((80 - 16.4) / 2 / (4.1875 * 0.0923), rel=0.01)


def test_throughput_is_that_of_the_arithmetic(reckoned: ModuleType) -> None:
    base, assumed = reckoned.QWEN_72B, reckoned.Assumed()
    one = reckoned.tokens_per_second(base, 1, assumed)
    assert reckoned.tokens_per_second(base, 64, assumed) == pytest.approx(64 * one)
    assert one * 4 * base.multiplied() == pytest.approx(0.35 * 990e12)
