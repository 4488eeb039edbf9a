"""No function of the packages is longer than 60 lines, docstring and all."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 60


def too_long(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {node: (node.end_lineno or node.lineno) - node.lineno + 1 for node in functions}
    name = path.relative_to(ROOT)
    return [f"{name}:{node.lineno} {node.name}: {n} lines" for node, n in lengths.items() if n > LIMIT]


def test_no_function_is_longer_than_the_limit() -> None:
    sources = sorted(ROOT.glob("packages/*/src/**/*.py"))
    assert sources
    assert [entry for path in sources for entry in too_long(path)] == []
