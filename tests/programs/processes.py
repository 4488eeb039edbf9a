"""Child processes that are waited for with a time limit, and none of which outlives the driver.

A process that dies at once leaves its own children to the system. Ray starts a dozen of them. On Linux the driver
asks to inherit such orphans, and so finds and ends them all.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36


class ProgramFailed(Exception):
    """A program ended with an error, or not in time."""


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent dies (Linux; elsewhere nothing)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def start(
    command: Sequence[str], directory: Path, environment: Mapping[str, str], log: Path
) -> subprocess.Popen[bytes]:
    """Start a program in a process group of its own; what it writes goes to the end of `log`."""
    with log.open("ab") as stream:
        return subprocess.Popen(
            command,
            cwd=directory,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def finish(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Wait until it has ended well.

    Raises:
        ProgramFailed: it ended with another code than 0, or was still running after `seconds` and has been ended.
    """
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        kill(process)
        raise ProgramFailed(f"still running after {seconds:.0f} s") from None
    if code != 0:
        raise ProgramFailed(f"exit code {code}")


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and its group at once."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def interrupt(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Ctrl-C, and the end at once if that takes too long."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            kill(process)


def end_descendants() -> int:
    """End every process that was started from here, directly or not; returns how many there were (Linux)."""
    ended = 0
    # Killing a parent hands its children to this process: look until there are none.
    for _ in range(100):
        children = _children()
        if not children:
            break
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            ended += 1
        time.sleep(0.05)
    return ended


def _children() -> list[int]:
    """Ids of the children of this process that run; those that have ended by themselves are reaped."""
    path = Path(f"/proc/self/task/{os.getpid()}/children")
    pids = [int(pid) for pid in path.read_text(encoding="utf-8").split()] if path.exists() else []
    return [pid for pid in pids if os.waitpid(pid, os.WNOHANG) == (0, 0)]
