"""What Python runs as it starts where this folder is on PYTHONPATH: turns the import hook on, then steps aside.

The folder leaves `sys.path` again, and the environment's own `sitecustomize`, if there is one, runs as it would have.
"""

import os
import sys
from importlib.machinery import PathFinder


def _open_sdk_when_imported() -> None:
    if os.environ.get("TWINKLE_TINKER_PATCH") != "1":
        return
    try:
        from twinkle_tinker_patch.hook import install
    except ModuleNotFoundError as error:
        if error.name != "twinkle_tinker_patch":
            raise
        # The Python of another environment, into which this package was not installed.
        return
    install()


def _run_the_next_sitecustomize() -> None:
    here = os.path.dirname(__file__)
    sys.path[:] = [entry for entry in sys.path if entry != here]
    spec = PathFinder.find_spec("sitecustomize")
    if spec is not None and spec.loader is not None:
        from importlib.util import module_from_spec

        module = module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


_open_sdk_when_imported()
_run_the_next_sitecustomize()
