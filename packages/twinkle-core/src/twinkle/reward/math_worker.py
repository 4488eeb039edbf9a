"""The program that compares mathematical answers. It is run by its path and imports nothing from this package.

It reads one job per line, `[completion, truth, timeout_seconds]` as JSON, and writes one line for each: "equal",
"different" or "no truth". At a job's timeout it exits with code 1, whatever it is doing.
"""

import faulthandler
import functools
import json
import os
import re
import signal
import sys
from decimal import Decimal
from typing import Any, Final, cast

# With this limit, answers such as 9^(9^9) fail instead of exhausting the machine's memory.
_MEMORY_BYTES = 2 * 1024**3

# The library's own timeouts use signals; `main` sets one that always works.
_NO_TIMEOUT = 0

# Truths without any of these are plain formulas.
_DELIMITERS = ("$", r"\(", r"\[", r"\boxed")

# Scientific notation: the library reads 6.63e-34 as 6.63 times Euler's number, minus 34.
_SCIENTIFIC: Final = re.compile(r"(?<![\w.\\])(\d+(?:\.\d+)?|\.\d+)[eE]([+-]?\d{1,3})(?![\w^{]|\.\d)")

# Decimals to which the library compares, and significant digits for numbers below 1.
_DIGITS: Final = 6


def main() -> None:
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    quiet = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stdout = sys.stderr = quiet  # libraries' output must not be taken for a reply
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    _limit_memory()
    try:
        judge("1", "1")  # does the slow imports before the first job
    except ImportError as error:
        print(f"{type(error).__name__}: {error}", file=replies, flush=True)
        return
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        completion, truth, timeout_seconds = json.loads(line)
        # A C timer, which needs neither the interpreter nor its lock.
        faulthandler.dump_traceback_later(timeout_seconds, exit=True, file=quiet)
        verdict = judge(completion, truth)
        faulthandler.cancel_dump_traceback_later()
        print(verdict, file=replies, flush=True)


def judge(completion: str, truth: str) -> str:
    """Whether they are "equal" or "different"; "no truth" if there is no answer in `truth`.

    Raises:
        ImportError: if the library is not installed.
    """
    truths = _parsed_truth(truth)
    if not truths:
        return "no truth"
    answers = _parsed(completion)
    return "equal" if any(_equal(one, other) for one in truths for other in answers) else "different"


def _equal(truth: Any, answer: Any) -> bool:
    """Whether two of the expressions, or their texts, are equal.

    The library rounds to decimals, which says nothing of small numbers. So decimals are compared here, and the rest
    with as many decimals as the smallest number in it needs.
    """
    import math_verify

    of_truth, of_answer = _real_value(truth), _real_value(answer)
    if of_truth is not None and of_answer is not None and (_has_decimals(truth) or _has_decimals(answer)):
        return bool(abs(of_truth - of_answer) <= _tolerance(of_truth, exact=not _has_decimals(truth)))
    more = max(_zeros_of_smallest(truth), _zeros_of_smallest(answer))
    return math_verify.verify(
        [truth],
        [answer],
        float_rounding=_DIGITS + more,
        numeric_precision=15 + more,
        timeout_seconds=_NO_TIMEOUT,
    )


def _tolerance(truth: Any, exact: bool) -> Any:
    """How far a decimal may be from the truth: half of the last of six decimals, or of six digits if that is less.

    Args:
        exact: whether the truth is a fraction, a root or the like. Then six decimals do for it from 0.001 on: 1/30 is
            0.033333.
    """
    from sympy import Rational

    size = abs(truth)
    # What two numbers of double precision differ by that are written in different ways, such as 6.02e23 and 60.2e22.
    noise = size * Rational(4, 10**16)
    if size >= 1 or (exact and size >= Rational(1, 1000)):
        return max(Rational(1, 2 * 10**_DIGITS), noise)
    return Rational(1, 2 * 10 ** (_DIGITS + _zeros(size))) if size else 0


def _zeros(size: Any) -> int:
    """The zeros behind the point of a positive number, none from 0.1 on."""
    return max(0, -1 - Decimal(str(size.evalf(20))).adjusted())


def _zeros_of_smallest(expression: Any) -> int:
    """The zeros behind the point of the smallest number in an expression, a set, an interval or a matrix."""
    from sympy import MatrixBase

    most = 0
    pending: list[Any] = [expression]
    while pending:
        part = pending.pop()
        value = _real_value(part)
        if value is not None:
            most = max(most, _zeros(abs(value)) if value else 0)
        else:
            pending += cast(Any, part).flat() if isinstance(part, MatrixBase) else getattr(part, "args", ())
    return most


def _real_value(expression: Any) -> Any:
    """An expression's value as a fraction, or to 40 digits; None if it is no real number."""
    from sympy import Basic, Float, Rational

    if not isinstance(expression, Basic) or not getattr(expression, "is_number", False):
        return None
    try:
        plain = cast(Any, expression).doit()
        plain = plain.xreplace({number: Rational(number) for number in plain.atoms(Float)})
        value = plain if plain.is_Rational else plain.evalf(40)
        return value if value.is_Rational or value.is_Float else None
    except (
        ArithmeticError,
        AttributeError,
        TypeError,
        ValueError,
    ):  # what the library can't work out is no number
        return None


def _has_decimals(expression: Any) -> bool:
    from sympy import Float

    return bool(expression.has(Float))


@functools.lru_cache(maxsize=1024)  # the completions of one prompt share their truth
def _parsed_truth(truth: str) -> list[Any]:
    bare = truth and not any(mark in truth for mark in _DELIMITERS)
    return _parsed(rf"\boxed{{{truth}}}" if bare else truth)


def _parsed(text: str) -> list[Any]:
    """The final answer as an expression and its text, or nothing; of what is written like 2e-3, both readings."""
    plain = _SCIENTIFIC.sub(lambda number: f"{Decimal(number[0]):f}", text)
    return _extracted(text) + (_extracted(plain) if plain != text else [])


def _extracted(text: str) -> list[Any]:
    """What the library takes for the final answer: an expression and its text, or nothing."""
    import math_verify

    # A box goes before any other sign of a final answer. (Truths are read with the same settings because the library
    # compiles its expressions anew whenever these change.)
    formats = (math_verify.LatexExtractionConfig(boxed_match_priority=0), math_verify.ExprExtractionConfig())
    return cast(list[Any], math_verify.parse(text, formats, parsing_timeout=_NO_TIMEOUT))


def _limit_memory() -> None:
    if sys.platform != "win32":
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        soft = _MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(_MEMORY_BYTES, hard)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


if __name__ == "__main__":
    main()
