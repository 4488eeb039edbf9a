"""Training backend on Megatron-Core, for models too large for one device: `twinkle_megatron.backend.MegatronBackend`,
found by entry point under the name `megatron`.
"""

import warnings

from twinkle_megatron._version import __version__

__all__ = ["__version__"]

# At each import, Megatron-Core recommends kernels for parts not used here (its optimizers, norms and CUDA graphs).
for _message in (".*Apex", "full scope is deprecated"):
    warnings.filterwarnings("ignore", message=_message, module=r"megatron\.core")
