"""The runner, `python -m twinkle_tinker_patch`: sets up an environment and executes the program in its place.

For the environment's effect on the program's processes see `startup/sitecustomize.py` and `hook`.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from twinkle.protocol.errors import InvalidRequest
from twinkle_tinker_patch.settings import resolve_api_key, resolve_base_url

_USAGE = """usage: python -m twinkle_tinker_patch [--base-url URL] [--api-key KEY] PROGRAM [ARGUMENT...]

Runs a program written for the Tinker SDK, unmodified, against a Twinkle server. PROGRAM is what Python itself takes:
a script's path, `-m MODULE` or `-c CODE`; all that follows is the program's own.

  --base-url URL   the server; if not given, TINKER_BASE_URL, then TWINKLE_BASE_URL, then http://localhost:8000
  --api-key KEY    of any form; if not given, TINKER_API_KEY, then what TINKER_CREDENTIAL_CMD prints, then
                   TWINKLE_API_KEY, then none (a server in open mode needs none)
  -h, --help       this text

The SDK is patched in the program and in every Python process that it starts: worker processes, scripts, the `tinker`
command line. What a process is started with without the environment of its parent, or with Python's -I, -E or -S, is
not. TWINKLE_TINKER_PATCH=0 in a process's environment leaves it unpatched; the server's address stays.

examples:
  python -m twinkle_tinker_patch train.py --learning-rate 1e-4
  python -m twinkle_tinker_patch --base-url http://gpu-host:8000 -m tinker_cookbook.recipes.sl_basic
  python -m twinkle_tinker_patch -m tinker.cli checkpoint list"""

_STARTUP = str(Path(__file__).parent.absolute() / "startup")


@dataclass(frozen=True)
class _CommandLine:
    """The parsed options; `program` is the remaining command line for Python."""

    program: list[str]
    base_url: str | None = None
    api_key: str | None = None


def main() -> NoReturn:
    """Execute the program in this process, so that exit status and signals are the program's own."""
    asked = _parse(sys.argv[1:])
    if sys.flags.ignore_environment or sys.flags.no_site:
        _refuse("it works by PYTHONPATH and sitecustomize, which Python's flags -I, -E and -S turn off")
    try:
        environment = os.environ | _environment(asked)
    except InvalidRequest as error:
        _refuse(error.message)
    command = [sys.executable, *_flags_of_python(), *asked.program]
    if os.name == "nt":
        # On Windows, exec starts a second process and ends the first at once.
        sys.exit(subprocess.run(command, env=environment).returncode)
    os.execve(command[0], command, environment)


def _parse(arguments: list[str]) -> _CommandLine:
    """Parse our options up to the first other argument; exits after --help or an error."""
    given: dict[str, str] = {}
    rest = list(arguments)
    while rest and rest[0].startswith("-") and rest[0] not in {"-m", "-c"}:
        option, has_value, value = rest.pop(0).partition("=")
        if option in {"-h", "--help"}:
            print(_USAGE)
            sys.exit(0)
        if option not in {"--base-url", "--api-key"}:
            _refuse(f"unknown option {option}; options of the program come after its name")
        if not has_value and not rest:
            _refuse(f"{option} needs a value")
        given[option] = value if has_value else rest.pop(0)
    if not rest or rest in (["-m"], ["-c"]):
        _refuse("what is to be run? Give a script, -m MODULE or -c CODE")
    return _CommandLine(rest, given.get("--base-url"), given.get("--api-key"))


def _environment(asked: _CommandLine) -> dict[str, str]:
    """The variables added to the program's environment.

    Raises:
        InvalidRequest: if the address is not a URL.
    """
    others = os.environ.get("PYTHONPATH")
    environment = {
        "TWINKLE_TINKER_PATCH": "1",
        "PYTHONPATH": _STARTUP + os.pathsep + others if others else _STARTUP,
        "TINKER_BASE_URL": resolve_base_url(asked.base_url),
    }
    api_key = resolve_api_key(asked.api_key)
    return environment | ({"TINKER_API_KEY": api_key} if api_key else {})


def _flags_of_python() -> list[str]:
    """The arguments before `-m twinkle_tinker_patch`, such as -u or -X dev."""
    before = sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv) + 1]
    return before[:-2] if before[-2:-1] == ["-m"] else []


def _refuse(reason: str) -> NoReturn:
    print(f"twinkle_tinker_patch: {reason} (see python -m twinkle_tinker_patch --help)", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
