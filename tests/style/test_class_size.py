"""No class of the packages is longer than 300 lines, or made from more than eight parts."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MOST_LINES = 300
MOST_PARAMETERS = 8

# Class -> its length or number of parameters when it was listed. An entry that breaks the limit no more fails the test.
TOO_LONG: dict[str, int] = {
    "server/store/database.py Database": 407,
}
TOO_MANY_PARTS: dict[str, int] = {}


def classes() -> Iterator[tuple[str, ast.ClassDef]]:
    """Each class of the packages, by its file below the import package's directory, and its own name."""
    for source in sorted(ROOT.glob("packages/*/src/*")):
        for path in sorted(source.rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef):
                    yield f"{path.relative_to(source)} {node.name}", node


def lines(node: ast.ClassDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def parameters(node: ast.ClassDef) -> int:
    """Of `__init__`, without self; 0 where it has none of its own. What a dataclass holds is not counted."""
    for function in node.body:
        if isinstance(function, ast.FunctionDef) and function.name == "__init__":
            given = function.args
            return len(given.posonlyargs + given.args + given.kwonlyargs) - 1
    return 0


def beyond(limit: int, size: Callable[[ast.ClassDef], int]) -> dict[str, int]:
    return {name: size(node) for name, node in classes() if size(node) > limit}


def test_the_sizes_are_counted() -> None:
    [node] = ast.parse("class A:\n    def __init__(self, a, /, b, *, c=1):\n        pass\n").body
    assert isinstance(node, ast.ClassDef)
    assert (lines(node), parameters(node)) == (3, 3)
    assert len(list(classes())) > 300


def test_no_class_is_longer_than_the_limit() -> None:
    check(beyond(MOST_LINES, lines), TOO_LONG)


def test_no_class_is_made_from_more_parts_than_the_limit() -> None:
    check(beyond(MOST_PARAMETERS, parameters), TOO_MANY_PARTS)


def check(found: dict[str, int], listed: dict[str, int]) -> None:
    grown = {name: size for name, size in found.items() if size > listed.get(name, 0)}
    assert grown == {}, "beyond the limit, or more than when it was listed"
    assert sorted(listed) == sorted(found), "take out of the list what no longer breaks the limit"
