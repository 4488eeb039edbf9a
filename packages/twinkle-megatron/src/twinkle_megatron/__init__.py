"""Training backend on Megatron-Core, for models that one device can't hold."""

from twinkle_megatron._version import __version__
from twinkle_megatron.backend import MegatronBackend

__all__ = ["MegatronBackend", "__version__"]
