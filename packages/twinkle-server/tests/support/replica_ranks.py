"""Data-parallel ranks of the Transformers backend in processes of their own."""

from __future__ import annotations

from dataclasses import dataclass

from rank_processes import RankProcesses

from twinkle.server.backends.hf.base_model import LoadedModel, load_base_model
from twinkle.server.backends.protocol import ModelConfig
from twinkle.server.backends.transformers import TransformersBackend


def start(config: ModelConfig) -> RankProcesses:
    return RankProcesses.start(config, load, ["twinkle.server.backends.transformers"], shares_rows=True)


def load(config: ModelConfig) -> Rank:
    return Rank(load_base_model(config), [])


@dataclass
class Rank:
    loaded: LoadedModel
    backends: list[TransformersBackend]

    def backend(self, config: ModelConfig) -> TransformersBackend:
        self.backends.append(TransformersBackend(config, self.loaded))
        return self.backends[-1]

    def held(self) -> tuple[int, int]:
        """Of the newest backend: elements of moments, and bytes of gradients that were sent."""
        backend = self.backends[-1]
        assert backend._replicas is not None
        moments = sum(row.numel() for bank in backend._banks.values() for row in bank.exp_avg.values())
        return moments, backend._replicas.bytes_sent
