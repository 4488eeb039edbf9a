"""The place of the Megatron-Core backend: found by entry point under the name `megatron`, unable to train as yet.

It says so before anything is loaded.
"""

from typing import NoReturn

from twinkle.protocol.errors import InvalidRequest
from twinkle.server.backends.protocol import ModelConfig
from twinkle_megatron._version import __version__


class MegatronBackend:
    """What `use_megatron: true` asks for."""

    def __init__(self, config: ModelConfig) -> NoReturn:
        """Refuse.

        Raises:
            InvalidRequest: always, with what is lacking and what to use instead.
        """
        raise InvalidRequest(
            f"model.use_megatron: twinkle-megatron {__version__} can't train yet: tensor, pipeline and expert "
            f"parallelism on Megatron-Core are missing, so {config.path} can't be loaded with it. Set "
            "`use_megatron: false` (and leave out tensor_parallel_size and pipeline_parallel_size) to train with the "
            "Transformers backend, which holds the whole model on one device."
        )
