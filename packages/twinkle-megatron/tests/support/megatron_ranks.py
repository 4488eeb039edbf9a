"""Ranks of Megatron's backend in processes of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rank_processes import RankProcesses

from twinkle.server.backends.protocol import ModelConfig
from twinkle_megatron import stage
from twinkle_megatron.backend import MegatronBackend
from twinkle_megatron.stage import Stage


def start(config: ModelConfig) -> RankProcesses:
    return RankProcesses.start(config, load, ["twinkle_megatron.backend"])


def load(config: ModelConfig) -> Rank:
    read = _watch_reading()
    return Rank(stage.load(config), read)


@dataclass
class Rank:
    stage: Stage
    read: list[int]

    def backend(self, config: ModelConfig) -> MegatronBackend:
        return MegatronBackend(config, self.stage)

    def held(self) -> tuple[int, int, int]:
        """Elements that the rank holds, has read from files, and has read at once at most."""
        held = sum(parameter.numel() for parameter in self.stage.model.parameters())
        return held, sum(self.read), max(self.read)


def _watch_reading() -> list[int]:
    """How many elements come out of safetensors each time that one is read."""
    from twinkle_megatron import weights

    read: list[int] = []

    class Watched:
        def __init__(self, tensor: Any) -> None:
            self._tensor = tensor

        def get_shape(self) -> list[int]:
            return self._tensor.get_shape()

        def __getitem__(self, index: Any) -> Any:
            part = self._tensor[index]
            read.append(part.numel())
            return part

    slices = weights._Checkpoint.slices
    weights._Checkpoint.slices = lambda self, name: Watched(slices(self, name))
    return read
