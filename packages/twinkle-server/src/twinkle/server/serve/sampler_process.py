"""One sampler of its own: a Ray actor that loads the whole model, and answers calls to its `LocalSampler` over RPC."""

from __future__ import annotations

import asyncio
from typing import cast

import ray

from twinkle.server import logs
from twinkle.server.backends.protocol import AdapterState, ModelConfig
from twinkle.server.engine.worker import LocalSampler, build_sampler
from twinkle.server.serve import torch_settings
from twinkle.server.serve.machine import on_this_machine
from twinkle.server.serve.rpc import Address, Server


class SamplerProcess:
    """Ray calls these methods: adapters come from its object store, on whatever machine they were put there. All other
    calls go through `rpc.Server`.
    """

    _loading: asyncio.Task[LocalSampler]
    _server: Server

    async def serve(
        self, callers_node: str, config: ModelConfig, engine: str, sharers: int, model_id: str | None
    ) -> Address:
        """Load the model and take calls.

        Args:
            callers_node: Ray's id of the machine that the caller is on.
            sharers: processes that share the machine's cores.
            model_id: as in `Rank.serve`.

        Raises:
            Exception: whatever keeps the engine from starting.
        """
        logs.send("sampler")
        self._loading = asyncio.create_task(asyncio.to_thread(_load, config, engine, sharers, model_id))
        await self._loading
        is_here = callers_node == ray.get_runtime_context().get_node_id()
        host = None if is_here else cast(str, ray.util.get_node_ip_address())
        self._server = Server(self._loading)
        return await self._server.listen(host)

    async def add_adapter(self, sampler_adapter_id: str, state: AdapterState) -> None:
        """As `SamplingEngine.add_adapter`. Ray has replaced the reference by what it stands for, without a copy."""
        await (await self._loading).add_sampler_adapter(sampler_adapter_id, state)


def _load(config: ModelConfig, engine: str, sharers: int, model_id: str | None) -> LocalSampler:
    config = on_this_machine(config, model_id)
    if config.device == "cpu" or engine != "vllm":  # which has allocators and threads of its own
        torch_settings.before_import(config.device)
        torch_settings.set_threads(sharers)
    return build_sampler(config, engine)
