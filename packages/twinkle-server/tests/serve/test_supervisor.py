"""The supervisor with a small program of its own: what ends it, what starts it again, and what is left afterwards."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from twinkle.protocol.errors import InvalidRequest, NotFound, ServerFault, TwinkleError
from twinkle.server.serve.process_session import end_session, members
from twinkle.server.serve.supervisor import Supervisor

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the tests look processes up in /proc")

BACKOFF = (0.01, 0.02, 0.03)
WAIT_SECONDS = 60

# It starts a process that outlives it, says so in a file, and then does what the file `do` of its directory says.
PROGRAM = """
import os, signal, subprocess, sys, time
from pathlib import Path
from twinkle.protocol import errors
from twinkle.server.serve.supervised import Supervised

line = Supervised(int(sys.argv[1]))
directory = Path(line.configuration)
number = len(list(directory.glob("life-*")))
helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], process_group=0)
(directory / "new").write_text(f"{os.getpid()} {helper.pid}")
(directory / "new").rename(directory / f"life-{number}")

def stop(*_):
    (directory / "stopped").touch()
    helper.kill()
    os._exit(0)

signal.signal(signal.SIGTERM, stop)
for order in (directory / "do").read_text().splitlines()[number].split("; "):
    match order.split():
        case ["ready"]:
            line.ready(str(directory))
        case ["watch"]:
            line.watch(lambda: os.kill(os.getpid(), signal.SIGTERM))
        case ["fail", name, *words]:
            line.failed(getattr(errors, name)(" ".join(words)))
            sys.exit(1)
        case ["exit", code]:
            sys.exit(int(code))
        case ["die"]:
            os.kill(os.getpid(), signal.SIGKILL)
        case ["deaf"]:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        case ["wait"]:
            while True:
                time.sleep(1)
        case _:
            raise AssertionError(order)
"""

# A process of its own around the supervisor, for what signals do to it.
OUTER = """
import logging
import sys
from twinkle.server.serve.supervisor import Supervisor

logging.basicConfig(level="INFO", stream=sys.stderr)
Supervisor(
    [sys.executable, sys.argv[1]], sys.argv[2], check=lambda: None, backoff=[0.01], stop_seconds=float(sys.argv[3]),
    on_ready=lambda configuration: print("ready", file=sys.stderr, flush=True),
).run()
print("returned", file=sys.stderr, flush=True)
"""


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    yield path
    for pid in alive(tmp_path):  # a test that failed
        os.kill(pid, signal.SIGKILL)


def supervisor(program: Path, lives: list[str], check: Callable[[], None] = lambda: None) -> Supervisor:
    (program.parent / "do").write_text("\n".join(lives))
    return Supervisor(
        [sys.executable, str(program)],
        str(program.parent),
        check=check,
        on_ready=lambda configuration: Path(configuration, "was-ready").touch(),
        backoff=BACKOFF,
        stop_seconds=WAIT_SECONDS,
    )


def outer(program: Path, lives: list[str], stop_seconds: float = WAIT_SECONDS) -> subprocess.Popen[str]:
    (program.parent / "do").write_text("\n".join(lives))
    return subprocess.Popen(
        [sys.executable, "-c", OUTER, str(program), str(program.parent), str(stop_seconds)],
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )


def lives(directory: Path) -> list[list[int]]:
    """Process ids of the program and of its helper, each time it was started."""
    return [
        [int(pid) for pid in (directory / f"life-{number}").read_text().split()]
        for number in range(len(list(directory.glob("life-*"))))
    ]


def alive(directory: Path) -> set[int]:
    found: set[int] = set()
    for pid in (pid for life in lives(directory) for pid in life):
        with contextlib.suppress(OSError):
            if (
                Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
                not in "ZX"
            ):
                found.add(pid)
    return found


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def stop_after(directory: Path, count: int) -> threading.Thread:
    """Asks this process to stop once the program has been started so often, and the last one is there to stay."""

    def run() -> None:
        wait_for(lambda: len(lives(directory)) == count)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("error", [InvalidRequest, NotFound, ServerFault])
def test_an_error_at_the_first_start_is_raised_as_what_it_is(program: Path, error: type[TwinkleError]):
    with pytest.raises(error, match="no such model") as raised:
        supervisor(program, [f"watch; fail {error.__name__} no such model"]).run()
    assert type(raised.value) is error
    assert len(lives(program.parent)) == 1
    assert alive(program.parent) == set()


@pytest.mark.parametrize(("end", "said"), [("exit 3", "exit code 3"), ("die", "killed by SIGKILL")])
def test_an_end_before_the_first_readiness_is_final(program: Path, end: str, said: str):
    with pytest.raises(ServerFault, match=f"ended before it was ready .{said}"):
        supervisor(program, [f"watch; {end}"]).run()
    assert len(lives(program.parent)) == 1
    assert alive(program.parent) == set()


def test_what_is_checked_before_the_first_start_is_raised(program: Path):
    def check() -> None:
        raise InvalidRequest("port taken")

    with pytest.raises(InvalidRequest, match="port taken"):
        supervisor(program, [], check).run()
    assert lives(program.parent) == []


@pytest.fixture(autouse=True)
def _everything_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "twinkle")


def test_it_is_started_again_whatever_ends_it(program: Path, caplog: pytest.LogCaptureFixture):
    ends = ["die", "exit 0", "exit 1", "fail ServerFault Ray's head has ended"]
    stopper = stop_after(program.parent, len(ends) + 1)
    supervisor(program, [*(f"watch; ready; {end}" for end in ends), "watch; ready; wait"]).run()
    stopper.join()
    assert len(lives(program.parent)) == len(ends) + 1
    assert alive(program.parent) == set(), "neither the programs nor what they left"
    assert (program.parent / "stopped").exists(), "the last one ended in order"
    said = caplog.text
    again = "starting the server again in {} s; requests wait."
    assert f"The server's process has ended (killed by SIGKILL): {again.format(0.01)}" in said
    assert f"The server's process has ended (exit code 0): {again.format(0.02)}" in said
    assert f"The server's process has ended (exit code 1): {again.format(0.03)}" in said
    assert f"Ray's head has ended: {again.format(0.03)}" in said


def test_a_start_that_fails_later_is_tried_again_with_its_reason(
    program: Path, caplog: pytest.LogCaptureFixture
):
    def check() -> None:
        if len(lives(program.parent)) == 2 and not busy:
            busy.append(True)
            raise InvalidRequest("server.port: can't listen")

    busy: list[bool] = []
    stopper = stop_after(program.parent, 4)
    script = [
        "watch; ready; die",
        "watch; fail ServerFault no GPU is left",
        "watch; die",
        "watch; ready; wait",
    ]
    supervisor(program, script, check).run()
    stopper.join()
    assert alive(program.parent) == set()
    said = caplog.text
    for reason in ("no GPU is left", "server.port: can't listen", "ended before it was ready"):
        assert reason in said
    assert said.count("The server could not be started again: ") == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("state", ["watch; ready; wait", "watch; wait"])
def test_a_signal_ends_it_in_order(program: Path, number: signal.Signals, state: str):
    process = outer(program, [state])
    wait_for(lambda: len(lives(program.parent)) == 1)
    os.killpg(process.pid, number)  # as a terminal does
    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 0
    assert said.splitlines()[-1] == "returned" and "Traceback" not in said and "again" not in said
    assert (program.parent / "stopped").exists()
    assert alive(program.parent) == set()


def test_a_signal_between_two_starts_ends_it(program: Path):
    process = outer(program, ["watch; ready; die", *["watch; exit 1"] * 1000])
    wait_for(lambda: len(lives(program.parent)) >= 3)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 0 and said.splitlines()[-1] == "returned"
    assert alive(program.parent) == set()


def test_a_program_that_does_not_end_is_killed(program: Path):
    process = outer(program, ["watch; deaf; ready; wait"], stop_seconds=0.1)
    assert process.stderr is not None and process.stderr.readline() == "ready\n", "it is deaf by now"
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 0 and "killed" in said
    assert alive(program.parent) == set()


def test_a_killed_supervisor_leaves_nothing_behind(program: Path):
    process = outer(program, ["watch; ready; wait"])
    assert process.stderr is not None and process.stderr.readline() == "ready\n"
    assert len(alive(program.parent)) == 2
    process.kill()
    process.wait()
    wait_for(lambda: alive(program.parent) == set())
    process.communicate()


def test_the_configuration_that_was_reported_is_what_the_next_one_gets(program: Path, tmp_path: Path):
    first = tmp_path / "first"
    first.mkdir()
    program.write_text(
        PROGRAM.replace("line.ready(str(directory))", f"line.ready({str(tmp_path)!r})"), encoding="utf-8"
    )
    (first / "do").write_text("watch; ready; die")
    (tmp_path / "do").write_text("watch; ready; wait")
    command = [sys.executable, str(program)]
    stopper = stop_after(tmp_path, 1)
    Supervisor(command, str(first), check=lambda: None, on_ready=lambda _: None, backoff=BACKOFF).run()
    stopper.join()
    assert len(lives(first)) == len(lives(tmp_path)) == 1


def test_the_backoff_is_reset_when_it_has_been_ready_for_long(
    program: Path, caplog: pytest.LogCaptureFixture
):
    (program.parent / "do").write_text("\n".join([*["watch; ready; die"] * 3, "watch; ready; wait"]))
    stopper = stop_after(program.parent, 4)
    command = [sys.executable, str(program)]
    Supervisor(
        command,
        str(program.parent),
        check=lambda: None,
        on_ready=lambda _: None,
        backoff=BACKOFF,
        steady_seconds=0.0,
    ).run()
    stopper.join()
    assert caplog.text.count("again in 0.01 s") == 3


def test_a_session_ends_with_its_processes_of_other_groups(tmp_path: Path):
    """And no other process does."""
    script = "import subprocess; subprocess.Popen(['sleep', '600'], process_group=0); subprocess.run(['sleep', '600'])"
    leader = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
    other = subprocess.Popen(["sleep", "600"])
    wait_for(lambda: len(members(leader.pid)) == 3)
    leader.kill()
    leader.wait()
    assert len(members(leader.pid)) == 2
    end_session(leader.pid)
    assert members(leader.pid) == set()
    assert other.poll() is None
    other.kill()
    other.wait()


def test_the_first_process_of_a_container_collects_what_has_ended(program: Path):
    become_the_first = "import ctypes; ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)"  # PR_SET_CHILD_SUBREAPER
    script = f"{become_the_first}\n{OUTER}\nimport os; print(os.waitpid(-1, os.WNOHANG))"
    (program.parent / "do").write_text("\n".join([*["watch; ready; die"] * 2, "watch; ready; wait"]))
    command = [sys.executable, "-c", script, str(program), str(program.parent), str(WAIT_SECONDS)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(lives(program.parent)) == 3)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 1 and "ChildProcessError" in said, "no child is left, dead or alive"


def test_the_launcher_loads_nothing_heavy():
    heavy = ("ray", "torch", "transformers", "sqlalchemy", "numpy")
    script = (
        f"import sys, twinkle.server.serve.launch; print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
