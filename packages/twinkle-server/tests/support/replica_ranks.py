"""Data-parallel ranks of the Transformers backend in processes of their own."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import torch
from rank_processes import RankProcesses

from twinkle.server.backends.hf.base_model import LoadedModel, load_base_model
from twinkle.server.backends.protocol import ModelConfig
from twinkle.server.backends.transformers import TransformersBackend


def start(config: ModelConfig) -> RankProcesses:
    return RankProcesses.start(config, load, ["twinkle.server.backends.transformers"], shares_rows=True)


def load(config: ModelConfig) -> Rank:
    # The parts of a sharded base move into its first backend.
    return Rank(None if config.shard_base else load_base_model(config), [])


@dataclass(frozen=True)
class Held:
    """What a rank has.

    Attributes:
        moments: elements, of its newest backend's adapters.
        gradient_bytes_sent: so far.
        base_bytes: of its parts of a sharded base.
        live_bytes: of all tensors in its process.
    """

    moments: int
    gradient_bytes_sent: int
    base_bytes: int
    live_bytes: int


@dataclass
class Rank:
    loaded: LoadedModel | None
    backends: list[TransformersBackend]

    def backend(self, config: ModelConfig) -> TransformersBackend:
        self.backends.append(TransformersBackend(config, self.loaded))
        return self.backends[-1]

    def held(self) -> Held:
        backend = self.backends[-1]
        assert backend._replicas is not None
        sharded = backend._networks.first.sharded
        gc.collect()
        live = [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]
        # Each storage once, whatever views there are of it.
        storages = {
            storage._cdata: storage.nbytes()
            for tensor in live
            if type(tensor) in (torch.Tensor, torch.nn.Parameter) and not tensor.is_meta
            for storage in [tensor.untyped_storage()]
        }
        return Held(
            moments=sum(row.numel() for bank in backend._banks.values() for row in bank.exp_avg.values()),
            gradient_bytes_sent=backend._replicas.bytes_sent,
            base_bytes=0 if sharded is None else sharded.held_bytes,
            live_bytes=sum(storages.values()),
        )
