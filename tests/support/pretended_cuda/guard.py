"""Compiles guard.cpp, and loads it. Imports no torch: the guard must be there when torch is imported.

Run as a program, it compiles: `python guard.py LIBRARY`.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

_SOURCE = Path(__file__).with_name("guard.cpp")


class NoGuard(Exception):
    """Why there is no guard."""


def load(directory: Path) -> None:
    """Load the guard into this process.

    Args:
        directory: where the compiled library is kept, for later runs with this torch.

    Raises:
        NoGuard: if it can't be compiled here, or torch has been imported already.
    """
    if "torch" in sys.modules:
        raise NoGuard("torch was imported before the guard could be loaded")
    key = hashlib.sha256(_SOURCE.read_bytes() + importlib.metadata.version("torch").encode())
    library = directory / f"guard-{key.hexdigest()[:16]}.so"
    if not library.exists():
        # A process of its own, since this one must not import torch yet; torch knows where its headers are.
        made = subprocess.run([sys.executable, __file__, str(library)], capture_output=True, text=True)
        if made.returncode:
            raise NoGuard(f"guard.cpp can't be compiled here:\n{made.stderr.strip()[-2000:]}")
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _compile(library: Path) -> None:
    from torch.utils import cpp_extension

    folders = cpp_extension.library_paths()
    # Under its name at once, for several processes may compile it.
    unfinished = library.with_name(f"{library.name}.{os.getpid()}")
    command = [cpp_extension.get_cxx_compiler(), "-std=c++20", "-shared", "-fPIC", str(_SOURCE)]
    command += [f"-I{folder}" for folder in cpp_extension.include_paths()]
    command += [f"-L{folder}" for folder in folders] + [f"-Wl,-rpath,{folder}" for folder in folders]
    command += ["-ltorch_cpu", "-lc10", "-o", str(unfinished)]
    try:
        done = subprocess.run(command)
    except OSError as error:
        sys.exit(f"no C++ compiler ({error})")
    if done.returncode:
        sys.exit(done.returncode)
    unfinished.replace(library)


if __name__ == "__main__":
    _compile(Path(sys.argv[1]))
