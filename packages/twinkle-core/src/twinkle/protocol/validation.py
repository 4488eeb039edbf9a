"""Validation errors as sentences for people."""

import difflib
from collections.abc import Iterable
from typing import Final

from pydantic import ValidationError

MAX_NAME: Final = 80
"""Most characters of a foreign name in an error message."""

_MAX_PROBLEMS = 8


def describe_validation(error: ValidationError) -> str:
    """The errors of a validation as one sentence per field."""
    problems: list[str] = []
    for problem in error.errors(include_url=False)[:_MAX_PROBLEMS]:
        where = ".".join(str(part)[:MAX_NAME] for part in problem["loc"]) or "body"
        given = "" if problem["type"] == "missing" else f" (got {str(problem['input'])[:80]!r})"
        said = problem["msg"].removeprefix("Value error, ")  # pydantic's prefix for our own checks
        problems.append(f"{where}: {said}{given}")
    if error.error_count() > _MAX_PROBLEMS:
        problems.append(f"and {error.error_count() - _MAX_PROBLEMS} more")
    return "; ".join(problems)


def unknown_name(name: str, known: Iterable[str]) -> str:
    """A sentence about an unknown name, with the nearest of the known ones."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"there is no {name[:MAX_NAME]!r}; {hint}known are {', '.join(names)}"
