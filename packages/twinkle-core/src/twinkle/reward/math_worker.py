"""The program that compares mathematical answers. It is run by its path and imports nothing of this package.

It reads one job a line, `[completion, truth, timeout_seconds]` as JSON, and writes one line for each: "equal",
"different" or "no truth". When a job's time is over it ends itself with code 1, whatever it is doing.
"""

import faulthandler
import functools
import json
import os
import signal
import sys
from typing import Any, cast

# Beyond it, answers such as 9^(9^9) fail instead of taking the machine's memory.
_MEMORY_BYTES = 2 * 1024**3

# The library's own limits of time work by signals; `main` sets one that always works.
_NO_TIMEOUT = 0

# Truths without any of these are formulas as they stand.
_DELIMITERS = ("$", r"\(", r"\[", r"\boxed")


def main() -> None:
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    quiet = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stdout = sys.stderr = quiet  # what libraries print is no reply
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the business of who started this
    _limit_memory()
    try:
        judge("1", "1")  # imports what the first job would have to wait for
    except ImportError as error:
        print(f"{type(error).__name__}: {error}", file=replies, flush=True)
        return
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        completion, truth, timeout_seconds = json.loads(line)
        # A timer in C, which needs neither the interpreter nor its lock.
        faulthandler.dump_traceback_later(timeout_seconds, exit=True, file=quiet)
        verdict = judge(completion, truth)
        faulthandler.cancel_dump_traceback_later()
        print(verdict, file=replies, flush=True)


def judge(completion: str, truth: str) -> str:
    """Whether they are "equal" or "different"; "no truth" if there is no answer in `truth`.

    Raises:
        ImportError: if the library is not installed.
    """
    import math_verify

    truths = _parsed_truth(truth)
    if not truths:
        return "no truth"
    answers = _parsed(completion)
    return "equal" if math_verify.verify(truths, answers, timeout_seconds=_NO_TIMEOUT) else "different"


@functools.lru_cache(maxsize=1024)  # the completions of one prompt share their truth
def _parsed_truth(truth: str) -> list[Any]:
    bare = truth and not any(mark in truth for mark in _DELIMITERS)
    return _parsed(rf"\boxed{{{truth}}}" if bare else truth)


def _parsed(text: str) -> list[Any]:
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
