"""Ranks of Megatron's backend in processes of their own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from rank_processes import Load, RankProcesses

from twinkle.server.backends.protocol import ModelConfig
from twinkle_megatron import stage
from twinkle_megatron.backend import MegatronBackend
from twinkle_megatron.stage import Stage


def load(config: ModelConfig) -> Rank:
    read = _watch_reading()
    return Rank(stage.load(config), read)


def load_short_of_memory(config: ModelConfig) -> RankShortOfMemory:
    rank = load(config)
    return RankShortOfMemory(replace(rank.stage, affordable_tokens=0), rank.read)


def start(config: ModelConfig, how: Load = load) -> RankProcesses:
    return RankProcesses.start(config, how, ["twinkle_megatron.backend"])


@dataclass
class Rank:
    stage: Stage
    read: list[int]

    def backend(self, config: ModelConfig) -> MegatronBackend:
        return MegatronBackend(config, self.stage)

    def held(self) -> Any:
        """Three numbers: elements that the rank holds, has read from files, and has read at once at most."""
        held = sum(parameter.numel() for parameter in self.stage.model.parameters())
        return held, sum(self.read), max(self.read)


class RankShortOfMemory(Rank):
    """As on a device that can't keep any activations."""

    def held(self) -> bool:
        """Whether the last pass has recomputed them."""
        return self.stage.context.recomputes


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
