"""Training backend on Megatron-Core, for models that one device can't hold: `twinkle_megatron.backend.MegatronBackend`,
found by entry point under the name `megatron`.
"""

import warnings

from twinkle_megatron._version import __version__

__all__ = ["__version__"]

# Megatron-Core recommends kernels for what isn't used here (its optimizers, norms and CUDA graphs), at each import.
for _message in (".*Apex", "full scope is deprecated"):
    warnings.filterwarnings("ignore", message=_message, module=r"megatron\.core")
