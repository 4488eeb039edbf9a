"""Training as a service for LoRA: the parts that need no torch.

Two names are imported only when they are used, since other distributions provide them: `ServiceClient` (local mode,
twinkle-server) and `init_tinker_client` (twinkle-tinker-patch).
"""

from pkgutil import extend_path

# `twinkle.server` is shipped by another distribution, in this package's path.
__path__ = extend_path(__path__, __name__)

from importlib import import_module
from typing import Any

from twinkle._version import __version__

__all__ = ["ServiceClient", "__version__", "init_tinker_client"]

# name -> (module, what to install)
_FROM_OTHER_DISTRIBUTIONS = {
    "ServiceClient": ("twinkle.server.local", "twinkle-server"),
    "init_tinker_client": ("twinkle_tinker_patch", "twinkle-tinker-patch[sdk]"),
}


def __getattr__(name: str) -> Any:
    if name not in _FROM_OTHER_DISTRIBUTIONS:
        raise AttributeError(f"module 'twinkle' has no attribute {name!r}")
    module_name, distribution = _FROM_OTHER_DISTRIBUTIONS[name]
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise
        raise ImportError(
            f"twinkle.{name} needs the distribution {distribution}: pip install '{distribution}'"
        ) from error
    return getattr(module, name)
