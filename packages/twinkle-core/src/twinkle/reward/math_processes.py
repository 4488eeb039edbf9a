"""Processes that compare mathematical answers, and can be killed at any moment.

`math_verify` has timeouts by signals, which work only in the main thread, and not while a single huge power is
computed. A process can be killed whatever it does, and swallows the library's messages. Each comparing thread uses its
own process; idle ones are kept.

`math_worker` decides what an answer is, and when two are equal.
"""

import atexit
import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import IO, Literal, TypeAlias, cast

from twinkle.protocol.errors import InvalidRequest

Verdict: TypeAlias = Literal["equal", "different", "no truth", "unfinished"]
Process: TypeAlias = "subprocess.Popen[str]"

_WORKER = Path(__file__).with_name("math_worker.py")

# A worker's exit code at its timeout.
_TIME_IS_OVER = 1

_idle: list[Process] = []


def compare(completion: str, truth: str, timeout_seconds: float) -> Verdict:
    """Whether the completion's final answer equals the true one.

    Returns:
        "no truth" if there is no answer in `truth`; "unfinished" if it took too much time or memory.

    Raises:
        InvalidRequest: if the library is not installed.
    """
    job = json.dumps([completion, truth, timeout_seconds])
    for _ in range(2):  # the process may have been killed from outside, so try another
        process = _take()
        try:
            verdict = _ask(process, job)
        except BaseException:  # Ctrl-C: the pending reply must not be taken for the next one
            process.kill()
            _end(process)
            raise
        if verdict:
            _idle.append(process)
            return cast(Verdict, verdict)
        if _end(process) == _TIME_IS_OVER:
            break
    return "unfinished"


def _ask(process: Process, job: str) -> str:
    """The reply; empty if the process has ended."""
    sink, source = _pipes(process)
    try:
        sink.write(job + "\n")
        sink.flush()
    except OSError:
        return ""
    return source.readline().strip()


def _take() -> Process:
    while _idle:
        try:
            process = _idle.pop()
        except IndexError:  # another thread was faster
            break
        if process.poll() is None:
            return process
        _end(process)
    return _start()


def _start() -> Process:
    # The same module path as here, so that the worker finds the same library.
    paths = os.pathsep.join(path for path in sys.path if path)
    process = subprocess.Popen(
        [sys.executable, "-P", str(_WORKER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": paths},
        encoding="utf-8",
    )
    greeting = _pipes(process)[1].readline().strip()
    if greeting != "ready":
        _end(process)
        raise InvalidRequest(
            f"MathReward needs the library math_verify ({greeting or 'its process could not start'}): "
            "pip install 'twinkle-core[math]'"
        )
    return process


def _end(process: Process) -> int:
    """Close a process's pipes, which ends it if it is idle, and return its exit code."""
    for pipe in _pipes(process):
        with contextlib.suppress(OSError):
            pipe.close()
    return process.wait()


def _pipes(process: Process) -> tuple[IO[str], IO[str]]:
    return cast(IO[str], process.stdin), cast(IO[str], process.stdout)


def _end_idle() -> None:
    while _idle:
        _end(_idle.pop())


def _forget_idle() -> None:
    """After a fork: the idle processes belong to the parent, which still uses them."""
    for process in _idle:
        for pipe in _pipes(process):
            pipe.close()
        process.returncode = 0  # else it would be waited for
    _idle.clear()


atexit.register(_end_idle)
if sys.platform != "win32":
    os.register_at_fork(after_in_child=_forget_idle)
