"""Runs `python -m MODULE` again and again from one process that has imported what takes seconds to import.

Each run is a process of its own, forked before anything of the module has run: arguments, environment, output and
exit code are its own. It ends without the interpreter's own shutdown.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

# Reads one line of JSON a run; answers with the exit status, as `os.waitstatus_to_exitcode` has it.
_PARENT = """
import atexit, importlib, json, os, runpy, sys, traceback
for name in sys.argv[2:]:
    importlib.import_module(name)
module, answers = sys.argv[1], os.fdopen(os.dup(1), "w")
while line := sys.stdin.readline():
    run = json.loads(line)
    child = os.fork()
    if not child:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)
else:
    sys.exit()
answers.close()
for number, path in enumerate((os.devnull, run["stdout"], run["stderr"])):
    opened = os.open(path, os.O_WRONLY if number else os.O_RDONLY)
    os.dup2(opened, number)
    os.close(opened)
os.environ.clear()
os.environ.update(run["environment"])
sys.argv = [module, *run["arguments"]]
code = 0
try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
except SystemExit as end:
    code = end.code if isinstance(end.code, int) else int(end.code is not None)
except BaseException:
    traceback.print_exc()
    code = 1
atexit._run_exitfuncs()
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)  # taking all that was imported apart would be most of the time
"""


class ForkedPrograms:
    """
    Args:
        module: what is run.
        preload: what is imported once.
    """

    def __init__(self, module: str, preload: list[str]) -> None:
        self._parent = subprocess.Popen(
            [sys.executable, "-c", _PARENT, module, *preload],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        assert self._parent.stdin and self._parent.stdout
        with tempfile.TemporaryDirectory() as folder:
            stdout, stderr = Path(folder) / "stdout", Path(folder) / "stderr"
            stdout.touch()
            stderr.touch()
            asked = {
                "arguments": arguments,
                "environment": {**os.environ, **environment},
                "stdout": str(stdout),
                "stderr": str(stderr),
            }
            self._parent.stdin.write(json.dumps(asked) + "\n")
            self._parent.stdin.flush()
            code = int(self._parent.stdout.readline())
            return subprocess.CompletedProcess(list(arguments), code, stdout.read_text(), stderr.read_text())

    def close(self) -> None:
        with self._parent:  # closes its standard input, and waits
            pass
